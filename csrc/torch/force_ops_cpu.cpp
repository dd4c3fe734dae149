// The ops for energies and forces together on the CPU, and their shapes (Meta).
#include "../cpu/force_step_cpu.h"

#include <limits>
#include <vector>

#include "../cpu/tile.h"
#include "cpu.h"
#include "force_ops.h"

namespace kinml::ops {
namespace {

using at::Tensor;

struct CpuBackend {
  static void check_values(const SystemArguments& system, int64_t n_species) {
    check_system_values(system, n_species);
  }
  template <class T>
  static void energy_forces(const Model<T>& model, const System<T>& system, int64_t first_level,
                            double* energies, T* forces, const Tensor&) {
    cpu::energy_forces<T>(model, system, first_level, energies, forces, threads());
  }
  template <class T>
  static void energy_forces_backward(const Model<T>& model, const System<T>& system,
                                     int64_t first_level, const double* e, const T* r, T* gradient,
                                     const Tensor&) {
    cpu::energy_forces_backward<T>(model, system, first_level, e, r, gradient, threads());
  }
  template <class T>
  static void force_step(const Model<T>& model, const System<T>& system, const Loss& loss,
                         double* losses, T* gradient, double* residuals, double* errors,
                         const Tensor&) {
    cpu::force_step<T>(model, system, loss, losses, gradient, residuals, errors, threads());
  }
};

// ---- parts of a batch ---------------------------------------------------------------------------

Tensor batch_parts(const Tensor& offsets, const Tensor& structures) {
  check_index(offsets, "offsets");
  check_index(structures, "structures");
  const Tensor o = offsets.contiguous(), s = structures.contiguous();
  System<double> system;  // of which only this is looked at
  system.n_structures = o.size(0) - 1;
  system.offsets = o.const_data_ptr<int64_t>();
  system.chosen = s.const_data_ptr<int64_t>();
  system.n_chosen = s.size(0);
  for (int64_t i = 0; i < s.size(0); ++i)
    TORCH_CHECK(system.chosen[i] >= 0 && system.chosen[i] < system.n_structures,
                "kinml_fast: structures[", i, "] = ", system.chosen[i], " is not in [0, ",
                system.n_structures, ")");
  std::vector<int64_t> bounds = {0};
  for (const cpu::Range part : cpu::parts_of(system)) bounds.push_back(part.last);
  return at::tensor(bounds, at::kLong);
}

void force_step_parts(const OptionalTensors& system_, const Tensor& structures,
                      const Tensor& bounds_, const Tensor& parameters, const OptionalTensors& loss_,
                      at::TensorList results, at::ArrayRef<double> descriptor,
                      at::IntArrayRef networks) {
  const SystemArguments system(system_, structures);
  const ModelArguments model(system, parameters, std::nullopt, descriptor, networks, 0);
  check_system_values(system, model.networks.n_species());
  const LossArguments loss(loss_, model.n_levels(), system.n_structures(), system.n_atoms(),
                           system.has_forces(), model.parameters);
  check_index(bounds_, "bounds");
  const Tensor bounds = bounds_.contiguous();
  const int64_t n_parts = bounds.size(0) - 1;
  TORCH_CHECK(n_parts >= 0 && bounds[0].item<int64_t>() == 0 &&
                  bounds[n_parts].item<int64_t>() == system.count() &&
                  (bounds.diff() > 0).all().item<bool>(),
              "kinml_fast: bounds must increase from 0 to the number of structures, ",
              system.count());
  TORCH_CHECK(results.size() == 3, "kinml_fast: this step has 3 results, got ", results.size());
  const int64_t K = model.n_levels(), n = model.parameters.numel();
  check_same_type(results[0], "gradients", model.parameters, "parameters");
  TORCH_CHECK(results[0].sizes() == at::IntArrayRef({n_parts, n}) && results[0].is_contiguous(),
              "kinml_fast: gradients must be contiguous of shape [", n_parts, ", ", n, "], got ",
              results[0].sizes());
  check_doubles(results[1], "energy_residuals", {K, system.count()});
  check_doubles(results[2], "force_errors", {K, system.count(), 3});
  with_type(model.parameters, [&](auto zero) {
    using T = decltype(zero);
    cpu::force_step_parts<T>(
        model.view<T>(), system.view<T>(), loss.view(), bounds.const_data_ptr<int64_t>(), n_parts,
        results[0].mutable_data_ptr<T>(), results[1].mutable_data_ptr<double>(),
        results[2].mutable_data_ptr<double>(), threads());
  });
}

void force_step_join(const OptionalTensors& system_, const Tensor& structures,
                     const OptionalTensors& loss_, const Tensor& gradients_,
                     at::TensorList results_) {
  const SystemArguments system(system_, structures);
  const Tensor targets = entry(loss_, LossArguments::kEnergies),
               gradients = gradients_.contiguous();
  TORCH_CHECK(gradients.dim() == 2, "kinml_fast: gradients must have shape [n_parts, n], got ",
              gradients.sizes());
  TORCH_CHECK(targets.defined() && targets.dim() == 2,
              "kinml_fast: a loss needs energy_targets of shape [levels, n_structures]");
  const int64_t K = targets.size(0), n_parts = gradients.size(0);
  const LossArguments loss(loss_, K, system.n_structures(), system.n_atoms(), system.has_forces(),
                           gradients);
  check_system_values(system, std::numeric_limits<int64_t>::max());
  const StepResults results(results_, true, K, system.count(),
                            gradients.new_empty({gradients.size(1)}));
  with_type(gradients, [&](auto zero) {
    using T = decltype(zero);
    cpu::force_step_join<T>(system.view<T>(), loss.view(), gradients.const_data_ptr<T>(), n_parts,
                            gradients.size(1), results.losses.mutable_data_ptr<double>(),
                            results.gradient.mutable_data_ptr<T>(),
                            results.energy_residuals.mutable_data_ptr<double>(),
                            results.force_errors.mutable_data_ptr<double>(), threads());
  });
}

// ---- shapes ------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> energy_forces_meta(const OptionalTensors& system,
                                              const Tensor& parameters,
                                              const std::optional<Tensor>&, at::ArrayRef<double>,
                                              at::IntArrayRef networks, int64_t first_level) {
  c10::SmallVector<c10::SymInt, 5> leading;
  if (parameters.dim() == 2) leading.push_back(parameters.sym_size(0));
  leading.push_back(unpack_networks(networks).n_levels() - first_level);
  const Tensor coordinates = entry(system, SystemArguments::kCoordinates);
  const bool has_forces =
      coordinates.defined() || entry(system, SystemArguments::kJacobian).defined();
  const auto shape = [&](std::initializer_list<c10::SymInt> last) {
    auto result = leading;
    result.insert(result.end(), last.begin(), last.end());
    return result;
  };
  const c10::SymInt n_structures = entry(system, SystemArguments::kOffsets).sym_size(0) - 1;
  const c10::SymInt n_atoms =
      has_forces ? entry(system, SystemArguments::kSpecies).sym_size(0) : c10::SymInt(0);
  return {at::empty_symint(shape({n_structures}), parameters.options().dtype(at::kDouble)),
          at::empty_symint(shape({n_atoms, 3}), parameters.options())};
}
Tensor energy_forces_backward_meta(const Tensor&, const Tensor&, const OptionalTensors&,
                                   const Tensor& parameters, at::ArrayRef<double>, at::IntArrayRef,
                                   int64_t) {
  return at::empty_like(parameters);
}
void force_step_meta(const OptionalTensors&, const Tensor&, const Tensor&, const OptionalTensors&,
                     at::TensorList, at::ArrayRef<double>, at::IntArrayRef) {}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, CPU, m) {
  ForceOps<CpuBackend>::implement(m);
  m.impl("batch_parts", batch_parts);
  m.impl("force_step_parts", force_step_parts);
  m.impl("force_step_join", force_step_join);
}

TORCH_LIBRARY_IMPL(kinml_fast, Meta, m) {
  m.impl("energy_forces", energy_forces_meta);
  m.impl("energy_forces_backward", energy_forces_backward_meta);
  m.impl("force_step", force_step_meta);
}

}  // namespace kinml::ops
