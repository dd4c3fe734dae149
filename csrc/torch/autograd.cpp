// Derivatives of the ops, in C++, so that a scripted module differentiates in any process.
//
// Each backward calls ops, not kernels, and so can be differentiated itself as far as the graph in
// schema.cpp goes; where it ends, an error says so.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace kinml::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Typed handles of the ops, looked up once.
template <class Signature>
struct Op;
template <class R, class... Args>
struct Op<R(Args...)> {
  c10::TypedOperatorHandle<R(Args...)> handle;
  explicit Op(const char* name)
      : handle(
            c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<R(Args...)>()) {
  }
  R operator()(Args... args) const { return handle.call(std::forward<Args>(args)...); }
};

using T = const Tensor&;
using Doubles = at::ArrayRef<double>;
using Ints = at::IntArrayRef;

Tensor call_aev(T x, T z, T o, Doubles d) {
  static const Op<Tensor(T, T, T, Doubles)> op("kinml_fast::aev");
  return op(x, z, o, d);
}
Tensor call_vjp(T x, T z, T o, T g, Doubles d) {
  static const Op<Tensor(T, T, T, T, Doubles)> op("kinml_fast::aev_vjp");
  return op(x, z, o, g, d);
}
Tensor call_jvp(T x, T z, T o, T v, Doubles d) {
  static const Op<Tensor(T, T, T, T, Doubles)> op("kinml_fast::aev_jvp");
  return op(x, z, o, v, d);
}
Tensor call_hvp(T x, T z, T o, T g, T v, Doubles d) {
  static const Op<Tensor(T, T, T, T, T, Doubles)> op("kinml_fast::aev_hvp");
  return op(x, z, o, g, v, d);
}

std::vector<double> descriptor_of(AutogradContext* ctx) {
  return ctx->saved_data["descriptor"].toDoubleVector();
}

struct Aev : Function<Aev> {
  static Tensor forward(AutogradContext* ctx, T x, T z, T o, Doubles d) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, z, o});
    ctx->saved_data["descriptor"] = d.vec();
    return call_aev(x, z, o, d);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const variable_list s = ctx->get_saved_variables();
    return {call_vjp(s[0], s[1], s[2], grad[0], descriptor_of(ctx)), Tensor(), Tensor(), Tensor()};
  }
};

// J^T g (with g) and J v (with v): each is the other's derivative.
template <bool transposed>
struct AevProduct : Function<AevProduct<transposed>> {
  static Tensor call(bool transpose, const variable_list& batch, T input, Doubles d) {
    return (transpose ? call_vjp : call_jvp)(batch[0], batch[1], batch[2], input, d);
  }
  static Tensor forward(AutogradContext* ctx, T x, T z, T o, T input, Doubles d) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, z, o, input});
    ctx->saved_data["descriptor"] = d.vec();
    return call(transposed, {x, z, o}, input, d);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const variable_list s = ctx->get_saved_variables();
    const std::vector<double> d = descriptor_of(ctx);
    Tensor of_x, of_input;
    if (ctx->needs_input_grad(0))
      of_x =
          call_hvp(s[0], s[1], s[2], transposed ? s[3] : grad[0], transposed ? grad[0] : s[3], d);
    if (ctx->needs_input_grad(3)) of_input = call(!transposed, s, grad[0], d);
    return {of_x, Tensor(), Tensor(), of_input, Tensor()};
  }
};

struct AevHvp : Function<AevHvp> {
  static Tensor forward(AutogradContext*, T x, T z, T o, T g, T v, Doubles d) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_hvp(x, z, o, g, v, d);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(
        false,
        "kinml_fast: atomic environment vectors can be differentiated twice with respect to "
        "coordinates, not a third time");
  }
};

struct AevJacobian : Function<AevJacobian> {
  static Tensor forward(AutogradContext*, T x, T z, T o, int64_t max_atoms, Doubles d) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<Tensor(T, T, T, int64_t, Doubles)> op("kinml_fast::aev_jacobian");
    return op(x, z, o, max_atoms, d);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "kinml_fast: aev_jacobian has no derivative; differentiate aev_vjp or aev_jvp");
  }
};

using ForwardOp = std::tuple<Tensor, Tensor>(T, T, T, T, T, const std::optional<Tensor>&, Ints,
                                             Ints, bool, c10::SymInt, bool);
using BackwardOp = std::tuple<Tensor, Tensor>(T, T, T, T, T, T, T, Ints, Ints, bool, bool, bool);

using SecondBackwardOp = std::tuple<Tensor, Tensor, Tensor>(T, T, T, T, T, T, T, Ints, Ints, bool,
                                                            bool, bool, bool);

void keep_networks(AutogradContext* ctx, Ints sizes, Ints activations, bool biases) {
  ctx->saved_data["sizes"] = sizes.vec();
  ctx->saved_data["activations"] = activations.vec();
  ctx->saved_data["biases"] = biases;
}

