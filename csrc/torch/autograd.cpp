// Derivatives of the ops, in C++, so that a scripted module differentiates in any process.
//
// Each backward calls ops, not kernels, and so can be differentiated itself as far as the graph in
// schema.cpp goes; where it ends, an error says so.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "arguments.h"

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
using MaybeTensor = const std::optional<Tensor>&;
using SystemList = const OptionalTensors&;
using Order = at::TensorList;

// What a backward pass needs again.

// The tensors of a system, as variables; undefined where there are none.
variable_list variables_of(SystemList system) {
  variable_list result;
  for (size_t i = 0; i < system.size(); ++i) result.push_back(entry(system, i));
  return result;
}
// Those that a system has: autograd takes no undefined tensor for an input.
variable_list inputs_of(SystemList system) {
  variable_list result;
  for (size_t i = 0; i < system.size(); ++i)
    if (const Tensor t = entry(system, i); t.defined()) result.push_back(t);
  return result;
}
OptionalTensors system_of(const variable_list& variables, size_t first = 0) {
  OptionalTensors system;
  for (size_t i = first; i < variables.size(); ++i)
    system.push_back(variables[i].defined() ? std::optional<Tensor>(variables[i]) : std::nullopt);
  return system;
}
// Keeps a system behind other tensors.
void save(AutogradContext* ctx, variable_list first, SystemList system) {
  const variable_list behind = variables_of(system);
  first.insert(first.end(), behind.begin(), behind.end());
  ctx->save_for_backward(first);
}
std::vector<double> descriptor_of(AutogradContext* ctx) {
  return ctx->saved_data["descriptor"].toDoubleVector();
}
std::vector<int64_t> networks_of(AutogradContext* ctx) {
  return ctx->saved_data["networks"].toIntVector();
}

// ---- atomic environment vectors ----------------------------------------------------------------
//
// The coordinates are an argument beside the list that holds them: so that autograd sees them.

Tensor call_aev(SystemList s, Doubles d) {
  static const Op<Tensor(SystemList, Doubles)> op("kinml_fast::aev");
  return op(s, d);
}
Tensor call_vjp(SystemList s, T g, Doubles d) {
  static const Op<Tensor(SystemList, T, Doubles)> op("kinml_fast::aev_vjp");
  return op(s, g, d);
}
Tensor call_jvp(SystemList s, T v, Doubles d) {
  static const Op<Tensor(SystemList, T, Doubles)> op("kinml_fast::aev_jvp");
  return op(s, v, d);
}
Tensor call_hvp(SystemList s, T g, T v, Doubles d) {
  static const Op<Tensor(SystemList, T, T, Doubles)> op("kinml_fast::aev_hvp");
  return op(s, g, v, d);
}

Tensor call_virials(SystemList s, T g, Doubles d) {
  static const Op<Tensor(SystemList, T, Doubles)> op("kinml_fast::aev_virials");
  return op(s, g, d);
}

// The cells of a system; an empty tensor stands for none, since autograd takes no undefined one.
Tensor cells_of(SystemList system) {
  const Tensor cells = entry(system, SystemArguments::kCells);
  return cells.defined() ? cells : at::empty({0});
}

// dE/dcells from the virials W and the gradient G by the coordinates x. A pair with the shift n has
// the displacement d = x_j - x_i + n C, and with S = sum over pairs of dE/dd (x) n
//   W = sum dE/dd (x) d = sum_i G_i (x) x_i + S C,  dE/dC = S^T
// where C has the periodic vectors only, along which n is.
Tensor gradient_of_cells(SystemList system, T virials, T gradient) {
  const Tensor offsets = entry(system, SystemArguments::kOffsets);
  const Tensor x = coordinates_of(system).detach().to(at::kDouble);
  const Tensor periodic = entry(system, SystemArguments::kPeriodic).to(at::kDouble).unsqueeze(-1);
  const Tensor cells = entry(system, SystemArguments::kCells).detach() * periodic.ne(0);
  const Tensor owners = at::repeat_interleave(offsets.diff(), std::nullopt);
  const Tensor products = gradient.to(at::kDouble).unsqueeze(2) * x.unsqueeze(1);
  const Tensor of_places = at::zeros_like(virials).index_add_(0, owners, products);
  return at::matmul(virials - of_places, at::linalg_pinv(cells)).transpose(1, 2);
}

