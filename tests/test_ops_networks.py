"""The network ops: energies and gradients against the oracle, modules of torch and finite differences; the order of
atoms; batches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from op_helpers import ON_CPU, changed, each_tensor, normal, not_contiguous, ragged, raw

from kinml_fast import ops, reference
from kinml_fast.errors import InputError
from kinml_fast.nn import ACTIVATIONS, SpeciesNetworks
from kinml_fast.ops import Order

pytestmark = pytest.mark.usefixtures("on_device")

OPS = torch.ops.kinml_fast


def sae() -> torch.Tensor:
    """Single-atom energies of three elements."""
    return torch.tensor([-10.5, 3.25, 7.0], dtype=torch.float64)


def layers_of(networks: SpeciesNetworks, flat: torch.Tensor | None = None) -> list[list[reference.Layer]]:
    """The layers as the oracle takes them, as views of `flat` (the weights if None): autograd reaches it."""
    flat = networks.weights if flat is None else flat
    result, start = [], 0
    for s, widths in enumerate(networks.layers):
        result.append([])
        inputs = networks.layer(s, 0)[0].shape[1]
        for outputs in widths:
            weight = flat[start : start + outputs * inputs].view(outputs, inputs)
            start += outputs * inputs
            bias = flat[start : start + outputs] if networks.biases else None
            start += outputs if networks.biases else 0
            result[-1].append((weight, bias))
            inputs = outputs
    assert start == flat.numel()
    return result


def sums(atomic: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sums [n_structures] over the atoms of each structure, in float64."""
    owners = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    return torch.zeros(len(offsets) - 1, dtype=torch.float64).index_add(0, owners, atomic.double())


