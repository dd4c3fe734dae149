// Atomic environment vectors, their Jacobian products and their Hessian product on the CPU.
//
// Everything that does not depend on what the vectors are multiplied with is computed once for an
// Environment and read by all passes: unit vectors, distances, cutoff functions and radial factors
// of the neighbours; half the cosine and sine, mean distance, weight fc fc and angular factors E_l
// of the triples. Elementary functions run over whole registers of neighbours or triples.
//
//   rows          out[l][m] += E_l (weight P_m): lanes over the sections m, E_l a broadcast
//   transposed    lanes over triples: the sums  g.(E P), g.(E' P), g.(E P')  of each triple need no
//                 addition across lanes. They are symmetric in the two neighbours j, k, so the
//                 gradient of all displacements is five products of symmetric matrices with vectors
//   tangent rows  as rows, with out[l] = sum E_l X + shift_l sum E_l Y, since
//                 E_l' ~ (R - shift) E_l
//
// aev_many_kernels.cpp has `transposed` for several vectors at once.
// With dual numbers, whose tangents move along a direction v, `transposed` is d/dx (g . J v).
#include "aev_kernels.h"

#include <cstring>
#include <limits>
#include <utility>

#include "aev_view.h"
#include "denormals.h"

namespace kinml {
inline namespace KINML_ISA {

namespace {

// ---- neighbours ---------------------------------------------------------------------------------

// Cutoff functions and radial factors.
template <class T, bool kDual>
void pair_factors(const View<T, kDual>& v, Index n_pairs) {
  using La = Lanes<T, kDual>;
  using V = typename La::V;
  using L = typename La::L;
  constexpr int W = kNativeWidth<T>;
  const L zero = La::plain(V(T(0)));
  const L half = La::plain(V(T(0.5))), half_pi = La::plain(V(T(1.57079632679489661923)));
  const L radial_inverse = La::plain(V(T(1) / v.t.radial_cutoff));
  const L near_inverse = La::plain(V(T(1) / v.t.angular_cutoff));
  const V radial_cutoff(v.t.radial_cutoff);
  for (Index k = 0; k < n_pairs; k += W) {
    const L r = La::load(v.r + k);
    const Cutoff<L> fc = cutoff_function(r, radial_inverse, half_pi, half);
    La::store(v.fc + k, La::choose(radial_cutoff, La::value(r), fc.value, zero));
    La::store(v.slope + k, La::choose(radial_cutoff, La::value(r), fc.slope, zero));
    const Cutoff<L> near = cutoff_function(r, near_inverse, half_pi, half);
    La::store(v.near_fc + k, near.value);
    La::store(v.near_slope + k, near.slope);
  }
  const V root_eta(sqrt(V(v.t.radial_eta)));
  for (Index k = 0; k < n_pairs; ++k) {
    const L r = La::broadcast(v.r + k);
    for (Index l = 0; l < v.radial_row; l += W) {
      const L x = r - La::plain(V::load(v.t.radial_shifts + l));
      La::store(v.radial + (k * v.radial_row + l), gaussian(La::scale(root_eta, x)));
    }
  }
}

template <class T, bool kDual>
void neighbours(const AevTables<T>& tables, Environment<T>& e) {
  const View<T, kDual> v(tables, e);
  e.n_pairs = find_pairs(tables, e, v);
  e.index = v.index;
  Index registers = 0;
  e.most_near = e.n_triples = 0;
  for (Index c = 0; c < e.n_centres(); ++c) {
    Index near = 0;
    for (Index a = 0; a < v.n_species; ++a) near += v.near_count(c, a);
    e.most_near = near > e.most_near ? near : e.most_near;
    v.for_pairs(c, registers, [&](Index, Index, Index n, Index) { e.n_triples += n; });
  }
  e.triple_lanes = registers * kNativeWidth<T>;
  e.triple_numbers = registers * v.group;
  pair_factors(v, e.n_pairs);
}

// ---- triples ------------------------------------------------------------------------------------

// What goes over all triples is done in separate loops, by memory: a loop that reads whole
// registers soon after they were put together from runs would wait for the stores.

// Of each triple, [triple_lanes]: the cosine of the angle, the mean distance, and the weight.
template <class T>
struct TripleGeometry {
  Planes<T> cosines, means, weights;

  TripleGeometry(Index triple_lanes, Arena<T>& arena) {
    for (Planes<T>* p : {&cosines, &means, &weights})
      *p = arena.take(triple_lanes + kNativeWidth<T>);
  }
};

// Returns the number of registers.
template <class T, bool kDual>
Index combine_pairs(const View<T, kDual>& v, Index n_centres, const TripleGeometry<T>& to) {
  using La = Lanes<T, kDual>;
  using V = typename La::V;
  using L = typename La::L;
  constexpr int W = kNativeWidth<T>;
  const V half(T(0.5)), factor(v.t.angular_factor);
  const L zero = La::plain(V(T(0)));
  Index registers = 0;
  for (Index c = 0; c < n_centres; ++c)
    v.for_pairs(c, registers, [&](Index a, Index b, Index n, Index g) {
      const Index begin = g * W;
      v.for_runs(c, a, b, [&](Index j, Index k, Index count, Index place) {
        const L x = La::broadcast(v.ux + j), y = La::broadcast(v.uy + j),
                z = La::broadcast(v.uz + j), r = La::scale(half, La::broadcast(v.r + j)),
                w = La::scale(factor, La::broadcast(v.near_fc + j));
        for (Index q = 0; q < count; q += W) {
          const Index p = k + q, t = begin + place + q;
          La::store(to.cosines + t,
                    x * La::load(v.ux + p) + y * La::load(v.uy + p) + z * La::load(v.uz + p));
          La::store(to.means + t, r + La::scale(half, La::load(v.r + p)));
          La::store(to.weights + t, w * La::load(v.near_fc + p));
        }
      });
      // The lanes behind the last triple; then the next pair begins.
      for (Planes<T> p : {to.cosines, to.means, to.weights}) La::store(p + (begin + n), zero);
    });
  return registers;
}

template <class T, bool kDual>
KINML_HD void store_angle(const AevTables<T>& t, Planes<T> cosines, Triples<T, Planes<T>> to) {
  using La = Lanes<T, kDual>;
  using V = typename La::V;
  using L = typename La::L;
  const V unit(T(1)), minus_unit(T(-1)), half(T(0.5)), beta(t.beta);
  const L one = La::plain(unit), zero = La::plain(V(T(0)));
  const V smallest(T(16) * std::numeric_limits<T>::epsilon());
  L cosine = La::scale(beta, La::load(cosines));
  cosine = La::choose(La::value(cosine), unit, one, cosine);  // clip(c, -1, 1)
  cosine = La::choose(minus_unit, La::value(cosine), -one, cosine);
  // With beta = 1 and collinear atoms theta has a kink; there dsin/dcos is set to 0 and the
  // derivative is the mean over all directions.
  const L square = one - cosine * cosine;
  const V s2 = La::value(square);
  const L safe = sqrt(La::choose(s2, smallest, square, one));
  La::store(to.half_cosine(), La::scale(half, cosine));
  La::store(to.half_sine(), La::scale(half, La::choose(s2, smallest, safe, zero)));
  La::store(to.ratio(), La::choose(s2, smallest, cosine / safe, zero));
}

// E_l = exp(-eta (R - shift_l)^2)
template <class T, bool kDual>
KINML_HD void store_gaussians(const AevTables<T>& t, Triples<T, Planes<T>> triple) {
  using La = Lanes<T, kDual>;
  using V = typename La::V;
  using L = typename La::L;
  const V root_eta(sqrt(V(t.angular_eta)));
  const L mean = La::load(triple.mean());
  const auto away = [&](Index l) { return mean - La::plain(V(t.angular_shifts[l])); };
  if (t.angular_step > 0) {
    // E_l+1 / E_l = exp(2 eta step (R - shift_l) - eta step^2), itself a geometric series: from
    // the middle shift on both ways, where nothing leaves the range of the numbers.
    const Index middle = t.n_angular / 2;
    const L x = away(middle);
    const L e = gaussian(La::scale(root_eta, x));
    const L bend = La::plain(V(-t.angular_eta * t.angular_step * t.angular_step));
    const L tilt = La::scale(V(2 * t.angular_eta * t.angular_step), x);
    const V shrink(t.angular_shrink);
    La::store(triple.gaussian(middle), e);
    L ratio = exp(bend + tilt), product = e;
    for (Index l = middle + 1; l < t.n_angular; ++l) {
      product = product * ratio;
      ratio = La::scale(shrink, ratio);
      La::store(triple.gaussian(l), product);
    }
    ratio = exp(bend - tilt);
    product = e;
    for (Index l = middle; l-- > 0;) {
      product = product * ratio;
      ratio = La::scale(shrink, ratio);
      La::store(triple.gaussian(l), product);
    }
  } else {
    for (Index l = 0; l < t.n_angular; ++l)
      La::store(triple.gaussian(l), gaussian(La::scale(root_eta, away(l))));
  }
}

template <class T, bool kDual>
void triples(const AevTables<T>& tables, const Environment<T>& e, T* scratch) {
  using La = Lanes<T, kDual>;
  constexpr int W = kNativeWidth<T>;
  const View<T, kDual> v(tables, e);
  Arena<T> arena{scratch, kDual ? 2 : 1};
  const TripleGeometry<T> geometry(e.triple_lanes, arena);
  const Index registers = combine_pairs(v, e.n_centres(), geometry);
  for (Index g = 0; g < registers; ++g) {
    const Triples<T, Planes<T>> to = v.triple(g);
    store_angle<T, kDual>(tables, geometry.cosines + g * W, to);
    La::store(to.mean(), La::load(geometry.means + g * W));
    La::store(to.weight(), La::load(geometry.weights + g * W));
    store_gaussians<T, kDual>(tables, to);
  }
}

// ---- rows ---------------------------------------------------------------------------------------

template <class T, int M>
KINML_HD void store_row(Vec<T, M> x, T* out, Index left) {
  if (left >= M)
    x.store(out);
  else
    x.store_partial(out, static_cast<int>(left));
}

// Lanes over M sections of G triples at a time, whose lanes alternate: G = 2 fills registers that
// are twice as long as there are sections. Loads of a pair of numbers cost no more than of one.
template <class T, int M, int G>
struct Interleaved {
  using V = Vec<T, M * G>;
  static KINML_HD V spread(const T* p) {  // p[0], p[1], p[0], p[1], ...
    if constexpr (G == 1) {
      return V(*p);
    } else {
      static_assert(G == 2 && sizeof(T) == 4);
      double both;
      std::memcpy(&both, p, sizeof(both));
      const Vec<double, M> pairs(both);
      V result;
      std::memcpy(&result.raw, &pairs.raw, sizeof(result.raw));
      return result;
    }
  }
  static KINML_HD V repeat(Vec<T, M> x) {  // x0, x0, x1, x1, ...
    return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
      return V(__builtin_shufflevector(x.raw, x.raw, (I / G)...));
    }(std::make_integer_sequence<int, M * G>());
  }
  static KINML_HD Vec<T, M> fold(V x) {  // x0 + x1, x2 + x3, ...
    if constexpr (G == 1) {
      return x;
    } else {
      return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        return Vec<T, M>(__builtin_shufflevector(x.raw, x.raw, (2 * I)...)) +
               Vec<T, M>(__builtin_shufflevector(x.raw, x.raw, (2 * I + 1)...));
      }(std::make_integer_sequence<int, M>());
    }
  }
};

// P_m of triples without their weight, and its derivative by cos(theta) divided by zeta / 2.
template <bool kEight, class T, int M, int G>
struct Section {
  using In = Interleaved<T, M, G>;
  using V = typename In::V;
  V cosine, sine, half, one;

