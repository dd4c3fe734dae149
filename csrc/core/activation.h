// Activation functions of the networks: value f(z), slope f'(z) and curvature f''(z).
//
// Templated over the number type: double, float, or a whole register (Vec of csrc/cpu/simd.h, with
// exp, tanh, erf and gaussian from csrc/cpu/simd_functions.h). Slope and curvature take h = f(z) as
// well, because most of them follow from it without another exponential.
#pragma once

#include <cmath>

#include "config.h"
#include "gaussian.h"

namespace kinml {
inline namespace KINML_ISA {

// In the order of kinml_fast.nn.networks.ACTIVATIONS.
enum class Activation : int {
  identity = 0,  // z
  gaussian = 1,  // exp(-z^2)
  tanh = 2,
  relu = 3,  // max(z, 0), slope 0 at 0
  silu = 4,  // z / (1 + exp(-z))
  celu = 5,  // z for z > 0, else a (exp(z / a) - 1), a = 0.1
  gelu = 6,  // z (1 + erf(z / sqrt 2)) / 2
};
inline constexpr int kActivations = 7;
inline constexpr double kCeluAlpha = 0.1;

// What Vec offers and plain numbers do not.
KINML_HD double select_ge(double a, double b, double if_true, double if_false) {
  return a >= b ? if_true : if_false;
}
KINML_HD float select_ge(float a, float b, float if_true, float if_false) {
  return a >= b ? if_true : if_false;
}

namespace activation_detail {

using std::erf;
using std::exp;
using std::tanh;

template <class V>
KINML_HD V number(double value) {
  return V(value);
}

template <class V>
KINML_HD V sigmoid(V z) {
  return number<V>(1) / (number<V>(1) + exp(-z));
}
// Distribution and density of the normal law, for gelu.
template <class V>
KINML_HD V normal_cdf(V z) {
  return number<V>(0.5) + number<V>(0.5) * erf(z * number<V>(0.70710678118654752440));
}
template <class V>
KINML_HD V normal_pdf(V z) {
  return number<V>(0.39894228040143267794) * exp(number<V>(-0.5) * z * z);
}

template <Activation A, class V>
KINML_HD V value(V z) {
  if constexpr (A == Activation::gaussian) return gaussian(z);
  if constexpr (A == Activation::tanh) return tanh(z);
  if constexpr (A == Activation::relu) return select_ge(number<V>(0), z, number<V>(0), z);
  if constexpr (A == Activation::silu) return z * sigmoid(z);
  if constexpr (A == Activation::celu) {
    // The exponential of a positive number is not needed and might be infinite.
    const V negative = select_ge(z, number<V>(0), number<V>(0), z);
    const V below =
        number<V>(kCeluAlpha) * (exp(negative * number<V>(1 / kCeluAlpha)) - number<V>(1));
    return select_ge(number<V>(0), z, below, z);
  }
  if constexpr (A == Activation::gelu) return z * normal_cdf(z);
  if constexpr (A == Activation::identity) return z;
}

template <Activation A, class V>
KINML_HD V slope(V z, V h) {
  if constexpr (A == Activation::gaussian) return number<V>(-2) * z * h;
  if constexpr (A == Activation::tanh) return number<V>(1) - h * h;
  if constexpr (A == Activation::relu)
    return select_ge(number<V>(0), z, number<V>(0), number<V>(1));
  if constexpr (A == Activation::silu) {
    const V s = sigmoid(z);
    return s + h * (number<V>(1) - s);
  }
  if constexpr (A == Activation::celu)
    return select_ge(number<V>(0), z, h * number<V>(1 / kCeluAlpha) + number<V>(1), number<V>(1));
  if constexpr (A == Activation::gelu) return normal_cdf(z) + z * normal_pdf(z);
  if constexpr (A == Activation::identity) return number<V>(1);
}

template <Activation A, class V>
KINML_HD V curvature(V z, V h) {
  if constexpr (A == Activation::gaussian) return (number<V>(4) * z * z - number<V>(2)) * h;
  if constexpr (A == Activation::tanh) return number<V>(-2) * h * (number<V>(1) - h * h);
  if constexpr (A == Activation::silu) {
    const V s = sigmoid(z);
    return s * (number<V>(1) - s) * (number<V>(2) + z * (number<V>(1) - number<V>(2) * s));
  }
  if constexpr (A == Activation::celu)
    return select_ge(number<V>(0), z,
                     (h * number<V>(1 / kCeluAlpha) + number<V>(1)) * number<V>(1 / kCeluAlpha),
                     number<V>(0));
  if constexpr (A == Activation::gelu) return normal_pdf(z) * (number<V>(2) - z * z);
  if constexpr (A == Activation::identity || A == Activation::relu) return number<V>(0);
}

}  // namespace activation_detail

// One activation as a type, for loops that choose it once (with_activation).
template <Activation A>
struct ActivationFunction {
  template <class V>
  KINML_HD V value(V z) const {
    return activation_detail::value<A>(z);
  }
  template <class V>
  KINML_HD V slope(V z, V h) const {
    return activation_detail::slope<A>(z, h);
  }
  template <class V>
  KINML_HD V curvature(V z, V h) const {
    return activation_detail::curvature<A>(z, h);
  }
};

// Calls function(ActivationFunction<code>{}); an unknown code counts as identity.
template <class Function>
KINML_HD void with_activation(int code, const Function& function) {
  switch (static_cast<Activation>(code)) {
    case Activation::gaussian:
      return function(ActivationFunction<Activation::gaussian>{});
    case Activation::tanh:
      return function(ActivationFunction<Activation::tanh>{});
    case Activation::relu:
      return function(ActivationFunction<Activation::relu>{});
    case Activation::silu:
      return function(ActivationFunction<Activation::silu>{});
    case Activation::celu:
      return function(ActivationFunction<Activation::celu>{});
    case Activation::gelu:
      return function(ActivationFunction<Activation::gelu>{});
    default:
      return function(ActivationFunction<Activation::identity>{});
  }
}

}  // namespace KINML_ISA
}  // namespace kinml
