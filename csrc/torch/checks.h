// Checks of op arguments. Each message says what was expected and what came.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>

#include "../core/model.h"

namespace kinml::ops {

// Calls function with a value of the tensor's C++ type.
template <class Function>
void with_type(const at::Tensor& t, const Function& function) {
  if (t.scalar_type() == at::kDouble)
    function(double());
  else
    function(float());
}

inline void check_floating(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kDouble || t.scalar_type() == at::kFloat, "kinml_fast: ", name,
              " must be float64 or float32, got ", t.scalar_type());
}

inline void check_same_type(const at::Tensor& t, const char* name, const at::Tensor& other,
                            const char* other_name) {
  TORCH_CHECK(t.scalar_type() == other.scalar_type(), "kinml_fast: ", name, " is ", t.scalar_type(),
              " but ", other_name, " is ", other.scalar_type(), "; both must have one dtype");
}

inline void check_device(const at::Tensor& t, const char* name, const at::Tensor& other,
                         const char* other_name) {
  TORCH_CHECK(t.device() == other.device(), "kinml_fast: ", name, " on ", t.device(), ", but ",
              other_name, " on ", other.device(), "; move all tensors to one device");
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

// Packed by kinml_fast.nn.repulsion.Repulsion.
inline Repulsion unpack_repulsion(at::ArrayRef<double> packed) {
  const double* const charges = packed.data() + 2;
  const size_t n = packed.size() / 2 - 1;
  const Repulsion r{{charges, charges + n}, {charges + n, charges + 2 * n}, packed[0], packed[1]};
  TORCH_CHECK(r.inner >= 0 && r.inner < r.outer,
              "kinml_fast: a repulsion needs 0 <= inner < outer, got ", r.inner, " and ", r.outer);
  for (size_t i = 0; i < n; ++i)
    TORCH_CHECK(r.charges[i] > 0 && r.radii[i] > 0,
                "kinml_fast: a repulsion needs positive charges and radii, got ", r.charges[i],
                " and ", r.radii[i], " of species ", i);
  return r;
}

// The packed descriptor: see kinml_fast.nn.aev.AEVParameters.packed.
inline AevParameters unpack_descriptor(at::ArrayRef<double> packed) {
  constexpr size_t kHead = 12;
  TORCH_CHECK(packed.size() >= kHead, "kinml_fast: the descriptor must have at least ", kHead,
              " numbers, got ", packed.size());
  AevParameters p;
  p.n_species = static_cast<int64_t>(packed[0]);
  const auto n_radial = static_cast<size_t>(packed[1]);
  const auto n_angular = static_cast<size_t>(packed[2]);
  const auto n_sections = static_cast<size_t>(packed[3]);
  // Behind the lists there may be a repulsion: inner, outer, charges and radii of the species.
  const size_t n_numbers = kHead + n_radial + n_angular + n_sections;
  const size_t n_repulsion = 2 + 2 * static_cast<size_t>(p.n_species);
  const bool repels = p.n_species >= 1 && packed.size() == n_numbers + n_repulsion;
  const bool alone = repels && n_radial + n_angular + n_sections == 0;
  TORCH_CHECK((alone || (p.n_species >= 1 && n_radial >= 1 && n_angular >= 1 && n_sections >= 1)) &&
                  (repels || packed.size() == n_numbers),
              "kinml_fast: the descriptor says ", p.n_species, " species, ", n_radial,
              " radial shifts, ", n_angular, " angular shifts and ", n_sections,
              " sections, which needs ", n_numbers, " numbers; it has ", packed.size());
  if (repels) p.repulsion = unpack_repulsion(packed.slice(n_numbers));
  if (alone) return p.of_repulsion();
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
  TORCH_CHECK(p.repulsion.cutoff() <= std::max(p.radial_cutoff, p.angular_cutoff),
              "kinml_fast: the repulsion must end within the cutoffs, it reaches ",
              p.repulsion.cutoff());
  return p;
}

// The chain of networks that `packed` describes: see the schema. The list must outlive it.
inline NetworkChain unpack_networks(at::IntArrayRef packed) {
  constexpr size_t kHead = 4;
  TORCH_CHECK(packed.size() >= kHead,
              "kinml_fast: the description of the networks must have at "
              "least ",
              kHead, " numbers, got ", packed.size());
  const int64_t n_levels = packed[0], n_species = packed[1], n_layers = packed[2];
  const int64_t n_sizes = n_species * (n_layers + 1);
  TORCH_CHECK(n_levels >= 1 && n_species >= 1 && n_layers >= 1 &&
                  static_cast<int64_t>(packed.size() - kHead) == n_layers + n_levels * n_sizes,
              "kinml_fast: the description of the networks says ", n_levels, " levels, ", n_species,
              " species and ", n_layers, " layers, which needs ",
              kHead + n_layers + n_levels * n_sizes, " numbers; it has ", packed.size());
  const int64_t* const activations = packed.data() + kHead;
  for (int64_t l = 0; l < n_layers; ++l)
    TORCH_CHECK(activations[l] >= 0 && activations[l] <= 6, "kinml_fast: unknown activation code ",
                activations[l]);
  NetworkChain chain;
  for (int64_t k = 0; k < n_levels; ++k)
    chain.shapes.push_back(
        {n_species, n_layers, activations + n_layers + k * n_sizes, activations, packed[3] != 0});
  return chain;
}

// Whether a chain is one on features of this length, with so many parameters [..., n].
inline void check_networks(const NetworkChain& chain, int64_t length,
                           const at::Tensor& parameters) {
  for (int64_t k = 0; k < chain.n_levels(); ++k)
    for (int64_t s = 0; s < chain.n_species(); ++s) {
      const NetworkShape& shape = chain.shapes[k];
      const int64_t inputs = length + (k > 0 ? 1 : 0);
      TORCH_CHECK(shape.size(s, 0) == inputs, "kinml_fast: the network of species ", s, " takes ",
                  shape.size(s, 0), " inputs, the features have ", inputs);
      for (int64_t l = 1; l < shape.n_layers; ++l)
        TORCH_CHECK(shape.size(s, l) >= 1,
                    "kinml_fast: every layer must have at least one output, one of species ", s,
                    " has ", shape.size(s, l));
      TORCH_CHECK(shape.size(s, shape.n_layers) == 1,
                  "kinml_fast: the last layer must have one output, that of species ", s, " has ",
                  shape.size(s, shape.n_layers));
    }
  TORCH_CHECK(parameters.size(-1) == chain.parameters(), "kinml_fast: the networks have ",
              chain.parameters(), " parameters, got ", parameters.size(-1));
}

inline void check_doubles(const at::Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.scalar_type() == at::kDouble && t.sizes() == shape && t.is_contiguous(),
              "kinml_fast: ", name, " must be a contiguous float64 tensor of shape ", shape,
              ", got ", t.scalar_type(), " of shape ", t.sizes());
}

