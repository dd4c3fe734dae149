// The ops for energies and forces together, on any device: checks and memory here, computation in
// Backend.
//
//   check_values(SystemArguments, n_species)   may look at values of indices
//   check_loss(SystemArguments, Loss)          and at weights
//   kLooksAtValues                             whether they do: then every atom has a structure
//   energy_forces<T>(Model, System, first_level, Outputs, prepared, like)   as the entries of
//   energy_forces_backward<T>(...), force_step<T>(...)   csrc/cpu/force_step_cpu.h, with a tensor
//   message_bytes<T>(...), force_step_share<T>(...)      on the device instead of threads
//   force_step_join<T>(...)
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "../core/shares.h"
#include "arguments.h"

namespace kinml::ops {

template <class Backend>
struct ForceOps {
  static std::tuple<at::Tensor, at::Tensor> energy_forces(
      const OptionalTensors& system, const at::Tensor& parameters,
      const std::optional<at::Tensor>& sae, at::ArrayRef<double> descriptor,
      at::IntArrayRef networks, int64_t first_level, const std::optional<at::Tensor>& prepared) {
    const auto results = evaluate(system, parameters, sae, descriptor, networks, first_level, false,
                                  false, prepared);
    return {results[0], results[1]};
  }
  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
  energy_forces_virials(const OptionalTensors& system, const at::Tensor& parameters,
                        const std::optional<at::Tensor>& sae, at::ArrayRef<double> descriptor,
                        at::IntArrayRef networks, int64_t first_level, bool atomic,
                        const std::optional<at::Tensor>& prepared) {
    const auto r = evaluate(system, parameters, sae, descriptor, networks, first_level, true,
                            atomic, prepared);
    return {r[0], r[1], r[2], r[3], r[4]};
  }

