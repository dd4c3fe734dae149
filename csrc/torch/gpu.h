// What the ops on the GPU share: the device, its stream, memory, and errors as torch's.
//
// Compiled with KINML_TWIN the ops take the place of those on the CPU, with the kernels run on the
// host (csrc/cuda/group.h): so that the tests of the ops run on machines without a GPU.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "../cuda/launch.h"

#ifdef KINML_TWIN
#define KINML_GPU_KEY CPU
#else
#define KINML_GPU_KEY CUDA
#endif

namespace kinml::ops {

// The device of a tensor, made current, and its current stream.
struct Gpu {
  at::TensorOptions options;
  c10::DeviceGuard guard;
  cuda::Stream stream;

  explicit Gpu(const at::Tensor& t)
      : options(t.options()), guard(t.device()), stream(stream_of(t.device())) {}

  // Memory of torch's allocator, which knows the stream.
  at::Tensor workspace(std::int64_t bytes) const {
    return at::empty({bytes}, options.dtype(at::kChar));
  }

 private:
  static cuda::Stream stream_of(c10::Device device) {
#ifdef KINML_TWIN
    (void)device;
    return nullptr;
#else
    // Without a link to libc10_cuda.
    const c10::impl::VirtualGuardImpl guard(device.type());
    return guard.getStream(device).native_handle();
#endif
  }
};

// Calls function; what the launches throw becomes an error of torch.
template <class Function>
auto translated(const Function& function) {
  try {
    return function();
  } catch (const cuda::Error& error) {
    TORCH_CHECK(false, "kinml_fast: ", error.what());
  }
}

}  // namespace kinml::ops