  KINML_HD Section(const AevTables<T>& t, Index m)
      : cosine(In::repeat(Vec<T, M>::load(t.section_cos + m))),
        sine(In::repeat(Vec<T, M>::load(t.section_sin + m))),
        half(T(0.5)),
        one(T(1)) {}
  KINML_HD void factors(const AevTables<T>& t, Triples<T, const T*> triple, V& value,
                        V& slope) const {
    const V x =
        half + cosine * In::spread(triple.half_cosine()) + sine * In::spread(triple.half_sine());
    const V below = power_below<kEight>(t, x, one, [](V a, T least) { return max(a, V(least)); });
    value = below * x;
    slope = below * (cosine - sine * In::spread(triple.ratio()));
  }
};

// out[l][m] for kRows shifts from l on and M sections from m on. Lanes behind the last triple have
// the weight 0.
template <bool kEight, int M, int G, int kRows, class T>
void row_block(const AevTables<T>& t, Triples<T, const T*> triples, Index group, Index n, Index l,
               Index m, T* out) {
  using In = Interleaved<T, M, G>;
  using V = typename In::V;
  constexpr int W = kNativeWidth<T>;
  const Section<kEight, T, M, G> section(t, m);
  V sums[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) sums[i] = V(T(0));
  for (; n > 0; n -= W, triples.first += group) {
    const Index lanes = n < W ? n : W;
    for (Index lane = 0; lane < lanes; lane += G) {
      const Triples<T, const T*> triple = triples.lane(lane);
      V value, slope;
      section.factors(t, triple, value, slope);
      value = value * In::spread(triple.weight());
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) sums[i] += In::spread(triple.gaussian(l + i)) * value;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
    store_row(In::fold(sums[i]), out + (l + i) * t.n_sections + m, t.n_sections - m);
}

// Calls block(Constant<kRows>, l, m) until all shifts and sections are done.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <int M, int kMost, class T, class F>
void for_sections(const AevTables<T>& t, const F& block) {
  for (Index m = 0; m < t.n_sections; m += M) {
    Index l = 0;
    for (; l + kMost <= t.n_angular; l += kMost) block(Constant<kMost>{}, l, m);
    for (; l + 2 <= t.n_angular; l += 2) block(Constant<2>{}, l, m);
    if (l < t.n_angular) block(Constant<1>{}, l, m);
  }
}

// Triples that one register takes at a time in the sums over sections.
template <class T, int M>
constexpr int together = sizeof(T) == 4 && 2 * M <= kNativeWidth<T> ? 2 : 1;

// Rows of sums that fit into the registers, with two sums each in a tangent row.
constexpr int kRowSums = KINML_VECTOR_BYTES == 64 ? 8 : 4;

// Calls f(Constant<M>, Constant<kEight>): the register width M for the sections (fewest registers,
// then the narrowest) and whether zeta is 8.
template <class T, class F>
void choose_width(const AevTables<T>& t, const F& f) {
  constexpr int native = kNativeWidth<T>;
  const auto chosen = [&](auto m) {
    t.integer_zeta == 8 ? f(m, Constant<1>{}) : f(m, Constant<0>{});
  };
  const auto registers = [&](int width) { return (t.n_sections + width - 1) / width; };
  if constexpr (native >= 16) {
    if (registers(16) < registers(8)) return chosen(Constant<16>{});
  }
  if constexpr (native >= 8) {
    if (registers(8) < registers(4)) return chosen(Constant<8>{});
  }
  chosen(Constant<native >= 4 ? 4 : 2>{});
}

// One centre's radial blocks: sums over the neighbours k of a species of term(k, l), for a register
// of shifts from l on.
template <class T, class F>
KINML_HD void radial_row(const View<T, false>& v, Index centre, T* row, const F& term) {
  using V = Vec<T, kNativeWidth<T>>;
  for (Index a = 0; a < v.n_species; ++a)
    for (Index l = 0; l < v.radial_row; l += kNativeWidth<T>) {
      V sum(T(0));
      for (Index k = v.begin(centre, a); k < v.end(centre, a); ++k) sum += term(k, l);
      store_row(sum * V(v.t.radial_factor), row + v.layout.radial(static_cast<int>(a), 0) + l,
                v.t.n_radial - l);
    }
}

template <class T>
void rows(const AevTables<T>& tables, const Environment<T>& e, T* out, Index stride) {
  using V = Vec<T, kNativeWidth<T>>;
  const View<T, false> v(tables, e);
  choose_width(tables, [&](auto width, auto eight) {
    constexpr int M = width.value, G = together<T, M>;
    constexpr bool kEight = eight.value;
    Index registers = 0;
    for (Index c = 0; c < e.n_centres(); ++c) {
      T* const row = out + (e.begin + c) * stride;
      radial_row(v, c, row, [&](Index k, Index l) __attribute__((always_inline)) {
        return V(v.fc.value[k]) * V::load(v.radial.value + k * v.radial_row + l);
      });
      v.for_pairs(c, registers, [&](Index a, Index b, Index n, Index g) {
        T* const block = row + v.layout.angular_begin(static_cast<int>(a), static_cast<int>(b));
        for_sections<M, kRowSums>(tables, [&](auto n_rows, Index l, Index m) {
          row_block<kEight, M, G, n_rows.value>(tables, v.plain_triple(g), v.group, n, l, m, block);
        });
      });
    }
  });
}

// ---- tangent rows: J v, in four phases ----------------------------------------------------------

// Derivatives along v of the distances and of the unit vectors, [n_pairs].
template <class T>
struct PairTangents {
  T *r, *ux, *uy, *uz;
};

template <class T>
PairTangents<T> pair_tangents(const View<T, false>& v, const Environment<T>& e, const T* direction,
                              const T* strain, Arena<T>& arena) {
  using V = Vec<T, kNativeWidth<T>>;
  PairTangents<T> d;
  for (T** p : {&d.r, &d.ux, &d.uy, &d.uz}) *p = arena.numbers(e.pair_room());
  for (Index c = 0; c < e.n_centres(); ++c)
    for (Index k = v.begin(c, 0); k < v.end(c, v.n_species - 1); ++k) {
      const Displacement<T> moving = displacement(direction, e.begin + c, v.index[k]);
      d.ux[k] = moving.x;
      d.uy[k] = moving.y;
      d.uz[k] = moving.z;
    }
  if (strain != nullptr)
    for (Index k = 0; k < e.n_pairs; ++k) {
      const T r = v.r.value[k];
      const T x = r * v.ux.value[k], y = r * v.uy.value[k], z = r * v.uz.value[k];
      d.ux[k] += strain[0] * x + strain[1] * y + strain[2] * z;
      d.uy[k] += strain[3] * x + strain[4] * y + strain[5] * z;
      d.uz[k] += strain[6] * x + strain[7] * y + strain[8] * z;
    }
  for (T* p : {d.ux, d.uy, d.uz}) V(T(0)).store(p + e.n_pairs);
  for (Index k = 0; k < e.n_pairs; k += kNativeWidth<T>) {
    const V ux = V::load(v.ux.value + k), uy = V::load(v.uy.value + k),
            uz = V::load(v.uz.value + k), inverse = V::load(v.inverse_r.value + k);
    const V x = V::load(d.ux + k), y = V::load(d.uy + k), z = V::load(d.uz + k);
    const V along = ux * x + uy * y + uz * z;
    along.store(d.r + k);
    ((x - along * ux) * inverse).store(d.ux + k);
    ((y - along * uy) * inverse).store(d.uy + k);
    ((z - along * uz) * inverse).store(d.uz + k);
  }
  return d;
}

// Derivatives of the cosines, mean distances and weights of the triples, [triple_lanes].
template <class T>
struct TripleTangents {
  T *cosine, *mean, *weight;
  Index registers;
};

template <class T>
TripleTangents<T> triple_tangents(const View<T, false>& v, const Environment<T>& e,
                                  const PairTangents<T>& d, Arena<T>& arena) {
  using V = Vec<T, kNativeWidth<T>>;
  constexpr int W = kNativeWidth<T>;
  TripleTangents<T> out;
  for (T** p : {&out.cosine, &out.weight, &out.mean}) *p = arena.numbers(e.triple_lanes + W);
  const V factor(v.t.angular_factor), half(T(0.5));
  out.registers = 0;
  for (Index c = 0; c < e.n_centres(); ++c)
    v.for_pairs(c, out.registers, [&](Index a, Index b, Index n, Index g) {
      v.for_runs(c, a, b, [&](Index j, Index k, Index count, Index place) {
        const V jx(v.ux.value[j]), jy(v.uy.value[j]), jz(v.uz.value[j]);
        const V djx(d.ux[j]), djy(d.uy[j]), djz(d.uz[j]), djr(half * V(d.r[j]));
        const V jfc(factor * V(v.near_fc.value[j]));
        const V djfc(factor * V(v.near_slope.value[j] * d.r[j]));
        for (Index q = 0; q < count; q += W) {
          const Index p = k + q, to = g * W + place + q;
          const V kr = V::load(d.r + p);
          const V first = jx * V::load(d.ux + p) + jy * V::load(d.uy + p) + jz * V::load(d.uz + p);
          const V second = djx * V::load(v.ux.value + p) + djy * V::load(v.uy.value + p) +
                           djz * V::load(v.uz.value + p);
          (first + second).store(out.cosine + to);
          (djr + half * kr).store(out.mean + to);
          (djfc * V::load(v.near_fc.value + p) + jfc * (V::load(v.near_slope.value + p) * kr))
              .store(out.weight + to);
        }
      });
      // The lanes behind the last triple; then the next pair begins.
      for (T* p : {out.cosine, out.mean, out.weight}) V(T(0)).store(p + g * W + n);
    });
  return out;
}

// What the sums over triples are made of, [triple_lanes]: what goes with dP/dc / (zeta / 2), with
// P, and with (shift - middle) P, where middle is the shift in the middle of the list.
template <class T>
struct TangentFactors {
  const T *by_slope, *by_value, *by_shift;
  T middle;
};

// In place.
template <class T>
TangentFactors<T> tangent_factors(const View<T, false>& v, const TripleTangents<T>& d) {
  using V = Vec<T, kNativeWidth<T>>;
  constexpr int W = kNativeWidth<T>;
  const T middle = v.t.angular_shifts[v.t.n_angular / 2];
  const V two_eta(T(2) * v.t.angular_eta), to_slope(T(0.5) * v.t.zeta * v.t.beta);
  for (Index g = 0; g < d.registers; ++g) {
    const Triples<T, const T*> triple = v.plain_triple(g);
    const V mean = V::load(triple.mean()), weight = V::load(triple.weight());
    const V by_shift = two_eta * weight * V::load(d.mean + g * W);
    (to_slope * weight * V::load(d.cosine + g * W)).store(d.cosine + g * W);
    (V::load(d.weight + g * W) - (mean - V(middle)) * by_shift).store(d.weight + g * W);
    by_shift.store(d.mean + g * W);
  }
  return {d.cosine, d.weight, d.mean, middle};
}

// The same as row_block of J v, for the triples from register g on.
template <bool kEight, int M, int G, int kRows, class T>
void tangent_block(const View<T, false>& v, Index g, Index n, const TangentFactors<T>& factors,
                   Index l, Index m, T* out) {
  using In = Interleaved<T, M, G>;
  using V = typename In::V;
  constexpr int W = kNativeWidth<T>;
  const AevTables<T>& t = v.t;
  const Section<kEight, T, M, G> section(t, m);
  const T *x = factors.by_slope + g * W, *y = factors.by_value + g * W,
          *z = factors.by_shift + g * W;
  Triples<T, const T*> triples = v.plain_triple(g);
  V sums[kRows], more[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) sums[i] = more[i] = V(T(0));
  for (; n > 0; n -= W, triples.first += v.group) {
    const Index lanes = n < W ? n : W;
    for (Index lane = 0; lane < lanes; lane += G, x += G, y += G, z += G) {
      const Triples<T, const T*> triple = triples.lane(lane);
      V value, slope;
      section.factors(t, triple, value, slope);
      const V first = In::spread(x) * slope + In::spread(y) * value;
      const V second = In::spread(z) * value;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const V e = In::spread(triple.gaussian(l + i));
        sums[i] += e * first;
        more[i] += e * second;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
    store_row(In::fold(sums[i] + V(t.angular_shifts[l + i] - factors.middle) * more[i]),
              out + v.layout.in_angular_block(static_cast<int>(l + i), static_cast<int>(m)),
              t.n_sections - m);
}

template <class T>
void tangent_sums(const View<T, false>& v, const Environment<T>& e, const PairTangents<T>& d,
                  const TangentFactors<T>& factors, T* out, Index stride) {
  using V = Vec<T, kNativeWidth<T>>;
  const V minus_two_eta(T(-2) * v.t.radial_eta);
  choose_width(v.t, [&](auto width, auto eight) {
    constexpr int M = width.value, G = together<T, M>;
    constexpr bool kEight = eight.value;
    Index registers = 0;
    for (Index c = 0; c < e.n_centres(); ++c) {
      T* const row = out + (e.begin + c) * stride;
      radial_row(v, c, row, [&](Index k, Index l) __attribute__((always_inline)) {
        const V x = (V(v.r.value[k]) - V::load(v.t.radial_shifts + l)) * minus_two_eta;
        const V derivative = V(v.slope.value[k]) + x * V(v.fc.value[k]);
        return V(d.r[k]) * V::load(v.radial.value + k * v.radial_row + l) * derivative;
      });
      v.for_pairs(c, registers, [&](Index a, Index b, Index n, Index g) {
        T* const block = row + v.layout.angular_begin(static_cast<int>(a), static_cast<int>(b));
        for_sections<M, kRowSums>(v.t, [&](auto n_rows, Index l, Index m) {
          tangent_block<kEight, M, G, n_rows.value>(v, g, n, factors, l, m, block);
        });
      });
    }
  });
}

template <class T>
void tangent_rows(const AevTables<T>& tables, const Environment<T>& e, const T* direction,
                  const T* strain, T* out, Index stride, T* scratch) {
  const View<T, false> v(tables, e);
  Arena<T> arena{scratch};
  const PairTangents<T> of_pairs = pair_tangents(v, e, direction, strain, arena);
  const TripleTangents<T> of_triples = triple_tangents(v, e, of_pairs, arena);
  tangent_sums(v, e, of_pairs, tangent_factors(v, of_triples), out, stride);
}

// ---- transposed ---------------------------------------------------------------------------------

// For each triple of one register: sum = g.(E P), sum_r = g.((R - shift) E P), sum_c = g.(E P')
// without the factors -2 eta and zeta / 2. kAngular shifts (0: any number).
template <bool kEight, int kAngular, class T, bool kDual>
KINML_HD void triple_sums(const AevTables<T>& t, Triples<T, Planes<T>> triple, const T* g,
                          Planes<T> sum, Planes<T> sum_r, Planes<T> sum_c) {
  using La = Lanes<T, kDual>;
  using V = typename La::V;
  using L = typename La::L;
  constexpr int kHeld = kAngular > 0 ? kAngular : 1;
  const int n_angular = kAngular > 0 ? kAngular : t.n_angular;
  const L cosine = La::load(triple.half_cosine()), sine = La::load(triple.half_sine());
  const L ratio = La::load(triple.ratio()), mean = La::load(triple.mean());
  const L half = La::plain(V(T(0.5))), one = La::plain(V(T(1))), zero = La::plain(V(T(0)));
  const auto at_least = [](L a, T least) {
    return La::choose(La::value(a), V(least), a, La::plain(V(least)));
  };
  const auto factor = [&](int l) { return La::load(triple.gaussian(l)); };
  const auto away = [&](int l) { return mean - La::plain(V(t.angular_shifts[l])); };
  L held[kHeld], moved[kHeld];
  if constexpr (kAngular > 0) {
#pragma GCC unroll 8
    for (int l = 0; l < kAngular; ++l) {
      held[l] = factor(l);
      moved[l] = away(l) * held[l];
    }
  }
  L s = zero, s_r = zero, s_c = zero;
  for (int m = 0; m < t.n_sections; ++m) {
    const V cos_m(t.section_cos[m]), sin_m(t.section_sin[m]);
    const L x = half + La::scale(cos_m, cosine) + La::scale(sin_m, sine);
    const L below = power_below<kEight>(t, x, one, at_least);
    L h = zero, h_r = zero;
    if constexpr (kAngular > 0) {
#pragma GCC unroll 8
      for (int l = 0; l < kAngular; ++l) {
        const V gv(g[l * t.n_sections + m]);
        h += La::scale(gv, held[l]);
        h_r += La::scale(gv, moved[l]);
      }
    } else {
      for (int l = 0; l < n_angular; ++l) {
        const L e = La::scale(V(g[l * t.n_sections + m]), factor(l));
        h += e;
        h_r += away(l) * e;
      }
    }
    const L value = below * x;
    s += h * value;
    s_r += h_r * value;
    s_c += h * (below * (La::plain(cos_m) - La::scale(sin_m, ratio)));
  }
  La::store(sum, s);
  La::store(sum_r, s_r);
  La::store(sum_c, s_c);
}

// Some centres at a time: symmetric matrices of the sums over near neighbours, in local numbers
// (species after species), and from them the gradient of the displacements. Each loop goes over
// all these centres, because a register that is read soon after its numbers were stored one by one
// waits for the stores.
template <class T, bool kDual>
class Transposed {
  using La = Lanes<T, kDual>;
  using V = typename La::V;
  using L = typename La::L;
  static constexpr int W = kNativeWidth<T>;

 public:
  Transposed(const AevTables<T>& tables, const Environment<T>& e, T* scratch)
      : t_(tables), e_(e), v_(tables, e), stride_(padded(e.most_near + W, W)) {
    Arena<T> arena{scratch, kDual ? 2 : 1};
    list_room_ = padded(e.triple_lanes + W);
    list_ = arena.take(3 * list_room_);
    matrix_room_ = padded(cpu::kCentresAtOnce * e.most_near * stride_ + W);
    matrix_ = arena.take(3 * matrix_room_);
    for (Planes<T>& p : known_) p = arena.take(cpu::kCentresAtOnce * (stride_ + W));
    for (Planes<T>& p : sums_) p = arena.take(stride_ + W);
    along_ = arena.take(e.n_pairs + 2 * W);
    for (T** p : {&gx_, &gy_, &gz_}) *p = arena.numbers(e.n_pairs + 2 * W);
  }

  template <bool kEight, int kAngular>
  void run(const T* gradient, Index stride, T* out, T* virials) {
    Index registers = 0;
    for (Index c = 0; c < e_.n_centres(); ++c) {
      const T* const g = gradient + (e_.begin + c) * stride;
      radial(c, g);
      v_.for_pairs(c, registers, [&](Index a, Index b, Index n, Index r) {
        const T* const block =
            g + v_.layout.angular_begin(static_cast<int>(a), static_cast<int>(b));
        for (Index to = r * W; to < r * W + n; to += W)
          triple_sums<kEight, kAngular, T, kDual>(t_, v_.triple(to / W), block, list_ + to,
                                                  list_ + (list_room_ + to),
                                                  list_ + (2 * list_room_ + to));
      });
    }
    registers = 0;
    for (Index first = 0; first < e_.n_centres(); first += cpu::kCentresAtOnce) {
      const Index last = first + cpu::kCentresAtOnce < e_.n_centres() ? first + cpu::kCentresAtOnce
                                                                      : e_.n_centres();
      for (Index c = first; c < last; ++c) {
        select(c - first);
        v_.for_pairs(c, registers, [&](Index a, Index b, Index, Index r) { fill(c, a, b, r * W); });
        weigh(c);
      }
      for (Index c = first; c < last; ++c) {
        select(c - first);
        multiply(c);
        displacements(c);
      }
    }
    for (Index c = 0; c < e_.n_centres(); ++c) {
      scatter(c, out);
      if (virials != nullptr) virial(c, virials + 9 * (e_.begin + c));
    }
  }

 private:
  Index first(Index c, Index a) const { return v_.begin(c, a); }
  Index near(Index c, Index a) const { return v_.near_count(c, a); }
  Index local(Index c, Index a) const {  // local number of the first near neighbour of a species
    Index n = 0;
    for (Index b = 0; b < a; ++b) n += near(c, b);
    return n;
  }
  // The matrices and vectors of the i-th of the centres at work.
  void select(Index i) {
    this_matrix_ = matrix_ + i * e_.most_near * stride_;
    for (int p = 0; p < 4; ++p) this_known_[p] = known_[p] + i * (stride_ + W);
  }

  // dE/dR of the radial part.
  void radial(Index c, const T* g) {
    const V minus_two_eta(T(-2) * t_.radial_eta), factor(t_.radial_factor);
    for (Index a = 0; a < v_.n_species; ++a) {
      const T* const block = g + v_.layout.radial_begin(static_cast<int>(a));
      for (Index k = first(c, a); k < first(c, a + 1); ++k) {
        const L r = La::broadcast(v_.r + k), fc = La::broadcast(v_.fc + k),
                slope = La::broadcast(v_.slope + k);
        L sum = La::plain(V(T(0)));
        for (Index l = 0; l < v_.radial_row; l += W) {
          const V gv = l + W <= t_.n_radial
                           ? V::load(block + l)
                           : V::load_partial(block + l, static_cast<int>(t_.n_radial - l));
          const L x = La::scale(minus_two_eta, r - La::plain(V::load(t_.radial_shifts + l)));
          sum += La::scale(gv, La::load(v_.radial + (k * v_.radial_row + l)) * (slope + x * fc));
        }
        La::store_sum(along_ + k, La::scale(factor, sum));
      }
    }
  }

  // The lists of a species pair into both triangles of the matrices.
  void fill(Index c, Index a, Index b, Index begin) {
    const Index shift_a = local(c, a) - first(c, a), shift_b = local(c, b) - first(c, b);
    v_.for_runs(c, a, b, [&](Index j, Index k, Index count, Index place) {
      const Index row = (j + shift_a) * stride_ + k + shift_b;
      const Index column = (k + shift_b) * stride_ + j + shift_a;
      fill_run(list_.value + begin + place, this_matrix_.value, row, column, count);
      if constexpr (kDual)
        fill_run(list_.tangent + begin + place, this_matrix_.tangent, row, column, count);
    });
  }
  void fill_run(const T* from, T* to, Index row, Index column, Index count) const {
    const Index list = list_room_, matrix = matrix_room_, stride = stride_;
    // Whole registers: what is written too far is written again by the next run of this row.
    for (Index q = 0; q < count; q += W)
      for (int i = 0; i < 3; ++i) V::load(from + i * list + q).store(to + i * matrix + row + q);
    T* p = to + column;
    for (Index q = 0; q < count; ++q, p += stride) {
      const T x = from[q], y = from[list + q], z = from[2 * list + q];
      p[0] = x;
      p[matrix] = y;
      p[2 * matrix] = z;
    }
  }

  // The vectors that the matrices are multiplied with: fc_k and fc_k u_k.
  void weigh(Index c) {
    Index n = 0;
    for (Index a = 0; a < v_.n_species; ++a) {
      for (Index q = 0; q < near(c, a); q += W) {
        const Index k = first(c, a) + q;
        const L fc = La::load(v_.near_fc + k);
        La::store(this_known_[0] + (n + q), fc);
        La::store(this_known_[1] + (n + q), fc * La::load(v_.ux + k));
        La::store(this_known_[2] + (n + q), fc * La::load(v_.uy + k));
        La::store(this_known_[3] + (n + q), fc * La::load(v_.uz + k));
      }
      n += near(c, a);
    }
    for (int i = 0; i < 3; ++i)
      for (Index k = 0; k < n; ++k)
        La::clear(this_matrix_ + (i * matrix_room_ + k * (stride_ + 1)));
  }

  // sums_ = sum_k of (g.(E P) fc_k, g.(E' P) fc_k, g.(E P') fc_k u_k) for each near neighbour.
  void multiply(Index c) {
    const Index n = local(c, v_.n_species);
    for (Index j = 0; j < n; j += W) {
      L sums[5];
      for (L& sum : sums) sum = La::plain(V(T(0)));
      for (Index k = 0; k < n; ++k) {
        const Index place = k * stride_ + j;
        const L fc = La::broadcast(this_known_[0] + k),
                by_cos = La::load(this_matrix_ + (2 * matrix_room_ + place));
        sums[0] += La::load(this_matrix_ + place) * fc;
        sums[1] += La::load(this_matrix_ + (matrix_room_ + place)) * fc;
        sums[2] += by_cos * La::broadcast(this_known_[1] + k);
        sums[3] += by_cos * La::broadcast(this_known_[2] + k);
        sums[4] += by_cos * La::broadcast(this_known_[3] + k);
      }
      for (int i = 0; i < 5; ++i) La::store(sums_[i] + j, sums[i]);
    }
  }

  // The gradient with respect to each displacement from the centre.
  void displacements(Index c) {
    const V factor(t_.angular_factor);
    const V by_mean(-t_.angular_eta * t_.angular_factor);  // -2 eta, and R = (R_ij + R_ik) / 2
    const V by_cos(T(0.5) * t_.zeta * t_.beta * t_.angular_factor);
    Index n = 0;
    for (Index a = 0; a < v_.n_species; ++a) {
      for (Index k = first(c, a); k < first(c, a + 1); k += W) {
        const Index q = k - first(c, a), left = near(c, a) - q;
        L sums[5];
        for (int i = 0; i < 5; ++i)
          sums[i] = left > 0 ? keep_first(La::load(sums_[i] + (n + q)), left) : La::plain(V(T(0)));
        const L fc = La::load(v_.near_fc + k);
        const L along = La::load(along_ + k) +
                        La::scale(factor, La::load(v_.near_slope + k) * sums[0]) +
                        La::scale(by_mean, fc * sums[1]);
        const L ux = La::load(v_.ux + k), uy = La::load(v_.uy + k), uz = La::load(v_.uz + k);
        const L across = La::scale(by_cos, fc * La::load(v_.inverse_r + k));
        const L x = across * sums[2], y = across * sums[3], z = across * sums[4];
        const L rest = along - (ux * x + uy * y + uz * z);
        La::result(rest * ux + x).store(gx_ + k);
        La::result(rest * uy + y).store(gy_ + k);
        La::result(rest * uz + z).store(gz_ + k);
      }
      n += near(c, a);
    }
  }

  void scatter(Index c, T* out) const {
    T x = 0, y = 0, z = 0;
    for (Index k = first(c, 0); k < first(c + 1, 0); ++k) {
      T* const o = out + 3 * Index(v_.index[k]);
      o[0] += gx_[k];
      o[1] += gy_[k];
      o[2] += gz_[k];
      x += gx_[k];
      y += gy_[k];
      z += gz_[k];
    }
    T* const o = out + 3 * (e_.begin + c);
    o[0] -= x;
    o[1] -= y;
    o[2] -= z;
  }

  // Without tangents: those of the displacements are not known here.
  void virial(Index c, T* out) const {
    T sums[9] = {};
    for (Index k = first(c, 0); k < first(c + 1, 0); ++k) {
      const T r = v_.r.value[k], g[] = {gx_[k], gy_[k], gz_[k]},
              d[] = {r * v_.ux.value[k], r * v_.uy.value[k], r * v_.uz.value[k]};
      for (int i = 0; i < 9; ++i) sums[i] += g[i / 3] * d[i % 3];
    }
    for (int i = 0; i < 9; ++i) out[i] = sums[i];
  }

  const AevTables<T>& t_;
  const Environment<T>& e_;
  const View<T, kDual> v_;
  Index stride_;
  Index list_room_, matrix_room_;  // numbers of one of the three lists, of one of the matrices
  Planes<T> list_, matrix_, known_[4], sums_[5], along_;
  Planes<T> this_matrix_, this_known_[4];
  T *gx_, *gy_, *gz_;
};

template <class T, bool kDual>
void transposed(const AevTables<T>& tables, const Environment<T>& e, const T* g, Index stride,
                T* out, T* virials, T* scratch) {
  Transposed<T, kDual> pass(tables, e, scratch);
  const bool eight = tables.integer_zeta == 8;
  if (eight && tables.n_angular == 8)
    pass.template run<true, 8>(g, stride, out, virials);
  else if (eight && tables.n_angular == 4)
    pass.template run<true, 4>(g, stride, out, virials);
  else if (tables.n_angular == 8)
    pass.template run<false, 8>(g, stride, out, virials);
  else if (tables.n_angular == 4)
    pass.template run<false, 4>(g, stride, out, virials);
  else
    pass.template run<false, 0>(g, stride, out, virials);
}

}  // namespace

#define KINML_DEFINE_AEV(T)                                                                    \
  void aev_neighbours(const AevTables<T>& tables, Environment<T>& e) {                         \
    const FlushDenormals<T> flush;                                                             \
    e.direction == nullptr ? neighbours<T, false>(tables, e) : neighbours<T, true>(tables, e); \
  }                                                                                            \
  void aev_triples(const AevTables<T>& tables, const Environment<T>& e, T* scratch) {          \
    const FlushDenormals<T> flush;                                                             \
    e.direction == nullptr ? triples<T, false>(tables, e, scratch)                             \
                           : triples<T, true>(tables, e, scratch);                             \
  }                                                                                            \
  void aev_rows(const AevTables<T>& tables, const Environment<T>& e, T* out, Index stride) {   \
    const FlushDenormals<T> flush;                                                             \
    rows(tables, e, out, stride);                                                              \
  }                                                                                            \
  void aev_tangent_rows(const AevTables<T>& tables, const Environment<T>& e, const T* v,       \
                        const T* strain, T* out, Index stride, T* scratch) {                   \
    const FlushDenormals<T> flush;                                                             \
    tangent_rows(tables, e, v, strain, out, stride, scratch);                                  \
  }                                                                                            \
  void aev_transposed(const AevTables<T>& tables, const Environment<T>& e, const T* g,         \
                      Index stride, T* out, T* virials, T* scratch) {                          \
    const FlushDenormals<T> flush;                                                             \
    e.direction == nullptr ? transposed<T, false>(tables, e, g, stride, out, virials, scratch) \
                           : transposed<T, true>(tables, e, g, stride, out, nullptr, scratch); \
  }
KINML_DEFINE_AEV(double)
KINML_DEFINE_AEV(float)
#undef KINML_DEFINE_AEV

}  // namespace KINML_ISA
}  // namespace kinml
