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

template <class T, int NV>
void multiply_panel(const T* const* a, bool prefetch, Index n_rows, Index depth, const T* b,
                    const T* start, T* const* c, Index last) {
  constexpr int R = kRows<NV>;
  Index i = 0;
  for (; i + R <= n_rows; i += R)
    multiply_block<T, R, NV>(a + i, prefetch && i + 2 * R <= n_rows ? a + i + R : a + i, depth, b,
                             start, c + i, R, last);
  const Index rest = n_rows - i;
  if (rest > 4)
    multiply_rest<T, R, NV>(a + i, depth, b, start, c + i, rest, last);
  else if (rest > 2)
    multiply_rest<T, 4, NV>(a + i, depth, b, start, c + i, rest, last);
  else if (rest > 0)
    multiply_rest<T, 2, NV>(a + i, depth, b, start, c + i, rest, last);
}

// c[i][0 .. columns) = bias + a[i][0 .. depth) times a packed matrix, for i < n_rows <= kTileAtoms.
// Whole registers are written if `padded`, else exactly `columns` numbers.
template <class T>
void multiply(const T* const* a, bool prefetch, Index n_rows, Index depth, const T* packed,
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
      multiply_panel<T, nv.value>(a, prefetch && p == 0, n_rows, depth, packed + begin * depth,
                                  bias ? bias + begin : nullptr, outputs, last);
    });
  }
}

// ---- packing --------------------------------------------------------------------------------

// packed, panel by panel, [depth][columns of the panel] = matrix(k, j), zero for j >= columns.
template <class T, class Matrix>
void pack(Index depth, Index columns, const Panels& panels, Index panel, const Matrix& matrix,
          T* packed) {
  constexpr int W = kNativeWidth<T>;
  const Index begin = panels.begin(panel) * W;
  const Index width = panels.vectors(panel) * W;
  const Index valid = columns - begin < width ? columns - begin : width;
  T* out = packed + begin * depth;
  for (Index k = 0; k < depth; ++k, out += width) {
    for (Index j = 0; j < valid; ++j) out[j] = matrix(k, begin + j);
    for (Index j = valid; j < width; ++j) out[j] = T(0);
  }
}

template <class T>
void pack_forward(const NetworkPlan& plan, const T* parameters, T* packed, int n_threads) {
  const Index n_layers = plan.n_layers;
  cpu::parallel_for(plan.n_species * n_layers, n_threads, [&](Index item) {
    const Index species = item % plan.n_species;
    const NetworkLayer& layer = plan.of(species)[item / plan.n_species];
    if (plan.starts[species] == plan.starts[species + 1]) return;
    const T* const weights = parameters + layer.weights;
    const Panels panels(vectors_for<T>(layer.out));
    T* const out = packed + layer.packed;
    for (Index p = 0; p < panels.count; ++p)
      pack(
          layer.in, layer.out, panels, p,
          [&](Index k, Index j) { return weights[j * layer.in + k]; }, out);
    const Index padded = vectors_for<T>(layer.out) * kNativeWidth<T>;
    T* const bias = out + layer.in * padded;
    for (Index j = 0; j < padded; ++j)
      bias[j] = layer.biases >= 0 && j < layer.out ? parameters[layer.biases + j] : T(0);
  });
}

template <class T>
void pack_backward(const NetworkPlan& plan, const T* parameters, T* packed, int n_threads) {
  const Index n_layers = plan.n_layers;
  cpu::parallel_for(plan.n_species * n_layers, n_threads, [&](Index item) {
    const Index species = item % plan.n_species;
    const NetworkLayer& layer = plan.of(species)[item / plan.n_species];
    if (layer.transposed < 0 || plan.starts[species] == plan.starts[species + 1]) return;
    const T* const weights = parameters + layer.weights;
    const Panels panels(vectors_for<T>(layer.in));
    for (Index p = 0; p < panels.count; ++p)
      pack(
          layer.out, layer.in, panels, p,
          [&](Index k, Index j) { return weights[k * layer.in + j]; }, packed + layer.transposed);
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
    const NetworkTile& tile = tiles[item];
    const NetworkSegment& segment = *tile.segment;
    const NetworkLayer* const layers = plan.of(segment.species);
    const Index n = tile.count;
    const Index first = segment.first + tile.first;
    T* const own = scratch + cpu::thread_index() * kTileAtoms * plan.scratch_per_atom;
    const T* inputs[kTileAtoms];
    T* outputs[kTileAtoms];
    for (Index i = 0; i < n; ++i) inputs[i] = features + rows[first + i] * feature_stride;
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
      for (Index i = 0; i < n; ++i) outputs[i] = z + i * layer.stride;
      const Index padded = vectors_for<T>(layer.out) * kNativeWidth<T>;
      const T* const weights = packed + layer.packed;
      multiply(inputs, l == 0, n, layer.in, weights, weights + layer.in * padded, outputs,
               layer.out, layer.stride >= padded);
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
        multiply<T>(inputs, false, n, layers[l + 1].out, packed + layers[l + 1].transposed, nullptr,
                    outputs, layer.out, true);
      }
      multiply_slope(static_cast<int>(plan.activations[l]), z, h, delta, n, layer.out,
                     layer.stride);
      for (Index i = 0; i < n; ++i) inputs[i] = delta + i * layer.stride;
    }
    if (grad_features == nullptr) return;
    for (Index i = 0; i < n; ++i) outputs[i] = grad_features + rows[first + i] * feature_stride;
    multiply<T>(inputs, false, n, layers[0].out, packed + layers[0].transposed, nullptr, outputs,
                layers[0].in, false);
  });
}

