// What the ops of the networks are called with, on every device.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <utility>

#include "checks.h"

namespace kinml::ops {

// The networks' description and the atoms that they are for, in contiguous memory (features: rows
// of any stride); checks of all but the values of indices.
struct NetworkArguments {
  NetworkShape shape;
  at::Tensor features, rows, owners, starts, parameters;

  NetworkArguments(const at::Tensor& features_, const at::Tensor& rows_, const at::Tensor& owners_,
                   const at::Tensor& starts_, const at::Tensor& parameters_, at::IntArrayRef sizes,
                   at::IntArrayRef activations, bool biases)
      : features(features_.dim() == 2 && features_.stride(1) == 1 ? features_
                                                                  : features_.contiguous()),
        rows(rows_.contiguous()),
        owners(owners_.contiguous()),
        starts(starts_.contiguous()),
        parameters(parameters_.contiguous()) {
    check_floating(features, "features");
    check_same_type(parameters, "parameters", features, "features");
    TORCH_CHECK(features.dim() == 2, "kinml_fast: features must have shape [n, D], got ",
                features.sizes());
    check_index(rows, "rows");
    check_index(owners, "owners");
    check_index(starts, "starts");
    for (const auto& [t, name] :
         {std::pair(&rows, "rows"), std::pair(&owners, "owners"), std::pair(&starts, "starts"),
          std::pair(&parameters, "parameters")})
      check_device(*t, name, features, "features");
    TORCH_CHECK(owners.size(0) == rows.size(0), "kinml_fast: rows has ", rows.size(0),
                " atoms, owners has ", owners.size(0));
    shape = unpack_networks(parameters, starts.size(0) - 1, features.size(1), sizes, activations,
                            biases);
  }

  int64_t n() const { return rows.size(0); }

  // Single-atom energies [n_species], contiguous; undefined where there are none.
  at::Tensor checked_sae(const std::optional<at::Tensor>& sae) const {
    if (!sae.has_value()) return {};
    TORCH_CHECK(
        sae->scalar_type() == at::kDouble && sae->dim() == 1 && sae->size(0) == shape.n_species,
        "kinml_fast: sae must be float64 of shape [", shape.n_species, "], got ",
        sae->scalar_type(), " of shape ", sae->sizes());
    check_device(*sae, "sae", features, "features");
    return sae->contiguous();
  }
  // dL/dE [n_structures], contiguous.
  at::Tensor checked_gradient(const at::Tensor& grad_energies) const {
    TORCH_CHECK(grad_energies.scalar_type() == at::kDouble && grad_energies.dim() == 1,
                "kinml_fast: grad_energies must be float64 of shape [n_structures]");
    check_device(grad_energies, "grad_energies", features, "features");
    return grad_energies.contiguous();
  }
  // What the forward pass kept [n, saved_per_atom], contiguous.
  at::Tensor checked_saved(const at::Tensor& saved) const {
    check_same_type(saved, "saved", features, "features");
    check_matrix(saved, "saved", n(), shape.saved_per_atom());
    return saved.contiguous();
  }
  // Directions of the features, of their shape, contiguous.
  at::Tensor checked_tangents(const at::Tensor& tangents) const {
    check_same_type(tangents, "tangents", features, "features");
    check_matrix(tangents, "tangents", features.size(0), features.size(1));
    return tangents.contiguous();
  }
};

}  // namespace kinml::ops
