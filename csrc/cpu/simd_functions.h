// gaussian, tanh and erf of whole registers, for the activations.
//
// tanh and erf: rational approximations near zero and exponentials elsewhere, after the Cephes
// library of S. L. Moshier; relative error of a few units in the last place.
#pragma once

#include "simd.h"

namespace kinml {
inline namespace KINML_ISA {

// (((c0 x + c1) x + c2) ...), highest power first.
template <class T, int W, int N>
KINML_HD Vec<T, W> polynomial(Vec<T, W> x, const double (&coefficients)[N]) {
  Vec<T, W> p(static_cast<T>(coefficients[0]));
  for (int i = 1; i < N; ++i) p = p * x + Vec<T, W>(static_cast<T>(coefficients[i]));
  return p;
}

// exp(-x^2), relative error below 2 ulp of the exponential of the rounded square. It is exp without
// the parts that positive, infinite and NaN arguments need there; results below the smallest normal
// number become that (3e-308, 1e-38). Polynomial: (exp(r) - 1 - r) / r^2 on |r| < 0.347,
// interpolated at Chebyshev nodes, relative error of the exponential 2e-17 and 1e-8.
template <class T, int W>
KINML_HD Vec<T, W> gaussian(Vec<T, W> x) {
  using V = Vec<T, W>;
  using Int = typename V::Int;
  constexpr bool is_double = sizeof(T) == 8;
  const V square = x * x;
  const V limit(is_double ? T(708.0) : T(87.0));
  const V t = square.raw > limit.raw ? limit.raw : square.raw;  // NaN stays
  const V magic(is_double ? T(6755399441055744.0) : T(12582912.0));
  const V shifted = magic - t * V(T(1.4426950408889634));
  const V k = shifted - magic;
  const V high(is_double ? T(6.93147180369123816490e-01) : T(0.693359375));
  const V low(is_double ? T(1.90821492927058770002e-10) : T(-2.12194440e-4));
  const V r = -t - k * high - k * low;
  V p;
  if constexpr (is_double) {
    constexpr double c[] = {2.51004947889050417e-08, 2.76202305675069002e-07,
                            2.75572682299632275e-06, 2.48015209968256970e-05,
                            1.98412698632018282e-04, 1.38888889174064467e-03,
                            8.33333333333003204e-03, 4.16666666666237404e-02,
                            1.66666666666666685e-01, 5.00000000000000111e-01};
    p = polynomial(r, c);
  } else {
    constexpr double c[] = {1.39262680525705732e-03, 8.36324666975372770e-03,
                            4.16665541093467137e-02, 1.66665765831580021e-01, 0.5};
    p = polynomial(r, c);
  }
  p = p * (r * r) + r;
  typename V::IntRaw bits;
  std::memcpy(&bits, &shifted.raw, sizeof(bits));
  // The low bits of `shifted` hold k: they become the exponent of 2^k.
  bits =
      (bits << (is_double ? 52 : 23)) + (is_double ? Int(0x3ff0000000000000LL) : Int(0x3f800000));
  V scale;
  std::memcpy(&scale.raw, &bits, sizeof(bits));
  return scale + scale * p;
}

template <class T, int W>
KINML_HD Vec<T, W> tanh(Vec<T, W> x) {
  using V = Vec<T, W>;
  const V size = max(x, -x);
  const V z = x * x;
  constexpr double p[] = {-9.64399179425052238628e-1, -9.92877231001918586564e1,
                          -1.61468768441708447952e3};
  constexpr double q[] = {1.0, 1.12811678491632931402e2, 2.23548839060100448583e3,
                          4.84406305325125486048e3};
  const V small = min(z, V(T(1)));
  const V near = x + x * small * (polynomial(small, p) / polynomial(small, q));
  const V far = V(T(1)) - V(T(2)) / (exp(size + size) + V(T(1)));
  const V result = select_ge(size, V(T(0.625)), select_ge(x, V(T(0)), far, -far), near);
  return x.raw == x.raw ? result.raw : x.raw;
}

template <class T, int W>
KINML_HD Vec<T, W> erf(Vec<T, W> x) {
  using V = Vec<T, W>;
  // Beyond 6 erf is 1 to the last bit.
  const V size = min(max(x, -x), V(T(6)));
  const V z = min(x * x, V(T(1)));
  constexpr double t[] = {9.60497373987051638749e0, 9.00260197203842689217e1,
                          2.23200534594684319226e3, 7.00332514112805075473e3,
                          5.55923013010394962768e4};
  constexpr double u[] = {1.0,
                          3.35617141647503099647e1,
                          5.21357949780152679795e2,
                          4.59432382970980127987e3,
                          2.26290000613890934246e4,
                          4.92673942608635921086e4};
  constexpr double p[] = {
      2.46196981473530512524e-10, 5.64189564831068821977e-1, 7.46321056442269912687e0,
      4.86371970985681366614e1,   1.96520832956077098242e2,  5.26445194995477358631e2,
      9.34528527171957607540e2,   1.02755188689515710272e3,  5.57535335369399327526e2};
  constexpr double q[] = {1.0,
                          1.32281951154744992508e1,
                          8.67072140885989742329e1,
                          3.54937778887819891062e2,
                          9.75708501743205489753e2,
                          1.82390916687909736289e3,
                          2.24633760818710981792e3,
                          1.65666309194161350182e3,
                          5.57535340817727675546e2};
  const V near = x * (polynomial(z, t) / polynomial(z, u));
  const V tail = exp(-(size * size)) * (polynomial(size, p) / polynomial(size, q));
  const V far = V(T(1)) - tail;
  const V result = select_ge(size, V(T(1)), select_ge(x, V(T(0)), far, -far), near);
  return x.raw == x.raw ? result.raw : x.raw;
}

}  // namespace KINML_ISA
}  // namespace kinml
