// The ops for energies and forces together, on any device: checks and memory here, computation in
// Backend.
//
//   check_values(SystemArguments, n_species)   may look at values of indices
//   energy_forces<T>(Model, System, first_level, energies, forces, like)   as the entries of
//   energy_forces_backward<T>(...), force_step<T>(...)   csrc/cpu/force_step_cpu.h, with a tensor
//                                                        on the device instead of threads
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "arguments.h"

namespace kinml::ops {

template <class Backend>
struct ForceOps {
  static std::tuple<at::Tensor, at::Tensor> energy_forces(const OptionalTensors& system_,
                                                          const at::Tensor& parameters,
                                                          const std::optional<at::Tensor>& sae,
                                                          at::ArrayRef<double> descriptor,
                                                          at::IntArrayRef networks,
                                                          int64_t first_level) {
    const SystemArguments system(system_);
    const ModelArguments model(system, parameters, sae, descriptor, networks, first_level);
    Backend::check_values(system, model.networks.n_species());
    const int64_t n_atoms = system.has_forces() ? system.n_atoms() : 0;
    const auto options = model.parameters.options();
    at::Tensor energies =
        at::empty(model.shape<int64_t>({system.count()}), options.dtype(at::kDouble));
    at::Tensor forces = at::empty(model.shape<int64_t>({n_atoms, 3}), options);
    with_type(model.parameters, [&](auto zero) {
      using T = decltype(zero);
      Backend::template energy_forces<T>(model.view<T>(), system.view<T>(), first_level,
                                         energies.mutable_data_ptr<double>(),
                                         forces.mutable_data_ptr<T>(), model.parameters);
    });
    return {energies, forces};
  }

  static at::Tensor energy_forces_backward(const at::Tensor& grad_energies,
                                           const at::Tensor& grad_forces,
                                           const OptionalTensors& system_,
                                           const at::Tensor& parameters,
                                           at::ArrayRef<double> descriptor,
                                           at::IntArrayRef networks, int64_t first_level) {
    const SystemArguments system(system_);
    const ModelArguments model(system, parameters, std::nullopt, descriptor, networks, first_level);
    Backend::check_values(system, model.networks.n_species());
    check_one_member(model);
    const at::Tensor e = grad_energies.contiguous(), r = grad_forces.contiguous();
    check_doubles(e, "grad_energies", model.shape<int64_t>({system.count()}));
    check_same_type(r, "grad_forces", model.parameters, "parameters");
    const auto shape = model.shape<int64_t>({system.has_forces() ? system.n_atoms() : 0, 3});
    TORCH_CHECK(r.sizes() == at::IntArrayRef(shape), "kinml_fast: grad_forces must have shape ",
                at::IntArrayRef(shape), ", got ", r.sizes());
    at::Tensor gradient = at::empty_like(model.parameters);
    with_type(model.parameters, [&](auto zero) {
      using T = decltype(zero);
      Backend::template energy_forces_backward<T>(model.view<T>(), system.view<T>(), first_level,
                                                  e.const_data_ptr<double>(), r.const_data_ptr<T>(),
                                                  gradient.mutable_data_ptr<T>(), model.parameters);
    });
    return gradient;
  }

  static void force_step(const OptionalTensors& system_, const at::Tensor& structures,
                         const at::Tensor& parameters, const OptionalTensors& loss_,
                         at::TensorList results_, at::ArrayRef<double> descriptor,
                         at::IntArrayRef networks) {
    const SystemArguments system(system_, structures);
    const ModelArguments model(system, parameters, std::nullopt, descriptor, networks, 0);
    Backend::check_values(system, model.networks.n_species());
    check_one_member(model);
    const LossArguments loss(loss_, model.n_levels(), system.n_structures(), system.n_atoms(),
                             system.has_forces(), model.parameters);
    const StepResults results(results_, true, model.n_levels(), system.count(), model.parameters);
    with_type(model.parameters, [&](auto zero) {
      using T = decltype(zero);
      Backend::template force_step<T>(
          model.view<T>(), system.view<T>(), loss.view(), results.losses.mutable_data_ptr<double>(),
          results.gradient.mutable_data_ptr<T>(),
          results.energy_residuals.mutable_data_ptr<double>(),
          results.force_errors.mutable_data_ptr<double>(), model.parameters);
    });
  }

  static void implement(torch::Library& m) {
    m.impl("energy_forces", energy_forces);
    m.impl("energy_forces_backward", energy_forces_backward);
    m.impl("force_step", force_step);
  }

 private:
  static void check_one_member(const ModelArguments& model) {
    TORCH_CHECK(!model.ensemble(),
                "kinml_fast: the members of an ensemble are trained one at a time: give parameters "
                "of shape [n], got ",
                model.parameters.sizes());
  }
};

}  // namespace kinml::ops
