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
// A centre's neighbours stand in one list, sorted by species and, within one, those within the
// angular cutoff (near) first. Its triples are numbered, species pair after species pair, and
// worked on kChunk at a time; each chunk is a few steps over (table entry, triple), (sum, triple)
// or (neighbour). All sums have a fixed order.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../core/aev_layout.h"
#include "../core/aev_terms.h"
#include "../core/batches.h"
#include "group.h"
#include "launch.h"

namespace kinml::cuda {

// ---- numbers ------------------------------------------------------------------------------------

namespace aev_detail {

template <class T>
inline constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
// Squares of smaller distances are 0.
template <class T>
inline constexpr T kTiny = std::numeric_limits<T>::min();
// Square of the sine of a smaller angle.
template <class T>
inline constexpr T kSmallest = T(16) * std::numeric_limits<T>::epsilon();

template <class N>
struct Plain {
  using type = N;
};
template <class T>
struct Plain<Dual<T>> {
  using type = T;
};

template <class T>
KINML_HD T scale(T a, T x) {
  return a * x;
}
template <class T>
KINML_HD Dual<T> scale(T a, Dual<T> x) {
  return {a * x.value, a * x.tangent};
}
template <class T>
KINML_HD T root(T x) {
  return std::sqrt(x);
}
template <class T>
KINML_HD Dual<T> root(Dual<T> x) {
  const T r = std::sqrt(x.value);
  return {r, x.tangent / (r + r)};
}
// exp(-x^2)
template <class T>
KINML_HD T gauss(T x) {
  return std::exp(-(x * x));
}
template <class T>
KINML_HD Dual<T> gauss(Dual<T> x) {
  const T g = std::exp(-(x.value * x.value));
  return {g, T(-2) * x.value * g * x.tangent};
}
// x^y
template <class T>
KINML_HD T power(T x, T y) {
  return std::exp(y * std::log(x));
}
template <class T>
KINML_HD Dual<T> power(Dual<T> x, T y) {
  const T p = power(x.value, y);
  return {p, y * p / x.value * x.tangent};
}
// The part that a row consists of.
template <class T>
KINML_HD T result(T x) {
  return x;
}
template <class T>
KINML_HD T result(Dual<T> x) {
  return x.tangent;
}

}  // namespace aev_detail

template <class N>
using PlainOf = typename aev_detail::Plain<N>::type;

// ---- parameters ---------------------------------------------------------------------------------

inline constexpr int kMaxShifts = 64;  // numbers of each list

template <class T>
struct AevNumbers {
  int n_species = 0, n_radial = 0, n_angular = 0, n_sections = 0;
  T radial_eta, radial_root_eta, radial_cutoff, radial_factor;
  T angular_eta, angular_root_eta, angular_cutoff, angular_factor;
  T beta, zeta;
  int integer_zeta = -1;  // zeta when it is a whole number >= 1, else -1