class Case:
    """Networks, features and a ragged batch."""

    def __init__(
        self,
        layers=(5, 3, 1),
        activations=("gaussian", "tanh", "identity"),
        biases: bool = True,
        dtype: torch.dtype = torch.float64,
        n_inputs: int = 7,
        sizes=(4, 1, 0, 6, 2),
        n_species: int = 3,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        elements = ("H", "C", "N")[:n_species]
        self.networks = SpeciesNetworks(elements, n_inputs, layers, activations, biases, dtype)
        _, self.species, self.offsets = ragged(sizes, n_species, seed)
        self.features = normal(len(self.species), n_inputs, seed=seed, dtype=dtype)
        self.order = ops.species_order(self.species, self.offsets, n_species)

    @property
    def n_structures(self) -> int:
        return len(self.offsets) - 1

    def arguments(self, features=None, weights=None, sae=None) -> dict[str, Any]:
        """Those of ops.networks."""
        return {
            "features": self.features if features is None else features,
            "order": self.order,
            "parameters": self.networks.weights.detach() if weights is None else weights,
            "sae": sae,
            "networks": self.networks.packed,
            "n_structures": self.n_structures,
        }

    def forward_arguments(self, save: bool, **changes) -> dict[str, Any]:
        """Those of networks_forward."""
        return {**self.arguments(**changes), "save": save}

    def backward_arguments(self, wanted: tuple[bool, bool] = (True, True)) -> dict[str, Any]:
        """Those of networks_backward."""
        _, saved = OPS.networks_forward(*raw(self.forward_arguments(True)))
        own = self.arguments()
        return {
            "grad_energies": normal(self.n_structures),
            **{name: own[name] for name in ("features", "order", "parameters")},
            "saved": saved,
            "networks": own["networks"],
            "wanted": list(wanted),
        }

    def second_arguments(self, wanted: tuple[bool, bool, bool] = (True, True, True)) -> dict[str, Any]:
        """Those of networks_second_backward."""
        own = self.arguments()
        return {
            "tangents": normal(*self.features.shape, seed=4, dtype=self.features.dtype),
            "grad_energies": normal(self.n_structures),
            **{name: own[name] for name in ("features", "order", "parameters", "networks")},
            "wanted": list(wanted),
        }

    def order_of(self, structures: torch.Tensor) -> Order:
        """The order of the atoms of some structures, which may come twice."""
        owners = torch.repeat_interleave(torch.arange(len(structures)), self.offsets.diff()[structures])
        ranges = [torch.arange(self.offsets[s], self.offsets[s + 1]) for s in structures.tolist()]
        atoms = torch.cat(ranges)
        by_species = torch.argsort(self.species[atoms], stable=True)
        counts = torch.bincount(self.species[atoms], minlength=len(self.networks.elements))
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return Order(atoms[by_species], owners[by_species], starts)

    def expected(self, features=None, weights=None) -> torch.Tensor:
        """Energies without single-atom energies by the oracle."""
        features = self.features if features is None else features
        atomic = reference.networks(
            features, self.species, layers_of(self.networks, weights), list(self.networks.activations)
        )
        return sums(atomic, self.offsets)


def compare_gradients(case: Case, rtol: float, atol: float) -> None:
    results = []
    slopes = normal(case.n_structures, seed=9)
    for function in (lambda f, w: ops.networks(**case.arguments(f, w)), case.expected):
        f, w = case.features.clone().requires_grad_(), case.networks.weights.detach().clone().requires_grad_()
        energies = function(f, w)
        results.append((energies.detach(), *torch.autograd.grad((slopes * energies).sum(), (f, w))))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


TOLERANCES = [(torch.float64, 1e-11, 1e-12), (torch.float32, 5e-5, 2e-5)]


@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_matches_the_oracle(activation, biases, dtype, rtol, atol):
    compare_gradients(Case((9, 4, 1), [activation, activation, "identity"], biases, dtype), rtol, atol)
    compare_gradients(Case((6, 1), [activation, activation], biases, dtype), rtol, atol)  # also in the last layer


@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES)
@pytest.mark.parametrize(
    ("layers", "n_inputs"),
    [
        ((1,), 3),
        ((1,), 1),
        ((1, 1, 1), 1),
        ((48, 24, 12, 1), 224),
        ((160, 128, 96, 1), 50),
        ((17, 33, 1), 65),
        ((2, 3, 5, 7, 11, 1), 13),
        ([[8, 4, 1], [3, 9, 1], [31, 2, 1]], 10),
        ([[1, 1, 1], [64, 64, 1], [5, 65, 1]], 9),
    ],
)
def test_shapes_match_the_oracle(layers, n_inputs, dtype, rtol, atol):
    depth = len(layers[0]) if isinstance(layers, list) else len(layers)
    activations = [*["gaussian", "silu", "tanh", "celu", "gelu"][: depth - 1], "identity"]
    case = Case(layers, activations, True, dtype, n_inputs, sizes=(4, 1, 0, 30, 2, 61))
    compare_gradients(case, rtol * 10, atol * 10)


@pytest.mark.parametrize("count", [1, 2, 47, 48, 49, 63, 64, 65, 96, 97, 300])
def test_any_number_of_atoms_of_a_species(count):
    """Around the sizes of tiles, on which the weight gradients are cut."""
    case = Case((20, 10, 1), sizes=(count, 3), n_species=1)
    compare_gradients(case, 1e-11, 1e-11)


def test_matches_linear_modules():
    """A stack of torch.nn.Linear for each species, energies and gradients."""
    case = Case((6, 4, 1), ("tanh", "relu", "identity"))
    stacks = []
    for layers in layers_of(case.networks):
        modules = []
        for (weight, bias), activation in zip(layers, (torch.nn.Tanh, torch.nn.ReLU, torch.nn.Identity), strict=True):
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
            with torch.no_grad():
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
            modules += [linear, activation()]
        stacks.append(torch.nn.Sequential(*modules))
    atoms = zip(case.species.tolist(), case.features, strict=True)
    atomic = torch.stack([stacks[s](f)[0] + sae()[s] for s, f in atoms])
    expected = sums(atomic, case.offsets)
    weights = case.networks.weights.detach().clone().requires_grad_()
    ours = ops.networks(**case.arguments(weights=weights, sae=sae()))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    (expected**2).sum().backward()
    (ours**2).sum().backward()
    flat = torch.cat([p.grad.reshape(-1) for stack in stacks for p in stack.parameters()])
    torch.testing.assert_close(weights.grad, flat, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("biases", [True, False])
def test_gradcheck(biases):
    case = Case((4, 3, 1), ("gaussian", "silu", "identity"), biases, n_inputs=5)
    f, w = case.features.clone().requires_grad_(), case.networks.weights.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ops.networks(**case.arguments(a, b, sae())), (f, w))
    assert torch.autograd.gradcheck(lambda a: ops.networks(**case.arguments(a)), f)
    assert torch.autograd.gradcheck(lambda b: ops.networks(**case.arguments(weights=b)), w)


