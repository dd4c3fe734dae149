// A tile: a few whole structures of a system, or some centres of a large one, which one thread takes
// from start to end, so that everything about them stays in its cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../core/system.h"

namespace kinml::cpu {

// Places [first, last) among the chosen structures of a system.
struct Range {
  std::int64_t first, last;
};

// Centres, which all have a row in the tile's matrices.
template <class T>
std::int64_t count_rows(const System<T>& system, Range range) {
  std::int64_t total = 0;
  for (std::int64_t i = range.first; i < range.last; ++i) total += system.rows(system.structure(i));
  return total;
}

// Cuts a range into pieces of nearly equal numbers of centres, at most so many, none empty.
template <class T>
std::vector<Range> cut(const System<T>& system, Range range, std::int64_t pieces) {
  const std::int64_t total = count_rows(system, range);
  std::vector<Range> result;
  std::int64_t done = 0, begin = range.first;
  for (std::int64_t i = range.first; i < range.last; ++i) {
    done += count_rows(system, {i, i + 1});
    const std::int64_t next = static_cast<std::int64_t>(result.size()) + 1;
    if (i + 1 == range.last || done * pieces >= next * total) {
      result.push_back({begin, i + 1});
      begin = i + 1;
    }
  }
  return result;
}

// How many tiles a range makes. More centres in a tile make the products with the weights faster and
// leave the cache sooner, which what forces need fills besides.
template <class T>
std::int64_t count_tiles(const System<T>& system, Range range, bool forces) {
  const std::int64_t rows = forces ? 64 : 128;
  return (count_rows(system, range) + rows - 1) / rows;
}

template <class T>
std::vector<Range> tiles_of(const System<T>& system, Range range, bool forces) {
  return cut(system, range, count_tiles(system, range, forces));
}

// Weight gradients are summed in parts of a batch, each by one thread at a time, that depend on the
// batch only: a part is a tile, or of more than so many tiles, so many of them. Then the parts are
// summed as the leaves of a tree (core/shares.h).
inline constexpr std::int64_t kParts = 32, kTilesOfPart = 16, kMostParts = 1024;

template <class T>
std::vector<Range> parts_of(const System<T>& system, bool forces) {
  const Range all{0, system.count()};
  const std::int64_t tiles = count_tiles(system, all, forces);
  const std::int64_t large = std::clamp(tiles / kTilesOfPart, kParts, kMostParts);
  return cut(system, all, std::min(tiles, large));
}

// n atoms in rows, structure after structure, and their order by species: place p has row rows[p].
struct SpeciesOrder {
  std::vector<std::int64_t> starts;  // [n_species + 1] places of each species
  std::vector<std::int64_t> rows;    // [n]

  // species(row) of rows [0, n)
  template <class Function>
  SpeciesOrder(std::int64_t n_species, std::int64_t n, const Function& species)
      : starts(n_species + 1), rows(n) {
    for (std::int64_t row = 0; row < n; ++row) ++starts[species(row) + 1];
    for (std::int64_t s = 0; s < n_species; ++s) starts[s + 1] += starts[s];
    std::vector<std::int64_t> next(starts.begin(), starts.end() - 1);
    for (std::int64_t row = 0; row < n; ++row) rows[next[species(row)]++] = row;
  }
};

template <class T>
class Tile {
 public:
  // Some structures, whole; or of a range of one, the centres `only`.
  Tile(const System<T>& system, Range range, std::int64_t n_species, std::optional<Range> only = {})
      : system_(system),
        range_(range),
        first_centre_(only ? only->first : 0),
        firsts_(only ? std::vector{std::int64_t(0), only->last - only->first}
                     : firsts(system, range)),
        atoms_(row_atoms()),
        order_(n_species, n_rows(), [&](auto row) { return system.species[atoms_[row]]; }),
        owners_(n_rows()),
        places_(n_rows()),
        placed_atoms_(n_rows()) {
    for (std::int64_t place = 0; place < n_rows(); ++place) {
      places_[order_.rows[place]] = place;
      placed_atoms_[place] = atoms_[order_.rows[place]];
    }
    for (std::int64_t i = 0; i < count(); ++i)
      for (std::int64_t row = first_row(i); row < first_row(i + 1); ++row)
        owners_[places_[row]] = i;
  }

  const System<T>& system() const { return system_; }
  std::int64_t count() const { return range_.last - range_.first; }  // structures
  std::int64_t n_rows() const { return firsts_.back(); }

  // Of structure i of the tile: its place among the chosen ones and in the system, its atoms within
  // the system, its rows, and the centre within the structure that the first of them is of.
  std::int64_t chosen(std::int64_t i) const { return range_.first + i; }
  std::int64_t structure(std::int64_t i) const { return system_.structure(chosen(i)); }
  std::int64_t first_atom(std::int64_t i) const { return system_.offsets[structure(i)]; }
  std::int64_t atoms(std::int64_t i) const { return system_.atoms(structure(i)); }
  std::int64_t rows(std::int64_t i) const { return firsts_[i + 1] - firsts_[i]; }
  std::int64_t first_row(std::int64_t i) const { return firsts_[i]; }
  std::int64_t first_centre() const { return first_centre_; }
  std::int64_t most_atoms() const {
    std::int64_t most = 0;
    for (std::int64_t i = 0; i < count(); ++i) most = std::max(most, atoms(i));
    return most;
  }

  const SpeciesOrder& order() const { return order_; }
  std::int64_t owner(std::int64_t place) const { return owners_[place]; }
  std::int64_t place(std::int64_t row) const { return places_[row]; }
  // [n] the system's atoms, by place
  const std::int64_t* placed_atoms() const { return placed_atoms_.data(); }

 private:
  static std::vector<std::int64_t> firsts(const System<T>& system, Range range) {
    std::vector<std::int64_t> result{0};
    for (std::int64_t i = range.first; i < range.last; ++i)
      result.push_back(result.back() + count_rows(system, {i, i + 1}));
    return result;
  }
  std::vector<std::int64_t> row_atoms() const {
    std::vector<std::int64_t> result;
    for (std::int64_t i = 0; i < count(); ++i)
      for (std::int64_t a = 0; a < rows(i); ++a)
        result.push_back(first_atom(i) + first_centre_ + a);
    return result;
  }

  const System<T>& system_;
  Range range_;
  std::int64_t first_centre_;
  std::vector<std::int64_t> firsts_;  // [count + 1] first rows
  std::vector<std::int64_t> atoms_;   // [n] of the system, by row
  SpeciesOrder order_;
  std::vector<std::int64_t> owners_;  // [n] structures, by place
  std::vector<std::int64_t> places_;  // [n] by row
  std::vector<std::int64_t> placed_atoms_;
};

}  // namespace kinml::cpu