struct Networks : Function<Networks> {
  static Tensor forward(AutogradContext* ctx, T features, T rows, T owners, T starts, T parameters,
                        const std::optional<Tensor>& sae, Ints sizes, Ints activations, bool biases,
                        const c10::SymInt& n_structures) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<ForwardOp> op("kinml_fast::networks_forward");
    auto [energies, saved] = op(features, rows, owners, starts, parameters, sae, sizes, activations,
                                biases, n_structures, true);
    ctx->save_for_backward({features, rows, owners, starts, parameters, saved});
    keep_networks(ctx, sizes, activations, biases);
    return energies;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const Op<BackwardOp> op("kinml_fast::networks_backward");
    const variable_list s = ctx->get_saved_variables();
    const bool of_features = ctx->needs_input_grad(0), of_parameters = ctx->needs_input_grad(4);
    auto [grad_features, grad_parameters] =
        op(grad[0], s[0], s[1], s[2], s[3], s[4], s[5], ctx->saved_data["sizes"].toIntVector(),
           ctx->saved_data["activations"].toIntVector(), ctx->saved_data["biases"].toBool(),
           of_features, of_parameters);
    variable_list result(10);
    if (of_features) result[0] = grad_features;
    if (of_parameters) result[4] = grad_parameters;
    return result;
  }
};

struct NetworksForward : Function<NetworksForward> {
  static variable_list forward(AutogradContext*, T features, T rows, T owners, T starts,
                               T parameters, const std::optional<Tensor>& sae, Ints sizes,
                               Ints activations, bool biases, const c10::SymInt& n_structures,
                               bool save) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<ForwardOp> op("kinml_fast::networks_forward");
    auto [energies, saved] = op(features, rows, owners, starts, parameters, sae, sizes, activations,
                                biases, n_structures, save);
    return {energies, saved};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "kinml_fast: networks_forward has no derivative; differentiate networks");
  }
};

struct NetworksBackward : Function<NetworksBackward> {
  static variable_list forward(AutogradContext* ctx, T g, T features, T rows, T owners, T starts,
                               T parameters, T saved, Ints sizes, Ints activations, bool biases,
                               bool of_features, bool of_parameters) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<BackwardOp> op("kinml_fast::networks_backward");
    auto [a, b] = op(g, features, rows, owners, starts, parameters, saved, sizes, activations,
                     biases, of_features, of_parameters);
    ctx->save_for_backward({g, features, rows, owners, starts, parameters});
    keep_networks(ctx, sizes, activations, biases);
    ctx->set_materialize_grads(false);
    return {a, b};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    TORCH_CHECK(!grad[1].defined(),
                "kinml_fast: the gradient of the networks' parameters has no derivative; that of "
                "their features has");
    variable_list result(12);
    if (!grad[0].defined()) return result;
    static const Op<SecondBackwardOp> op("kinml_fast::networks_second_backward");
    const variable_list s = ctx->get_saved_variables();
    const bool of_g = ctx->needs_input_grad(0), of_features = ctx->needs_input_grad(1),
               of_parameters = ctx->needs_input_grad(5);
    auto [a, b, c] =
        op(grad[0], s[0], s[1], s[2], s[3], s[4], s[5], ctx->saved_data["sizes"].toIntVector(),
           ctx->saved_data["activations"].toIntVector(), ctx->saved_data["biases"].toBool(), of_g,
           of_features, of_parameters);
    if (of_g) result[0] = a;
    if (of_features) result[1] = b;
    if (of_parameters) result[5] = c;
    return result;
  }
};

struct NetworksSecondBackward : Function<NetworksSecondBackward> {
  static variable_list forward(AutogradContext*, T tangents, T g, T features, T rows, T owners,
                               T starts, T parameters, Ints sizes, Ints activations, bool biases,
                               bool of_g, bool of_features, bool of_parameters) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<SecondBackwardOp> op("kinml_fast::networks_second_backward");
    auto [a, b, c] = op(tangents, g, features, rows, owners, starts, parameters, sizes, activations,
                        biases, of_g, of_features, of_parameters);
    return {a, b, c};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "kinml_fast: the networks can be differentiated twice, not a third time");
  }
};

Tensor aev(T x, T z, T o, Doubles d) {
  return Aev::apply(x, z, o, d);
}
Tensor aev_vjp(T x, T z, T o, T g, Doubles d) {
  return AevProduct<true>::apply(x, z, o, g, d);
}
Tensor aev_jvp(T x, T z, T o, T v, Doubles d) {
  return AevProduct<false>::apply(x, z, o, v, d);
}
Tensor aev_hvp(T x, T z, T o, T g, T v, Doubles d) {
  return AevHvp::apply(x, z, o, g, v, d);
}
Tensor aev_jacobian(T x, T z, T o, int64_t n, Doubles d) {
  return AevJacobian::apply(x, z, o, n, d);
}

