"""The ASE calculator: numbers, physics, what ASE does with it, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.calculator import (
    Calculator,
    CalculatorSetupError,
    PropertyNotImplementedError,
    all_changes,
)
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import Trajectory
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.vibrations import Vibrations

import kinml_fast
from kinml_fast import KinMLCalculator
from kinml_fast.deploy import low_level, model_file
from kinml_fast.errors import InputError
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble

WATER = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]])


def make_model(seed: int = 0, elements=("H", "O"), dtype=torch.float64, **settings) -> EnergyModel:
    torch.manual_seed(seed)
    descriptor = AEVParameters.aevmod(elements, n_radial=8, n_angular=4, n_sections=4)
    model = EnergyModel(descriptor, [8, 4, 1], ["gaussian", "tanh", "identity"], dtype=dtype, **settings)
    model.sae.copy_(torch.arange(len(elements), dtype=torch.float64) - 20 + seed)
    return model


def water(stretch: float = 1.0) -> Atoms:
    return Atoms("OH2", WATER * stretch)


def by_model(model: EnergyModel, atoms: Atoms) -> tuple[float, np.ndarray]:
    """Energy and forces as a program without ASE would get them."""
    coordinates = torch.tensor(atoms.positions, dtype=model.dtype, requires_grad=True)
    species = torch.tensor([model.elements.index(symbol) for symbol in atoms.symbols])
    energy = model(coordinates, species, torch.tensor([0, len(atoms)]))
    return energy.item(), -torch.autograd.grad(energy.sum(), coordinates)[0].numpy()


class Spring(Calculator):
    """A low level: springs to the origin; its energy depends on the initial charges too."""

    implemented_properties = ("energy", "forces")
    calls = 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.calls += 1
        x = atoms.positions
        self.results = {"energy": 0.5 * (x**2).sum() + atoms.get_initial_charges().sum(), "forces": -x}


# Numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_energy_and_forces_are_those_of_the_model(dtype):
    model = make_model(dtype=dtype)
    atoms = water()
    atoms.calc = KinMLCalculator(model)
    energy, forces = by_model(model, atoms)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5
    assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-14)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    np.testing.assert_allclose(atoms.get_forces(), forces, rtol=10 * tolerance, atol=tolerance)
    assert atoms.get_forces().dtype == np.float64
    assert type(atoms.calc.results["energy"]) is float
    assert set(atoms.calc.results) == {"energy", "free_energy", "forces"} < set(atoms.calc.implemented_properties)


def test_forces_are_differences_of_energies():
    model = make_model()
    model.sae.zero_()
    atoms = water(1.1)
    atoms.calc = KinMLCalculator([model, make_model(1)])
    np.testing.assert_allclose(calculate_numerical_forces(atoms, eps=1e-4), atoms.get_forces(), rtol=0, atol=1e-6)


def test_ensembles_give_means_and_deviations():
    models = [make_model(seed) for seed in range(3)]
    atoms = water()
    atoms.calc = KinMLCalculator(models)
    energies, forces = (np.array(both) for both in zip(*(by_model(model, atoms) for model in models), strict=True))
    expected = {
        "energy": energies.mean(),
        "free_energy": energies.mean(),
        "forces": forces.mean(axis=0),
        "energy_std": energies.std(ddof=1),
        "forces_std": forces.std(axis=0, ddof=1),
        "all_energies": energies,
        "all_forces": forces,
    }
    assert set(atoms.calc.implemented_properties) == {*expected, "energies", "stress", "stresses"}
    for name, value in expected.items():
        found = atoms.calc.get_property(name, atoms)
        assert np.shape(found) == np.shape(value)
        np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-11)
    assert set(atoms.calc.results) == set(expected)


@pytest.mark.parametrize("name", ["frozen.xyz", "frozen.traj"])
def test_a_frozen_ensemble_keeps_what_ase_can_keep(tmp_path, name):
    atoms = water()
    atoms.calc = KinMLCalculator([make_model(seed) for seed in range(3)])
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    results = atoms.calc.results
    assert results["energy_std"] > 0
    for same in (results.copy(), copy.deepcopy(results), pickle.loads(pickle.dumps(results)), dict(results.items())):
        assert set(same) == set(results) > set(results.keys())
    atoms.calc = SinglePointCalculator(atoms, **atoms.calc.results)
    ase.io.write(tmp_path / name, atoms)
    read = ase.io.read(tmp_path / name)
    assert read.get_potential_energy() == pytest.approx(energy, abs=1e-7)
    np.testing.assert_allclose(read.get_forces(), forces, atol=1e-7)
    assert "energy_std" not in read.calc.results


@pytest.mark.parametrize("n_members", [1, 3])
def test_several_levels(n_members):
    models = [make_model(seed, fidelities=(0, 1)) for seed in range(n_members)]
    atoms = water()
    atoms.calc = KinMLCalculator(models)
    inputs = torch.tensor(atoms.positions), torch.tensor([1, 0, 0]), torch.tensor([0, 3])
    with torch.no_grad():
        both = [model.level_energies_and_forces(*inputs) for model in models]
    energies, forces = (np.stack([np.asarray(x) for x in values]) for values in zip(*both, strict=True))
    energies = energies[..., 0]
    expected = {
        "energy": energies.mean(axis=0)[1],
        "free_energy": energies.mean(axis=0)[1],
        "forces": forces.mean(axis=0)[1],
        "level_energies": energies.mean(axis=0),
        "level_forces": forces.mean(axis=0),
    }
    if n_members > 1:
        expected |= {"energy_std": energies[:, 1].std(ddof=1), "forces_std": forces[:, 1].std(axis=0, ddof=1)}
        expected |= {"all_energies": energies[:, 1], "all_forces": forces[:, 1]}
    assert set(atoms.calc.implemented_properties) == {*expected, "energies", "stress", "stresses"}
    for name, value in expected.items():
        found = atoms.calc.get_property(name, atoms)
        assert np.shape(found) == np.shape(value)
        np.testing.assert_allclose(found, value, rtol=1e-12, atol=1e-12, err_msg=name)
    # The forces of the highest level contain the way by which the lower one takes part in it.
    np.testing.assert_allclose(calculate_numerical_forces(atoms, eps=1e-4), atoms.get_forces(), rtol=0, atol=1e-6)


def test_means_are_those_of_the_module():
    ensemble = Ensemble([make_model(seed) for seed in range(9)])
    atoms = water()
    atoms.calc = KinMLCalculator(ensemble)
    inputs = torch.tensor(atoms.positions), torch.tensor([1, 0, 0]), torch.tensor([0, 3])
    energies, forces = ensemble.energies_and_forces(*inputs)
    assert atoms.get_potential_energy() == energies.item()
    np.testing.assert_array_equal(atoms.get_forces(), forces.detach())


def test_one_model_in_a_list_has_no_spread():
    atoms = water()
    for given in ([make_model()], Ensemble([make_model()])):
        atoms.calc = KinMLCalculator(given)
        assert atoms.get_potential_energy() == pytest.approx(by_model(make_model(), atoms)[0])
        with pytest.raises(PropertyNotImplementedError):
            atoms.calc.get_property("energy_std", atoms)


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_threads_and_repetition_change_no_bit(threads, any_threads):
    rng = np.random.default_rng(0)
    many = Atoms(
        "OH2" * 30, (rng.permutation(1000)[:90, None] // [1, 10, 100] % 10 * 1.5) + rng.normal(0, 0.1, (90, 3))
    )
    calculators = [KinMLCalculator([make_model(s) for s in range(3)], threads=t) for t in (1, threads)]
    torch.set_num_threads(2)
    for atoms in (water(), many):
        results = []
        for calculator in (*calculators, calculators[0]):
            calculator.calculate(atoms)
            results.append(calculator.results)
        for name in results[0]:
            np.testing.assert_array_equal(results[0][name], results[1][name])
            np.testing.assert_array_equal(results[0][name], results[2][name])
    assert torch.get_num_threads() == 2


def test_models_from_files(tmp_path):
    models = [make_model(seed) for seed in range(2)]
    for model, name in zip(models, ("a.pt", "model.pt"), strict=True):
        model_file.save(tmp_path / name, model)
    model_file.save(tmp_path / "both.pt", Ensemble(models))
    atoms = water()
    expected = [by_model(model, atoms)[0] for model in models]
    cases = {
        str(tmp_path / "a.pt"): expected[0],
        tmp_path: expected[1],  # a run folder
        tmp_path / "both.pt": np.mean(expected),
        (tmp_path / "a.pt", tmp_path): np.mean(expected),
    }
    for given, energy in cases.items():
        atoms.calc = KinMLCalculator(given)
        assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-14)


# What is computed again, and when


def counted(calculator: KinMLCalculator, monkeypatch) -> list[int]:
    calls = []
    evaluate = calculator._evaluate
    monkeypatch.setattr(
        calculator,
        "_evaluate",
        lambda function, atoms, places: calls.append(len(places)) or evaluate(function, atoms, places),
    )
    return calls


def test_only_what_matters_makes_it_compute_again(monkeypatch):
    calculator = KinMLCalculator(make_model())
    calls = counted(calculator, monkeypatch)
    atoms = water()
    atoms.calc = calculator
    first = atoms.get_potential_energy()
    atoms.get_forces()
    atoms.set_cell([9, 9, 9])
    atoms.set_initial_charges([1, 0, 0])
    atoms.set_velocities(np.ones((3, 3)))
    assert atoms.get_potential_energy() == first
    assert calls == [3]
    atoms.rattle(0.01)
    atoms.get_potential_energy()
    assert calls == [3, 3]
    atoms.symbols[:] = "HHO"
    changed = atoms.get_potential_energy()
    assert calls == [3, 3, 3]
    assert changed == pytest.approx(by_model(make_model(), atoms)[0])
    other = atoms[:2]
    other.calc = calculator
    assert other.get_potential_energy() == pytest.approx(by_model(make_model(), other)[0])
    assert atoms.get_potential_energy() == changed
    assert calls == [3, 3, 3, 2, 3]


def test_what_is_given_out_is_no_part_of_the_results():
    atoms = water()
    atoms.calc = KinMLCalculator([make_model(0), make_model(1)])
    forces = atoms.get_forces()
    atoms.get_forces()[:] = 7
    atoms.calc.get_property("all_forces", atoms)[:] = 7
    np.testing.assert_array_equal(atoms.get_forces(), forces)


def test_results_of_a_failed_calculation_are_gone():
    atoms = water()
    atoms.calc = KinMLCalculator(make_model())
    atoms.get_potential_energy()
    atoms.positions[0, 0] = np.nan
    for _ in range(2):  # NaN must not pass for a geometry that is known
        with pytest.raises(InputError, match="NaN or infinite"):
            atoms.get_forces()
    assert atoms.calc.results == {}
    atoms.positions[0, 0] = 0
    atoms.get_forces()


# Delta models


def make_delta(seed: int = 0) -> EnergyModel:
    return make_model(seed, fidelities=(1,), baseline=0)


def test_a_delta_model_adds_its_base():
    model = make_delta()
    atoms = water()
    spring = Spring()
    atoms.calc = KinMLCalculator(model, base=spring)
    energy, forces = by_model(model, atoms)
    assert atoms.get_potential_energy() == pytest.approx(energy + 0.5 * (WATER**2).sum(), rel=1e-14)
    np.testing.assert_allclose(atoms.get_forces(), forces - WATER, rtol=1e-12, atol=1e-12)
    assert spring.calls == 1
    # What changes the base's energy makes it compute again.
    atoms.set_initial_charges([2.0, 0, 0])
    assert atoms.get_potential_energy() == pytest.approx(energy + 0.5 * (WATER**2).sum() + 2, rel=1e-14)
    atoms.calc.get_property("free_energy", atoms)
    assert spring.calls == 2


def test_an_ensemble_of_delta_models():
    models = [make_delta(seed) for seed in range(2)]
    atoms = water()
    atoms.calc = KinMLCalculator(models, base=Spring())
    energies = np.array([by_model(model, atoms)[0] for model in models]) + 0.5 * (WATER**2).sum()
    np.testing.assert_allclose(atoms.calc.get_property("all_energies", atoms), energies, rtol=1e-14)
    assert atoms.calc.results["energy_std"] == pytest.approx(energies.std(ddof=1), rel=1e-12)
    assert atoms.get_potential_energy() == pytest.approx(energies.mean(), rel=1e-14)


def test_the_base_can_be_a_model_or_tblite(tmp_path):
    low = make_model(3)
    model_file.save(tmp_path / "low.pt", low)
    atoms = water()
    atoms.calc = KinMLCalculator(make_delta(), base=str(tmp_path / "low.pt"))
    expected = by_model(make_delta(), atoms)[0] + by_model(low, atoms)[0]
    assert atoms.get_potential_energy() == pytest.approx(expected, rel=1e-14)

    tblite = pytest.importorskip("tblite.ase")
    atoms.calc = KinMLCalculator(make_delta(), base="tblite:GFN1-xTB")
    reference = water()
    reference.calc = tblite.TBLite(method="GFN1-xTB", verbosity=0)
    delta, delta_forces = by_model(make_delta(), atoms)
    assert atoms.get_potential_energy() == pytest.approx(delta + reference.get_potential_energy(), rel=1e-9)
    np.testing.assert_allclose(atoms.get_forces(), delta_forces + reference.get_forces(), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "the model gives differences of fidelity 1 to fidelity 0: give base, which computes fidelity 0"),
        ("tblite:GFN7", "tblite:GFN7: tblite knows GFN1-xTB, GFN2-xTB, IPEA1-xTB: name one of them"),
        ("nowhere.pt", r"nowhere\.pt: is neither a file nor of the form tblite:METHOD"),
        (3, "base is int, not a calculator: give an ASE calculator"),
    ],
)
def test_bases_that_are_none(given, message):
    if isinstance(given, str) and given.startswith("tblite"):
        pytest.importorskip("tblite")
    with pytest.raises(InputError, match=message):
        KinMLCalculator(make_delta(), base=given)


def test_tblite_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tblite.ase", None)
    with pytest.raises(InputError, match=r"needs the package tblite .*pip install tblite"):
        low_level.make("tblite:GFN1-xTB", KinMLCalculator)


def test_a_model_of_whole_energies_takes_no_base():
    with pytest.raises(InputError, match=r"gives whole energies.*leave out base"):
        KinMLCalculator(make_model(), base=Spring())


# Crystals


def ice(repeat=(1, 1, 1)) -> Atoms:
    atoms = Atoms("OH2OH2", np.concatenate([WATER, WATER @ [[0, 1, 0], [0, 0, 1], [1, 0, 0]] + [2.1, 1.9, 2.4]]))
    atoms.set_cell([[4.1, 0.2, 0.0], [0.3, 4.4, 0.1], [-0.2, 0.4, 4.6]])
    atoms.pbc = True
    return atoms.repeat(repeat)


@pytest.mark.parametrize("pbc", [True, [True, False, True], [False, False, True]])
def test_forces_and_stress_are_slopes_of_the_energy(pbc):
    atoms = ice()
    atoms.pbc = pbc
    atoms.calc = KinMLCalculator(make_model())
    np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms, eps=1e-5), atol=1e-7)
    np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-5), atol=1e-9)
    np.testing.assert_allclose(atoms.get_stresses().sum(0), atoms.get_stress(), atol=1e-12)
    np.testing.assert_allclose(atoms.get_potential_energies().sum(), atoms.get_potential_energy(), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_supercells_and_unwrapped_atoms(dtype):
    calculator = KinMLCalculator(make_model(dtype=dtype))
    atoms, tolerance = ice(), 1e-10 if dtype == torch.float64 else 2e-4
    atoms.calc = calculator
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    large = ice((2, 1, 3))
    large.positions += np.random.default_rng(0).integers(-900, 900, (len(large), 3)) @ large.cell.array
    large.calc = calculator
    assert large.get_potential_energy() == pytest.approx(6 * energy, abs=tolerance)
    np.testing.assert_allclose(large.get_forces(), np.tile(forces, (6, 1)), atol=tolerance)
    np.testing.assert_allclose(large.get_stress(), stress, atol=tolerance)


def test_an_ensemble_and_a_base_have_a_stress():
    members = [make_model(seed) for seed in range(3)]
    alone = []
    for member in members:
        atoms = ice()
        atoms.calc = KinMLCalculator(member)
        alone.append(atoms.get_stress())
    atoms = ice()
    atoms.calc = KinMLCalculator(members)
    np.testing.assert_allclose(atoms.get_stress(), np.mean(alone, axis=0), atol=1e-12)
    assert atoms.get_stresses().shape == (6, 6)
    delta = make_model(7, baseline=0)
    atoms.calc = KinMLCalculator(delta, base=KinMLCalculator(members[0]))
    assert "energies" not in atoms.calc.implemented_properties
    np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-5), atol=1e-9)
    atoms.calc = KinMLCalculator(delta, base=Spring())
    atoms.get_forces()
    assert "stress" not in atoms.calc.results


def test_a_change_of_the_cell_is_seen_if_there_is_periodicity():
    atoms = ice()
    atoms.calc = KinMLCalculator(make_model())
    before = atoms.get_potential_energy()
    atoms.set_cell(atoms.cell * 1.1)
    assert atoms.get_potential_energy() != before
    molecule = water()
    molecule.calc = KinMLCalculator(make_model())
    energy = molecule.get_potential_energy()
    molecule.cell = [9, 9, 9]
    assert molecule.get_potential_energy() == energy
    with pytest.raises(CalculatorSetupError, match=r"OH2 is a molecule .* which has no stress"):
        molecule.get_stress()
    assert molecule.get_potential_energies().sum() == pytest.approx(energy)


# Bad input


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (Atoms("OH2", WATER, pbc=[True, False, False]), "the cell of OH2 has no volume along its periodic vectors"),
        (Atoms("OH2", WATER, cell=[[0, 9, 0], [9, 0, 0], [0, 0, 9]], pbc=True), "the cell of OH2 is left-handed"),
        (Atoms("OH2", WATER, cell=[9, np.nan, 9], pbc=True), "the cell of OH2 has a number that is NaN or infinite"),
        (
            Atoms("OH2", [[0, 0, 0.01], [0, 0, 8.97], [4, 4, 4]], cell=[9, 9, 9], pbc=True),
            r"atoms 0 \(O\) and 1 \(H\) of OH2 are only 0.04 Å apart",
        ),
        (Atoms("CNOH2", np.diag([1, 2, 3, 4, 5])[:, :3]), "CNOH2 contains C N, but the model knows only H O"),
        (
            Atoms("OH2", [[0, 0, 0], [0, 0, 1], [0, np.nan, 0]]),
            r"atom 2 \(H\) of OH2 is at \[0.0, nan, 0.0\], NaN or inf",
        ),
        (Atoms("OH2", [[0, 0, 0], [0, np.inf, 1], [0, 1, 0]]), r"atom 1 \(H\) of OH2 is at \[0.0, inf, 1.0\]"),
        (Atoms("OH2", [[0, 0, 0], [0, 0, 1], [0, 0, 1.01]]), r"atoms 1 \(H\) and 2 \(H\) of OH2 are only 0.01 Å apart"),
        (Atoms("OX", [[0, 0, 0], [0, 0, 1]]), "OX contains X"),
    ],
)
def test_atoms_that_cannot_be_computed(atoms, message):
    atoms.calc = KinMLCalculator(make_model())
    for error in (InputError, CalculatorSetupError):
        with pytest.raises(error, match=message) as caught:
            atoms.get_potential_energy()
        assert "\n" not in str(caught.value)
    # The calculator is good for others after that.
    good = water()
    good.calc = atoms.calc
    assert good.get_potential_energy() == pytest.approx(by_model(make_model(), good)[0])


def test_an_energy_that_is_not_a_number():
    model = make_model()
    model.sae[model.elements.index("O")] = torch.inf
    atoms = water()
    atoms.calc = KinMLCalculator(model)
    with pytest.raises(CalculatorSetupError, match=r"^OH2 has an energy that is NaN or infinite: .*; leave it out$"):
        atoms.get_potential_energy()
    assert atoms.calc.results == {}


def test_what_is_no_model_and_what_is_not_computed(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        KinMLCalculator(tmp_path / "none.pt")
    with pytest.raises(InputError, match="model 2 knows the elements C H, but model 1 H O"):
        KinMLCalculator([make_model(), make_model(elements=("C", "H"))])
    with pytest.raises(InputError, match="threads is 0: give a number of at least 1"):
        KinMLCalculator(make_model(), threads=0)
    atoms = water()
    atoms.calc = KinMLCalculator(make_model())
    for name in ("stress", "energy_std", "level_energies"):
        with pytest.raises(PropertyNotImplementedError):
            atoms.calc.get_property(name, atoms)
    with pytest.raises(InputError, match="no atoms"):
        KinMLCalculator(make_model()).calculate()


def test_atoms_without_atoms_have_no_energy():
    atoms = Atoms()
    atoms.calc = KinMLCalculator(make_model())
    assert atoms.get_potential_energy() == 0
    assert atoms.get_forces().shape == (0, 3)


# What ASE does with it


@pytest.fixture(scope="module")
def hydrogen() -> EnergyModel:
    """A model whose H2 is bound: fitted to a spring's energies."""
    torch.manual_seed(0)
    model = EnergyModel(AEVParameters.aevmod(("H",), 8, 2, 2), [8, 1], ["gaussian", "identity"])
    lengths = torch.linspace(0.5, 1.1, 61, dtype=torch.float64)
    coordinates = torch.zeros(122, 3, dtype=torch.float64)
    coordinates[1::2, 2] = lengths
    batch = coordinates, torch.zeros(122, dtype=torch.int64), torch.arange(0, 123, 2)
    targets = 15 * (lengths - 0.74) ** 2
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (model(*batch) - targets).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert loss() < 1e-4
    return model


