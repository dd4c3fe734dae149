"""float32 far from the origin: a molecule feels nothing of where it is, in whatever way a model is asked."""

from __future__ import annotations

from collections.abc import Callable

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from kinml_fast import KinMLCalculator
from kinml_fast.data import Structures, concatenate, stored
from kinml_fast.deploy import plain
from kinml_fast.deploy.evaluate import evaluate
from kinml_fast.nn import AEVParameters, EnergyModel

ELEMENTS = ("C", "H", "O")
PLACES = [np.array([0.372, -0.189, 0.246]) * far for far in (1.0, 40.0, 1000.0)]


@pytest.fixture(scope="module")
def model() -> EnergyModel:
    torch.manual_seed(0)
    return EnergyModel(AEVParameters.aevmod(ELEMENTS, n_radial=8, n_angular=4, n_sections=4), dtype=torch.float32)


def ethanol() -> ase.Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return atoms


def diamond() -> ase.Atoms:
    atoms = bulk("C", cubic=True)
    atoms.rattle(0.05, seed=1)
    return atoms


def structures(*systems: ase.Atoms) -> Structures:
    parts = [Structures.of_one_formula(list(one.symbols), one.positions[None], None) for one in systems]
    return concatenate(parts, ELEMENTS)


def compare(forces: Callable[[ase.Atoms], np.ndarray], atoms: ase.Atoms) -> None:
    """Forces stay the same to the digits of float32 when the atoms are moved together."""
    before = forces(atoms)
    assert abs(before).max() > 1e-3
    for place in PLACES:
        moved = atoms.copy()
        moved.translate(place)
        assert abs(forces(moved) - before).max() < 5e-6 * abs(before).max()


@pytest.mark.parametrize("make", [ethanol, diamond])
def test_the_calculator(model, make):
    calculator = KinMLCalculator(model)

    def forces(atoms: ase.Atoms) -> np.ndarray:
        return calculator.get_property("forces", atoms)

    compare(forces, make())


def test_many_structures_at_once(model):
    def forces(atoms: ase.Atoms) -> np.ndarray:
        # Each has an origin of its own: one for all would not do.
        found = evaluate(model, structures(ethanol(), atoms, molecule("H2O")), forces=True).forces
        return found[len(ethanol()) : -3]

    compare(forces, ethanol())


def test_stored_descriptors_and_their_jacobians(model):
    def jacobian(atoms: ase.Atoms) -> np.ndarray:
        return stored.compute(structures(atoms), model.descriptor, torch.float32, jacobian=True).jacobian.numpy()

    compare(jacobian, ethanol())


@pytest.mark.parametrize("make", [ethanol, diamond])
def test_the_core_without_torch(model, tmp_path, make):
    plain.save(tmp_path / "model.kinml", model)
    potential = plain.PlainPotential(tmp_path / "model.kinml")

    def forces(atoms: ase.Atoms) -> np.ndarray:
        species = np.array([ELEMENTS.index(symbol) for symbol in atoms.symbols])
        return potential(atoms.positions, species, np.array(atoms.cell), atoms.pbc)["forces"][0]

    compare(forces, make())


def test_torchsim(model):
    pytest.importorskip("torch_sim", reason="pip install torch-sim-atomistic")
    from torch_sim.io import atoms_to_state

    from kinml_fast.deploy.torchsim_model import TorchSimModel

    wrapped = TorchSimModel(model)

    def forces(atoms: ase.Atoms) -> np.ndarray:
        state = atoms_to_state([ethanol(), atoms], torch.device("cpu"), torch.float64)
        return wrapped(state)["forces"][len(ethanol()) :].numpy()

    compare(forces, ethanol())


def test_float64_is_left_as_it_is():
    found = structures(ethanol(), molecule("H2O"))
    assert torch.equal(found.coordinates_in(torch.float64), torch.from_numpy(found.coordinates))
    near = found.coordinates_in(torch.float32)
    assert near.dtype == torch.float32
    assert near[0].abs().max() == near[len(ethanol())].abs().max() == 0
