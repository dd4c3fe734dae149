// Checks of op arguments. Each message says what was expected and what came.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "../cpu/aev_cpu.h"
#include "../cpu/networks_cpu.h"

namespace kinml::ops {

inline void check_floating(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kDouble || t.scalar_type() == at::kFloat, "kinml_fast: ", name,
              " must be float64 or float32, got ", t.scalar_type());
}

inline void check_same_type(const at::Tensor& t, const char* name, const at::Tensor& other,
                            const char* other_name) {
  TORCH_CHECK(t.scalar_type() == other.scalar_type(), "kinml_fast: ", name, " is ", t.scalar_type(),
              " but ", other_name, " is ", other.scalar_type(), "; both must have one dtype");
}

inline void check_index(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kLong && t.dim() == 1, "kinml_fast: ", name,
              " must be a one-dimensional int64 tensor, got ", t.scalar_type(), " of shape ",
              t.sizes());
}

inline void check_matrix(const at::Tensor& t, const char* name, int64_t rows, int64_t columns) {
  TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, "kinml_fast: ", name,
              " must have shape [", rows, ", ", columns, "], got ", t.sizes());
}

// Shapes and types of the three tensors that describe a ragged batch; no look at their values.
inline void check_batch_shapes(const at::Tensor& coordinates, const at::Tensor& species,
                               const at::Tensor& offsets) {
  check_floating(coordinates, "coordinates");
  TORCH_CHECK(coordinates.dim() == 2 && coordinates.size(1) == 3,
              "kinml_fast: coordinates must have shape [n_atoms, 3], got ", coordinates.sizes());
  check_index(species, "species");
  check_index(offsets, "offsets");
  TORCH_CHECK(species.size(0) == coordinates.size(0), "kinml_fast: coordinates have ",
              coordinates.size(0), " atoms but species has ", species.size(0));
  TORCH_CHECK(offsets.size(0) >= 1,
              "kinml_fast: offsets must have n_structures + 1 entries, got none");
}

// The packed descriptor: see kinml_fast.nn.aev.AEVParameters.packed.
inline cpu::AevParameters unpack_descriptor(at::ArrayRef<double> packed) {
  constexpr size_t kHead = 12;
  TORCH_CHECK(packed.size() >= kHead, "kinml_fast: the descriptor must have at least ", kHead,
              " numbers, got ", packed.size());
  cpu::AevParameters p;
  p.n_species = static_cast<int64_t>(packed[0]);
  const auto n_radial = static_cast<size_t>(packed[1]);
  const auto n_angular = static_cast<size_t>(packed[2]);
  const auto n_sections = static_cast<size_t>(packed[3]);
  TORCH_CHECK(p.n_species >= 1 && n_radial >= 1 && n_angular >= 1 && n_sections >= 1 &&
                  packed.size() == kHead + n_radial + n_angular + n_sections,
              "kinml_fast: the descriptor says ", p.n_species, " species, ", n_radial,
              " radial shifts, ", n_angular, " angular shifts and ", n_sections,
              " sections, which needs ", kHead + n_radial + n_angular + n_sections,
              " numbers; it has ", packed.size());
  p.radial_eta = packed[4];
  p.radial_cutoff = packed[5];
  p.radial_factor = packed[6];
  p.angular_eta = packed[7];
  p.angular_cutoff = packed[8];
  p.angular_factor = packed[9];
  p.zeta = packed[10];
  p.beta = packed[11];
  TORCH_CHECK(p.radial_cutoff > 0 && p.angular_cutoff > 0,
              "kinml_fast: both cutoffs must be positive, got ", p.radial_cutoff, " and ",
              p.angular_cutoff);
  TORCH_CHECK(p.zeta >= 1, "kinml_fast: zeta must be at least 1, got ", p.zeta);
  TORCH_CHECK(p.beta >= 0 && p.beta <= 1, "kinml_fast: beta must lie in [0, 1], got ", p.beta);
  const double* next = packed.data() + kHead;
  p.radial_shifts.assign(next, next + n_radial);
  next += n_radial;
  p.angular_shifts.assign(next, next + n_angular);
  next += n_angular;
  p.sections.assign(next, next + n_sections);
  return p;
}

// The description of the networks for features of `length` numbers; the lists must outlive it.
inline cpu::NetworkShape unpack_networks(const at::Tensor& parameters, int64_t n_species,
                                         int64_t length, at::IntArrayRef sizes,
                                         at::IntArrayRef activations, bool biases) {
  const auto n_layers = static_cast<int64_t>(activations.size());
  TORCH_CHECK(n_layers >= 1 && n_species >= 1 &&
                  static_cast<int64_t>(sizes.size()) == n_species * (n_layers + 1),
              "kinml_fast: ", n_layers, " layers and ", n_species, " species need ",
              n_species * (n_layers + 1), " sizes, got ", sizes.size());
  const cpu::NetworkShape shape{n_species, n_layers, sizes.data(), activations.data(), biases};
  int64_t n_parameters = 0;
  for (int64_t s = 0; s < n_species; ++s) {
    n_parameters += shape.parameters_of(s);
    TORCH_CHECK(shape.size(s, 0) == length, "kinml_fast: the network of species ", s, " takes ",
                shape.size(s, 0), " inputs, the features have ", length);
    TORCH_CHECK(shape.size(s, n_layers) == 1, "kinml_fast: the last layer must have one output, ",
                "that of species ", s, " has ", shape.size(s, n_layers));
  }
  for (const int64_t a : activations)
    TORCH_CHECK(a >= 0 && a <= 6, "kinml_fast: unknown activation code ", a);
  TORCH_CHECK(parameters.dim() == 1, "kinml_fast: parameters must be one flat tensor, got shape ",
              parameters.sizes());
  TORCH_CHECK(parameters.size(0) == n_parameters, "kinml_fast: the networks have ", n_parameters,
              " parameters, got ", parameters.size(0));
  return shape;
}

// Offsets and species in host memory: increasing from 0 to n_atoms, species within the list.
inline void check_batch_values(const int64_t* species, const int64_t* offsets, int64_t n_atoms,
                               int64_t n_structures, int64_t n_species) {
  TORCH_CHECK(offsets[0] == 0 && offsets[n_structures] == n_atoms,
              "kinml_fast: offsets must begin with 0 and end with the number of atoms, ", n_atoms,
              "; they begin with ", offsets[0], " and end with ", offsets[n_structures]);
  for (int64_t s = 0; s < n_structures; ++s)
    TORCH_CHECK(offsets[s] <= offsets[s + 1], "kinml_fast: offsets must not decrease; offsets[", s,
                "] = ", offsets[s], " is followed by ", offsets[s + 1]);
  for (int64_t i = 0; i < n_atoms; ++i)
    TORCH_CHECK(species[i] >= 0 && species[i] < n_species, "kinml_fast: species[", i,
                "] = ", species[i], " is not in [0, ", n_species, ")");
}

}  // namespace kinml::ops
