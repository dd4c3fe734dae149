// The one seam between finding pairs of atoms and all that is computed from them. Whatever finds
// the neighbours of a centre (all atoms of its structure, the cells of a grid, their images, pairs
// that were given) ends in a list Neighbours: of each the unit vector, the distance and the index.
// All behind reads only these.
//
// A finder gives Candidates; displacements are formed there and in displacement() alone.
//
// Neighbours of a centre are distinct atoms, and differ from it, only if System::distinct(). What
// would rest on it asks for that: add_products (aev_group.h), GatherKernel, JacobianKernel.
#pragma once

#include <cstdint>

#include "../core/aev_terms.h"
#include "../core/system.h"
#include "aev_tables.h"
#include "cells.h"
#include "group.h"
#include "images.h"

namespace kinml::cuda {

// ---- where neighbours are looked for ------------------------------------------------------------

// Atoms [begin, end) of a structure; begin = -1 if the structure does not exist or the offsets are
// wrong.
struct AtomRange {
  std::int64_t begin, end;
};
template <class T>
KINML_HD AtomRange atoms_of(const System<T>& system, std::int64_t structure) {
  if (structure < 0 || structure >= system.n_structures) return {-1, -1};
  const std::int64_t begin = system.offsets[structure], end = system.offsets[structure + 1];
  return begin >= 0 && begin <= end && end <= system.n_atoms ? AtomRange{begin, end}
                                                             : AtomRange{-1, -1};
}

// Where the neighbours of a centre are looked for: candidates have numbers, which here are atoms.
// What is written for any candidates compiles to what molecules need with these.
struct AtomCandidates {
  std::int64_t begin, end;               // atoms, if there are no cells
  const std::int64_t* sorted = nullptr;  // atoms in the order of their cells, or null
  const std::int64_t* bounds = nullptr;  // [2, kCellRanges] where ranges of them begin and end

  static KINML_HD bool plain() { return true; }
  static KINML_HD bool given() { return false; }
  static KINML_HD std::int64_t atom(std::int64_t number) { return number; }
  static KINML_HD bool exists(std::int64_t) { return true; }
  static KINML_HD std::int64_t count(std::int64_t atoms) { return atoms; }
};

// The same, or images of atoms, or pairs that were given.
struct Candidates : AtomCandidates {
  // Images of the atoms [begin, end): number (atom - begin) * images + image.
  const ImageCell* cell = nullptr;

  // Given pairs of the centre, by their numbers from `pair` on.
  const std::int64_t* neighbours = nullptr;
  const std::int64_t* shifts = nullptr;  // of all pairs, with the vectors of the cell; or null
  const double* vectors = nullptr;
  std::int64_t pair = 0, n_pairs = 0;

