// The ops for energies and forces together on the CPU, and their shapes (Meta).
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../cpu/force_step_cpu.h"
#include "checks.h"

namespace kinml::ops {
namespace {

using at::Tensor;
using Doubles = at::ArrayRef<double>;
using Ints = at::IntArrayRef;

int threads() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

// Where descriptors come from: coordinates, or stored ones with their Jacobians.
struct Source {
  Tensor coordinates, features, jacobian;
  cpu::AevParameters parameters;

  static Source recomputed(const Tensor& coordinates, Doubles descriptor) {
    Source s;
    check_floating(coordinates, "coordinates");
    TORCH_CHECK(coordinates.dim() == 2 && coordinates.size(1) == 3,
                "kinml_fast: coordinates must have shape [n_atoms, 3], got ", coordinates.sizes());
    s.coordinates = coordinates.contiguous();
    s.parameters = unpack_descriptor(descriptor);
    return s;
  }
  static Source stored(const Tensor& features, const Tensor& jacobian) {
    Source s;
    check_floating(features, "features");
    TORCH_CHECK(features.dim() == 2, "kinml_fast: features must have shape [n_atoms, D], got ",
                features.sizes());
    check_same_type(jacobian, "jacobian", features, "features");
    TORCH_CHECK(jacobian.dim() == 3 && jacobian.size(0) == features.size(0) &&
                    jacobian.size(1) == features.size(1),
                "kinml_fast: jacobian must have shape [", features.size(0), ", ", features.size(1),
                ", columns], got ", jacobian.sizes());
    s.features = features.contiguous();
    s.jacobian = jacobian.contiguous();
    return s;
  }
  bool is_stored() const { return features.defined(); }
  const Tensor& numbers() const { return is_stored() ? features : coordinates; }
  int64_t n_atoms() const { return numbers().size(0); }
  int64_t length() const { return is_stored() ? features.size(1) : parameters.length(); }
  template <class T>
  void describe(cpu::ForceBatch<T>& batch) const {
    if (is_stored()) {
      batch.features = features.const_data_ptr<T>();
      batch.jacobian = jacobian.const_data_ptr<T>();
      batch.length = features.size(1);
      batch.columns = jacobian.size(2);
    } else {
      batch.parameters = &parameters;
      batch.coordinates = coordinates.const_data_ptr<T>();
    }
  }
};

// A checked call: data, networks, and which structures.
struct Call {
  const Source& source;
  Tensor species, offsets, structures, weights;
  cpu::NetworkShape shape;
  int64_t count;