def test_geometry_optimisation_and_vibrations(hydrogen, tmp_path):
    atoms = Atoms("H2", [[0, 0, 0], [0, 0.3, 0.9]])
    atoms.calc = KinMLCalculator(hydrogen)
    assert BFGS(atoms, logfile=None).run(fmax=1e-4, steps=100)
    assert atoms.get_distance(0, 1) == pytest.approx(0.74, abs=0.02)
    vibrations = Vibrations(atoms, name=str(tmp_path / "vib"), delta=0.005)
    vibrations.run()
    energies = vibrations.get_energies()
    # One vibration, whose force constant is the second derivative of the energy.
    x = torch.tensor(atoms.positions)
    z, o = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2])
    hessian = torch.autograd.functional.hessian(lambda x: hydrogen(x, z, o).sum(), x).reshape(6, 6).numpy()
    constant = np.linalg.eigvalsh(hessian)[-1] / 2  # along (1, -1)/√2; reduced mass m/2
    expected = units._hbar * np.sqrt(constant * 2 * units._e / 1e-20 / (units._amu * 1.008)) / units._e
    assert energies[-1].real == pytest.approx(expected, rel=1e-3)
    assert np.abs(energies[:-1]).max() < 0.05 * energies[-1].real


def test_dynamics_conserve_energy(hydrogen):
    """Velocity Verlet's error falls with the square of the step: of half the step it is a quarter."""

    def drift(step: float) -> tuple[float, float]:
        atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.80]])
        atoms.calc = KinMLCalculator(hydrogen)
        atoms.set_momenta(np.random.default_rng(1).normal(0, 0.2, (2, 3)))
        totals = []
        dynamics = VelocityVerlet(atoms, step * units.fs)
        dynamics.attach(lambda: totals.append(atoms.get_total_energy()))
        dynamics.run(round(200 / step))
        return np.std(totals), abs(np.mean(totals[-100:]) - np.mean(totals[:100]))

    coarse, fine = drift(0.2), drift(0.1)
    assert coarse[0] < 2e-3
    assert fine[0] == pytest.approx(coarse[0] / 4, rel=0.2)
    assert fine[1] < fine[0]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies(duplicate):
    atoms = water()
    calculator = KinMLCalculator([make_delta(0), make_delta(1)], base=Spring(), threads=1)
    atoms.calc = calculator
    atoms.get_forces()
    again = duplicate(calculator)
    other = water(1.2)
    other.calc = again
    expected = np.mean([by_model(make_delta(seed), other)[0] for seed in range(2)]) + 0.5 * (WATER**2).sum() * 1.44
    assert other.get_potential_energy() == pytest.approx(expected, rel=1e-14)
    assert again.get_property("energy_std", other) > 0
    assert (again.threads, again.name) == (1, "kinml_fast")


