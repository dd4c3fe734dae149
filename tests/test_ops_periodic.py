"""Crystals, ghosts and given pairs: against brute force over images, clusters built by hand, ase, finite strains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_helpers import ON_CPU, SMALL, changed, here, keywords, normal, not_contiguous, raw
from periodic_helpers import ALONG, cluster, crystals, random_cells, supercell, with_pairs

from kinml_fast import ops, reference
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble
from kinml_fast.ops import System

pytestmark = pytest.mark.usefixtures("on_device")

OPS = torch.ops.kinml_fast
LONGEST = max(SMALL.radial_cutoff, SMALL.angular_cutoff)


def model(dtype: torch.dtype = torch.float64, levels: int = 1, descriptor: AEVParameters = SMALL) -> EnergyModel:
    torch.manual_seed(1)
    own = EnergyModel(
        descriptor, (9, 6, 1), ("gaussian", "tanh", "identity"), True, dtype, fidelities=tuple(range(levels))
    )
    own.sae.copy_(normal(*own.sae.shape, seed=3))
    return own


def arguments(own: EnergyModel, system: System, atomic: bool = True) -> dict[str, Any]:
    """Those of energy_forces_virials."""
    return {
        "system": system,
        "parameters": own.networks.weights.detach(),
        "sae": own.sae.reshape(own.levels, -1),
        "model": ops.Model(own.aev.packed, own.networks.packed),
        "first_level": 0,
        "atomic": atomic,
    }


def results(own: EnergyModel, system: System) -> tuple[torch.Tensor, ...]:
    return ops.energy_forces_virials(**arguments(own, system))


def around(system: System) -> list[torch.Tensor | None]:
    return system.tensors[5:]


def called(function: Callable, system: System) -> Any:
    """A method of a model on a system."""
    return function(system.coordinates, system.species, system.offsets, around(system))


def close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-11) -> None:
    scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale)


# ---- Vectors against the definition --------------------------------------------------------------


@pytest.mark.parametrize("along", ALONG)
def test_vectors_and_their_derivatives_match_brute_force_over_images(along):
    system = crystals(along=along)
    assert system.coordinates is not None
    assert system.cells is not None
    expected = reference.aev(
        system.coordinates,
        system.species,
        system.offsets,
        **keywords(SMALL),
        cells=system.cells,
        periodic=system.periodic,
    )
    close(ops.aev(system, SMALL.packed()), expected, 1e-12)
    g = normal(*expected.shape)
    found = []
    for function in (
        lambda s: ops.aev(s, SMALL.packed()),
        lambda s: reference.aev(
            s.coordinates, s.species, s.offsets, **keywords(SMALL), cells=s.cells, periodic=s.periodic
        ),
    ):
        x, cells = system.coordinates.clone().requires_grad_(), system.cells.clone().requires_grad_()
        total = (function(replace(system, coordinates=x, cells=cells)) * g).sum()
        found.append(torch.autograd.grad(total, (x, cells), allow_unused=True))
    close(found[0][0], found[1][0])
    close(found[0][1], torch.zeros_like(system.cells) if found[1][1] is None else found[1][1])


def test_second_derivatives():
    system = crystals(sizes=(2, 1, 3))
    assert system.coordinates is not None
    g = normal(6, SMALL.length)

    def vectors(x):
        return ops.aev(replace(system, coordinates=x), SMALL.packed())

    x = system.coordinates.clone().requires_grad_()
    assert torch.autograd.gradcheck(vectors, x)
    assert torch.autograd.gradgradcheck(lambda x: (vectors(x) * g).sum(1), x)
    cells = replace(system, cells=system.cells.clone().requires_grad_())
    slopes = ops.aev_vjp(cells, g, SMALL.packed())
    with pytest.raises(RuntimeError, match="once with respect to cells"):
        slopes.sum().backward()


def test_jacobians_hold_the_images_of_an_atom_together():
    system = crystals(sizes=(3, 1, 4))
    jacobian = ops.aev_jacobian(system, 4, SMALL.packed())
    v = normal(8, 3)
    for first, last in zip(system.offsets[:-1].tolist(), system.offsets[1:].tolist(), strict=True):
        expected = jacobian[first:last, :, : 3 * (last - first)] @ v[first:last].flatten()
        close(ops.aev_jvp(system, v, SMALL.packed())[first:last], expected)


# ---- Energies, forces, virials -------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("levels", [1, 2])
def test_fused_results_match_autograd(levels, dtype, rtol):
    system, own = crystals(dtype), model(dtype, levels)
    energies, forces, virials, atomic_energies, atomic_virials = called(own.level_results, system)
    exact = crystals()
    reference_model = model(torch.float64, levels)
    with torch.no_grad():
        reference_model.networks.weights.copy_(own.networks.weights)
    for level in range(levels):
        x, strain = exact.coordinates.clone(), torch.zeros(len(exact.offsets) - 1, 3, 3, dtype=torch.float64)
        strain.requires_grad_()
        x.requires_grad_()
        owners = torch.repeat_interleave(torch.arange(len(strain)), exact.offsets.diff())
        moved = x + (strain[owners] @ x.unsqueeze(2))[:, :, 0]
        cells = exact.cells + exact.cells @ strain.transpose(1, 2)
        e = called(reference_model.level_energies, replace(exact, coordinates=moved, cells=cells))[level]
        gradient, of_strain = torch.autograd.grad(e.sum(), (x, strain))
        close(energies[level], e.detach(), rtol)
        close(forces[level].double(), -gradient, rtol)
        close(virials[level], of_strain, rtol)
    for s, (first, last) in enumerate(zip(exact.offsets[:-1].tolist(), exact.offsets[1:].tolist(), strict=True)):
        close(atomic_energies[:, first:last].sum(1), energies[:, s], rtol)
        close(atomic_virials[:, first:last].double().sum(1), virials[:, s], rtol)


def test_virials_are_the_slope_of_finite_strains():
    system, own = crystals(), model()
    virials = called(own.energies_forces_virials, system)[2]
    h = 1e-5
    for a in range(3):
        for b in range(3):

            def energies(sign, a=a, b=b):
                deformation = torch.eye(3, dtype=torch.float64)
                deformation[a, b] += sign * h
                strained = replace(
                    system, coordinates=system.coordinates @ deformation.T, cells=system.cells @ deformation.T
                )
                return called(own.forward, strained)

            slope = (energies(1) - energies(-1)) / (2 * h)
            torch.testing.assert_close(virials[:, a, b], slope, rtol=0, atol=1e-7)


@pytest.mark.parametrize("descriptor", [SMALL, AEVParameters.aevmod(("C", "H"))])
@pytest.mark.parametrize("along", ALONG)
def test_a_box_is_its_cluster_of_images(along, descriptor):
    system, own = crystals(along=along, sizes=(4,)), model(descriptor=descriptor)
    by_hand, atom = cluster(system, max(descriptor.radial_cutoff, descriptor.angular_cutoff))
    energies, forces, virials, *_ = results(own, system)
    e, f, w, atomic, _ = results(own, by_hand)
    close(energies, e)
    close(forces, torch.zeros_like(forces).index_add(1, atom, f))
    close(virials, w)
    assert not atomic[:, 4:].any()
    # Through autograd as well.
    x = by_hand.coordinates.clone().requires_grad_()
    total = called(own.forward, replace(by_hand, coordinates=x))
    close(total.detach(), e[0])
    close(torch.autograd.grad(total.sum(), x)[0], -f[0])


def test_supercells_have_as_many_times_the_energy():
    system, own = crystals(along=(1, 1, 1), sizes=(3,)), model()
    energies, forces, virials, *_ = results(own, system)
    for counts in ((2, 1, 1), (1, 3, 1), (2, 2, 3)):
        n = counts[0] * counts[1] * counts[2]
        e, f, w, *_ = results(own, supercell(system, counts))
        close(e, n * energies)
        close(f, forces.repeat(1, n, 1))
        close(w, n * virials)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_unwrapped_coordinates_give_the_same(dtype, rtol):
    system, own = crystals(dtype), model(dtype)
    whole = torch.randint(-5, 6, (len(system.species), 3), generator=torch.Generator().manual_seed(2), device="cpu")
    owners = torch.repeat_interleave(torch.arange(len(system.offsets) - 1), system.offsets.diff())
    n = (here(whole) * system.periodic[owners]).double()
    moved = system.coordinates.double() + (n.unsqueeze(1) @ system.cells[owners])[:, 0]
    for a, b in zip(results(own, replace(system, coordinates=moved.to(dtype))), results(own, system), strict=True):
        close(a, b, rtol)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 5e-5)])
def test_given_pairs_are_found_ones(dtype, rtol):
    system, own = crystals(dtype), model(dtype)
    found = results(own, system)
    order = torch.Generator().manual_seed(3)
    for cutoff in (LONGEST, LONGEST + 1.5):
        for a, b in zip(results(own, with_pairs(system, cutoff, order)), found, strict=True):
            close(a, b, rtol)
    given = with_pairs(system, LONGEST + 0.5)
    close(ops.aev(given, SMALL.packed()), ops.aev(system, SMALL.packed()), rtol)
    molecules = replace(system, cells=None, periodic=None)
    assert with_pairs(molecules, LONGEST).shifts is None
    for a, b in zip(results(own, with_pairs(molecules, LONGEST)), results(own, molecules), strict=True):
        close(a, b, rtol)


def test_ghosts_with_given_pairs():
    """As LAMMPS has it: no cell, images are atoms of their own, and lists of centres only."""
    system, own = crystals(along=(1, 1, 1), sizes=(5,)), model()
    by_hand, _ = cluster(system, LONGEST)
    pairs = with_pairs(by_hand, LONGEST)
    ends = int(pairs.pair_starts[5])
    starts = pairs.pair_starts.clamp(max=ends)
    given = replace(pairs, pair_starts=starts, neighbours=pairs.neighbours[:ends])
    for a, b in zip(results(own, given), results(own, by_hand), strict=True):
        close(a, b)


def test_molecules_among_crystals_keep_their_bits():
    system, own = crystals(), model()
    first, last = int(system.offsets[3]), int(system.offsets[4])
    alone = System(system.coordinates[first:last], system.species[first:last], torch.tensor([0, last - first]))
    energies, forces, virials, *_ = results(own, system)
    e, f, w, *_ = results(own, alone)
    assert torch.equal(energies[:, 3], e[:, 0])
    assert torch.equal(forces[:, first:last], f)
    assert torch.equal(virials[:, 3], w[:, 0])
    without = ops.energy_forces(*list(arguments(own, system).values())[:-1])
    assert all(torch.equal(a, b) for a, b in zip(without, (energies, forces), strict=True))


@pytest.mark.parametrize("sizes", [(60, 3, 130), (700,)])
@pytest.mark.parametrize("levels", [1, 2])
def test_large_boxes_match_small_pieces(sizes, levels):
    """More atoms than a tile has: cut, and found by a grid of cells; pairs by ase, which are in another order."""
    system, own = crystals(sizes=sizes, along=(1, 0, 1)), model(levels=levels)
    side = [1.6 * (n ** (1 / 3) + 1) for n in sizes]
    cells = torch.stack([random_cells(1, s, s + 0.5, i)[0] for i, s in enumerate(side)])
    system = replace(system, cells=cells)
    found = results(own, system)
    for a, b in zip(results(own, with_pairs(system, LONGEST)), found, strict=True):
        close(a, b)
    x = system.coordinates.clone().requires_grad_()
    e = called(own.forward, replace(system, coordinates=x))
    close(found[0][-1], e.detach())
    close(found[1][-1], -torch.autograd.grad(e.sum(), x)[0])


def test_many_atoms_in_a_thin_box():
    """On GPUs each atom gathers what others have kept for it, of which several may be images of one."""
    system, own = crystals(sizes=(216,), along=(1, 1, 1)), model()
    places = torch.stack(torch.meshgrid(*[torch.arange(n).double() for n in (2, 2, 54)], indexing="ij"), -1)
    x = places.reshape(-1, 3) * 1.9 + 0.1 * normal(216, 3)
    system = replace(system, coordinates=x, cells=torch.diag(torch.tensor([3.8, 3.8, 102.6]).double())[None])
    found = results(own, system)
    for a, b in zip(results(own, with_pairs(system, LONGEST)), found, strict=True):
        close(a, b)
    x = x.clone().requires_grad_()
    e = called(own.forward, replace(system, coordinates=x))
    close(found[1][-1], -torch.autograd.grad(e.sum(), x)[0])


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_same_bits_for_any_threads(dtype):
    system, own = crystals(dtype, sizes=(7, 300, 1, 90)), model(dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            found.append(results(own, system))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("members", [2, 5])
def test_members_are_what_they_are_alone(members):
    own = [model() for _ in range(members)]
    for i, one in enumerate(own):
        with torch.no_grad():
            one.networks.weights += 0.01 * i * normal(one.networks.weights.numel(), seed=i)
    ensemble = Ensemble(own)
    for system in (crystals(), crystals(sizes=(70,)), cluster(crystals(sizes=(4,)), LONGEST)[0]):
        together = called(ensemble.member_level_results, system)
        for i, one in enumerate(own):
            for a, b in zip(together, called(one.level_results, system), strict=True):
                close(a[i], b.detach())
        mean = called(ensemble.energies_forces_virials, system)
        for a, b in zip(mean, together[:3], strict=True):
            close(a, b.mean(0)[-1])


# ---- Gradients of weights ------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2])
def test_gradcheck_of_weights_through_virials(levels):
    system, own = crystals(sizes=(3, 1, 4)), model(levels=levels)
    given = arguments(own, system, False)
    weights = given["parameters"].clone().requires_grad_()

    def function(w):
        return ops.energy_forces_virials(**{**given, "parameters": w})[:3]

    assert torch.autograd.gradcheck(function, weights)
    atomic = ops.energy_forces_virials(**{**given, "parameters": weights, "atomic": True})
    assert [t.requires_grad for t in atomic] == [True, True, True, False, False]


def test_the_gradient_op_takes_slopes_of_virials_or_none():
    system, own = crystals(), model()
    n, atoms = len(system.offsets) - 1, len(system.species)
    weights = own.networks.weights.detach()
    slopes = normal(1, n, seed=1), normal(1, atoms, 3, seed=2)
    behind = (system.tensors, weights, own.aev.packed, own.networks.packed, 0)
    of_virials = normal(1, n, 3, 3, seed=3)
    torch.library.opcheck(OPS.energy_forces_backward, (*slopes, *behind, of_virials))
    without = OPS.energy_forces_backward(*slopes, *behind)
    assert torch.equal(OPS.energy_forces_backward(*slopes, *behind, torch.zeros_like(of_virials)), without)
    assert not torch.equal(OPS.energy_forces_backward(*slopes, *behind, of_virials), without)
    with pytest.raises(RuntimeError, match=r"grad_virials must be a contiguous float64 tensor of shape \[1, 6, 3, 3\]"):
        OPS.energy_forces_backward(*slopes, *behind, of_virials[:, 1:])


# ---- Stresses in the loss ------------------------------------------------------------------------


ENERGY_WEIGHTS, FORCE_WEIGHTS = [1, 2, 0.5, 0, 1, 1], [0, 1, 0, 1, 2, 1]
STRESS_WEIGHTS = [2, 0, 1, 0, 0.5, 3]
"""The fourth structure is a molecule; the third has no atoms; the first has a stress and no forces."""


def step_arguments(own: EnergyModel, system: System, structures: list[int], forces: bool = True) -> dict[str, Any]:
    """Those of force_step with stresses in the loss; targets without weight are NaN, as are the results."""
    n, levels, batch = len(system.offsets) - 1, own.levels, torch.tensor(structures, dtype=torch.int64)
    options = {"dtype": torch.float64}
    weights = [torch.tensor([w] * levels, **options) for w in (ENERGY_WEIGHTS, FORCE_WEIGHTS, STRESS_WEIGHTS)]
    if not forces:
        weights[1] = torch.zeros_like(weights[1])
    stresses, targets = 0.05 * normal(levels, n, 3, 3, seed=1), normal(levels, len(system.species), 3, seed=4)
    stresses[weights[2] == 0] = torch.nan
    for s in torch.nonzero(weights[1][0] == 0)[:, 0].tolist():
        targets[:, system.offsets[s] : system.offsets[s + 1]] = torch.nan
    counts = ops.count_weights(ops.weighted(*weights), batch, max(1, len(batch)))
    flat = own.networks.weights.detach()
    loss = ops.Loss(
        normal(levels, n, seed=5),
        weights[0],
        targets if forces else None,
        weights[1] if forces else None,
        torch.tensor([0.3, 0.7, 11.0], **options),
        counts[0] if len(batch) else torch.ones(3, levels, **options),
        stresses,
        weights[2],
    )
    shapes = (3,), (levels, len(batch)), (levels, len(batch), 6)
    losses, residuals, errors = (torch.full(shape, torch.nan, **options) for shape in shapes)
    return {
        "system": system,
        "structures": batch,
        "parameters": flat,
        "loss": loss,
        "results": ops.StepResults(losses, torch.full_like(flat, torch.nan), residuals, errors),
        "model": ops.Model(own.aev.packed, own.networks.packed),
    }


def by_autograd(given: dict[str, Any]) -> list[torch.Tensor]:
    """Losses, gradient, residuals and errors from `ops.energy_forces_virials`."""
    system, loss, batch = given["system"], given["loss"], given["structures"].tolist()
    flat = given["parameters"].clone().requires_grad_()
    energies, forces, virials, *_ = ops.energy_forces_virials(system, flat, None, given["model"])
    levels = len(energies)
    terms, errors = [energies.new_zeros(()) for _ in range(3)], energies.new_zeros(levels, len(batch), 6)
    residuals = (energies - loss.energies)[:, batch].detach()
    for k in range(levels):
        for i, s in enumerate(batch):
            atoms = slice(int(system.offsets[s]), int(system.offsets[s + 1]))
            if loss.energy_weights[k, s]:
                of_energy = (energies[k, s] - loss.energies[k, s]).square()
                terms[0] = terms[0] + loss.energy_weights[k, s] * of_energy / loss.counts[0, k]
            kinds = [
                (1, loss.forces, loss.force_weights, lambda k=k, a=atoms: forces[k, a].double() - loss.forces[k, a])
            ]
            volume = torch.linalg.det(system.cells[s]).abs()
            kinds.append(
                (
                    2,
                    loss.stresses,
                    loss.stress_weights,
                    lambda k=k, s=s, v=volume: virials[k, s] / v - loss.stresses[k, s],
                )
            )
            for place, targets, weights, difference in kinds:
                if targets is None or weights[k, s] == 0 or atoms.start == atoms.stop:
                    continue
                d = difference()
                terms[place] = terms[place] + weights[k, s] * d.square().mean() / loss.counts[place, k]
                size = d.detach().abs()
                errors[k, i, 3 * place - 3 : 3 * place] = torch.stack([size.sum(), size.square().sum(), size.max()])
    losses = torch.stack(terms)
    (gradient,) = torch.autograd.grad((loss.scales * losses).sum() + 0 * flat.sum(), flat)
    return [losses.detach(), gradient, residuals, errors.detach()]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("structures", [[0, 1, 2, 3, 4, 5], [4, 0, 0, 2, 4, 3, 4, 2], [1, 3], [2], []])
def test_a_step_with_stresses_matches_autograd(structures, levels, dtype, rtol):
    own = model(dtype, levels)
    for forces in (True, False):
        given = step_arguments(own, crystals(dtype), structures, forces)
        ops.force_step(**given)
        for a, b in zip(given["results"].tensors, by_autograd(given), strict=True):
            close(a, b, rtol)


@pytest.mark.parametrize("n_ranks", [1, 2, 5])
def test_shares_of_a_step_with_stresses_have_its_bits(n_ranks):
    own = model()
    given = step_arguments(own, crystals(), [4, 0, 5, 2, 4, 3, 1, 2])
    ops.force_step(**given)
    expected = [t.clone() for t in given["results"].tensors]
    some = {name: given[name] for name in ("system", "structures", "parameters", "loss")}
    size = ops.message_bytes(given["system"], given["structures"], given["loss"], given["parameters"], n_ranks)
    room = torch.zeros(n_ranks * size // 8 + 8, dtype=torch.float64).view(torch.uint8)
    start = -room.data_ptr() % 64
    messages = room[start : start + n_ranks * size].view(n_ranks, size)
    for rank in range(n_ranks):
        ops.force_step_share(**some, message=messages[rank], model=given["model"], rank=rank, n_ranks=n_ranks)
    for t in given["results"].tensors:
        t.fill_(torch.nan)
    ops.force_step_join(given["system"], given["structures"], given["loss"], messages, given["results"])
    for a, b in zip(given["results"].tensors, expected, strict=True):
        assert torch.equal(a, b)


def test_losses_of_stresses_that_cannot_be():
    own, system = model(), crystals()
    given = step_arguments(own, system, [0, 3])

    def step(**changes):
        values = {**given, **changes}
        ops.force_step(**values)

    with pytest.raises(
        RuntimeError, match=r"stress_targets must be a contiguous float64 tensor of shape \[1, 6, 3, 3\]"
    ):
        step(loss=replace(given["loss"], stresses=given["loss"].stresses[:, :-1]))
    with pytest.raises(RuntimeError, match=r"scales must be a contiguous float64 tensor of shape \[3\]"):
        step(loss=replace(given["loss"], scales=given["loss"].scales[:2]))
    with pytest.raises(RuntimeError, match="a loss of stresses needs the cells of the system"):
        step(system=replace(system, cells=None, periodic=None))


@ON_CPU
def test_the_stress_of_a_molecule_is_refused():
    given = step_arguments(model(), crystals(), [0, 3])
    weights = torch.ones_like(given["loss"].stress_weights)
    with pytest.raises(RuntimeError, match="structure 3 has a weight in the loss of stresses, but is not periodic"):
        ops.force_step(**{**given, "loss": replace(given["loss"], stress_weights=weights)})


# ---- Layouts, modes ------------------------------------------------------------------------------


def every_op(system: System) -> dict[str, tuple[Any, tuple]]:
    own = model()
    g, v = normal(len(system.species), SMALL.length), normal(len(system.species), 3, seed=1)
    packed = SMALL.packed()
    return {
        "aev": (OPS.aev, (system.tensors, packed)),
        "aev_vjp": (OPS.aev_vjp, (system.tensors, g, packed)),
        "aev_virials": (OPS.aev_virials, (system.tensors, g, packed)),
        "aev_jvp": (OPS.aev_jvp, (system.tensors, v, packed)),
        "aev_hvp": (OPS.aev_hvp, (system.tensors, g, v, packed)),
        "energy_forces_virials": (OPS.energy_forces_virials, raw(arguments(own, system))),
    }


@pytest.mark.parametrize("kind", ["found", "given", "ghosts"])
@pytest.mark.parametrize("name", ["aev", "aev_vjp", "aev_virials", "aev_jvp", "aev_hvp", "energy_forces_virials"])
def test_opcheck(name, kind):
    system = {
        "found": crystals,
        "given": lambda: with_pairs(crystals(), LONGEST),
        "ghosts": lambda: cluster(crystals(sizes=(2,)), LONGEST)[0],
    }[kind]()
    op, values = every_op(system)[name]
    torch.library.opcheck(op, values)


def test_other_layouts_in_memory():
    system = with_pairs(crystals(), LONGEST)
    own = model()
    expected = results(own, system)
    strided = System(*[None if t is None else not_contiguous(t) for t in system.tensors])
    strided = replace(strided, cells=system.cells)  # float64 numbers of the ops are contiguous
    for a, b in zip(results(own, strided), expected, strict=True):
        assert torch.equal(a, b)


def test_scripted_and_exported(tmp_path):
    system, own = crystals(), model()
    expected = called(own.energies_forces_virials, system)
    torch.jit.save(torch.jit.script(own), tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    for a, b in zip(called(loaded.energies_forces_virials, system), expected, strict=True):
        assert torch.equal(a, b)
    values = (system.coordinates, system.species, system.offsets, around(system))
    exported = torch.export.export(own, values).module()
    close(exported(*values), expected[0])


def test_empty():
    own = model()
    none = System(
        torch.zeros(0, 3, dtype=torch.float64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        cells=torch.zeros(0, 3, 3, dtype=torch.float64),
        periodic=torch.zeros(0, 3, dtype=torch.int64),
    )
    assert [tuple(t.shape) for t in results(own, none)] == [(1, 0), (1, 0, 3), (1, 0, 3, 3), (1, 0), (1, 0, 3, 3)]
    system = replace(crystals(), centres=torch.zeros(6, dtype=torch.int64))
    assert not any(t.any() for t in results(own, system))
    assert not ops.aev(system, SMALL.packed()).any()


# ---- Wrong arguments -----------------------------------------------------------------------------


def _set(place: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[place] = value
        return t

    return change


WRONG = [
    ("cells", lambda t: t[:-1], r"cells must be a contiguous float64 tensor of shape \[6, 3, 3\], got .*\[5, 3, 3\]"),
    ("cells", lambda t: t.float(), "cells must be a contiguous float64 tensor"),
    ("cells", lambda t: None, "periodic needs the cells beside it"),
    ("periodic", lambda t: None, "cells need periodic beside them, which says along which"),
    ("periodic", lambda t: t.double(), r"periodic must be an int64 tensor of shape \[6, 3\]"),
    ("centres", lambda t: torch.zeros(5, dtype=torch.int64), r"centres must be an int64 tensor of shape \[6\]"),
    ("neighbours", lambda t: None, "given pairs are pair_starts and neighbours, got only pair_starts"),
    ("pair_starts", lambda t: t[:-1], r"pair_starts must be an int64 tensor of shape \[20\]"),
    ("shifts", lambda t: t[:, :2], r"shifts must be an int64 tensor of shape \[\d+, 3\]"),
]
WRONG_VALUES = [
    ("cells", lambda t: t * 0, "the cell of structure 0 has no volume: its periodic vectors are zero or lie in a line"),
    ("cells", _set((0, 1), 0.0), "the cell of structure 0 has no volume"),
    ("cells", lambda t: t[:, [1, 0, 2]].contiguous(), r"structure 0 is left-handed \(its volume is -.*\): swap two"),
    ("cells", _set((0, 0, 0), torch.nan), "the cell of structure 0 has a number that is not finite"),
    ("cells", lambda t: t * 1e-3, "the cell of structure 0 is only .* angstrom high along vector 0, less than 0.1"),
    ("centres", lambda t: torch.tensor([5, 1, 0, 9, 3, 2]), r"centres\[3\] = 9 is not in \[0, 8\]"),
    ("pair_starts", _set((3,), 0), r"pair_starts\[3\] = 0, but they must not decrease"),
    ("pair_starts", _set((19,), 10**6), r"pair_starts\[19\] = 1000000, .* lie within the \d+ neighbours"),
    ("neighbours", _set((2,), 7), r"neighbours\[2\] = 7 is not an atom of structure 0, whose are 0 to 4"),
    ("shifts", lambda t: t * 0, r"pair \d+ is of atom 0 with itself, in the same cell"),
    (
        "periodic",
        lambda t: torch.tensor([0, 1, 1]).repeat(6, 1),
        r"shifts\[\d+\] is along vector 0, but structure 0 is",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
def test_wrong_arguments(name, change, message):
    given = arguments(model(), with_pairs(crystals(), LONGEST))
    with pytest.raises(RuntimeError, match=f"^kinml_fast: .*{message}"):
        OPS.energy_forces_virials(*raw(changed(given, name, change)))


@ON_CPU
@pytest.mark.parametrize(("name", "change", "message"), WRONG_VALUES)
def test_wrong_values(name, change, message):
    given = arguments(model(), with_pairs(crystals(), LONGEST))
    with pytest.raises(RuntimeError, match=f"^kinml_fast: .*{message}"):
        OPS.energy_forces_virials(*raw(changed(given, name, change)))


def test_what_stored_descriptors_do_not_have():
    system, own = crystals(), model()
    stored = System(None, system.species, system.offsets, features=ops.aev(system, SMALL.packed()))
    with pytest.raises(RuntimeError, match="virials need coordinates, got stored descriptors"):
        results(own, stored)
    with pytest.raises(RuntimeError, match="stored descriptors have no cells"):
        results(own, replace(stored, cells=system.cells, periodic=system.periodic))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nan_spoils_its_own_structure_only(dtype):
    system, own = crystals(dtype), model(dtype)
    expected = results(own, system)
    spoiled = replace(system, coordinates=_set((2, 1), torch.nan)(system.coordinates))
    found = results(own, spoiled)
    assert found[0][0, 0].isnan()
    assert torch.equal(found[0][:, 1:], expected[0][:, 1:])
    assert torch.equal(found[1][:, 5:], expected[1][:, 5:])