  // Without `structures` all of them, in order.
  Call(const Source& from, const Tensor& species_, const Tensor& offsets_,
       const std::optional<Tensor>& structures_, const Tensor& parameters, Ints sizes,
       Ints activations, bool biases)
      : source(from),
        species(species_.contiguous()),
        offsets(offsets_.contiguous()),
        weights(parameters.contiguous()) {
    check_index(species, "species");
    check_index(offsets, "offsets");
    const int64_t n_atoms = source.n_atoms();
    TORCH_CHECK(species.size(0) == n_atoms, "kinml_fast: there are ", n_atoms,
                " atoms but species has ", species.size(0));
    TORCH_CHECK(offsets.size(0) >= 1,
                "kinml_fast: offsets must have n_structures + 1 entries, got none");
    check_same_type(weights, "parameters", source.numbers(),
                    source.is_stored() ? "features" : "coordinates");
    const auto n_layers = static_cast<int64_t>(activations.size());
    const int64_t n_species = source.is_stored()
                                  ? static_cast<int64_t>(sizes.size()) / (n_layers + 1)
                                  : source.parameters.n_species;
    shape = unpack_networks(weights, n_species, source.length(), sizes, activations, biases);
    const int64_t n_structures = offsets.size(0) - 1;
    const int64_t* const z = species.const_data_ptr<int64_t>();
    const int64_t* const o = offsets.const_data_ptr<int64_t>();
    if (structures_.has_value()) {
      check_index(*structures_, "structures");
      structures = structures_->contiguous();
      // Only the batch is looked at: a data set may be a thousand times as large.
      const int64_t* const chosen = structures.const_data_ptr<int64_t>();
      for (int64_t i = 0; i < structures.size(0); ++i) {
        const int64_t s = chosen[i];
        TORCH_CHECK(s >= 0 && s < n_structures, "kinml_fast: structures[", i, "] = ", s,
                    " is not in [0, ", n_structures, ")");
        TORCH_CHECK(o[s] >= 0 && o[s] <= o[s + 1] && o[s + 1] <= n_atoms, "kinml_fast: offsets[", s,
                    "] = ", o[s], " and the next, ", o[s + 1],
                    ", must increase and lie within the ", n_atoms, " atoms");
        for (int64_t a = o[s]; a < o[s + 1]; ++a)
          TORCH_CHECK(z[a] >= 0 && z[a] < n_species, "kinml_fast: species[", a, "] = ", z[a],
                      " is not in [0, ", n_species, ")");
      }
    } else {
      check_batch_values(z, o, n_atoms, n_structures, n_species);
    }
    count = structures.defined() ? structures.size(0) : n_structures;
    if (source.is_stored())
      for (int64_t i = 0; i < count; ++i) {
        const int64_t s = structures.defined() ? structures.const_data_ptr<int64_t>()[i] : i;
        TORCH_CHECK(3 * (o[s + 1] - o[s]) <= source.jacobian.size(2), "kinml_fast: structure ", s,
                    " has ", o[s + 1] - o[s], " atoms, but the Jacobian has columns for ",
                    source.jacobian.size(2) / 3);
      }
  }

