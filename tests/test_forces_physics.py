"""What must hold for the forces of any model: they are the slope of the energy, do not move or turn a molecule as a
whole, and go with it when it is moved, turned or its atoms are numbered differently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_helpers import ANI_2X, Ragged, normal

from kinml_fast.nn import AEVParameters, EnergyModel

DESCRIPTORS = {
    "aevmod": AEVParameters.aevmod(("C", "H")),
    "four elements": AEVParameters.aevmod(("H", "C", "N", "O"), 8, 4, 5),
    "ANI-2x": ANI_2X,
    "angular cutoff is longer": AEVParameters.aevmod(("C", "H"), 6, 5, 9, cutoffs=(3.0, 4.6)),
}
ACTIVATIONS = {"aevmod": "gaussian", "four elements": "silu", "ANI-2x": "gelu", "angular cutoff is longer": "tanh"}


def model(name: str) -> EnergyModel:
    """Networks with weights that give forces of about an eV/Å; no single-atom energies, which hide digits."""
    torch.manual_seed(5)
    activation = ACTIVATIONS[name]
    result = EnergyModel(DESCRIPTORS[name], (24, 12, 1), (activation, activation, "identity"))
    with torch.no_grad():
        result.networks.weights.mul_(4)
    return result


MODELS = {name: model(name) for name in DESCRIPTORS}
EVERY_MODEL = pytest.mark.parametrize("name", DESCRIPTORS)


def molecule(name: str, n_atoms: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Atoms at random, at least 0.8 Å apart and at a molecule's density.

    No distance is within 0.001 Å of a cutoff, where energies have no second derivative and differences lose digits.
    """
    rng = np.random.default_rng(seed)
    descriptor = DESCRIPTORS[name]
    cutoffs = np.array([[descriptor.radial_cutoff], [descriptor.angular_cutoff]])
    edge = 1.0 + 2.0 * n_atoms ** (1 / 3)
    atoms = np.zeros((0, 3))
    while len(atoms) < n_atoms:
        atom = rng.uniform(0, edge, 3)
        distances = np.linalg.norm(atoms - atom, axis=1)
        if (distances > 0.8).all() and (np.abs(distances - cutoffs) > 0.001).all():
            atoms = np.vstack([atoms, atom])
    return torch.tensor(atoms), torch.tensor(rng.integers(0, len(descriptor.elements), n_atoms))


def batch_of(name: str, sizes: list[int], seed: int) -> Ragged:
    parts = [molecule(name, n, seed + i) for i, n in enumerate(sizes)]
    offsets = torch.tensor([0, *np.cumsum(sizes)])
    return torch.cat([x for x, _ in parts]), torch.cat([z for _, z in parts]), offsets


def evaluate(name: str, batch: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        return MODELS[name].energies_and_forces(*batch)


def rotation(seed: int) -> torch.Tensor:
    """A rotation, without reflection."""
    q = torch.linalg.qr(normal(3, 3, seed=seed))[0]
    return q * torch.linalg.det(q)


def turned_by(axis: int) -> torch.Tensor:
    """A quarter turn, for which rounding is no excuse."""
    one, other = [d for d in range(3) if d != axis]
    result = torch.zeros(3, 3, dtype=torch.float64)
    result[axis, axis] = result[one, other] = 1
    result[other, one] = -1
    return result


batches = {
    "sizes": st.lists(st.integers(1, 20), min_size=1, max_size=4),
    "seed": st.integers(0, 10**6),
}
examples = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@EVERY_MODEL
@examples
@given(**batches)
def test_forces_are_the_slope_of_the_energy(name, sizes, seed):
    """Differences of fourth order along random directions of all molecules."""
    x, z, o = batch_of(name, sizes, seed)
    energies, forces = evaluate(name, (x, z, o))
    assert forces.abs().max() < 100  # so that 1e-7 is no small tolerance
    step = 2e-4
    for i in range(3):
        direction = normal(*x.shape, seed=seed + i)
        direction /= direction.norm()
        slope = sum(
            weight * evaluate(name, (x + steps * step * direction, z, o))[0]
            for steps, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1))
        ) / (12 * step)
        along = torch.stack([part.sum() for part in (forces * direction).split(o.diff().tolist())])
        torch.testing.assert_close(along, -slope, rtol=0, atol=1e-7)
    assert energies.isfinite().all()


@EVERY_MODEL
def test_every_component_is_the_slope_of_the_energy(name):
    """All displaced molecules in one batch."""
    x, z = molecule(name, 9, 1)
    _, forces = evaluate(name, (x, z, torch.tensor([0, 9])))
    assert forces.abs().max() > 0.1
    step, n = 2e-4, 27
    places = [x + steps * step * unit for steps in (-2, -1, 1, 2) for unit in torch.eye(n).double().reshape(n, 9, 3)]
    energies = evaluate(name, (torch.cat(places), z.repeat(4 * n), torch.arange(4 * n + 1) * 9))[0].reshape(4, n)
    weights = torch.tensor([1, -8, 8, -1], dtype=torch.float64)
    torch.testing.assert_close(forces.reshape(n), -(weights @ energies) / (12 * step), rtol=0, atol=1e-7)


