// The ops of the networks on the GPU. What orders atoms is left to torch's sorts.
//
// Values of indices are not checked, which would wait for the GPU: an atom of a species, row or
// structure that does not exist gives NaN.
#include "../cuda/networks_cuda.h"

#include <torch/library.h>

#include <array>
#include <limits>
#include <tuple>

#include "arguments.h"
#include "gpu.h"

namespace kinml::ops {
namespace {

using at::Tensor;

// Atoms sorted by species.
std::tuple<Tensor, Tensor, Tensor> species_order(const Tensor& species, const Tensor& offsets,
                                                 int64_t n_species) {
  check_order_arguments(species, offsets, n_species);
  check_device(offsets, "offsets", species, "species");
  const auto [sorted, rows] = at::sort(species.contiguous(), /*stable=*/true, 0, false);
  const Tensor starts = at::searchsorted(sorted, at::arange(n_species + 1, species.options()));
  const Tensor owners =
      at::searchsorted(offsets.slice(0, 1).contiguous(), rows, /*out_int32=*/false, /*right=*/true);
  return {rows, owners, starts};
}

struct Networks : NetworkArguments {
  cuda::ChainPlan plan;
  int64_t n_structures;

  Networks(const Tensor& features, at::TensorList order, const Tensor& parameters,
           at::IntArrayRef packed, int64_t n)
      : NetworkArguments(features, order, parameters, packed),
        plan(cuda::plan_chain(NetworkChain{{shape}})),
        n_structures(n) {}
  // Sums in float64 over the atoms of each structure, in species order.
  // shift  // [n_species], added to each atom's; or undefined
  Tensor sum_atoms(const Tensor& atomic, const Tensor& shift, const Gpu& gpu) const {
    const auto [sorted, places] = at::sort(owners, /*stable=*/true, 0, false);
    const Tensor firsts = at::searchsorted(sorted, at::arange(n_structures + 1, owners.options()));
    Tensor sums = at::empty({n_structures}, gpu.options.dtype(at::kDouble));
    with_type(atomic, [&](auto zero) {
      using T = decltype(zero);
      cuda::sum_by_structure<T>(
          atomic.const_data_ptr<T>(),
          {places.const_data_ptr<int64_t>(), firsts.const_data_ptr<int64_t>(), n_structures},
          starts.const_data_ptr<int64_t>(), plan.n_species,
          shift.defined() ? shift.const_data_ptr<double>() : nullptr,
          sums.mutable_data_ptr<double>(), gpu.stream);
    });
    return sums;
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

Tensor like_if(bool wanted, const Tensor& t) {
  return wanted ? at::empty_like(t) : none(t);
}
template <class T>
T* pointer_if(bool wanted, const Tensor& t) {
  return wanted ? t.mutable_data_ptr<T>() : nullptr;
}

std::tuple<Tensor, Tensor> networks_forward(const Tensor& features, at::TensorList order,
                                            const Tensor& parameters,
                                            const std::optional<Tensor>& sae,
                                            at::IntArrayRef networks, int64_t n_structures,
                                            bool save) {
  return translated(n_structures, [&]() -> std::tuple<Tensor, Tensor> {
    const Gpu gpu(features);
    const Networks net(features, order, parameters, networks, n_structures);
    const int64_t stride = net.shape.saved_per_atom();
    Tensor saved = at::empty({save ? net.n() : 0, stride}, features.options());
    // An atom that no species has stays NaN.
    const Tensor atomic =
        at::full({net.n()}, std::numeric_limits<double>::quiet_NaN(), features.options());
    const Tensor shift = net.checked_sae(sae);
    with_type(features, [&](auto zero) {
      using T = decltype(zero);
      run<T>(net, false, false, gpu, [&](const auto& batch, char* memory) {
        cuda::networks_forward<T>(net.plan, batch, {pointer_if<T>(save, saved), stride},
                                  atomic.mutable_data_ptr<T>(), memory, gpu.stream);
      });
    });
    return {net.sum_atoms(atomic, shift, gpu), saved};
  });
}

Tensor networks(const Tensor& features, at::TensorList order, const Tensor& parameters,
                const std::optional<Tensor>& sae, at::IntArrayRef networks, int64_t n_structures) {
  return std::get<0>(
      networks_forward(features, order, parameters, sae, networks, n_structures, false));
}

std::tuple<Tensor, Tensor> networks_backward(const Tensor& grad_energies_, const Tensor& features,
                                             at::TensorList order, const Tensor& parameters,
                                             const Tensor& saved_, at::IntArrayRef networks,
                                             std::array<bool, 2> wanted) {
  return translated(grad_energies_.size(0), [&]() -> std::tuple<Tensor, Tensor> {
    const auto [of_features, of_parameters] = wanted;
    const Gpu gpu(features);
    const Networks net(features, order, parameters, networks, grad_energies_.size(0));
    const Tensor grad_energies = net.checked_gradient(grad_energies_);
    const Tensor saved = net.checked_saved(saved_);
    const Tensor grad_atoms =
        at::empty({of_features ? net.n() : 0, features.size(1)}, features.options());
    Tensor grad_parameters = like_if(of_parameters, net.parameters);
    with_type(features, [&, of_features = of_features, of_parameters = of_parameters](auto zero) {
      using T = decltype(zero);
      run<T>(net, false, of_parameters, gpu, [&](const auto& batch, char* memory) {
        cuda::networks_backward<T>(net.plan, batch,
                                   {saved.mutable_data_ptr<T>(), net.shape.saved_per_atom()},
                                   grad_energies.const_data_ptr<double>(),
                                   {nullptr, pointer_if<T>(of_features, grad_atoms),
                                    pointer_if<T>(of_parameters, grad_parameters)},
                                   memory, gpu.stream);
      });
    });
    return {of_features ? to_features(net, grad_atoms) : none(features), grad_parameters};
  });
}

std::tuple<Tensor, Tensor, Tensor> networks_second_backward(
    const Tensor& tangents_, const Tensor& grad_energies_, const Tensor& features,
    at::TensorList order, const Tensor& parameters, at::IntArrayRef networks,
    std::array<bool, 3> wanted) {
  return translated(grad_energies_.size(0), [&]() -> std::tuple<Tensor, Tensor, Tensor> {
    const auto [of_grad_energies, of_features, of_parameters] = wanted;
    const Gpu gpu(features);
    const Networks net(features, order, parameters, networks, grad_energies_.size(0));
    const Tensor grad_energies = net.checked_gradient(grad_energies_);
    const Tensor tangents = net.checked_tangents(tangents_);
    const Tensor derivatives = at::empty({of_grad_energies ? net.n() : 0}, features.options());
    const Tensor grad_atoms =
        at::empty({of_features ? net.n() : 0, features.size(1)}, features.options());
    Tensor grad_parameters = like_if(of_parameters, net.parameters);
    with_type(features, [&, of_grad_energies = of_grad_energies, of_features = of_features,
                         of_parameters = of_parameters](auto zero) {
      using T = decltype(zero);
      run<T>(net, true, of_parameters, gpu, [&](const auto& batch, char* memory) {
        cuda::networks_second_backward<T>(
            net.plan, batch, tangents.const_data_ptr<T>(), grad_energies.const_data_ptr<double>(),
            {pointer_if<T>(of_grad_energies, derivatives), pointer_if<T>(of_features, grad_atoms),
             pointer_if<T>(of_parameters, grad_parameters)},
            memory, gpu.stream);
      });
    });
    return {of_grad_energies ? net.sum_atoms(derivatives, {}, gpu) : none(grad_energies),
            of_features ? to_features(net, grad_atoms) : none(features), grad_parameters};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, KINML_GPU_KEY, m) {
  m.impl("species_order", species_order);
  m.impl("networks", networks);
  m.impl("networks_forward", networks_forward);
  m.impl("networks_backward", networks_backward);
  m.impl("networks_second_backward", networks_second_backward);
}

}  // namespace kinml::ops
