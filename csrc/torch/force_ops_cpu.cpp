// The ops for energies and forces together on the CPU, and their shapes (Meta).
#include <ATen/Parallel.h>

#include "../cpu/force_step_cpu.h"
#include "force_ops.h"

namespace kinml::ops {
namespace {

int threads() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

struct CpuBackend {
  static void check_values(const Call& call) {
    const Tensor& structures = call.structures;
    const int64_t n_atoms = call.source.n_atoms(), n_structures = call.n_structures,
                  n_species = call.networks.n_species();
    const int64_t* const z = call.species.const_data_ptr<int64_t>();
    const int64_t* const o = call.offsets.const_data_ptr<int64_t>();
    if (structures.defined()) {
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
    if (call.source.jacobian.defined())
      for (int64_t i = 0; i < call.count; ++i) {
        const int64_t s = structures.defined() ? structures.const_data_ptr<int64_t>()[i] : i;
        TORCH_CHECK(3 * (o[s + 1] - o[s]) <= call.source.jacobian.size(2), "kinml_fast: structure ",
                    s, " has ", o[s + 1] - o[s], " atoms, but the Jacobian has columns for ",
                    call.source.jacobian.size(2) / 3);
      }
  }

  template <class T>
  static void energy_forces(const Call& call, const double* sae, Levels levels, double* energies,
                            T* forces) {
    cpu::energy_forces<T>(call.networks, call.weights.const_data_ptr<T>(), call.n_members,
                          call.batch<T>(), sae, levels, energies, forces, threads());
  }
  template <class T>
  static void energy_forces_backward(const Call& call, Levels levels, const double* e, const T* r,
                                     T* gradient) {
    cpu::energy_forces_backward<T>(call.networks, call.weights.const_data_ptr<T>(), call.batch<T>(),
                                   levels, e, r, gradient, threads());
  }
  template <class T>
  static void force_step(const Call& call, const Loss& loss, double* losses, T* gradient,
                         double* residuals, double* errors) {
    cpu::force_step<T>(call.networks, call.weights.const_data_ptr<T>(), call.batch<T>(),
                       {loss.energies, loss.forces, loss.energy_weights, loss.force_weights,
                        loss.scales[0], loss.scales[1]},
                       losses, gradient, residuals, errors, threads());
  }
};

// ---- shapes ------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> shapes(const Tensor& rows, bool has_forces, const Tensor& offsets,
                                  const Tensor& parameters, int64_t length, Ints sizes,
                                  Ints activations, bool levels) {
  const bool ensemble = parameters.dim() == 2;
  const c10::SymInt n_members = ensemble ? parameters.sym_size(0) : c10::SymInt(1);
  const int64_t n_levels = count_levels(length, sizes, activations).second;
  const auto shape = [&](std::initializer_list<c10::SymInt> last) {
    return output_shape<c10::SymInt>(ensemble, n_members, levels, n_levels, last);
  };
  const c10::SymInt n_atoms = has_forces ? rows.sym_size(0) : c10::SymInt(0);
  return {
      at::empty_symint(shape({offsets.sym_size(0) - 1}), parameters.options().dtype(at::kDouble)),
      at::empty_symint(shape({n_atoms, 3}), parameters.options())};
}
std::tuple<Tensor, Tensor> energy_forces_meta(const Tensor& coordinates, const Tensor&,
                                              const Tensor& offsets, const Tensor& parameters,
                                              const std::optional<Tensor>&, Doubles descriptor,
                                              Ints sizes, Ints activations, bool, bool levels) {
  return shapes(coordinates, true, offsets, parameters, unpack_descriptor(descriptor).length(),
                sizes, activations, levels);
}
std::tuple<Tensor, Tensor> energy_forces_stored_meta(const Tensor& features,
                                                     const std::optional<Tensor>& jacobian,
                                                     const Tensor&, const Tensor& offsets,
                                                     const Tensor& parameters,
                                                     const std::optional<Tensor>&, Ints sizes,
                                                     Ints activations, bool, bool levels) {
  return shapes(features, jacobian.has_value(), offsets, parameters, features.size(1), sizes,
                activations, levels);
}
Tensor energy_forces_backward_meta(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const Tensor&, const Tensor& parameters, Doubles, Ints, Ints,
                                   bool, bool) {
  return at::empty_like(parameters);
}
Tensor energy_forces_stored_backward_meta(const Tensor&, const Tensor&, const Tensor&,
                                          const std::optional<Tensor>&, const Tensor&,
                                          const Tensor&, const Tensor& parameters, Ints, Ints, bool,
                                          bool) {
  return at::empty_like(parameters);
}
void force_step_meta(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                     const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                     Tensor, Tensor, Tensor, Tensor, Doubles, Ints, Ints, bool) {}
void force_step_stored_meta(const Tensor&, const std::optional<Tensor>&, const Tensor&,
                            const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const Tensor&, const Tensor&, const Tensor&, const Tensor&, Tensor,
                            Tensor, Tensor, Tensor, Ints, Ints, bool) {}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, CPU, m) {
  ForceOps<CpuBackend>::implement(m);
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