def test_gradients_alone_are_those_of_both():
    case = Case()
    grads = {}
    for of_f, of_w in [(True, True), (True, False), (False, True)]:
        f = case.features.clone().requires_grad_(of_f)
        w = case.networks.weights.detach().clone().requires_grad_(of_w)
        ops.networks(**case.arguments(f, w)).sum().backward()
        assert (f.grad is not None) is of_f
        assert (w.grad is not None) is of_w
        grads[of_f, of_w] = f.grad, w.grad
    assert torch.equal(grads[True, True][0], grads[True, False][0])
    assert torch.equal(grads[True, True][1], grads[False, True][1])


# ---- Second derivatives --------------------------------------------------------------------------


def second_derivatives(energies_of, tensors, n_structures: int) -> tuple[torch.Tensor, ...]:
    """What training on forces needs: the gradient g of the features, its derivatives along a direction.

    `tensors` are features and weights; `energies_of` gives their energies. The loss on g is not linear in it, and the
    weights of the energies are differentiated too.
    """
    features, weights = (t.detach().clone().requires_grad_() for t in tensors)
    slopes = normal(n_structures, seed=9).requires_grad_()
    energies = energies_of(features, weights)
    (g,) = torch.autograd.grad((slopes * energies).sum(), features, create_graph=True)
    directions = normal(*features.shape, seed=10, dtype=features.dtype)
    loss = (directions * g).sum() + 0.1 * (g**2).sum()
    return (g.detach(), *torch.autograd.grad(loss, (slopes, features, weights)))


def compare_second_derivatives(case: Case, rtol: float, atol: float) -> None:
    tensors = case.features, case.networks.weights
    ours = second_derivatives(lambda f, w: ops.networks(**case.arguments(f, w)), tensors, case.n_structures)
    expected = second_derivatives(case.expected, tensors, case.n_structures)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    assert all(b.any() for b in expected) or not len(case.species)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-10, 1e-11), (torch.float32, 5e-4, 1e-4)])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives_match_the_oracle(activation, biases, dtype, rtol, atol):
    # Linear networks have a gradient that does not depend on the features.
    first = "tanh" if activation in ("identity", "relu") else activation
    compare_second_derivatives(Case((9, 4, 1), [first, activation, "identity"], biases, dtype), rtol, atol)
    compare_second_derivatives(Case((6, 1), [first, activation], biases, dtype), rtol, atol)


