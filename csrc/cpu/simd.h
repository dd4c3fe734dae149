// Vec<T, W>: W numbers of type T in one register (GCC/Clang vector extension), with the
// arithmetic, elementary functions and reductions that the CPU kernels need.
//
// It behaves like a scalar, so the formulas of csrc/core, written for a scalar type, serve whole
// registers too. exp, log, sin and cos are accurate to a few units in the last place over the
// ranges stated at each.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "../core/config.h"

namespace kinml {
inline namespace KINML_ISA {

// Numbers of type T in the widest register of this compilation.
template <class T>
inline constexpr int kNativeWidth = KINML_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<double> {
  using type = std::int64_t;
};
template <>
struct IntegerOf<float> {
  using type = std::int32_t;
};

// The compiler's vector type, named through a struct: GCC takes a dependent vector type for its
// element type when it compares signatures.
template <class T, int W>
struct RawVector {
  typedef T type __attribute__((vector_size(sizeof(T) * W)));
};

template <class T, int W>
struct Vec {
  using Int = typename IntegerOf<T>::type;
  using Raw = typename RawVector<T, W>::type;
  using IntRaw = typename RawVector<Int, W>::type;
  Raw raw;

  Vec() = default;
  KINML_HD Vec(Raw value) : raw(value) {}
  KINML_HD Vec(T value) : raw(value - Raw{}) {}  // every lane; x - 0 keeps the sign of zero

  static KINML_HD Vec load(const T* p) {
    Vec v;
    std::memcpy(&v.raw, p, sizeof(Raw));
    return v;
  }
  // Lanes [0, count) from memory, the others `fill`.
  static KINML_HD Vec load_partial(const T* p, int count, T fill = T(0)) {
    Vec v(fill);
    for (int i = 0; i < W; ++i)
      if (i < count) v.raw[i] = p[i];
    return v;
  }
  KINML_HD void store(T* p) const { std::memcpy(p, &raw, sizeof(Raw)); }
  KINML_HD void store_partial(T* p, int count) const {
    for (int i = 0; i < W; ++i)
      if (i < count) p[i] = raw[i];
  }
  KINML_HD T operator[](int i) const { return raw[i]; }

  friend KINML_HD Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  friend KINML_HD Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  friend KINML_HD Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  friend KINML_HD Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
  friend KINML_HD Vec operator-(Vec a) { return -a.raw; }
  KINML_HD Vec& operator+=(Vec b) {
    raw += b.raw;
    return *this;
  }
  KINML_HD Vec& operator-=(Vec b) {
    raw -= b.raw;
    return *this;
  }
  KINML_HD Vec& operator*=(Vec b) {
    raw *= b.raw;
    return *this;
  }
};

template <class T, int W>
KINML_HD Vec<T, W> select_ge(Vec<T, W> a, Vec<T, W> b, Vec<T, W> if_true, Vec<T, W> if_false) {
  return a.raw >= b.raw ? if_true.raw : if_false.raw;
}

template <class T, int W>
KINML_HD Vec<T, W> max(Vec<T, W> a, Vec<T, W> b) {
  return a.raw > b.raw ? a.raw : b.raw;
}
template <class T, int W>
KINML_HD Vec<T, W> min(Vec<T, W> a, Vec<T, W> b) {
  return a.raw < b.raw ? a.raw : b.raw;
}

template <class T, int W>
KINML_HD Vec<T, W> sqrt(Vec<T, W> a) {
  Vec<T, W> r;
  for (int i = 0; i < W; ++i) r.raw[i] = std::sqrt(a.raw[i]);
  return r;
}

// The lower and the upper half of a register.
template <class T, int W>
KINML_HD Vec<T, W / 2> low_half(Vec<T, W> a) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return Vec<T, W / 2>(__builtin_shufflevector(a.raw, a.raw, I...));
  }(std::make_integer_sequence<int, W / 2>());
}
template <class T, int W>
KINML_HD Vec<T, W / 2> high_half(Vec<T, W> a) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return Vec<T, W / 2>(__builtin_shufflevector(a.raw, a.raw, (I + W / 2)...));
  }(std::make_integer_sequence<int, W / 2>());
}

// Sum of the lanes, by halves.
template <class T, int W>
KINML_HD T reduce_add(Vec<T, W> a) {
  if constexpr (W == 2) {
    return a.raw[0] + a.raw[1];
  } else {
    return reduce_add(low_half(a) + high_half(a));
  }
}

// Keeps a number in its register: the compiler may read one that is used twice from memory twice.
template <class T, int W>
KINML_HD void hold(Vec<T, W>& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x.raw));
#elif defined(__x86_64__)
  asm("" : "+x"(x.raw));
#else
  (void)x;
#endif
}

// Keeps the compiler from knowing what a pointer has given before: it is read again.
template <class T>
KINML_HD void forget(const T*& p) {
  asm("" : "+r"(p));
}

// Blocks of `step` numbers, of a and b in turn: a's even ones before b's even ones (odd = 0), or
// the odd ones (odd = 1).
template <int step, int odd, class T, int W>
KINML_HD Vec<T, W> alternate(Vec<T, W> a, Vec<T, W> b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return Vec<T, W>(__builtin_shufflevector(
        a.raw, b.raw, ((I & step) == 0 ? I + odd * step : W + I - (1 - odd) * step)...));
  }(std::make_integer_sequence<int, W>());
}

