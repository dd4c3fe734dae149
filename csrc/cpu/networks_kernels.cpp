// Kernels of networks_cpu.h for one instruction set (dispatch.h).
//
// Everything is a matrix product whose left factor is read number by number (broadcast) and whose
// right factor and result are read and written as registers, in blocks of R rows by NV registers
// that stay in registers during the whole sum:
//   forward          z_l [atoms, out]       = h_{l-1} [atoms, in] W_l^T    (rows of h through
//   pointers) backward         dL/dh_{l-1} [atoms, in] = delta_l [atoms, out] W_l weight gradients
//   dL/dW_l [out, in]       = delta_l^T [out, atoms] h_{l-1} [atoms, in]
// with delta_l = dL/dz_l. The order of each sum does not depend on tiles or threads.
#include "../core/activation.h"
#include "../core/config.h"
#include "denormals.h"
#include "networks_plan.h"
#include "parallel.h"
#include "simd_functions.h"

namespace kinml {
inline namespace KINML_ISA {

namespace {

using cpu::kSumAtoms;
using cpu::kTileAtoms;
using cpu::NetworkLayer;
using cpu::NetworkPlan;
using cpu::NetworkSegment;
using cpu::NetworkTile;
using Index = std::int64_t;

template <class T>
using Native = Vec<T, kNativeWidth<T>>;

// Register blocks: R * NV sums, NV registers of the right factor and one of the left one fit into
// the 32 (AVX-512) or 16 registers.
constexpr bool kManyRegisters = KINML_VECTOR_BYTES == 64;
constexpr int kMaxVectors = kManyRegisters ? 4 : 3;
constexpr int kMaxRows = 12;
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

// ---- rows times packed panel ----------------------------------------------------------------

// c[r][0 .. NV W) = start + sum_k a[r][k] b[k][0 .. NV W) for r < n_rows <= R; of the last register
// only `last` numbers are written. While it works it fetches the rows `next` into the cache.
template <class T, int R, int NV>
void multiply_block(const T* const* a, const T* const* next, Index depth, const T* b,
                    const T* start, T* const* c, Index n_rows, Index last) {
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
    if (r >= n_rows) break;
#pragma GCC unroll 4
    for (int v = 0; v + 1 < NV; ++v) sums[r][v].store(c[r] + v * W);
    T* const end = c[r] + (NV - 1) * W;
    if (last == W)
      sums[r][NV - 1].store(end);
    else
      store_some(sums[r][NV - 1], end, last);
  }
}

// The same for fewer rows than R: rows beyond n_rows repeat the last one.
template <class T, int R, int NV>
void multiply_rest(const T* const* a, Index depth, const T* b, const T* start, T* const* c,
                   Index n_rows, Index last) {
  const T* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = a[r < n_rows ? r : n_rows - 1];
  multiply_block<T, R, NV>(rows, rows, depth, b, start, c, n_rows, last);
}

// While it works on some rows it fetches the next ones, and in the end the rows `after` (kMaxRows).
template <class T, int NV>
void multiply_panel(const T* const* a, const T* const* after, Index n_rows, Index depth, const T* b,
                    const T* start, T* const* c, Index last) {
  constexpr int R = kRows<NV>;
  Index i = 0;
  for (; i + R <= n_rows; i += R) {
    const T* const* next = a + i;
    if (after != nullptr) next = i + 2 * R <= n_rows ? a + i + R : after;
    multiply_block<T, R, NV>(a + i, next, depth, b, start, c + i, R, last);
  }
  const Index rest = n_rows - i;
  if (rest > 4)
    multiply_rest<T, R, NV>(a + i, depth, b, start, c + i, rest, last);
  else if (rest > 2)
    multiply_rest<T, 4, NV>(a + i, depth, b, start, c + i, rest, last);
  else if (rest > 0)
    multiply_rest<T, 2, NV>(a + i, depth, b, start, c + i, rest, last);
}

// c[i][0 .. columns) = bias + a[i][0 .. depth) times a packed matrix, for i < n_rows <= kTileAtoms.
// Whole registers are written if `padded`, else exactly `columns` numbers. With `after`, a is
// expected in slow memory and fetched in advance.
template <class T>
void multiply(const T* const* a, const T* const* after, Index n_rows, Index depth, const T* packed,
              const T* bias, T* const* c, Index columns, bool padded) {
  constexpr int W = kNativeWidth<T>;
  const Index vectors = vectors_for<T>(columns);
  const Panels panels(vectors);
  T* outputs[kTileAtoms];
  for (Index p = 0; p < panels.count; ++p) {
    const Index begin = panels.begin(p) * W;
    const bool whole = padded || p + 1 < panels.count;
    const Index last = whole ? W : columns - (vectors - 1) * W;
    for (Index i = 0; i < n_rows; ++i) outputs[i] = c[i] + begin;
    with_vectors(panels.vectors(p), [&](auto nv) {
      multiply_panel<T, nv.value>(a, p == 0 ? after : nullptr, n_rows, depth,
                                  packed + begin * depth, bias ? bias + begin : nullptr, outputs,
                                  last);
    });
  }
}

// c[i] = bias + a[i][0 .. depth) . b: the product with a matrix of one column, for padded rows.
template <class T>
void multiply_column(const T* const* a, Index n_rows, Index depth, const T* b, T bias, T* c) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  for (Index i = 0; i < n_rows; ++i) {
    V sum(T(0));
    for (Index k = 0; k < depth; k += W) sum += V::load(a[i] + k) * V::load(b + k);
    c[i] = reduce_add(sum) + bias;
  }
}

// ---- packing --------------------------------------------------------------------------------

// First (high = 0) or second half (high = 1) of a0 b0 a1 b1 a2 b2 ...
template <int high, class T, int W>
KINML_HD Vec<T, W> interleave(Vec<T, W> a, Vec<T, W> b) {
  typename Vec<T, W>::IntRaw lanes;
  for (int i = 0; i < W; ++i) lanes[i] = (i + high * W) / 2 + (i % 2) * W;
  return __builtin_shuffle(a.raw, b.raw, lanes);
}

// Transposes W registers of W numbers: after log2(W) such steps row and column have changed places.
template <class T>
KINML_HD void transpose(Native<T> (&rows)[kNativeWidth<T>]) {
  constexpr int W = kNativeWidth<T>;
  for (int step = 1; step < W; step *= 2) {
    Native<T> mixed[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      mixed[2 * i] = interleave<0>(rows[i], rows[i + W / 2]);
      mixed[2 * i + 1] = interleave<1>(rows[i], rows[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = mixed[i];
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
          transpose<T>(block);
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

// The same for W [out, in] itself as the right factor.
template <class T>
void pack_straight(const T* weights, Index in, Index out, T* packed) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  const Panels panels(vectors_for<T>(in));
  for (Index p = 0; p < panels.count; ++p) {
    const Index begin = panels.begin(p) * W;
    const Index width = panels.vectors(p) * W;
    T* to = packed + begin * out;
    for (Index k = 0; k < out; ++k)
      for (Index j = begin; j < begin + width; j += W, to += W) {
        const T* const from = weights + k * in + j;
        (j + W <= in ? V::load(from) : load_some(from, in - j)).store(to);
      }
  }
}

// Whether multiply_column serves a layer: the last one, with padded rows before it.
KINML_HD bool is_column(const NetworkPlan& plan, Index l, const NetworkLayer& layer) {
  return l > 0 && l == plan.n_layers - 1 && layer.out == 1;
}

template <class T>
void pack_forward(const NetworkPlan& plan, const T* parameters, T* packed, int n_threads) {
  cpu::parallel_for(plan.n_species * plan.n_layers, n_threads, [&](Index item) {
    const Index species = item / plan.n_layers;
    const Index l = item % plan.n_layers;
    const NetworkLayer& layer = plan.of(species)[l];
    if (plan.starts[species] == plan.starts[species + 1]) return;
    T* const to = packed + layer.packed;
    if (is_column(plan, l, layer))
      pack_straight(parameters + layer.weights, layer.in, layer.out, to);
    else
      pack_transposed(parameters + layer.weights, layer.in, layer.out, to);
    const Index padded = vectors_for<T>(layer.out) * kNativeWidth<T>;
    T* const bias = to + layer.in * padded;
    for (Index j = 0; j < padded; ++j)
      bias[j] = layer.biases >= 0 && j < layer.out ? parameters[layer.biases + j] : T(0);
  });
}

template <class T>
void pack_backward(const NetworkPlan& plan, const T* parameters, T* packed, int n_threads) {
  cpu::parallel_for(plan.n_species * plan.n_layers, n_threads, [&](Index item) {
    const Index species = item / plan.n_layers;
    const NetworkLayer& layer = plan.of(species)[item % plan.n_layers];
    if (layer.transposed < 0 || plan.starts[species] == plan.starts[species + 1]) return;
    pack_straight(parameters + layer.weights, layer.in, layer.out, packed + layer.transposed);
  });
}

// ---- activations ----------------------------------------------------------------------------

// h = f(z), for `columns` numbers in each of n_rows rows. Without padding all is one row.
template <class T>
void activate(int code, const T* z, T* h, Index n_rows, Index columns, Index stride) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  with_activation(code, [&](auto f) {
    if (stride % W == 0) {
      for (Index i = 0; i < n_rows; ++i)
        for (Index j = i * stride; j < i * stride + columns; j += W)
          f.value(V::load(z + j)).store(h + j);
    } else {
      const Index n = n_rows * stride;
      for (Index j = 0; j < n; j += W) store_some(f.value(load_some(z + j, n - j)), h + j, n - j);
    }
  });
}

// delta *= f'(z)
template <class T>
void multiply_slope(int code, const T* z, const T* h, T* delta, Index n_rows, Index columns,
                    Index stride) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  with_activation(code, [&](auto f) {
    if (stride % W == 0) {
      for (Index i = 0; i < n_rows; ++i)
        for (Index j = i * stride; j < i * stride + columns; j += W)
          (V::load(delta + j) * f.slope(V::load(z + j), V::load(h + j))).store(delta + j);
    } else {
      const Index n = n_rows * stride;
      for (Index j = 0; j < n; j += W) {
        const V slope = f.slope(load_some(z + j, n - j), load_some(h + j, n - j));
        store_some(load_some(delta + j, n - j) * slope, delta + j, n - j);
      }
    }
  });
}

// ---- forward --------------------------------------------------------------------------------

template <class T>
void forward(const NetworkPlan& plan, const NetworkTile* tiles, Index n_tiles, const T* packed,
             const T* features, Index feature_stride, const Index* rows, T* saved, T* scratch,
             T* atomic, int n_threads) {
  cpu::parallel_for(n_tiles, n_threads, [&](Index item) {
    const FlushDenormals<T> flush;
    const NetworkTile& tile = tiles[item];
    const NetworkSegment& segment = *tile.segment;
    const NetworkLayer* const layers = plan.of(segment.species);
    const Index n = tile.count;
    const Index first = segment.first + tile.first;
    T* const own = scratch + cpu::thread_index() * kTileAtoms * plan.scratch_per_atom;
    const T* inputs[kTileAtoms];
    T* outputs[kTileAtoms];
    for (Index i = 0; i < n; ++i) inputs[i] = features + rows[first + i] * feature_stride;
    // The tile that this thread will probably get next: its first rows are fetched meanwhile.
    const NetworkTile& likely = tiles[item + 1 < n_tiles ? item + 1 : item];
    const T* after[kMaxRows];
    for (Index i = 0; i < kMaxRows; ++i) {
      const Index atom = likely.segment->first + likely.first + (i < likely.count ? i : 0);
      after[i] = features + rows[atom] * feature_stride;
    }
    for (Index l = 0; l < plan.n_layers; ++l) {
      const NetworkLayer& layer = layers[l];
      // Without `saved`, h overwrites z in a buffer of the thread.
      T* z = own + kTileAtoms * layer.column;
      T* h = z;
      if (saved != nullptr) {
        z = saved + segment.first * plan.saved_per_atom + segment.count * 2 * layer.column +
            tile.first * layer.stride;
        h = z + segment.count * layer.stride;
      }
      const Index padded = vectors_for<T>(layer.out) * kNativeWidth<T>;
      const T* const weights = packed + layer.packed;
      const T* const bias = weights + layer.in * padded;
      if (is_column(plan, l, layer)) {
        multiply_column(inputs, n, layer.in, weights, *bias, z);
      } else {
        for (Index i = 0; i < n; ++i) outputs[i] = z + i * layer.stride;
        multiply(inputs, l == 0 ? after : nullptr, n, layer.in, weights, bias, outputs, layer.out,
                 layer.stride >= padded);
      }
      activate(static_cast<int>(plan.activations[l]), z, h, n, layer.out, layer.stride);
      for (Index i = 0; i < n; ++i) inputs[i] = h + i * layer.stride;
    }
    for (Index i = 0; i < n; ++i) atomic[first + i] = inputs[i][0];
  });
}

// ---- backward -------------------------------------------------------------------------------

template <class T>
void backward(const NetworkPlan& plan, const NetworkTile* tiles, Index n_tiles, const T* packed,
              const T* saved, const T* grad_atomic, T* deltas, T* grad_features,
              Index feature_stride, const Index* rows, int n_threads) {
  cpu::parallel_for(n_tiles, n_threads, [&](Index item) {
    const FlushDenormals<T> flush;
    const NetworkTile& tile = tiles[item];
    const NetworkSegment& segment = *tile.segment;
    const NetworkLayer* const layers = plan.of(segment.species);
    const Index n = tile.count;
    const Index first = segment.first + tile.first;
    const Index species_first = plan.starts[segment.species];
    const Index species_count = plan.starts[segment.species + 1] - species_first;
    const T* inputs[kTileAtoms];
    T* outputs[kTileAtoms];
    for (Index l = plan.n_layers - 1; l >= 0; --l) {
      const NetworkLayer& layer = layers[l];
      T* const delta = deltas + segment.offset * plan.scratch_per_atom +
                       segment.count * layer.column + tile.first * layer.stride;
      const T* const z = saved + species_first * plan.saved_per_atom +
                         species_count * 2 * layer.column + (first - species_first) * layer.stride;
      const T* const h = z + species_count * layer.stride;
      if (l == plan.n_layers - 1) {
        for (Index i = 0; i < n; ++i) delta[i * layer.stride] = grad_atomic[first + i];
      } else {
        for (Index i = 0; i < n; ++i) outputs[i] = delta + i * layer.stride;
        multiply<T>(inputs, nullptr, n, layers[l + 1].out, packed + layers[l + 1].transposed,
                    nullptr, outputs, layer.out, true);
      }
      multiply_slope(static_cast<int>(plan.activations[l]), z, h, delta, n, layer.out,
                     layer.stride);
      for (Index i = 0; i < n; ++i) inputs[i] = delta + i * layer.stride;
    }
    if (grad_features == nullptr) return;
    for (Index i = 0; i < n; ++i) outputs[i] = grad_features + rows[first + i] * feature_stride;
    multiply<T>(inputs, nullptr, n, layers[0].out, packed + layers[0].transposed, nullptr, outputs,
                layers[0].in, false);
  });
}

// ---- weight gradients -----------------------------------------------------------------------

// gradient[r][0 .. NV W) (+)= sum_a delta[a][r] x[a][0 .. NV W) for r < n_rows <= R; of the last
// register only `last` numbers count. While it works it fetches every other next[a][fetch], which
// is as fast as memory delivers, into the cache.
template <class T, int R, int NV>
void outer_block(const T* const* x, const T* const* next, Index fetch, Index n_atoms,
                 const T* delta, Index delta_stride, T* gradient, Index gradient_stride,
                 Index n_rows, Index last, bool add) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  V sums[R][NV];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sums[r][v] = V(T(0));
  const auto step = [&](Index a) __attribute__((always_inline)) {
    const T* const row = x[a];
    V right[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) right[v] = V::load(row + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const V left(delta[r]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[r][v] += left * right[v];
    }
    delta += delta_stride;
  };
  Index a = 0;
  for (; a + 2 <= n_atoms; a += 2) {
    __builtin_prefetch(next[a] + fetch);
    step(a);
    step(a + 1);
  }
  if (a < n_atoms) step(a);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    if (r >= n_rows) break;
    T* const out = gradient + r * gradient_stride;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Index count = v + 1 < NV ? W : last;
      V sum = sums[r][v];
      if (count == W) {
        if (add) sum += V::load(out + v * W);
        sum.store(out + v * W);
      } else {
        if (add) sum += load_some(out + v * W, count);
        store_some(sum, out + v * W, count);
      }
    }
  }
}

// One panel of dL/dW, for one block of atoms; fetches the same columns of the next atoms' rows.
template <class T, int NV>
void outer_panel(const T* const* x, const T* const* next, Index n_atoms, const T* delta,
                 Index delta_stride, T* gradient, Index gradient_stride, Index n_rows, Index last,
                 bool add) {
  constexpr int R = kRows<NV>;
  constexpr Index line = 64 / sizeof(T);
  constexpr Index width = NV * kNativeWidth<T>;
  Index fetch = 0;
  for (Index r = 0; r < n_rows;) {
    const Index rest = n_rows - r;
    T* const out = gradient + r * gradient_stride;
    const auto block = [&](auto rows) {
      constexpr int N = rows.value;
      // The first call fetches the first lines of even atoms, the second those of odd atoms, ...
      const Index column = fetch / 2 * line;
      outer_block<T, N, NV>(x, next + fetch % 2, column < width ? column : 0, n_atoms, delta + r,
                            delta_stride, out, gradient_stride, rest < N ? rest : N, last, add);
      r += N;
    };
    if (rest > 4 || R <= 4)
      block(Constant<R>{});
    else if (rest > 1)
      block(Constant<4>{});
    else
      block(Constant<1>{});
    ++fetch;
  }
}

// Where the inputs h_{l-1} of a segment's atoms stand.
template <class T>
struct Inputs {
  const T* base;
  Index stride;
  const Index* rows;  // or null: consecutive