@pytest.mark.parametrize(
    ("layers", "n_inputs"),
    [((1,), 3), ((48, 24, 12, 1), 224), ((17, 33, 1), 65), ([[8, 4, 1], [3, 9, 1], [31, 2, 1]], 10)],
)
def test_second_derivatives_of_other_shapes_match_the_oracle(layers, n_inputs):
    depth = len(layers[0]) if isinstance(layers, list) else len(layers)
    activations = [*["gaussian", "silu", "tanh"][: depth - 1], "gaussian"]
    case = Case(layers, activations, n_inputs=n_inputs, sizes=(4, 1, 0, 30, 2, 161))
    compare_second_derivatives(case, 1e-9, 1e-10)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradgradcheck(activation, biases):
    case = Case((4, 3, 1), (activation, "gaussian", activation), biases, n_inputs=5, sizes=(3, 0, 2, 1))
    features, weights = case.features.clone().requires_grad_(), case.networks.weights.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f, w: ops.networks(**case.arguments(f, w)), (features, weights))

    def gradient(slopes, f, w):
        energies = ops.networks(**case.arguments(f, w))
        return torch.autograd.grad((slopes * energies).sum(), f, create_graph=True)

    slopes = normal(case.n_structures, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(gradient, (slopes, features, weights))
    # With respect to the features alone, torch's own double check can be used.
    assert torch.autograd.gradgradcheck(lambda f: ops.networks(**case.arguments(f)), features)


def test_second_derivatives_alone_are_those_of_all():
    case = Case()
    energies_of = lambda f, w: ops.networks(**case.arguments(f, w))  # noqa: E731
    together = second_derivatives(energies_of, (case.features, case.networks.weights), case.n_structures)[1:]
    for wanted in range(3):
        leaves = [normal(case.n_structures, seed=9), case.features.clone(), case.networks.weights.detach().clone()]
        leaves[1].requires_grad_()
        leaves[wanted].requires_grad_()
        slopes, features, weights = leaves
        (g,) = torch.autograd.grad((slopes * energies_of(features, weights)).sum(), features, create_graph=True)
        loss = (normal(*features.shape, seed=10) * g).sum() + 0.1 * (g**2).sum()
        assert torch.equal(torch.autograd.grad(loss, leaves[wanted])[0], together[wanted])


def test_second_derivatives_of_unusual_batches():
    case = Case(sizes=(3, 2), n_species=3)
    case.species = torch.tensor([2, 0, 0, 2, 2])  # none of species 1
    case.order = ops.species_order(case.species, case.offsets, 3)
    compare_second_derivatives(case, 1e-10, 1e-11)
    for sizes in ((), (0, 0)):
        empty = Case(sizes=sizes)
        energies_of = lambda f, w: ops.networks(**empty.arguments(f, w))  # noqa: B023, E731
        found = second_derivatives(energies_of, (empty.features, empty.networks.weights), len(sizes))
        assert [t.shape for t in found] == [(0, 7), (len(sizes),), (0, 7), empty.networks.weights.shape]
        assert not any(t.any() for t in found)
    # A structure twice in a batch, another not at all.
    case = Case()
    structures = torch.tensor([3, 0, 3])
    zero = torch.zeros(3, dtype=torch.float64)
    of_batch = lambda f, w: torch.func.functional_call(  # noqa: E731
        case.networks, {"weights": w}, (f, case.species, case.offsets, zero)
    )[structures]
    expected = second_derivatives(of_batch, (case.features, case.networks.weights), 3)

    def ours_of(f, w):
        return ops.networks(**{**case.arguments(f, w), "order": case.order_of(structures), "n_structures": 3})

    ours = second_derivatives(ours_of, (case.features, case.networks.weights), 3)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layout_does_not_matter_to_second_derivatives(dtype):
    case = Case(dtype=dtype, n_inputs=8)
    arguments = case.second_arguments()
    results = []
    for layout in (torch.clone, not_contiguous, lambda x: x.t().contiguous().t() if x.dim() == 2 else x):
        results.append(OPS.networks_second_backward(*raw(each_tensor(layout, arguments))))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_what_has_no_derivative_is_an_error():
    case = Case()
    f, w = case.features.clone().requires_grad_(), case.networks.weights.detach().clone().requires_grad_()
    energy = ops.networks(**case.arguments(f, w)).sum()
    (of_weights,) = torch.autograd.grad(energy, w, create_graph=True)
    with pytest.raises(RuntimeError, match="kinml_fast: the gradient of the networks' parameters has no derivative"):
        (of_weights**2).sum().backward()
    energy = ops.networks(**case.arguments(f, w)).sum()
    (of_features,) = torch.autograd.grad(energy, f, create_graph=True)
    for wanted in (f, w):
        (second,) = torch.autograd.grad((of_features**2).sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="kinml_fast: the networks can be differentiated twice, not a third"):
            (second**2).sum().backward()
    # Gradients of both at once: only that of the features is differentiated.
    of_features, _ = torch.autograd.grad(ops.networks(**case.arguments(f, w)).sum(), (f, w), create_graph=True)
    again = torch.autograd.grad((of_features**2).sum(), w)[0]
    torch.testing.assert_close(again, second.detach(), rtol=0, atol=0)


def test_single_atom_energies():
    case = Case()
    plain, with_sae = ops.networks(**case.arguments()), ops.networks(**case.arguments(sae=sae()))
    torch.testing.assert_close(with_sae, plain + sums(sae()[case.species], case.offsets), rtol=1e-14, atol=1e-13)
    strided = not_contiguous(sae())
    assert torch.equal(ops.networks(**case.arguments(sae=strided)), with_sae)
    assert plain[2] == 0  # a structure without atoms
    # float32 networks keep single-atom energies of thousands of eV to float64's precision.
    narrow = Case(dtype=torch.float32)
    shift = torch.tensor([-16.8356588, -1035.30436565, -1486.3292980], dtype=torch.float64)
    difference = ops.networks(**narrow.arguments(sae=shift)) - ops.networks(**narrow.arguments())
    torch.testing.assert_close(difference, sums(shift[narrow.species], narrow.offsets), rtol=1e-14, atol=1e-10)


def test_missing_species_and_empty_batches():
    case = Case(sizes=(3, 2), n_species=3)
    case.species = torch.tensor([2, 0, 0, 2, 2])  # none of species 1
    case.order = ops.species_order(case.species, case.offsets, 3)
    compare_gradients(case, 1e-11, 1e-12)
    weights = case.networks.weights.detach().clone().requires_grad_()
    ops.networks(**case.arguments(weights=weights)).sum().backward()
    per_species = weights.grad.reshape(3, -1)
    assert per_species[0].any()
    assert per_species[2].any()
    assert not per_species[1].any()
    for sizes in ((), (0,), (0, 0)):
        empty = Case(sizes=sizes)
        f, w = empty.features.requires_grad_(), empty.networks.weights
        energies = ops.networks(**empty.arguments(weights=w, sae=sae()))
        assert torch.equal(energies, torch.zeros(len(sizes), dtype=torch.float64))
        energies.sum().backward()
        assert not w.grad.any()
        assert f.grad.shape == (0, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layout_and_mode_do_not_matter(dtype):
    case = Case(dtype=dtype, n_inputs=8)

    def row_stride(x: torch.Tensor) -> torch.Tensor:  # the numbers of a row stand together, the rows do not
        return torch.nn.functional.pad(x, (0, 5))[:, : x.shape[1]] if x.dim() == 2 else x

    results = []
    for layout in (torch.clone, not_contiguous, row_stride, lambda x: x.t().contiguous().t()):
        arguments = each_tensor(layout, case.arguments(sae=sae()))
        f, w = arguments["features"].requires_grad_(), arguments["parameters"].requires_grad_()
        energies = ops.networks(**arguments)
        results.append((energies.detach(), *torch.autograd.grad((energies**2).sum(), (f, w))))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            energies = ops.networks(**case.arguments(weights=case.networks.weights, sae=sae()))
            assert torch.equal(energies, results[0][0])
            assert not energies.requires_grad


# ---- The order of atoms, batches -----------------------------------------------------------------


def test_species_order_is_a_stable_sort():
    _, species, offsets = ragged([4, 0, 1, 9, 3], 4, 1)
    order = ops.species_order(species, offsets, 4)
    rows, owners, starts = order.tensors
    assert torch.equal(rows, torch.argsort(species, stable=True))
    assert torch.equal(owners, torch.repeat_interleave(torch.arange(5), offsets.diff())[rows])
    assert torch.equal(starts, torch.tensor([0, *torch.bincount(species, minlength=4).cumsum(0)]))
    again = ops.species_order(not_contiguous(species), not_contiguous(offsets), 4)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, order.tensors, strict=True))
    assert [t.tolist() for t in ops.species_order(species[:0], offsets[:1], 2).tensors] == [[], [], [0, 0, 0]]


