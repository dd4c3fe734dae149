// The activations in plain long double, by the codes of csrc/cpu/networks_cpu.h.
#pragma once

#include <cmath>

namespace activations {

using Real = long double;

inline Real value(int code, Real x) {
  const Real a = 0.1L;
  switch (code) {
    case 1:
      return std::exp(-x * x);
    case 2:
      return std::tanh(x);
    case 3:
      return x > 0 ? x : 0;
    case 4:
      return x / (1 + std::exp(-x));
    case 5:
      return x > 0 ? x : a * std::expm1(x / a);
    case 6:
      return x * 0.5L * std::erfc(-x * std::sqrt(0.5L));
    default:
      return x;
  }
}

inline Real normal_density(Real x) {
  return std::exp(-x * x / 2) / std::sqrt(2 * 3.14159265358979323846264338327950288L);
}

inline Real slope(int code, Real x) {
  const Real a = 0.1L;
  switch (code) {
    case 1:
      return -2 * x * std::exp(-x * x);
    case 2:
      return 1 / (std::cosh(x) * std::cosh(x));
    case 3:
      return x > 0 ? 1 : 0;
    case 4: {
      const Real s = 1 / (1 + std::exp(-x));
      return s + x * s * (1 - s);
    }
    case 5:
      return x > 0 ? 1 : std::exp(x / a);
    case 6:
      return 0.5L * std::erfc(-x * std::sqrt(0.5L)) + x * normal_density(x);
    default:
      return 1;
  }
}

inline Real curvature(int code, Real x) {
  const Real a = 0.1L;
  switch (code) {
    case 1:
      return (4 * x * x - 2) * std::exp(-x * x);
    case 2:
      return -2 * std::tanh(x) / (std::cosh(x) * std::cosh(x));
    case 4: {
      const Real s = 1 / (1 + std::exp(-x));
      return s * (1 - s) * (2 + x * (1 - 2 * s));
    }
    case 5:
      return x > 0 ? 0 : std::exp(x / a) / a;
    case 6:
      return normal_density(x) * (2 - x * x);
    default:
      return 0;
  }
}

}  // namespace activations