Tensor networks(T features, T rows, T owners, T starts, T parameters,
                const std::optional<Tensor>& sae, Ints sizes, Ints activations, bool biases,
                c10::SymInt n_structures) {
  TORCH_CHECK(!sae.has_value() || !sae->requires_grad(), "kinml_fast: sae has no gradient");
  if (!at::GradMode::is_enabled() || !(features.requires_grad() || parameters.requires_grad())) {
    at::AutoDispatchBelowADInplaceOrView guard;  // nothing to keep
    static const Op<ForwardOp> op("kinml_fast::networks_forward");
    return std::get<0>(op(features, rows, owners, starts, parameters, sae, sizes, activations,
                          biases, std::move(n_structures), false));
  }
  return Networks::apply(features, rows, owners, starts, parameters, sae, sizes, activations,
                         biases, n_structures);
}

std::tuple<Tensor, Tensor> networks_forward(T features, T rows, T owners, T starts, T parameters,
                                            const std::optional<Tensor>& sae, Ints sizes,
                                            Ints activations, bool biases, c10::SymInt n_structures,
                                            bool save) {
  variable_list r = NetworksForward::apply(features, rows, owners, starts, parameters, sae, sizes,
                                           activations, biases, n_structures, save);
  return {r[0], r[1]};
}

std::tuple<Tensor, Tensor> networks_backward(T g, T features, T rows, T owners, T starts,
                                             T parameters, T saved, Ints sizes, Ints activations,
                                             bool biases, bool of_features, bool of_parameters) {
  variable_list r = NetworksBackward::apply(g, features, rows, owners, starts, parameters, saved,
                                            sizes, activations, biases, of_features, of_parameters);
  return {r[0], r[1]};
}

std::tuple<Tensor, Tensor, Tensor> networks_second_backward(T tangents, T g, T features, T rows,
                                                            T owners, T starts, T parameters,
                                                            Ints sizes, Ints activations,
                                                            bool biases, bool of_g,
                                                            bool of_features, bool of_parameters) {
  variable_list r =
      NetworksSecondBackward::apply(tangents, g, features, rows, owners, starts, parameters, sizes,
                                    activations, biases, of_g, of_features, of_parameters);
  return {r[0], r[1], r[2]};
}

// Energies and forces of one call, differentiated with respect to the weights. The sources differ
// in what stands before the species: coordinates, or stored descriptors and Jacobians.
using Outputs = std::tuple<Tensor, Tensor>;
using MaybeTensor = const std::optional<Tensor>&;
using EnergyForcesOp = Outputs(T, T, T, T, MaybeTensor, Doubles, Ints, Ints, bool, bool);
using EnergyForcesGrad = Tensor(T, T, T, T, T, T, Doubles, Ints, Ints, bool, bool);
using StoredOp = Outputs(T, MaybeTensor, T, T, T, MaybeTensor, Ints, Ints, bool, bool);
using StoredGrad = Tensor(T, T, T, MaybeTensor, T, T, T, Ints, Ints, bool, bool);

void check_constants(std::initializer_list<const Tensor*> constants, MaybeTensor sae) {
  TORCH_CHECK(!sae.has_value() || !sae->requires_grad(), "kinml_fast: sae has no gradient");
  for (const Tensor* t : constants)
    TORCH_CHECK(!t->requires_grad(),
                "kinml_fast: energy_forces is differentiated with respect to the weights only; "
                "for derivatives with respect to coordinates or descriptors differentiate the "
                "energies of EnergyModel.forward");
}

struct EnergyForces : Function<EnergyForces> {
  static variable_list forward(AutogradContext* ctx, T x, T z, T o, T w, MaybeTensor sae, Doubles d,
                               Ints sizes, Ints activations, bool biases, bool levels) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<EnergyForcesOp> op("kinml_fast::energy_forces");
    ctx->save_for_backward({x, z, o, w});
    ctx->saved_data["descriptor"] = d.vec();
    ctx->saved_data["levels"] = levels;
    keep_networks(ctx, sizes, activations, biases);
    auto [energies, forces] = op(x, z, o, w, sae, d, sizes, activations, biases, levels);
    return {energies, forces};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const Op<EnergyForcesGrad> op("kinml_fast::energy_forces_backward");
    const variable_list s = ctx->get_saved_variables();
    variable_list result(10);
    result[3] =
        op(grad[0], grad[1], s[0], s[1], s[2], s[3], descriptor_of(ctx),
           ctx->saved_data["sizes"].toIntVector(), ctx->saved_data["activations"].toIntVector(),
           ctx->saved_data["biases"].toBool(), ctx->saved_data["levels"].toBool());
    return result;
  }
};

