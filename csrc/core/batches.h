// What the entries of csrc/cpu and csrc/cuda are called with: parameters of the AEV, and ragged
// batches of molecules. The pointers are of the device that computes.
#pragma once

#include <cstdint>
#include <vector>

namespace kinml {

struct AevParameters {
  std::int64_t n_species;
  std::vector<double> radial_shifts;  // rho_l, angstrom
  double radial_eta;                  // 1/angstrom^2
  double radial_cutoff;               // angstrom
  double radial_factor;
  std::vector<double> angular_shifts;  // rho_l, angstrom
  double angular_eta;
  double angular_cutoff;
  double angular_factor;
  std::vector<double> sections;  // alpha_m, rad
  double zeta;
  double beta;  // theta = arccos(beta cos(angle))

  std::int64_t length() const {  // D
    const auto n = [](const std::vector<double>& x) { return static_cast<std::int64_t>(x.size()); };
    return n_species * n(radial_shifts) +
           n_species * (n_species + 1) / 2 * n(angular_shifts) * n(sections);
  }
};

template <class T>
struct AevBatch {
  std::int64_t n_structures;
  const T* coordinates;         // [n_atoms, 3], angstrom
  const std::int64_t* species;  // [n_atoms], 0 <= species < n_species
  const std::int64_t* offsets;  // [n_structures + 1], offsets[0] = 0, last = n_atoms
};

// A data set, and which of its structures are meant.
template <class T>
struct ForceBatch {
  const std::int64_t* species;     // [n_atoms]
  const std::int64_t* offsets;     // [n_structures + 1]
  const std::int64_t* structures;  // [count] indices, or null: structures 0 .. count - 1
  std::int64_t count;
  std::int64_t n_structures, n_atoms;  // of the data set

  // Either the coordinates [n_atoms, 3] and what the AEV is made of ...
  const AevParameters* parameters = nullptr;
  const T* coordinates = nullptr;
  // ... or stored descriptors [n_atoms, length] and Jacobians [n_atoms, length, columns], of which
  // a structure of n atoms has the first 3 n columns. Without Jacobians (null) there are no forces.
  const T* features = nullptr;
  const T* jacobian = nullptr;
  std::int64_t length = 0;
  std::int64_t columns = 0;

  std::int64_t structure(std::int64_t i) const { return structures == nullptr ? i : structures[i]; }
  bool has_forces() const { return features == nullptr || jacobian != nullptr; }
};

}  // namespace kinml
