// J^T g on the CPU for several g of one environment (the members of an ensemble).
//
// Lanes run over the g. What a triple gives is the same for all of them and is read as broadcasts;
// nothing is lost in registers of triples that are not full. Of one centre, with G [shift l,
// section m, lanes] the numbers of its g for a species pair:
//   h_m = sum_l E_l G_lm,  h'_m = sum_l (R - shift_l) E_l G_lm
//   s = sum_m P_m h_m,  s' = sum_m P_m h'_m,  s_c = sum_m P'_m h_m
// are, but for constant factors, the derivatives of g . a by the weight fc_j fc_k, the mean
// distance and the cosine of the triple j, k. Each of its two neighbours has five sums over the
// triples it is in, of which those of j are
//   sum_k s fc_k,  sum_k s' fc_k,  sum_k s_c fc_k u_k  (3)
// They give the derivative by the displacement of j, like aev_transposed with its matrices.
//
// Every lane goes through the same operations in the same order, whatever stands in the others and
// however many registers of lanes there are.
#include "../core/aev_layout.h"
#include "aev_kernels.h"
#include "aev_view.h"
#include "denormals.h"

namespace kinml {
inline namespace KINML_ISA {

namespace {

// Registers of sums h of one triple, and as many of h', that are made together.
constexpr int kSums = KINML_VECTOR_BYTES == 64 ? 8 : 4;

// K registers of g.
template <class T, int K>
class TransposedMany {
  static constexpr int W = kNativeWidth<T>;
  static constexpr int kLanes = K * W;
  using V = Vec<T, W>;

 public:
  TransposedMany(const AevTables<T>& tables, const Environment<T>& e, T* scratch)
      : t_(tables), e_(e), v_(tables, e), length_(v_.layout.length()) {
    Arena<T> arena{scratch};
    const auto take = [&](Index n) { return arena.numbers(n); };
    zeros_ = take(length_);
    g_ = take(padded(length_) * kLanes);
    out_ = take(3 * e.structure.n_atoms * kLanes);
    virial_ = take(9 * kLanes);
    sums_ = take(5 * e.most_near * kLanes);
    known_ = take(4 * e.most_near);
    radial_ = take(e.structure.max_candidates * v_.radial_row);
    value_ = take(tables.n_sections * W);
    slope_ = take(tables.n_sections * W);
    moved_ = take(tables.n_angular * W);
  }

  // g[i], out[i] and, if any, virials[i] for i < count <= kLanes
  void run(const T* const* g, Index count, Index stride, T* const* out, T* const* virials) {
    with_virial_ = virials != nullptr;
    fill(zeros_, length_);
    fill(out_, 3 * e_.structure.n_atoms * kLanes);
    Index registers = 0;
    for (Index c = 0; c < e_.n_centres(); ++c) {
      const Index atom = e_.begin + c;
      const T* rows[kLanes];
      for (Index i = 0; i < kLanes; ++i) rows[i] = i < count ? g[i] + atom * stride : zeros_;
      interleave_rows(rows);
      // Behind the last atom stand the rows of the next structure, or nothing that is needed.
      for (Index i = 0; i < kLanes; ++i) next_[i] = i < count ? rows[i] + stride : zeros_;
      fetched_ = 0;
      weigh(c);
      v_.for_pairs(c, registers, [&](Index a, Index b, Index n, Index r) {
        const T* const block =
            g_ + v_.layout.angular_begin(static_cast<int>(a), static_cast<int>(b)) * kLanes;
        if (t_.n_angular == 8)
          triples<8>(c, a, b, n, r, block);
        else if (t_.n_angular == 4)
          triples<4>(c, a, b, n, r, block);
        else
          triples<0>(c, a, b, n, r, block);
      });
      V centre[3 * K];
      for (V& x : centre) x = V(T(0));
      if (with_virial_) fill(virial_, 9 * kLanes);
      Index n = 0;  // local number of the first near neighbour of a species
      for (Index a = 0; a < v_.n_species; ++a) {
        displacements(c, a, n, centre);
        n += near(c, a);
      }
      for (int i = 0; i < 3 * K; ++i) {
        T* const o = out_ + 3 * atom * kLanes + i * W;
        (V::load(o) - centre[i]).store(o);
      }
      if (with_virial_)
        for (Index i = 0; i < count; ++i)
          for (Index x = 0; x < 9; ++x) virials[i][9 * atom + x] = virial_[x * kLanes + i];
    }
    for (Index i = 0; i < count; ++i)
      for (Index x = 0; x < 3 * e_.structure.n_atoms; ++x) out[i][x] += out_[x * kLanes + i];
  }

 private:
  Index first(Index c, Index a) const { return v_.begin(c, a); }
  Index near(Index c, Index a) const { return v_.near_count(c, a); }
  static void fill(T* to, Index n) {
    for (Index i = 0; i < n; ++i) to[i] = T(0);
  }

  // Another line of the next atom's rows into the cache: memory delivers during the arithmetic.
  KINML_HD void fetch() {
    if (fetched_ >= length_) return;
    for (int i = 0; i < kLanes; ++i) __builtin_prefetch(next_[i] + fetched_);
    fetched_ += 64 / sizeof(T);
  }

  // g_ = the rows as columns
  void interleave_rows(const T* const* rows) {
    Index d = 0;
    for (; d + W <= length_; d += W)
      for (int k = 0; k < K; ++k) {
        V block[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = V::load(rows[k * W + i] + d);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i].store(g_ + (d + i) * kLanes + k * W);
      }
    for (; d < length_; ++d)
      for (int i = 0; i < kLanes; ++i) g_[d * kLanes + i] = rows[i][d];
  }

  // fc_k and fc_k u_k of the near neighbours, whose sums begin with zero.
  void weigh(Index c) {
    T* to = known_;
    for (Index a = 0; a < v_.n_species; ++a)
      for (Index k = first(c, a); k < first(c, a) + near(c, a); ++k, to += 4) {
        const T fc = v_.near_fc.value[k];
        to[0] = fc;
        to[1] = fc * v_.ux.value[k];
        to[2] = fc * v_.uy.value[k];
        to[3] = fc * v_.uz.value[k];
      }
    fill(sums_, (to - known_) / 4 * 5 * kLanes);
  }

  // P_m, P'_m / (zeta / 2) and (R - shift_l) E_l of one register of triples.
  template <bool kEight>
  void factors(Triples<T, const T*> triple) {
    const V cosine = V::load(triple.half_cosine()), sine = V::load(triple.half_sine()),
            ratio = V::load(triple.ratio()), mean = V::load(triple.mean()), half(T(0.5)), one(T(1));
    for (Index m = 0; m < t_.n_sections; ++m) {
      const V cos_m(t_.section_cos[m]), sin_m(t_.section_sin[m]);
      const V x = half + cos_m * cosine + sin_m * sine;
      const V below =
          power_below<kEight>(t_, x, one, [](V a, T least) { return max(a, V(least)); });
      (below * x).store(value_ + m * W);
      (below * (cos_m - sin_m * ratio)).store(slope_ + m * W);
    }
    for (Index l = 0; l < t_.n_angular; ++l)
      ((mean - V(t_.angular_shifts[l])) * V::load(triple.gaussian(l))).store(moved_ + l * W);
  }

  // The triples of a species pair, whose first register is r. kAngular shifts (0: any number).
  template <int kAngular>
  void triples(Index c, Index a, Index b, Index n, Index r, const T* g) {
    if (n == 0) return;
    Index begin_a = 0, begin_b = 0;  // local numbers
    for (Index s = 0; s < b; ++s) {
      begin_a += s < a ? near(c, s) : 0;
      begin_b += near(c, s);
    }
    const Index end = begin_b + near(c, b);
    Index j = begin_a, k = a == b ? j + 1 : begin_b;
    for (Index done = 0; done < n; done += W, ++r) {
      const Triples<T, const T*> triple = v_.plain_triple(r);
      t_.integer_zeta == 8 ? factors<true>(triple) : factors<false>(triple);
      const Index lanes = n - done < W ? n - done : W;
      for (Index lane = 0; lane < lanes; ++lane) {
        fetch();
        V s[3][K];
        triple_sums<kAngular>(triple.lane(lane).gaussian(0), lane, g, s);
        add(s, known_ + 4 * k, sums_ + 5 * j * kLanes);
        add(s, known_ + 4 * j, sums_ + 5 * k * kLanes);
        if (++k == end) {
          ++j;
          k = a == b ? j + 1 : begin_b;
        }
      }
    }
  }

  // s, s', s_c of one triple; its E_l stand at factor + l * W.
  template <int kAngular>
  KINML_HD void triple_sums(const T* factor, Index lane, const T* g, V (&s)[3][K]) const {
    constexpr int kSections = kSums / K;
    for (auto& registers : s)
      for (V& x : registers) x = V(T(0));
    Index m = 0;
    for (; m + kSections <= t_.n_sections; m += kSections)
      sections<kAngular, kSections>(factor, lane, g, m, s);
    for (; m < t_.n_sections; ++m) sections<kAngular, 1>(factor, lane, g, m, s);
  }
  template <int kAngular, int kSections>
  KINML_HD void sections(const T* factor, Index lane, const T* g, Index m, V (&s)[3][K]) const {
    constexpr int N = kSections * K;
    V h[N], h_r[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) h[i] = h_r[i] = V(T(0));
    const T* away = moved_ + lane;
    // Else they would be spread into whole registers in memory, once for all sections.
    forget(factor);
    forget(away);
    const auto shift = [&](Index l) __attribute__((always_inline)) {
      const V e(factor[l * W]), moved(away[l * W]);
      const T* const p = g + (l * t_.n_sections + m) * kLanes;
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        V x = V::load(p + i * W);
        hold(x);
        h[i] += e * x;
        h_r[i] += moved * x;
      }
    };
    if constexpr (kAngular > 0) {
#pragma GCC unroll 8
      for (Index l = 0; l < kAngular; ++l) shift(l);
    } else {
      for (Index l = 0; l < t_.n_angular; ++l) shift(l);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const V value(value_[(m + i / K) * W + lane]), slope(slope_[(m + i / K) * W + lane]);
      s[0][i % K] += value * h[i];
      s[1][i % K] += value * h_r[i];
      s[2][i % K] += slope * h[i];
    }
  }

  // A triple into the sums of one neighbour; `known` is of the other one.
  KINML_HD void add(const V (&s)[3][K], const T* known, T* sums) const {
    constexpr int kinds[] = {0, 1, 2, 2, 2}, factors[] = {0, 0, 1, 2, 3};
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) {
      const V factor(known[factors[i]]);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        T* const p = sums + i * kLanes + k * W;
        (V::load(p) + factor * s[kinds[i]][k]).store(p);
      }
    }
  }

