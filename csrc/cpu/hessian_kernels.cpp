// Second derivatives of the energy of one centre by the displacements of its neighbours.
//
// Of a triple j, k with the cosine w of its angle, c = beta w, mean distance R and cutoff functions f,
// the descriptor's numbers that a gradient g is multiplied with give
//   Phi = F f_j f_k S(c, R),   S = sum_lm g_lm P_m(c) E_l(R),
// so that six sums over l and m (S and its derivatives by c and R up to the second) are all that its
// second derivatives need; with a_j = dw/dd_j = (u_k - w u_j) / r_j:
//   d2/dd_j dd_j = Phi_cc a_j a_j + (Phi_cj - Phi_c / r_j) (a_j u_j + u_j a_j)
//                  + (Phi_jj - D_j) u_j u_j + D_j 1,          D_j = (Phi_j - Phi_c w / r_j) / r_j
//   d2/dd_j dd_k = Phi_cc a_j a_k + Phi_ck a_j u_k + Phi_cj u_j a_k + Phi_jk u_j u_k
//                  + Phi_c / (r_j r_k) (1 - u_j u_j - u_k u_k + w u_j u_k)
// (products of vectors are outer products; subscripts are derivatives by w, r_j and r_k).
//
// Through the networks go columns: the tangents T_1 = W_1 J of the first layer, up as
// T_{l+1} = W_{l+1} (f' T_l), down as the derivatives mu_l of delta_l = df/dz_l along them,
//   mu_l = f' (W_{l+1}^T mu_{l+1}) + (W_{l+1}^T delta_{l+1}) f'' T_l,
// and J^T f'' J = T_1^T mu_1. In a chain of levels the energy of the level below is one more input.
#include "hessian_kernels.h"

#include "../core/activation.h"
#include "aev_view.h"
#include "denormals.h"
#include "products.h"