struct Aev : Function<Aev> {
  static Tensor forward(AutogradContext* ctx, T /*coordinates*/, T /*cells*/, SystemList system,
                        Doubles d) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, {}, system);
    ctx->saved_data["descriptor"] = d.vec();
    return call_aev(system, d);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const OptionalTensors system = system_of(ctx->get_saved_variables());
    const std::vector<double> d = descriptor_of(ctx);
    const Tensor of_x = call_vjp(system, grad[0], d);
    Tensor of_cells;
    if (ctx->needs_input_grad(1))
      of_cells = gradient_of_cells(system, call_virials(system, grad[0], d), of_x);
    return {of_x, of_cells, Tensor(), Tensor()};
  }
};

// By the cells there is one derivative.
void check_cells(const AutogradContext* ctx, size_t place) {
  TORCH_CHECK(!ctx->needs_input_grad(place),
              "kinml_fast: atomic environment vectors can be differentiated once with respect to "
              "cells, not a second time");
}

// J^T g (with g) and J v (with v): each is the other's derivative.
template <bool transposed>
struct AevProduct : Function<AevProduct<transposed>> {
  static Tensor call(bool transpose, SystemList system, T input, Doubles d) {
    return (transpose ? call_vjp : call_jvp)(system, input, d);
  }
  static Tensor forward(AutogradContext* ctx, T /*coordinates*/, T /*cells*/, SystemList system,
                        T input, Doubles d) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, {input}, system);
    ctx->saved_data["descriptor"] = d.vec();
    return call(transposed, system, input, d);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    check_cells(ctx, 1);
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensors system = system_of(saved, 1);
    const std::vector<double> d = descriptor_of(ctx);
    Tensor of_x, of_input;
    if (ctx->needs_input_grad(0))
      of_x = call_hvp(system, transposed ? saved[0] : grad[0], transposed ? grad[0] : saved[0], d);
    if (ctx->needs_input_grad(2)) of_input = call(!transposed, system, grad[0], d);
    return {of_x, Tensor(), Tensor(), of_input, Tensor()};
  }
};

struct AevVirials : Function<AevVirials> {
  static Tensor forward(AutogradContext*, T /*coordinates*/, T /*cells*/, SystemList system, T g,
                        Doubles d) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_virials(system, g, d);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "kinml_fast: the virials of atomic environment vectors have no derivative; "
                "energy_forces_virials has one, of the weights");
  }
};

struct AevHvp : Function<AevHvp> {
  static Tensor forward(AutogradContext*, T /*coordinates*/, SystemList system, T g, T v,
                        Doubles d) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_hvp(system, g, v, d);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(
        false,
        "kinml_fast: atomic environment vectors can be differentiated twice with respect to "
        "coordinates, not a third time");
  }
};

struct AevJacobian : Function<AevJacobian> {
  static Tensor forward(AutogradContext*, T /*coordinates*/, SystemList system, int64_t max_atoms,
                        Doubles d) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<Tensor(SystemList, int64_t, Doubles)> op("kinml_fast::aev_jacobian");
    return op(system, max_atoms, d);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "kinml_fast: aev_jacobian has no derivative; differentiate aev_vjp or aev_jvp");
  }
};

Tensor aev(SystemList system, Doubles d) {
  return Aev::apply(coordinates_of(system), cells_of(system), system, d);
}

Tensor aev_vjp(SystemList system, T g, Doubles d) {
  return AevProduct<true>::apply(coordinates_of(system), cells_of(system), system, g, d);
}
Tensor aev_virials(SystemList system, T g, Doubles d) {
  return AevVirials::apply(coordinates_of(system), cells_of(system), system, g, d);
}
Tensor aev_jvp(SystemList system, T v, Doubles d) {
  return AevProduct<false>::apply(coordinates_of(system), cells_of(system), system, v, d);
}
Tensor aev_hvp(SystemList system, T g, T v, Doubles d) {
  return AevHvp::apply(coordinates_of(system), system, g, v, d);
}
Tensor aev_jacobian(SystemList system, int64_t max_atoms, Doubles d) {
  return AevJacobian::apply(coordinates_of(system), system, max_atoms, d);
}

// ---- networks ----------------------------------------------------------------------------------

using ForwardOp = std::tuple<Tensor, Tensor>(T, Order, T, MaybeTensor, Ints, c10::SymInt, bool);
using BackwardOp = std::tuple<Tensor, Tensor>(T, T, Order, T, T, Ints, std::array<bool, 2>);
using SecondBackwardOp = std::tuple<Tensor, Tensor, Tensor>(T, T, T, Order, T, Ints,
                                                            std::array<bool, 3>);