def test_files_of_ase(tmp_path):
    atoms = water()
    atoms.calc = KinMLCalculator([make_model(0), make_model(1)])
    forces = atoms.get_forces()
    ase.io.write(tmp_path / "w.xyz", atoms, format="extxyz")
    with Trajectory(tmp_path / "w.traj", "w") as trajectory:
        trajectory.write(atoms)
    for name in ("w.xyz", "w.traj"):
        read = ase.io.read(tmp_path / name)
        assert read.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
        np.testing.assert_allclose(read.get_forces(), forces, atol=1e-7)
    properties = atoms.calc.calculate_properties(atoms, ["energy", "forces"])
    np.testing.assert_array_equal(properties["forces"], forces)


def test_it_is_imported_when_it_is_asked_for():
    code = (
        "import sys, kinml_fast\n"
        "print([m for m in ('torch', 'ase', 'numpy') if m in sys.modules])\n"
        "print(kinml_fast.KinMLCalculator.__name__, 'KinMLCalculator' in kinml_fast.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "KinMLCalculator True"]
    with pytest.raises(AttributeError, match="no attribute 'KinMLCalculater'"):
        kinml_fast.KinMLCalculater  # noqa: B018


# Second derivatives


def by_forces(calculator: KinMLCalculator, atoms: Atoms) -> np.ndarray:
    """Second derivatives as central differences (fourth order) of forces."""
    step, rows = 2e-3, []
    for atom, axis in np.ndindex(len(atoms), 3):
        forces = {}
        for n in (-2, -1, 1, 2):
            moved = atoms.copy()
            moved.positions[atom, axis] += n * step
            forces[n] = calculator.get_forces(moved).reshape(-1)
        rows.append((forces[2] - forces[-2] - 8 * (forces[1] - forces[-1])) / (12 * step))
    return np.array(rows)


@pytest.mark.parametrize("members", [1, 3])
def test_hessian_is_the_derivative_of_forces(members):
    calculator = KinMLCalculator([make_model(seed) for seed in range(members)])
    atoms = water(1.1)
    hessian = calculator.get_hessian(atoms)
    assert hessian.shape == (9, 9)
    assert np.abs(hessian).max() > 1e-2
    np.testing.assert_array_equal(hessian, hessian.T)
    np.testing.assert_allclose(hessian, by_forces(calculator, atoms), rtol=0, atol=1e-6)


def test_hessian_of_levels_and_of_a_base():
    atoms = water()
    levels = KinMLCalculator(make_model(fidelities=(0, 1)))
    np.testing.assert_allclose(levels.get_hessian(atoms), by_forces(levels, atoms), rtol=0, atol=1e-6)
    delta = KinMLCalculator(make_model(baseline=0), base=KinMLCalculator(make_model(1, fidelities=(0,))))
    np.testing.assert_allclose(delta.get_hessian(atoms), by_forces(delta, atoms), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pbc", [True, (True, False, False)], ids=str)
def test_hessian_of_a_crystal_is_the_derivative_of_forces(pbc):
    calculator = KinMLCalculator(make_model())
    atoms = Atoms("OH2", WATER + np.array([2.9, 0.1, 0.2]), cell=[[3.0, 0, 0], [0.4, 3.4, 0], [0, 0.3, 6.1]], pbc=pbc)
    hessian = calculator.get_hessian(atoms)
    np.testing.assert_allclose(hessian, by_forces(calculator, atoms), rtol=0, atol=1e-6)
    np.testing.assert_allclose(hessian.reshape(9, 3, 3).sum(axis=1), 0, rtol=0, atol=1e-10)


def test_hessian_of_some_atoms_is_a_part_of_the_whole():
    calculator = KinMLCalculator(make_model())
    whole = calculator.get_hessian(water())
    part = calculator.get_hessian(water(), indices=[2, 0])
    rows = [6, 7, 8, 0, 1, 2]
    assert part.shape == (6, 9)
    np.testing.assert_allclose(part, whole[rows], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(part[:, rows], part[:, rows].T)
    assert calculator.get_hessian(water(), indices=[]).shape == (0, 9)


def test_hessian_leaves_results_and_refuses_what_it_cannot_do():
    calculator = KinMLCalculator(make_model())
    energy = calculator.get_potential_energy(water())
    calculator.get_hessian(water(1.3))
    assert calculator.results["energy"] == energy
    with pytest.raises(InputError, match="has no atom 3: give indices from 0 to 2"):
        calculator.get_hessian(water(), indices=[3])
    with pytest.raises(InputError, match="Spring has no get_hessian"):
        KinMLCalculator(make_model(baseline=0), base=Spring()).get_hessian(water())
    atom = KinMLCalculator(make_model()).get_hessian(Atoms("O"))
    np.testing.assert_array_equal(atom, np.zeros((3, 3)))
