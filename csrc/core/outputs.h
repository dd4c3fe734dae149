// Outputs: where energies and what comes with them are written, of M members of an ensemble and R
// levels of theory.
#pragma once

#include <cstdint>

namespace kinml {

// Rows of atoms are those of the data set; of structures that are not chosen nothing is written, nor
// are atomic numbers of ghosts.
template <class T>
struct Outputs {
  double* energies;  // [M, R, count] sums over centres of eps and of the model's sae, eV
  T* forces;         // [M, R, n_atoms, 3] -dE/dx, eV / angstrom, if there are forces

  // Those that are asked for; else null.
  double* atomic_energies = nullptr;  // [M, R, n_atoms] terms of the energies
  // From coordinates, of each centre: sum over its pairs of de/dd (x) d, eV, where d is the
  // displacement of the neighbour and e the atomic energy; row by derivative.
  T* atomic_virials = nullptr;  // [M, R, n_atoms, 3, 3]
  // Their sums: the derivative of the energy by a strain of all places and of the cell. Only with
  // atomic_virials.
  double* virials = nullptr;  // [M, R, count, 3, 3]
};

}  // namespace kinml