  template <class T>
  cpu::ForceBatch<T> batch() const {
    cpu::ForceBatch<T> b{species.const_data_ptr<int64_t>(), offsets.const_data_ptr<int64_t>(),
                         structures.defined() ? structures.const_data_ptr<int64_t>() : nullptr,
                         count};
    source.describe(b);
    return b;
  }
  // Calls f with a value of the C++ type.
  template <class Function>
  void with_type(const Function& f) const {
    if (weights.scalar_type() == at::kDouble)
      f(double());
    else
      f(float());
  }
};

void check_doubles(const Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.scalar_type() == at::kDouble && t.sizes() == shape && t.is_contiguous(),
              "kinml_fast: ", name, " must be a contiguous float64 tensor of shape ", shape,
              ", got ", t.scalar_type(), " of shape ", t.sizes());
}

std::tuple<Tensor, Tensor> evaluate(const Call& call, const std::optional<Tensor>& sae) {
  Tensor energies = at::empty({call.count}, call.weights.options().dtype(at::kDouble));
  Tensor forces = at::empty({call.source.n_atoms(), 3}, call.weights.options());
  Tensor shift;
  if (sae.has_value()) {
    shift = sae->contiguous();
    check_doubles(shift, "sae", {call.shape.n_species});
  }
  call.with_type([&](auto zero) {
    using T = decltype(zero);
    cpu::energy_forces<T>(call.shape, call.weights.const_data_ptr<T>(), call.batch<T>(),
                          shift.defined() ? shift.const_data_ptr<double>() : nullptr,
                          energies.mutable_data_ptr<double>(), forces.mutable_data_ptr<T>(),
                          threads());
  });
  return {energies, forces};
}

Tensor differentiate(const Call& call, const Tensor& grad_energies, const Tensor& grad_forces) {
  const Tensor e = grad_energies.contiguous(), r = grad_forces.contiguous();
  check_doubles(e, "grad_energies", {call.count});
  check_same_type(r, "grad_forces", call.weights, "parameters");
  check_matrix(r, "grad_forces", call.source.n_atoms(), 3);
  Tensor gradient = at::empty_like(call.weights);
  call.with_type([&](auto zero) {
    using T = decltype(zero);
    cpu::energy_forces_backward<T>(call.shape, call.weights.const_data_ptr<T>(), call.batch<T>(),
                                   e.const_data_ptr<double>(), r.const_data_ptr<T>(),
                                   gradient.mutable_data_ptr<T>(), threads());
  });
  return gradient;
}

void step(const Call& call, const Tensor& energy_targets, const Tensor& force_targets,
          const Tensor& energy_weights, const Tensor& force_weights, const Tensor& scales,
          Tensor& energy_residuals, Tensor& force_errors, Tensor& losses, Tensor& gradient) {
  const int64_t n = call.offsets.size(0) - 1;
  check_doubles(energy_targets, "energy_targets", {n});
  check_doubles(force_targets, "force_targets", {call.source.n_atoms(), 3});
  check_doubles(energy_weights, "energy_weights", {n});
  check_doubles(force_weights, "force_weights", {n});
  check_doubles(scales, "scales", {2});
  check_doubles(energy_residuals, "energy_residuals", {call.count});
  check_doubles(force_errors, "force_errors", {call.count, 3});
  check_doubles(losses, "losses", {2});
  check_same_type(gradient, "gradient", call.weights, "parameters");
  TORCH_CHECK(gradient.sizes() == call.weights.sizes() && gradient.is_contiguous(),
              "kinml_fast: gradient must be contiguous and have the shape of parameters, ",
              call.weights.sizes(), ", got ", gradient.sizes());
  const cpu::ForceLoss loss{
      energy_targets.const_data_ptr<double>(), force_targets.const_data_ptr<double>(),
      energy_weights.const_data_ptr<double>(), force_weights.const_data_ptr<double>(),
      scales.const_data_ptr<double>()[0],      scales.const_data_ptr<double>()[1]};
  call.with_type([&](auto zero) {
    using T = decltype(zero);
    cpu::force_step<T>(call.shape, call.weights.const_data_ptr<T>(), call.batch<T>(), loss,
                       losses.mutable_data_ptr<double>(), gradient.mutable_data_ptr<T>(),
                       energy_residuals.mutable_data_ptr<double>(),
                       force_errors.mutable_data_ptr<double>(), threads());
  });
}

// ---- ops ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> energy_forces(const Tensor& coordinates, const Tensor& species,
                                         const Tensor& offsets, const Tensor& parameters,
                                         const std::optional<Tensor>& sae, Doubles descriptor,
                                         Ints sizes, Ints activations, bool biases) {
  const Source source = Source::recomputed(coordinates, descriptor);
  return evaluate({source, species, offsets, {}, parameters, sizes, activations, biases}, sae);
}
std::tuple<Tensor, Tensor> energy_forces_stored(const Tensor& features, const Tensor& jacobian,
                                                const Tensor& species, const Tensor& offsets,
                                                const Tensor& parameters,
                                                const std::optional<Tensor>& sae, Ints sizes,
                                                Ints activations, bool biases) {
  const Source source = Source::stored(features, jacobian);
  return evaluate({source, species, offsets, {}, parameters, sizes, activations, biases}, sae);
}

Tensor energy_forces_backward(const Tensor& grad_energies, const Tensor& grad_forces,
                              const Tensor& coordinates, const Tensor& species,
                              const Tensor& offsets, const Tensor& parameters, Doubles descriptor,
                              Ints sizes, Ints activations, bool biases) {
  const Source source = Source::recomputed(coordinates, descriptor);
  return differentiate({source, species, offsets, {}, parameters, sizes, activations, biases},
                       grad_energies, grad_forces);
}
Tensor energy_forces_stored_backward(const Tensor& grad_energies, const Tensor& grad_forces,
                                     const Tensor& features, const Tensor& jacobian,
                                     const Tensor& species, const Tensor& offsets,
                                     const Tensor& parameters, Ints sizes, Ints activations,
                                     bool biases) {
  const Source source = Source::stored(features, jacobian);
  return differentiate({source, species, offsets, {}, parameters, sizes, activations, biases},
                       grad_energies, grad_forces);
}