  // The derivatives by the displacements of the neighbours of a species, added to their atoms and
  // to what the centre loses.
  void displacements(Index c, Index a, Index local, V (&centre)[3 * K]) {
    const V minus_two_eta(T(-2) * t_.radial_eta), factor(t_.radial_factor);
    const Index begin = first(c, a), end = first(c, a + 1), angular = begin + near(c, a);
    T* q = radial_;
    for (Index k = begin; k < end; ++k) {
      const V r(v_.r.value[k]), fc(v_.fc.value[k]), slope(v_.slope.value[k]);
      for (Index l = 0; l < v_.radial_row; l += W, q += W) {
        const V x = minus_two_eta * (r - V::load(t_.radial_shifts + l));
        const V derivative = slope + x * fc;
        (factor * V::load(v_.radial.value + k * v_.radial_row + l) * derivative).store(q);
      }
    }
    const T* const g = g_ + v_.layout.radial_begin(static_cast<int>(a)) * kLanes;
    constexpr int kAtOnce = 8 / K;
    for (Index k = begin; k < end;) {
      V along[8];
      const T* const of_pair = radial_ + (k - begin) * v_.radial_row;
      const Index count = k + kAtOnce <= end ? kAtOnce : 1;
      count == 1 ? radial_sums<1>(of_pair, g, along) : radial_sums<kAtOnce>(of_pair, g, along);
      for (Index i = 0; i < count; ++i, ++k)
        displacement(k, along + i * K,
                     k < angular ? sums_ + 5 * (local + k - begin) * kLanes : nullptr, centre);
    }
  }
  // sum_l q_l g_l of N neighbours
  template <int N>
  KINML_HD void radial_sums(const T* q, const T* g, V* sums) const {
    V held[N * K];  // in registers, unlike what a pointer leads to
#pragma GCC unroll 8
    for (int i = 0; i < N * K; ++i) held[i] = V(T(0));
    for (Index l = 0; l < t_.n_radial; ++l)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const V factor(q[i * v_.radial_row + l]);
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) held[i * K + k] += factor * V::load(g + l * kLanes + k * W);
      }
