// The ops for energies and forces together, for any device.
//
// A Backend has check_values(call), for what the shapes do not say, and templates over the number
// type: energy_forces(call, sae, levels, energies, forces), energy_forces_backward(call, levels, e,
// r, gradient), force_step(call, loss, losses, gradient, residuals, errors).
#pragma once

#include <torch/library.h>

#include <tuple>
#include <vector>

#include "checks.h"

namespace kinml::ops {

using at::Tensor;
using Doubles = at::ArrayRef<double>;
using Ints = at::IntArrayRef;

// Where descriptors come from: coordinates, or stored ones with their Jacobians.
struct Source {
  bool stores = false;
  Tensor coordinates, features, jacobian;  // the last may be missing: then there are no forces
  AevParameters parameters;

  static Source recomputed(const Tensor& coordinates, Doubles descriptor) {
    Source s;
    check_floating(coordinates, "coordinates");
    TORCH_CHECK(coordinates.dim() == 2 && coordinates.size(1) == 3,
                "kinml_fast: coordinates must have shape [n_atoms, 3], got ", coordinates.sizes());
    s.coordinates = coordinates.contiguous();
    s.parameters = unpack_descriptor(descriptor);
    return s;
  }
  static Source stored(const Tensor& features, const std::optional<Tensor>& jacobian) {
    Source s;
    s.stores = true;
    check_floating(features, "features");
    TORCH_CHECK(features.dim() == 2, "kinml_fast: features must have shape [n_atoms, D], got ",
                features.sizes());
    s.features = features.contiguous();
    if (!jacobian.has_value()) return s;
    check_same_type(*jacobian, "jacobian", features, "features");
    TORCH_CHECK(jacobian->dim() == 3 && jacobian->size(0) == features.size(0) &&
                    jacobian->size(1) == features.size(1),
                "kinml_fast: jacobian must have shape [", features.size(0), ", ", features.size(1),
                ", columns], got ", jacobian->sizes());
    s.jacobian = jacobian->contiguous();
    return s;
  }
  const Tensor& numbers() const { return stores ? features : coordinates; }
  int64_t n_atoms() const { return numbers().size(0); }
  int64_t length() const { return stores ? features.size(1) : parameters.length(); }
  bool has_forces() const { return !stores || jacobian.defined(); }
  template <class T>
  void describe(ForceBatch<T>& batch) const {
    if (stores) {
      batch.features = features.const_data_ptr<T>();
      batch.length = features.size(1);
      if (jacobian.defined()) {
        batch.jacobian = jacobian.const_data_ptr<T>();
        batch.columns = jacobian.size(2);
      }
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
  NetworkLevels networks;
  int64_t n_members;
  int64_t n_structures;  // of the data set
  int64_t count;         // of the batch

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
                    source.stores ? "features" : "coordinates");
    networks = unpack_levels(weights, source.length(), sizes, activations, biases);
    n_members = weights.dim() == 2 ? weights.size(0) : 1;
    const int64_t n_species = networks.n_species();
    TORCH_CHECK(source.stores || n_species == source.parameters.n_species,
                "kinml_fast: the networks are for ", n_species, " species, the descriptor for ",
                source.parameters.n_species);
    n_structures = offsets.size(0) - 1;
    if (structures_.has_value()) {
      check_index(*structures_, "structures");
      structures = structures_->contiguous();
    }
    count = structures.defined() ? structures.size(0) : n_structures;
    const auto here = [&](const Tensor& t, const char* name) {
      check_device(t, name, source.numbers(), source.stores ? "features" : "coordinates");
    };
    here(species, "species");
    here(offsets, "offsets");
    here(weights, "parameters");
    if (structures.defined()) here(structures, "structures");
    if (source.jacobian.defined()) here(source.jacobian, "jacobian");
  }

