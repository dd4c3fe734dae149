// System: molecules, as the entries of csrc/cpu and csrc/cuda take them. The pointers are of the
// device that computes.
#pragma once

#include <cstdint>

#include "config.h"

namespace kinml {

// A ragged data set of molecules, and which of its structures are meant. Atoms of structure s are
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

  // Which structures: [n_chosen] indices. Null: all of them, in order.
  const std::int64_t* chosen = nullptr;
  std::int64_t n_chosen = 0;

  KINML_HD std::int64_t count() const { return chosen == nullptr ? n_structures : n_chosen; }
  KINML_HD std::int64_t structure(std::int64_t i) const {
    return chosen == nullptr ? i : chosen[i];
  }
  KINML_HD bool stored() const { return features != nullptr; }
  KINML_HD bool has_forces() const { return features == nullptr || jacobian != nullptr; }
};

}  // namespace kinml
