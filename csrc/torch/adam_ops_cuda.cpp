// The step of the optimizer on the GPU.
#include <torch/library.h>

#include "../cuda/adam_cuda.h"
#include "checks.h"
#include "gpu.h"

namespace kinml::ops {
namespace {

using at::Tensor;

void adam_step(Tensor parameter, const Tensor& gradient, Tensor mean, Tensor square,
               const std::optional<Tensor>& largest, double learning_rate, double beta1,
               double beta2, double eps, double weight_decay, bool decoupled, Tensor step) {
  check_device(gradient, "gradient", parameter, "parameter");
  check_device(mean, "mean", parameter, "parameter");
  check_device(square, "square", parameter, "parameter");
  if (largest.has_value()) check_device(*largest, "largest", parameter, "parameter");
  const Gpu gpu(parameter);
  const Tensor g = gradient.contiguous();
  check_adam(parameter, g, mean, square, largest, step);
  with_type(parameter, [&](auto zero) {
    using T = decltype(zero);
    cuda::adam_step<T>({learning_rate, beta1, beta2, eps, weight_decay, decoupled, 0},
                       step.mutable_data_ptr<double>(), parameter.numel(),
                       parameter.mutable_data_ptr<T>(), g.const_data_ptr<T>(),
                       {mean.mutable_data_ptr<T>(), square.mutable_data_ptr<T>(),
                        largest.has_value() ? largest->mutable_data_ptr<T>() : nullptr},
                       gpu.stream);
  });
  count_write(parameter);
}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, KINML_GPU_KEY, m) {
  m.impl("adam_step", adam_step);
}

}  // namespace kinml::ops