  template <class T>
  ForceBatch<T> batch() const {
    ForceBatch<T> b{species.const_data_ptr<int64_t>(),
                    offsets.const_data_ptr<int64_t>(),
                    structures.defined() ? structures.const_data_ptr<int64_t>() : nullptr,
                    count,
                    n_structures,
                    source.n_atoms()};
    source.describe(b);
    return b;
  }
};

inline void check_doubles(const Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(t.scalar_type() == at::kDouble && t.sizes() == shape && t.is_contiguous(),
              "kinml_fast: ", name, " must be a contiguous float64 tensor of shape ", shape,
              ", got ", t.scalar_type(), " of shape ", t.sizes());
}

// Shape of outputs: [members, levels, ...], without the dimensions that there are not.
template <class Number>
c10::SmallVector<Number, 5> output_shape(bool ensemble, Number n_members, bool levels,
                                         Number n_levels, std::initializer_list<Number> last) {
  c10::SmallVector<Number, 5> shape;
  if (ensemble) shape.push_back(n_members);
  if (levels) shape.push_back(n_levels);
  for (const Number& n : last) shape.push_back(n);
  return shape;
}
inline Levels which(bool levels) {
  return levels ? Levels::all : Levels::highest;
}

inline void check_one_member(const Call& call) {
  TORCH_CHECK(call.weights.dim() == 1,
              "kinml_fast: the members of an ensemble are trained one at a time: give parameters "
              "of shape [n], got ",
              call.weights.sizes());
}

// Targets and weights of a training batch, as in force_step of the schema; scales [2].
struct Loss {
  const double *energies, *forces, *energy_weights, *force_weights, *scales;
};

template <class Backend>
struct ForceOps {
  static std::tuple<Tensor, Tensor> evaluate(const Call& call, const std::optional<Tensor>& sae,
                                             bool levels) {
    Backend::check_values(call);
    const auto shape = [&](std::initializer_list<int64_t> last) {
      return output_shape<int64_t>(call.weights.dim() == 2, call.n_members, levels,
                                   call.networks.count(), last);
    };
    const int64_t n_atoms = call.source.has_forces() ? call.source.n_atoms() : 0;
    Tensor energies = at::empty(shape({call.count}), call.weights.options().dtype(at::kDouble));
    Tensor forces = at::empty(shape({n_atoms, 3}), call.weights.options());
    Tensor shift;
    if (sae.has_value()) {
      check_device(*sae, "sae", call.weights, "parameters");
      shift = sae->contiguous();
      check_doubles(shift, "sae", shape({call.networks.n_species()}));
    }
    with_type(call.weights, [&](auto zero) {
      using T = decltype(zero);
      Backend::template energy_forces<T>(
          call, shift.defined() ? shift.const_data_ptr<double>() : nullptr, which(levels),
          energies.mutable_data_ptr<double>(), forces.mutable_data_ptr<T>());
    });
    return {energies, forces};
  }

  static Tensor differentiate(const Call& call, const Tensor& grad_energies,
                              const Tensor& grad_forces, bool levels) {
    Backend::check_values(call);
    check_one_member(call);
    const Tensor e = grad_energies.contiguous(), r = grad_forces.contiguous();
    const auto shape = [&](std::initializer_list<int64_t> last) {
      return output_shape<int64_t>(false, 1, levels, call.networks.count(), last);
    };
    check_doubles(e, "grad_energies", shape({call.count}));
    check_same_type(r, "grad_forces", call.weights, "parameters");
    const auto forces = shape({call.source.has_forces() ? call.source.n_atoms() : 0, 3});
    TORCH_CHECK(r.sizes() == at::IntArrayRef(forces), "kinml_fast: grad_forces must have shape ",
                at::IntArrayRef(forces), ", got ", r.sizes());
    Tensor gradient = at::empty_like(call.weights);
    with_type(call.weights, [&](auto zero) {
      using T = decltype(zero);
      Backend::template energy_forces_backward<T>(call, which(levels), e.const_data_ptr<double>(),
                                                  r.const_data_ptr<T>(),
                                                  gradient.mutable_data_ptr<T>());
    });
    return gradient;
  }

  static void step(const Call& call, const Tensor& energy_targets, const Tensor& force_targets,
                   const Tensor& energy_weights, const Tensor& force_weights, const Tensor& scales,
                   Tensor& energy_residuals, Tensor& force_errors, Tensor& losses,
                   Tensor& gradient) {
    Backend::check_values(call);
    check_one_member(call);
    const int64_t n = call.n_structures, n_levels = call.networks.count();
    const auto check = [&](const Tensor& t, const char* name, std::initializer_list<int64_t> last) {
      check_doubles(t, name, output_shape<int64_t>(false, 1, n_levels > 1, n_levels, last));
    };
    check(energy_targets, "energy_targets", {n});
    check(energy_weights, "energy_weights", {n});
    if (call.source.has_forces()) {
      check(force_targets, "force_targets", {call.source.n_atoms(), 3});
      check(force_weights, "force_weights", {n});
    }
    check_doubles(scales, "scales", {2});
    check(energy_residuals, "energy_residuals", {call.count});
    check(force_errors, "force_errors", {call.count, 3});
    check_doubles(losses, "losses", {2});
    check_same_type(gradient, "gradient", call.weights, "parameters");
    TORCH_CHECK(gradient.sizes() == call.weights.sizes() && gradient.is_contiguous(),
                "kinml_fast: gradient must be contiguous and have the shape of parameters, ",
                call.weights.sizes(), ", got ", gradient.sizes());
    const auto forces = [&](const Tensor& t) {
      return call.source.has_forces() ? t.const_data_ptr<double>() : nullptr;
    };
    const Loss loss{energy_targets.const_data_ptr<double>(), forces(force_targets),
                    energy_weights.const_data_ptr<double>(), forces(force_weights),
                    scales.const_data_ptr<double>()};
    with_type(call.weights, [&](auto zero) {
      using T = decltype(zero);
      Backend::template force_step<T>(
          call, loss, losses.mutable_data_ptr<double>(), gradient.mutable_data_ptr<T>(),
          energy_residuals.mutable_data_ptr<double>(), force_errors.mutable_data_ptr<double>());
    });
  }