  KINML_HD const T* row(Index i) const { return base + (rows ? rows[i] : i) * stride; }
};

template <class T>
KINML_HD Inputs<T> inputs_of(const NetworkPlan& plan, const NetworkSegment& segment, Index l,
                             const T* features, Index feature_stride, const Index* rows,
                             const T* saved) {
  if (l == 0) return {features, feature_stride, rows + segment.first};
  const NetworkLayer& before = plan.of(segment.species)[l - 1];
  const Index first = plan.starts[segment.species];
  const Index count = plan.starts[segment.species + 1] - first;
  return {saved + first * plan.saved_per_atom + count * (2 * before.column + before.stride) +
              (segment.first - first) * before.stride,
          before.stride, nullptr};
}

// Sum of delta over a segment: dL/db.
template <class T>
void bias_gradient(const T* delta, Index stride, Index n_atoms, Index n, bool continued,
                   T* gradient) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  for (Index j = 0; j < n; j += W) {
    for (Index block = 0; block < n_atoms; block += kSumAtoms) {
      const Index end = block + kSumAtoms < n_atoms ? block + kSumAtoms : n_atoms;
      V sum(T(0));
      for (Index a = block; a < end; ++a) sum += V::load(delta + a * stride + j);
      if (continued || block > 0) sum += load_some(gradient + j, n - j);
      store_some(sum, gradient + j, n - j);
    }
  }
}

