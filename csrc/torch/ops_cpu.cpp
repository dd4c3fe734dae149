// The ops of atomic environment vectors, networks and the optimizer on the CPU, and their shapes
// (Meta).
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "../cpu/adam_cpu.h"
#include "../cpu/aev_cpu.h"
#include "../cpu/networks_cpu.h"
#include "cpu.h"

namespace kinml::ops {
namespace {

using at::Tensor;

// ---- atomic environment vectors ----------------------------------------------------------------

// A checked system with coordinates, and what its AEVs are made of.
struct AevCall {
  SystemArguments system;
  AevParameters parameters;

  AevCall(const OptionalTensors& system_, at::ArrayRef<double> descriptor)
      : system(system_), parameters(unpack_descriptor(descriptor)) {
    coordinates_of(system_);
    check_system_values(system, parameters.n_species);
  }
  // function(parameters, system, pointer, n_threads), of a result [n_atoms, ...].
  template <class Function>
  Tensor run(at::IntArrayRef rest, const Function& function) const {
    std::vector<int64_t> shape{system.n_atoms()};
    shape.insert(shape.end(), rest.begin(), rest.end());
    Tensor out = at::empty(shape, system.coordinates.options());
    with_type(system.coordinates, [&](auto zero) {
      using T = decltype(zero);
      function(parameters, system.view<T>(), out.mutable_data_ptr<T>(), threads());
    });
    return out;
  }
};

Tensor aev(const OptionalTensors& system, at::ArrayRef<double> descriptor) {
  const AevCall call(system, descriptor);
  return call.run({call.parameters.length()},
                  []<class T>(const auto& p, const System<T>& s, T* out, int n_threads) {
                    cpu::aev_forward<T>(p, s, out, n_threads);
                  });
}
Tensor aev_vjp(const OptionalTensors& system, const Tensor& gradient,
               at::ArrayRef<double> descriptor) {
  const AevCall call(system, descriptor);
  const Tensor g = call.system.checked_rows(gradient, "gradient", call.parameters.length());
  return call.run({3}, [&]<class T>(const auto& p, const System<T>& s, T* out, int n_threads) {
    cpu::aev_vjp<T>(p, s, g.const_data_ptr<T>(), out, n_threads);
  });
}
Tensor aev_virials(const OptionalTensors& system, const Tensor& gradient,
                   at::ArrayRef<double> descriptor) {
  const AevCall call(system, descriptor);
  const Tensor g = call.system.checked_rows(gradient, "gradient", call.parameters.length());
  const auto options = call.system.coordinates.options();
  Tensor forces = at::empty({call.system.n_atoms(), 3}, options);
  Tensor sums = at::zeros({call.system.n_structures(), 3, 3}, options.dtype(at::kDouble));
  call.run({3, 3}, [&]<class T>(const auto& p, const System<T>& s, T* virials, int n_threads) {
    cpu::aev_vjp<T>(p, s, g.const_data_ptr<T>(), forces.mutable_data_ptr<T>(), n_threads, virials);
    double* sum = sums.mutable_data_ptr<double>();
    for (int64_t i = 0; i < s.n_structures; ++i, sum += 9)
      for (int64_t a = s.offsets[i]; a < s.offsets[i + 1]; ++a)
        for (int64_t x = 0; x < 9; ++x) sum[x] += static_cast<double>(virials[9 * a + x]);
  });
  return sums;
}
Tensor aev_jvp(const OptionalTensors& system, const Tensor& tangent,
               at::ArrayRef<double> descriptor) {
  const AevCall call(system, descriptor);
  const Tensor v = call.system.checked_rows(tangent, "tangent", 3);
  return call.run({call.parameters.length()},
                  [&]<class T>(const auto& p, const System<T>& s, T* out, int n_threads) {
                    cpu::aev_jvp<T>(p, s, v.const_data_ptr<T>(), out, n_threads);
                  });
}
Tensor aev_hvp(const OptionalTensors& system, const Tensor& gradient, const Tensor& tangent,
               at::ArrayRef<double> descriptor) {
  const AevCall call(system, descriptor);
  const Tensor g = call.system.checked_rows(gradient, "gradient", call.parameters.length());
  const Tensor v = call.system.checked_rows(tangent, "tangent", 3);
  return call.run({3}, [&]<class T>(const auto& p, const System<T>& s, T* out, int n_threads) {
    cpu::aev_hvp<T>(p, s, g.const_data_ptr<T>(), v.const_data_ptr<T>(), out, n_threads);
  });
}
Tensor aev_jacobian(const OptionalTensors& system, int64_t max_atoms,
                    at::ArrayRef<double> descriptor) {
  const AevCall call(system, descriptor);
  const int64_t* o = call.system.offsets.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < call.system.n_structures(); ++s)
    TORCH_CHECK(o[s + 1] - o[s] <= max_atoms, "kinml_fast: structure ", s, " has ", o[s + 1] - o[s],
                " atoms, more than max_atoms = ", max_atoms);
  return call.run({call.parameters.length(), 3 * max_atoms},
                  [&]<class T>(const auto& p, const System<T>& s, T* out, int n_threads) {
                    cpu::aev_jacobian<T>(p, s, 3 * max_atoms, out, n_threads);
                  });
}

// ---- networks ----------------------------------------------------------------------------------

// Stable.
std::tuple<Tensor, Tensor, Tensor> species_order(const Tensor& species_, const Tensor& offsets_,
                                                 int64_t n_species) {
  check_order_arguments(species_, offsets_, n_species);
  const Tensor species = species_.contiguous(), offsets = offsets_.contiguous();
  const int64_t* z = species.const_data_ptr<int64_t>();
  const int64_t* o = offsets.const_data_ptr<int64_t>();
  const int64_t n_structures = offsets.size(0) - 1;
  check_batch_values(z, o, species.size(0), n_structures, n_species);
  Tensor rows = at::empty_like(species), owners = at::empty_like(species);
  Tensor starts = at::zeros({n_species + 1}, species.options());
  int64_t* const row = rows.mutable_data_ptr<int64_t>();
  int64_t* const owner = owners.mutable_data_ptr<int64_t>();
  int64_t* const start = starts.mutable_data_ptr<int64_t>();
  for (int64_t a = 0; a < species.size(0); ++a) ++start[z[a] + 1];
  for (int64_t s = 0; s < n_species; ++s) start[s + 1] += start[s];
  std::vector<int64_t> next(start, start + n_species);
  for (int64_t i = 0; i < n_structures; ++i)
    for (int64_t a = o[i]; a < o[i + 1]; ++a) {
      const int64_t place = next[z[a]]++;
      row[place] = a;
      owner[place] = i;
    }
  return {rows, owners, starts};
}

// With checks of the indices' values.
struct Networks : NetworkArguments {
  Networks(const Tensor& features, at::TensorList order, const Tensor& parameters,
           at::IntArrayRef networks, int64_t n_structures)
      : NetworkArguments(features, order, parameters, networks) {
    const int64_t* start = this->starts.const_data_ptr<int64_t>();
    TORCH_CHECK(start[0] == 0 && start[shape.n_species] == n(),
                "kinml_fast: starts must begin with 0 and end with the number of rows, ", n());
    for (int64_t s = 0; s < shape.n_species; ++s)
      TORCH_CHECK(start[s] <= start[s + 1], "kinml_fast: starts must not decrease");
    const int64_t* row = this->rows.const_data_ptr<int64_t>();
    const int64_t* owner = this->owners.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < n(); ++i) {
      TORCH_CHECK(row[i] >= 0 && row[i] < features.size(0), "kinml_fast: rows[", i, "] = ", row[i],
                  " is not a row of the features, which have ", features.size(0));
      TORCH_CHECK(owner[i] >= 0 && owner[i] < n_structures, "kinml_fast: owners[", i,
                  "] = ", owner[i], " is not in [0, ", n_structures, ")");
    }
  }
};

