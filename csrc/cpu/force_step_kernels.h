// What the fused step adds up itself, for one instruction set.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace kinml {
// out[i] = parts[0][i] + parts[1][i] + ... in this order, for i < n; part p begins at p * stride.
KINML_DECLARE_KERNEL(void, sum_parts, const double* parts, std::int64_t n_parts,
                     std::int64_t stride, std::int64_t n, double* out)
KINML_DECLARE_KERNEL(void, sum_parts, const float* parts, std::int64_t n_parts, std::int64_t stride,
                     std::int64_t n, float* out)
}  // namespace kinml
