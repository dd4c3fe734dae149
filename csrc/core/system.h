// System: molecules and crystals, as the entries of csrc/cpu and csrc/cuda take them. The pointers
// are of the device that computes.
#pragma once

#include <cstdint>

#include "config.h"

namespace kinml {

// A ragged data set of structures, and which of its structures are meant. Atoms of structure s are
// offsets[s] .. offsets[s + 1].
template <class T>
struct System {
  std::int64_t n_atoms = 0, n_structures = 0;  // of the data set
  const std::int64_t* species = nullptr;       // [n_atoms], 0 <= species < n_species
  const std::int64_t* offsets = nullptr;       // [n_structures + 1], first 0, last n_atoms

  // Either coordinates, angstrom ...
  const T* coordinates = nullptr;  // [n_atoms, 3]
  // ... or stored descriptors and Jacobians, of which a structure of n atoms has the first 3 n
  // columns. Without Jacobians there are no forces.
  const T* features = nullptr;  // [n_atoms, D]
  const T* jacobian = nullptr;  // [n_atoms, D, columns]
  std::int64_t columns = 0;

  // Periodicity of structures with coordinates; null: all are molecules, as is a structure that is
  // not periodic along any vector, whose cell is not read.
  const double* cells = nullptr;  // [n_structures, 3, 3] rows are lattice vectors, angstrom
  const std::int64_t* periodic = nullptr;  // [n_structures, 3] along which vectors: not 0

  // The first so many atoms of a structure are centres, with descriptors and energies; the others
  // (ghosts) are their neighbours only. Null: all.
  const std::int64_t* centres = nullptr;  // [n_structures]

  // Neighbours that were found elsewhere, of all centres; null: they are looked for. Atom j is given
  // once for each of its images, in any order and also beyond the cutoffs, at
  // x_j + shift . cell - x_i from the centre i.
  const std::int64_t* pair_starts = nullptr;  // [n_atoms + 1] where those of an atom begin
  const std::int64_t* neighbours = nullptr;   // [n_pairs] atoms of the same structure
  const std::int64_t* shifts = nullptr;       // [n_pairs, 3] cells; null: 0
  std::int64_t n_pairs = 0;

  // Which structures: [n_chosen] indices. Null: all of them, in order.
  const std::int64_t* chosen = nullptr;
  std::int64_t n_chosen = 0;

  KINML_HD std::int64_t count() const { return chosen == nullptr ? n_structures : n_chosen; }
  KINML_HD std::int64_t structure(std::int64_t i) const {
    return chosen == nullptr ? i : chosen[i];
  }
  KINML_HD std::int64_t atoms(std::int64_t s) const { return offsets[s + 1] - offsets[s]; }
  // Centres: those that have rows of descriptors.
  KINML_HD std::int64_t rows(std::int64_t s) const {
    return centres == nullptr ? atoms(s) : centres[s];
  }
  KINML_HD bool is_periodic(std::int64_t s) const {
    return periodic != nullptr && (periodic[3 * s] || periodic[3 * s + 1] || periodic[3 * s + 2]);
  }
  // Whether the neighbours of a centre are different atoms, and none of them itself.
  KINML_HD bool distinct() const { return cells == nullptr && pair_starts == nullptr; }
  KINML_HD bool stored() const { return features != nullptr; }
  KINML_HD bool has_forces() const { return features == nullptr || jacobian != nullptr; }
};

}  // namespace kinml
