// Matrix products of which the left factor is read number by number (broadcast), and the right factor
// and the result as registers, in blocks of R rows by NV registers that stay in registers during the
// whole sum. For files that are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "simd.h"

namespace kinml {
inline namespace KINML_ISA {

using Index = std::int64_t;

template <class T>
using Native = Vec<T, kNativeWidth<T>>;

// Register blocks: R * NV sums, NV registers of the right factor and one of the left one fit into
// the 32 (AVX-512) or 16 registers.
constexpr bool kManyRegisters = KINML_VECTOR_BYTES == 64;
constexpr int kMaxVectors = kManyRegisters ? 4 : 3;
constexpr int kMaxRows = 12;
// Rows that `multiply` takes at a time.
constexpr Index kMostRows = 96;
template <int NV>
inline constexpr int kRows = kManyRegisters ? (NV == 4   ? 6
                                               : NV == 3 ? 8
                                                         : 12)
                                            : (NV == 3   ? 4
                                               : NV == 2 ? 6
                                                         : 8);

template <class T>
KINML_HD Index vectors_for(Index numbers) {
  return (numbers + kNativeWidth<T> - 1) / kNativeWidth<T>;
}

// The columns of a matrix are cut into panels of nearly equal width, at most kMaxVectors registers.
struct Panels {
  Index count, width, wider;  // the first `wider` panels have width + 1 registers

  KINML_HD explicit Panels(Index vectors)
      : count((vectors + kMaxVectors - 1) / kMaxVectors),
        width(count == 0 ? 0 : vectors / count),
        wider(count == 0 ? 0 : vectors % count) {}
  KINML_HD Index begin(Index panel) const {
    return panel * width + (panel < wider ? panel : wider);
  }
  KINML_HD Index vectors(Index panel) const { return width + (panel < wider ? 1 : 0); }
};

// Calls function(Constant<NV>{}) for NV = vectors.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <class Function>
KINML_HD void with_vectors(Index vectors, const Function& function) {
  switch (vectors) {
    case 1:
      return function(Constant<1>{});
    case 2:
      return function(Constant<2>{});
    case 3:
      return function(Constant<3>{});
    default:
      return function(Constant<kMaxVectors>{});
  }
}

// One register of numbers that may stand at the end of memory. It has no branch for a whole
// register: with two copies of the code behind it the compiler may round them differently.
template <class T>
KINML_HD Native<T> load_some(const T* p, Index count) {
  constexpr int W = kNativeWidth<T>;
  alignas(64) T numbers[W] = {};
  for (Index i = 0; i < (count < W ? count : W); ++i) numbers[i] = p[i];
  return Native<T>::load(numbers);
}
template <class T>
KINML_HD void store_some(Native<T> value, T* p, Index count) {
  constexpr int W = kNativeWidth<T>;
  alignas(64) T numbers[W];
  value.store(numbers);
  for (Index i = 0; i < (count < W ? count : W); ++i) p[i] = numbers[i];
}

// Rows of a matrix: row i begins at base + index[i] * stride, or at base + i * stride.
template <class T>
struct Rows {
  T* base;
  Index stride;
  const Index* index;

  KINML_HD T* operator[](Index i) const { return base + (index ? index[i] : i) * stride; }
  KINML_HD Rows from(Index i) const {
    return index ? Rows{base, stride, index + i} : Rows{base + i * stride, stride, nullptr};
  }
};

// c[r][0 .. NV W) = start + sum_k a[r][k] b[k][0 .. NV W) for r < R; of the last register only
// `last` numbers are written. While it works it fetches the rows `next` into the cache.
template <class T, int R, int NV>
void multiply_block(const T* const* a, const T* const* next, Index depth, const T* b,
                    const T* start, T* const* c, Index column, Index last) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  constexpr Index line = 64 / sizeof(T);
  V sums[R][NV];
  const T* rows[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    rows[r] = a[r];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sums[r][v] = start ? V::load(start + v * W) : V(T(0));
  }
  const auto step = [&](Index k) __attribute__((always_inline)) {
    V right[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) right[v] = V::load(b + (k * NV + v) * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const V left(rows[r][k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[r][v] += left * right[v];
    }
  };
  Index k = 0;
  for (; k + line <= depth; k += line) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + k);
#pragma GCC unroll 4
    for (Index i = 0; i < line; ++i) step(k + i);
  }
  for (; k < depth; ++k) step(k);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    T* const out = c[r] + column;
#pragma GCC unroll 4
    for (int v = 0; v + 1 < NV; ++v) sums[r][v].store(out + v * W);
    T* const end = out + (NV - 1) * W;
    if (last == W)
      sums[r][NV - 1].store(end);
    else
      store_some(sums[r][NV - 1], end, last);
  }
}

