// Stable sort of 64-bit keys, the only one on the GPU: CUB's radix sort, which is part of the CUDA
// toolkit; on the host the standard library's.
#pragma once

#include <cstdint>

#include "launch.h"

namespace kinml::cuda {

// Bytes of the workspace for n keys, which is aligned to 16 bytes.
std::int64_t sort_workspace(std::int64_t n);

// keys    // [n]
// sorted  // [n] in ascending order
// order   // [n] where the sorted ones come from: sorted[i] = keys[order[i]]
void sort_keys(const std::int64_t* keys, std::int64_t n, std::int64_t* sorted, std::int64_t* order,
               char* workspace, Stream stream);

}  // namespace kinml::cuda
