// Pairs: the one seam between finding the neighbours of a centre and all that is computed from
// them. For files that are compiled once per instruction set.
//
//   AtomPlaces, ImagePlaces, GivenPairs   the ways to know them. for_each calls back with the
//                    candidates of a centre: atoms of a molecule or images of atoms, in the cells of
//                    a grid, of which a small structure has one, so that all are tried; or pairs
//                    that were given. atom and displacement say what a candidate is
//   find_pairs       candidates within the cutoffs, sorted by species -> Pairs
//
// Everything behind reads only Pairs: unit vector, distance, index of the neighbour, and where the
// pairs of a centre stand. Neighbours need not be distinct: what is computed for a pair is added to
// its atom.
#pragma once

#include <cstdint>
#include <limits>

#include "aev_kernels.h"
#include "lanes.h"

namespace kinml {
inline namespace KINML_ISA {

// Centre after centre, in segments by the neighbour's species; of each segment those within the
// angular cutoff come first.
template <class T, bool kDual>
struct Pairs {
  Index n_species;
  Planes<T> ux, uy, uz;  // [n_pairs] unit vector from the centre
  Planes<T> r;           // [n_pairs] distance
  Planes<T> inverse_r;   // [n_pairs] and 1 / distance, 0 for coincident atoms
  std::int32_t* index;   // [n_pairs] atom
  std::int32_t* first;   // [n_centres * n_species + 1] first pair of each segment
  std::int32_t* near;    // [n_centres * n_species] so many pairs at its front are angular ones
  // For one centre while its pairs are found:
  std::int32_t* candidate;  // [max_candidates] atoms
  std::int32_t* key;        // [max_candidates] 2 species, + 1 beyond the angular cutoff
  std::int32_t* counts;     // [2 n_species + 1]

  Pairs(const cpu::Environment<T>& e, Index species, Arena<T>& arena) : n_species(species) {
    const Index room = e.pair_room();
    for (Planes<T>* p : {&ux, &uy, &uz, &r, &inverse_r}) *p = arena.take(room);
    index = arena.integers(room);
    first = arena.integers(e.n_centres() * n_species + 1);
    near = arena.integers(e.n_centres() * n_species);
    candidate = arena.integers(e.structure.max_candidates);
    key = arena.integers(e.structure.max_candidates);
    counts = arena.integers(2 * n_species + 1);
  }

  // Of the pairs of a centre with neighbours of species a. begin(c, n_species) is begin(c + 1, 0).
  KINML_HD Index begin(Index centre, Index a) const { return first[centre * n_species + a]; }
  KINML_HD Index end(Index centre, Index a) const { return begin(centre, a + 1); }
  KINML_HD Index near_count(Index centre, Index a) const { return near[centre * n_species + a]; }
};

// Of an atom from a centre; with velocities in place of coordinates, its tangent.
template <class T>
struct Displacement {
  T x, y, z;
};
template <class T>
KINML_HD Displacement<T> displacement(const T* coordinates, Index centre, Index atom) {
  const T *const from = coordinates + 3 * centre, *const to = coordinates + 3 * atom;
  return {to[0] - from[0], to[1] - from[1], to[2] - from[2]};
}

// Calls f(place) for the places in the cells around a centre, its own among them.
template <class T, class F>
KINML_HD void for_places(const cpu::StructureView<T>& s, Index centre, const F& f) {
  const std::int32_t cell = s.place_cell[centre];
  const int cz = cell % s.nz, cy = cell / s.nz % s.ny, cx = cell / s.nz / s.ny;
  const int z0 = cz > 0 ? cz - 1 : 0, z1 = cz + 1 < s.nz ? cz + 1 : s.nz - 1;
  for (int ix = cx > 0 ? cx - 1 : 0; ix <= cx + 1 && ix < s.nx; ++ix)
    for (int iy = cy > 0 ? cy - 1 : 0; iy <= cy + 1 && iy < s.ny; ++iy) {
      const std::int32_t* row = s.cell_starts + (Index(ix) * s.ny + iy) * s.nz;
      for (std::int32_t p = row[z0]; p < row[z1 + 1]; ++p) f(s.cell_places[p]);
    }
}

// The atoms of a molecule.
template <class T>
struct AtomPlaces {
  const cpu::StructureView<T>& s;

  template <class F>
  KINML_HD void for_each(Index centre, const F& f) const {
    for_places(s, centre, f);
  }
  KINML_HD std::int32_t atom(Index, std::int32_t place) const { return place; }
  KINML_HD bool other(Index centre, std::int32_t place) const { return place != centre; }
  KINML_HD Displacement<T> from(Index centre, std::int32_t place) const {
    return displacement(s.coordinates, centre, place);
  }
};

// Atoms with their images, one of which may be a neighbour of its own atom.
template <class T>
struct ImagePlaces {
  const cpu::StructureView<T>& s;

  template <class F>
  KINML_HD void for_each(Index centre, const F& f) const {
    for_places(s, centre, f);
  }
  KINML_HD std::int32_t atom(Index, std::int32_t place) const { return s.place_atoms[place]; }
  KINML_HD bool other(Index centre, std::int32_t place) const { return place != centre; }
  KINML_HD Displacement<T> from(Index centre, std::int32_t place) const {
    const Displacement<double> d = displacement(s.places, centre, place);
    return {static_cast<T>(d.x), static_cast<T>(d.y), static_cast<T>(d.z)};
  }
};

// Pairs that were given, by their numbers among those of the centre.
template <class T>
struct GivenPairs {
  const cpu::StructureView<T>& s;

  template <class F>
  KINML_HD void for_each(Index centre, const F& f) const {
    const Index n = s.pair_starts[centre + 1] - s.pair_starts[centre];
    for (Index p = 0; p < n; ++p) f(static_cast<std::int32_t>(p));
  }
  KINML_HD std::int32_t atom(Index centre, std::int32_t p) const {
    return static_cast<std::int32_t>(s.neighbours[s.pair_starts[centre] + p] - s.first_atom);
  }
  KINML_HD bool other(Index, std::int32_t) const { return true; }
  KINML_HD Displacement<T> from(Index centre, std::int32_t p) const {
    const Index there = atom(centre, p);
    if (s.shifts == nullptr) return displacement(s.coordinates, centre, there);
    const std::int64_t* const n = s.shifts + 3 * (s.pair_starts[centre] + p);
    const auto along = [&](int d) __attribute__((always_inline)) {
      double sum = double(s.coordinates[3 * there + d]) - double(s.coordinates[3 * centre + d]);
      for (int k = 0; k < 3; ++k)
        if (n[k] != 0) sum += double(n[k]) * s.cell[3 * k + d];
      return static_cast<T>(sum);
    };
    return {along(0), along(1), along(2)};
  }
};

// The pairs of one centre, whose first segment is given, from `total` on: indices, and
// displacements in place of the unit vectors. Returns where they end.
template <class T, bool kDual, class Source>
std::int32_t gather(const cpu::AevTables<T>& tables, const cpu::Environment<T>& e,
                    const Source& source, Index centre, Index segment, std::int32_t total,
                    const Pairs<T, kDual>& pairs) {
  const cpu::StructureView<T>& s = e.structure;
  const T near2 = tables.angular_cutoff * tables.angular_cutoff;
  const T radial2 = tables.radial_cutoff * tables.radial_cutoff;
  const T limit = radial2 > near2 ? radial2 : near2;
  std::int32_t* const next = pairs.counts;
  for (Index a = 0; a <= 2 * pairs.n_species; ++a) next[a] = 0;
  std::int32_t found = 0;
  source.for_each(centre, [&](std::int32_t candidate) __attribute__((always_inline)) {
    const Displacement<T> d = source.from(centre, candidate);
    const T r2 = d.x * d.x + d.y * d.y + d.z * d.z;
    // Without a branch that depends on the distance. NaN counts as a neighbour, beyond the
    // angular cutoff: it spoils the vector all the same, and makes no triples.
    const std::int32_t key =
        static_cast<std::int32_t>(2 * s.species[source.atom(centre, candidate)]) +
        static_cast<std::int32_t>(!(r2 <= near2));
    const std::int32_t taken =
        static_cast<std::int32_t>(!(r2 > limit) & source.other(centre, candidate));
    pairs.candidate[found] = candidate;
    pairs.key[found] = key;
    next[key + 1] += taken;
    found += taken;
  });
  for (Index a = 0; a < pairs.n_species; ++a) {
    pairs.near[segment + a] = next[2 * a + 1];
    pairs.first[segment + a] = total + next[2 * a];
    next[2 * a + 1] += next[2 * a];
    next[2 * a + 2] += next[2 * a + 1];
  }
  for (std::int32_t p = 0; p < found; ++p) {
    const std::int32_t candidate = pairs.candidate[p], k = total + next[pairs.key[p]]++;
    const std::int32_t atom = source.atom(centre, candidate);
    pairs.index[k] = atom;
    const Displacement<T> d = source.from(centre, candidate);
    pairs.ux.value[k] = d.x;
    pairs.uy.value[k] = d.y;
    pairs.uz.value[k] = d.z;
    if constexpr (kDual) {
      const Displacement<T> moving = displacement(e.direction, centre, atom);
      pairs.ux.tangent[k] = moving.x;
      pairs.uy.tangent[k] = moving.y;
      pairs.uz.tangent[k] = moving.z;
    }
  }
  return total + found;
}

// From displacements to unit vectors and distances.
template <class T, bool kDual>
void normalise(const Pairs<T, kDual>& pairs, Index n_pairs) {
  using La = Lanes<T, kDual>;
  using V = typename La::V;
  using L = typename La::L;
  constexpr int W = kNativeWidth<T>;
  const L one = La::plain(V(T(1))), zero = La::plain(V(T(0)));
  const V tiny(std::numeric_limits<T>::min());
  for (Planes<T> p : {pairs.ux, pairs.uy, pairs.uz}) La::store(p + n_pairs, zero);
  for (Index k = 0; k < n_pairs; k += W) {
    const L x = La::load(pairs.ux + k), y = La::load(pairs.uy + k), z = La::load(pairs.uz + k);
    const L r2 = x * x + y * y + z * z;
    // Coincident atoms have no direction: their unit vector and its derivatives are zero. A
    // distance that is not a number stays one.
    const V square = La::value(r2);
    const L safe = sqrt(La::choose(tiny, square, one, r2));
    const L inverse = La::choose(tiny, square, zero, one / safe);
    La::store(pairs.ux + k, x * inverse);
    La::store(pairs.uy + k, y * inverse);
    La::store(pairs.uz + k, z * inverse);
    La::store(pairs.r + k, La::choose(tiny, square, zero, safe));
    La::store(pairs.inverse_r + k, inverse);
  }
}

// The pairs of all centres of an environment; returns their number.
template <class T, bool kDual>
Index find_pairs(const cpu::AevTables<T>& tables, const cpu::Environment<T>& e,
                 const Pairs<T, kDual>& pairs) {
  std::int32_t total = 0;
  const auto gather_all = [&](const auto& source) {
    for (Index c = 0; c < e.n_centres(); ++c)
      total = gather(tables, e, source, e.begin + c, c * pairs.n_species, total, pairs);
  };
  if (e.structure.pair_starts != nullptr)
    gather_all(GivenPairs<T>{e.structure});
  else if (e.structure.places != nullptr)
    gather_all(ImagePlaces<T>{e.structure});
  else
    gather_all(AtomPlaces<T>{e.structure});
  pairs.first[e.n_centres() * pairs.n_species] = total;
  normalise(pairs, total);
  return total;
}

}  // namespace KINML_ISA
}  // namespace kinml