void force_step(const Tensor& coordinates, const Tensor& species, const Tensor& offsets,
                const Tensor& structures, const Tensor& parameters, const Tensor& energy_targets,
                const Tensor& force_targets, const Tensor& energy_weights,
                const Tensor& force_weights, const Tensor& scales, Tensor energy_residuals,
                Tensor force_errors, Tensor losses, Tensor gradient, Doubles descriptor, Ints sizes,
                Ints activations, bool biases) {
  const Source source = Source::recomputed(coordinates, descriptor);
  step({source, species, offsets, structures, parameters, sizes, activations, biases},
       energy_targets, force_targets, energy_weights, force_weights, scales, energy_residuals,
       force_errors, losses, gradient);
}
void force_step_stored(const Tensor& features, const Tensor& jacobian, const Tensor& species,
                       const Tensor& offsets, const Tensor& structures, const Tensor& parameters,
                       const Tensor& energy_targets, const Tensor& force_targets,
                       const Tensor& energy_weights, const Tensor& force_weights,
                       const Tensor& scales, Tensor energy_residuals, Tensor force_errors,
                       Tensor losses, Tensor gradient, Ints sizes, Ints activations, bool biases) {
  const Source source = Source::stored(features, jacobian);
  step({source, species, offsets, structures, parameters, sizes, activations, biases},
       energy_targets, force_targets, energy_weights, force_weights, scales, energy_residuals,
       force_errors, losses, gradient);
}

// ---- shapes ------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> shapes(const Tensor& rows, const Tensor& offsets,
                                  const Tensor& parameters) {
  return {at::empty_symint({offsets.sym_size(0) - 1}, parameters.options().dtype(at::kDouble)),
          at::empty_symint({rows.sym_size(0), 3}, parameters.options())};
}
std::tuple<Tensor, Tensor> energy_forces_meta(const Tensor& coordinates, const Tensor&,
                                              const Tensor& offsets, const Tensor& parameters,
                                              const std::optional<Tensor>&, Doubles, Ints, Ints,
                                              bool) {
  return shapes(coordinates, offsets, parameters);
}
std::tuple<Tensor, Tensor> energy_forces_stored_meta(const Tensor& features, const Tensor&,
                                                     const Tensor&, const Tensor& offsets,
                                                     const Tensor& parameters,
                                                     const std::optional<Tensor>&, Ints, Ints,
                                                     bool) {
  return shapes(features, offsets, parameters);
}
Tensor energy_forces_backward_meta(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const Tensor&, const Tensor& parameters, Doubles, Ints, Ints,
                                   bool) {
  return at::empty_like(parameters);
}
Tensor energy_forces_stored_backward_meta(const Tensor&, const Tensor&, const Tensor&,
                                          const Tensor&, const Tensor&, const Tensor&,
                                          const Tensor& parameters, Ints, Ints, bool) {
  return at::empty_like(parameters);
}
void force_step_meta(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                     const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                     Tensor, Tensor, Tensor, Tensor, Doubles, Ints, Ints, bool) {}
void force_step_stored_meta(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const Tensor&, const Tensor&, const Tensor&, Tensor, Tensor, Tensor,
                            Tensor, Ints, Ints, bool) {}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, CPU, m) {
  m.impl("energy_forces", energy_forces);
  m.impl("energy_forces_stored", energy_forces_stored);
  m.impl("energy_forces_backward", energy_forces_backward);
  m.impl("energy_forces_stored_backward", energy_forces_stored_backward);
  m.impl("force_step", force_step);
  m.impl("force_step_stored", force_step_stored);
}

TORCH_LIBRARY_IMPL(kinml_fast, Meta, m) {
  m.impl("energy_forces", energy_forces_meta);
  m.impl("energy_forces_stored", energy_forces_stored_meta);
  m.impl("energy_forces_backward", energy_forces_backward_meta);
  m.impl("energy_forces_stored_backward", energy_forces_stored_backward_meta);
  m.impl("force_step", force_step_meta);
  m.impl("force_step_stored", force_step_stored_meta);
}

}  // namespace kinml::ops
