// Kernels of networks_cpu.h for one instruction set (dispatch.h).
//
// Everything is a matrix product whose left factor is read number by number (broadcast) and whose
// right factor and result are read and written as registers, in blocks of R rows by NV registers
// that stay in registers during the whole sum:
//   forward, tangent   z_l [atoms, out] = h_{l-1} [atoms, in] W_l^T
//   backward           dL/dh_{l-1} [atoms, in] = delta_l [atoms, out] W_l
//   weight gradients   dL/dW_l [out, in] = delta_l^T [out, atoms] h_{l-1} [atoms, in]
// with delta_l = dL/dz_l. The order of each sum does not depend on pieces or threads.
#include "../core/activation.h"
#include "../core/config.h"
#include "denormals.h"
#include "networks_cpu.h"
#include "networks_plan.h"
#include "parallel.h"
#include "products.h"
#include "simd_functions.h"

namespace kinml {
inline namespace KINML_ISA {

namespace {

using cpu::kPieceAtoms;
using cpu::kPieceUnit;
using cpu::kSumAtoms;
using cpu::NetworkLayer;
using cpu::NetworkPiece;
using cpu::NetworkPlan;
using cpu::NetworkSegment;
using cpu::NetworkTile;

static_assert(kMostRows % kPieceUnit == 0 && kSumAtoms % kPieceUnit == 0);

// For each layer a matrix [rows, stride of the layer], one behind the other; what is meant are its
// rows from `first` on.
template <class T>
struct Stack {
  T* base;
  Index rows, first;

  KINML_HD Rows<T> of(const NetworkLayer& layer) const {
    return {base + rows * layer.column + first * layer.stride, layer.stride, nullptr};
  }
  KINML_HD Stack from(Index i) const { return {base, rows, first + i}; }
  KINML_HD operator Stack<const T>() const { return {base, rows, first}; }
};

// c[i] = bias + a[i][0 .. depth) . b: the product with a matrix of one column, for padded rows.
template <class T>
void multiply_column(Rows<const T> a, Index n_rows, Index depth, const T* b, T bias, T* c) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  for (Index i = 0; i < n_rows; ++i) {
    const T* const row = a[i];
    V sum(T(0));
    for (Index k = 0; k < depth; k += W) sum += V::load(row + k) * V::load(b + k);
    c[i] = reduce_add(sum) + bias;
  }
}

// ---- packing --------------------------------------------------------------------------------

// As pack_transposed, for W [out, in] itself as the right factor.
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

// Both packed forms of every layer, as far as the plan has a place for them.
template <class T>
void pack(const NetworkPlan& plan, const T* parameters, T* packed, int n_threads) {
  const Index n_layers = plan.n_species * plan.n_layers;
  cpu::parallel_for(2 * n_layers, n_threads, [&](Index item) {
    const NetworkLayer& layer = plan.layers[item % n_layers];
    const Index species = item % n_layers / plan.n_layers;
    if (plan.starts != nullptr && plan.starts[species] == plan.starts[species + 1]) return;
    const T* const weights = parameters + layer.weights;
    if (item >= n_layers) {
      if (layer.transposed >= 0)
        pack_straight(weights, layer.in, layer.out, packed + layer.transposed);
      if (layer.last >= 0)
        for (Index k = 0; k < vectors_for<T>(layer.out) * kNativeWidth<T>; ++k)
          packed[layer.last + k] = k < layer.out ? weights[(k + 1) * layer.in - 1] : T(0);
      return;
    }
    if (layer.packed < 0) return;
    T* const to = packed + layer.packed;
    if (is_column(plan, item % plan.n_layers, layer))
      pack_straight(weights, layer.in, layer.out, to);
    else
      pack_transposed(weights, layer.in, layer.out, to);
    const Index padded = vectors_for<T>(layer.out) * kNativeWidth<T>;
    T* const bias = to + layer.in * padded;
    for (Index j = 0; j < padded; ++j)
      bias[j] = layer.biases >= 0 && j < layer.out ? parameters[layer.biases + j] : T(0);
  });
}

// ---- activations ----------------------------------------------------------------------------

// Calls function(j) for all registers of a layer's matrix [n_rows, stride]. Without padding (the
// last layer) the matrix is one row, with room behind it for a whole register.
template <class T, class Function>
KINML_HD void for_registers(const NetworkLayer& layer, Index n_rows, const Function& function) {
  constexpr int W = kNativeWidth<T>;
  const bool padded = layer.stride % W == 0;
  const Index columns = padded ? layer.out : n_rows * layer.stride;
  const Index stride = layer.stride, end = padded ? n_rows * stride : 1;
  for (Index i = 0; i < end; i += stride)
    for (Index j = i; j < i + columns; j += W) function(j);
}

// h = f(z)
template <class T>
void activate(Index code, const NetworkLayer& layer, Index n_rows, const T* z, T* h) {
  using V = Native<T>;
  with_activation(static_cast<int>(code), [&](auto f) {
    for_registers<T>(layer, n_rows, [&](Index j) { f.value(V::load(z + j)).store(h + j); });
  });
}

// delta *= f'(z)
template <class T>
void multiply_slope(Index code, const NetworkLayer& layer, Index n_rows, const T* z, const T* h,
                    T* delta) {
  using V = Native<T>;
  with_activation(static_cast<int>(code), [&](auto f) {
    for_registers<T>(layer, n_rows, [&](Index j) {
      (V::load(delta + j) * f.slope(V::load(z + j), V::load(h + j))).store(delta + j);
    });
  });
}

// The same, and what second derivatives need: z becomes f'(z), curve = delta f''(z).
template <class T>
void multiply_slope(Index code, const NetworkLayer& layer, Index n_rows, T* z, const T* h, T* delta,
                    T* curve) {
  using V = Native<T>;
  with_activation(static_cast<int>(code), [&](auto f) {
    for_registers<T>(layer, n_rows, [&](Index j) {
      const V x = V::load(z + j), y = V::load(h + j), d = V::load(delta + j);
      const V slope = f.slope(x, y);
      slope.store(z + j);
      (d * slope).store(delta + j);
      (d * f.curvature(x, y)).store(curve + j);
    });
  });
}

// ---- passes through the layers --------------------------------------------------------------

// For l = 1 .. L: z_l = W_l h_{l-1} (+ b_l), then activation(l, layer), which makes h_l of it.
template <class T, class Function>
void up(const NetworkPlan& plan, Index species, Index n, const T* packed, bool biases,
        Rows<const T> inputs, const T* const* after, Stack<T> z, Stack<T> h,
        const Function& activation) {
  for (Index l = 0; l < plan.n_layers; ++l) {
    const NetworkLayer& layer = plan.of(species)[l];
    const Rows<T> outputs = z.of(layer);
    const Index padded = vectors_for<T>(layer.out) * kNativeWidth<T>;
    const T* const weights = packed + layer.packed;
    const T* const bias = weights + layer.in * padded;
    if (is_column(plan, l, layer))
      multiply_column<T>(inputs, n, layer.in, weights, biases ? *bias : T(0), outputs.base);
    else
      multiply<T>(inputs, l == 0 ? after : nullptr, n, layer.in, weights, biases ? bias : nullptr,
                  outputs, layer.out, layer.stride >= padded);
    activation(l, layer);
    const Rows<T> next = h.of(layer);
    inputs = {next.base, next.stride, nullptr};
  }
}

// For l = L .. 1: delta_l = dS/dh_l, then activation(l, layer), which makes dS/dz_l of it,
// dS/dh_{l-1} = W_l^T delta_l; dS/dh_L = seeds (null: all are `seed`), dS/dh_0 goes to
// grad_features (base null: not wanted), its last number to grad_last (null: not wanted).
template <class T, class Function>
void down(const NetworkPlan& plan, Index species, Index n, const T* packed, const T* seeds, T seed,
          Stack<T> deltas, Rows<T> grad_features, T* grad_last, const Function& activation) {
  const NetworkLayer* const layers = plan.of(species);
  Rows<T> delta = {};
  for (Index l = plan.n_layers; l-- > 0;) {
    const Rows<const T> above = {delta.base, delta.stride, nullptr};
    delta = deltas.of(layers[l]);
    if (l == plan.n_layers - 1)
      for (Index i = 0; i < n; ++i) *delta[i] = seeds ? seeds[i] : seed;
    else
      multiply<T>(above, nullptr, n, layers[l + 1].out, packed + layers[l + 1].transposed, nullptr,
                  delta, layers[l].out, true);
    activation(l, layers[l]);
  }
  const Rows<const T> first = {delta.base, delta.stride, nullptr};
  if (grad_last != nullptr) {
    const T* const column = packed + layers[0].last;
    if (plan.n_layers > 1)
      multiply_column<T>(first, n, layers[0].out, column, T(0), grad_last);
    else  // rows without padding
      for (Index i = 0; i < n; ++i) grad_last[i] = *first[i] * *column;
  }
  if (grad_features.base == nullptr) return;
  multiply<T>(first, nullptr, n, layers[0].out, packed + layers[0].transposed, nullptr,
              grad_features, layers[0].in, false);
}

template <class T>
void forward(const NetworkPlan& plan, Index species, Index n, const T* packed, Rows<const T> inputs,
             const T* const* after, Stack<T> z, Stack<T> h, T* atomic) {
  up(plan, species, n, packed, true, inputs, after, z, h, [&](Index l, const NetworkLayer& layer) {
    activate<T>(plan.activations[l], layer, n, z.of(layer).base, h.of(layer).base);
  });
  const Rows<T> energies = h.of(plan.of(species)[plan.n_layers - 1]);
  for (Index i = 0; atomic != nullptr && i < n; ++i) atomic[i] = *energies[i];
}

// ---- pieces of a batch ----------------------------------------------------------------------

template <class T>
void forward_pieces(const NetworkPlan& plan, const NetworkPiece* pieces, Index n_pieces,
                    const T* packed, const T* features, Index feature_stride, const Index* rows,
                    T* saved, T* scratch, T* atomic, int n_threads) {
  cpu::parallel_for(n_pieces, n_threads, [&](Index item) {
    const FlushDenormals<T> flush;
    const NetworkPiece& piece = pieces[item];
    const NetworkSegment& segment = *piece.segment;
    const Index first = segment.first + piece.first;
    // The piece that this thread will probably get next: its first rows are fetched meanwhile.
    const NetworkPiece& likely = pieces[item + 1 < n_pieces ? item + 1 : item];
    const T* after[kMaxRows];
    for (Index i = 0; i < kMaxRows; ++i)
      after[i] =
          features +
          rows[likely.segment->first + likely.first + (i < likely.count ? i : 0)] * feature_stride;
    // Without `saved`, h overwrites z in a buffer of the thread.
    const Index per_atom = plan.scratch_per_atom;
    Stack<T> z = {scratch + cpu::thread_index() * kPieceAtoms * per_atom, kPieceAtoms, 0};
    Stack<T> h = z;
    if (saved != nullptr) {
      z = {saved + segment.first * 2 * per_atom, segment.count, piece.first};
      h = {z.base + segment.count * per_atom, segment.count, piece.first};
    }
    forward<T>(plan, segment.species, piece.count, packed, {features, feature_stride, rows + first},
               after, z, h, atomic + first);
  });
}

// Where the forward pass has left z (0) or h (1) of a segment's atoms.
template <class T>
KINML_HD Stack<const T> kept(const NetworkPlan& plan, const NetworkSegment& segment, const T* saved,
                             int which) {
  const Index first = plan.starts[segment.species];
  const Index count = plan.starts[segment.species + 1] - first;
  return {saved + (first * 2 + count * which) * plan.scratch_per_atom, count,
          segment.first - first};
}

template <class T>
void backward_pieces(const NetworkPlan& plan, const NetworkPiece* pieces, Index n_pieces,
                     const T* packed, const T* saved, const T* grad_atomic, T* deltas,
                     T* grad_features, Index feature_stride, const Index* rows, int n_threads) {
  cpu::parallel_for(n_pieces, n_threads, [&](Index item) {
    const FlushDenormals<T> flush;
    const NetworkPiece& piece = pieces[item];
    const NetworkSegment& segment = *piece.segment;
    const Index first = segment.first + piece.first;
    const Stack<const T> z = kept(plan, segment, saved, 0).from(piece.first);
    const Stack<const T> h = kept(plan, segment, saved, 1).from(piece.first);
    const Stack<T> delta = {deltas + segment.offset * plan.scratch_per_atom, segment.count,
                            piece.first};
    down<T>(plan, segment.species, piece.count, packed, grad_atomic + first, T(0), delta,
            {grad_features, feature_stride, rows + first}, nullptr,
            [&](Index l, const NetworkLayer& layer) {
              multiply_slope<T>(plan.activations[l], layer, piece.count, z.of(layer).base,
                                h.of(layer).base, delta.of(layer).base);
            });
  });
}

// ---- weight gradients -----------------------------------------------------------------------

// dL/dW_l of some atoms is the sum over one or two terms and over the atoms of left (x) right, with
// left = dL/dz_l and right = h_{l-1}; the second term of second derivatives has the tangent of
// h_{l-1} on its right side. right of the first layer are rows of the features.
template <class T>
struct Outer {
  int terms;
  Stack<const T> left[2], right[2];
  Rows<const T> first[2];

  KINML_HD Rows<const T> right_rows(const NetworkLayer* layers, Index l, int term) const {
    return l == 0 ? first[term] : right[term].of(layers[l - 1]);
  }
};

// Where the right factors of a block of atoms begin: x[term * kTerm + atom].
constexpr Index kTerm = kSumAtoms + 1;
constexpr Index kPointers = 2 * kTerm;

// gradient[r][0 .. NV W) (+)= sum_t sum_a left[t][a][r] x[t][a][column .. column + NV W) for
// r < n_rows <= R; of the last register only `last` numbers count. While it works it fetches
// next[t][a][ahead] for every other a, which is as fast as memory delivers, into the cache.
template <class T, int R, int NV>
void outer_block(const T* const* x, Index column, const T* const* next, Index ahead, int terms,
                 Index n_atoms, const T* const* left, Index left_stride, Index left_column,
                 T* gradient, Index gradient_stride, Index n_rows, Index last, bool add) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  V sums[R][NV];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sums[r][v] = V(T(0));
  for (int t = 0; t < terms; ++t, x += kTerm, next += kTerm) {
    const T* factors = left[t] + left_column;
    const auto step = [&](Index a) __attribute__((always_inline)) {
      const T* const row = x[a] + column;
      V right[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) right[v] = V::load(row + v * W);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const V factor(factors[r]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sums[r][v] += factor * right[v];
      }
      factors += left_stride;
    };
    Index a = 0;
    for (; a + 2 <= n_atoms; a += 2) {
      __builtin_prefetch(next[a] + ahead);
      step(a);
      step(a + 1);
    }
    if (a < n_atoms) step(a);
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

// One panel of dL/dW, for one block of atoms; fetches the columns next[][ahead ...] meanwhile.
template <class T, int NV>
void outer_panel(const T* const* x, Index column, const T* const* next, Index ahead, int terms,
                 Index n_atoms, const T* const* left, Index left_stride, T* gradient,
                 Index gradient_stride, Index n_rows, Index last, bool add) {
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
      const Index line_begin = ahead + (fetch / 2 * line < width ? fetch / 2 * line : 0);
      outer_block<T, N, NV>(x, column, next + fetch % 2, line_begin, terms, n_atoms, left,
                            left_stride, r, out, gradient_stride, rest < N ? rest : N, last, add);
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

// The columns [begin, begin + width) of one layer's dL/dW.
struct OuterPanel {
  Index begin, width, vectors;
  Index valid;  // columns that exist

  template <class T>
  static KINML_HD OuterPanel of(const NetworkLayer& layer, Index panel) {
    constexpr int W = kNativeWidth<T>;
    const Panels panels(vectors_for<T>(layer.in));
    const Index begin = panels.begin(panel) * W, width = panels.vectors(panel) * W;
    const Index rest = layer.in - begin;
    return {begin, width, panels.vectors(panel), rest < width ? rest : width};
  }
};

template <class T>
KINML_HD Index panels_of(const NetworkLayer& layer) {
  return Panels(vectors_for<T>(layer.in)).count;
}

// Pointers to the right factors of atoms [block, block + n) of a layer. More than there are atoms,
// because they may be fetched while a larger block is worked on.
template <class T>
void point(const Outer<T>& outer, const NetworkLayer* layers, Index l, Index block, Index n,
           const T** x) {
  for (int t = 0; t < outer.terms; ++t) {
    const Rows<const T> rows = outer.right_rows(layers, l, t);
    for (Index a = 0; a < n; ++a) x[t * kTerm + a] = rows[block + a];
    for (Index a = n; a < kTerm; ++a) x[t * kTerm + a] = x[t * kTerm];
  }
}

// Adds (add) or writes a block of atoms' part of one panel of dL/dW.
template <class T>
void outer_product(const Outer<T>& outer, const NetworkLayer* layers, Index l,
                   const OuterPanel& panel, Index block, Index n, const T* const* x,
                   const T* const* next, Index ahead, T* grad_parameters, bool add) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  const NetworkLayer& layer = layers[l];
  // Whole registers of the last panel would reach beyond the rows of the features: those columns
  // are copied. The other layers' rows are padded.
  alignas(64) T copies[2 * kSumAtoms][kMaxVectors * W];
  const T* copied[kPointers];
  Index column = panel.begin;
  if (l == 0 && panel.valid < panel.width) {
    for (int t = 0; t < outer.terms; ++t)
      for (Index a = 0; a < n; ++a) {
        T* const copy = copies[t * kSumAtoms + a];
        const T* const row = x[t * kTerm + a] + column;
        for (Index v = 0; v + W <= panel.valid; v += W) V::load(row + v).store(copy + v);
        for (Index j = panel.valid / W * W; j < panel.valid; ++j) copy[j] = row[j];
        for (Index j = panel.valid; j < panel.width; ++j) copy[j] = T(0);
        copied[t * kTerm + a] = copy;
      }
    x = copied;
    column = 0;
  }
  const T* left[2] = {};
  for (int t = 0; t < outer.terms; ++t) left[t] = outer.left[t].from(block).of(layer).base;
  with_vectors(panel.vectors, [&](auto nv) {
    outer_panel<T, nv.value>(x, column, next, ahead, outer.terms, n, left, layer.stride,
                             grad_parameters + layer.weights + panel.begin, layer.in, layer.out,
                             panel.valid - (panel.vectors - 1) * W, add);
  });
}

// dL/db: sum of dL/dz over n_atoms, block by block.
template <class T>
void bias_gradient(const NetworkLayer& layer, Rows<const T> left, Index n_atoms, bool add,
                   T* grad_parameters) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  if (layer.biases < 0) return;
  T* const gradient = grad_parameters + layer.biases;
  for (Index j = 0; j < layer.out; j += W) {
    for (Index block = 0; block < n_atoms; block += kSumAtoms) {
      const Index end = block + kSumAtoms < n_atoms ? block + kSumAtoms : n_atoms;
      V sum(T(0));
      for (Index a = block; a < end; ++a) sum += V::load(left[a] + j);
      if (add || block > 0) sum += load_some(gradient + j, layer.out - j);
      store_some(sum, gradient + j, layer.out - j);
    }
  }
}

// The atoms of a segment, and one panel of the columns of dL/dW of one layer.
struct WeightItem {
  const NetworkSegment* segment;  // null: there is none
  Index l, panel;
};

// Segment after segment, as in the passes before, so that a thread finds its rows in its cache.
template <class T>
Index count_weight_items(const NetworkPlan& plan, const NetworkSegment* segments,
                         Index n_segments) {
  Index count = 0;
  for (Index s = 0; s < n_segments; ++s)
    for (Index l = 0; l < plan.n_layers; ++l)
      count += panels_of<T>(plan.of(segments[s].species)[l]);
  return count;
}

template <class T>
WeightItem weight_item(const NetworkPlan& plan, const NetworkSegment* segments, Index n_segments,
                       Index item) {
  for (Index s = 0; s < n_segments; ++s)
    for (Index l = 0; l < plan.n_layers; ++l) {
      const Index count = panels_of<T>(plan.of(segments[s].species)[l]);
      if (item < count) return {&segments[s], l, item};
      item -= count;
    }
  return {};
}

// Works on one item; `after` is the item that the thread will probably get next. With the first
// panel goes dL/db.
template <class T, class Find>
void weight_gradient(const NetworkPlan& plan, const WeightItem& item, const WeightItem& after,
                     const Find& outer_of, T* grad_parameters) {
  const NetworkSegment& segment = *item.segment;
  const NetworkLayer* const layers = plan.of(segment.species);
  const bool continued = segment.first > plan.starts[segment.species];
  const Outer<T> outer = outer_of(segment);
  if (item.panel == 0)
    bias_gradient(layers[item.l], outer.left[0].of(layers[item.l]), segment.count, continued,
                  grad_parameters);
  const OuterPanel panel = OuterPanel::of<T>(layers[item.l], item.panel);
  const auto atoms = [](const NetworkSegment& s, Index block) {
    return s.count - block < kSumAtoms ? s.count - block : kSumAtoms;
  };
  const T* pointers[2][kPointers];
  point(outer, layers, item.l, 0, atoms(segment, 0), pointers[0]);
  int now = 0;
  for (Index block = 0; block < segment.count; block += kSumAtoms, now = 1 - now) {
    const T** const next = pointers[1 - now];
    Index ahead = panel.begin;
    if (const Index then = block + kSumAtoms; then < segment.count) {
      point(outer, layers, item.l, then, atoms(segment, then), next);
    } else if (after.segment != nullptr) {
      const NetworkLayer* const others = plan.of(after.segment->species);
      point(outer_of(*after.segment), others, after.l, 0, atoms(*after.segment, 0), next);
      ahead = OuterPanel::of<T>(others[after.l], after.panel).begin;
    } else {
      point(outer, layers, item.l, block, atoms(segment, block), next);
    }
    outer_product(outer, layers, item.l, panel, block, atoms(segment, block), pointers[now], next,
                  ahead, grad_parameters, continued || block > 0);
  }
}

template <class T>
void weight_gradients(const NetworkPlan& plan, const NetworkSegment* segments, Index n_segments,
                      const T* features, Index feature_stride, const Index* rows, const T* saved,
                      const T* deltas, T* grad_parameters, int n_threads) {
  const auto outer_of = [&](const NetworkSegment& segment) {
    Outer<T> outer = {};
    outer.terms = 1;
    outer.left[0] = {deltas + segment.offset * plan.scratch_per_atom, segment.count, 0};
    outer.right[0] = kept(plan, segment, saved, 1);
    outer.first[0] = {features, feature_stride, rows + segment.first};
    return outer;
  };
  cpu::parallel_for(count_weight_items<T>(plan, segments, n_segments), n_threads, [&](Index item) {
    const FlushDenormals<T> flush;
    weight_gradient<T>(plan, weight_item<T>(plan, segments, n_segments, item),
                       weight_item<T>(plan, segments, n_segments, item + 1), outer_of,
                       grad_parameters);
  });
}

// ---- tiles ----------------------------------------------------------------------------------

// One species of a tile. Its memory holds kTileValues stacks of matrices.
template <class T>
struct TileSpecies {
  Index species, first, n;
  T* memory;
  Index per_atom;

  KINML_HD Stack<T> stack(int which) const { return {memory + which * n * per_atom, n, 0}; }
  KINML_HD Stack<T> z() const { return stack(0); }  // f'(z) after the backward pass
  KINML_HD Stack<T> h() const { return stack(1); }
  KINML_HD Stack<T> delta() const { return stack(2); }
  KINML_HD Stack<T> curve() const { return stack(3); }  // delta^h f''(z), later times dz
  KINML_HD Stack<T> dh() const { return stack(4); }
  KINML_HD Stack<T> mu() const { return stack(5); }
};
static_assert(cpu::kTileValues == 6);

// Calls function(part) for each species that has atoms in the tile.
template <class T, class Function>
KINML_HD void for_species(const NetworkPlan& plan, const NetworkTile<T>& tile,
                          const Function& function) {
  const FlushDenormals<T> flush;
  for (Index s = 0; s < plan.n_species; ++s) {
    const Index first = tile.starts[s], n = tile.starts[s + 1] - first;
    if (n > 0)
      function(TileSpecies<T>{s, first, n,
                              tile.memory + first * cpu::kTileValues * plan.scratch_per_atom,
                              plan.scratch_per_atom});
  }
}

// Calls function(first, count) for atoms [0, n) in pieces of about equal size, which begin where
// registers of the last layer do.
template <class Function>
KINML_HD void for_pieces(Index n, Index most, const Function& function) {
  const Index pieces = (n + most - 1) / most;
  const Index size = ((n + pieces - 1) / pieces + kPieceUnit - 1) / kPieceUnit * kPieceUnit;
  for (Index first = 0; first < n; first += size)
    function(first, n - first < size ? n - first : size);
}

template <class T>
void tile_forward(const NetworkPlan& plan, const T* packed, const NetworkTile<T>& tile, T* atomic) {
  for_species(plan, tile, [&](const TileSpecies<T>& part) {
    for_pieces(part.n, kMostRows, [&](Index first, Index n) {
      const Rows<const T> rows = {tile.features, tile.feature_stride,
                                  tile.rows + part.first + first};
      forward<T>(plan, part.species, n, packed, rows, nullptr, part.z().from(first),
                 part.h().from(first), atomic ? atomic + part.first + first : nullptr);
    });
  });
}

template <class T>
void tile_backward(const NetworkPlan& plan, const T* packed, const NetworkTile<T>& tile,
                   const T* seeds, T* grad_features, Index stride, T* grad_last) {
  for_species(plan, tile, [&](const TileSpecies<T>& part) {
    for_pieces(part.n, kMostRows, [&](Index first, Index n) {
      const Stack<T> z = part.z().from(first), h = part.h().from(first),
                     delta = part.delta().from(first), curve = part.curve().from(first);
      const Index atom = part.first + first;
      down<T>(plan, part.species, n, packed, seeds ? seeds + atom : nullptr, T(1), delta,
              {grad_features, stride, tile.rows + atom}, grad_last ? grad_last + atom : nullptr,
              [&](Index l, const NetworkLayer& layer) {
                const Index code = plan.activations[l];
                T *const layer_z = z.of(layer).base, *const layer_h = h.of(layer).base,
                         *const layer_delta = delta.of(layer).base;
                if (tile.second)
                  multiply_slope<T>(code, layer, n, layer_z, layer_h, layer_delta,
                                    curve.of(layer).base);
                else
                  multiply_slope<T>(code, layer, n, layer_z, layer_h, layer_delta);
              });
    });
  });
}

// dh = f'(z) dz with dz_l = W_l dh_{l-1}
template <class T>
void tile_tangent(const NetworkPlan& plan, const T* packed, const NetworkTile<T>& tile,
                  T* derivatives) {
  using V = Native<T>;
  for_species(plan, tile, [&](const TileSpecies<T>& part) {
    for_pieces(part.n, kMostRows, [&](Index first, Index n) {
      const Stack<T> slope = part.z().from(first), curve = part.curve().from(first),
                     dh = part.dh().from(first);
      const Index atom = part.first + first;
      const Rows<const T> rows = {tile.tangents, tile.tangent_stride, tile.rows + atom};
      up<T>(plan, part.species, n, packed, false, rows, nullptr, dh, dh,
            [&](Index, const NetworkLayer& layer) {
              const T* const s = slope.of(layer).base;
              T* const c = curve.of(layer).base;
              T* const d = dh.of(layer).base;
              for_registers<T>(layer, n, [&](Index j) {
                const V dz = V::load(d + j);
                (V::load(c + j) * dz).store(c + j);
                (V::load(s + j) * dz).store(d + j);
              });
            });
      if (derivatives == nullptr) return;
      const Rows<T> last = dh.of(plan.of(part.species)[plan.n_layers - 1]);
      for (Index i = 0; i < n; ++i) derivatives[atom + i] = *last[i];
    });
  });
}

// mu = mu^h f'(z) + delta^h f''(z) dz
template <class T>
void tile_second_backward(const NetworkPlan& plan, const T* packed, const NetworkTile<T>& tile,
                          const T* seeds, T* grad_features, Index stride, T* grad_last) {
  using V = Native<T>;
  for_species(plan, tile, [&](const TileSpecies<T>& part) {
    for_pieces(part.n, kMostRows, [&](Index first, Index n) {
      const Stack<T> slope = part.z().from(first), curve = part.curve().from(first),
                     mu = part.mu().from(first);
      const Index atom = part.first + first;
      down<T>(plan, part.species, n, packed, seeds ? seeds + atom : nullptr, T(0), mu,
              {grad_features, stride, tile.rows + atom}, grad_last ? grad_last + atom : nullptr,
              [&](Index, const NetworkLayer& layer) {
                const T* const s = slope.of(layer).base;
                const T* const c = curve.of(layer).base;
                T* const m = mu.of(layer).base;
                for_registers<T>(layer, n, [&](Index j) {
                  (V::load(m + j) * V::load(s + j) + V::load(c + j)).store(m + j);
                });
              });
    });
  });
}

template <class T>
void tile_weight_gradients(const NetworkPlan& plan, const NetworkTile<T>& tile, T* grad_parameters,
                           bool add) {
  for_species(plan, tile, [&](const TileSpecies<T>& part) {
    const NetworkLayer* const layers = plan.of(part.species);
    const Index* const rows = tile.rows + part.first;
    Outer<T> outer = {};
    outer.terms = tile.tangents == nullptr ? 1 : 2;
    outer.left[0] = tile.tangents == nullptr ? part.delta() : part.mu();
    outer.right[0] = part.h();
    outer.first[0] = {tile.features, tile.feature_stride, rows};
    outer.left[1] = part.delta();
    outer.right[1] = part.dh();
    outer.first[1] = {tile.tangents, tile.tangent_stride, rows};
    for (Index l = 0; l < plan.n_layers; ++l) {
      const Index panels = panels_of<T>(layers[l]);
      bias_gradient(layers[l], outer.left[0].of(layers[l]), part.n, add, grad_parameters);
      for_pieces(part.n, kSumAtoms, [&](Index first, Index n) {
        const T* x[kPointers];
        point(outer, layers, l, first, n, x);
        for (Index p = 0; p < panels; ++p) {
          const OuterPanel panel = OuterPanel::of<T>(layers[l], p);
          const Index ahead = panel.begin + (p + 1 < panels ? panel.width : 0);
          outer_product(outer, layers, l, panel, first, n, x, x, ahead, grad_parameters,
                        add || first > 0);
        }
      });
    }
  });
}

}  // namespace

#define KINML_DEFINE_NETWORKS(T)                                                                   \
  void networks_pack(const NetworkPlan& plan, const T* parameters, T* packed, int n_threads) {     \
    pack(plan, parameters, packed, n_threads);                                                     \
  }                                                                                                \
  void networks_forward_pieces(const NetworkPlan& plan, const NetworkPiece* pieces,                \
                               Index n_pieces, const T* packed, const T* features,                 \
                               Index feature_stride, const Index* rows, T* saved, T* scratch,      \
                               T* atomic, int n_threads) {                                         \
    forward_pieces(plan, pieces, n_pieces, packed, features, feature_stride, rows, saved, scratch, \
                   atomic, n_threads);                                                             \
  }                                                                                                \
  void networks_backward_pieces(const NetworkPlan& plan, const NetworkPiece* pieces,               \
                                Index n_pieces, const T* packed, const T* saved,                   \
                                const T* grad_atomic, T* deltas, T* grad_features,                 \
                                Index feature_stride, const Index* rows, int n_threads) {          \
    backward_pieces(plan, pieces, n_pieces, packed, saved, grad_atomic, deltas, grad_features,     \
                    feature_stride, rows, n_threads);                                              \
  }                                                                                                \
  void networks_weight_gradients(const NetworkPlan& plan, const NetworkSegment* segments,          \
                                 Index n_segments, const T* features, Index feature_stride,        \
                                 const Index* rows, const T* saved, const T* deltas,               \
                                 T* grad_parameters, int n_threads) {                              \
    weight_gradients(plan, segments, n_segments, features, feature_stride, rows, saved, deltas,    \
                     grad_parameters, n_threads);                                                  \
  }                                                                                                \
  void networks_tile_forward(const NetworkPlan& plan, const T* packed, const NetworkTile<T>& tile, \
                             T* atomic) {                                                          \
    tile_forward(plan, packed, tile, atomic);                                                      \
  }                                                                                                \
  void networks_tile_backward(const NetworkPlan& plan, const T* packed,                            \
                              const NetworkTile<T>& tile, const T* seeds, T* grad_features,        \
                              Index stride, T* grad_last) {                                        \
    tile_backward(plan, packed, tile, seeds, grad_features, stride, grad_last);                    \
  }                                                                                                \
  void networks_tile_tangent(const NetworkPlan& plan, const T* packed, const NetworkTile<T>& tile, \
                             T* derivatives) {                                                     \
    tile_tangent(plan, packed, tile, derivatives);                                                 \
  }                                                                                                \
  void networks_tile_second_backward(const NetworkPlan& plan, const T* packed,                     \
                                     const NetworkTile<T>& tile, const T* seeds, T* grad_features, \
                                     Index stride, T* grad_last) {                                 \
    tile_second_backward(plan, packed, tile, seeds, grad_features, stride, grad_last);             \
  }                                                                                                \
  void networks_tile_weight_gradients(const NetworkPlan& plan, const NetworkTile<T>& tile,         \
                                      T* grad_parameters, bool add) {                              \
    tile_weight_gradients(plan, tile, grad_parameters, add);                                       \
  }
KINML_DEFINE_NETWORKS(double)
KINML_DEFINE_NETWORKS(float)
#undef KINML_DEFINE_NETWORKS

}  // namespace KINML_ISA
}  // namespace kinml