  static at::Tensor energy_forces_backward(const at::Tensor& grad_energies,
                                           const at::Tensor& grad_forces,
                                           const OptionalTensors& system_,
                                           const at::Tensor& parameters,
                                           at::ArrayRef<double> descriptor,
                                           at::IntArrayRef networks, int64_t first_level,
                                           const std::optional<at::Tensor>& grad_virials) {
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
    at::Tensor w;
    if (grad_virials.has_value()) {
      check_coordinates(system);
      w = grad_virials->contiguous();
      check_doubles(w, "grad_virials", model.shape<int64_t>({system.count(), 3, 3}));
      check_device(w, "grad_virials", model.parameters, "parameters");
    }
    at::Tensor gradient = at::empty_like(model.parameters);
    with_type(model.parameters, [&](auto zero) {
      using T = decltype(zero);
      Backend::template energy_forces_backward<T>(
          model.view<T>(), system.view<T>(), first_level, e.const_data_ptr<double>(),
          r.const_data_ptr<T>(), w.defined() ? w.const_data_ptr<double>() : nullptr,
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
    check_no_repulsion(model);
    const LossArguments loss(loss_, model.n_levels(), system, model.parameters);
    Backend::check_loss(system, loss.view());
    const StepResults results(results_, loss.view(), system.count(), model.parameters);
    with_type(model.parameters, [&](auto zero) {
      using T = decltype(zero);
      Backend::template force_step<T>(model.view<T>(), system.view<T>(), loss.view(),
                                      results.losses.mutable_data_ptr<double>(),
                                      results.gradient.mutable_data_ptr<T>(),
                                      results.energy_residuals.mutable_data_ptr<double>(),
                                      results.errors.mutable_data_ptr<double>(), model.parameters);
    });
  }

  static int64_t message_bytes(const OptionalTensors& system_, const at::Tensor& structures,
                               const OptionalTensors& loss_, const at::Tensor& parameters,
                               int64_t n_ranks) {
    const SystemArguments system(system_, structures);
    Backend::check_values(system, std::numeric_limits<int64_t>::max());
    check_ranks(0, n_ranks);
    const LossArguments loss(loss_, levels_of(loss_), system, parameters);
    Backend::check_loss(system, loss.view());
    int64_t bytes = 0;
    with_type(parameters, [&](auto zero) {
      using T = decltype(zero);
      bytes = Backend::template message_bytes<T>(system.view<T>(), loss.view(), parameters.numel(),
                                                 n_ranks);
    });
    return bytes;
  }

  static void force_step_share(const OptionalTensors& system_, const at::Tensor& structures,
                               const at::Tensor& parameters, const OptionalTensors& loss_,
                               at::Tensor message, at::ArrayRef<double> descriptor,
                               at::IntArrayRef networks, int64_t rank, int64_t n_ranks) {
    const SystemArguments system(system_, structures);
    const ModelArguments model(system, parameters, std::nullopt, descriptor, networks, 0);
    Backend::check_values(system, model.networks.n_species());
    check_one_member(model);
    check_no_repulsion(model);
    const LossArguments loss(loss_, model.n_levels(), system, model.parameters);
    Backend::check_loss(system, loss.view());
    check_ranks(rank, n_ranks);
    with_type(model.parameters, [&](auto zero) {
      using T = decltype(zero);
      const System<T> view = system.view<T>();
      check_messages(message, system,
                     {Backend::template message_bytes<T>(view, loss.view(),
                                                         model.parameters.numel(), n_ranks)});
      Backend::template force_step_share<T>(model.view<T>(), view, loss.view(), rank, n_ranks,
                                            static_cast<std::byte*>(message.mutable_data_ptr()),
                                            model.parameters);
    });
  }

  static void force_step_join(const OptionalTensors& system_, const at::Tensor& structures,
                              const OptionalTensors& loss_, const at::Tensor& messages,
                              at::TensorList results_) {
    const SystemArguments system(system_, structures);
    Backend::check_values(system, std::numeric_limits<int64_t>::max());
    TORCH_CHECK(results_.size() > 1, "kinml_fast: this step has 4 results, got ", results_.size());
    const at::Tensor gradient = results_[1];
    check_same_type(gradient, "gradient", system.numbers(), system.name());
    const int64_t n_levels = levels_of(loss_);
    const LossArguments loss(loss_, n_levels, system, gradient);
    Backend::check_loss(system, loss.view());
    const StepResults results(results_, loss.view(), system.count(), gradient);
    TORCH_CHECK(messages.dim() == 2 && messages.size(0) > 0,
                "kinml_fast: messages must have shape [n_ranks, bytes], got ", messages.sizes());
    const int64_t n_ranks = messages.size(0), n_weights = gradient.numel();
    with_type(gradient, [&](auto zero) {
      using T = decltype(zero);
      const System<T> view = system.view<T>();
      check_messages(
          messages, system,
          {n_ranks, Backend::template message_bytes<T>(view, loss.view(), n_weights, n_ranks)});
      Backend::template force_step_join<T>(
          view, loss.view(), static_cast<const std::byte*>(messages.const_data_ptr()), n_ranks,
          n_weights, results.losses.mutable_data_ptr<double>(),
          results.gradient.mutable_data_ptr<T>(),
          results.energy_residuals.mutable_data_ptr<double>(),
          results.errors.mutable_data_ptr<double>(), gradient);
    });
  }

  static void implement(torch::Library& m) {
    m.impl("energy_forces", energy_forces);
    m.impl("energy_forces_virials", energy_forces_virials);
    m.impl("energy_forces_backward", energy_forces_backward);
    m.impl("force_step", force_step);
    m.impl("message_bytes", message_bytes);
    m.impl("force_step_share", force_step_share);
    m.impl("force_step_join", force_step_join);
  }

 private:
  // Energies, forces, virials, atomic energies, atomic virials; not asked for: empty.
  static std::array<at::Tensor, 5> evaluate(const OptionalTensors& system_,
                                            const at::Tensor& parameters,
                                            const std::optional<at::Tensor>& sae,
                                            at::ArrayRef<double> descriptor,
                                            at::IntArrayRef networks, int64_t first_level,
                                            bool virials, bool atomic,
                                            const std::optional<at::Tensor>& prepared) {
    const SystemArguments system(system_);
    const ModelArguments model(system, parameters, sae, descriptor, networks, first_level);
    Backend::check_values(system, model.networks.n_species());
    if (virials) check_coordinates(system);
    const int64_t n_atoms = system.n_atoms(), n = system.count();
    const auto options = model.parameters.options();
    const auto empty = [&](std::initializer_list<int64_t> last, at::ScalarType type) {
      return at::empty(model.shape<int64_t>(last), options.dtype(type));
    };
    // Of atoms; those of ghosts are not written.
    const auto zeros = [&](std::initializer_list<int64_t> last, at::ScalarType type) {
      return at::zeros(model.shape<int64_t>(last), options.dtype(type));
    };
    const auto type = model.parameters.scalar_type();
    std::array<at::Tensor, 5> r = {empty({n}, at::kDouble),
                                   empty({system.has_forces() ? n_atoms : 0, 3}, type)};
    // Forces of atoms that are in no structure are not written.
    if constexpr (!Backend::kLooksAtValues) r[1].fill_(std::numeric_limits<double>::quiet_NaN());
    if (virials) {
      r[2] = empty({n, 3, 3}, at::kDouble);
      r[3] = zeros({atomic ? n_atoms : 0}, at::kDouble);
      r[4] = zeros({n_atoms, 3, 3}, type);
    }
    with_type(model.parameters, [&](auto zero) {
      using T = decltype(zero);
      Outputs<T> outputs{r[0].mutable_data_ptr<double>(), r[1].mutable_data_ptr<T>()};
      if (atomic) outputs.atomic_energies = r[3].mutable_data_ptr<double>();
      if (virials) {
        outputs.virials = r[2].mutable_data_ptr<double>();
        outputs.atomic_virials = r[4].mutable_data_ptr<T>();
      }
      Backend::template energy_forces<T>(model.view<T>(), system.view<T>(), first_level, outputs,
                                         prepared.has_value() ? *prepared : at::Tensor(),
                                         model.parameters);
    });
    if (virials && !atomic) r[4] = empty({0, 3, 3}, type);
    return r;
  }
  static void check_coordinates(const SystemArguments& system) {
    TORCH_CHECK(!system.stored(), "kinml_fast: virials need coordinates, got stored descriptors");
  }
  static void check_ranks(int64_t rank, int64_t n_ranks) {
    TORCH_CHECK(rank >= 0 && rank < n_ranks, "kinml_fast: rank = ", rank, " is not in [0, ",
                n_ranks, ")");
  }
  // A message, or those of all processes.
  static void check_messages(const at::Tensor& messages, const SystemArguments& system,
                             at::IntArrayRef shape) {
    system.check_here(messages, "messages");
    TORCH_CHECK(
        messages.scalar_type() == at::kByte && messages.sizes() == shape &&
            messages.is_contiguous() &&
            reinterpret_cast<std::uintptr_t>(messages.const_data_ptr()) % Message::kAlignment == 0,
        "kinml_fast: messages must be uint8 of shape ", shape, ", contiguous and aligned to ",
        Message::kAlignment, " bytes, got ", messages.scalar_type(), " of shape ",
        messages.sizes());
  }
  static void check_no_repulsion(const ModelArguments& model) {
    TORCH_CHECK(!model.aev.repulsion.any(),
                "kinml_fast: a training step takes targets without the repulsion, and a descriptor "
                "that has none");
  }
  static void check_one_member(const ModelArguments& model) {
    TORCH_CHECK(!model.ensemble(),
                "kinml_fast: the members of an ensemble are trained one at a time: give parameters "
                "of shape [n], got ",
                model.parameters.sizes());
  }
};

}  // namespace kinml::ops