@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES)
def test_batches_add_up_to_the_whole(dtype, rtol, atol):
    """Energies of the batches are bit for bit those of the whole set; gradients add up to the whole's."""
    case = Case(dtype=dtype, sizes=(4, 0, 1, 9, 3, 5, 2, 40))
    case.features.requires_grad_()
    networks = case.networks
    whole = networks(case.features, case.species, case.offsets, torch.zeros(3, dtype=torch.float64))
    slopes = normal(case.n_structures, seed=3)
    of_whole = torch.autograd.grad((slopes * whole).sum(), (case.features, networks.weights))
    structures = torch.tensor([5, 7, 0, 3, 2, 6, 1, 4])
    of_batches = [torch.zeros_like(g) for g in of_whole]
    for batch in structures.split(3):
        energies = networks.energies(case.features, *case.order_of(batch).tensors, len(batch))
        assert torch.equal(energies, whole[batch])
        loss = (slopes[batch] * energies).sum()
        for total, part in zip(of_batches, torch.autograd.grad(loss, (case.features, networks.weights)), strict=True):
            total += part
    for total, part in zip(of_batches, of_whole, strict=True):
        torch.testing.assert_close(total, part, rtol=rtol, atol=atol)


def test_a_structure_twice_in_a_batch_counts_twice():
    case = Case()
    case.features.requires_grad_()
    structures = torch.tensor([3, 0, 3])
    energies = case.networks.energies(case.features, *case.order_of(structures).tensors, 3)
    whole = case.networks(case.features, case.species, case.offsets, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(energies, whole[structures])
    ours = torch.autograd.grad(energies.sum(), (case.features, case.networks.weights))
    expected = torch.autograd.grad(whole[structures].sum(), (case.features, case.networks.weights))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- The module ----------------------------------------------------------------------------------


@ON_CPU
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layers", [[6, 4, 1], [[6, 4, 1], [2, 9, 1]]])
def test_weights_begin_as_those_of_linear_modules(layers, dtype, biases):
    torch.manual_seed(4)
    networks = SpeciesNetworks(("C", "H"), 10, layers, ["gaussian", "gaussian", "identity"], biases, dtype)
    after = torch.rand(1)
    torch.manual_seed(4)
    for s, widths in enumerate(layers if isinstance(layers[0], list) else [layers, layers]):
        inputs = 10
        for k, outputs in enumerate(widths):
            linear = torch.nn.Linear(inputs, outputs, bias=biases, dtype=dtype)
            weight, bias = networks.layer(s, k)
            assert torch.equal(weight, linear.weight)
            assert (bias is None and linear.bias is None) or torch.equal(bias, linear.bias)
            inputs = outputs
    assert torch.equal(after, torch.rand(1))  # the generator has moved as far


def test_layer_is_a_view_of_the_weights():
    networks = Case().networks
    with torch.no_grad():
        for weight, bias in (networks.layer(1, 2), networks.layer(2, 0)):
            weight.fill_(2.0)
            bias.fill_(3.0)
    places = layers_of(networks)
    assert (places[1][2][0] == 2).all()
    assert (places[2][0][1] == 3).all()
    assert int((networks.weights == 2).sum()) == 3 + 35
    assert int((networks.weights == 3).sum()) == 1 + 5


def test_text_of_the_module_names_its_layers():
    text = repr(Case().networks)
    assert "(C): Network(" in text
    assert "(1): Linear(5 -> 3, bias=True), tanh" in text
    assert "parameters: 186, float64" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float16}, "float64 or float32, not torch.float16"),
        ({"n_inputs": 0}, "at least one input, not 0"),
        ({"layers": [[4, 1]]}, "2 elements but layers for 1 of them"),
        (
            {"layers": [4, 3, 1]},
            r"Layers \[4, 3, 1\] need 3 activations, one for each layer, got \['tanh', 'identity'\]",
        ),
        ({"layers": [0, 1]}, r"at least one output, got layers \[0, 1\]"),
        ({"layers": [4, 2]}, r"must have 1 output, got layers \[4, 2\]"),
        ({"activations": ["tanh", "sigmoid"]}, "Unknown activation 'sigmoid': choose among identity, gaussian"),
        ({"layers": [], "activations": []}, "at least one output, got layers"),
    ],
)
def test_wrong_architectures_are_explained(change, message):
    arguments = {"elements": ("C", "H"), "n_inputs": 5, "layers": [4, 1], "activations": ["tanh", "identity"]}
    with pytest.raises(InputError, match=message):
        SpeciesNetworks(**{**arguments, **change})


