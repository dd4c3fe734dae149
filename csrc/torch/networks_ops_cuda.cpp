// The ops of the networks on the GPU. What orders atoms is left to torch's sorts.
//
// Values of indices are not checked, which would wait for the GPU: an atom of a species, row or
// structure that is not there gives NaN.
#include "../cuda/networks_cuda.h"

#include <torch/library.h>

#include <limits>
#include <tuple>

#include "checks.h"
#include "gpu.h"
#include "gpu_networks.h"
#include "networks_arguments.h"

namespace kinml::ops {
namespace {

using at::Tensor;
using Ints = at::IntArrayRef;

std::tuple<Tensor, Tensor, Tensor, Tensor> plan_batches(const Tensor& species,
                                                        const Tensor& offsets,
                                                        const Tensor& structures,
                                                        int64_t batch_size, int64_t n_species) {
  check_order_arguments(species, offsets, n_species);
  check_index(structures, "structures");
  check_device(offsets, "offsets", species, "species");
  check_device(structures, "structures", species, "species");
  TORCH_CHECK(batch_size >= 1, "kinml_fast: batch_size must be at least 1, got ", batch_size);
  const auto options = species.options();
  const int64_t n = structures.size(0), n_batches = (n + batch_size - 1) / batch_size;
  const Tensor sizes = offsets.diff().index_select(0, structures);
  // The sizes of the results depend on this number: the only one that is waited for.
  const int64_t n_atoms = n == 0 ? 0 : sizes.sum().item<int64_t>();
  const Tensor ends = sizes.cumsum(0);
  const Tensor place =
      at::repeat_interleave(sizes, std::optional<int64_t>(n_atoms));  // of each atom's structure
  const Tensor within = at::arange(n_atoms, options) - (ends - sizes).index_select(0, place);
  const Tensor atoms = offsets.index_select(0, structures.index_select(0, place)) + within;
  const Tensor batch = place.div(batch_size, "floor");
  const Tensor key = batch * n_species + species.index_select(0, atoms);
  const auto [sorted, order] = at::sort(key, /*stable=*/true, 0, false);
  const Tensor bounds =
      at::arange(n_batches, options).unsqueeze(1) * n_species + at::arange(n_species + 1, options);
  const Tensor starts = at::searchsorted(sorted, bounds);
  const Tensor firsts = at::searchsorted(sorted, at::arange(n_batches + 1, options) * n_species);
  return {atoms.index_select(0, order), place.remainder(batch_size).index_select(0, order),
          starts - firsts.slice(0, 0, n_batches).unsqueeze(1), firsts};
}

struct Networks : NetworkArguments {
  cuda::ChainPlan plan;
  int64_t n_structures;