  KINML_HD bool given() const { return neighbours != nullptr; }
  KINML_HD bool plain() const { return cell == nullptr && !given(); }
  KINML_HD std::int64_t atom(std::int64_t number) const {
    if (given()) return neighbours[pair + number];
    return cell == nullptr ? number : begin + number / cell->images;
  }
  // A given pair may be of an atom that the structure does not have.
  KINML_HD bool exists(std::int64_t number) const {
    if (!given()) return true;
    const std::int64_t found = n_pairs < 0 ? -1 : atom(number);
    return found >= begin && found < end;
  }
  // Of so many atoms.
  KINML_HD std::int64_t count(std::int64_t atoms) const {
    if (given()) return n_pairs < 0 ? 1 : n_pairs;
    return cell == nullptr ? atoms : atoms * cell->images;
  }
};

// The candidates of a centre, without cells of a grid.
// images  // [n_structures], or null
template <class T>
KINML_DEVICE Candidates candidates_of(const System<T>& system, const ImageCell* images,
                                      std::int64_t structure, const AtomRange& range,
                                      std::int64_t centre) {
  Candidates result{{range.begin, range.end}};
  if (range.begin < 0) return result;
  if (system.pair_starts != nullptr) {
    const std::int64_t begin = system.pair_starts[centre], end = system.pair_starts[centre + 1];
    result.neighbours = system.neighbours;
    result.pair = begin;
    // Starts that are wrong: a pair that no structure has.
    const bool valid = begin >= 0 && begin <= end && end <= system.n_pairs;
    result.n_pairs = valid ? end - begin : -1;
    if (system.is_periodic(structure) && system.shifts != nullptr) {
      result.shifts = system.shifts;
      result.vectors = system.cells + 9 * structure;
    }
  } else if (images != nullptr && system.is_periodic(structure)) {
    result.cell = images + structure;
  }
  return result;
}

// ---- displacements ------------------------------------------------------------------------------

template <class N>
struct Displacement {
  N x, y, z;
};

// Atoms of a structure around which and as which neighbours are found.
template <class T>
struct Atoms {
  const T* coordinates;            // [n_atoms, 3]
  const T* direction;              // [n_atoms, 3] v; read for N = Dual<T>
  const std::int64_t* species;     // [n_atoms]
  const double* strain = nullptr;  // [3, 3] by which displacements move besides, or null
};

template <class T>
KINML_DEVICE Displacement<T> place_of(const T* x, std::int64_t atom) {
  return {x[3 * atom], x[3 * atom + 1], x[3 * atom + 2]};
}
// Of an atom from a place.
template <class T>
KINML_DEVICE Displacement<T> displacement(const T* x, const Displacement<T>& from,
                                          std::int64_t atom) {
  return {x[3 * atom] - from.x, x[3 * atom + 1] - from.y, x[3 * atom + 2] - from.z};
}
// To d [3], the difference of the places of an atom and a centre, what the cell of a candidate adds;
// whether that is anything.
KINML_HD bool add_cell(const Candidates& candidates, std::int64_t number, double* d) {
  if (candidates.cell != nullptr) {
    const ImageCell& cell = *candidates.cell;
    if (!cell.valid) d[0] = aev_detail::kNan<double>;
    return cell.translate(static_cast<int>(number % cell.images), d);
  }
  for (int k = 0; candidates.shifts != nullptr && k < 3; ++k) {
    const std::int64_t n = candidates.shifts[3 * (candidates.pair + number) + k];
    for (int c = 0; n != 0 && c < 3; ++c)
      d[c] += static_cast<double>(n) * candidates.vectors[3 * k + c];
  }
  return true;
}

// Of a candidate from a centre at `from`; for an image or a given pair in float64 up to the end.
// `other`: whether it is anything but the centre itself.
template <class T>
KINML_DEVICE Displacement<T> displacement(const T* x, const AtomCandidates&, std::int64_t centre,
                                          const Displacement<T>& from, std::int64_t number,
                                          bool& other) {
  other = number != centre;
  return displacement(x, from, number);
}
template <class T>
KINML_DEVICE Displacement<T> displacement(const T* x, const Candidates& candidates,
                                          std::int64_t centre, const Displacement<T>& from,
                                          std::int64_t number, bool& other) {
  const std::int64_t atom = candidates.atom(number);
  other = atom != centre;
  if (candidates.plain()) return displacement(x, from, atom);
  double d[3] = {static_cast<double>(x[3 * atom]) - static_cast<double>(from.x),
                 static_cast<double>(x[3 * atom + 1]) - static_cast<double>(from.y),
                 static_cast<double>(x[3 * atom + 2]) - static_cast<double>(from.z)};
  other = add_cell(candidates, number, d) || other;
  return {static_cast<T>(d[0]), static_cast<T>(d[1]), static_cast<T>(d[2])};
}
template <class T>
KINML_DEVICE T square(const Displacement<T>& d) {
  return d.x * d.x + d.y * d.y + d.z * d.z;
}

// Candidates by cells for a centre at `place`; bounds [2, kCellRanges] is filled.
template <class T>
KINML_DEVICE AtomCandidates cell_candidates(const Warp& warp, const Cells& cells,
                                            std::int64_t n_atoms, std::int64_t structure,
                                            const Displacement<T>& place, std::int64_t* bounds) {
  const std::int64_t cx = cell_of(place.x, cells.size), cy = cell_of(place.y, cells.size),
                     cz = cell_of(place.z, cells.size);
  warp.each(2 * kCellRanges, [&](int i) {
    bounds[i] = lower_bound(cells.keys, n_atoms,
                            range_key(structure, cx, cy, cz, i % kCellRanges, i >= kCellRanges));
  });
  return {0, 0, cells.atoms, bounds};
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
  int* number = nullptr;     // [capacity] of the candidate; index itself where these are atoms
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
KINML_HD Neighbours<N> take_neighbours(Pieces& pieces, int n_species, int capacity, bool distinct,
                                       bool slopes = true) {
  Neighbours<N> n;
  n.capacity = capacity;
  n.slopes = slopes;
  n.planes = pieces.take<N>((slopes ? 10 : 6) * std::int64_t(capacity));
  n.index = pieces.take<int>(capacity);
  n.number = distinct ? n.index : pieces.take<int>(capacity);
  n.candidate = pieces.take<int>(capacity);
  n.key = pieces.take<int>(capacity);
  n.first = pieces.take<int>(n_species + 1);
  n.near = pieces.take<int>(n_species);
  return n;
}

namespace pairs_detail {

// Candidates within the longer cutoff, and by what they are sorted; returns how many there are,
// also beyond the capacity.
template <class T, class N, class C>
KINML_DEVICE int collect(const Warp& warp, const AevTables<T>& t, const Atoms<T>& atoms,
                         const C& candidates, std::int64_t centre, const Neighbours<N>& n) {
  const T near2 = t.angular_cutoff * t.angular_cutoff;
  const T radial2 = t.radial_cutoff * t.radial_cutoff;
  const T limit = radial2 > near2 ? radial2 : near2;
  const Displacement<T> place = place_of(atoms.coordinates, centre);
  const auto square_to = [&](std::int64_t number, bool& other) {
    return square(displacement(atoms.coordinates, candidates, centre, place, number, other));
  };
  int found = 0;
  const int ranges = candidates.bounds == nullptr ? 1 : kCellRanges;
  for (int range = 0; range < ranges; ++range) {
    std::int64_t begin = candidates.begin, end = candidates.end;
    if (candidates.bounds != nullptr) {
      begin = candidates.bounds[range];
      end = candidates.bounds[kCellRanges + range];
    }
    const auto number_of = [&](int i) -> std::int64_t {
      if (!candidates.plain()) return i;
      return candidates.sorted == nullptr ? begin + i : candidates.sorted[begin + i];
    };
    const int before = found;
    found += warp.select(
        static_cast<int>(candidates.count(end - begin)),
        [&](int i) {
          const std::int64_t number = number_of(i);
          // What is no atom of the structure is in no list, which spoils all.
          if (!candidates.exists(number)) return true;
          bool other;
          const T r2 = square_to(number, other);
          return other && !(r2 > limit);
        },
        [&](int i, int k) {
          if (before + k >= n.capacity) return;
          const std::int64_t number = number_of(i);
          n.candidate[before + k] = static_cast<int>(number);
          n.key[before + k] = 2 * t.n_species;
          if (!candidates.exists(number)) return;
          const std::int64_t kind = atoms.species[candidates.atom(number)];
          // NaN counts as a neighbour beyond the angular cutoff: it spoils the vector all the same,
          // and makes no triples. An atom without a valid species is in no list.
          bool other;
          if (kind >= 0 && kind < t.n_species)
            n.key[before + k] = 2 * static_cast<int>(kind) + !(square_to(number, other) <= near2);
        });
  }
  return found;
}

// The first `stored` candidates sorted by species, near ones first; returns how many have a valid
// species.
template <class N>
KINML_DEVICE int sort_by_species(const Warp& warp, int n_species, int stored,
                                 const Neighbours<N>& n) {
  int sorted = 0;
  for (int s = 0; s < n_species; ++s) {
    const int begin = sorted;
    int near = 0;
    for (int far = 0; far < 2; ++far) {
      const int before = sorted;
      sorted += warp.select(
          stored, [&](int i) { return n.key[i] == 2 * s + far; },
          [&](int i, int k) { n.number[before + k] = n.candidate[i]; });
      if (far == 0) near = sorted - begin;
    }
    warp.each(1, [&](int) {
      n.first[s] = begin;
      n.near[s] = near;
    });
  }
  const int count = sorted;
  warp.each(1, [&](int) { n.first[n_species] = count; });
  return count;
}

template <class T, class C>
KINML_DEVICE Displacement<T> displacement_as(const Atoms<T>& atoms, const C& candidates,
                                             std::int64_t centre, std::int64_t number, const T*) {
  bool other;
  return displacement(atoms.coordinates, candidates, centre, place_of(atoms.coordinates, centre),
                      number, other);
}
template <class T, class C>
KINML_DEVICE Displacement<Dual<T>> displacement_as(const Atoms<T>& atoms, const C& candidates,
                                                   std::int64_t centre, std::int64_t number,
                                                   const Dual<T>*) {
  const Displacement<T> x =
      displacement_as(atoms, candidates, centre, number, static_cast<const T*>(nullptr));
  Displacement<T> v =
      displacement(atoms.direction, place_of(atoms.direction, centre), candidates.atom(number));
  if (atoms.strain != nullptr) {
    const auto along = [&](int d) {
      const double* const e = atoms.strain + 3 * d;
      return static_cast<T>(e[0]) * x.x + static_cast<T>(e[1]) * x.y + static_cast<T>(e[2]) * x.z;
    };
    v.x += along(0);
    v.y += along(1);
    v.z += along(2);
  }
  return {{x.x, v.x}, {x.y, v.y}, {x.z, v.z}};
}

}  // namespace pairs_detail

// The sorted list of neighbours, without their numbers: in the order of the species, of near and
// far, and of the candidates.
template <class T, class N, class C>
KINML_DEVICE void list_neighbours(const Warp& warp, const AevTables<T>& t, const Atoms<T>& atoms,
                                  const C& candidates, std::int64_t centre, Neighbours<N>& n) {
  const int found = pairs_detail::collect(warp, t, atoms, candidates, centre, n);
  n.overflown = found > n.capacity;
  const int stored = n.overflown ? n.capacity : found;
  n.count = pairs_detail::sort_by_species(warp, t.n_species, stored, n);
  if (n.number != n.index)
    warp.each(n.count, [&](int k) { n.index[k] = static_cast<int>(candidates.atom(n.number[k])); });
  const std::int64_t kind = atoms.species[centre];
  const Displacement<T> place = place_of(atoms.coordinates, centre);
  n.spoiled = n.overflown || n.count != stored || kind < 0 || kind >= t.n_species ||
              // By cells or given pairs, an atom whose place is not a number has perhaps no other
              // one to spoil.
              ((candidates.bounds != nullptr || candidates.given()) &&
               !(place.x == place.x && place.y == place.y && place.z == place.z));
}

// Fills the planes of a list; displacement_of(k) from the centre to its k-th neighbour.
template <class T, class N, class F>
KINML_DEVICE void measure_neighbours(const Warp& warp, const AevTables<T>& t,
                                     const Neighbours<N>& n, const F& displacement_of) {
  using namespace aev_detail;
  const T radial_inverse = T(1) / t.radial_cutoff, near_inverse = T(1) / t.angular_cutoff;
  warp.each(n.count, [&](int k) {
    const N half(T(0.5)), half_pi(T(1.57079632679489661923)), zero(T(0));
    const Displacement<N> d = displacement_of(k);
    const N r2 = d.x * d.x + d.y * d.y + d.z * d.z;
    // Coincident atoms have no direction: their unit vector and its derivatives are zero. A
    // distance that is not a number stays one.
    const bool coincident = kTiny<T> >= value_of(r2);
    using std::sqrt;
    const N safe = sqrt(coincident ? N(T(1)) : r2);
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

template <class T, class N, class C>
KINML_DEVICE void find_neighbours(const Warp& warp, const AevTables<T>& t, const Atoms<T>& atoms,
                                  const C& candidates, std::int64_t centre, Neighbours<N>& n) {
  list_neighbours(warp, t, atoms, candidates, centre, n);
  measure_neighbours(warp, t, n, [&](int k) {
    return pairs_detail::displacement_as(atoms, candidates, centre, n.number[k],
                                         static_cast<const N*>(nullptr));
  });
}

}  // namespace kinml::cuda