struct EnergyForcesStored : Function<EnergyForcesStored> {
  static variable_list forward(AutogradContext* ctx, T a, MaybeTensor jacobian, T z, T o, T w,
                               MaybeTensor sae, Ints sizes, Ints activations, bool biases,
                               bool levels) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<StoredOp> op("kinml_fast::energy_forces_stored");
    ctx->save_for_backward({a, jacobian.value_or(Tensor()), z, o, w});
    ctx->saved_data["levels"] = levels;
    keep_networks(ctx, sizes, activations, biases);
    auto [energies, forces] = op(a, jacobian, z, o, w, sae, sizes, activations, biases, levels);
    return {energies, forces};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const Op<StoredGrad> op("kinml_fast::energy_forces_stored_backward");
    const variable_list s = ctx->get_saved_variables();
    const auto jacobian = s[1].defined() ? std::optional<Tensor>(s[1]) : std::nullopt;
    variable_list result(10);
    result[4] =
        op(grad[0], grad[1], s[0], jacobian, s[2], s[3], s[4],
           ctx->saved_data["sizes"].toIntVector(), ctx->saved_data["activations"].toIntVector(),
           ctx->saved_data["biases"].toBool(), ctx->saved_data["levels"].toBool());
    return result;
  }
};

[[noreturn]] void no_second_derivative() {
  TORCH_CHECK(false,
              "kinml_fast: the gradient of energy_forces has no derivative; differentiate the "
              "energies of EnergyModel.forward as often as needed");
}
struct EnergyForcesBackward : Function<EnergyForcesBackward> {
  static Tensor forward(AutogradContext*, T e, T f, T x, T z, T o, T w, Doubles d, Ints sizes,
                        Ints activations, bool biases, bool levels) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<EnergyForcesGrad> op("kinml_fast::energy_forces_backward");
    return op(e, f, x, z, o, w, d, sizes, activations, biases, levels);
  }
  static variable_list backward(AutogradContext*, const variable_list&) { no_second_derivative(); }
};
struct EnergyForcesStoredBackward : Function<EnergyForcesStoredBackward> {
  static Tensor forward(AutogradContext*, T e, T f, T a, MaybeTensor jacobian, T z, T o, T w,
                        Ints sizes, Ints activations, bool biases, bool levels) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<StoredGrad> op("kinml_fast::energy_forces_stored_backward");
    return op(e, f, a, jacobian, z, o, w, sizes, activations, biases, levels);
  }
  static variable_list backward(AutogradContext*, const variable_list&) { no_second_derivative(); }
};

Outputs energy_forces(T x, T z, T o, T w, MaybeTensor sae, Doubles d, Ints sizes, Ints activations,
                      bool biases, bool levels) {
  if (at::GradMode::is_enabled()) check_constants({&x}, sae);
  const variable_list r =
      EnergyForces::apply(x, z, o, w, sae, d, sizes, activations, biases, levels);
  return {r[0], r[1]};
}
Outputs energy_forces_stored(T a, MaybeTensor jacobian, T z, T o, T w, MaybeTensor sae, Ints sizes,
                             Ints activations, bool biases, bool levels) {
  if (at::GradMode::is_enabled()) {
    check_constants({&a}, sae);
    if (jacobian.has_value()) check_constants({&*jacobian}, sae);
  }
  const variable_list r =
      EnergyForcesStored::apply(a, jacobian, z, o, w, sae, sizes, activations, biases, levels);
  return {r[0], r[1]};
}
Tensor energy_forces_backward(T e, T f, T x, T z, T o, T w, Doubles d, Ints sizes, Ints activations,
                              bool biases, bool levels) {
  return EnergyForcesBackward::apply(e, f, x, z, o, w, d, sizes, activations, biases, levels);
}
Tensor energy_forces_stored_backward(T e, T f, T a, MaybeTensor jacobian, T z, T o, T w, Ints sizes,
                                     Ints activations, bool biases, bool levels) {
  return EnergyForcesStoredBackward::apply(e, f, a, jacobian, z, o, w, sizes, activations, biases,
                                           levels);
}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, Autograd, m) {
  m.impl("aev", aev);
  m.impl("aev_vjp", aev_vjp);
  m.impl("aev_jvp", aev_jvp);
  m.impl("aev_hvp", aev_hvp);
  m.impl("aev_jacobian", aev_jacobian);
  m.impl("networks", networks);
  m.impl("networks_forward", networks_forward);
  m.impl("networks_backward", networks_backward);
  m.impl("networks_second_backward", networks_second_backward);
  m.impl("energy_forces", energy_forces);
  m.impl("energy_forces_stored", energy_forces_stored);
  m.impl("energy_forces_backward", energy_forces_backward);
  m.impl("energy_forces_stored_backward", energy_forces_stored_backward);
}

}  // namespace kinml::ops
