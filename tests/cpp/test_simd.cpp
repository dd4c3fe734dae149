// Elementary functions of registers (csrc/cpu/simd.h, simd_functions.h) and of the AEV formulas
// (csrc/core/aev_terms.h) against long double ones: units in the last place over dense grids, and
// special values in every lane.
//
// Header-only code: compiled once per instruction set, with its KINML_ISA; the program leaves at
// once where another one is in use (processor, KINML_CPU_ISA).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/core/aev_terms.h"
#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/simd.h"
#include "../../csrc/cpu/simd_functions.h"
#include "check.h"

#define KINML_TEXT_OF(name) #name
#define KINML_TEXT(name) KINML_TEXT_OF(name)

namespace kinml {
inline namespace KINML_ISA {
// What the formulas of core look for, as in aev_kernels.cpp.
template <class T, int W>
KINML_HD SineCosine<Vec<T, W>> sine_cosine(Vec<T, W> x) {
  return sine_cosine_series<T>(x);
}
}  // namespace KINML_ISA
}  // namespace kinml

namespace {

using Real = long double;
using kinml::Dual;
using kinml::Vec;

template <class T>
constexpr bool is_double = sizeof(T) == 8;
template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
template <class T>
constexpr T kSmallest = std::numeric_limits<T>::min();  // normal
template <class T>
constexpr T kDenormal = std::numeric_limits<T>::denorm_min();

// Distance between two numbers of type T around `exact`.
template <class T>
Real ulp(Real exact) {
  int exponent;
  std::frexp(std::max(std::fabs(exact), static_cast<Real>(kSmallest<T>)), &exponent);
  return std::ldexp(1.0L, exponent - std::numeric_limits<T>::digits);
}

template <class T>
std::vector<T> grid(double low, double high, int n) {
  std::mt19937_64 random_bits(7);
  std::vector<T> points = {static_cast<T>(low), static_cast<T>(high)};
  for (int i = 0; i < n; ++i) {  // one at random in each of n intervals
    const double at = i + std::ldexp(static_cast<double>(random_bits() >> 11), -53);
    points.push_back(std::clamp(static_cast<T>(low + (high - low) * at / n), static_cast<T>(low),
                                static_cast<T>(high)));
  }
  return points;
}
// Powers of two and numbers around them, of both signs, within +-limit.
template <class T>
std::vector<T> logarithmic_grid(double limit) {
  std::vector<T> points;
  for (int e = std::numeric_limits<T>::min_exponent; e < std::numeric_limits<T>::max_exponent; ++e)
    for (const double factor : {0.5, 0.50000012, 0.6180339, 0.7071068, 0.9, 0.99999994}) {
      const T x = static_cast<T>(std::ldexp(factor, e));
      if (x <= limit) points.insert(points.end(), {x, -x});
    }
  return points;
}

// f of all points, W at a time; the last register is filled up with the last point.
template <class T, int W, class Function>
std::vector<T> apply(const Function& f, const std::vector<T>& points) {
  std::vector<T> results(points.size());
  for (std::size_t i = 0; i < points.size(); i += W) {
    const int count = static_cast<int>(std::min<std::size_t>(W, points.size() - i));
    f(Vec<T, W>::load_partial(points.data() + i, count, points.back()))
        .store_partial(results.data() + i, count);
  }
  return results;
}

// Largest error in units in the last place of max(|f|, floor).
template <class T, int W, class Function, class Exact>
void check_ulps(const char* name, const Function& f, const Exact& exact,
                const std::vector<T>& points, Real bound, Real floor = 0) {
  const std::vector<T> results = apply<T, W>(f, points);
  Real worst = 0;
  T where = points[0];
  for (std::size_t i = 0; i < points.size(); ++i) {
    const Real expected = exact(static_cast<Real>(points[i]));
    const Real error =
        std::fabs(results[i] - expected) / ulp<T>(std::max(std::fabs(expected), floor));
    if (!(error <= worst)) worst = error, where = points[i];
  }
  check::section(name);
  CHECK_CLOSE(worst, 0, 0, bound);
  std::printf("%-10s %s x %-2d  %7.3Lf of %.1Lf ulp, at %.9g\n", name,
              is_double<T> ? "float64" : "float32", W, worst, bound, static_cast<double>(where));
}

// One value, alone in each lane in turn among harmless ones, and in all lanes.
template <class T, int W, class Function, class Test>
void check_special(const Function& f, T x, const Test& test) {
  for (int lane = -1; lane < W; ++lane) {
    T numbers[W];
    for (int i = 0; i < W; ++i) numbers[i] = lane < 0 || i == lane ? x : T(0.5);
    const Vec<T, W> y = f(Vec<T, W>::load(numbers));
    const Vec<T, W> harmless = f(Vec<T, W>(T(0.5)));
    for (int i = 0; i < W; ++i)
      if (lane < 0 || i == lane)
        CHECK(test(y[i]));
      else
        CHECK(y[i] == harmless[i]);
  }
}

template <class T>
bool is_nan(T x) {
  return std::isnan(x);
}
template <class T>
bool is_not_finite(T x) {
  return !std::isfinite(x);
}
// Zero of the sign of `zero`.
template <class T>
auto is_zero_like(T zero) {
  return [=](T x) { return x == 0 && std::signbit(x) == std::signbit(zero); };
}
template <class T>
auto is_exactly(T value) {
  return [=](T x) { return x == value; };
}

template <class T, int W>
void test_exp() {
  using V = Vec<T, W>;
  const auto f = [](V x) { return exp(x); };
  const auto exact = [](Real x) { return std::exp(x); };
  const double low = is_double<T> ? -708 : -87, high = is_double<T> ? 709 : 88;
  check_ulps<T, W>("exp", f, exact, grid<T>(low, high, 60000), 2);
  check_ulps<T, W>("exp", f, exact, grid<T>(-1, 1, 40000), 2);
  check_ulps<T, W>("exp", f, exact, logarithmic_grid<T>(high - 2), 2, 1e-30L);
  check::section("exp, special values");
  for (const T one : {T(0), T(-0.0), kDenormal<T>, -kDenormal<T>, kSmallest<T>})
    check_special<T, W>(f, one, is_exactly(T(1)));
  check_special<T, W>(f, kNan<T>, is_nan<T>);
  for (const T below : {T(low) - 1, T(-1e4), std::numeric_limits<T>::lowest(), -kInfinity<T>})
    check_special<T, W>(f, below, is_exactly(T(0)));
  // Beyond the largest result: never small, never NaN.
  const T close = T(std::exp(T(high)) * 0.99);
  for (const T above : {T(high) + 1, T(1e4), std::numeric_limits<T>::max(), kInfinity<T>})
    check_special<T, W>(f, above, [=](T y) { return y >= close; });
}

template <class T, int W>
void test_log() {
  using V = Vec<T, W>;
  const auto f = [](V x) { return log(x); };
  const auto exact = [](Real x) { return std::log(x); };
  // Away from 1 a few ulp; near 1 one ulp of 1.
  check_ulps<T, W>("log", f, exact, grid<T>(1e-3, 0.9, 40000), 3, 0.5L);
  check_ulps<T, W>("log", f, exact, grid<T>(0.9, 1.1, 40000), 1, 1);
  check_ulps<T, W>("log", f, exact, grid<T>(1.1, 1e3, 40000), 3, 0.5L);
  std::vector<T> positive;
  for (const T x : logarithmic_grid<T>(std::numeric_limits<T>::max()))
    if (x >= kSmallest<T>) positive.push_back(x);
  check_ulps<T, W>("log", f, exact, positive, 3, 1);
  check::section("log, special values");
  check_special<T, W>(f, T(1), is_exactly(T(0)));
  // What the AEV needs beyond: the smallest base of a power.
  const T base = is_double<T> ? T(1e-60) : T(1e-12);
  check_special<T, W>(f, base, [=](T y) {
    return std::fabs(y - std::log(static_cast<Real>(base))) <= 3 * ulp<T>(y);
  });
}

template <class T, int W>
void test_sqrt_and_reductions() {
  using V = Vec<T, W>;
  const auto f = [](V x) { return sqrt(x); };
  check_ulps<T, W>("sqrt", f, [](Real x) { return std::sqrt(x); }, grid<T>(0, 100, 20000), 0.5001L);
  check::section("sqrt, special values");
  check_special<T, W>(f, T(0), is_zero_like(T(0)));
  check_special<T, W>(f, T(-0.0), is_zero_like(T(-0.0)));
  check_special<T, W>(f, kInfinity<T>, is_exactly(kInfinity<T>));
  check_special<T, W>(f, T(-1), is_nan<T>);
  check_special<T, W>(f, kNan<T>, is_nan<T>);
  check_special<T, W>(f, kDenormal<T>, [](T y) { return y == std::sqrt(kDenormal<T>); });

  check::section("registers");
  CHECK(std::signbit(V(T(-0.0))[W - 1]));
  CHECK(std::isinf(V(kInfinity<T>)[0]) && std::isnan(V(kNan<T>)[W - 1]));
  T numbers[W + 1];
  T sum = 0;
  for (int i = 0; i < W; ++i) sum += numbers[i] = static_cast<T>(1 << i);
  numbers[W] = 77;
  CHECK(reduce_add(V::load(numbers)) == sum);
  for (int count = 0; count <= W; ++count) {
    const V part = V::load_partial(numbers, count, T(-3));
    T out[W + 1];
    std::fill(out, out + W + 1, T(77));
    V::load(numbers).store_partial(out, count);
    for (int i = 0; i < W; ++i) {
      CHECK(part[i] == (i < count ? numbers[i] : T(-3)));
      CHECK(out[i] == (i < count ? numbers[i] : T(77)));
    }
    CHECK(out[W] == 77);
  }
  const V a = V::load(numbers), b(numbers[W / 2]);
  for (int i = 0; i < W; ++i) {
    CHECK(max(a, b)[i] == std::max(a[i], b[i]) && min(a, b)[i] == std::min(a[i], b[i]));
    CHECK(select_ge(a, b, V(T(1)), V(T(2)))[i] == (a[i] >= b[i] ? 1 : 2));
  }
  CHECK(select_ge(V(kNan<T>), b, V(T(1)), V(T(2)))[0] == 2);
}

template <class T, int W>
void test_tanh_and_erf() {
  using V = Vec<T, W>;
  const auto tanh_lanes = [](V x) { return tanh(x); };
  const auto erf_lanes = [](V x) { return erf(x); };
  const auto tanh_exact = [](Real x) { return std::tanh(x); };
  const auto erf_exact = [](Real x) { return std::erf(x); };
  // Results below 1e-30 (float) lose bits where squares underflow; nothing that a network sees.
  const Real floor = is_double<T> ? 1e-290L : 1e-30L;
  check_ulps<T, W>("tanh", tanh_lanes, tanh_exact, grid<T>(-20, 20, 60000), 4);
  check_ulps<T, W>("tanh", tanh_lanes, tanh_exact, grid<T>(-0.7, 0.7, 40000), 4);
  check_ulps<T, W>("tanh", tanh_lanes, tanh_exact, logarithmic_grid<T>(1e30), 4, floor);
  check_ulps<T, W>("erf", erf_lanes, erf_exact, grid<T>(-7, 7, 60000), 4);
  check_ulps<T, W>("erf", erf_lanes, erf_exact, grid<T>(-1.1, 1.1, 40000), 4);
  check_ulps<T, W>("erf", erf_lanes, erf_exact, logarithmic_grid<T>(1e30), 4, floor);
  check::section("tanh and erf, special values");
  const auto both = [&](T x, const auto& test) {
    check_special<T, W>(tanh_lanes, x, test);
    check_special<T, W>(erf_lanes, x, test);
  };
  for (const T zero : {T(0), T(-0.0)}) {
    check_special<T, W>(erf_lanes, zero, is_zero_like(zero));
    check_special<T, W>(tanh_lanes, zero, is_exactly(T(0)));  // of either sign
  }
  both(kNan<T>, is_nan<T>);
  for (const T large : {T(30), T(1e4), std::numeric_limits<T>::max(), kInfinity<T>}) {
    both(large, is_exactly(T(1)));
    both(-large, is_exactly(T(-1)));
  }
}

// exp(-x^2), as exact as exp of the rounded square.
template <class T, int W>
void test_gaussian() {
  using V = Vec<T, W>;
  const auto f = [](V x) { return gaussian(x); };
  const auto exact = [](Real x) {
    const T square = static_cast<T>(x) * static_cast<T>(x);
    return std::exp(-static_cast<Real>(square));
  };
  const double limit = is_double<T> ? 26.6 : 9.32;
  check_ulps<T, W>("gaussian", f, exact, grid<T>(-limit, limit, 60000), 2);
  check_ulps<T, W>("gaussian", f, exact, grid<T>(-1, 1, 40000), 2);
  check_ulps<T, W>("gaussian", f, exact, logarithmic_grid<T>(limit), 2);
  check::section("gaussian, special values");
  for (const T one : {T(0), T(-0.0), kDenormal<T>, -kDenormal<T>, kSmallest<T>})
    check_special<T, W>(f, one, is_exactly(T(1)));
  check_special<T, W>(f, kNan<T>, is_nan<T>);
  for (const T far : {T(30), T(-1e4), std::numeric_limits<T>::max(), -kInfinity<T>, kInfinity<T>})
    check_special<T, W>(f, far, [](T y) { return y >= 0 && y < 2 * kSmallest<T>; });
}

template <class T, int W>
void test_sine_cosine() {
  using V = Vec<T, W>;
  const auto sine = [](V x) { return kinml::sine_cosine_series<T>(x).sine; };
  const auto cosine = [](V x) { return kinml::sine_cosine_series<T>(x).cosine; };
  const double quarter_pi = 0.7853981633974483;
  // To 1.5 units in the last place of 1, and with the sine's relative precision near 0.
  check_ulps<T, W>(
      "sin", sine, [](Real x) { return std::sin(x); }, grid<T>(-quarter_pi, quarter_pi, 60000),
      1.5L, 1);
  check_ulps<T, W>("sin", sine, [](Real x) { return std::sin(x); }, grid<T>(-0.1, 0.1, 20000), 2);
  check_ulps<T, W>(
      "cos", cosine, [](Real x) { return std::cos(x); }, grid<T>(-quarter_pi, quarter_pi, 60000),
      1.5L, 1);
  check::section("sin and cos, special values");
  check_special<T, W>(sine, T(0), is_zero_like(T(0)));
  check_special<T, W>(sine, T(-0.0), is_zero_like(T(-0.0)));
  for (const T tiny : {kDenormal<T>, -kDenormal<T>, kSmallest<T>})
    check_special<T, W>(sine, tiny, is_exactly(tiny));
  for (const T zero : {T(0), T(-0.0), kDenormal<T>})
    check_special<T, W>(cosine, zero, is_exactly(T(1)));
  check_special<T, W>(sine, kNan<T>, is_nan<T>);
  check_special<T, W>(cosine, kNan<T>, is_nan<T>);
  for (const T outside : {kInfinity<T>, -kInfinity<T>}) {
    check_special<T, W>(sine, outside, is_not_finite<T>);
    check_special<T, W>(cosine, outside, is_not_finite<T>);
  }

  // The cutoff function: 1 at 0, 0 at the cutoff, and its slope.
  const T radius = T(5.2);
  const auto fc = [=](V r) {
    return kinml::cutoff_function(r, V(T(1) / radius), V(T(1.57079632679489661923)), V(T(0.5)));
  };
  const Real pi = 3.14159265358979323846264338327950288L, rc = radius;
  check_ulps<T, W>(
      "fc", [=](V r) { return fc(r).value; },
      [=](Real r) { return 0.5L + std::cos(pi * r / rc) / 2; }, grid<T>(0, radius, 40000), 4, 0.5L);
  check_ulps<T, W>(
      "dfc/dr", [=](V r) { return fc(r).slope; },
      [=](Real r) { return -pi / (2 * rc) * std::sin(pi * r / rc); }, grid<T>(0, radius, 40000), 6,
      0.25L);
  CHECK_CLOSE(fc(V(T(0))).value[0], 1, 2 * std::numeric_limits<T>::epsilon(), 0);
  CHECK_CLOSE(fc(V(radius)).value[0], 0, 0, std::numeric_limits<T>::epsilon());
}

template <class T, int W>
void test_integer_power() {
  using V = Vec<T, W>;
  for (const int n : {0, 1, 2, 3, 7, 8, 13, 31, 32})
    check_ulps<T, W>(
        "power", [=](V x) { return kinml::integer_power(x, V(T(1)), n); },
        [=](Real x) { return std::pow(x, static_cast<Real>(n)); }, grid<T>(0.3, 1, 5000), n + 1);
}

// Dual numbers: derivatives of the same functions, against the formulas.
template <class T, int W>
void test_dual() {
  check::section("dual numbers");
  using V = Vec<T, W>;
  using D = Dual<V>;
  const Real eps = std::numeric_limits<T>::epsilon();
  for (const T x : grid<T>(0.1, 1.5, 500)) {
    const T t = T(-0.75);
    const D d{V(x), V(t)};
    const Real y = x;
    const auto close = [&](D got, Real value, Real slope) {
      for (const int lane : {0, W - 1}) {
        CHECK_CLOSE(got.value[lane], value, 8 * eps, 4 * eps);
        CHECK_CLOSE(got.tangent[lane], slope * t, 16 * eps, 16 * eps);
      }
    };
    close(exp(d), std::exp(y), std::exp(y));
    close(log(d), std::log(y), 1 / y);
    close(d * d * d, y * y * y, 3 * y * y);
    close(D(V(T(1))) / d, 1 / y, -1 / (y * y));
    close(-d + d - d, -y, -1);
    close(kinml::integer_power(d, D(V(T(1))), 5), std::pow(y, 5.0L), 5 * std::pow(y, 4.0L));
  }
  using S = Dual<T>;
  for (const T x : grid<T>(-0.78, 0.78, 500)) {
    const kinml::SineCosine<S> sc = kinml::sine_cosine(S(x, T(2)));
    CHECK_CLOSE(sc.sine.value, std::sin(Real(x)), 4 * eps, 2 * eps);
    CHECK_CLOSE(sc.cosine.value, std::cos(Real(x)), 4 * eps, 2 * eps);
    CHECK_CLOSE(sc.sine.tangent, 2 * std::cos(Real(x)), 4 * eps, 4 * eps);
    CHECK_CLOSE(sc.cosine.tangent, -2 * std::sin(Real(x)), 4 * eps, 4 * eps);
  }
}

template <class T, int W>
void test_transpose() {
  check::section("transpose");
  using V = kinml::Vec<T, W>;
  V rows[W];
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) rows[i].raw[j] = static_cast<T>(W * i + j);
  kinml::transpose(rows);
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) CHECK(rows[i][j] == static_cast<T>(W * j + i));
}

template <class T, int W>
void test_width() {
  test_transpose<T, W>();
  test_exp<T, W>();
  test_log<T, W>();
  test_sqrt_and_reductions<T, W>();
  test_tanh_and_erf<T, W>();
  test_gaussian<T, W>();
  test_sine_cosine<T, W>();
  test_integer_power<T, W>();
  test_dual<T, W>();
}

// The widest register and, where kernels use one, a narrower one.
template <class T>
void test_type() {
  constexpr int native = kinml::kNativeWidth<T>;
  test_width<T, native>();
  if constexpr (native > 4) test_width<T, 4>();
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", kinml::cpu::isa_name());
  if (std::strcmp(kinml::cpu::isa_name(), KINML_TEXT(KINML_ISA)) != 0) {
    std::printf("skipped: this program is for %s\n", KINML_TEXT(KINML_ISA));
    return 77;
  }
  test_type<double>();
  test_type<float>();
  return check::finish();
}