std::tuple<Tensor, Tensor> networks_forward(const Tensor& features, at::TensorList order,
                                            const Tensor& parameters,
                                            const std::optional<Tensor>& sae,
                                            at::IntArrayRef networks, int64_t n_structures,
                                            bool save) {
  const Networks net(features, order, parameters, networks, n_structures);
  Tensor energies = at::zeros({n_structures}, features.options().dtype(at::kDouble));
  Tensor saved = at::empty({save ? net.n() : 0, net.shape.saved_per_atom()}, features.options());
  Tensor atomic = at::empty({net.n()}, features.options());
  const Tensor shift = net.checked_sae(sae);
  with_type(features, [&](auto zero) {
    using T = decltype(zero);
    cpu::networks_forward<T>(
        net.shape, net.parameters.const_data_ptr<T>(), net.features.const_data_ptr<T>(),
        net.features.stride(0), net.rows.const_data_ptr<int64_t>(),
        net.starts.const_data_ptr<int64_t>(), save ? saved.mutable_data_ptr<T>() : nullptr,
        atomic.mutable_data_ptr<T>(), threads());
    const T* e = atomic.const_data_ptr<T>();
    const int64_t* owner = net.owners.const_data_ptr<int64_t>();
    const int64_t* start = net.starts.const_data_ptr<int64_t>();
    double* sum = energies.mutable_data_ptr<double>();
    for (int64_t s = 0; s < net.shape.n_species; ++s) {
      const double offset = shift.defined() ? shift.const_data_ptr<double>()[s] : 0.0;
      for (int64_t i = start[s]; i < start[s + 1]; ++i)
        sum[owner[i]] += static_cast<double>(e[i]) + offset;
    }
  });
  return {energies, saved};
}