// Calls function(Constant<R>{}) for R = rows, 1 <= rows <= max.
template <int max, class Function>
KINML_HD void with_rows(Index rows, const Function& function) {
  if constexpr (max > 1)
    if (rows < max) return with_rows<max - 1>(rows, function);
  function(Constant<max>{});
}

// The rows in blocks of equal size, so that none has too few to keep the processor busy. Behind the
// rows a[0 .. n_rows) stand kMaxRows more that are fetched in the end.
template <class T, int NV>
void multiply_panel(const T* const* a, Index n_rows, Index depth, const T* b, const T* start,
                    T* const* c, Index column, Index last) {
  constexpr int R = kRows<NV>;
  Index blocks = (n_rows + R - 1) / R;
  for (Index i = 0; i < n_rows; --blocks) {
    const Index size = (n_rows - i) / blocks;
    with_rows<R>(size, [&](auto rows) {
      multiply_block<T, rows.value, NV>(a + i, a + i + size, depth, b, start, c + i, column, last);
    });
    i += size;
  }
}

// c[i][0 .. columns) = bias + a[i][0 .. depth) times a packed matrix, for i < n_rows. Whole
// registers are written if `padded`, else exactly `columns` numbers. While it works on some rows it
// fetches the next ones, and in the end `after` (kMaxRows; null: nothing new).
template <class T>
void multiply(Rows<const T> a, const T* const* after, Index n_rows, Index depth, const T* packed,
              const T* bias, Rows<T> c, Index columns, bool padded) {
  constexpr int W = kNativeWidth<T>;
  const T* inputs[kMostRows + kMaxRows];
  T* outputs[kMostRows];
  for (Index i = 0; i < n_rows; ++i) {
    inputs[i] = a[i];
    outputs[i] = c[i];
  }
  const Index vectors = vectors_for<T>(columns);
  const Panels panels(vectors);
  for (Index p = 0; p < panels.count; ++p) {
    const bool end = p + 1 == panels.count;
    for (Index i = 0; i < kMaxRows; ++i) inputs[n_rows + i] = end && after ? after[i] : inputs[i];
    const Index begin = panels.begin(p) * W;
    const Index last = padded || !end ? W : columns - (vectors - 1) * W;
    with_vectors(panels.vectors(p), [&](auto nv) {
      multiply_panel<T, nv.value>(inputs, n_rows, depth, packed + begin * depth,
                                  bias ? bias + begin : nullptr, outputs, begin, last);
    });
  }
}

// For multiply: packed = W^T [in, out] with columns rounded up to registers (zeros), cut into
// panels; panel after panel, each [in, width of the panel].
template <class T>
void pack_transposed(const T* weights, Index in, Index out, T* packed) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  const Panels panels(vectors_for<T>(out));
  for (Index p = 0; p < panels.count; ++p) {
    const Index width = panels.vectors(p) * W;
    T* const panel = packed + panels.begin(p) * W * in;
    for (Index j = 0; j < width; j += W) {
      const Index column = panels.begin(p) * W + j;
      const Index valid = out - column < W ? out - column : W;
      Index k = 0;
      if (valid == W) {
        for (; k + W <= in; k += W) {
          V block[W];
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) block[i] = V::load(weights + (column + i) * in + k);
          transpose(block);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) block[i].store(panel + (k + i) * width + j);
        }
      }
      for (; k < in; ++k)
        for (Index i = 0; i < W; ++i)
          panel[k * width + j + i] = i < valid ? weights[(column + i) * in + k] : T(0);
    }
  }
}

}  // namespace KINML_ISA
}  // namespace kinml
