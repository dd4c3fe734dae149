// What adam_cpu.cpp hands to the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "../core/adam.h"
#include "dispatch.h"

namespace kinml {
KINML_DECLARE_KERNEL(void, adam_range, const AdamFactors<double>&, std::int64_t n, double* p,
                     const double* g, double* m, double* v, double* largest)
KINML_DECLARE_KERNEL(void, adam_range, const AdamFactors<float>&, std::int64_t n, float* p,
                     const float* g, float* m, float* v, float* largest)
}  // namespace kinml
