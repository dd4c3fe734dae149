#include "jacobian_kernels.h"

#include <utility>

#include "denormals.h"
#include "simd.h"

namespace kinml {
inline namespace KINML_ISA {
namespace {

using cpu::StoredJacobian;

// A row of `valid` columns is read in registers of W <= valid numbers. The last one reaches back
// to end with the row, so that nothing behind the valid columns is touched: to the numbers that it
// shares with the register before it gives the same sums once more (J^T g), or they count with the
// factor 0 (J r).

// out[c] += sum_r J[r, c] g[r] for R consecutive rows of J. The registers of a row end at
// out[valid]; `last` holds the sums of the one that reaches back.
template <class T, int W, int R>
KINML_HD void add_rows(const T* rows, std::int64_t columns, std::int64_t valid, const T* g, T* out,
                       Vec<T, W>& last) {
  using V = Vec<T, W>;
  V factors[R];
  for (int r = 0; r < R; ++r) factors[r] = V(g[r]);
  std::int64_t c = 0;
  for (; c + W <= valid; c += W) {
    V sum = V::load(out + c);
    for (int r = 0; r < R; ++r) sum += V::load(rows + r * columns + c) * factors[r];
    sum.store(out + c);
  }
  if (c < valid)
    for (int r = 0; r < R; ++r) last += V::load(rows + r * columns + valid - W) * factors[r];
}

template <class T, int W>
KINML_HD void transpose_product(const StoredJacobian<T>& jacobian, const T* g, std::int64_t stride,
                                T* out) {
  using V = Vec<T, W>;
  constexpr int R = 8;  // rows between a load and a store of the sums
  const std::int64_t valid = 3 * jacobian.n_atoms;
  for (std::int64_t c = 0; c < valid; ++c) out[c] = T(0);
  V last(T(0));
  const T* rows = jacobian.values;
  for (std::int64_t i = 0; i < jacobian.n_atoms; ++i) {
    const T* gi = g + i * stride;
    std::int64_t d = 0;
    for (; d + R <= jacobian.length; d += R, rows += R * jacobian.columns)
      add_rows<T, W, R>(rows, jacobian.columns, valid, gi + d, out, last);
    for (; d < jacobian.length; ++d, rows += jacobian.columns)
      add_rows<T, W, 1>(rows, jacobian.columns, valid, gi + d, out, last);
  }
  if (valid % W != 0) last.store(out + valid - W);
}

// Halves of the blocks of B lanes of a and b, added: what is left of a in the lower lanes of the
// result, what is left of b in the upper ones, in blocks of B / 2.
template <int B, class T, int W>
KINML_HD Vec<T, W> add_halves(Vec<T, W> a, Vec<T, W> b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    constexpr int H = B / 2;
    const Vec<T, W> low(__builtin_shufflevector(a.raw, b.raw, (I / H * B + I % H)...));
    const Vec<T, W> high(__builtin_shufflevector(a.raw, b.raw, (I / H * B + I % H + H)...));
    return low + high;
  }(std::make_integer_sequence<int, W>());
}

// Sums of the lanes of W registers, each as reduce_add takes it.
template <int B, class T, int W>
KINML_HD Vec<T, W> reduce_rows(const Vec<T, W> (&rows)[B]) {
  if constexpr (B == 1) {
    return rows[0];
  } else {
    Vec<T, W> halves[B / 2];
    for (int r = 0; r < B / 2; ++r) halves[r] = add_halves<B>(rows[2 * r], rows[2 * r + 1]);
    return reduce_rows<B / 2>(halves);
  }
}

// sums[r] has lanes that add up to sum_c J[r, c] x[c], for R consecutive rows of J. `last` has the
// end of x in its upper lanes, 0 in those that the register before it has.
template <class T, int W, int R>
KINML_HD void dot_rows(const T* rows, std::int64_t columns, std::int64_t valid, const T* x,
                       Vec<T, W> last, Vec<T, W> (&sums)[R]) {
  using V = Vec<T, W>;
  for (int r = 0; r < R; ++r) sums[r] = V(T(0));
  std::int64_t c = 0;
  for (; c + W <= valid; c += W) {
    const V xc = V::load(x + c);
    for (int r = 0; r < R; ++r) sums[r] += V::load(rows + r * columns + c) * xc;
  }
  if (c < valid)
    for (int r = 0; r < R; ++r) sums[r] += V::load(rows + r * columns + valid - W) * last;
}

template <class T, int W>
KINML_HD void product(const StoredJacobian<T>& jacobian, const T* x, T* v, std::int64_t stride) {
  using V = Vec<T, W>;
  const std::int64_t valid = 3 * jacobian.n_atoms, columns = jacobian.columns;
  T end[W];
  for (int k = 0; k < W; ++k) end[k] = k < W - valid % W ? T(0) : x[valid - W + k];
  const V last = V::load(end);
  for (std::int64_t i = jacobian.n_atoms - 1; i >= 0; --i) {
    const T* rows = jacobian.values + i * jacobian.length * columns;
    T* vi = v + i * stride;
    std::int64_t d = 0;
    for (; d + W <= jacobian.length; d += W, rows += W * columns) {
      V sums[W];
      dot_rows<T, W, W>(rows, columns, valid, x, last, sums);
      reduce_rows<W>(sums).store(vi + d);
    }
    for (; d < jacobian.length; ++d, rows += columns) {
      V sums[1];
      dot_rows<T, W, 1>(rows, columns, valid, x, last, sums);
      vi[d] = reduce_add(sums[0]);
    }
  }
}

// Calls f with the widest register that a row of the structure fills; an atom has three columns.
template <int W, class F>
KINML_HD void with_width(std::int64_t valid, const F& f) {
  if constexpr (W == 2) {
    if (valid > 0) f.template operator()<2>();
  } else {
    if (valid >= W)
      f.template operator()<W>();
    else
      with_width<W / 2>(valid, f);
  }
}

template <class T>
void any_transpose_product(const StoredJacobian<T>& jacobian, const T* g, std::int64_t stride,
                           T* out) {
  const FlushDenormals<T> flush;
  with_width<kNativeWidth<T>>(3 * jacobian.n_atoms, [&]<int W>() __attribute__((always_inline)) {
    transpose_product<T, W>(jacobian, g, stride, out);
  });
}

template <class T>
void any_product(const StoredJacobian<T>& jacobian, const T* r, T* v, std::int64_t stride) {
  const FlushDenormals<T> flush;
  with_width<kNativeWidth<T>>(3 * jacobian.n_atoms, [&]<int W>() __attribute__((always_inline)) {
    product<T, W>(jacobian, r, v, stride);
  });
}

}  // namespace

void jacobian_transpose_product(const StoredJacobian<double>& jacobian, const double* g,
                                std::int64_t stride, double* out) {
  any_transpose_product(jacobian, g, stride, out);
}
void jacobian_transpose_product(const StoredJacobian<float>& jacobian, const float* g,
                                std::int64_t stride, float* out) {
  any_transpose_product(jacobian, g, stride, out);
}
void jacobian_product(const StoredJacobian<double>& jacobian, const double* r, double* v,
                      std::int64_t stride) {
  any_product(jacobian, r, v, stride);
}
void jacobian_product(const StoredJacobian<float>& jacobian, const float* r, float* v,
                      std::int64_t stride) {
  any_product(jacobian, r, v, stride);
}

}  // namespace KINML_ISA
}  // namespace kinml