Tensor networks(const Tensor& features, at::TensorList order, const Tensor& parameters,
                const std::optional<Tensor>& sae, at::IntArrayRef networks, int64_t n_structures) {
  return std::get<0>(
      networks_forward(features, order, parameters, sae, networks, n_structures, false));
}

// Whether a row is named twice: a structure that stands twice in a batch.
bool any_twice(const Networks& net) {
  const int64_t* row = net.rows.const_data_ptr<int64_t>();
  std::vector<bool> seen(net.features.size(0));
  for (int64_t i = 0; i < net.n(); ++i) {
    if (seen[row[i]]) return true;
    seen[row[i]] = true;
  }
  return false;
}

// The order of the same atoms when each has a feature row of its own.
std::array<Tensor, 3> one_row_each(const Networks& net) {
  return {at::arange(net.n(), net.rows.options()), net.owners, net.starts};
}

// dL/dE of its structure for every atom.
Tensor of_atoms(const Tensor& grad_energies, const Networks& net) {
  const Tensor grad = net.checked_gradient(grad_energies);
  Tensor result = at::empty({net.n()}, net.features.options());
  with_type(result, [&](auto zero) {
    using T = decltype(zero);
    const double* g = grad.const_data_ptr<double>();
    const int64_t* owner = net.owners.const_data_ptr<int64_t>();
    T* out = result.mutable_data_ptr<T>();
    for (int64_t i = 0; i < net.n(); ++i) out[i] = static_cast<T>(g[owner[i]]);
  });
  return result;
}

std::tuple<Tensor, Tensor> networks_backward(const Tensor& grad_energies, const Tensor& features,
                                             at::TensorList order, const Tensor& parameters,
                                             const Tensor& saved, at::IntArrayRef networks,
                                             std::array<bool, 2> wanted) {
  const auto [of_features, of_parameters] = wanted;
  // The kernel writes gradients at the features' stride.
  const Networks net(of_features ? features.contiguous() : features, order, parameters, networks,
                     grad_energies.size(0));
  if (of_features && any_twice(net)) {
    // The kernel writes each row once: give every atom a row of its own, and add afterwards.
    auto [grad_rows, grad_parameters] =
        networks_backward(grad_energies, features.index_select(0, net.rows), one_row_each(net),
                          parameters, saved, networks, wanted);
    return {at::zeros(features.sizes(), features.options()).index_add_(0, net.rows, grad_rows),
            grad_parameters};
  }
  const Tensor kept = net.checked_saved(saved);
  const Tensor grad_atomic = of_atoms(grad_energies, net);
  Tensor grad_features = of_features ? at::zeros(features.sizes(), features.options())
                                     : at::empty({0}, features.options());
  Tensor grad_parameters =
      of_parameters ? at::empty_like(net.parameters) : at::empty({0}, features.options());
  with_type(features, [&](auto zero) {
    using T = decltype(zero);
    cpu::networks_backward<T>(
        net.shape, net.parameters.const_data_ptr<T>(), net.features.const_data_ptr<T>(),
        net.features.stride(0), net.rows.const_data_ptr<int64_t>(),
        net.starts.const_data_ptr<int64_t>(), kept.const_data_ptr<T>(),
        grad_atomic.const_data_ptr<T>(),
        of_features ? grad_features.mutable_data_ptr<T>() : nullptr,
        of_parameters ? grad_parameters.mutable_data_ptr<T>() : nullptr, threads());
  });
  return {grad_features, grad_parameters};
}