@EVERY_MODEL
@examples
@given(**batches)
def test_no_molecule_moves_or_turns_itself(name, sizes, seed):
    x, z, o = batch_of(name, sizes, seed)
    _, forces = evaluate(name, (x, z, o))
    for a, b in zip(o[:-1].tolist(), o[1:].tolist(), strict=True):
        assert forces[a:b].sum(0).abs().max() < 1e-10
        assert torch.linalg.cross(x[a:b], forces[a:b]).sum(0).abs().max() < 1e-10


@EVERY_MODEL
@examples
@given(**batches)
def test_translation_rotation_and_reflection(name, sizes, seed):
    x, z, o = batch_of(name, sizes, seed)
    energies, forces = evaluate(name, (x, z, o))
    owners = torch.repeat_interleave(torch.arange(len(sizes)), o.diff())
    shift = 5 * normal(len(sizes), 3, seed=seed)[owners]
    for matrix in (torch.eye(3).double(), rotation(seed), turned_by(seed % 3), -torch.eye(3).double()):
        moved = evaluate(name, (x @ matrix.T + shift, z, o))
        torch.testing.assert_close(moved[0], energies, rtol=0, atol=1e-10)
        torch.testing.assert_close(moved[1], forces @ matrix.T, rtol=0, atol=1e-10)


@EVERY_MODEL
@examples
@given(**batches)
def test_numbering_of_atoms_does_not_matter(name, sizes, seed):
    """Neither that of like atoms, which leaves all arguments but the coordinates as they are, nor any other."""
    x, z, o = batch_of(name, sizes, seed)
    energies, forces = evaluate(name, (x, z, o))
    generator = torch.Generator().manual_seed(seed)
    anywhere, alike = torch.arange(len(z)), torch.arange(len(z))
    for a, b in zip(o[:-1].tolist(), o[1:].tolist(), strict=True):
        anywhere[a:b] = a + torch.randperm(b - a, generator=generator)
        for kind in z[a:b].unique():
            mine = a + torch.nonzero(z[a:b] == kind)[:, 0]
            alike[mine] = mine[torch.randperm(len(mine), generator=generator)]
    assert torch.equal(z[alike], z)
    for order in (alike, anywhere):
        again = evaluate(name, (x[order], z[order], o))
        torch.testing.assert_close(again[0], energies, rtol=0, atol=1e-10)
        torch.testing.assert_close(again[1], forces[order], rtol=0, atol=1e-10)


@EVERY_MODEL
def test_molecules_do_not_feel_one_another(name):
    x, z, o = batch_of(name, [7, 1, 12, 4], 3)
    energies, forces = evaluate(name, (x, z, o))
    for s, (a, b) in enumerate(zip(o[:-1].tolist(), o[1:].tolist(), strict=True)):
        own = evaluate(name, (x[a:b], z[a:b], torch.tensor([0, b - a])))
        torch.testing.assert_close(own[0], energies[s : s + 1], rtol=0, atol=1e-12)
        torch.testing.assert_close(own[1], forces[a:b], rtol=0, atol=1e-12)
    # Nor does half of a molecule the other half beyond both cutoffs.
    far = torch.cat([x[:7], x[8:20] + 30])
    together = evaluate(name, (far, torch.cat([z[:7], z[8:20]]), torch.tensor([0, 19])))
    torch.testing.assert_close(together[0][0], energies[0] + energies[2], rtol=0, atol=1e-10)
    torch.testing.assert_close(together[1], torch.cat([forces[:7], forces[8:20]]), rtol=0, atol=1e-10)


@EVERY_MODEL
@pytest.mark.parametrize("which", ["radial_cutoff", "angular_cutoff"])
def test_forces_do_not_jump_at_a_cutoff(name, which):
    cutoff = getattr(DESCRIPTORS[name], which)
    start = torch.tensor([[0.0, 0, 0], [1.1, 0.2, 0], [0, 0, 0]], dtype=torch.float64)
    distances = cutoff + torch.tensor([-1e-7, -1e-12, 0, 1e-12, 1e-7], dtype=torch.float64)
    places = start.repeat(5, 1, 1)
    places[:, 2, 2] = distances
    energies, forces = evaluate(name, (places.reshape(-1, 3), torch.tensor([0, 1, 1] * 5), 3 * torch.arange(6)))
    forces = forces.reshape(5, 3, 3)
    slope = forces[2, 2, 2] * (distances - cutoff)
    assert (energies - energies[2] + slope).abs().max() < 1e-11
    assert (forces - forces[2]).abs().max() < 1e-5