// The order among saved tensors, from `first` on.
Order order_of(const variable_list& saved, size_t first) {
  return Order(saved).slice(first, 3);
}
void check_constant(MaybeTensor sae) {
  TORCH_CHECK(!sae.has_value() || !sae->requires_grad(), "kinml_fast: sae has no gradient");
}

struct Networks : Function<Networks> {
  static Tensor forward(AutogradContext* ctx, T features, Order order, T parameters,
                        MaybeTensor sae, Ints networks, const c10::SymInt& n_structures) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<ForwardOp> op("kinml_fast::networks_forward");
    auto [energies, saved] = op(features, order, parameters, sae, networks, n_structures, true);
    ctx->save_for_backward({features, order[0], order[1], order[2], parameters, saved});
    ctx->saved_data["networks"] = networks.vec();
    return energies;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const Op<BackwardOp> op("kinml_fast::networks_backward");
    const variable_list s = ctx->get_saved_variables();
    const bool of_features = ctx->needs_input_grad(0), of_parameters = ctx->needs_input_grad(4);
    auto [a, b] = op(grad[0], s[0], order_of(s, 1), s[4], s[5], networks_of(ctx),
                     {of_features, of_parameters});
    variable_list result(8);
    if (of_features) result[0] = a;
    if (of_parameters) result[4] = b;
    return result;
  }
};

struct NetworksForward : Function<NetworksForward> {
  static variable_list forward(AutogradContext*, T features, Order order, T parameters,
                               MaybeTensor sae, Ints networks, const c10::SymInt& n_structures,
                               bool save) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<ForwardOp> op("kinml_fast::networks_forward");
    auto [energies, saved] = op(features, order, parameters, sae, networks, n_structures, save);
    return {energies, saved};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "kinml_fast: networks_forward has no derivative; differentiate networks");
  }
};

struct NetworksBackward : Function<NetworksBackward> {
  static variable_list forward(AutogradContext* ctx, T g, T features, Order order, T parameters,
                               T saved, Ints networks, std::array<bool, 2> wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<BackwardOp> op("kinml_fast::networks_backward");
    auto [a, b] = op(g, features, order, parameters, saved, networks, wanted);
    ctx->save_for_backward({g, features, order[0], order[1], order[2], parameters});
    ctx->saved_data["networks"] = networks.vec();
    ctx->set_materialize_grads(false);
    return {a, b};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    TORCH_CHECK(!grad[1].defined(),
                "kinml_fast: the gradient of the networks' parameters has no derivative; that of "
                "their features has");
    variable_list result(9);
    if (!grad[0].defined()) return result;
    static const Op<SecondBackwardOp> op("kinml_fast::networks_second_backward");
    const variable_list s = ctx->get_saved_variables();
    const bool of_g = ctx->needs_input_grad(0), of_features = ctx->needs_input_grad(1),
               of_parameters = ctx->needs_input_grad(5);
    auto [a, b, c] = op(grad[0], s[0], s[1], order_of(s, 2), s[5], networks_of(ctx),
                        {of_g, of_features, of_parameters});
    if (of_g) result[0] = a;
    if (of_features) result[1] = b;
    if (of_parameters) result[5] = c;
    return result;
  }
};

struct NetworksSecondBackward : Function<NetworksSecondBackward> {
  static variable_list forward(AutogradContext*, T tangents, T g, T features, Order order,
                               T parameters, Ints networks, std::array<bool, 3> wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<SecondBackwardOp> op("kinml_fast::networks_second_backward");
    auto [a, b, c] = op(tangents, g, features, order, parameters, networks, wanted);
    return {a, b, c};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "kinml_fast: the networks can be differentiated twice, not a third time");
  }
};

