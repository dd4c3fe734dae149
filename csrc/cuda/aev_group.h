// Atomic environment vectors by one warp: a_i, J_i v and J_i^T g of one centre i, and the
// derivative of J_i^T g along v. Formulas in core/aev_terms.h, order of the vector in
// core/aev_layout.h, names and degenerate cases as in csrc/cpu/aev_kernels.cpp.
//
// Lengths in angstrom. Numbers N are T, or Dual<T> for a derivative along a direction v of the
// coordinates:
//                         N = T                      N = Dual<T>
//   aev_row               a_i                        J_i v
//   aev_row_transposed    d/dx (g . a_i)             the same, and d/dx (g . J_i v) as its tangent
//
// A centre's neighbours (pairs.h) stand in one list, sorted by species and, within one, those
// within the angular cutoff (near) first. Its triples are numbered, species pair after species
// pair, and worked on kChunk at a time; each chunk is a few steps over (table entry, triple),
// (sum, triple) or (neighbour). All sums have a fixed order.
#pragma once

#include <cstdint>

#include "../core/aev_layout.h"
#include "aev_tables.h"
#include "group.h"
#include "pairs.h"

namespace kinml::cuda {

// ---- the numbers of triples ---------------------------------------------------------------------

// Triples {centre, j, k} are numbered species pair after species pair, (0,0) (0,1) .. (1,1) ..
// Within a pair of species with n and m near neighbours, n >= m, the triples (i, (i + s) % m),
// i = 0 .. n - 1, form row s = 0 .. m - 1. Of one species the triples {i, (i + s) % n} form row s =
// 1 .. (n - 1) / 2; with n even there follows row n / 2, in which i = 0 .. n / 2 - 1. So the
// triples of a chunk belong to different neighbours as far as that is possible, and the lanes that
// sum over the triples of one neighbour each have about the same to do.
KINML_HD int count_triples(int n, int m, bool same) {
  return same ? n * (n - 1) / 2 : n * m;
}

struct TripleMembers {
  int a, b;  // numbers within their species
};
KINML_HD TripleMembers triple_members(int n_a, int n_b, bool same, int t) {
  const int n = n_a > n_b ? n_a : n_b, m = n_a > n_b ? n_b : n_a;
  const int i = t % n, other = (i + t / n + same) % m;
  return n_a >= n_b ? TripleMembers{i, other} : TripleMembers{other, i};
}

// Calls f(t, other) for the triples t, begin <= t < end, that the neighbour of this number within
// its species belongs to; of_a says whether that is the first species of the pair.
template <class F>
KINML_HD void for_triples_of(int n_a, int n_b, bool same, bool of_a, int member, int begin, int end,
                             const F& f) {
  const int n = n_a > n_b ? n_a : n_b, m = n_a > n_b ? n_b : n_a;
  const bool of_longer = of_a == (n_a >= n_b);
  for (int s = begin / n; s * n < end; ++s) {
    // Places of the row: every m-th from the first one on; of one species two.
    int i = member, step = m, visits = 1;
    if (same) {
      step = n - s - 1;
      visits = 2;
    } else if (!of_longer) {
      i = member >= s ? member - s : member - s + m;
      visits = (n - i + m - 1) / m;
    }
    int other = same || of_longer ? (member + s + same) % m : i;
    for (; visits > 0; --visits) {
      const int t = s * n + i;
      if (t >= begin && t < end) f(t, other);
      i += step;
      if (same && i >= n) i -= n;
      other = i;
    }
  }
}

// Walks over the species pairs.
struct PairCursor {
  int a = 0, b = 0;
  int begin = 0;  // number of the pair's first triple

