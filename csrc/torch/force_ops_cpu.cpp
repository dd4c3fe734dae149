// The ops for energies and forces together on the CPU, and their shapes (Meta).
#include "../cpu/force_step_cpu.h"

#include "cpu.h"
#include "force_ops.h"

namespace kinml::ops {
namespace {

using at::Tensor;

struct CpuBackend {
  static void check_values(const SystemArguments& system, int64_t n_species) {
    check_system_values(system, n_species);
  }
  static void check_loss(const SystemArguments& system, const Loss& loss) {
    check_stress_weights(system, loss);
  }
  template <class T>
  static void energy_forces(const Model<T>& model, const System<T>& system, int64_t first_level,
                            const Outputs<T>& outputs, const Tensor&) {
    cpu::energy_forces<T>(model, system, first_level, outputs, threads());
  }
  template <class T>
  static void energy_forces_backward(const Model<T>& model, const System<T>& system,
                                     int64_t first_level, const double* e, const T* r,
                                     const double* w, T* gradient, const Tensor&) {
    cpu::energy_forces_backward<T>(model, system, first_level, e, r, w, gradient, threads());
  }
  template <class T>
  static void force_step(const Model<T>& model, const System<T>& system, const Loss& loss,
                         double* losses, T* gradient, double* residuals, double* errors,
                         const Tensor&) {
    cpu::force_step<T>(model, system, loss, losses, gradient, residuals, errors, threads());
  }
  template <class T>
  static int64_t message_bytes(const System<T>& system, const Loss& loss, int64_t n_weights,
                               int64_t n_ranks) {
    return cpu::message_bytes<T>(system, loss, n_weights, n_ranks);
  }
  template <class T>
  static void force_step_share(const Model<T>& model, const System<T>& system, const Loss& loss,
                               int64_t rank, int64_t n_ranks, std::byte* message, const Tensor&) {
    cpu::force_step_share<T>(model, system, loss, rank, n_ranks, message, threads());
  }
  template <class T>
  static void force_step_join(const System<T>& system, const Loss& loss, const std::byte* messages,
                              int64_t n_ranks, int64_t n_weights, double* losses, T* gradient,
                              double* residuals, double* errors, const Tensor&) {
    cpu::force_step_join<T>(system, loss, messages, n_ranks, n_weights, losses, gradient, residuals,
                            errors, threads());
  }
};

// ---- shapes ------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> energy_forces_virials_meta(
    const OptionalTensors& system, const Tensor& parameters, const std::optional<Tensor>&,
    at::ArrayRef<double>, at::IntArrayRef networks, int64_t first_level, bool atomic) {
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
  const c10::SymInt atoms = atomic ? n_atoms : c10::SymInt(0);
  const auto doubles = parameters.options().dtype(at::kDouble);
  return {at::empty_symint(shape({n_structures}), doubles),
          at::empty_symint(shape({n_atoms, 3}), parameters.options()),
          at::empty_symint(shape({n_structures, 3, 3}), doubles),
          at::empty_symint(shape({atoms}), doubles),
          at::empty_symint(shape({atoms, 3, 3}), parameters.options())};
}
std::tuple<Tensor, Tensor> energy_forces_meta(const OptionalTensors& system,
                                              const Tensor& parameters,
                                              const std::optional<Tensor>& sae,
                                              at::ArrayRef<double> descriptor,
                                              at::IntArrayRef networks, int64_t first_level) {
  const auto all =
      energy_forces_virials_meta(system, parameters, sae, descriptor, networks, first_level, false);
  return {std::get<0>(all), std::get<1>(all)};
}
Tensor energy_forces_backward_meta(const Tensor&, const Tensor&, const OptionalTensors&,
                                   const Tensor& parameters, at::ArrayRef<double>, at::IntArrayRef,
                                   int64_t, const std::optional<Tensor>&) {
  return at::empty_like(parameters);
}
void force_step_meta(const OptionalTensors&, const Tensor&, const Tensor&, const OptionalTensors&,
                     at::TensorList, at::ArrayRef<double>, at::IntArrayRef) {}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, CPU, m) {
  ForceOps<CpuBackend>::implement(m);
}

TORCH_LIBRARY_IMPL(kinml_fast, Meta, m) {
  m.impl("energy_forces", energy_forces_meta);
  m.impl("energy_forces_virials", energy_forces_virials_meta);
  m.impl("energy_forces_backward", energy_forces_backward_meta);
  m.impl("force_step", force_step_meta);
}

}  // namespace kinml::ops