// The atoms of a segment, and one panel of the columns of dL/dW of one layer.
template <class T>
struct WeightItem {
  const NetworkSegment* segment = nullptr;
  Index l = 0;
  Index panel = 0;
  Inputs<T> inputs = {};
};

// Segment after segment, as in the passes before, so that a thread finds its rows in its cache.
template <class T>
Index count_weight_items(const NetworkPlan& plan, const NetworkSegment* segments,
                         Index n_segments) {
  Index count = 0;
  for (Index s = 0; s < n_segments; ++s)
    for (Index l = 0; l < plan.n_layers; ++l)
      count += Panels(vectors_for<T>(plan.of(segments[s].species)[l].in)).count;
  return count;
}

template <class T>
WeightItem<T> weight_item(const NetworkPlan& plan, const NetworkSegment* segments, Index n_segments,
                          const T* features, Index feature_stride, const Index* rows,
                          const T* saved, Index item) {
  for (Index s = 0; s < n_segments; ++s)
    for (Index l = 0; l < plan.n_layers; ++l) {
      const Index count = Panels(vectors_for<T>(plan.of(segments[s].species)[l].in)).count;
      if (item < count)
        return {&segments[s], l, item,
                inputs_of(plan, segments[s], l, features, feature_stride, rows, saved)};
      item -= count;
    }
  return {};
}

