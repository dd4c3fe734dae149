// Where the ops of *_cuda.cpp run: on a GPU or, compiled with KINML_TWIN, on the host, where they
// take the place of the CPU's ops in the process that loads them (tests/build_twin.py).
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <cstdint>
#include <optional>

#include "../cuda/launch.h"

#ifdef KINML_TWIN
#define KINML_DEVICE_KEY CPU
#else
#define KINML_DEVICE_KEY CUDA
#endif

// torch's C interface, the same in every version; only a torch with CUDA has it (in libtorch_cuda,
// which is not linked, so that the library loads without).
extern "C" __attribute__((weak)) std::int32_t aoti_torch_get_current_cuda_stream(
    std::int32_t device_index, void** stream);

namespace kinml::ops {

// While one lives, the GPU of a tensor is the current one.
class OnDevice {
 public:
  explicit OnDevice(const at::Tensor& t) : device_(t.device()), guard_(t.device()) {}

  // The stream on which torch works there.
  cuda::Stream stream() const {
#ifdef KINML_TWIN
    return nullptr;
#else
    void* stream = nullptr;
    TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr &&
                    aoti_torch_get_current_cuda_stream(device_.index(), &stream) == 0,
                "kinml_fast: torch does not tell its current stream on ", device_);
    return stream;
#endif
  }

 private:
  c10::Device device_;
  c10::OptionalDeviceGuard guard_;
};

// All must be on the device of `first`, whose kernel is running.
inline void check_same_device(const at::Tensor& first, const char* first_name, const at::Tensor& t,
                              const char* name) {
  TORCH_CHECK(t.device() == first.device(), "kinml_fast: ", first_name, " is on ", first.device(),
              " but ", name, " is on ", t.device(), "; all tensors must be on one device");
}
inline void check_same_device(const at::Tensor& first, const char* first_name,
                              const std::optional<at::Tensor>& t, const char* name) {
  if (t.has_value()) check_same_device(first, first_name, *t, name);
}

}  // namespace kinml::ops