namespace kinml {
inline namespace KINML_ISA {

namespace {

using cpu::hessian_block;
using cpu::hessian_columns;
using cpu::hessian_depth;
using cpu::hessian_radial;
using cpu::HessianNetwork;

// ---- packing --------------------------------------------------------------------------------

template <class T>
void pack(const AevTables<T>& t, const HessianNetwork<T>& network, T* scratch) {
  const AevLayout layout = t.layout();
  const Index in = network.size(0), out = network.size(1);
  const Index radial = hessian_radial(t), block = hessian_block(t), depth = hessian_depth(t);
  const Index of_block = layout.angular_block_length();
  T* to = network.packed;
  for (int a = 0; a < t.n_species; ++a)
    for (const Index numbers : {depth, radial}) {
      for (Index i = 0; i < out; ++i) {
        const T* const row = network.parameters + i * in;
        T* const compact = scratch + i * numbers;
        for (Index d = 0; d < numbers; ++d) compact[d] = T(0);
        for (Index l = 0; l < t.n_radial; ++l) compact[l] = row[layout.radial_begin(a) + l];
        for (int b = 0; numbers == depth && b < t.n_species; ++b) {
          const T* const from = row + layout.angular_begin(a < b ? a : b, a < b ? b : a);
          for (Index x = 0; x < of_block; ++x) compact[radial + b * block + x] = from[x];
        }
      }
      pack_transposed(scratch, numbers, out, to);
      to += numbers * padded(out);
    }
  const T* parameters = network.parameters;
  for (Index l = 1; l <= network.n_layers; ++l) {
    const Index n_in = network.size(l - 1), n_out = network.size(l);
    if (l > 1) {
      for (Index k = 0; k < n_in; ++k)
        for (Index i = 0; i < n_out; ++i) to[k * n_out + i] = parameters[i * n_in + k];
      to += padded(n_in * n_out);
    }
    parameters += n_out * (n_in + (network.biases ? 1 : 0));
  }
}

// ---- small products -----------------------------------------------------------------------------

template <class T>
T dot(const T* a, const T* b, Index n) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  V sum(T(0));
  Index i = 0;
  for (; i + W <= n; i += W) sum += V::load(a + i) * V::load(b + i);
  T rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return reduce_add(sum) + rest;
}
// y += s x
template <class T>
void add_scaled(T s, const T* x, Index n, T* y) {
  using V = Native<T>;
  constexpr int W = kNativeWidth<T>;
  Index i = 0;
  for (; i + W <= n; i += W) (V::load(y + i) + V(s) * V::load(x + i)).store(y + i);
  for (; i < n; ++i) y[i] += s * x[i];
}
template <class T>
void clear(T* p, Index n) {
  for (Index i = 0; i < n; ++i) p[i] = T(0);
}

// c [n_rows, width] = a [n_rows, depth] b [depth, width], of at most kMaxVectors registers.
template <class T>
void multiply_all(const T* a, Index a_stride, Index n_rows, Index depth, const T* b, Index width,
                  T* c, Index c_stride) {
  for (Index i = 0; i < n_rows; i += kMostRows)
    multiply<T>({a + i * a_stride, a_stride, nullptr}, nullptr,
                n_rows - i < kMostRows ? n_rows - i : kMostRows, depth, b, nullptr,
                {c + i * c_stride, c_stride, nullptr}, width, true);
}

// ---- a network at one descriptor ------------------------------------------------------------

// z, f' and (df/dh) f'' of each layer, and delta of the first.
template <class T>
struct Layer {
  T *z, *h, *delta, *slope, *curve;
};

constexpr Index kMostLayers = 16;

template <class T>
struct Atom {
  const HessianNetwork<T>* network;
  Layer<T> layers[kMostLayers];
  const T* weights[kMostLayers];     // W_l
  const T* transposed[kMostLayers];  // W_l^T, l > 0
  T below_slope;                     // df / d(energy of the level below)
  T output;

  Atom() = default;
  Atom(const AevTables<T>& t, const HessianNetwork<T>& of, Arena<T>& arena) : network(&of) {
    const T* parameters = of.parameters;
    const T* packed =
        of.packed + t.n_species * (hessian_depth(t) + hessian_radial(t)) * padded(of.size(1));
    for (Index l = 0; l < of.n_layers; ++l) {
      const Index in = of.size(l), out = of.size(l + 1);
      for (T** p :
           {&layers[l].z, &layers[l].h, &layers[l].delta, &layers[l].slope, &layers[l].curve})
        *p = arena.numbers(out);
      weights[l] = parameters;
      parameters += out * (in + (of.biases ? 1 : 0));
      transposed[l] = packed;
      if (l > 0) packed += padded(in * out);
    }
  }

  // inputs: the descriptor and, of a level above the first, the energy below
  void evaluate(const T* inputs) {
    using V = Native<T>;
    constexpr int W = kNativeWidth<T>;
    const HessianNetwork<T>& of = *network;
    for (Index l = 0; l < of.n_layers; ++l) {
      const Index in = of.size(l), out = of.size(l + 1);
      const Layer<T>& layer = layers[l];
      const T* const from = l == 0 ? inputs : layers[l - 1].h;
      const T* const biases = of.biases ? weights[l] + in * out : nullptr;
      clear(layer.z, padded(out));
      for (Index i = 0; i < out; ++i)
        layer.z[i] = dot(weights[l] + i * in, from, in) + (biases != nullptr ? biases[i] : T(0));
      with_activation(static_cast<int>(of.activations[l]), [&](auto f) {
        for (Index j = 0; j < padded(out); j += W) {
          const V z = V::load(layer.z + j), h = f.value(z);
          h.store(layer.h + j);
          f.slope(z, h).store(layer.slope + j);
          f.curvature(z, h).store(layer.curve + j);
        }
      });
    }
    output = layers[of.n_layers - 1].h[0];
    for (Index l = of.n_layers; l-- > 0;) {
      const Index out = of.size(l + 1);
      T* const delta = layers[l].delta;
      if (l + 1 == of.n_layers) {
        delta[0] = T(1);
      } else {
        clear(delta, padded(out));
        for (Index i = 0; i < of.size(l + 2); ++i)
          add_scaled(layers[l + 1].delta[i], weights[l + 1] + i * out, out, delta);
      }
      for (Index i = 0; i < out; ++i) {
        layers[l].curve[i] *= delta[i];
        delta[i] *= layers[l].slope[i];
      }
    }
    const Index in = of.size(0);
    below_slope = T(0);
    for (Index i = 0; i < of.size(1); ++i)
      below_slope += layers[0].delta[i] * weights[0][i * in + in - 1];
  }
  // g += s df/da
  void add_gradient(T s, Index length, T* g) const {
    const Index in = network->size(0);
    for (Index i = 0; i < network->size(1); ++i)
      add_scaled(s * layers[0].delta[i], weights[0] + i * in, length, g);
  }
};

// ---- one centre -----------------------------------------------------------------------------

template <bool kEight, class T, class V>
KINML_HD V power_two_below(const AevTables<T>& t, V x, V one) {
  if constexpr (kEight) {
    const V square = x * x;
    return square * square * square;
  } else {
    if (t.integer_zeta > 1) return integer_power(x, one, t.integer_zeta - 2);
    if (t.integer_zeta == 1) return one;  // times zeta (zeta - 1) = 0
    return exp(V(t.zeta - T(2)) * log(max(x, V(sizeof(T) == 8 ? T(1e-60) : T(1e-12)))));
  }
}

template <class T>
class Centre {
  static constexpr int W = kNativeWidth<T>;
  using V = Native<T>;

 public:
  Centre(const AevTables<T>& tables, const Environment<T>& e, const HessianNetwork<T>* networks,
         Index n_levels, Arena<T>& arena)
      : t_(tables),
        e_(e),
        v_(tables, e),
        m_(e.n_pairs),
        room_(padded(e.n_pairs + W, W)),
        columns_(hessian_columns(e.n_pairs)),
        radial_(hessian_radial(tables)),
        block_(hessian_block(tables)),
        depth_(hessian_depth(tables)),
        length_(tables.layout().length()),
        lanes_(padded(e.triple_lanes + W)),
        n_levels_(n_levels) {
    jacobian_ = arena.numbers(columns_ * depth_);
    inputs_ = arena.numbers(length_ + 1);
    gradient_ = arena.numbers(length_ + 1);
    for (T*& p : factors_) p = arena.numbers(block_ * padded(e.most_near + 1));
    vectors_ = arena.numbers(6 * (e.most_near + 1));
    powers_ = arena.numbers(lanes_ * t_.n_sections);
    slopes_ = arena.numbers(lanes_ * t_.n_sections);
    for (T*& p : sums_) p = arena.numbers(lanes_);
    plane_ = padded(m_ * room_ + W);
    pairs_ = arena.numbers(9 * plane_);
    diagonal_ = arena.numbers(6 * room_);
    first_ = arena.numbers(room_);
    second_ = arena.numbers(room_);
    seeds_ = arena.numbers(n_levels);
    chunk_ = kMaxVectors * W;
    for (T** p : {&below_, &seed_tangents_}) *p = arena.numbers(chunk_);
    stacked_ = 0;
    Index most = 1;
    for (Index k = 0; k < n_levels; ++k) {
      offsets_[k] = stacked_;
      stacked_ += padded(networks[k].size(1), W);
      most = networks[k].widest() > most ? networks[k].widest() : most;
    }
    products_ = arena.numbers(columns_ * stacked_);
    mu_ = arena.numbers(stacked_ * chunk_);
    for (T** p : {&moving_, &above_}) *p = arena.numbers(padded(most) * chunk_);
    for (Index k = 0; k < n_levels; ++k)
      for (Index l = 0; l < networks[k].n_layers; ++l)
        tangents_[k][l] = arena.numbers(padded(networks[k].size(l + 1)) * chunk_);
    atoms_memory_ = arena;
  }

  T* inputs() const { return inputs_; }

  template <bool kEight>
  void run(const HessianNetwork<T>* networks, Index n_members, Index first_level,
           const RepulsionPair<T>* repels, T* out) {
    section_factors<kEight>();
    fill_jacobian();
    for (Index member = 0; member < n_members; ++member, networks += n_levels_) {
      Arena<T> arena = atoms_memory_;
      T below = 0;
      for (Index k = 0; k < n_levels_; ++k) {
        atoms_[k] = Atom<T>(t_, networks[k], arena);
        inputs_[length_] = below;
        atoms_[k].evaluate(inputs_);
        below += atoms_[k].output;
        first_products(k);
      }
      for (Index r = first_level; r < n_levels_; ++r) {
        network_part(r, out);
        clear(gradient_, length_);
        for (Index k = 0; k <= r; ++k) atoms_[k].add_gradient(seeds_[k], length_, gradient_);
        descriptor_part<kEight>(repels, out);
        out += 3 * m_ * columns_;
      }
    }
  }

 private:
  Index near_end(Index a) const { return v_.begin(0, a) + v_.near_count(0, a); }

  // P_m of each triple and its derivative by c, [triples, n_sections]
  template <bool kEight>
  void section_factors() {
    const Index ns = t_.n_sections;
    const V half(T(0.5)), one(T(1)), factor(T(0.5) * t_.zeta);
    for (Index g = 0; g < e_.triple_lanes / W; ++g) {
      const Triples<T, const T*> triple = v_.plain_triple(g);
      const V cosine = V::load(triple.half_cosine()), sine = V::load(triple.half_sine()),
              ratio = V::load(triple.ratio());
      for (Index m = 0; m < ns; ++m) {
        const V cos_m(t_.section_cos[m]), sin_m(t_.section_sin[m]);
        const V x = half + cos_m * cosine + sin_m * sine;
        const V below =
            power_below<kEight>(t_, x, one, [](V a, T least) { return max(a, V(least)); });
        const V value = below * x, slope = factor * below * (cos_m - sin_m * ratio);
        for (int lane = 0; lane < W; ++lane) {
          powers_[(g * W + lane) * ns + m] = value[lane];
          slopes_[(g * W + lane) * ns + m] = slope[lane];
        }
      }
    }
  }

  // Rows [3 m, depth]: derivatives of the descriptor's numbers by the displacement of a neighbour.
  void fill_jacobian() {
    const V minus_two_eta(T(-2) * t_.radial_eta), factor(t_.radial_factor);
    for (Index k = 0; k < m_; ++k) {
      T* const row = jacobian_ + 3 * k * depth_;
      clear(row, 3 * depth_);
      const V fc(v_.fc.value[k]), slope(v_.slope.value[k]), r(v_.r.value[k]);
      const V ux(v_.ux.value[k]), uy(v_.uy.value[k]), uz(v_.uz.value[k]);
      for (Index l = 0; l < v_.radial_row; l += W) {
        const V x = (r - V::load(t_.radial_shifts + l)) * minus_two_eta;
        const V along =
            factor * V::load(v_.radial.value + k * v_.radial_row + l) * (slope + x * fc);
        (ux * along).store(row + l);
        (uy * along).store(row + depth_ + l);
        (uz * along).store(row + 2 * depth_ + l);
      }
    }
    for (Index k = 3 * m_ * depth_; k < columns_ * depth_; ++k) jacobian_[k] = T(0);
    Index registers = 0;
    v_.for_pairs(0, registers, [&](Index a, Index b, Index, Index g) {
      v_.for_runs(0, a, b, [&](Index j, Index k, Index count, Index place) {
        for (Index q = 0; q < count; ++q) run_factors(j, k + q, g * W + place + q, q);
        add_run(j, k, count, radial_ + b * block_, radial_ + a * block_);
      });
    });
  }

  // Of a triple, what is multiplied with dw/dd, dr_j/dd and dr_k/dd.
  void run_factors(Index j, Index k, Index triple, Index q) {
    const Triples<T, const T*> of = v_.plain_triple(triple / W).lane(triple % W);
    const Index ns = t_.n_sections;
    const T weight = *of.weight(), mean = *of.mean(), factor = t_.angular_factor;
    const T by_j = factor * v_.near_slope.value[j] * v_.near_fc.value[k];
    const T by_k = factor * v_.near_fc.value[j] * v_.near_slope.value[k];
    const T *power = powers_ + triple * ns, *slope = slopes_ + triple * ns;
    T *c = factors_[0] + q * block_, *x = factors_[1] + q * block_, *y = factors_[2] + q * block_;
    for (Index l = 0; l < t_.n_angular; ++l) {
      const T gaussian = *of.gaussian(l),
              away = t_.angular_eta * weight * (mean - t_.angular_shifts[l]);
      const T of_c = weight * t_.beta * gaussian, of_j = gaussian * (by_j - away),
              of_k = gaussian * (by_k - away);
      for (Index m = 0; m < ns; ++m) {
        c[l * ns + m] = of_c * slope[m];
        x[l * ns + m] = of_j * power[m];
        y[l * ns + m] = of_k * power[m];
      }
    }
    for (Index i = t_.n_angular * ns; i < block_; ++i) c[i] = x[i] = y[i] = T(0);
    const T uj[] = {v_.ux.value[j], v_.uy.value[j], v_.uz.value[j]};
    const T uk[] = {v_.ux.value[k], v_.uy.value[k], v_.uz.value[k]};
    const T w = uj[0] * uk[0] + uj[1] * uk[1] + uj[2] * uk[2];
    for (int d = 0; d < 3; ++d) {
      vectors_[6 * q + d] = (uk[d] - w * uj[d]) * v_.inverse_r.value[j];
      vectors_[6 * q + 3 + d] = (uj[d] - w * uk[d]) * v_.inverse_r.value[k];
    }
  }
  void add_run(Index j, Index k, Index count, Index of_j, Index of_k) {
    const V jx(v_.ux.value[j]), jy(v_.uy.value[j]), jz(v_.uz.value[j]);
    for (Index i = 0; i < block_; i += W) {
      T* const to = jacobian_ + 3 * j * depth_ + of_j + i;
      V x = V::load(to), y = V::load(to + depth_), z = V::load(to + 2 * depth_);
      for (Index q = 0; q < count; ++q) {
        const V c = V::load(factors_[0] + q * block_ + i),
                by_j = V::load(factors_[1] + q * block_ + i),
                by_k = V::load(factors_[2] + q * block_ + i);
        const T* const a = vectors_ + 6 * q;
        x += c * V(a[0]) + by_j * jx;
        y += c * V(a[1]) + by_j * jy;
        z += c * V(a[2]) + by_j * jz;
        T* const other = jacobian_ + 3 * (k + q) * depth_ + of_k + i;
        const auto add = [&](T* p, T along, T unit) __attribute__((always_inline)) {
          (V::load(p) + c * V(along) + by_k * V(unit)).store(p);
        };
        add(other, a[3], v_.ux.value[k + q]);
        add(other + depth_, a[4], v_.uy.value[k + q]);
        add(other + 2 * depth_, a[5], v_.uz.value[k + q]);
      }
      x.store(to);
      y.store(to + depth_);
      z.store(to + 2 * depth_);
    }
  }

  // products_ [3 m, stacked]: J W_1^T of a level, of its part of the columns.
  void first_products(Index k) {
    const HessianNetwork<T>& network = *atoms_[k].network;
    const Index out = network.size(1), wide = padded(out);
    const T* packed = network.packed;
    for (Index a = 0; a < t_.n_species; ++a) {
      const Index begin = v_.begin(0, a), near = near_end(a), end = v_.end(0, a);
      product_rows(begin, near, depth_, packed, out, k);
      packed += depth_ * wide;
      product_rows(near, end, radial_, packed, out, k);
      packed += radial_ * wide;
    }
    for (Index i = 3 * m_; i < columns_; ++i)
      clear(products_ + i * stacked_ + offsets_[k], padded(out, W));
  }
  void product_rows(Index begin, Index end, Index depth, const T* packed, Index out, Index k) {
    for (Index i = 3 * begin; i < 3 * end; i += kMostRows)
      multiply<T>({jacobian_ + i * depth_, depth_, nullptr}, nullptr,
                  3 * end - i < kMostRows ? 3 * end - i : kMostRows, depth, packed, nullptr,
                  {products_ + i * stacked_ + offsets_[k], stacked_, nullptr}, out, true);
  }

  // ---- J^T f'' J of levels up to r ----

  void network_part(Index r, T* out) {
    seeds_[r] = T(1);
    for (Index k = r; k > 0; --k) seeds_[k - 1] = seeds_[k] * (T(1) + atoms_[k].below_slope);
    for (Index begin = 0; begin < columns_; begin += chunk_) {
      const Index width = columns_ - begin < chunk_ ? columns_ - begin : chunk_;
      clear(below_, width);
      for (Index k = 0; k <= r; ++k) up(k, begin, width, k < r);
      clear(seed_tangents_, width);
      for (Index k = r; k >= 0; --k) down(k, width);
      // Rows beyond the last of these columns are below the diagonal.
      multiply_all(products_, stacked_, begin + width < 3 * m_ ? begin + width : 3 * m_,
                   offsets_[r] + padded(atoms_[r].network->size(1), W), mu_, width, out + begin,
                   columns_);
    }
  }

  // The tangents [size, width] of the columns from `begin` on in every layer of level k; below_, the
  // tangents of the energies, becomes those of this level if they are wanted.
  void up(Index k, Index begin, Index width, bool with_energies) {
    const Atom<T>& atom = atoms_[k];
    const HessianNetwork<T>& network = *atom.network;
    const Index size = network.size(1), in = network.size(0);
    T* const first = tangents_[k][0];
    for (Index c = 0; c < width; c += W)
      for (Index i = 0; i < size; i += W) {
        V block[W];
        const T* const from = products_ + (begin + c) * stacked_ + offsets_[k] + i;
#pragma GCC unroll 16
        for (int x = 0; x < W; ++x) block[x] = V::load(from + x * stacked_);
        transpose(block);
#pragma GCC unroll 16
        for (int x = 0; x < W; ++x) block[x].store(first + (i + x) * width + c);
      }
    for (Index i = 0; k > 0 && i < size; ++i)
      add_scaled(atom.weights[0][i * in + in - 1], below_, width, first + i * width);
    for (Index l = 0; l + 1 < network.n_layers; ++l) {
      scale_rows(tangents_[k][l], atom.layers[l].slope, network.size(l + 1), width, moving_);
      multiply_all(atom.weights[l + 1], network.size(l + 1), network.size(l + 2),
                   network.size(l + 1), moving_, width, tangents_[k][l + 1], width);
    }
    const Index last = network.n_layers - 1;
    if (with_energies) add_scaled(atom.layers[last].slope[0], tangents_[k][last], width, below_);
  }

  // mu_ of level k, and of the seeds of the level below.
  void down(Index k, Index width) {
    const Atom<T>& atom = atoms_[k];
    const HessianNetwork<T>& network = *atom.network;
    const V seed(seeds_[k]);
    T* const mu = mu_ + offsets_[k] * width;
    T *from = seed_tangents_, *to = moving_, *other = above_;
    for (Index l = network.n_layers; l-- > 0;) {
      const Layer<T>& layer = atom.layers[l];
      T* const into = l == 0 ? mu : to;
      for (Index i = 0; i < network.size(l + 1); ++i)
        for (Index c = 0; c < width; c += W)
          (V(layer.slope[i]) * V::load(from + i * width + c) +
           seed * V(layer.curve[i]) * V::load(tangents_[k][l] + i * width + c))
              .store(into + i * width + c);
      if (l == 0) break;
      multiply_all(atom.transposed[l], network.size(l + 1), network.size(l), network.size(l + 1),
                   to, width, other, width);
      from = other;
    }
    const Index size = network.size(1), in = network.size(0);
    for (Index i = size; i < padded(size, W); ++i) clear(mu + i * width, width);
    for (Index i = 0; k > 0 && i < size; ++i)
      add_scaled(atom.weights[0][i * in + in - 1], mu + i * width, width, seed_tangents_);
  }
  static void scale_rows(const T* from, const T* by, Index n, Index width, T* to) {
    for (Index i = 0; i < n; ++i)
      for (Index c = 0; c < width; c += W)
        (V(by[i]) * V::load(from + i * width + c)).store(to + i * width + c);
  }

  // ---- sum_k g_k d2a_k/dd dd' ----

  template <bool kEight>
  void descriptor_part(const RepulsionPair<T>* repels, T* out) {
    clear(pairs_, 9 * plane_);
    clear(diagonal_, 6 * room_);
    radial_derivatives(repels);
    Index registers = 0;
    v_.for_pairs(0, registers, [&](Index a, Index b, Index n, Index g) {
      const T* const block =
          gradient_ + v_.layout.angular_begin(static_cast<int>(a), static_cast<int>(b));
      for (Index to = g * W; to < g * W + n; to += W) triple_sums<kEight>(to, block);
      v_.for_runs(0, a, b, [&](Index j, Index k, Index count, Index place) {
        add_triples(j, k, count, g * W + place);
      });
    });
    for (Index j = 0; j < m_; ++j) {
      const T u[] = {v_.ux.value[j], v_.uy.value[j], v_.uz.value[j]};
      const T across = first_[j] * v_.inverse_r.value[j], along = second_[j] - across;
      int place = 0;
      for (int x = 0; x < 3; ++x)
        for (int y = x; y < 3; ++y, ++place) {
          const T d = diagonal_[place * room_ + j] + along * u[x] * u[y] + (x == y ? across : T(0));
          out[(3 * j + x) * columns_ + 3 * j + y] += d;
        }
      for (int x = 0; x < 3; ++x) {
        T* const row = out + (3 * j + x) * columns_;
        for (int y = 0; y < 3; ++y) {
          const T* const plane = pairs_ + (3 * x + y) * plane_ + j * room_;
          for (Index k = j + 1; k < m_; ++k) row[3 * k + y] += plane[k];
        }
      }
    }
  }

  // Of each pair the first and second derivative by its distance, without triples.
  void radial_derivatives(const RepulsionPair<T>* repels) {
    const T rate = T(3.14159265358979323846) / t_.radial_cutoff;
    const V two_eta(T(2) * t_.radial_eta);
    for (Index a = 0; a < t_.n_species; ++a) {
      const T* const block = gradient_ + v_.layout.radial_begin(static_cast<int>(a));
      for (Index k = v_.begin(0, a); k < v_.end(0, a); ++k) {
        const T bend =
            v_.r.value[k] > t_.radial_cutoff ? T(0) : -rate * rate * (v_.fc.value[k] - T(0.5));
        const V r(v_.r.value[k]), fc(v_.fc.value[k]), slope(v_.slope.value[k]), curve(bend);
        V first(T(0)), second(T(0));
        for (Index l = 0; l < v_.radial_row; l += W) {
          const V g = l + W <= t_.n_radial
                          ? V::load(block + l)
                          : V::load_partial(block + l, static_cast<int>(t_.n_radial - l));
          const V x = (V::load(t_.radial_shifts + l) - r) * two_eta;
          const V e = g * V::load(v_.radial.value + k * v_.radial_row + l);
          first += e * (slope + x * fc);
          second += e * (curve + (x + x) * slope + (x * x - two_eta) * fc);
        }
        first_[k] = t_.radial_factor * reduce_add(first);
        second_[k] = t_.radial_factor * reduce_add(second);
        if (repels != nullptr) {
          const Repelled<Dual<T>> of = repulsion(Dual<T>(v_.r.value[k], T(1)), repels[a]);
          first_[k] += of.slope.value;
          second_[k] += of.slope.tangent;
        }
      }
    }
  }

  // S, S_R, S_c, S_RR, S_Rc, S_cc of a register of triples.
  template <bool kEight>
  void triple_sums(Index to, const T* g) {
    const Triples<T, const T*> triple = v_.plain_triple(to / W);
    const Index ns = t_.n_sections;
    const V half(T(0.5)), one(T(1)), zero(T(0)), zeta(t_.zeta), less(t_.zeta - T(1));
    const V cosine = V::load(triple.half_cosine()), sine = V::load(triple.half_sine()),
            ratio = V::load(triple.ratio()), mean = V::load(triple.mean());
    const V s = sine + sine, cube = s * s * s;
    // d2s/dc2 = -1 / s^3, 0 where theta has a kink
    const V bend = select_ge(zero, s, zero, one / select_ge(zero, s, one, cube));
    V sums[6];
    for (V& x : sums) x = zero;
    for (Index m = 0; m < ns; ++m) {
      const V cos_m(t_.section_cos[m]), sin_m(t_.section_sin[m]);
      const V x = half + cos_m * cosine + sin_m * sine;
      const V below =
          power_below<kEight>(t_, x, one, [](V a, T least) { return max(a, V(least)); });
      const V x_c = half * (cos_m - sin_m * ratio), x_cc = zero - half * sin_m * bend;
      const V p = below * x, p_c = zeta * below * x_c;
      const V p_cc = zeta * (less * power_two_below<kEight>(t_, x, one) * x_c * x_c + below * x_cc);
      V h = zero, h_1 = zero, h_2 = zero;
      for (Index l = 0; l < t_.n_angular; ++l) {
        const V e = V(g[l * ns + m]) * V::load(triple.gaussian(l));
        const V away = mean - V(t_.angular_shifts[l]), moved = away * e;
        h += e;
        h_1 += moved;
        h_2 += away * moved;
      }
      sums[0] += h * p;
      sums[1] += h_1 * p;
      sums[2] += h * p_c;
      sums[3] += h_2 * p;
      sums[4] += h_1 * p_c;
      sums[5] += h * p_cc;
    }
    const V two_eta(T(2) * t_.angular_eta);
    sums[3] = two_eta * (two_eta * sums[3] - sums[0]);
    sums[1] = zero - two_eta * sums[1];
    sums[4] = zero - two_eta * sums[4];
    for (int i = 0; i < 6; ++i) sums[i].store(sums_[i] + to);
  }

  // The triples of neighbour j with k, k + 1, ... into the planes and the diagonal.
  void add_triples(Index j, Index k, Index count, Index place) {
    const T rate = T(3.14159265358979323846) / t_.angular_cutoff;
    const V bend(-rate * rate), half(T(0.5)), quarter(T(0.25)), beta(t_.beta),
        factor(t_.angular_factor);
    const V uj[] = {V(v_.ux.value[j]), V(v_.uy.value[j]), V(v_.uz.value[j])};
    const V inverse_j(v_.inverse_r.value[j]);
    const V fj = factor * V(v_.near_fc.value[j]), fj_1 = factor * V(v_.near_slope.value[j]);
    const V fj_2 = factor * bend * (V(v_.near_fc.value[j]) - half);
    V of_j[6];
    for (V& x : of_j) x = V(T(0));
    for (Index q = 0; q < count; q += W) {
      const Index p = k + q, from = place + q, left = count - q;
      const auto keep = [&](V x) __attribute__((always_inline)) {
        return left >= W ? x : keep_first(x, left);
      };
      const V uk[] = {V::load(v_.ux.value + p), V::load(v_.uy.value + p), V::load(v_.uz.value + p)};
      const V inverse_k = V::load(v_.inverse_r.value + p);
      const V fk = V::load(v_.near_fc.value + p), fk_1 = V::load(v_.near_slope.value + p);
      const V fk_2 = bend * (fk - half);
      const V s = V::load(sums_[0] + from), s_r = half * V::load(sums_[1] + from),
              s_c = beta * V::load(sums_[2] + from), s_rr = quarter * V::load(sums_[3] + from),
              s_rc = half * beta * V::load(sums_[4] + from),
              s_cc = beta * beta * V::load(sums_[5] + from);
      const V f = fj * fk, f_j = fj_1 * fk, f_k = fj * fk_1;
      const V c = f * s_c, c_j = f_j * s_c + f * s_rc, c_k = f_k * s_c + f * s_rc;
      const V by_j = f_j * s + f * s_r, by_k = f_k * s + f * s_r;
      const V jj = fj_2 * fk * s + (f_j + f_j) * s_r + f * s_rr;
      const V kk = fj * fk_2 * s + (f_k + f_k) * s_r + f * s_rr;
      const V jk = fj_1 * fk_1 * s + (f_j + f_k) * s_r + f * s_rr;
      const V cc = f * s_cc;
      const V w = uj[0] * uk[0] + uj[1] * uk[1] + uj[2] * uk[2];
      V aj[3], ak[3];
      for (int d = 0; d < 3; ++d) {
        aj[d] = (uk[d] - w * uj[d]) * inverse_j;
        ak[d] = (uj[d] - w * uk[d]) * inverse_k;
      }
      const V across_j = (by_j - c * w * inverse_j) * inverse_j,
              across_k = (by_k - c * w * inverse_k) * inverse_k;
      const V mixed_j = c_j - c * inverse_j, mixed_k = c_k - c * inverse_k;
      int at = 0;
      for (int x = 0; x < 3; ++x)
        for (int y = x; y < 3; ++y, ++at) {
          V first = cc * aj[x] * aj[y] + mixed_j * (aj[x] * uj[y] + uj[x] * aj[y]) +
                    (jj - across_j) * uj[x] * uj[y];
          V second = cc * ak[x] * ak[y] + mixed_k * (ak[x] * uk[y] + uk[x] * ak[y]) +
                     (kk - across_k) * uk[x] * uk[y];
          if (x == y) {
            first += across_j;
            second += across_k;
          }
          of_j[at] += keep(first);
          T* const to = diagonal_ + at * room_ + p;
          (V::load(to) + keep(second)).store(to);
        }
      const V turn = c * inverse_j * inverse_k;
      for (int x = 0; x < 3; ++x)
        for (int y = 0; y < 3; ++y) {
          V b = cc * aj[x] * ak[y] + c_k * aj[x] * uk[y] + c_j * uj[x] * ak[y] +
                jk * uj[x] * uk[y] + turn * (w * uj[x] * uk[y] - uj[x] * uj[y] - uk[x] * uk[y]);
          if (x == y) b += turn;
          T* const to = pairs_ + (3 * x + y) * plane_ + j * room_ + p;
          (V::load(to) + keep(b)).store(to);
        }
    }
    for (int at = 0; at < 6; ++at) diagonal_[at * room_ + j] += reduce_add(of_j[at]);
  }

  const AevTables<T>& t_;
  const Environment<T>& e_;
  const View<T, false> v_;
  Index m_, room_, columns_, radial_, block_, depth_, length_, lanes_, n_levels_;
  Index plane_, chunk_, stacked_;
  static constexpr Index kMostLevels = 8;
  Index offsets_[kMostLevels];
  T *jacobian_, *inputs_, *gradient_, *factors_[3], *vectors_, *powers_, *slopes_, *sums_[6];
  T *pairs_, *diagonal_, *first_, *second_, *seeds_, *below_, *seed_tangents_;
  T *products_, *mu_, *moving_, *above_;
  T* tangents_[kMostLevels][kMostLayers];
  Atom<T> atoms_[kMostLevels];
  Arena<T> atoms_memory_;
};

}  // namespace

#define KINML_DEFINE_HESSIAN(T)                                                                 \
  void hessian_pack(const AevTables<T>& tables, const HessianNetwork<T>& network, T* scratch) { \
    pack(tables, network, scratch);                                                             \
  }                                                                                             \
  void hessian_centre(const AevTables<T>& tables, const Environment<T>& e,                      \
                      const HessianNetwork<T>* networks, Index n_members, Index n_levels,       \
                      Index first_level, const RepulsionPair<T>* repels, T* out, T* scratch) {  \
    const FlushDenormals<T> flush;                                                              \
    Arena<T> arena{scratch};                                                                    \
    Centre<T> centre(tables, e, networks, n_levels, arena);                                     \
    aev_rows(tables, e, centre.inputs(), 0);                                                    \
    tables.integer_zeta == 8                                                                    \
        ? centre.template run<true>(networks, n_members, first_level, repels, out)              \
        : centre.template run<false>(networks, n_members, first_level, repels, out);            \
  }
KINML_DEFINE_HESSIAN(double)
KINML_DEFINE_HESSIAN(float)
#undef KINML_DEFINE_HESSIAN

}  // namespace KINML_ISA
}  // namespace kinml