// x[a] = where the item's columns of the atoms block .. block + kSumAtoms begin. Atoms that do not
// exist get `other`: their addresses are only fetched.
template <class T>
void rows_of_block(const WeightItem<T>& item, Index block, Index column, const T* other,
                   const T** x) {
  const Index n = item.segment == nullptr ? 0 : item.segment->count - block;
  for (Index a = 0; a <= kSumAtoms; ++a) x[a] = a < n ? item.inputs.row(block + a) + column : other;
}

// Works on one item; `after` is the item that the thread will probably get next. With the first
// panel goes dL/db.
template <class T>
void weight_gradient(const NetworkPlan& plan, const WeightItem<T>& item, const WeightItem<T>& after,
                     const T* deltas, T* grad_parameters) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  const NetworkSegment& segment = *item.segment;
  const NetworkLayer& layer = plan.of(segment.species)[item.l];
  const bool continued = segment.first > plan.starts[segment.species];
  const T* const delta =
      deltas + segment.offset * plan.scratch_per_atom + segment.count * layer.column;
  if (item.panel == 0 && layer.biases >= 0)
    bias_gradient(delta, layer.stride, segment.count, layer.out, continued,
                  grad_parameters + layer.biases);

  const Panels panels(vectors_for<T>(layer.in));
  const Index begin = panels.begin(item.panel) * W;
  const Index width = panels.vectors(item.panel) * W;
  // Whole registers of the last panel would reach beyond the rows: those columns are copied.
  const bool ragged = begin + width > layer.in;
  const Index valid = ragged ? layer.in - begin : width;
  const Index last = valid - (width - W);
  alignas(64) T copies[kSumAtoms][kMaxVectors * W];
  const T* copied[kSumAtoms];
  const T* pointers[2][kSumAtoms + 1];
  rows_of_block(item, 0, begin, delta, pointers[0]);
  int now = 0;
  for (Index block = 0; block < segment.count; block += kSumAtoms, now = 1 - now) {
    const Index n = segment.count - block < kSumAtoms ? segment.count - block : kSumAtoms;
    const T* const* rows = pointers[now];
    if (block + kSumAtoms < segment.count)
      rows_of_block(item, block + kSumAtoms, begin, delta, pointers[1 - now]);
    else
      rows_of_block(after, 0, after.panel * width, delta, pointers[1 - now]);
    if (ragged) {
      for (Index a = 0; a < n; ++a) {
        for (Index v = 0; v + W <= valid; v += W) V::load(rows[a] + v).store(copies[a] + v);
        for (Index j = valid / W * W; j < valid; ++j) copies[a][j] = rows[a][j];
        for (Index j = valid; j < width; ++j) copies[a][j] = T(0);
        copied[a] = copies[a];
      }
      rows = copied;
    }
    with_vectors(panels.vectors(item.panel), [&](auto nv) {
      outer_panel<T, nv.value>(rows, pointers[1 - now], n, delta + block * layer.stride,
                               layer.stride, grad_parameters + layer.weights + begin, layer.in,
                               layer.out, last, continued || block > 0);
    });
  }
}