// ---- weight gradients -----------------------------------------------------------------------

// gradient[r][0 .. NV W) (+)= sum_a delta[a][r] x[a][0 .. NV W) for r < n_rows <= R; of the last
// register only `last` numbers count. While it works it fetches next[a][fetch] into the cache.
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
  for (Index a = 0; a < n_atoms; ++a, delta += delta_stride) {
    const T* const row = x[a];
    __builtin_prefetch(next[a] + fetch);
    V right[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) right[v] = V::load(row + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const V left(delta[r]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[r][v] += left * right[v];
    }
  }
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
      outer_block<T, N, NV>(x, next, fetch < width ? fetch : 0, n_atoms, delta + r, delta_stride,
                            out, gradient_stride, rest < N ? rest : N, last, add);
      r += N;
    };
    if (rest > 4 || R <= 4)
      block(Constant<R>{});
    else if (rest > 1)
      block(Constant<4>{});
    else
      block(Constant<1>{});
    fetch += line;
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

// All atoms of a segment, all rows and one panel of columns of one layer's dL/dW; with the first
// panel goes dL/db.
template <class T>
void weight_gradient_panel(const NetworkPlan& plan, const NetworkSegment& segment, Index l,
                           Index panel, const Inputs<T>& inputs, const T* deltas,
                           T* grad_parameters) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  const NetworkLayer& layer = plan.of(segment.species)[l];
  const bool continued = segment.first > plan.starts[segment.species];
  const T* const delta =
      deltas + segment.offset * plan.scratch_per_atom + segment.count * layer.column;
  if (panel == 0 && layer.biases >= 0)
    bias_gradient(delta, layer.stride, segment.count, layer.out, continued,
                  grad_parameters + layer.biases);

  const Index vectors = vectors_for<T>(layer.in);
  const Panels panels(vectors);
  const Index begin = panels.begin(panel) * W;
  const Index width = panels.vectors(panel) * W;
  // Whole registers of the last panel would reach beyond the rows: those columns are copied.
  const bool ragged = begin + width > layer.in;
  const Index valid = ragged ? layer.in - begin : width;
  const Index last = valid - (width - W);
  alignas(64) T copies[kSumAtoms][kMaxVectors * W];
  const T* pointers[2][kSumAtoms];

  const auto prepare = [&](Index block, const T** rows) {
    const Index n = segment.count - block < kSumAtoms ? segment.count - block : kSumAtoms;
    for (Index a = 0; a < n; ++a) rows[a] = inputs.row(block + a) + begin;
    // Rows that do not exist are not fetched.
    for (Index a = n < 0 ? 0 : n; a < kSumAtoms; ++a) rows[a] = delta;
  };
  prepare(0, pointers[0]);
  int now = 0;
  for (Index block = 0; block < segment.count; block += kSumAtoms, now = 1 - now) {
    const Index n = segment.count - block < kSumAtoms ? segment.count - block : kSumAtoms;
    prepare(block + kSumAtoms, pointers[1 - now]);
    const T* copied[kSumAtoms];
    const T* const* rows = pointers[now];
    if (ragged) {
      for (Index a = 0; a < n; ++a) {
        for (Index v = 0; v + W <= valid; v += W) V::load(rows[a] + v).store(copies[a] + v);
        for (Index j = valid / W * W; j < valid; ++j) copies[a][j] = rows[a][j];
        for (Index j = valid; j < width; ++j) copies[a][j] = T(0);
        copied[a] = copies[a];
      }
      rows = copied;
    }
    with_vectors(panels.vectors(panel), [&](auto nv) {
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
  // Items: the panels of the first layer of every segment, then those of the second, ...
  Index n_items = 0;
  for (Index l = 0; l < plan.n_layers; ++l)
    for (Index s = 0; s < n_segments; ++s)
      n_items += Panels(vectors_for<T>(plan.of(segments[s].species)[l].in)).count;
  cpu::parallel_for(n_items, n_threads, [&](Index item) {
    for (Index l = 0; l < plan.n_layers; ++l) {
      for (Index s = 0; s < n_segments; ++s) {
        const NetworkSegment& segment = segments[s];
        const Index count = Panels(vectors_for<T>(plan.of(segment.species)[l].in)).count;
        if (item < count)
          return weight_gradient_panel(
              plan, segment, l, item,
              inputs_of(plan, segment, l, features, feature_stride, rows, saved), deltas,
              grad_parameters);
        item -= count;
      }
    }
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
