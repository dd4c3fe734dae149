// What the fused step adds up itself, for one instruction set.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace kinml {
// The sum of n_rows >= 1 nodes of a tree in its order (core/shares.h): out[i] for i < n. rows[r] is
// the node of parts firsts[r] .. firsts[r + 1]; together they are a node.
KINML_DECLARE_KERNEL(void, sum_tree, const double* const* rows, const std::int64_t* firsts,
                     std::int64_t n_rows, std::int64_t n, double* out)
KINML_DECLARE_KERNEL(void, sum_tree, const float* const* rows, const std::int64_t* firsts,
                     std::int64_t n_rows, std::int64_t n, float* out)
}  // namespace kinml
