// The ops on the GPU (device_key.h). Compiled only where csrc/cuda is.
#include <torch/library.h>

#include "../cuda/adam_cuda.h"
#include "checks.h"
#include "device_key.h"

namespace kinml::ops {
namespace {

using at::Tensor;

// Calls function with a value of the tensor's C++ type.
template <class Function>
void with_type(const Tensor& t, const Function& function) {
  if (t.scalar_type() == at::kDouble)
    function(double());
  else
    function(float());
}

void adam_step(Tensor parameter, const Tensor& gradient, Tensor mean, Tensor square,
               const std::optional<Tensor>& largest, double learning_rate, double beta1,
               double beta2, double eps, double weight_decay, bool decoupled, int64_t step) {
  check_same_device(parameter, "parameter", gradient, "gradient");
  check_same_device(parameter, "parameter", mean, "mean");
  check_same_device(parameter, "parameter", square, "square");
  check_same_device(parameter, "parameter", largest, "largest");
  const OnDevice device(parameter);
  const Tensor g = gradient.contiguous();
  check_adam(parameter, g, mean, square, largest, step);
  with_type(parameter, [&](auto zero) {
    using T = decltype(zero);
    cuda::adam_step<T>({learning_rate, beta1, beta2, eps, weight_decay, decoupled, step},
                       parameter.numel(), parameter.mutable_data_ptr<T>(), g.const_data_ptr<T>(),
                       mean.mutable_data_ptr<T>(), square.mutable_data_ptr<T>(),
                       largest.has_value() ? largest->mutable_data_ptr<T>() : nullptr,
                       device.stream());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, KINML_DEVICE_KEY, m) {
  m.impl("adam_step", adam_step);
}

}  // namespace kinml::ops
