// The ops for energies and forces together on the CPU, and their shapes (Meta).
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "../cpu/force_step_cpu.h"
#include "../cpu/hessian_cpu.h"
#include "../cpu/prepared_weights.h"
#include "cpu.h"
#include "force_ops.h"

namespace kinml::ops {
namespace {

using at::Tensor;

const std::byte* bytes_at(const Tensor& prepared) {
  return static_cast<const std::byte*>(prepared.const_data_ptr());
}
// What was prepared for a model; null where nothing was.
template <class T>
const std::byte* bytes_of(const Tensor& prepared, const Model<T>& model) {
  if (!prepared.defined()) return nullptr;
  TORCH_CHECK(prepared.scalar_type() == at::kByte && prepared.dim() == 1 &&
                  prepared.is_contiguous() && prepared.is_cpu(),
              "kinml_fast: prepared must be what prepare_weights gave, got ",
              prepared.scalar_type(), " of shape ", prepared.sizes(), " on ", prepared.device());
  const std::byte* const bytes = bytes_at(prepared);
  TORCH_CHECK(reinterpret_cast<std::uintptr_t>(bytes) % 64 == 0,
              "kinml_fast: prepared must be aligned to 64 bytes; prepare the weights again");
  const std::string why = cpu::misfit(model, bytes, prepared.numel());
  TORCH_CHECK(why.empty(), "kinml_fast: the prepared weights do not fit: ", why,
              "; prepare them again (prepare_weights)");
  return bytes;
}

struct CpuBackend {
  static constexpr bool kLooksAtValues = true;