  KINML_HD int count(const int* near) const { return count_triples(near[a], near[b], a == b); }
  KINML_HD void next(const int* near, int n_species) {
    begin += count(near);
    if (++b == n_species) b = ++a;
  }
};

// ---- tables of a chunk of triples ---------------------------------------------------------------

template <class N>
inline constexpr int kChunk = sizeof(N) <= 8 ? 32 : 16;
// One more, so that the rows of a table begin in different banks.
template <class N>
inline constexpr int kChunkStride = kChunk<N> + 1;

template <class N>
struct TripleScratch {
  static constexpr int kRow = kChunkStride<N>;
  // [rows, kRow]: E_l and P_m; for aev_row_transposed also g . (E P') by l and P_m'.
  N* tables = nullptr;
  N* numbers = nullptr;     // [8, kRow]
  int* integers = nullptr;  // [3, kRow]
  int rows = 0;

  KINML_DEVICE N* cosine() const { return numbers; }  // half of it
  KINML_DEVICE N* sine() const { return numbers + kRow; }
  KINML_DEVICE N* ratio() const { return numbers + 2 * kRow; }   // -dsin/dcos
  KINML_DEVICE N* mean() const { return numbers + 3 * kRow; }    // of the two distances
  KINML_DEVICE N* weight() const { return numbers + 4 * kRow; }  // factor fc fc
  KINML_DEVICE N* sum(int i) const { return numbers + (5 + i) * kRow; }
  KINML_DEVICE int* block() const { return integers; }  // where the pair begins in the vector
  KINML_DEVICE int* first() const { return integers + kRow; }
  KINML_DEVICE int* second() const { return integers + 2 * kRow; }
};

// With slopes = false the scratch is for aev_row only.
template <class N, class T>
KINML_HD TripleScratch<N> take_triple_scratch(Pieces& pieces, const AevNumbers<T>& a,
                                              bool slopes = true) {
  TripleScratch<N> s;
  // At least two rows: they hold a radial part as well.
  const int rows = (slopes ? 2 : 1) * (a.n_angular + a.n_sections), radial = a.n_radial;
  const int least = (radial + s.kRow - 1) / s.kRow;
  s.rows = rows > least ? rows : least;
  s.tables = pieces.take<N>(std::int64_t(s.rows) * s.kRow);
  s.numbers = pieces.take<N>((slopes ? 8 : 5) * std::int64_t(s.kRow));
  s.integers = pieces.take<int>(3 * std::int64_t(s.kRow));
  return s;
}

namespace aev_detail {

// x^(zeta - 1). zeta = 8 is what aevmod and so everybody has.
template <class T, class N>
KINML_DEVICE N power_below(const AevTables<T>& t, N x) {
  if (t.integer_zeta == 8) {
    const N square = x * x;
    return (square * square) * (square * x);
  }
  if (t.integer_zeta > 0) return integer_power(x, N(T(1)), t.integer_zeta - 1);
  constexpr T least = sizeof(T) == 8 ? T(1e-60) : T(1e-12);
  return power(value_of(x) >= least ? x : N(least), t.zeta - T(1));
}

// Tables hold (row, triple) with the triples running fastest. Lanes are dealt out by whole powers
// of two, which needs no division.
KINML_DEVICE int bits_for(int n) {
  int bits = 0;
  while ((1 << bits) < n) ++bits;
  return bits;
}
template <class F>
KINML_DEVICE void each_of_table(const Warp& warp, int rows, int n, const F& f) {
  const int bits = bits_for(n);
  warp.each(rows << bits, [&](int item) {
    const int t = item & ((1 << bits) - 1);
    if (t < n) f(item >> bits, t);
  });
}

// What goes before the tables of the triples [begin, begin + n): members, angle, mean distance.
template <class T, class N>
KINML_DEVICE void begin_chunk(const Warp& warp, const AevTables<T>& t, const Neighbours<N>& nb,
                              const TripleScratch<N>& s, const PairCursor& from, int begin, int n) {
  warp.each(n, [&](int i) {
    PairCursor pair = from;
    while (begin + i >= pair.begin + pair.count(nb.near)) pair.next(nb.near, t.n_species);
    const TripleMembers members =
        triple_members(nb.near[pair.a], nb.near[pair.b], pair.a == pair.b, begin + i - pair.begin);
    const int j = nb.first[pair.a] + members.a, k = nb.first[pair.b] + members.b;
    s.block()[i] = t.layout().angular_begin(pair.a, pair.b);
    const N one(T(1)), zero(T(0));
    N cosine =
        scale(t.beta, nb.ux()[j] * nb.ux()[k] + nb.uy()[j] * nb.uy()[k] + nb.uz()[j] * nb.uz()[k]);
    if (value_of(cosine) >= T(1)) cosine = one;  // clip(c, -1, 1)
    if (T(-1) >= value_of(cosine)) cosine = -one;
    // With beta = 1 and collinear atoms theta has a kink; there dsin/dcos is set to 0 and the
    // derivative is the mean over all directions.
    const N square = one - cosine * cosine;
    const bool regular = value_of(square) >= kSmallest<T>;
    using std::sqrt;
    const N safe = sqrt(regular ? square : one);
    s.cosine()[i] = scale(T(0.5), cosine);
    s.sine()[i] = regular ? scale(T(0.5), safe) : zero;
    s.ratio()[i] = regular ? cosine / safe : zero;
    s.mean()[i] = scale(T(0.5), nb.r()[j] + nb.r()[k]);
    s.weight()[i] = scale(t.angular_factor, nb.near_fc()[j] * nb.near_fc()[k]);
  });
}

// E_l, times the weight unless kSlopes; P_m and, with kSlopes, dP_m/dcos without zeta / 2.
template <bool kSlopes, class T, class N>
KINML_DEVICE void fill_tables(const Warp& warp, const AevTables<T>& t, const TripleScratch<N>& s,
                              int n) {
  constexpr int kRow = kChunkStride<N>;
  const int n_angular = t.n_angular, n_sections = t.n_sections;
  each_of_table(warp, n_angular + n_sections, n, [&](int row, int i) {
    N* const to = s.tables + row * kRow + i;
    if (row < n_angular) {
      const N e = gaussian(scale(t.angular_root_eta, s.mean()[i] - N(t.angular_shifts[row])));
      *to = kSlopes ? e : e * s.weight()[i];
      return;
    }
    const T cos_m = t.section_cos[row - n_angular], sin_m = t.section_sin[row - n_angular];
    const N x = N(T(0.5)) + scale(cos_m, s.cosine()[i]) + scale(sin_m, s.sine()[i]);
    const N below = power_below(t, x);
    *to = below * x;
    if constexpr (kSlopes) to[n_sections * kRow] = below * (N(cos_m) - scale(sin_m, s.ratio()[i]));
  });
}

// Sums of terms(neighbour, l) of the radial part: those of some neighbours at a time are in the
// tables as [n_radial, n], and then add(base, n) is called, which ends with a step.
template <class T, class N, class Term, class Add>
KINML_DEVICE void radial_part(const Warp& warp, const AevTables<T>& t, const Neighbours<N>& nb,
                              const TripleScratch<N>& s, const Term& term, const Add& add) {
  const int n_radial = t.n_radial;
  if (n_radial == 0) return;
  const int most = s.rows * s.kRow / n_radial;
  for (int base = 0; base < nb.count; base += most) {
    const int n = nb.count - base < most ? nb.count - base : most;
    warp.each(n * n_radial, [&](int item) { s.tables[item] = term(base + item % n, item / n); });
    add(base, n);
  }
}

template <class T, class N>
KINML_DEVICE int count_near(const AevTables<T>& t, const Neighbours<N>& nb) {
  int near = 0;
  for (int a = 0; a < t.n_species; ++a) near += nb.near[a];
  return near;
}
template <class T, class N>
KINML_DEVICE int total_triples(const AevTables<T>& t, const Neighbours<N>& nb) {
  const int near = count_near(t, nb);
  return count_triples(near, near, true);
}

}  // namespace aev_detail

// ---- rows ---------------------------------------------------------------------------------------

namespace aev_detail {

// Adds the triples [low, high) of a chunk, all of one species pair, to its block of the vector.
// block  // [n_angular, n_sections] as in the layout, numbers `stride` apart
template <class T, class N>
KINML_DEVICE void add_triples(const Warp& warp, const AevTables<T>& t, const TripleScratch<N>& s,
                              int low, int high, T* block, std::int64_t stride) {
  constexpr int kRow = kChunkStride<N>;
  const AevLayout layout = t.layout();
  warp.each(layout.angular_block_length(), [&](int item) {
    const int l = item / t.n_sections, m = item - l * t.n_sections;
    const N *const e = s.tables + l * kRow, *const p = s.tables + (t.n_angular + m) * kRow;
    T sum(0);
    for (int i = low; i < high; ++i) sum += result(e[i] * p[i]);
    block[layout.in_angular_block(l, m) * stride] += sum;
  });
}

}  // namespace aev_detail

// out  // [D], numbers `stride` apart: a_i, or J_i v if N = Dual<T>
template <class T, class N>
KINML_DEVICE void aev_row(const Warp& warp, const AevTables<T>& t, const Neighbours<N>& nb,
                          const TripleScratch<N>& s, T* out, std::int64_t stride = 1) {
  using namespace aev_detail;
  const AevLayout layout = t.layout();
  const T start = nb.spoiled ? kNan<T> : T(0);
  warp.each(layout.length(), [&](int d) { out[d * stride] = start; });
  if (nb.spoiled) return;

  radial_part(
      warp, t, nb, s,
      [&](int k, int l) {
        return nb.fc()[k] * gaussian(scale(t.radial_root_eta, nb.r()[k] - N(t.radial_shifts[l])));
      },
      [&](int base, int n) {
        warp.each(layout.radial_length(), [&](int item) {
          const int a = item / t.n_radial, l = item - a * t.n_radial;
          const N* const row = s.tables + l * n;
          const int begin = nb.first[a] > base ? nb.first[a] - base : 0;
          const int end = nb.first[a + 1] < base + n ? nb.first[a + 1] - base : n;
          T sum(0);
          for (int k = begin; k < end; ++k) sum += result(row[k]);
          if (begin < end) out[layout.radial(a, l) * stride] += t.radial_factor * sum;
        });
      });

  const int total = total_triples(t, nb);
  PairCursor pair;
  for (int begin = 0; begin < total; begin += kChunk<N>) {
    const int n = total - begin < kChunk<N> ? total - begin : kChunk<N>, end = begin + n;
    begin_chunk(warp, t, nb, s, pair, begin, n);
    fill_tables<false>(warp, t, s, n);
    for (;;) {
      const int pair_end = pair.begin + pair.count(nb.near);
      const int low = pair.begin > begin ? pair.begin - begin : 0;
      const int high = pair_end < end ? pair_end - begin : n;
      if (low < high)
        add_triples(warp, t, s, low, high, out + layout.angular_begin(pair.a, pair.b) * stride,
                    stride);
      if (pair_end >= end) break;
      pair.next(nb.near, t.n_species);
    }
  }
}

namespace aev_detail {

// The radial part of g . a_i by the distance of each neighbour: `along`.
template <class T, class N>
KINML_DEVICE void radial_slopes(const Warp& warp, const AevTables<T>& t, const Neighbours<N>& nb,
                                const TripleScratch<N>& s, const T* g) {
  const AevLayout layout = t.layout();
  radial_part(
      warp, t, nb, s,
      [&](int k, int l) {
        int a = 0;
        while (k >= nb.first[a + 1]) ++a;
        const N x = nb.r()[k] - N(t.radial_shifts[l]);
        const N e = gaussian(scale(t.radial_root_eta, x));
        return scale(g[layout.radial(a, l)],
                     e * (nb.slope()[k] + scale(T(-2) * t.radial_eta, x) * nb.fc()[k]));
      },
      [&](int base, int n) {
        warp.each(n, [&](int k) {
          N sum(T(0));
          for (int l = 0; l < t.n_radial; ++l) sum += s.tables[l * n + k];
          nb.along()[base + k] = scale(t.radial_factor, sum);
        });
      });
}

// Of the n triples of a chunk, whose tables are filled: s.sum(0) = g . (E P) over l, s.sum(1) =
// g . ((R - shift) E P), s.sum(2) = g . (E P').
template <class T, class N>
KINML_DEVICE void contract_chunk(const Warp& warp, const AevTables<T>& t, const TripleScratch<N>& s,
                                 const T* g, int n) {
  constexpr int kRow = kChunkStride<N>;
  const AevLayout layout = t.layout();
  const int n_angular = t.n_angular, n_sections = t.n_sections;
  N* const sections = s.tables + n_angular * kRow;
  N* const slopes = sections + n_sections * kRow;
  N* const by_slope = slopes + n_sections * kRow;
  each_of_table(warp, n_angular, n, [&](int l, int i) {
    const T* const gl = g + s.block()[i] + layout.in_angular_block(l, 0);
    N value(T(0)), slope(T(0));
    for (int m = 0; m < n_sections; ++m) {
      value += scale(gl[m], sections[m * kRow + i]);
      slope += scale(gl[m], slopes[m * kRow + i]);
    }
    N& e = s.tables[l * kRow + i];
    by_slope[l * kRow + i] = e * slope;
    e = e * value;
  });
  warp.each(n, [&](int i) {
    N sum(T(0)), by_mean(T(0)), by_cos(T(0));
    for (int l = 0; l < n_angular; ++l) {
      const N e = s.tables[l * kRow + i];
      sum += e;
      by_mean += (s.mean()[i] - N(t.angular_shifts[l])) * e;
      by_cos += by_slope[l * kRow + i];
    }
    s.sum(0)[i] = sum;
    s.sum(1)[i] = by_mean;
    s.sum(2)[i] = by_cos;
  });
}

// Near neighbours add what their triples in [begin, end) have: those that go on in the next chunk
// as well. `pair` is that of the first of them.
template <class T, class N>
KINML_DEVICE void gather_chunk(const Warp& warp, const AevTables<T>& t, const Neighbours<N>& nb,
                               const TripleScratch<N>& s, const PairCursor& pair, int begin,
                               int end, N* p) {
  const int n_species = t.n_species;
  warp.each(count_near(t, nb), [&](int place) {
    int a = 0;
    while (place >= nb.near[a]) place -= nb.near[a++];
    const int j = nb.first[a] + place;
    N sum(T(0)), by_mean(T(0)), x(T(0)), y(T(0)), z(T(0));
    for (PairCursor c = pair; c.a < n_species && c.begin < end; c.next(nb.near, n_species)) {
      if (c.a != a && c.b != a) continue;
      const int count = c.count(nb.near);
      const int low = c.begin > begin ? 0 : begin - c.begin;
      const int high = c.begin + count < end ? count : end - c.begin;
      if (low >= high) continue;
      const int shift = c.begin - begin, others = nb.first[c.a == a ? c.b : c.a];
      for_triples_of(nb.near[c.a], nb.near[c.b], c.a == c.b, c.a == a, place, low, high,
                     [&](int triple, int other) {
                       const int i = triple + shift, k = others + other;
                       const N fc = nb.near_fc()[k], by_cos = fc * s.sum(2)[i];
                       sum += fc * s.sum(0)[i];
                       by_mean += fc * s.sum(1)[i];
                       x += by_cos * nb.ux()[k];
                       y += by_cos * nb.uy()[k];
                       z += by_cos * nb.uz()[k];
                     });
    }
    // -2 eta, and R = (R_ij + R_ik) / 2.
    nb.along()[j] += scale(t.angular_factor, nb.near_slope()[j] * sum) -
                     scale(t.angular_factor * t.angular_eta, nb.near_fc()[j] * by_mean);
    p[3 * j] += x;
    p[3 * j + 1] += y;
    p[3 * j + 2] += z;
  });
}

}  // namespace aev_detail

// g  // [D]
// p  // [count, 3] gradient of g . a_i with respect to the displacement of each neighbour from the
//       centre, whose own is minus the sum of them
template <class T, class N>
KINML_DEVICE void aev_row_transposed(const Warp& warp, const AevTables<T>& t,
                                     const Neighbours<N>& nb, const TripleScratch<N>& s, const T* g,
                                     N* p) {
  using namespace aev_detail;
  if (nb.spoiled) {
    warp.each(3 * nb.count, [&](int i) { p[i] = N(kNan<T>) * N(kNan<T>); });
    return;
  }
  warp.each(nb.count,
            [&](int k) { nb.along()[k] = p[3 * k] = p[3 * k + 1] = p[3 * k + 2] = N(T(0)); });
  radial_slopes(warp, t, nb, s, g);

  const int total = total_triples(t, nb);
  PairCursor pair;
  for (int begin = 0; begin < total; begin += kChunk<N>) {
    const int n = total - begin < kChunk<N> ? total - begin : kChunk<N>, end = begin + n;
    begin_chunk(warp, t, nb, s, pair, begin, n);
    fill_tables<true>(warp, t, s, n);
    contract_chunk(warp, t, s, g, n);
    gather_chunk(warp, t, nb, s, pair, begin, end, p);
    while (pair.begin + pair.count(nb.near) <= end && pair.a + 1 < t.n_species)
      pair.next(nb.near, t.n_species);
  }

  const T by_cos = T(0.5) * t.zeta * t.beta * t.angular_factor;
  warp.each(nb.count, [&](int k) {
    const N across = scale(by_cos, nb.near_fc()[k] * nb.inverse_r()[k]);
    const N ux = nb.ux()[k], uy = nb.uy()[k], uz = nb.uz()[k];
    const N x = across * p[3 * k], y = across * p[3 * k + 1], z = across * p[3 * k + 2];
    const N rest = nb.along()[k] - (ux * x + uy * y + uz * z);
    p[3 * k] = rest * ux + x;
    p[3 * k + 1] = rest * uy + y;
    p[3 * k + 2] = rest * uz + z;
  });
}

// out += sign p of a centre and its neighbours, by a block in one step.
// index, p  // [count] and [count, 3]: of the neighbours, as from aev_row_transposed
// out       // [n_atoms, 3]
//
// No other item adds to the same atom: of neighbours that are not distinct the first one of an atom
// adds for all, and what an image of the centre has is what the centre loses.
template <class T, class N>
KINML_DEVICE void add_products(const Block& block, std::int64_t centre, int count, const int* index,
                               const N* p, T sign, bool distinct, T* out) {
  using namespace aev_detail;
  block.each(3 * count + 3, [&](int item) {
    const int k = item / 3, d = item - 3 * k;
    T sum(0);
    if (k < count) {
      if (distinct) {
        sum = result(p[item]);
      } else {
        if (index[k] == centre) return;
        for (int j = 0; j < k; ++j)
          if (index[j] == index[k]) return;
        for (int j = k; j < count; ++j)
          if (index[j] == index[k]) sum += result(p[3 * j + d]);
      }
      out[3 * std::int64_t(index[k]) + d] += sign * sum;
      return;
    }
    for (int j = 0; j < count; ++j)
      if (distinct || index[j] != centre) sum += result(p[3 * j + d]);
    out[3 * centre + d] -= sign * sum;
  });
}

// The virial of a centre, after aev_row_transposed: the sum over its neighbours of p (x) d.
// out  // [3, 3]
template <class T>
KINML_DEVICE void centre_virial(const Warp& warp, const Neighbours<T>& nb, const T* p, T* out) {
  warp.each(9, [&](int x) {
    const T* const u = x % 3 == 0 ? nb.ux() : x % 3 == 1 ? nb.uy() : nb.uz();
    T sum = nb.spoiled ? aev_detail::kNan<T> : T(0);
    for (int k = 0; k < nb.count; ++k) sum += p[3 * k + x / 3] * (nb.r()[k] * u[k]);
    out[x] = sum;
  });
}

}  // namespace kinml::cuda