std::tuple<Tensor, Tensor, Tensor> networks_second_backward(
    const Tensor& tangents, const Tensor& grad_energies, const Tensor& features,
    at::TensorList order, const Tensor& parameters, at::IntArrayRef networks,
    std::array<bool, 3> wanted) {
  const auto [of_grad_energies, of_features, of_parameters] = wanted;
  const int64_t n_structures = grad_energies.size(0);
  // Both are read, and the gradient written, at one stride.
  const Networks net(features.contiguous(), order, parameters, networks, n_structures);
  const Tensor directions = net.checked_tangents(tangents);
  if (of_features && any_twice(net)) {
    auto [derivatives, grad_rows, grad_parameters] = networks_second_backward(
        directions.index_select(0, net.rows), grad_energies, features.index_select(0, net.rows),
        one_row_each(net), parameters, networks, wanted);
    return {derivatives,
            at::zeros(features.sizes(), features.options()).index_add_(0, net.rows, grad_rows),
            grad_parameters};
  }
  const Tensor grad_atomic = of_atoms(grad_energies, net);
  Tensor derivatives = at::zeros({of_grad_energies ? n_structures : 0}, grad_energies.options());
  Tensor grad_features = of_features ? at::zeros(features.sizes(), features.options())
                                     : at::empty({0}, features.options());
  Tensor grad_parameters =
      of_parameters ? at::empty_like(net.parameters) : at::empty({0}, features.options());
  Tensor atomic = at::empty({of_grad_energies ? net.n() : 0}, features.options());
  with_type(features, [&](auto zero) {
    using T = decltype(zero);
    cpu::networks_second_backward<T>(
        net.shape, net.parameters.const_data_ptr<T>(), net.features.const_data_ptr<T>(),
        net.features.size(1), net.rows.const_data_ptr<int64_t>(),
        net.starts.const_data_ptr<int64_t>(), grad_atomic.const_data_ptr<T>(),
        directions.const_data_ptr<T>(), of_grad_energies ? atomic.mutable_data_ptr<T>() : nullptr,
        of_features ? grad_features.mutable_data_ptr<T>() : nullptr,
        of_parameters ? grad_parameters.mutable_data_ptr<T>() : nullptr, threads());
    if (!of_grad_energies) return;
    const int64_t* owner = net.owners.const_data_ptr<int64_t>();
    const T* derivative = atomic.const_data_ptr<T>();
    double* sum = derivatives.mutable_data_ptr<double>();
    for (int64_t i = 0; i < net.n(); ++i) sum[owner[i]] += static_cast<double>(derivative[i]);
  });
  return {derivatives, grad_features, grad_parameters};
}

// ---- optimizer ---------------------------------------------------------------------------------

void adam_step(Tensor parameter, const Tensor& gradient, Tensor mean, Tensor square,
               const std::optional<Tensor>& largest, double learning_rate, double beta1,
               double beta2, double eps, double weight_decay, bool decoupled, Tensor step) {
  const Tensor g = gradient.contiguous();
  check_adam(parameter, g, mean, square, largest, step);
  double& steps = *step.mutable_data_ptr<double>();
  steps += 1;
  with_type(parameter, [&](auto zero) {
    using T = decltype(zero);
    cpu::adam_step<T>(
        {learning_rate, beta1, beta2, eps, weight_decay, decoupled, static_cast<int64_t>(steps)},
        parameter.numel(), parameter.mutable_data_ptr<T>(), g.const_data_ptr<T>(),
        mean.mutable_data_ptr<T>(), square.mutable_data_ptr<T>(),
        largest.has_value() ? largest->mutable_data_ptr<T>() : nullptr, threads());
  });
  count_write(parameter);
}

// ---- shapes ------------------------------------------------------------------------------------