// Transposes W registers of W numbers: halves change places, then quarters, and so on.
template <class T, int W, int step = W / 2>
KINML_HD void transpose(Vec<T, W> (&rows)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if ((i & step) != 0) continue;
    const Vec<T, W> a = rows[i], b = rows[i + step];
    rows[i] = alternate<step, 0>(a, b);
    rows[i + step] = alternate<step, 1>(a, b);
  }
  if constexpr (step > 1) transpose<T, W, step / 2>(rows);
}

// e^x. Arguments below the smallest normal result give 0, above the largest give infinity or a
// number close to the largest; NaN stays NaN. Relative error below 2 ulp.
// Method: x = k ln2 + r, |r| <= ln2/2; Taylor polynomial in r; 2^k through the exponent bits.
template <int W>
KINML_HD Vec<double, W> exp(Vec<double, W> x) {
  using V = Vec<double, W>;
  const V clamped = max(V(-708.0), min(V(709.0), x));
  const V magic(6755399441055744.0);  // 1.5 * 2^52: adding it rounds to an integer
  const V shifted = clamped * V(1.4426950408889634) + magic;
  const V k = shifted - magic;
  V r = clamped - k * V(6.93147180369123816490e-01);
  r = r - k * V(1.90821492927058770002e-10);
  V p(1.0 / 6227020800.0);
  p = p * r + V(1.0 / 479001600.0);
  p = p * r + V(1.0 / 39916800.0);
  p = p * r + V(1.0 / 3628800.0);
  p = p * r + V(1.0 / 362880.0);
  p = p * r + V(1.0 / 40320.0);
  p = p * r + V(1.0 / 5040.0);
  p = p * r + V(1.0 / 720.0);
  p = p * r + V(1.0 / 120.0);
  p = p * r + V(1.0 / 24.0);
  p = p * r + V(1.0 / 6.0);
  p = p * r + V(0.5);
  p = p * r * r + r;
  typename V::IntRaw bits;
  std::memcpy(&bits, &shifted.raw, sizeof(bits));
  bits = (bits << 52) + 0x3ff0000000000000LL;  // the low bits of `shifted` hold k
  V scale;
  std::memcpy(&scale.raw, &bits, sizeof(bits));
  const V result = scale + scale * p;
  const V nonzero = x.raw < V(-708.0).raw ? V(0.0).raw : result.raw;
  return x.raw == x.raw ? nonzero.raw : x.raw;
}

template <int W>
KINML_HD Vec<float, W> exp(Vec<float, W> x) {
  using V = Vec<float, W>;
  const V clamped = max(V(-87.0f), min(V(88.0f), x));
  const V magic(12582912.0f);  // 1.5 * 2^23
  const V shifted = clamped * V(1.44269504f) + magic;
  const V k = shifted - magic;
  V r = clamped - k * V(0.693359375f);
  r = r - k * V(-2.12194440e-4f);
  V p(1.0f / 5040.0f);
  p = p * r + V(1.0f / 720.0f);
  p = p * r + V(1.0f / 120.0f);
  p = p * r + V(1.0f / 24.0f);
  p = p * r + V(1.0f / 6.0f);
  p = p * r + V(0.5f);
  p = p * r * r + r;
  typename V::IntRaw bits;
  std::memcpy(&bits, &shifted.raw, sizeof(bits));
  bits = (bits << 23) + 0x3f800000;
  V scale;
  std::memcpy(&scale.raw, &bits, sizeof(bits));
  const V result = scale + scale * p;
  const V nonzero = x.raw < V(-87.0f).raw ? V(0.0f).raw : result.raw;
  return x.raw == x.raw ? nonzero.raw : x.raw;
}

// Natural logarithm of a positive normal number; relative error of a few ulp away from x = 1,
// absolute error of one ulp of 1 near it. Method: x = 2^k m, m in [sqrt(1/2), sqrt(2)],
// log m = 2 artanh((m - 1) / (m + 1)).
template <class T, int W>
KINML_HD Vec<T, W> log(Vec<T, W> x) {
  using V = Vec<T, W>;
  using Int = typename V::Int;
  constexpr bool is_double = sizeof(T) == 8;
  constexpr int mantissa = is_double ? 52 : 23;
  const Int sqrt_half_bits = is_double ? Int(0x3fe6a09e667f3bcdLL) : Int(0x3f3504f3);
  typename V::IntRaw bits;
  std::memcpy(&bits, &x.raw, sizeof(bits));
  const typename V::IntRaw exponent = (bits - sqrt_half_bits) >> mantissa;
  const typename V::IntRaw reduced = bits - (exponent << mantissa);
  V m;
  std::memcpy(&m.raw, &reduced, sizeof(reduced));
  const V k = __builtin_convertvector(exponent, typename V::Raw);
  const V s = (m - V(T(1))) / (m + V(T(1)));
  const V z = s * s;
  V p(T(0));
  constexpr int terms = is_double ? 11 : 5;
  for (int i = terms; i >= 1; --i) p = p * z + V(T(2.0 / (2 * i + 1)));
  return k * V(T(0.693147180559945309417)) + (s * V(T(2)) + s * z * p);
}

}  // namespace KINML_ISA
}  // namespace kinml
