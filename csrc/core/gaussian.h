// exp(-x^2), of activations and of shifts alike.
#pragma once

#include <cmath>

#include "config.h"

namespace kinml {
inline namespace KINML_ISA {

// Registers have a faster one of their own (csrc/cpu/simd_functions.h), which is preferred because
// it is more specialised; dual numbers have one in dual.h.
template <class T>
KINML_HD T gaussian(T x) {
  using std::exp;
  return exp(-(x * x));
}

}  // namespace KINML_ISA
}  // namespace kinml