# ---- Checks of torch and of arguments ------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [(4, 1, 0, 6), ()])
def test_opcheck(dtype, sizes):
    case = Case(dtype=dtype, sizes=sizes)
    check = torch.library.opcheck
    check(OPS.networks.default, raw(case.arguments(sae=sae())))
    f, w = case.features.clone().requires_grad_(), case.networks.weights.detach().clone().requires_grad_()
    check(OPS.networks.default, raw(case.arguments(f, w, sae())))
    check(OPS.networks_forward.default, raw(case.forward_arguments(False, sae=sae())))
    # `saved` has columns between those of its layers that are never written: two calls cannot be compared.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    check(OPS.networks_forward.default, raw(case.forward_arguments(True, sae=sae())), test_utils=utilities)

    def turned(features: torch.Tensor) -> torch.Tensor:
        return features.t().contiguous().t()

    for wanted in itertools.product((True, False), repeat=2):
        arguments = case.backward_arguments(wanted)
        check(OPS.networks_backward.default, raw(arguments))
        # Sources in other layouts give outputs of the shapes and strides that the Meta kernel promises.
        check(OPS.networks_backward.default, raw(changed(arguments, "features", turned)))
    for wanted in itertools.product((True, False), repeat=3):
        arguments = case.second_arguments(wanted)
        check(OPS.networks_second_backward.default, raw(arguments))
        check(OPS.networks_second_backward.default, raw(changed(arguments, "tangents", turned)))
    arguments = case.backward_arguments((True, False))
    for name in ("grad_energies", "features", "parameters"):
        arguments = changed(arguments, name, lambda x: x.clone().requires_grad_())
    check(OPS.networks_backward.default, raw(arguments), test_utils=("test_schema", "test_faketensor"))
    check(OPS.species_order.default, (case.species, case.offsets, 3))
    check(OPS.species_order.default, (not_contiguous(case.species), case.offsets, 3))