#pragma GCC unroll 8
    for (int i = 0; i < N * K; ++i) sums[i] = held[i];
  }
  // From the radial part and, for a near neighbour (else null), its five sums.
  void displacement(Index k, const V* radial, const T* sums, V (&centre)[3 * K]) {
    const V ux(v_.ux.value[k]), uy(v_.uy.value[k]), uz(v_.uz.value[k]);
    const T fc = v_.near_fc.value[k];
    const V by_weight(t_.angular_factor * v_.near_slope.value[k]);
    const V by_mean(-t_.angular_eta * t_.angular_factor * fc);  // -2 eta, and R = (R_j + R_k) / 2
    const V by_cos(T(0.5) * t_.zeta * t_.beta * t_.angular_factor * fc * v_.inverse_r.value[k]);
    T* const out = out_ + 3 * Index(v_.index[k]) * kLanes;
    for (int i = 0; i < K; ++i) {
      V along = radial[i], x(T(0)), y(T(0)), z(T(0));
      if (sums != nullptr) {
        const T* const p = sums + i * W;
        along += by_weight * V::load(p);
        along += by_mean * V::load(p + kLanes);
        x = by_cos * V::load(p + 2 * kLanes);
        y = by_cos * V::load(p + 3 * kLanes);
        z = by_cos * V::load(p + 4 * kLanes);
        along -= ux * x;
        along -= uy * y;
        along -= uz * z;
      }
      const V moves[] = {x + along * ux, y + along * uy, z + along * uz};
      for (int d = 0; d < 3; ++d) {
        T* const o = out + d * kLanes + i * W;
        (V::load(o) + moves[d]).store(o);
        centre[d * K + i] += moves[d];
      }
      if (with_virial_) {
        const V r(v_.r.value[k]), way[] = {r * ux, r * uy, r * uz};
        for (int x = 0; x < 9; ++x) {
          T* const o = virial_ + x * kLanes + i * W;
          (V::load(o) + moves[x / 3] * way[x % 3]).store(o);
        }
      }
    }
  }

  const AevTables<T>& t_;
  const Environment<T>& e_;
  const View<T, false> v_;
  const Index length_;
  const T* next_[kLanes];  // the next atom's rows
  Index fetched_;          // so many numbers of each are on their way into the cache
  T* zeros_;               // [D]
  T* g_;                   // [D, kLanes]
  T* out_;                 // [n_atoms, 3, kLanes]
  T* virial_;              // [3, 3, kLanes] of a centre
  bool with_virial_;
  T* sums_;    // [most_near, 5, kLanes]
  T* known_;   // [most_near, 4]
  T* radial_;  // [neighbours of a species, radial_row] derivatives of the radial numbers
  T* value_;   // [n_sections, W] of one register of triples, like the others
  T* slope_;   // [n_sections, W]
  T* moved_;   // [n_angular, W]
};

