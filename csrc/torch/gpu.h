// What the ops on the GPU share: the device, its stream, memory, and errors as torch's.
//
// Compiled with KINML_TWIN the ops take the place of those on the CPU, with the kernels run on the
// host (csrc/cuda/group.h): so that the tests of the ops run on machines without a GPU.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <cstdint>
#include <string>

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
  // Without a link to torch's CUDA library: this function is part of its C interface, the same in
  // every version.
  static cuda::Stream stream_of([[maybe_unused]] c10::Device device) {
    void* stream = nullptr;
#ifndef KINML_TWIN
    using GetStream = std::int32_t(std::int32_t, void**);
    static GetStream* const get_stream = [] {
      void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library == nullptr ? nullptr
                                : reinterpret_cast<GetStream*>(
                                      dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    TORCH_CHECK(get_stream != nullptr && get_stream(device.index(), &stream) == 0,
                "kinml_fast: torch does not tell its current stream on ", device);
#endif
    return stream;
  }
};

inline char* bytes_of(const at::Tensor& workspace) {
  return static_cast<char*>(workspace.mutable_data_ptr());
}

// Calls function for so many structures; what launches and torch's allocator throw becomes a
// sentence.
template <class Function>
auto translated(int64_t n_structures, const Function& function) {
  try {
    return function();
  } catch (const cuda::Error& error) {
    TORCH_CHECK(false, "kinml_fast: ", error.what());
  } catch (const c10::OutOfMemoryError& error) {
    const std::string what = error.what_without_backtrace();
    TORCH_CHECK_WITH(OutOfMemoryError, false, "kinml_fast: ", n_structures,
                     " structures at a time do not fit into the memory of the GPU: try ",
                     n_structures > 1 ? n_structures / 2 : 1, ", or float32 (",
                     what.substr(0, what.find('\n')), ")");
  }
}

}  // namespace kinml::ops