template <class T>
void weight_gradients(const NetworkPlan& plan, const NetworkSegment* segments, Index n_segments,
                      const T* features, Index feature_stride, const Index* rows, const T* saved,
                      const T* deltas, T* grad_parameters, int n_threads) {
  const auto find = [&](Index item) {
    return weight_item(plan, segments, n_segments, features, feature_stride, rows, saved, item);
  };
  cpu::parallel_for(count_weight_items<T>(plan, segments, n_segments), n_threads, [&](Index item) {
    const FlushDenormals<T> flush;
    weight_gradient(plan, find(item), find(item + 1), deltas, grad_parameters);
  });
}

}  // namespace

#define KINML_DEFINE_NETWORKS(T)                                                                   \
  void networks_pack_forward(const NetworkPlan& plan, const T* parameters, T* packed,              \
                             int n_threads) {                                                      \
    pack_forward(plan, parameters, packed, n_threads);                                             \
  }                                                                                                \
  void networks_pack_backward(const NetworkPlan& plan, const T* parameters, T* packed,             \
                              int n_threads) {                                                     \
    pack_backward(plan, parameters, packed, n_threads);                                            \
  }                                                                                                \
  void networks_forward_tiles(const NetworkPlan& plan, const NetworkTile* tiles, Index n_tiles,    \
                              const T* packed, const T* features, Index feature_stride,            \
                              const Index* rows, T* saved, T* scratch, T* atomic, int n_threads) { \
    forward(plan, tiles, n_tiles, packed, features, feature_stride, rows, saved, scratch, atomic,  \
            n_threads);                                                                            \
  }                                                                                                \
  void networks_backward_tiles(const NetworkPlan& plan, const NetworkTile* tiles, Index n_tiles,   \
                               const T* packed, const T* saved, const T* grad_atomic, T* deltas,   \
                               T* grad_features, Index feature_stride, const Index* rows,          \
                               int n_threads) {                                                    \
    backward(plan, tiles, n_tiles, packed, saved, grad_atomic, deltas, grad_features,              \
             feature_stride, rows, n_threads);                                                     \
  }                                                                                                \
  void networks_weight_gradients(const NetworkPlan& plan, const NetworkSegment* segments,          \
                                 Index n_segments, const T* features, Index feature_stride,        \
                                 const Index* rows, const T* saved, const T* deltas,               \
                                 T* grad_parameters, int n_threads) {                              \
    weight_gradients(plan, segments, n_segments, features, feature_stride, rows, saved, deltas,    \
                     grad_parameters, n_threads);                                                  \
  }
KINML_DEFINE_NETWORKS(double)
KINML_DEFINE_NETWORKS(float)
#undef KINML_DEFINE_NETWORKS

}  // namespace KINML_ISA
}  // namespace kinml