  KINML_HD AevLayout layout() const { return {n_species, n_radial, n_angular, n_sections}; }
};

// Argument of a kernel.
template <class T>
struct AevArguments : AevNumbers<T> {
  T radial_shifts[kMaxShifts];
  T angular_shifts[kMaxShifts];
  T section_cos[kMaxShifts];
  T section_sin[kMaxShifts];
};

template <class T>
AevArguments<T> aev_arguments(const AevParameters& p) {
  const auto length = [](const std::vector<double>& list) {
    if (list.size() > static_cast<std::size_t>(kMaxShifts))
      throw Error("an AEV on a GPU may have up to " + std::to_string(kMaxShifts) +
                  " radial shifts, angular shifts and sections each, not " +
                  std::to_string(list.size()) + ".");
    return static_cast<int>(list.size());
  };
  AevArguments<T> a{};
  a.n_species = static_cast<int>(p.n_species);
  a.n_radial = length(p.radial_shifts);
  a.n_angular = length(p.angular_shifts);
  a.n_sections = length(p.sections);
  a.radial_eta = static_cast<T>(p.radial_eta);
  a.radial_root_eta = static_cast<T>(std::sqrt(p.radial_eta));
  a.radial_cutoff = static_cast<T>(p.radial_cutoff);
  a.radial_factor = static_cast<T>(p.radial_factor);
  a.angular_eta = static_cast<T>(p.angular_eta);
  a.angular_root_eta = static_cast<T>(std::sqrt(p.angular_eta));
  a.angular_cutoff = static_cast<T>(p.angular_cutoff);
  a.angular_factor = static_cast<T>(p.angular_factor);
  a.beta = static_cast<T>(p.beta);
  a.zeta = static_cast<T>(p.zeta);
  const bool whole = p.zeta >= 1 && p.zeta <= 1024 && p.zeta == std::floor(p.zeta);
  a.integer_zeta = whole ? static_cast<int>(p.zeta) : -1;
  for (int l = 0; l < a.n_radial; ++l) a.radial_shifts[l] = static_cast<T>(p.radial_shifts[l]);
  for (int l = 0; l < a.n_angular; ++l) a.angular_shifts[l] = static_cast<T>(p.angular_shifts[l]);
  for (int m = 0; m < a.n_sections; ++m) {
    a.section_cos[m] = static_cast<T>(std::cos(p.sections[m]));
    a.section_sin[m] = static_cast<T>(std::sin(p.sections[m]));
  }
  return a;
}

// The same with the lists in the block's memory, where lanes may read different numbers at once.
template <class T>
struct AevTables : AevNumbers<T> {
  T* radial_shifts;   // [n_radial]
  T* angular_shifts;  // [n_angular]
  T* section_cos;     // [n_sections]
  T* section_sin;     // [n_sections]
};

template <class T>
KINML_HD AevTables<T> take_aev_tables(Pieces& pieces, const AevArguments<T>& a) {
  AevTables<T> t;
  static_cast<AevNumbers<T>&>(t) = a;
  t.radial_shifts = pieces.take<T>(a.n_radial);
  t.angular_shifts = pieces.take<T>(a.n_angular);
  t.section_cos = pieces.take<T>(a.n_sections);
  t.section_sin = pieces.take<T>(a.n_sections);
  return t;
}
template <class T>
KINML_HD std::int64_t aev_tables_bytes(const AevArguments<T>& a) {
  Pieces pieces(nullptr);
  take_aev_tables(pieces, a);
  return pieces.taken();
}
// Takes and fills them: one step of the block.
template <class T>
KINML_DEVICE AevTables<T> aev_tables(const Block& block, const AevArguments<T>& a, Pieces& pieces) {
  const AevTables<T> t = take_aev_tables(pieces, a);
  block.each(kMaxShifts, [&](int i) {
    if (i < t.n_radial) t.radial_shifts[i] = a.radial_shifts[i];
    if (i < t.n_angular) t.angular_shifts[i] = a.angular_shifts[i];
    if (i < t.n_sections) {
      t.section_cos[i] = a.section_cos[i];
      t.section_sin[i] = a.section_sin[i];
    }
  });
  return t;
}

// ---- where neighbours are looked for ------------------------------------------------------------

// Large structures have their atoms sorted by the cells of a grid. A cell is a little wider than
// the longer cutoff, so that neighbours are in the same or an adjacent one for all roundings of the
// coordinates. Cells beyond the numbered ones count as the last.
inline constexpr std::int64_t kCellsOfAxis = std::int64_t(1) << 14;
inline constexpr int kCellRanges = 9;  // of adjacent cells, those along z being one range

KINML_HD double cell_size(double longer_cutoff) {
  return longer_cutoff * 1.001;
}
// NaN: 0.
KINML_HD std::int64_t cell_of(double x, double size) {
  const double place = x / size + static_cast<double>(kCellsOfAxis / 2);
  if (!(place >= 0)) return 0;
  const double last = static_cast<double>(kCellsOfAxis - 1);
  return place < last ? static_cast<std::int64_t>(place) : kCellsOfAxis - 1;
}
// Key of a cell: sorted by structure, x, y, z.
KINML_HD std::int64_t cell_key(std::int64_t structure, std::int64_t cx, std::int64_t cy,
                               std::int64_t cz) {
  return ((structure * kCellsOfAxis + cx) * kCellsOfAxis + cy) * kCellsOfAxis + cz;
}
// First key of the i-th range of a centre in cell (cx, cy, cz), or the key behind its last; both
// are the same where the grid ends.
KINML_HD std::int64_t range_key(std::int64_t structure, std::int64_t cx, std::int64_t cy,
                                std::int64_t cz, int i, bool behind) {
  cx += i / 3 - 1;
  cy += i % 3 - 1;
  if (cx < 0 || cy < 0 || cx >= kCellsOfAxis || cy >= kCellsOfAxis) return 0;
  if (behind) return cell_key(structure, cx, cy, cz + 1 < kCellsOfAxis ? cz + 1 : cz) + 1;
  return cell_key(structure, cx, cy, cz > 0 ? cz - 1 : 0);
}
// How many of the sorted keys are less than key.
KINML_HD std::int64_t lower_bound(const std::int64_t* keys, std::int64_t n, std::int64_t key) {
  std::int64_t low = 0;
  while (n > 0) {
    const std::int64_t half = n / 2;
    if (keys[low + half] < key) {
      low += half + 1;
      n -= half + 1;
    } else {
      n = half;
    }
  }
  return low;
}
// The structure of an atom: offsets[s] <= atom < offsets[s + 1].
KINML_HD std::int64_t structure_of(const std::int64_t* offsets, std::int64_t n_structures,
                                   std::int64_t atom) {
  return lower_bound(offsets, n_structures + 1, atom + 1) - 1;
}

// Atoms [begin, end) of a structure; begin = -1 if there is none or the offsets are wrong.
struct AtomRange {
  std::int64_t begin, end;
};
KINML_HD AtomRange atoms_of(const std::int64_t* offsets, std::int64_t n_structures,
                            std::int64_t n_atoms, std::int64_t structure) {
  if (structure < 0 || structure >= n_structures) return {-1, -1};
  const std::int64_t begin = offsets[structure], end = offsets[structure + 1];
  return begin >= 0 && begin <= end && end <= n_atoms ? AtomRange{begin, end} : AtomRange{-1, -1};
}

struct Candidates {
  std::int64_t begin, end;     // atoms, if there are no cells
  const std::int64_t* sorted;  // atoms in the order of their cells, or null
  const std::int64_t* bounds;  // [2, kCellRanges] where ranges of them begin and end