Tensor networks(T features, Order order, T parameters, MaybeTensor sae, Ints networks,
                c10::SymInt n_structures) {
  check_constant(sae);
  if (!at::GradMode::is_enabled() || !(features.requires_grad() || parameters.requires_grad())) {
    at::AutoDispatchBelowADInplaceOrView guard;  // nothing to keep
    static const Op<ForwardOp> op("kinml_fast::networks_forward");
    return std::get<0>(
        op(features, order, parameters, sae, networks, std::move(n_structures), false));
  }
  return Networks::apply(features, order, parameters, sae, networks, n_structures);
}
std::tuple<Tensor, Tensor> networks_forward(T features, Order order, T parameters, MaybeTensor sae,
                                            Ints networks, c10::SymInt n_structures, bool save) {
  variable_list r =
      NetworksForward::apply(features, order, parameters, sae, networks, n_structures, save);
  return {r[0], r[1]};
}
std::tuple<Tensor, Tensor> networks_backward(T g, T features, Order order, T parameters, T saved,
                                             Ints networks, std::array<bool, 2> wanted) {
  variable_list r =
      NetworksBackward::apply(g, features, order, parameters, saved, networks, wanted);
  return {r[0], r[1]};
}
std::tuple<Tensor, Tensor, Tensor> networks_second_backward(T tangents, T g, T features,
                                                            Order order, T parameters,
                                                            Ints networks,
                                                            std::array<bool, 3> wanted) {
  variable_list r =
      NetworksSecondBackward::apply(tangents, g, features, order, parameters, networks, wanted);
  return {r[0], r[1], r[2]};
}

// ---- energies and forces, differentiated with respect to the weights ---------------------------

using EnergyForcesOp = std::tuple<Tensor, Tensor>(SystemList, T, MaybeTensor, Doubles, Ints,
                                                  int64_t, MaybeTensor);
using AllOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using EnergyForcesVirialsOp = AllOutputs(SystemList, T, MaybeTensor, Doubles, Ints, int64_t, bool,
                                         MaybeTensor);
using EnergyForcesGrad = Tensor(T, T, SystemList, T, Doubles, Ints, int64_t, MaybeTensor);

struct EnergyForces : Function<EnergyForces> {
  static variable_list forward(AutogradContext* ctx, SystemList system, T parameters,
                               MaybeTensor sae, Doubles d, Ints networks, int64_t first_level,
                               bool virials, bool atomic, MaybeTensor prepared) {
    save(ctx, {parameters}, system);
    ctx->saved_data["descriptor"] = d.vec();
    ctx->saved_data["networks"] = networks.vec();
    ctx->saved_data["first_level"] = first_level;
    ctx->saved_data["virials"] = virials;
    variable_list outputs =
        call(system, parameters, sae, d, networks, first_level, virials, atomic, prepared);
    if (virials) ctx->mark_non_differentiable({outputs[3], outputs[4]});
    return outputs;
  }
  // Without autograd.
  static variable_list call(SystemList system, T parameters, MaybeTensor sae, Doubles d,
                            Ints networks, int64_t first_level, bool virials, bool atomic,
                            MaybeTensor prepared) {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (!virials) {
      static const Op<EnergyForcesOp> op("kinml_fast::energy_forces");
      auto [energies, forces] = op(system, parameters, sae, d, networks, first_level, prepared);
      return {energies, forces};
    }
    static const Op<EnergyForcesVirialsOp> op("kinml_fast::energy_forces_virials");
    auto [energies, forces, of_structures, atomic_energies, atomic_virials] =
        op(system, parameters, sae, d, networks, first_level, atomic, prepared);
    return {energies, forces, of_structures, atomic_energies, atomic_virials};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static const Op<EnergyForcesGrad> op("kinml_fast::energy_forces_backward");
    const variable_list s = ctx->get_saved_variables();
    std::optional<Tensor> of_virials;
    if (ctx->saved_data["virials"].toBool()) of_virials = grad[2];
    variable_list result(9);
    result[1] = op(grad[0], grad[1], system_of(s, 1), s[0], descriptor_of(ctx), networks_of(ctx),
                   ctx->saved_data["first_level"].toInt(), of_virials);
    return result;
  }
};

// The system is constant here, but an argument for autograd all the same: that the result has no
// derivative must be said, also with respect to coordinates.
struct EnergyForcesBackward : Function<EnergyForcesBackward> {
  static Tensor forward(AutogradContext*, T e, T f, T w, Order /*of the system*/, SystemList system,
                        T parameters, Doubles d, Ints networks, int64_t first_level, bool virials) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<EnergyForcesGrad> op("kinml_fast::energy_forces_backward");
    return op(e, f, system, parameters, d, networks, first_level,
              virials ? std::optional<Tensor>(w) : std::nullopt);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "kinml_fast: the gradient of energy_forces has no derivative; differentiate the "
                "energies of EnergyModel.forward as often as needed");
  }
};

