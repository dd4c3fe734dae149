// What adam_cpu.cpp hands to the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace kinml::cpu {

// The numbers of a step, worked out once.
template <class T>
struct AdamFactors {
  T shrink;   // 1 - lr weight_decay (AdamW), else 1
  T penalty;  // weight_decay (Adam), else 0
  T one_minus_beta1, one_minus_beta2;
  T step_size;        // lr / (1 - beta1^step)
  T root_correction;  // 1 / sqrt(1 - beta2^step)
  T eps;
};

}  // namespace kinml::cpu

namespace kinml {
KINML_DECLARE_KERNEL(void, adam_range, const cpu::AdamFactors<double>&, std::int64_t n, double* p,
                     const double* g, double* m, double* v, double* largest)
KINML_DECLARE_KERNEL(void, adam_range, const cpu::AdamFactors<float>&, std::int64_t n, float* p,
                     const float* g, float* m, float* v, float* largest)
}  // namespace kinml
