// One step of Adam or AdamW on a flat tensor, on the GPU: csrc/core/adam.h.
#pragma once

#include <cstdint>

#include "../core/adam.h"
#include "launch.h"

namespace kinml::cuda {

// What the optimizer keeps of each number, updated: [n].
template <class T>
struct AdamMoments {
  T *mean, *square;
  T* largest;  // null without amsgrad
};

// The number of the step is not that of the settings but steps + 1: it is known to the device
// alone, so that a captured step counts on when it is replayed.
//
// steps  // [1] done before; one more afterwards (a double: a float stays at 2^24)
// parameter: [n], updated; gradient: [n].
template <class T>
void adam_step(const AdamSettings& settings, double* steps, std::int64_t n, T* parameter,
               const T* gradient, const AdamMoments<T>& moments, Stream stream);

}  // namespace kinml::cuda