using HessiansOp = Tensor(SystemList, T, Doubles, Ints, int64_t, c10::SymInt, MaybeTensor);
struct EnergyHessians : Function<EnergyHessians> {
  static Tensor forward(AutogradContext*, T /*coordinates*/, T /*cells*/, SystemList system,
                        T parameters, Doubles d, Ints networks, int64_t first_level,
                        c10::SymInt max_atoms, MaybeTensor atoms) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<HessiansOp> op("kinml_fast::energy_hessians");
    return op(system, parameters, d, networks, first_level, max_atoms, atoms);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "kinml_fast: energy_hessians has no derivative; train on differences of forces");
  }
};
Tensor energy_hessians(SystemList system, T parameters, Doubles d, Ints networks,
                       int64_t first_level, c10::SymInt max_atoms, MaybeTensor atoms) {
  return EnergyHessians::apply(coordinates_of(system), cells_of(system), system, parameters, d,
                               networks, first_level, max_atoms, atoms);
}

using ProductsOp = Tensor(SystemList, T, T, Doubles, Ints, int64_t, MaybeTensor);
struct HessianProducts : Function<HessianProducts> {
  static Tensor forward(AutogradContext*, T /*coordinates*/, T /*cells*/, SystemList system,
                        T parameters, T v, Doubles d, Ints networks, int64_t first_level,
                        MaybeTensor prepared) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const Op<ProductsOp> op("kinml_fast::hessian_products");
    return op(system, parameters, v, d, networks, first_level, prepared);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "kinml_fast: hessian_products has no derivative; train on differences of forces");
  }
};
Tensor hessian_products(SystemList system, T parameters, T v, Doubles d, Ints networks,
                        int64_t first_level, MaybeTensor prepared) {
  return HessianProducts::apply(coordinates_of(system), cells_of(system), system, parameters, v, d,
                                networks, first_level, prepared);
}

variable_list evaluate(SystemList system, T parameters, MaybeTensor sae, Doubles d, Ints networks,
                       int64_t first_level, bool virials, bool atomic, MaybeTensor prepared) {
  if (at::GradMode::is_enabled()) {
    check_constant(sae);
    for (const Tensor& t : inputs_of(system))
      TORCH_CHECK(!t.requires_grad(),
                  "kinml_fast: energy_forces is differentiated with respect to the weights only; "
                  "for derivatives with respect to coordinates or descriptors differentiate the "
                  "energies of EnergyModel.forward");
  }
  if (!at::GradMode::is_enabled() || !parameters.requires_grad())  // nothing to keep
    return EnergyForces::call(system, parameters, sae, d, networks, first_level, virials, atomic,
                              prepared);
  return EnergyForces::apply(system, parameters, sae, d, networks, first_level, virials, atomic,
                             prepared);
}
std::tuple<Tensor, Tensor> energy_forces(SystemList system, T parameters, MaybeTensor sae,
                                         Doubles d, Ints networks, int64_t first_level,
                                         MaybeTensor prepared) {
  const variable_list r =
      evaluate(system, parameters, sae, d, networks, first_level, false, false, prepared);
  return {r[0], r[1]};
}
AllOutputs energy_forces_virials(SystemList system, T parameters, MaybeTensor sae, Doubles d,
                                 Ints networks, int64_t first_level, bool atomic,
                                 MaybeTensor prepared) {
  const variable_list r =
      evaluate(system, parameters, sae, d, networks, first_level, true, atomic, prepared);
  return {r[0], r[1], r[2], r[3], r[4]};
}
Tensor energy_forces_backward(T e, T f, SystemList system, T parameters, Doubles d, Ints networks,
                              int64_t first_level, MaybeTensor w) {
  return EnergyForcesBackward::apply(e, f, w.has_value() ? *w : at::empty({0}), inputs_of(system),
                                     system, parameters, d, networks, first_level, w.has_value());
}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, Autograd, m) {
  m.impl("aev", aev);
  m.impl("aev_vjp", aev_vjp);
  m.impl("aev_virials", aev_virials);
  m.impl("aev_jvp", aev_jvp);
  m.impl("aev_hvp", aev_hvp);
  m.impl("aev_jacobian", aev_jacobian);
  m.impl("networks", networks);
  m.impl("networks_forward", networks_forward);
  m.impl("networks_backward", networks_backward);
  m.impl("networks_second_backward", networks_second_backward);
  m.impl("energy_forces", energy_forces);
  m.impl("energy_forces_virials", energy_forces_virials);
  m.impl("energy_forces_backward", energy_forces_backward);
  m.impl("energy_hessians", energy_hessians);
  m.impl("hessian_products", hessian_products);
}

}  // namespace kinml::ops