  static std::tuple<Tensor, Tensor> energy_forces(const Tensor& coordinates, const Tensor& species,
                                                  const Tensor& offsets, const Tensor& parameters,
                                                  const std::optional<Tensor>& sae,
                                                  Doubles descriptor, Ints sizes, Ints activations,
                                                  bool biases, bool levels) {
    const Source source = Source::recomputed(coordinates, descriptor);
    return evaluate({source, species, offsets, {}, parameters, sizes, activations, biases}, sae,
                    levels);
  }
  static std::tuple<Tensor, Tensor> energy_forces_stored(
      const Tensor& features, const std::optional<Tensor>& jacobian, const Tensor& species,
      const Tensor& offsets, const Tensor& parameters, const std::optional<Tensor>& sae, Ints sizes,
      Ints activations, bool biases, bool levels) {
    const Source source = Source::stored(features, jacobian);
    return evaluate({source, species, offsets, {}, parameters, sizes, activations, biases}, sae,
                    levels);
  }

  static Tensor energy_forces_backward(const Tensor& grad_energies, const Tensor& grad_forces,
                                       const Tensor& coordinates, const Tensor& species,
                                       const Tensor& offsets, const Tensor& parameters,
                                       Doubles descriptor, Ints sizes, Ints activations,
                                       bool biases, bool levels) {
    const Source source = Source::recomputed(coordinates, descriptor);
    return differentiate({source, species, offsets, {}, parameters, sizes, activations, biases},
                         grad_energies, grad_forces, levels);
  }
  static Tensor energy_forces_stored_backward(const Tensor& grad_energies,
                                              const Tensor& grad_forces, const Tensor& features,
                                              const std::optional<Tensor>& jacobian,
                                              const Tensor& species, const Tensor& offsets,
                                              const Tensor& parameters, Ints sizes,
                                              Ints activations, bool biases, bool levels) {
    const Source source = Source::stored(features, jacobian);
    return differentiate({source, species, offsets, {}, parameters, sizes, activations, biases},
                         grad_energies, grad_forces, levels);
  }

  static void force_step(const Tensor& coordinates, const Tensor& species, const Tensor& offsets,
                         const Tensor& structures, const Tensor& parameters,
                         const Tensor& energy_targets, const Tensor& force_targets,
                         const Tensor& energy_weights, const Tensor& force_weights,
                         const Tensor& scales, Tensor energy_residuals, Tensor force_errors,
                         Tensor losses, Tensor gradient, Doubles descriptor, Ints sizes,
                         Ints activations, bool biases) {
    const Source source = Source::recomputed(coordinates, descriptor);
    step({source, species, offsets, structures, parameters, sizes, activations, biases},
         energy_targets, force_targets, energy_weights, force_weights, scales, energy_residuals,
         force_errors, losses, gradient);
  }
  static void force_step_stored(const Tensor& features, const std::optional<Tensor>& jacobian,
                                const Tensor& species, const Tensor& offsets,
                                const Tensor& structures, const Tensor& parameters,
                                const Tensor& energy_targets, const Tensor& force_targets,
                                const Tensor& energy_weights, const Tensor& force_weights,
                                const Tensor& scales, Tensor energy_residuals, Tensor force_errors,
                                Tensor losses, Tensor gradient, Ints sizes, Ints activations,
                                bool biases) {
    const Source source = Source::stored(features, jacobian);
    step({source, species, offsets, structures, parameters, sizes, activations, biases},
         energy_targets, force_targets, energy_weights, force_weights, scales, energy_residuals,
         force_errors, losses, gradient);
  }

  static void implement(torch::Library& m) {
    m.impl("energy_forces", energy_forces);
    m.impl("energy_forces_stored", energy_forces_stored);
    m.impl("energy_forces_backward", energy_forces_backward);
    m.impl("energy_forces_stored_backward", energy_forces_stored_backward);
    m.impl("force_step", force_step);
    m.impl("force_step_stored", force_step_stored);
  }
};

}  // namespace kinml::ops
