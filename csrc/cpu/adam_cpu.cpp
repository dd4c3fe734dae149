#include "adam_cpu.h"

#include <algorithm>
#include <cmath>

#include "adam_kernels.h"
#include "parallel.h"

namespace kinml::cpu {

namespace {
constexpr std::int64_t kBlock = 4096;  // numbers of a work item; a multiple of every register
}

template <class T>
void adam_step(const AdamSettings& s, std::int64_t n, T* parameter, const T* gradient, T* mean,
               T* square, T* largest, int n_threads) {
  const double step = static_cast<double>(s.step);
  const AdamFactors<T> factors{
      static_cast<T>(s.decoupled ? 1 - s.learning_rate * s.weight_decay : 1.0),
      static_cast<T>(s.decoupled ? 0.0 : s.weight_decay),
      static_cast<T>(1 - s.beta1),
      static_cast<T>(1 - s.beta2),
      static_cast<T>(s.learning_rate / (1 - std::pow(s.beta1, step))),
      static_cast<T>(1 / std::sqrt(1 - std::pow(s.beta2, step))),
      static_cast<T>(s.eps)};
  parallel_for((n + kBlock - 1) / kBlock, n_threads, [&](std::int64_t item) {
    const std::int64_t i = item * kBlock, count = std::min(kBlock, n - i);
    T* most = largest == nullptr ? nullptr : largest + i;
    KINML_CALL_KERNEL(adam_range, factors, count, parameter + i, gradient + i, mean + i, square + i,
                      most);
  });
}

template void adam_step<double>(const AdamSettings&, std::int64_t, double*, const double*, double*,
                                double*, double*, int);
template void adam_step<float>(const AdamSettings&, std::int64_t, float*, const float*, float*,
                               float*, float*, int);

}  // namespace kinml::cpu