  static KINML_HD Candidates structure(std::int64_t begin, std::int64_t end) {
    return {begin, end, nullptr, nullptr};
  }
};

// Candidates by cells. keys and sorted are [n_atoms]; bounds [2, kCellRanges] is filled.
template <class T>
KINML_DEVICE Candidates cell_candidates(const Warp& warp, const std::int64_t* keys,
                                        const std::int64_t* sorted, std::int64_t n_atoms,
                                        std::int64_t structure, const T* x /*[3]*/, double size,
                                        std::int64_t* bounds) {
  const std::int64_t cx = cell_of(x[0], size), cy = cell_of(x[1], size), cz = cell_of(x[2], size);
  warp.each(2 * kCellRanges, [&](int i) {
    bounds[i] = lower_bound(keys, n_atoms,
                            range_key(structure, cx, cy, cz, i % kCellRanges, i >= kCellRanges));
  });
  return {0, 0, sorted, bounds};
}

// ---- neighbours ---------------------------------------------------------------------------------

template <class N>
struct Neighbours {
  using T = PlainOf<N>;
  int count = 0;
  int capacity = 0;
  // There were more than the capacity, or an atom without a valid species: all results are NaN.
  bool spoiled = false;
  bool overflown = false;
  bool slopes = false;       // whether there is what only aev_row_transposed needs
  int* index = nullptr;      // [capacity] atom
  int* first = nullptr;      // [n_species + 1] where a species begins
  int* near = nullptr;       // [n_species] so many of a species are near: the first ones
  int* candidate = nullptr;  // [capacity] the same before they are sorted,
  int* key = nullptr;        // [capacity] and by what
  N* planes = nullptr;

