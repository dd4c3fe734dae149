// Dual<T>: a number and its derivative in one direction (forward-mode differentiation).
//
// The AEV formulas, written once for a number type, give with T the vector and its
// vector-Jacobian product, and with Dual<T> the Jacobian-vector product and the
// Hessian-vector product. T may itself be a register of numbers (Vec).
#pragma once

#include <cmath>

#include "config.h"
#include "gaussian.h"

namespace kinml {
inline namespace KINML_ISA {

template <class T>
struct Dual {
  T value;
  T tangent;

  Dual() = default;
  KINML_HD Dual(T v) : value(v), tangent(T(0)) {}
  KINML_HD Dual(T v, T t) : value(v), tangent(t) {}

  friend KINML_HD Dual operator+(Dual a, Dual b) {
    return {a.value + b.value, a.tangent + b.tangent};
  }
  friend KINML_HD Dual operator-(Dual a, Dual b) {
    return {a.value - b.value, a.tangent - b.tangent};
  }
  friend KINML_HD Dual operator-(Dual a) { return {-a.value, -a.tangent}; }
  friend KINML_HD Dual operator*(Dual a, Dual b) {
    return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
  }
  friend KINML_HD Dual operator/(Dual a, Dual b) {
    const T q = a.value / b.value;
    return {q, (a.tangent - q * b.tangent) / b.value};
  }
  KINML_HD Dual& operator+=(Dual b) { return *this = *this + b; }
  KINML_HD Dual& operator-=(Dual b) { return *this = *this - b; }
  KINML_HD Dual& operator*=(Dual b) { return *this = *this * b; }
};

template <class T>
KINML_HD Dual<T> exp(Dual<T> x) {
  using std::exp;
  const T e = exp(x.value);
  return {e, e * x.tangent};
}
template <class T>
KINML_HD Dual<T> log(Dual<T> x) {
  return {log(x.value), x.tangent / x.value};
}
template <class T>
KINML_HD Dual<T> sqrt(Dual<T> x) {
  using std::sqrt;
  const T root = sqrt(x.value);
  return {root, x.tangent / (root + root)};
}
template <class T>
KINML_HD Dual<T> gaussian(Dual<T> x) {
  const T g = gaussian(x.value);
  return {g, T(-2) * x.value * g * x.tangent};
}

// The number itself, without its derivative: for comparisons.
template <class T>
KINML_HD T value_of(T x) {
  return x;
}
template <class T>
KINML_HD T value_of(Dual<T> x) {
  return x.value;
}

}  // namespace KINML_ISA
}  // namespace kinml