template <class T>
void transposed_many(const AevTables<T>& tables, const Environment<T>& e, const T* const* g,
                     Index count, Index stride, T* const* out, T* const* virials, T* scratch) {
  constexpr Index W = kNativeWidth<T>;
  for (Index i = 0; i < count; i += 2 * W) {
    T* const* const own = virials == nullptr ? nullptr : virials + i;
    if (count - i <= W)
      TransposedMany<T, 1>(tables, e, scratch).run(g + i, count - i, stride, out + i, own);
    else
      TransposedMany<T, 2>(tables, e, scratch)
          .run(g + i, count - i < 2 * W ? count - i : 2 * W, stride, out + i, own);
  }
}

}  // namespace

#define KINML_DEFINE_AEV_MANY(T)                                                                   \
  void aev_transposed_many(const AevTables<T>& tables, const Environment<T>& e, const T* const* g, \
                           Index count, Index stride, T* const* out, T* const* virials,            \
                           T* scratch) {                                                           \
    const FlushDenormals<T> flush;                                                                 \
    transposed_many(tables, e, g, count, stride, out, virials, scratch);                           \
  }
KINML_DEFINE_AEV_MANY(double)
KINML_DEFINE_AEV_MANY(float)
#undef KINML_DEFINE_AEV_MANY

}  // namespace KINML_ISA
}  // namespace kinml