  Networks(const Tensor& features, const Tensor& rows, const Tensor& owners, const Tensor& starts,
           const Tensor& parameters, Ints sizes, Ints activations, bool biases,
           int64_t n_structures_)
      : NetworkArguments(features, rows, owners, starts, parameters, sizes, activations, biases),
        plan(cuda::plan_chain(NetworkLevels{{shape}})),
        n_structures(n_structures_) {}
  // Sums over the atoms of each structure, in species order.
  // shift  // [n_species], added to each atom's; or undefined
  Tensor sum_atoms(const Tensor& atomic, const Tensor& shift, const Gpu& gpu) const {
    const auto [sorted, order] = at::sort(owners, /*stable=*/true, 0, false);
    const Tensor firsts = at::searchsorted(sorted, at::arange(n_structures + 1, owners.options()));
    return sum_by_structure(atomic, order, firsts, starts, plan.n_species, shift, gpu);
  }
};

// Calls pass(batch, workspace) with the packed weights.
template <class T, class Function>
void run(const Networks& net, bool second, bool gradients, const Gpu& gpu, const Function& pass) {
  const Tensor packed = at::empty({net.plan.packed}, net.features.options());
  cuda::pack_networks<T>(net.plan, net.parameters.const_data_ptr<T>(), 1,
                         packed.mutable_data_ptr<T>(), gpu.stream);
  const Tensor memory =
      gpu.workspace(cuda::networks_workspace<T>(net.plan, net.n(), second, gradients));
  const cuda::NetworkBatch<T> batch{packed.const_data_ptr<T>(),
                                    net.features.const_data_ptr<T>(),
                                    net.features.stride(0),
                                    net.features.size(0),
                                    net.rows.const_data_ptr<int64_t>(),
                                    net.owners.const_data_ptr<int64_t>(),
                                    net.starts.const_data_ptr<int64_t>(),
                                    net.n(),
                                    net.n_structures};
  pass(batch, bytes_of(memory));
}

// Rows of `net`'s features from one row an atom; a feature row that is named twice gets the sum.
Tensor to_features(const Networks& net, const Tensor& grad_atoms) {
  return at::zeros(net.features.sizes(), net.features.options())
      .index_put_({net.rows}, grad_atoms, /*accumulate=*/true);
}
Tensor none(const Tensor& like) {
  return at::empty({0}, like.options());
}

std::tuple<Tensor, Tensor> networks_forward(const Tensor& features, const Tensor& rows,
                                            const Tensor& owners, const Tensor& starts,
                                            const Tensor& parameters,
                                            const std::optional<Tensor>& sae, Ints sizes,
                                            Ints activations, bool biases, int64_t n_structures,
                                            bool save) {
  return translated(n_structures, [&]() -> std::tuple<Tensor, Tensor> {
    const Gpu gpu(features);
    const Networks net(features, rows, owners, starts, parameters, sizes, activations, biases,
                       n_structures);
    Tensor saved = at::empty({save ? net.n() : 0, net.shape.saved_per_atom()}, features.options());
    // An atom that no species has stays NaN.
    const Tensor atomic =
        at::full({net.n()}, std::numeric_limits<double>::quiet_NaN(), features.options());
    const Tensor shift = net.checked_sae(sae);
    with_type(features, [&](auto zero) {
      using T = decltype(zero);
      run<T>(net, false, false, gpu, [&](const auto& batch, char* memory) {
        cuda::networks_forward<T>(net.plan, batch, save ? saved.mutable_data_ptr<T>() : nullptr,
                                  net.shape.saved_per_atom(), atomic.mutable_data_ptr<T>(), memory,
                                  gpu.stream);
      });
    });
    return {net.sum_atoms(atomic, shift, gpu), saved};
  });
}

Tensor networks(const Tensor& features, const Tensor& rows, const Tensor& owners,
                const Tensor& starts, const Tensor& parameters, const std::optional<Tensor>& sae,
                Ints sizes, Ints activations, bool biases, int64_t n_structures) {
  return std::get<0>(networks_forward(features, rows, owners, starts, parameters, sae, sizes,
                                      activations, biases, n_structures, false));
}

std::tuple<Tensor, Tensor> networks_backward(const Tensor& grad_energies_, const Tensor& features,
                                             const Tensor& rows, const Tensor& owners,
                                             const Tensor& starts, const Tensor& parameters,
                                             const Tensor& saved_, Ints sizes, Ints activations,
                                             bool biases, bool of_features, bool of_parameters) {
  return translated(grad_energies_.size(0), [&]() -> std::tuple<Tensor, Tensor> {
    const Gpu gpu(features);
    const Networks net(features, rows, owners, starts, parameters, sizes, activations, biases,
                       grad_energies_.size(0));
    const Tensor grad_energies = net.checked_gradient(grad_energies_);
    const Tensor saved = net.checked_saved(saved_);
    const Tensor grad_atoms =
        at::empty({of_features ? net.n() : 0, features.size(1)}, features.options());
    Tensor grad_parameters = of_parameters ? at::empty_like(net.parameters) : none(features);
    with_type(features, [&](auto zero) {
      using T = decltype(zero);
      run<T>(net, false, of_parameters, gpu, [&](const auto& batch, char* memory) {
        cuda::networks_backward<T>(
            net.plan, batch, saved.const_data_ptr<T>(), net.shape.saved_per_atom(),
            grad_energies.const_data_ptr<double>(),
            of_features ? grad_atoms.mutable_data_ptr<T>() : nullptr,
            of_parameters ? grad_parameters.mutable_data_ptr<T>() : nullptr, memory, gpu.stream);
      });
    });
    return {of_features ? to_features(net, grad_atoms) : none(features), grad_parameters};
  });
}

std::tuple<Tensor, Tensor, Tensor> networks_second_backward(
    const Tensor& tangents_, const Tensor& grad_energies_, const Tensor& features,
    const Tensor& rows, const Tensor& owners, const Tensor& starts, const Tensor& parameters,
    Ints sizes, Ints activations, bool biases, bool of_grad_energies, bool of_features,
    bool of_parameters) {
  return translated(grad_energies_.size(0), [&]() -> std::tuple<Tensor, Tensor, Tensor> {
    const Gpu gpu(features);
    const Networks net(features, rows, owners, starts, parameters, sizes, activations, biases,
                       grad_energies_.size(0));
    const Tensor grad_energies = net.checked_gradient(grad_energies_);
    const Tensor tangents = net.checked_tangents(tangents_);
    const Tensor derivatives = at::empty({of_grad_energies ? net.n() : 0}, features.options());
    const Tensor grad_atoms =
        at::empty({of_features ? net.n() : 0, features.size(1)}, features.options());
    Tensor grad_parameters = of_parameters ? at::empty_like(net.parameters) : none(features);
    with_type(features, [&](auto zero) {
      using T = decltype(zero);
      run<T>(net, true, of_parameters, gpu, [&](const auto& batch, char* memory) {
        cuda::networks_second_backward<T>(
            net.plan, batch, tangents.const_data_ptr<T>(), grad_energies.const_data_ptr<double>(),
            of_grad_energies ? derivatives.mutable_data_ptr<T>() : nullptr,
            of_features ? grad_atoms.mutable_data_ptr<T>() : nullptr,
            of_parameters ? grad_parameters.mutable_data_ptr<T>() : nullptr, memory, gpu.stream);
      });
    });
    return {of_grad_energies ? net.sum_atoms(derivatives, {}, gpu) : none(grad_energies),
            of_features ? to_features(net, grad_atoms) : none(features), grad_parameters};
  });
}

void energy_step(const Tensor& features, const Tensor& rows, const Tensor& owners,
                 const Tensor& starts, const Tensor& parameters, const Tensor& targets,
                 const Tensor& weights, Tensor residuals, Tensor gradient, double scale, Ints sizes,
                 Ints activations, bool biases) {
  check_energy_step(targets, weights, residuals, gradient, parameters);
  const auto [energies, saved] =
      networks_forward(features, rows, owners, starts, parameters, std::nullopt, sizes, activations,
                       biases, targets.size(0), true);
  at::sub_out(residuals, energies, targets);
  // A structure without weight may have no target (NaN).
  const Tensor unweighted = weights == 0;
  const Tensor counted = unweighted.logical_not().sum();
  const Tensor e =
      at::where(unweighted, at::zeros_like(weights), weights * residuals * (2.0 * scale) / counted);
  gradient.copy_(std::get<1>(networks_backward(e, features, rows, owners, starts, parameters, saved,
                                               sizes, activations, biases, false, true)));
}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, KINML_GPU_KEY, m) {
  m.impl("species_order", gpu_species_order);
  m.impl("plan_batches", plan_batches);
  m.impl("networks", networks);
  m.impl("networks_forward", networks_forward);
  m.impl("networks_backward", networks_backward);
  m.impl("networks_second_backward", networks_second_backward);
  m.impl("energy_step", energy_step);
}

}  // namespace kinml::ops