  KINML_DEVICE N* plane(int i) const { return planes + i * capacity; }
  KINML_DEVICE N* ux() const { return plane(0); }  // [capacity] unit vector from the centre
  KINML_DEVICE N* uy() const { return plane(1); }
  KINML_DEVICE N* uz() const { return plane(2); }
  KINML_DEVICE N* r() const { return plane(3); }
  KINML_DEVICE N* fc() const { return plane(4); }       // radial cutoff function
  KINML_DEVICE N* near_fc() const { return plane(5); }  // angular
  KINML_DEVICE N* inverse_r() const { return plane(6); }
  KINML_DEVICE N* slope() const { return plane(7); }  // d fc / dr
  KINML_DEVICE N* near_slope() const { return plane(8); }
  KINML_DEVICE N* along() const { return plane(9); }  // a gradient by r
};

// With slopes = false the neighbours are for aev_row only.
template <class N>
KINML_HD Neighbours<N> take_neighbours(Pieces& pieces, int n_species, int capacity,
                                       bool slopes = true) {
  Neighbours<N> n;
  n.capacity = capacity;
  n.slopes = slopes;
  n.planes = pieces.take<N>((slopes ? 10 : 6) * std::int64_t(capacity));
  n.index = pieces.take<int>(capacity);
  n.candidate = pieces.take<int>(capacity);
  n.key = pieces.take<int>(capacity);
  n.first = pieces.take<int>(n_species + 1);
  n.near = pieces.take<int>(n_species);
  return n;
}

template <class N>
struct Displacement {
  N x, y, z;
};

namespace aev_detail {

// The sorted list of neighbours, without their numbers.
template <class T, class N>
KINML_DEVICE void list_neighbours(const Warp& warp, const AevTables<T>& t,
                                  const T* x /*[n_atoms, 3]*/,
                                  const std::int64_t* species /*[n_atoms]*/,
                                  const Candidates& candidates, std::int64_t centre,
                                  Neighbours<N>& n) {
  const T near2 = t.angular_cutoff * t.angular_cutoff;
  const T radial2 = t.radial_cutoff * t.radial_cutoff;
  const T limit = radial2 > near2 ? radial2 : near2;
  const T xi = x[3 * centre], yi = x[3 * centre + 1], zi = x[3 * centre + 2];
  const int n_species = t.n_species, capacity = n.capacity;
  const auto square = [&](std::int64_t atom) {
    const T dx = x[3 * atom] - xi, dy = x[3 * atom + 1] - yi, dz = x[3 * atom + 2] - zi;
    return dx * dx + dy * dy + dz * dz;
  };
  int found = 0;
  const int ranges = candidates.bounds == nullptr ? 1 : kCellRanges;
  for (int range = 0; range < ranges; ++range) {
    std::int64_t begin = candidates.begin, end = candidates.end;
    if (candidates.bounds != nullptr) {
      begin = candidates.bounds[range];
      end = candidates.bounds[kCellRanges + range];
    }
    const auto atom_of = [&](int i) {
      return candidates.sorted == nullptr ? begin + i : candidates.sorted[begin + i];
    };
    const int before = found;
    found += warp.select(
        static_cast<int>(end - begin),
        [&](int i) {
          const std::int64_t atom = atom_of(i);
          return atom != centre && !(square(atom) > limit);
        },
        [&](int i, int place) {
          if (before + place >= capacity) return;
          const std::int64_t atom = atom_of(i), kind = species[atom];
          // NaN counts as a neighbour beyond the angular cutoff: it spoils the vector all the same,
          // and makes no triples. An atom without a valid species is in no list.
          const bool valid = kind >= 0 && kind < n_species;
          n.candidate[before + place] = static_cast<int>(atom);
          n.key[before + place] =
              valid ? 2 * static_cast<int>(kind) + !(square(atom) <= near2) : 2 * n_species;
        });
  }
  n.overflown = found > capacity;
  const int stored = n.overflown ? capacity : found;
  int sorted = 0;
  for (int s = 0; s < n_species; ++s) {
    const int begin = sorted;
    int near = 0;
    for (int far = 0; far < 2; ++far) {
      const int before = sorted;
      sorted += warp.select(
          stored, [&](int i) { return n.key[i] == 2 * s + far; },
          [&](int i, int place) { n.index[before + place] = n.candidate[i]; });
      if (far == 0) near = sorted - begin;
    }
    warp.each(1, [&](int) {
      n.first[s] = begin;
      n.near[s] = near;
    });
  }
  const int count = sorted;
  warp.each(1, [&](int) { n.first[n_species] = count; });
  n.count = count;
  n.spoiled = n.overflown || count != stored || species[centre] < 0 ||
              species[centre] >= n_species ||
              // By cells, an atom whose place is not a number has no other one to spoil.
              (candidates.bounds != nullptr && !(xi == xi && yi == yi && zi == zi));
}

// Fills the planes of a list; displacement(k) from the centre to its k-th neighbour.
template <class T, class N, class F>
KINML_DEVICE void measure_neighbours(const Warp& warp, const AevTables<T>& t,
                                     const Neighbours<N>& n, const F& displacement) {
  const T radial_inverse = T(1) / t.radial_cutoff, near_inverse = T(1) / t.angular_cutoff;
  warp.each(n.count, [&](int k) {
    const N half(T(0.5)), half_pi(T(1.57079632679489661923)), zero(T(0));
    const Displacement<N> d = displacement(k);
    const N r2 = d.x * d.x + d.y * d.y + d.z * d.z;
    // Coincident atoms have no direction: their unit vector and its derivatives are zero. A
    // distance that is not a number stays one.
    const bool coincident = kTiny<T> >= value_of(r2);
    const N safe = root(coincident ? N(T(1)) : r2);
    const N inverse = coincident ? zero : N(T(1)) / safe;
    const N r = coincident ? zero : safe;
    n.ux()[k] = d.x * inverse;
    n.uy()[k] = d.y * inverse;
    n.uz()[k] = d.z * inverse;
    n.r()[k] = r;
    const Cutoff<N> fc = cutoff_function(r, N(radial_inverse), half_pi, half);
    const Cutoff<N> near = cutoff_function(r, N(near_inverse), half_pi, half);
    const bool inside = t.radial_cutoff >= value_of(r), is_near = t.angular_cutoff >= value_of(r);
    n.fc()[k] = inside ? fc.value : zero;
    n.near_fc()[k] = is_near ? near.value : zero;
    if (n.slopes) {
      n.inverse_r()[k] = inverse;
      n.slope()[k] = inside ? fc.slope : zero;
      n.near_slope()[k] = is_near ? near.slope : zero;
    }
  });
}

template <class T>
KINML_DEVICE T difference(const T* x, const T*, std::int64_t at, std::int64_t from, const T*) {
  return x[at] - x[from];
}
template <class T>
KINML_DEVICE Dual<T> difference(const T* x, const T* v, std::int64_t at, std::int64_t from,
                                const Dual<T>*) {
  return {x[at] - x[from], v[at] - v[from]};
}

}  // namespace aev_detail

// direction  // [n_atoms, 3] v, only for N = Dual<T>
// The neighbours are in the order of the species, of near and far, and of the candidates.
template <class T, class N>
KINML_DEVICE void find_neighbours(const Warp& warp, const AevTables<T>& t,
                                  const T* x /*[n_atoms, 3]*/, const T* direction,
                                  const std::int64_t* species /*[n_atoms]*/,
                                  const Candidates& candidates, std::int64_t centre,
                                  Neighbours<N>& n) {
  aev_detail::list_neighbours(warp, t, x, species, candidates, centre, n);
  aev_detail::measure_neighbours(warp, t, n, [&](int k) {
    const std::int64_t at = 3 * std::int64_t(n.index[k]), from = 3 * centre;
    const N* const kind = nullptr;
    return Displacement<N>{aev_detail::difference(x, direction, at, from, kind),
                           aev_detail::difference(x, direction, at + 1, from + 1, kind),
                           aev_detail::difference(x, direction, at + 2, from + 2, kind)};
  });
}

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

// Calls f(t, other) for the triples t, begin <= t < end, that neighbour `own` of its species
// belongs to; of_a says whether this is the first species of the pair.
template <class F>
KINML_HD void for_own_triples(int n_a, int n_b, bool same, bool of_a, int own, int begin, int end,
                              const F& f) {
  const int n = n_a > n_b ? n_a : n_b, m = n_a > n_b ? n_b : n_a;
  const bool of_longer = of_a == (n_a >= n_b);
  for (int s = begin / n; s * n < end; ++s) {
    // Places of the row: every m-th from the first one on; of one species two.
    int i = own, step = m, visits = 1;
    if (same) {
      step = n - s - 1;
      visits = 2;
    } else if (!of_longer) {
      i = own >= s ? own - s : own - s + m;
      visits = (n - i + m - 1) / m;
    }
    int other = same || of_longer ? (own + s + same) % m : i;
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
    const N safe = root(regular ? square : one);
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
      const N e = gauss(scale(t.angular_root_eta, s.mean()[i] - N(t.angular_shifts[row])));
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
KINML_DEVICE int total_triples(const AevTables<T>& t, const Neighbours<N>& nb) {
  int near = 0;
  for (int a = 0; a < t.n_species; ++a) near += nb.near[a];
  return count_triples(near, near, true);
}

}  // namespace aev_detail

// ---- rows ---------------------------------------------------------------------------------------

// out  // [D], numbers `stride` apart: a_i, or J_i v if N = Dual<T>
template <class T, class N>
KINML_DEVICE void aev_row(const Warp& warp, const AevTables<T>& t, const Neighbours<N>& nb,
                          const TripleScratch<N>& s, T* out, std::int64_t stride = 1) {
  using namespace aev_detail;
  constexpr int kRow = kChunkStride<N>;
  const int n_radial = t.n_radial, n_angular = t.n_angular, n_sections = t.n_sections;
  const T start = nb.spoiled ? kNan<T> : T(0);
  warp.each(t.layout().length(), [&](int d) { out[d * stride] = start; });
  if (nb.spoiled) return;

  radial_part(
      warp, t, nb, s,
      [&](int k, int l) {
        return nb.fc()[k] * gauss(scale(t.radial_root_eta, nb.r()[k] - N(t.radial_shifts[l])));
      },
      [&](int base, int n) {
        warp.each(t.layout().radial_length(), [&](int d) {
          const int a = d / n_radial;
          const N* const row = s.tables + (d - a * n_radial) * n;
          const int begin = nb.first[a] > base ? nb.first[a] - base : 0;
          const int end = nb.first[a + 1] < base + n ? nb.first[a + 1] - base : n;
          T sum(0);
          for (int k = begin; k < end; ++k) sum += result(row[k]);
          if (begin < end) out[d * stride] += t.radial_factor * sum;
        });
      });

  const int total = total_triples(t, nb), block_length = n_angular * n_sections;
  PairCursor pair;
  for (int begin = 0; begin < total; begin += kChunk<N>) {
    const int n = total - begin < kChunk<N> ? total - begin : kChunk<N>, end = begin + n;
    begin_chunk(warp, t, nb, s, pair, begin, n);
    fill_tables<false>(warp, t, s, n);
    for (;;) {
      const int pair_end = pair.begin + pair.count(nb.near);
      const int low = pair.begin > begin ? pair.begin - begin : 0;
      const int high = pair_end < end ? pair_end - begin : n;
      if (low < high) {
        T* const block = out + t.layout().angular_begin(pair.a, pair.b) * stride;
        warp.each(block_length, [&](int item) {
          const int l = item / n_sections, m = item - l * n_sections;
          const N *const e = s.tables + l * kRow, *const p = s.tables + (n_angular + m) * kRow;
          T sum(0);
          for (int i = low; i < high; ++i) sum += result(e[i] * p[i]);
          block[item * stride] += sum;
        });
      }
      if (pair_end >= end) break;
      pair.next(nb.near, t.n_species);
    }
  }
}

// g  // [D]
// p  // [count, 3] gradient of g . a_i with respect to the displacement of each neighbour from the
//       centre, whose own is minus the sum of them
template <class T, class N>
KINML_DEVICE void aev_row_transposed(const Warp& warp, const AevTables<T>& t,
                                     const Neighbours<N>& nb, const TripleScratch<N>& s, const T* g,
                                     N* p) {
  using namespace aev_detail;
  constexpr int kRow = kChunkStride<N>;
  if (nb.spoiled) {
    warp.each(3 * nb.count, [&](int i) { p[i] = N(kNan<T>) * N(kNan<T>); });
    return;
  }
  const int n_radial = t.n_radial, n_angular = t.n_angular, n_sections = t.n_sections;
  const int n_species = t.n_species;
  warp.each(nb.count,
            [&](int k) { nb.along()[k] = p[3 * k] = p[3 * k + 1] = p[3 * k + 2] = N(T(0)); });

  radial_part(
      warp, t, nb, s,
      [&](int k, int l) {
        int a = 0;
        while (k >= nb.first[a + 1]) ++a;
        const N x = nb.r()[k] - N(t.radial_shifts[l]);
        const N e = gauss(scale(t.radial_root_eta, x));
        return scale(g[a * n_radial + l],
                     e * (nb.slope()[k] + scale(T(-2) * t.radial_eta, x) * nb.fc()[k]));
      },
      [&](int base, int n) {
        warp.each(n, [&](int k) {
          N sum(T(0));
          for (int l = 0; l < n_radial; ++l) sum += s.tables[l * n + k];
          nb.along()[base + k] = scale(t.radial_factor, sum);
        });
      });

  int near = 0;
  for (int a = 0; a < n_species; ++a) near += nb.near[a];
  const int total = count_triples(near, near, true);
  N* const sections = s.tables + n_angular * kRow;
  N* const slopes = sections + n_sections * kRow;
  N* const by_slope = slopes + n_sections * kRow;
  PairCursor pair;
  for (int begin = 0; begin < total; begin += kChunk<N>) {
    const int n = total - begin < kChunk<N> ? total - begin : kChunk<N>, end = begin + n;
    begin_chunk(warp, t, nb, s, pair, begin, n);
    fill_tables<true>(warp, t, s, n);
    // For each triple g . (E P) and g . (E P') by l, then summed; so is g . ((R - shift) E P).
    each_of_table(warp, n_angular, n, [&](int l, int i) {
      const T* const gl = g + s.block()[i] + l * n_sections;
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
    // Near neighbours add what their triples have; those that go on in the next chunk as well.
    warp.each(near, [&](int place) {
      int a = 0;
      while (place >= nb.near[a]) place -= nb.near[a++];
      const int own = nb.first[a] + place;
      N sum(T(0)), by_mean(T(0)), x(T(0)), y(T(0)), z(T(0));
      for (PairCursor c = pair; c.a < n_species && c.begin < end; c.next(nb.near, n_species)) {
        if (c.a != a && c.b != a) continue;
        const int count = c.count(nb.near);
        const int low = c.begin > begin ? 0 : begin - c.begin;
        const int high = c.begin + count < end ? count : end - c.begin;
        if (low >= high) continue;
        const int shift = c.begin - begin, others = nb.first[c.a == a ? c.b : c.a];
        for_own_triples(nb.near[c.a], nb.near[c.b], c.a == c.b, c.a == a, place, low, high,
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
      nb.along()[own] += scale(t.angular_factor, nb.near_slope()[own] * sum) -
                         scale(t.angular_factor * t.angular_eta, nb.near_fc()[own] * by_mean);
      p[3 * own] += x;
      p[3 * own + 1] += y;
      p[3 * own + 2] += z;
    });
    while (pair.begin + pair.count(nb.near) <= end && pair.a + 1 < n_species)
      pair.next(nb.near, n_species);
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

}  // namespace kinml::cuda