inline void check_indices(const at::Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.scalar_type() == at::kLong && t.sizes() == shape, "kinml_fast: ", name,
              " must be an int64 tensor of shape ", shape, ", got ", t.scalar_type(), " of shape ",
              t.sizes());
}

inline void check_order_arguments(const at::Tensor& species, const at::Tensor& offsets,
                                  int64_t n_species) {
  check_index(species, "species");
  check_index(offsets, "offsets");
  TORCH_CHECK(offsets.size(0) >= 1,
              "kinml_fast: offsets must have n_structures + 1 entries, got none");
  TORCH_CHECK(n_species >= 1, "kinml_fast: n_species must be at least 1, got ", n_species);
}

// An op that writes to a tensor says so, as torch's own do: what was made of it is out of date.
inline void count_write(const at::Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// Arguments of adam_step.
inline void check_adam(const at::Tensor& parameter, const at::Tensor& gradient,
                       const at::Tensor& mean, const at::Tensor& square,
                       const std::optional<at::Tensor>& largest, const at::Tensor& step) {
  check_floating(parameter, "parameter");
  TORCH_CHECK(step.scalar_type() == at::kDouble && step.dim() == 0,
              "kinml_fast: step must be one float64 number, got ", step.scalar_type(), " of shape ",
              step.sizes());
  check_device(step, "step", parameter, "parameter");
  const auto check = [&](const at::Tensor& t, const char* name) {
    check_same_type(t, name, parameter, "parameter");
    TORCH_CHECK(t.sizes() == parameter.sizes() && t.is_contiguous(), "kinml_fast: ", name,
                " must be contiguous and have the shape of parameter, ", parameter.sizes(),
                ", got ", t.sizes());
  };
  check(parameter, "parameter");
  check(mean, "mean");
  check(square, "square");
  if (largest.has_value()) check(*largest, "largest");
  check(gradient, "gradient");
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
