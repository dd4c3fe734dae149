// Products of stored Jacobians (csrc/cpu/jacobian_kernels.h) against plain long double sums.
//
// Every array ends at a page that cannot be touched, padding holds NaN, and what is not asked for
// holds a mark that must stay.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/jacobian_kernels.h"
#include "check.h"
#include "guarded.h"

using Index = std::int64_t;
using Real = long double;

namespace {

std::mt19937_64 random_bits(20250301);

double random_normal() {
  return std::normal_distribution<double>()(random_bits);
}

template <class T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

constexpr double kMark = -77.25;

// One structure: numbers of J decide everything else, so that the same J can be padded differently.
template <class T>
struct Case {
  Index n, length;
  std::vector<T> values, g, r;  // [n, length, 3 n], [n, length], [3 n]

  Case(Index n_atoms, Index d) : n(n_atoms), length(d) {
    values.resize(n * length * 3 * n);
    g.resize(n * length);
    r.resize(3 * n);
    for (T& x : values) x = static_cast<T>(random_normal());
    for (T& x : g) x = static_cast<T>(random_normal());
    for (T& x : r) x = static_cast<T>(random_normal());
  }

  // Both products for a Jacobian of so many columns and rows so far apart: [3 n] and [n, length].
  std::vector<T> products(Index columns, Index stride) const {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const Index valid = 3 * n;
    Guarded<T> j(n * length * columns, nan), gs((n - 1) * stride + length, nan), rs(valid, nan);
    Guarded<T> out(valid + 1, T(kMark)), v((n - 1) * stride + length, T(kMark));
    for (Index row = 0; row < n * length; ++row)
      for (Index c = 0; c < valid; ++c) j[row * columns + c] = values[row * valid + c];
    for (Index i = 0; i < n; ++i)
      for (Index d = 0; d < length; ++d) gs[i * stride + d] = g[i * length + d];
    for (Index c = 0; c < valid; ++c) rs[c] = r[c];

    const kinml::cpu::StoredJacobian<T> jacobian{j.data(), n, length, columns};
    KINML_CALL_KERNEL(jacobian_transpose_product, jacobian, gs.data(), stride, out.data());
    KINML_CALL_KERNEL(jacobian_product, jacobian, rs.data(), v.data(), stride);
    std::vector<T> result;
    for (Index c = 0; c < valid; ++c) result.push_back(out[c]);
    CHECK(out[valid] == T(kMark));
    for (Index i = 0; i < n; ++i) {
      for (Index d = 0; d < length; ++d) result.push_back(v[i * stride + d]);
      if (i + 1 < n)
        for (Index d = length; d < stride; ++d) CHECK(v[i * stride + d] == T(kMark));
    }
    return result;
  }
};

template <class T>
void test_products(Index n, Index length) {
  const Case<T> c(n, length);
  const Index valid = 3 * n;
  const std::vector<T> result = c.products(valid, length);
  const Real eps = std::numeric_limits<T>::epsilon();
  for (Index column = 0; column < valid; ++column) {
    Real sum = 0, size = 0;
    for (Index row = 0; row < n * length; ++row) {
      const Real term = static_cast<Real>(c.values[row * valid + column]) * c.g[row];
      sum += term;
      size += std::fabs(term);
    }
    CHECK_CLOSE(result[column], sum, 0, eps * std::sqrt(Real(n * length)) * size);
  }
  for (Index row = 0; row < n * length; ++row) {
    Real sum = 0, size = 0;
    for (Index column = 0; column < valid; ++column) {
      const Real term = static_cast<Real>(c.values[row * valid + column]) * c.r[column];
      sum += term;
      size += std::fabs(term);
    }
    CHECK_CLOSE(result[valid + row], sum, 0, eps * std::sqrt(Real(valid)) * size);
  }
  // Padding, strides and repetition change no bit.
  for (const Index columns : {valid, valid + 1, valid + 3, valid + 60})
    for (const Index stride : {length, length + 5}) {
      const std::vector<T> again = c.products(columns, stride);
      for (Index i = 0; i < static_cast<Index>(result.size()); ++i)
        CHECK(same_bits(again[i], result[i]));
    }
}

// The two products are one bilinear form.
template <class T>
void test_adjoint() {
  const Case<T> c(10, 224);
  const std::vector<T> result = c.products(33, 224);
  Real one = 0, other = 0, size = 0;
  for (Index k = 0; k < 30; ++k) one += static_cast<Real>(result[k]) * c.r[k];
  for (Index k = 0; k < 2240; ++k) {
    other += static_cast<Real>(result[30 + k]) * c.g[k];
    size += std::fabs(static_cast<Real>(result[30 + k]) * c.g[k]);
  }
  CHECK_CLOSE(one, other, 0, 10 * std::numeric_limits<T>::epsilon() * size);
}

// NaN inside of J is no padding: it must show.
template <class T>
void test_nan() {
  for (const Index where :
       {Index(0), Index(29), Index(5 * 224 * 30 + 17), Index(10 * 224 * 30 - 1)}) {
    Case<T> c(10, 224);
    c.values[where] = std::numeric_limits<T>::quiet_NaN();
    const std::vector<T> result = c.products(32, 224);
    for (Index k = 0; k < 30; ++k) CHECK(std::isnan(result[k]) == (k == where % 30));
    for (Index k = 0; k < 2240; ++k) CHECK(std::isnan(result[30 + k]) == (k == where / 30));
  }
}

template <class T>
void test_empty() {
  const kinml::cpu::StoredJacobian<T> jacobian{nullptr, 0, 224, 30};
  T out = T(kMark), v = T(kMark);
  KINML_CALL_KERNEL(jacobian_transpose_product, jacobian, nullptr, 224, &out);
  KINML_CALL_KERNEL(jacobian_product, jacobian, nullptr, &v, 224);
  CHECK(out == T(kMark) && v == T(kMark));
}

template <class T>
void test_all() {
  check::section("products");
  for (Index n = 1; n <= 24; ++n)
    for (const Index length : {1, 7, 16, 40, 67}) test_products<T>(n, length);
  test_products<T>(10, 224);
  test_products<T>(50, 30);
  check::section("adjoint");
  test_adjoint<T>();
  check::section("NaN");
  test_nan<T>();
  check::section("empty");
  test_empty<T>();
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", kinml::cpu::isa_name());
  test_all<double>();
  test_all<float>();
  return check::finish();
}