def test_inner_ops_do_not_lose_gradients_in_silence():
    """networks_forward has no derivative of its own: whoever differentiates it must hear so."""
    case = Case()
    energies, _ = OPS.networks_forward(*raw(case.forward_arguments(True, weights=case.networks.weights)))
    with pytest.raises(RuntimeError, match="kinml_fast"):
        energies.sum().backward()


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("features", lambda a: a.half(), "features must be float64 or float32, got Half"),
        ("features", lambda a: a[0], r"features must have shape \[n, D\], got \[7\]"),
        ("features", lambda a: a[:, 1:], "the network of species 0 takes 7 inputs, the features have 6"),
        ("features", lambda a: a.float(), "parameters is Double but features is Float; both must have one dtype"),
        ("rows", lambda a: a.int(), "rows must be a one-dimensional int64 tensor, got Int"),
        ("owners", lambda a: a[1:], "rows has 13 atoms, owners has 12"),
        ("starts", lambda a: a[:-1], "for 3 species and 1 levels, the atoms are sorted by 2 species, of one level"),
        ("starts", lambda a: a[:0], "for 3 species and 1 levels, the atoms are sorted by -1 species, of one level"),
        ("parameters", lambda a: a[1:], "the networks have 186 parameters, got 185"),
        ("parameters", lambda a: a.view(1, -1), r"parameters must be one flat tensor, got shape \[1, 186\]"),
        ("sae", lambda a: sae().float(), r"sae must be float64 of shape \[3\], got Float of shape \[3\]"),
        ("sae", lambda a: sae()[:2], r"sae must be float64 of shape \[3\], got Double of shape \[2\]"),
        ("sae", lambda a: sae().clone().requires_grad_(), "sae has no gradient"),
        ("networks", lambda a: a[:3], "the description of the networks must have at least 4 numbers, got 3"),
        ("networks", lambda a: a[:-1], "1 levels, 3 species and 3 layers, which needs 19 numbers; it has 18"),
        ("networks", lambda a: [1, 2, *a[2:-4]], "for 2 species and 1 levels, the atoms are sorted by 3 species"),
        ("networks", lambda a: [2, *a[1:], *a[7:]], "for 3 species and 2 levels, the atoms are sorted by 3 species"),
        (
            "networks",
            lambda a: [*a[:7], *[7, 5, 3, 2] * 3],
            "the last layer must have one output, that of species 0 has 2",
        ),
        (
            "networks",
            lambda a: [*a[:7], *[7, 0, 3, 1] * 3],
            "every layer must have at least one output, one of species 0",
        ),
        ("networks", lambda a: [*a[:4], 1, 7, 0, *a[7:]], "unknown activation code 7"),
        ("networks", lambda a: [1, 3, 0, 1, 7, 7, 7], "1 levels, 3 species and 0 layers"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(argument, change, message):
    arguments = changed(Case().arguments(), argument, change)
    with pytest.raises(RuntimeError, match=f"kinml_fast: .*({message})"):
        ops.networks(**arguments)


@ON_CPU
@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("features", lambda a: a[:-1], r"rows\[\d+\] = 12 is not a row of the features, which have 12"),
        ("rows", lambda a: a - 1, r"rows\[\d+\] = -1 is not a row of the features, which have 13"),
        ("owners", lambda a: a + 1, r"owners\[\d+\] = 5 is not in \[0, 5\)"),
        ("owners", lambda a: a - 1, r"owners\[\d+\] = -1 is not in \[0, 5\)"),
        ("starts", lambda a: a + 1, "starts must begin with 0 and end with the number of rows, 13"),
        ("starts", lambda a: torch.tensor([0, 9, 4, 13]), "starts must not decrease"),
    ],
)
def test_wrong_values_say_what_was_expected_and_what_came(argument, change, message):
    arguments = changed(Case().arguments(), argument, change)
    with pytest.raises(RuntimeError, match=f"kinml_fast: .*{message}"):
        ops.networks(**arguments)