Tensor aev_meta(const OptionalTensors& system, at::ArrayRef<double> descriptor) {
  const Tensor x = coordinates_of(system);
  return at::empty_symint({x.sym_size(0), unpack_descriptor(descriptor).length()}, x.options());
}
Tensor aev_vjp_meta(const OptionalTensors& system, const Tensor&, at::ArrayRef<double>) {
  const Tensor x = coordinates_of(system);
  return at::empty_symint({x.sym_size(0), 3}, x.options());
}
Tensor aev_virials_meta(const OptionalTensors& system, const Tensor&, at::ArrayRef<double>) {
  const c10::SymInt n = entry(system, SystemArguments::kOffsets).sym_size(0) - 1;
  return at::empty_symint({n, 3, 3}, coordinates_of(system).options().dtype(at::kDouble));
}
Tensor aev_jvp_meta(const OptionalTensors& system, const Tensor&, at::ArrayRef<double> descriptor) {
  return aev_meta(system, descriptor);
}
Tensor aev_hvp_meta(const OptionalTensors& system, const Tensor& gradient, const Tensor&,
                    at::ArrayRef<double> descriptor) {
  return aev_vjp_meta(system, gradient, descriptor);
}
Tensor aev_jacobian_meta(const OptionalTensors& system, int64_t max_atoms,
                         at::ArrayRef<double> descriptor) {
  const Tensor x = coordinates_of(system);
  return at::empty_symint({x.sym_size(0), unpack_descriptor(descriptor).length(), 3 * max_atoms},
                          x.options());
}
std::tuple<Tensor, Tensor, Tensor> species_order_meta(const Tensor& species, const Tensor&,
                                                      int64_t n_species) {
  return {at::empty_like(species), at::empty_like(species),
          at::empty({n_species + 1}, species.options())};
}
std::tuple<Tensor, Tensor> networks_forward_meta(const Tensor& features, at::TensorList order,
                                                 const Tensor&, const std::optional<Tensor>&,
                                                 at::IntArrayRef networks, c10::SymInt n_structures,
                                                 bool save) {
  return {at::empty_symint({n_structures}, features.options().dtype(at::kDouble)),
          at::empty_symint({save ? order[0].sym_size(0) : c10::SymInt(0),
                            unpack_networks(networks).shapes[0].saved_per_atom()},
                           features.options())};
}
Tensor networks_meta(const Tensor& features, at::TensorList, const Tensor&,
                     const std::optional<Tensor>&, at::IntArrayRef, c10::SymInt n_structures) {
  return at::empty_symint({n_structures}, features.options().dtype(at::kDouble));
}
// Like t, or empty.
Tensor like_if(bool wanted, const Tensor& t) {
  return wanted ? at::empty_symint(t.sym_sizes(), t.options()) : at::empty({0}, t.options());
}
std::tuple<Tensor, Tensor> networks_backward_meta(const Tensor&, const Tensor& features,
                                                  at::TensorList, const Tensor& parameters,
                                                  const Tensor&, at::IntArrayRef,
                                                  std::array<bool, 2> wanted) {
  return {like_if(wanted[0], features), like_if(wanted[1], parameters)};
}
std::tuple<Tensor, Tensor, Tensor> networks_second_backward_meta(
    const Tensor&, const Tensor& grad_energies, const Tensor& features, at::TensorList,
    const Tensor& parameters, at::IntArrayRef, std::array<bool, 3> wanted) {
  return {like_if(wanted[0], grad_energies), like_if(wanted[1], features),
          like_if(wanted[2], parameters)};
}
void adam_step_meta(Tensor, const Tensor&, Tensor, Tensor, const std::optional<Tensor>&, double,
                    double, double, double, double, bool, Tensor) {}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, CPU, m) {
  m.impl("aev", aev);
  m.impl("aev_vjp", aev_vjp);
  m.impl("aev_virials", aev_virials);
  m.impl("aev_jvp", aev_jvp);
  m.impl("aev_hvp", aev_hvp);
  m.impl("aev_jacobian", aev_jacobian);
  m.impl("species_order", species_order);
  m.impl("networks", networks);
  m.impl("networks_forward", networks_forward);
  m.impl("networks_backward", networks_backward);
  m.impl("networks_second_backward", networks_second_backward);
  m.impl("adam_step", adam_step);
}

TORCH_LIBRARY_IMPL(kinml_fast, Meta, m) {
  m.impl("aev", aev_meta);
  m.impl("aev_vjp", aev_vjp_meta);
  m.impl("aev_virials", aev_virials_meta);
  m.impl("aev_jvp", aev_jvp_meta);
  m.impl("aev_hvp", aev_hvp_meta);
  m.impl("aev_jacobian", aev_jacobian_meta);
  m.impl("species_order", species_order_meta);
  m.impl("networks", networks_meta);
  m.impl("networks_forward", networks_forward_meta);
  m.impl("networks_backward", networks_backward_meta);
  m.impl("networks_second_backward", networks_second_backward_meta);
  m.impl("adam_step", adam_step_meta);
}

}  // namespace kinml::ops
