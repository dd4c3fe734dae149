"""TorchSim with our models, by TorchSim itself: pip install torch-sim-atomistic"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.testing import assert_allclose

from kinml_fast import KinMLCalculator
from kinml_fast.deploy import model_file
from kinml_fast.errors import DataError, ModelError
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble

ts = pytest.importorskip("torch_sim", reason="pip install torch-sim-atomistic")

CPU = torch.device("cpu")


def model(seed: int = 0, elements=("C", "H"), **options) -> EnergyModel:
    torch.manual_seed(seed)
    made = EnergyModel(AEVParameters.aevmod(elements, 8, 4, 4), dtype=options.pop("dtype", torch.float64), **options)
    made.sae.copy_(torch.tensor([-1030.5, -13.6]))
    return made


def molecules() -> list[Atoms]:
    rng = np.random.default_rng(0)
    ring = np.array([[1.4 * np.cos(a), 1.4 * np.sin(a), 0.0] for a in 2 * np.pi * np.arange(6) / 6])
    places = np.concatenate([ring, 1.77 * ring])
    return [
        Atoms("C6H6", places + 0.05 * rng.normal(size=(12, 3)), cell=[20, 20, 20]),
        Atoms("CH4", np.vstack([np.zeros(3), 0.63 * np.array([[1, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]])])),
        Atoms("H2", [[0, 0, 0], [0, 0, 0.8]], cell=[9, 9, 9]),
    ]


def crystals() -> list[Atoms]:
    """In cells shorter than the cutoff."""
    first, second, _ = molecules()
    first.set_cell([[6.1, 0, 0], [0.7, 6.5, 0], [-0.4, 0.9, 5.0]])
    second.set_cell([[4.0, 0, 0], [0.2, 4.2, 0], [0.1, 0.3, 4.4]])
    for atoms in (first, second):
        atoms.pbc = True
    return [first, second]


def in_torchsim(source, dtype=torch.float64):
    from kinml_fast.deploy.torchsim_model import TorchSimModel

    return TorchSimModel(source, "cpu"), lambda systems: ts.io.atoms_to_state(systems, CPU, dtype)


def test_torchsims_own_validation():
    from torch_sim.models.interface import validate_model_outputs

    made, _ = in_torchsim(model(elements=("Si", "Fe")))
    validate_model_outputs(made, CPU, torch.float64)


@pytest.mark.parametrize("systems", [molecules, crystals])
@pytest.mark.parametrize("which", ["one", "ensemble", "float32"])
def test_the_numbers_are_those_of_ase(tmp_path, systems, which):
    made = {
        "one": lambda: model(),
        "ensemble": lambda: Ensemble([model(1), model(2)]),
        "float32": lambda: model(dtype=torch.float32),
    }[which]()
    model_file.save(tmp_path / "model.pt", made)
    calculator = KinMLCalculator(tmp_path / "model.pt")
    ours, state_of = in_torchsim(tmp_path / "model.pt", made.dtype)
    found = ours(state_of(systems()))
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if made.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    first = 0
    for i, atoms in enumerate(systems()):
        n = len(atoms)
        assert_allclose(float(found["energy"][i]), calculator.get_potential_energy(atoms), **tolerance)
        assert_allclose(found["forces"][first : first + n].numpy(), calculator.get_forces(atoms), **tolerance)
        expected = voigt_6_to_full_3x3_stress(calculator.get_stress(atoms)) if atoms.pbc.any() else np.zeros((3, 3))
        assert_allclose(found["stress"][i].numpy(), expected, **tolerance)
        first += n


def test_dynamics_of_a_batch_is_that_of_each_molecule():
    ours, state_of = in_torchsim(model())
    systems = molecules()
    state = state_of(systems)
    timestep, steps = 0.0005, 20
    system = ts.integrate(
        state, ours, integrator=ts.integrators.nve, n_steps=steps, temperature=1e-12, timestep=timestep
    )
    for i, atoms in enumerate(systems):
        atoms.calc = KinMLCalculator(model())
        atoms.set_velocities(np.zeros((len(atoms), 3)))
        VelocityVerlet(atoms, timestep * 1000 * units.fs).run(steps)
        assert_allclose(system.positions[system.system_idx == i].numpy(), atoms.positions, rtol=0, atol=1e-7)
    moved = max(abs(atoms.positions - start.positions).max() for atoms, start in zip(systems, molecules(), strict=True))
    assert moved > 1e-3


def test_mistakes():
    ours, state_of = in_torchsim(model())
    with pytest.raises(DataError, match="the state contains O, but the model knows only C H"):
        ours(state_of([Atoms("CO", [[0, 0, 0], [0, 0, 1.1]])]))
    with pytest.raises(ModelError, match=r"differences from fidelity 0 \(delta learning\)"):
        in_torchsim(model(baseline=0))
