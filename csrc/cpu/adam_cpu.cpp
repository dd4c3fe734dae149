#include "adam_cpu.h"

#include <algorithm>

#include "adam_kernels.h"
#include "parallel.h"

namespace kinml::cpu {

namespace {
constexpr std::int64_t kBlock = 4096;  // numbers of a work item; a multiple of every register
}

template <class T>
void adam_step(const AdamSettings& s, std::int64_t n, T* parameter, const T* gradient, T* mean,
               T* square, T* largest, int n_threads) {
  const AdamFactors<T> factors = adam_factors<T>(s);
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
