// The ops for energies and forces together on the GPU.
#include "../cuda/force_step_cuda.h"

#include "force_ops.h"
#include "gpu.h"
#include "gpu_aev.h"
#include "gpu_networks.h"

namespace kinml::ops {
namespace {

// Structures of more atoms on average are worked on by all multiprocessors, one pass after the
// other; otherwise a block has a structure from beginning to end.
constexpr int64_t kLargeStructure = 256;

// The energies and forces of a call by the passes for whole batches.
template <class T>
void evaluate_large(const Call& call, const double* sae, Levels levels, double* energies, T* forces,
                    const Gpu& gpu) {
  const NetworkLevels& networks = call.networks;
  const int64_t n_species = networks.n_species(), n_levels = networks.count();
  const int64_t n = call.source.n_atoms(), n_structures = call.n_structures;
  const int64_t first = levels == Levels::all ? 0 : n_levels - 1;
  const GpuAev aev(call.source.coordinates, call.species, call.offsets, call.source.parameters,
                   gpu);
  const at::Tensor a = aev.forward();
  const auto [rows, owners, starts] = gpu_species_order(call.species, call.offsets, n_species);
  // Where each atom stands in the order of the species.
  const at::Tensor places =
      at::empty_like(rows).index_copy_(0, rows, at::arange(n, rows.options()));
  const auto to_atoms = [&](const at::Tensor& sorted) { return sorted.index_select(0, places); };
  const at::Tensor seeds = at::ones({n_structures}, gpu.options.dtype(at::kDouble));
  at::Tensor weights = call.weights;
  if (weights.dim() == 1) weights = weights.unsqueeze(0);
  for (int64_t m = 0; m < call.n_members; ++m) {
    at::Tensor eps, g;
    int64_t begin = 0;
    for (int64_t k = 0; k < n_levels; ++k) {
      const cuda::ChainPlan plan = cuda::plan_chain(NetworkLevels{{networks.shapes[k]}});
      const at::Tensor own = weights[m].slice(0, begin, begin + plan.parameters).contiguous();
      begin += plan.parameters;
      const at::Tensor features = k == 0 ? a : at::cat({a, eps.unsqueeze(1)}, 1);
      const at::Tensor packed = at::empty({plan.packed}, gpu.options);
      const int64_t per_atom = 2 * int64_t(plan.hidden);
      const at::Tensor saved = at::empty({n, per_atom}, gpu.options);
      const at::Tensor atomic = at::full({n}, NAN, gpu.options);
      const at::Tensor slopes = at::full({n, features.size(1)}, NAN, gpu.options);
      const at::Tensor memory = gpu.workspace(cuda::networks_workspace<T>(plan, n, false, false));
      char* const space = bytes_of(memory);
      cuda::pack_networks<T>(plan, own.const_data_ptr<T>(), 1, packed.mutable_data_ptr<T>(),
                             gpu.stream);
      const cuda::NetworkBatch<T> batch{packed.const_data_ptr<T>(),
                                        features.const_data_ptr<T>(),
                                        features.size(1),
                                        n,
                                        rows.const_data_ptr<int64_t>(),
                                        owners.const_data_ptr<int64_t>(),
                                        starts.const_data_ptr<int64_t>(),
                                        n,
                                        n_structures};
      cuda::networks_forward<T>(plan, batch, saved.mutable_data_ptr<T>(), per_atom,
                                atomic.mutable_data_ptr<T>(), space, gpu.stream);
      cuda::networks_backward<T>(plan, batch, saved.const_data_ptr<T>(), per_atom,
                                 seeds.const_data_ptr<double>(), slopes.mutable_data_ptr<T>(),
                                 static_cast<T*>(nullptr), space, gpu.stream);
      const at::Tensor f = to_atoms(atomic), p = to_atoms(slopes);
      const int64_t length = a.size(1);
      eps = k == 0 ? f : eps + f;
      g = k == 0 ? p : p.slice(1, 0, length) + (1 + p.slice(1, length)) * g;
      if (k < first) continue;
      const int64_t output = m * (n_levels - first) + k - first;
      // Shifts are found by the place in the order of the species.
      const at::Tensor sorted = eps.index_select(0, rows);
      cuda::sum_by_structure<T>(sorted.const_data_ptr<T>(), places.const_data_ptr<int64_t>(),
                                call.offsets.const_data_ptr<int64_t>(), n_structures,
                                starts.const_data_ptr<int64_t>(), static_cast<int>(n_species),
                                sae == nullptr ? nullptr : sae + output * n_species,
                                energies + output * n_structures, gpu.stream);
      at::Tensor own_forces = at::from_blob(forces + output * 3 * n, {n, 3}, gpu.options);
      at::neg_out(own_forces, aev.vjp(g.contiguous()));
    }
  }
}

struct CudaBackend {
  // To look at the values of indices would wait for the GPU: what is not there gives NaN.
  static void check_values(const Call&) {}

  template <class T>
  static void energy_forces(const Call& call, const double* sae, Levels levels, double* energies,
                            T* forces) {
    translated(call.count, [&] {
      const Gpu gpu(call.weights);
      if (!call.source.stores && call.source.n_atoms() > kLargeStructure * call.n_structures) {
        evaluate_large(call, sae, levels, energies, forces, gpu);
        return;
      }
      const cuda::ChainPlan plan = cuda::plan_chain(call.networks);
      const ForceBatch<T> batch = call.batch<T>();
      const at::Tensor space =
          gpu.workspace(cuda::energy_forces_workspace<T>(plan, call.n_members, batch));
      cuda::energy_forces<T>(plan, call.weights.const_data_ptr<T>(), call.n_members, batch, sae,
                             levels, energies, call.source.has_forces() ? forces : nullptr,
                             bytes_of(space), gpu.stream);
    });
  }
  template <class T>
  static void energy_forces_backward(const Call& call, Levels levels, const double* e, const T* r,
                                     T* gradient) {
    translated(call.count, [&] {
      const Gpu gpu(call.weights);
      const cuda::ChainPlan plan = cuda::plan_chain(call.networks);
      const ForceBatch<T> batch = call.batch<T>();
      const at::Tensor space = gpu.workspace(cuda::force_step_workspace<T>(plan, batch));
      cuda::energy_forces_backward<T>(plan, call.weights.const_data_ptr<T>(), batch, levels, e, r,
                                      gradient, bytes_of(space), gpu.stream);
    });
  }
  template <class T>
  static void force_step(const Call& call, const Loss& loss, double* losses, T* gradient,
                         double* residuals, double* errors) {
    translated(call.count, [&] {
      const Gpu gpu(call.weights);
      const cuda::ChainPlan plan = cuda::plan_chain(call.networks);
      const ForceBatch<T> batch = call.batch<T>();
      const at::Tensor space = gpu.workspace(cuda::force_step_workspace<T>(plan, batch));
      cuda::force_step<T>(
          plan, call.weights.const_data_ptr<T>(), batch,
          {loss.energies, loss.forces, loss.energy_weights, loss.force_weights, loss.scales},
          losses, gradient, residuals, errors, bytes_of(space), gpu.stream);
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, KINML_GPU_KEY, m) {
  ForceOps<CudaBackend>::implement(m);
}

}  // namespace kinml::ops
