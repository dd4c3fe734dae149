"""Several levels of theory and ensembles in the fused ops: against the definition, autograd and finite differences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from op_helpers import ON_CPU, SMALL, changed, here, keywords, normal, not_contiguous, ragged, raw

from kinml_fast import InputError, ops, reference
from kinml_fast.nn import ACTIVATIONS, AEVParameters, EnergyModel
from kinml_fast.ops import Loss, Model, StepResults, System

pytestmark = pytest.mark.usefixtures("on_device")

OPS = torch.ops.kinml_fast
SIZES = (5, 1, 0, 8, 3, 2)
LEVELS = pytest.mark.parametrize("levels", [2, 3])
TYPES = pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-11, 1e-11), (torch.float32, 5e-4, 5e-4)])


def model(
    levels: int = 2,
    activation: str = "gaussian",
    dtype: torch.dtype = torch.float64,
    biases: bool = True,
    descriptor: AEVParameters = SMALL,
    seed: int = 1,
) -> EnergyModel:
    """A model whose levels differ by as much as the lowest is large, with widths that differ between the elements."""
    torch.manual_seed(seed)
    widths = [[7, 4, 1], [5, 3, 1], [6, 2, 1], [4, 3, 1], [4, 2, 1], [3, 2, 1], [2, 2, 1]][: len(descriptor.elements)]
    made = EnergyModel(descriptor, widths, [activation] * 2 + ["identity"], biases, dtype, range(levels))
    with torch.no_grad():
        made.networks.weights.mul_(1.5)
        made.sae.copy_(normal(*made.sae.shape, seed=2))
    return made


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    coordinates, species, offsets = ragged(SIZES, 2, 4)
    species[offsets[4] : offsets[5]] = 1  # one molecule without the first element
    return coordinates.to(dtype), species, offsets


def arguments(made: EnergyModel, batch=None, first_level: int = 0) -> dict[str, Any]:
    """Those of energy_forces."""
    return {
        "system": System(*(inputs(made.dtype) if batch is None else batch)),
        "parameters": made.networks.weights,
        "sae": made.sae.reshape(made.levels, -1)[first_level:],
        "model": Model(made.aev.packed, made.networks.packed),
        "first_level": first_level,
    }


def stored(made: EnergyModel, jacobian: bool = True) -> System:
    """The molecules by descriptors, and by Jacobians with room for one atom more than the largest has."""
    system = System(*inputs(made.dtype))
    features = ops.aev(system, made.aev.packed)
    slopes = ops.aev_jacobian(system, max(SIZES) + 1, made.aev.packed) if jacobian else None
    return System(None, system.species, system.offsets, features, slopes)


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float) -> None:
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol * scale)


def by_definition(made: EnergyModel, batch) -> torch.Tensor:
    networks = made.networks
    weights = [
        [[networks.layer(s, k, level) for k in range(len(networks.activations))] for s in range(networks.n_species)]
        for level in range(made.levels)
    ]
    return reference.level_energies(*batch, keywords(made.descriptor), weights, networks.activations, made.sae)


# ---- against the definition and autograd ---------------------------------------------------------


@TYPES
@LEVELS
def test_energies_and_forces_are_those_of_the_definition(levels, dtype, rtol, atol):
    made = model(levels, dtype=dtype)
    x, z, o = inputs()
    x.requires_grad_()
    in_float64 = model(levels)
    in_float64.load_state_dict(made.state_dict())
    expected = by_definition(in_float64, (x, z, o))
    slopes = [-torch.autograd.grad(e.sum(), x, retain_graph=True)[0] for e in expected]
    energies, forces = made.level_energies_and_forces(*inputs(dtype))
    assert (energies.dtype, forces.dtype) == (torch.float64, dtype)
    close(energies, expected.detach(), rtol, atol)
    close(forces.double(), torch.stack(slopes), rtol, atol)
    close(made.level_energies(*inputs(dtype)).detach(), expected.detach(), rtol, atol)


@TYPES
@LEVELS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_double_backward(activation, levels, dtype, rtol, atol):
    """The unfused path: networks one after another, differentiated twice by autograd."""
    for biases in (True, False):
        made = model(levels, activation, dtype, biases)
        x, z, o = inputs(dtype)
        x.requires_grad_()
        energies = made.level_energies(x, z, o)
        forces = torch.stack([-torch.autograd.grad(e.sum(), x, create_graph=True)[0] for e in energies])
        of_energies, of_forces = normal(*energies.shape, seed=3), normal(*forces.shape, seed=4, dtype=dtype)
        total = (of_energies * energies).sum() + (of_forces * forces).sum().double()
        (expected,) = torch.autograd.grad(total, made.networks.weights)

        fused = made.level_energies_and_forces(*inputs(dtype))
        close(fused[0].detach(), energies.detach(), rtol, atol)
        close(fused[1].detach(), forces.detach(), rtol, atol)
        total = (of_energies * fused[0]).sum() + (of_forces * fused[1]).sum().double()
        close(torch.autograd.grad(total, made.networks.weights)[0], expected, rtol, atol)


@LEVELS
def test_forces_of_all_levels_are_minus_the_differences_of_the_energies(levels):
    made = model(levels)
    x, z, o = inputs()
    forces = made.level_energies_and_forces(x, z, o)[1].detach()
    step = 1e-4
    for atom, axis in itertools.product((0, 4, 9, 15), range(3)):
        slopes = torch.zeros(levels, dtype=torch.float64)
        for shift, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
            moved = x.clone()
            moved[atom, axis] += shift * step
            slopes += weight / (12 * step) * made.level_energies_and_forces(moved, z, o)[0].detach().sum(dim=1)
        torch.testing.assert_close(forces[:, atom, axis], -slopes, rtol=1e-7, atol=1e-9)


@pytest.mark.sample(1)
@LEVELS
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("first_level", [0, 1])
def test_gradcheck(levels, biases, first_level):
    made = model(levels, "tanh", biases=biases)
    values = arguments(made, first_level=first_level)
    flat = made.networks.weights.detach().requires_grad_()
    for system in (values["system"], stored(made), stored(made, jacobian=False)):
        assert torch.autograd.gradcheck(
            lambda w, own=system: ops.energy_forces(**{**values, "system": own, "parameters": w}), (flat,)
        )


@pytest.mark.slow
def test_gradgradcheck_of_the_unfused_path():
    """Energies of all levels are differentiable twice with respect to coordinates and weights."""
    made = model(2, "tanh")
    x, z, o = ragged((3, 2), 2, 1)

    def energies(x, w):
        return torch.func.functional_call(made, {"networks.weights": w}, (x, z, o))

    flat = made.networks.weights.detach()[::1].clone().requires_grad_()
    x.requires_grad_()
    assert torch.autograd.gradcheck(energies, (x, flat))
    (slope,) = torch.autograd.grad(energies(x, flat).sum(), x, create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), flat)[0].abs().max() > 0


# ---- training steps ------------------------------------------------------------------------------


def step_arguments(made: EnergyModel, structures: list[int], system: System, weights: tuple) -> dict[str, Any]:
    """Those of force_step; the results are full of NaN, and so are targets without weight."""
    n, batch = len(structures), torch.tensor(structures)
    offsets = inputs()[2]
    targets = normal(made.levels, len(SIZES), seed=5), normal(made.levels, sum(SIZES), 3, seed=6)
    for level, s in itertools.product(range(made.levels), range(len(SIZES))):
        if weights[1][level, s] == 0:
            targets[1][level, offsets[s] : offsets[s + 1]] = torch.nan
        if weights[0][level, s] == 0:
            targets[0][level, s] = torch.nan
    (counts,) = ops.count_weights(ops.weighted(*weights), batch, n)
    losses, residuals, errors = (
        torch.full(shape, torch.nan, dtype=torch.float64) for shape in ((2,), (made.levels, n), (made.levels, n, 3))
    )
    flat = made.networks.weights.detach()
    scales = torch.tensor([0.3, 0.7], dtype=torch.float64)
    return {
        "system": system,
        "structures": batch,
        "parameters": flat,
        "loss": Loss(targets[0], weights[0], targets[1], weights[1], scales, counts),
        "results": StepResults(losses, torch.full_like(flat, torch.nan), residuals, errors),
        "model": Model(made.aev.packed if system.features is None else [], made.networks.packed),
    }


def run_step(made: EnergyModel, structures: list[int], weights: tuple, kind: str) -> list[torch.Tensor]:
    """Residuals, errors, losses and gradient of a step of one of the kinds recomputed, stored, energies."""
    system = System(*inputs(made.dtype)) if kind == "recomputed" else stored(made, jacobian=kind == "stored")
    values = step_arguments(made, structures, system, weights)
    ops.force_step(**values)
    results = values["results"]
    return [results.energy_residuals, results.force_errors, results.losses, results.gradient]


def expected_step(made: EnergyModel, structures: list[int], weights: tuple, with_forces: bool) -> list[torch.Tensor]:
    """The same from what level_energies_and_forces gives, by autograd."""
    loss = step_arguments(made, structures, System(*inputs(made.dtype)), weights)["loss"]
    of_energies, of_forces = loss.energies, loss.forces
    offsets = inputs()[2].tolist()
    made.sae.zero_()  # the targets of a step are without single-atom energies
    energies, forces = made.level_energies_and_forces(*inputs(made.dtype))
    residuals = (energies - of_energies)[:, structures]
    errors = torch.zeros(made.levels, len(structures), 3, dtype=torch.float64)
    losses = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for level in range(made.levels):
        known = weights[0][level, structures] != 0
        if known.any():
            own = energies[level, structures][known] - of_energies[level, structures][known]
            losses[0] = losses[0] + (weights[0][level, structures][known] * own.square()).sum() / known.sum()
        with_weight = [s for s in structures if weights[1][level, s] != 0]
        for place, s in enumerate(structures):
            atoms = slice(offsets[s], offsets[s + 1])
            if not with_forces or weights[1][level, s] == 0 or atoms.start == atoms.stop:
                continue
            difference = forces[level, atoms].double() - of_forces[level, atoms]
            size = difference.detach().abs()
            errors[level, place] = torch.stack([size.sum(), size.square().sum(), size.max()])
            losses[1] = losses[1] + weights[1][level, s] * difference.square().mean() / len(with_weight)
    total = 0.3 * losses[0] + 0.7 * losses[1]
    gradient = torch.zeros_like(made.networks.weights)
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, made.networks.weights)
    return [residuals.detach(), errors, torch.stack(losses).detach(), gradient]


def some_weights(levels: int, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    like = {"generator": torch.Generator().manual_seed(seed), "device": "cpu"}
    return tuple(
        here(
            torch.rand(levels, len(SIZES), dtype=torch.float64, **like) * (torch.rand(levels, len(SIZES), **like) > 0.4)
        )
        for _ in range(2)
    )


@TYPES
@LEVELS
@pytest.mark.parametrize("kind", ["recomputed", "stored", "energies"])
@pytest.mark.parametrize("structures", [[0, 1, 2, 3, 4, 5], [4, 0, 0, 3, 2], [2], [1], [5]])
def test_a_step_is_its_loss_and_the_gradient(structures, kind, levels, dtype, rtol, atol):
    made = model(levels, dtype=dtype)
    for seed in (7, 8, 9):
        weights = some_weights(levels, seed)
        found = run_step(made, structures, weights, kind)
        expected = expected_step(made, structures, weights, kind != "energies")
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.isnan(a), torch.isnan(b))
            close(torch.nan_to_num(a), torch.nan_to_num(b), rtol, atol)


def test_a_level_that_nothing_is_known_of_gets_no_gradient_of_its_own():
    """Structures with the low level only train the low level; those with the high level only train both."""
    made = model(2)
    none, one = torch.zeros(len(SIZES), dtype=torch.float64), torch.ones(len(SIZES), dtype=torch.float64)
    split = made.networks.level_starts[1]
    everything = list(range(len(SIZES)))
    low = run_step(made, everything, (torch.stack([one, none]), torch.stack([one, none])), "recomputed")[3]
    assert torch.equal(low[split:], torch.zeros_like(low[split:]))
    assert low[:split].abs().max() > 0
    high = run_step(made, everything, (torch.stack([none, one]), torch.stack([none, one])), "recomputed")[3]
    assert high[:split].abs().max() > 0
    assert high[split:].abs().max() > 0


def test_low_level_is_the_single_network():
    """Level 0 of a chain has the bits of a model of its own: energies, forces and, alone in the loss, the gradient."""
    made = model(3)
    single = model(1)
    with torch.no_grad():
        single.networks.weights.copy_(made.networks.weights[: made.networks.level_starts[1]])
        single.sae.copy_(made.sae[0])
    energies, forces = made.level_energies_and_forces(*inputs())
    alone = single.energies_and_forces(*inputs())
    assert torch.equal(energies[0], alone[0])
    assert torch.equal(forces[0], alone[1])


# ---- large molecules, special inputs -------------------------------------------------------------


@TYPES
def test_large_molecules(dtype, rtol, atol):
    """More than 512 atoms take another way through the code."""
    made = model(2, dtype=dtype)
    x, z, o = ragged((600, 0, 70), 2, 3)
    x = x.to(dtype).requires_grad_()
    expected = made.level_energies(x, z, o)
    energies, forces = made.level_energies_and_forces(x.detach(), z, o)
    close(energies.detach(), expected.detach(), rtol, 10 * atol)
    for level in range(2):
        (slope,) = torch.autograd.grad(expected[level].sum(), x, retain_graph=True)
        close(forces[level].detach(), -slope, rtol, 10 * atol)
    top = made.energies_and_forces(x.detach(), z, o)
    assert torch.equal(top[0], energies[1])
    assert torch.equal(top[1], forces[1])


@LEVELS
def test_highest_level_alone_is_the_last_of_all(levels):
    made = model(levels)
    energies, forces = made.level_energies_and_forces(*inputs())
    top = made.energies_and_forces(*inputs())
    assert torch.equal(top[0], energies[-1])
    assert torch.equal(top[1], forces[-1])
    close(made(*inputs()).detach(), energies[-1].detach(), 1e-12, 1e-12)
    slopes = normal(*top[0].shape, seed=1), normal(*top[1].shape, seed=2)
    (alone,) = torch.autograd.grad(top, made.networks.weights, slopes)
    all_slopes = [torch.zeros(levels, *s.shape, dtype=torch.float64).index_fill_(0, torch.tensor(0), 0) for s in slopes]
    for whole, part in zip(all_slopes, slopes, strict=True):
        whole[-1] = part
    (whole,) = torch.autograd.grad((energies, forces), made.networks.weights, all_slopes)
    close(alone, whole, 1e-12, 1e-12)


@pytest.mark.parametrize("levels", [1, 2])
def test_batches_of_nothing_and_of_single_atoms(levels):
    made = model(levels)
    nothing = torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), torch.zeros(1).long()
    energies, forces = made.level_energies_and_forces(*nothing)
    assert (energies.shape, forces.shape) == ((levels, 0), (levels, 0, 3))
    assert made.level_energies(*nothing).shape == (levels, 0)
    atom = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([1]), torch.tensor([0, 0, 1])
    energies, forces = made.level_energies_and_forces(*atom)
    assert torch.equal(energies[:, 0], torch.zeros(levels, dtype=torch.float64))
    assert torch.equal(forces, torch.zeros(levels, 1, 3, dtype=torch.float64))
    close(energies.detach(), made.level_energies(*atom).detach(), 1e-13, 1e-13)


def test_inputs_need_not_be_contiguous():
    made = model(2)
    expected = made.level_energies_and_forces(*inputs())
    found = made.level_energies_and_forces(*map(not_contiguous, inputs()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@ON_CPU
@pytest.mark.parametrize("count", [1, 7, 50])
def test_same_bits_for_any_number_of_threads(count, any_threads):
    made = model(2)
    batch = ragged([1 + i % 9 for i in range(count)], 2, 5)
    runs = []
    for threads in (1, 2, 5, 16):
        torch.set_num_threads(threads)
        energies, forces = made.level_energies_and_forces(*batch)
        (gradient,) = torch.autograd.grad(energies.sum() + forces.square().sum(), made.networks.weights)
        runs.append((energies.detach(), forces.detach(), gradient))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("bad", [0, 3])
def test_coordinates_that_are_not_numbers_spoil_their_structure_only(bad):
    made = model(2)
    x, z, o = inputs()
    good = made.level_energies_and_forces(x, z, o)
    x = x.clone()
    x[o[bad], 1] = torch.nan
    energies, forces = made.level_energies_and_forces(x, z, o)
    others = [s for s in range(len(SIZES)) if s != bad]
    assert torch.isnan(energies[:, bad]).all()
    assert torch.equal(energies[:, others], good[0][:, others])
    atoms = torch.ones(len(z), dtype=torch.bool)
    atoms[o[bad] : o[bad + 1]] = False
    assert torch.equal(forces[:, atoms], good[1][:, atoms])


# ---- ensembles -----------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("members", [1, 3, 8])
def test_members_are_what_they_are_alone(members, levels, dtype, rtol, atol):
    models = [model(levels, dtype=dtype, seed=seed) for seed in range(members)]
    values = arguments(models[0])
    values["parameters"] = torch.stack([m.networks.weights.detach() for m in models])
    values["sae"] = torch.stack([m.sae.reshape(levels, -1) for m in models])
    energies, forces = ops.energy_forces(**values)
    assert (energies.shape, forces.shape) == ((members, levels, len(SIZES)), (members, levels, sum(SIZES), 3))
    for m, own in enumerate(models):
        alone = ops.energy_forces(**arguments(own))
        assert torch.equal(energies[m], alone[0])
        close(forces[m], alone[1].detach(), 1e-12 if dtype == torch.float64 else rtol, atol)
    top = ops.energy_forces(**{**values, "sae": values["sae"][:, -1:], "first_level": levels - 1})
    assert torch.equal(top[0], energies[:, -1:])
    assert torch.equal(top[1], forces[:, -1:])


def test_an_ensemble_without_members_gives_nothing():
    made = model(1)
    nobody = torch.zeros(0, made.networks.weights.numel(), dtype=torch.float64)
    energies, forces = ops.energy_forces(**{**arguments(made), "parameters": nobody, "sae": None})
    assert (energies.shape, forces.shape) == ((0, 1, len(SIZES)), (0, 1, sum(SIZES), 3))


def test_members_are_not_trained_together():
    made = model(1)
    flat = made.networks.weights.detach()[None].requires_grad_()
    energies, _ = ops.energy_forces(**{**arguments(made), "parameters": flat, "sae": None})
    with pytest.raises(RuntimeError, match="members of an ensemble are trained one at a time"):
        energies.sum().backward()


@pytest.mark.parametrize("first_level", [0, 1, 2])
def test_the_levels_wanted_are_those_from_the_first_on(first_level):
    made = model(3)
    for system in (System(*inputs()), stored(made), stored(made, jacobian=False)):
        energies, forces = ops.energy_forces(**{**arguments(made), "system": system})
        assert energies.shape == (3, len(SIZES))
        some = ops.energy_forces(**{**arguments(made, first_level=first_level), "system": system})
        assert torch.equal(some[0], energies[first_level:])
        assert torch.equal(some[1], forces[first_level:])


# ---- every way of use ----------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("members", [0, 3])
def test_opcheck(dtype, members):
    made = model(2, dtype=dtype)
    flat, check = made.networks.weights.detach(), torch.library.opcheck
    values = arguments(made)
    if members:
        values |= {"parameters": flat.expand(members, -1).contiguous(), "sae": None}
        check(OPS.energy_forces.default, raw(values))
        return
    for first_level in (0, 1):
        values = {**arguments(made, first_level=first_level), "parameters": flat.clone().requires_grad_()}
        check(OPS.energy_forces.default, raw(values))
        check(OPS.energy_forces.default, raw({**values, "system": stored(made, jacobian=False)}))
        with torch.no_grad():
            energies, forces = ops.energy_forces(**values)
        backward = {"grad_energies": torch.ones_like(energies), "grad_forces": torch.ones_like(forces), **values}
        del backward["sae"]
        check(OPS.energy_forces_backward.default, raw({**backward, "parameters": flat}))
    check(OPS.force_step.default, raw(step_arguments(made, [3, 0, 1], stored(made, jacobian=False), some_weights(2))))


def test_script_save_and_load(tmp_path):
    made = model(2)
    torch.jit.script(made).save(tmp_path / "model.ts")
    loaded = torch.jit.load(tmp_path / "model.ts")
    for name in ("forward", "level_energies", "energies_and_forces", "level_energies_and_forces"):
        found, expected = getattr(loaded, name)(*inputs()), getattr(made, name)(*inputs())
        for a, b in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (found, expected)), strict=True):
            assert torch.equal(a, b)


def test_to_dict_and_back():
    made = model(3)
    again = EnergyModel.from_dict(made.to_dict())
    assert again.fidelities == (0, 1, 2)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(*inputs()), made(*inputs()))
    delta = EnergyModel(SMALL, fidelities=[1], baseline=0)
    assert (delta.fidelities, delta.baseline) == ((1,), 0)
    assert EnergyModel.from_dict(delta.to_dict()).baseline == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fidelities": ()}, "one or more different fidelities, not"),
        ({"fidelities": (1, 1)}, r"one or more different fidelities, not \[1, 1\]"),
        ({"fidelities": (0, 1), "baseline": 2}, "model of differences has one fidelity"),
        ({"fidelities": (1,), "baseline": 1}, "model of differences has one fidelity and another one"),
    ],
)
def test_wrong_fidelities(settings, message):
    with pytest.raises(InputError, match=message):
        EnergyModel(SMALL, **settings)


def test_single_atom_energies_of_one_level_need_no_dimension_for_levels():
    made = model(2)
    found = [ops.energy_forces(**{**arguments(made, first_level=1), "sae": sae}) for sae in (made.sae[1:], made.sae[1])]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_wrong_arguments_say_what_was_expected_and_what_came():
    made = model(2)

    def refused(message: str, **changes) -> None:
        values = arguments(made)
        for name, value in changes.items():
            values = changed(values, name, lambda _, new=value: new)
        with pytest.raises(RuntimeError, match=f"^kinml_fast: .*{message}"):
            ops.energy_forces(**values)

    packed = made.networks.packed  # [2 levels, 2 species, 3 layers, 1, 3 codes, 16 widths]
    refused(r"sae must be .* of shape \[2, 2\], got Double of shape \[2\]", sae=made.sae[0])
    refused(r"sae must be .* of shape \[1, 2\], got Double of shape \[2, 2\]", first_level=1)
    refused(r"first_level = 2 is not in \[0, 2\)", first_level=2)
    refused(r"first_level = -1 is not in \[0, 2\)", first_level=-1)
    refused("2 levels, 2 species and 3 layers, which needs 23 numbers; it has 22", networks=packed[:-1])
    refused("3 levels, 2 species and 3 layers, which needs 31 numbers; it has 23", networks=[3, *packed[1:]])
    # As many numbers, read as those of four levels of one species.
    refused("the network of species 0 takes 18 inputs, the features have 19", networks=[4, 1, *packed[2:]])
    refused(
        "the networks are for 1 species, the descriptor for 2",
        networks=[1, 1, *packed[2:11]],
        parameters=torch.zeros(170).double(),
    )
    widths = packed[7:]
    refused(
        "the network of species 1 takes 18 inputs, the features have 19",
        networks=[*packed[:7], *widths[:12], 18, *widths[13:]],
    )
    refused("parameters, got", parameters=made.networks.weights.detach()[1:])


def test_wrong_steps_say_what_was_expected_and_what_came():
    made = model(2)
    values = step_arguments(made, [3, 0, 1], stored(made), some_weights(2))
    for argument, change, message in [
        ("energies", lambda t: t[0], r"energy_targets must be .* of shape \[2, 6\], got Double of shape \[6\]"),
        (
            "forces",
            lambda t: t[:1],
            r"force_targets must be .* of shape \[2, 19, 3\], got Double of shape \[1, 19, 3\]",
        ),
        ("force_weights", lambda w: w.T, r"force_weights must be .* of shape \[2, 6\], got Double of shape \[6, 2\]"),
        ("counts", lambda c: c[:, :1], r"counts must be .* of shape \[2, 2\], got Double of shape \[2, 1\]"),
        (
            "energy_residuals",
            lambda r: r[0],
            r"energy_residuals must be .* of shape \[2, 3\], got Double of shape \[3\]",
        ),
        ("force_errors", lambda e: e[1], r"force_errors must be .* of shape \[2, 3, 3\], got Double of shape \[3, 3\]"),
    ]:
        with pytest.raises(RuntimeError, match=f"^kinml_fast: .*{message}"):
            ops.force_step(**changed(values, argument, change))
