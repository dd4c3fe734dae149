// Formulas of the atomic environment vector, for any number type (float, double, a register of
// them, Dual of those). Source: Smith, Isayev, Roitberg, Chem. Sci. 2017, 8, 3192
// (DOI 10.1039/C6SC05720A), in the form of aevmod: theta = arccos(beta cos(angle)).
//
//   cutoff   fc(R) = (cos(pi R / Rc) + 1) / 2 for R <= Rc, else 0
//   radial   G_l   = factor * sum_j exp(-eta (R_ij - rho_l)^2) fc(R_ij)
//   angular  G_lm  = factor * sum_{j<k} ((1 + cos(theta - alpha_m)) / 2)^zeta
//                    * exp(-eta ((R_ij + R_ik) / 2 - rho_l)^2) fc(R_ij) fc(R_ik)
//
// Lengths in angstrom, eta in 1/angstrom^2; the vector has no unit. Nothing here calls arccos: with
// c = cos(theta) and s = sqrt(1 - c^2), cos(theta - alpha) = c cos(alpha) + s sin(alpha).
#pragma once

#include "dual.h"

namespace kinml {
inline namespace KINML_ISA {

// sin(x) and cos(x) for |x| <= pi/4 by their Taylor series, to half a unit in the last place of 1.
template <class T>
struct SineCosine {
  T sine;
  T cosine;
};
template <class Scalar, class T>
KINML_HD SineCosine<T> sine_cosine_series(T x) {
  constexpr int terms = sizeof(Scalar) == 8 ? 8 : 5;
  const T one(Scalar(1));
  const T z = x * x;
  T s = one, c = one;
#if !defined(__CUDACC__)  // which unrolls it without being told
#pragma GCC unroll 8
#endif
  for (int i = terms; i >= 1; --i) {
    s = one - z * s * T(Scalar(1.0 / ((2.0 * i) * (2.0 * i + 1.0))));
    c = one - z * c * T(Scalar(1.0 / ((2.0 * i - 1.0) * (2.0 * i))));
  }
  return {x * s, c};
}
KINML_HD SineCosine<double> sine_cosine(double x) {
  return sine_cosine_series<double>(x);
}
KINML_HD SineCosine<float> sine_cosine(float x) {
  return sine_cosine_series<float>(x);
}
template <class T>
KINML_HD SineCosine<Dual<T>> sine_cosine(Dual<T> x) {
  const SineCosine<T> r = sine_cosine(x.value);
  return {{r.sine, r.cosine * x.tangent}, {r.cosine, -(r.sine * x.tangent)}};
}

// fc(R) and dfc/dR for 0 <= R <= Rc; inverse = 1 / Rc, half_pi and half as numbers of the same
// type. With y = pi/2 (R / Rc - 1/2), |y| <= pi/4: fc = (cos y - sin y)^2 / 2, which is never
// negative, and dfc/dR = -pi / (2 Rc) (cos y - sin y) (cos y + sin y).
template <class N>
struct Cutoff {
  N value;
  N slope;
};
template <class N>
KINML_HD Cutoff<N> cutoff_function(N r, N inverse, N half_pi, N half) {
  const SineCosine<N> sc = sine_cosine(half_pi * (r * inverse - half));
  const N difference = sc.cosine - sc.sine;
  return {half * difference * difference,
          -(half_pi * inverse) * (difference * (sc.cosine + sc.sine))};
}

// x^n for n >= 0 by squaring. n is the same for all atoms, so its branches predict well.
template <class N>
KINML_HD N integer_power(N x, N one, int n) {
  N result = (n & 1) ? x : one;
  for (n >>= 1; n > 0; n >>= 1) {
    x = x * x;
    if (n & 1) result = result * x;
  }
  return result;
}

}  // namespace KINML_ISA
}  // namespace kinml