  static void check_values(const SystemArguments& system, int64_t n_species) {
    check_system_values(system, n_species);
  }
  static void check_loss(const SystemArguments& system, const Loss& loss) {
    check_stress_weights(system, loss);
  }
  template <class T>
  static void energy_forces(const Model<T>& model, const System<T>& system, int64_t first_level,
                            const Outputs<T>& outputs, const Tensor& prepared, const Tensor&) {
    cpu::energy_forces<T>(model, system, first_level, outputs, threads(),
                          bytes_of(prepared, model));
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

// ---- second derivatives --------------------------------------------------------------------------

// Its pairs are among those of the descriptor.
void check_repulsion(const ModelArguments& model) {
  TORCH_CHECK(
      model.aev.repulsion.cutoff() <= std::max(model.aev.radial_cutoff, model.aev.angular_cutoff),
      "kinml_fast: the repulsion reaches farther than the descriptor");
}

Tensor energy_hessians(const OptionalTensors& system_, const Tensor& parameters,
                       at::ArrayRef<double> descriptor, at::IntArrayRef networks,
                       int64_t first_level, int64_t max_atoms,
                       const std::optional<Tensor>& atoms_) {
  coordinates_of(system_);
  const SystemArguments system(system_);
  const ModelArguments model(system, parameters, std::nullopt, descriptor, networks, first_level);
  CpuBackend::check_values(system, model.networks.n_species());
  int64_t n_layers = 0, most = 0;
  for (const NetworkShape& shape : model.networks.shapes)
    n_layers = std::max(n_layers, shape.n_layers);
  TORCH_CHECK(model.n_levels() <= cpu::kMostHessianLevels && n_layers <= cpu::kMostHessianLayers,
              "kinml_fast: second derivatives are of at most ", cpu::kMostHessianLevels,
              " levels with ", cpu::kMostHessianLayers, " layers, got ", model.n_levels(), " with ",
              n_layers);
  check_repulsion(model);
  Tensor atoms;
  if (atoms_.has_value()) {
    atoms = atoms_->contiguous();
    check_index(atoms, "atoms");
    system.check_here(atoms, "atoms");
    std::vector<bool> taken(system.n_atoms());
    for (int64_t i = 0; i < atoms.size(0); ++i) {
      const int64_t atom = atoms.const_data_ptr<int64_t>()[i];
      TORCH_CHECK(atom >= 0 && atom < system.n_atoms() && !taken[atom], "kinml_fast: atoms[", i,
                  "] = ", atom, " is not one of ", system.n_atoms(), " atoms, or is there twice");
      taken[atom] = true;
    }
  }
  const int64_t n_rows = atoms.defined() ? atoms.size(0) : system.n_atoms();
  Tensor hessians;
  with_type(model.parameters, [&](auto zero) {
    using T = decltype(zero);
    const System<T> view = system.view<T>();
    for (int64_t s = 0; s < view.n_structures; ++s) most = std::max(most, view.atoms(s));
    TORCH_CHECK(max_atoms >= most, "kinml_fast: max_atoms = ", max_atoms, ", but a structure has ",
                most, " atoms");
    hessians =
        at::empty(model.shape<int64_t>({n_rows, 3, 3 * max_atoms}), model.parameters.options());
    cpu::energy_hessians(model.view<T>(), view, first_level,
                         atoms.defined() ? atoms.const_data_ptr<int64_t>() : nullptr, n_rows,
                         3 * max_atoms, hessians.mutable_data_ptr<T>(), threads());
  });
  return hessians;
}

Tensor hessian_products(const OptionalTensors& system_, const Tensor& parameters, const Tensor& v_,
                        at::ArrayRef<double> descriptor, at::IntArrayRef networks,
                        int64_t first_level, const std::optional<Tensor>& prepared) {
  coordinates_of(system_);
  const SystemArguments system(system_);
  const ModelArguments model(system, parameters, std::nullopt, descriptor, networks, first_level);
  CpuBackend::check_values(system, model.networks.n_species());
  const Tensor v = v_.contiguous();
  check_same_type(v, "v", model.parameters, "parameters");
  check_matrix(v, "v", system.n_atoms(), 3);
  check_repulsion(model);
  Tensor products = at::zeros(model.shape<int64_t>({system.n_atoms(), 3}), v.options());
  with_type(model.parameters, [&](auto zero) {
    using T = decltype(zero);
    const Model<T> view = model.view<T>();
    cpu::hessian_products(view, system.view<T>(), first_level, v.const_data_ptr<T>(),
                          products.mutable_data_ptr<T>(), threads(),
                          bytes_of(prepared.value_or(Tensor()), view));
  });
  return products;
}

// ---- weights that are laid out once -------------------------------------------------------------

// The model that parameters are of, as far as they are laid out.
template <class T>
Model<T> weights_of(const Tensor& parameters, at::IntArrayRef networks) {
  Model<T> model{.aev = {}, .networks = unpack_networks(networks)};
  if (parameters.dim() == 2) model.n_members = parameters.size(0);
  return model;
}
void check_parameters(const Tensor& parameters, at::IntArrayRef networks) {
  check_floating(parameters, "parameters");
  const NetworkChain chain = unpack_networks(networks);
  TORCH_CHECK(parameters.dim() == 1 || parameters.dim() == 2,
              "kinml_fast: parameters must be one flat tensor, or [n_members, n] for an ensemble, "
              "got shape ",
              parameters.sizes());
  check_networks(chain, chain.length(), parameters);
}
int64_t prepared_numbers(const Tensor& parameters, at::IntArrayRef networks) {
  check_parameters(parameters, networks);
  int64_t bytes = 0;
  with_type(parameters, [&](auto zero) {
    bytes = cpu::prepared_bytes(weights_of<decltype(zero)>(parameters, networks));
  });
  return bytes;
}

// What was prepared last, as long as its parameters are there and as they were. Writes that torch
// does not count (through `data`) are found by `misfit`.
class Kept {
 public:
  Tensor find(const Tensor& parameters, at::IntArrayRef networks) {
    if (parameters.is_inference() || !parameters.is_contiguous()) return {};  // without a count
    const std::lock_guard lock(mutex_);
    for (const Entry& entry : entries_)
      if (entry.storage == parameters.storage().unsafeGetStorageImpl() &&
          entry.place == parameters.const_data_ptr() && entry.version == parameters._version() &&
          entry.type == parameters.scalar_type() && entry.sizes == parameters.sizes() &&
          entry.networks == networks && !entry.weak.expired())
        return entry.prepared;
    return {};
  }
  void add(const Tensor& parameters, at::IntArrayRef networks, const Tensor& prepared) {
    if (parameters.is_inference() || !parameters.is_contiguous()) return;
    const std::lock_guard lock(mutex_);
    std::erase_if(entries_, [&](const Entry& entry) {
      return entry.weak.expired() || entry.place == parameters.const_data_ptr();
    });
    if (entries_.size() >= kMost) entries_.erase(entries_.begin());
    entries_.push_back({parameters.storage().getWeakStorageImpl(),
                        parameters.storage().unsafeGetStorageImpl(), parameters.const_data_ptr(),
                        static_cast<int64_t>(parameters._version()), parameters.scalar_type(),
                        parameters.sizes().vec(), networks.vec(), prepared});
  }

 private:
  static constexpr size_t kMost = 8;
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl>
        weak;  // as long as it is there, no other has its address
    const c10::StorageImpl* storage;
    const void* place;
    int64_t version;
    at::ScalarType type;
    std::vector<int64_t> sizes, networks;
    Tensor prepared;
  };
  std::mutex mutex_;
  std::vector<Entry> entries_;
};

Tensor prepare_weights(const Tensor& parameters_, at::IntArrayRef networks) {
  static Kept& kept = *new Kept;  // outlives the threads of whoever calls
  Tensor prepared = kept.find(parameters_, networks);
  const bool found = prepared.defined();
  if (!found) check_parameters(parameters_, networks);
  const Tensor parameters = parameters_.contiguous();
  bool fits = false;
  with_type(parameters, [&](auto zero) {
    using T = decltype(zero);
    Model<T> model = weights_of<T>(parameters, networks);
    model.weights = parameters.const_data_ptr<T>();
    fits = found && cpu::misfit(model, bytes_at(prepared), prepared.numel()).empty();
    if (fits) return;
    // With zeros where no pass reads, so that equal weights give equal bytes.
    prepared = at::zeros({cpu::prepared_bytes(model)}, parameters.options().dtype(at::kByte));
    cpu::prepare_weights(model, static_cast<std::byte*>(prepared.mutable_data_ptr()), threads());
  });
  if (!fits) kept.add(parameters_, networks, prepared);
  return prepared;
}

// ---- shapes ------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> energy_forces_virials_meta(
    const OptionalTensors& system, const Tensor& parameters, const std::optional<Tensor>&,
    at::ArrayRef<double>, at::IntArrayRef networks, int64_t first_level, bool atomic,
    const std::optional<Tensor>&) {
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
                                              at::IntArrayRef networks, int64_t first_level,
                                              const std::optional<Tensor>& prepared) {
  const auto all = energy_forces_virials_meta(system, parameters, sae, descriptor, networks,
                                              first_level, false, prepared);
  return {std::get<0>(all), std::get<1>(all)};
}
Tensor energy_forces_backward_meta(const Tensor&, const Tensor&, const OptionalTensors&,
                                   const Tensor& parameters, at::ArrayRef<double>, at::IntArrayRef,
                                   int64_t, const std::optional<Tensor>&) {
  return at::empty_like(parameters);
}
Tensor prepare_weights_meta(const Tensor& parameters, at::IntArrayRef networks) {
  return at::empty({prepared_numbers(parameters, networks)}, parameters.options().dtype(at::kByte));
}
Tensor energy_hessians_meta(const OptionalTensors& system, const Tensor& parameters,
                            at::ArrayRef<double>, at::IntArrayRef networks, int64_t first_level,
                            c10::SymInt max_atoms, const std::optional<Tensor>& atoms) {
  c10::SmallVector<c10::SymInt, 5> shape;
  if (parameters.dim() == 2) shape.push_back(parameters.sym_size(0));
  shape.push_back(unpack_networks(networks).n_levels() - first_level);
  shape.push_back((atoms.has_value() ? *atoms : coordinates_of(system)).sym_size(0));
  shape.push_back(3);
  shape.push_back(max_atoms * 3);
  return at::empty_symint(shape, parameters.options());
}
Tensor hessian_products_meta(const OptionalTensors&, const Tensor& parameters, const Tensor& v,
                             at::ArrayRef<double>, at::IntArrayRef networks, int64_t first_level,
                             const std::optional<Tensor>&) {
  c10::SmallVector<c10::SymInt, 4> shape;
  if (parameters.dim() == 2) shape.push_back(parameters.sym_size(0));
  shape.push_back(unpack_networks(networks).n_levels() - first_level);
  shape.push_back(v.sym_size(0));
  shape.push_back(3);
  return at::empty_symint(shape, v.options());
}
void force_step_meta(const OptionalTensors&, const Tensor&, const Tensor&, const OptionalTensors&,
                     at::TensorList, at::ArrayRef<double>, at::IntArrayRef) {}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, CPU, m) {
  ForceOps<CpuBackend>::implement(m);
  m.impl("energy_hessians", energy_hessians);
  m.impl("hessian_products", hessian_products);
  m.impl("prepare_weights", prepare_weights);
}

TORCH_LIBRARY_IMPL(kinml_fast, Meta, m) {
  m.impl("energy_forces", energy_forces_meta);
  m.impl("energy_forces_virials", energy_forces_virials_meta);
  m.impl("energy_forces_backward", energy_forces_backward_meta);
  m.impl("energy_hessians", energy_hessians_meta);
  m.impl("hessian_products", hessian_products_meta);
  m.impl("prepare_weights", prepare_weights_meta);
  m.impl("force_step", force_step_meta);
}

}  // namespace kinml::ops
