// One step of Adam or AdamW on a flat tensor: csrc/core/adam.h.
#pragma once

#include <cstdint>

#include "../core/adam.h"

namespace kinml::cpu {

// parameter, mean, square, largest (null without amsgrad): [n], updated; gradient: [n].
// The same bits for any n_threads.
template <class T>
void adam_step(const AdamSettings& settings, std::int64_t n, T* parameter, const T* gradient,
               T* mean, T* square, T* largest, int n_threads);

}  // namespace kinml::cpu