@ON_CPU
def test_wrong_values_of_orders_say_what_was_expected_and_what_came():
    _, species, offsets = ragged([4, 2], 2, 2)
    with pytest.raises(RuntimeError, match=r"species\[\d\] = 1 is not in \[0, 1\)"):
        ops.species_order(species, offsets, 1)
    with pytest.raises(RuntimeError, match="end with the number of atoms, 6"):
        ops.species_order(species, offsets[:-1], 2)


def test_wrong_orders_say_what_was_expected_and_what_came():
    _, species, offsets = ragged([4, 2], 2, 2)
    with pytest.raises(RuntimeError, match="n_species must be at least 1, got 0"):
        ops.species_order(species, offsets, 0)
    with pytest.raises(RuntimeError, match="species must be a one-dimensional int64 tensor, got Int"):
        ops.species_order(species.int(), offsets, 2)


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("tangents", lambda a: a.float(), "tangents is Float but features is Double; both must have one dtype"),
        ("tangents", lambda a: a[:, 1:], r"tangents must have shape \[13, 7\], got \[13, 6\]"),
        ("tangents", lambda a: a[1:], r"tangents must have shape \[13, 7\], got \[12, 7\]"),
        ("grad_energies", lambda a: a.float(), r"grad_energies must be float64 of shape \[n_structures\]"),
        ("parameters", lambda a: a[1:], "the networks have 186 parameters, got 185"),
    ],
)
def test_wrong_arguments_of_second_derivatives(argument, change, message):
    arguments = changed(Case().second_arguments(), argument, change)
    with pytest.raises(RuntimeError, match=f"kinml_fast: .*({message})"):
        OPS.networks_second_backward(*raw(arguments))


@ON_CPU
def test_owners_beyond_the_gradients_of_energies():
    arguments = changed(Case().second_arguments(), "grad_energies", lambda g: g[1:])
    with pytest.raises(RuntimeError, match=r"kinml_fast: .*owners\[\d+\] = 4 is not in \[0, 4\)"):
        OPS.networks_second_backward(*raw(arguments))
