"""Vibrations: frequencies against finite differences, shapes and symmetry numbers, the command line."""

from __future__ import annotations

import json

import ase.io
import ase.units
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.thermochemistry import IdealGasThermo
from ase.vibrations import Vibrations as FiniteDifferences

from kinml_fast import KinMLCalculator
from kinml_fast.cli import main
from kinml_fast.deploy import model_file
from kinml_fast.errors import ConfigError, DataError
from kinml_fast.kinetics import symmetry, vibrate
from kinml_fast.kinetics.vibrations import fragments
from kinml_fast.nn import AEVParameters, Calibration, EnergyModel, Ensemble

ELEMENTS = ("C", "H", "N", "O")


def model(seed: int = 0) -> EnergyModel:
    """With random weights, which make molecules with minima of their own."""
    torch.manual_seed(seed)
    made = EnergyModel(
        AEVParameters.aevmod(ELEMENTS, n_radial=8, n_angular=4, n_sections=4), (8, 1), ("gaussian", "identity")
    )
    with torch.no_grad():
        made.networks.weights.mul_(3)
    return made


@pytest.mark.parametrize("name", ["H2O", "C2H2", "CH3CH2OH", "CO"])
def test_frequencies_are_those_of_finite_differences(tmp_path, name):
    atoms = molecule(name)
    calculator = KinMLCalculator(model())
    found = vibrate(atoms, calculator)
    assert len(found.frequencies) == 3 * len(atoms) - (5 if name in ("C2H2", "CO") else 6)
    atoms.calc = calculator
    differences = FiniteDifferences(atoms, name=str(tmp_path / "vib"), delta=1e-4)
    differences.run()
    hessian = differences.get_vibrations().get_hessian_2d()
    assert abs(found.hessian - hessian).max() < 1e-6 * abs(hessian).max()
    # Projected by another way: those of P H P with P made of products of the vectors.
    root = np.repeat(np.sqrt(atoms.get_masses()), 3)
    x = (atoms.positions - atoms.get_center_of_mass())[:, None]
    outer = np.concatenate(
        [
            np.tile(np.eye(3), (len(atoms), 1)),
            np.cross(np.eye(3), x).reshape(-1, 3, 3).transpose(0, 2, 1).reshape(-1, 3),
        ],
        axis=1,
    )
    outer = outer * root[:, None]
    projector = np.eye(len(root)) - outer @ np.linalg.pinv(outer)
    squares = np.linalg.eigvalsh(projector @ (hessian / root[:, None] / root) @ projector)
    squares = squares[np.sort(np.argsort(abs(squares))[len(squares) - len(found.frequencies) :])]
    expected = np.sign(squares) * np.sqrt(abs(squares)) * 521.4708983725064
    np.testing.assert_allclose(found.frequencies, expected, rtol=1e-5, atol=0.01)
    for k, mode in enumerate(found.modes):
        assert np.linalg.norm(mode, axis=1).max() == pytest.approx(1)
        assert abs((mode * atoms.get_masses()[:, None]).sum(axis=0)).max() < 1e-9  # the centre of mass stays
        of_mode = (np.square(mode).sum(axis=1) * atoms.get_masses()).sum() / np.square(mode).sum()
        assert found.reduced_masses[k] == pytest.approx(of_mode)


def test_an_atom_has_no_vibrations():
    found = vibrate(Atoms("C"), KinMLCalculator(model()))
    assert (found.frequencies.shape, found.modes.shape, found.geometry) == ((0,), (0, 1, 3), "monatomic")
    assert (found.zero_point_energy, found.symmetry_number, found.imaginary) == (0, 1, 0)
    gas = IdealGasThermo([], "monatomic", found.energy, Atoms("C"), 1, 1.0)
    assert found.thermochemistry(500, 1e5, 1.0)["free_energy"] == pytest.approx(gas.get_gibbs_energy(500, 1e5, False))


def test_members_of_an_ensemble():
    atoms = molecule("CH3OH")
    models = [model(seed) for seed in range(3)]
    found = vibrate(atoms, KinMLCalculator(models))
    hessians = [KinMLCalculator(one).get_hessian(atoms) for one in models]
    np.testing.assert_allclose(found.hessian, np.mean(hessians, axis=0), atol=1e-12)
    assert found.members.shape == (3, len(found.frequencies))
    # To first order: squares of the members average to those of the mean.
    squares = np.sign(found.members) * found.members**2
    np.testing.assert_allclose(
        squares.mean(axis=0), np.sign(found.frequencies) * found.frequencies**2, rtol=1e-9, atol=1e-3
    )
    real = np.where(found.members > 0, found.members, 0).sum(axis=1) / 2 / 8065.544
    assert found.zero_point_energy_std == pytest.approx(real.std(ddof=1), rel=1e-6)
    same = vibrate(atoms, KinMLCalculator([models[0], models[0]]))
    assert abs(same.frequencies_std).max() < 1e-6


def test_factors_of_a_calibrated_ensemble(tmp_path):
    atoms = molecule("CH3OH")
    ensemble = Ensemble([model(seed) for seed in range(3)])
    plain = vibrate(atoms, KinMLCalculator(ensemble))
    assert plain.energy_factor == 1
    np.testing.assert_allclose(plain.factors, 1)
    ensemble.calibration = Calibration((2.0,), ((1.5, 4.0, 1.0, 2.5),))  # of C H N O
    model_file.save(tmp_path / "m.pt", ensemble)
    calculator = KinMLCalculator(tmp_path / "m.pt")
    found = vibrate(atoms, calculator)
    np.testing.assert_array_equal(found.members, plain.members)  # what they say stays
    of_atoms = np.array([{"C": 1.5, "H": 4.0, "O": 2.5}[symbol] for symbol in atoms.symbols])
    for k, mode in enumerate(found.modes):
        squares = np.square(mode).sum(axis=1)
        factor = np.sqrt((squares * of_atoms**2).sum() / squares.sum())
        assert 1.5 < factor <= 4
        assert found.frequencies_std[k] == pytest.approx(factor * plain.frequencies_std[k])
    assert found.frequencies_std[-1] == pytest.approx(4 * plain.frequencies_std[-1], rel=0.1)  # all but a hydrogen's
    spread = found.members + (found.factors - 1) * (found.members - found.members.mean(axis=0))
    zero_points = np.where(spread > 0, spread, 0).sum(axis=1) / 2 / 8065.544
    assert found.zero_point_energy_std == pytest.approx(zero_points.std(ddof=1), rel=1e-6)
    assert found.calibrated_energies.std(ddof=1) == pytest.approx(2 * found.member_energies.std(ddof=1))
    assert found.calibrated_energies.std(ddof=1) == pytest.approx(calculator.get_property("energy_std", atoms))
    assert found.calibrated_energies.mean() == pytest.approx(found.energy)
    assert found.to_dict()["frequencies_std"] == found.frequencies_std.tolist()


@pytest.mark.parametrize(
    ("name", "number", "shape"),
    [
        ("H2O", 2, "nonlinear"),
        ("NH3", 3, "nonlinear"),
        ("CH4", 12, "nonlinear"),
        ("C6H6", 12, "nonlinear"),
        ("C2H4", 4, "nonlinear"),
        ("C2H6", 6, "nonlinear"),
        ("CH3CH2OH", 1, "nonlinear"),
        ("SF6", 24, "nonlinear"),
        ("CO2", 2, "linear"),
        ("N2O", 1, "linear"),
        ("CO", 1, "linear"),
        ("O2", 2, "linear"),
        ("H", 1, "monatomic"),
    ],
)
def test_symmetry_numbers(name, number, shape):
    atoms = (
        Atoms("SF6", np.vstack([np.zeros(3), 1.56 * np.eye(3), -1.56 * np.eye(3)])) if name == "SF6" else molecule(name)
    )
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    atoms.positions = atoms.positions @ turn + 3
    assert symmetry.shape(atoms) == shape
    assert symmetry.rotations(atoms) == number
    assert symmetry.rotations(atoms[np.random.default_rng(1).permutation(len(atoms))]) == number


def test_isotopes_have_less_symmetry():
    atoms = molecule("CH4")
    masses = atoms.get_masses()
    masses[1] = 2.014
    atoms.set_masses(masses)
    assert symmetry.rotations(atoms) == 3


class Springs(Calculator):
    """A chain of harmonic bonds, or one that pushes atoms apart."""

    implemented_properties = ("energy", "forces")

    def __init__(self, length: float) -> None:
        super().__init__()
        self.length = length

    def calculate(self, atoms=None, properties=(), changes=()) -> None:
        super().calculate(atoms, properties, changes)
        arms = np.diff(atoms.positions, axis=0)
        r = np.linalg.norm(arms, axis=1)
        pull = (20 * (r - self.length) / r)[:, None] * arms
        forces = np.zeros((len(atoms), 3))
        forces[:-1] += pull
        forces[1:] -= pull
        self.results = {"energy": 10 * ((r - self.length) ** 2).sum(), "forces": forces}

    def get_hessian(self, atoms: Atoms) -> np.ndarray:
        """By differences; of forces that are linear along a bond."""
        rows = []
        for i in range(atoms.positions.size):
            moved = [atoms.copy(), atoms.copy()]
            for sign, one in zip((1, -1), moved, strict=True):
                one.positions.reshape(-1)[i] += sign * 1e-4
            plus, minus = (self.get_property("forces", one).ravel() for one in moved)
            rows.append(-(plus - minus) / 2e-4)
        return np.array(rows)


def nothing() -> EnergyModel:
    """A model of differences that are zero, to which the springs are added."""
    made = EnergyModel(AEVParameters.aevmod(ELEMENTS, 4, 2, 2), (1,), ("identity",), baseline=0)
    with torch.no_grad():
        made.networks.weights.zero_()
    return made


def test_a_minimum_is_found_and_has_the_frequency_of_its_spring():
    calculator = KinMLCalculator(nothing(), base=Springs(1.2))
    found = vibrate(Atoms("CO", [[0, 0, 0], [0, 0, 1.1]]), calculator, optimise=True, fmax=1e-6)
    assert found.atoms.get_distance(0, 1) == pytest.approx(1.2, abs=1e-6)
    reduced = 12.011 * 15.999 / (12.011 + 15.999)
    # Of displacements of length 1 over all atoms, as quantum-chemistry programs have them, not of the bond.
    of_mode = 1 / (reduced * (12.011**-2 + 15.999**-2))
    assert found.reduced_masses.tolist() == [pytest.approx(of_mode, rel=1e-6)]
    assert found.force_constants.tolist() == [pytest.approx(20 / reduced * of_mode, rel=1e-6)]
    assert found.frequencies.tolist() == [pytest.approx(521.4708983725064 * np.sqrt(20 / reduced), rel=1e-6)]
    assert found.largest_force < 1e-6


def test_what_is_no_minimum(caplog):
    calculator = KinMLCalculator(nothing(), base=Springs(1.2))
    atoms = Atoms("CO", [[0, 0, 0], [0, 0, 1.1]])
    with pytest.raises(DataError, match=r"CO is at no minimum after 1 steps \(largest force .* eV/Å\): allow more"):
        vibrate(atoms, calculator, optimise=True, fmax=1e-9, steps=1)
    with pytest.raises(DataError, match=r"CO falls apart while it is optimised .*2 fragments instead of 1"):
        vibrate(atoms, KinMLCalculator(nothing(), base=Springs(4.0)), optimise=True)
    vibrate(atoms, calculator)
    assert "the largest force is 2 eV/Å, so this is no minimum or saddle point" in caplog.text
    with pytest.raises(DataError, match="is periodic: vibrations are of molecules"):
        vibrate(Atoms("CO", [[0, 0, 0], [0, 0, 1.1]], cell=[5, 5, 5], pbc=True), calculator)
    with pytest.raises(DataError, match="there are no atoms"):
        vibrate(Atoms(), calculator)
    with pytest.raises(ConfigError, match="a symmetry number of 0"):
        vibrate(atoms, calculator, symmetry_number=0)
    assert fragments(molecule("CH3CH2OH")) == fragments(molecule("C6H6")) == 1


def test_from_the_command_line(tmp_path, capsys):
    for seed in range(2):
        model_file.save(tmp_path / f"m{seed}.pt", model(seed))
    ase.io.write(tmp_path / "in.xyz", [molecule("C2H2"), molecule("CH3OH")], format="xyz")
    arguments = [str(tmp_path / "m*.pt"), str(tmp_path / "in.xyz"), "--temperature", "500", "--spin", "0.5"]
    out, modes = str(tmp_path / "out.json"), str(tmp_path / "modes")
    assert main(["vibrations", *arguments, "-o", out, "--modes", modes]) == 0
    said = capsys.readouterr().out
    assert "in.xyz/1: C2H2, linear, symmetry number 2" in said
    assert "at 500 K and 101325 Pa, spin 0.5: energy" in said
    assert "in.xyz: frame 1: a spin of 0.5 does not fit the number of electrons of C2H2 without a charge" in said
    first, second = json.loads((tmp_path / "out.json").read_text())
    assert (len(first["frequencies"]), len(second["frequencies"])) == (7, 12)
    assert np.shape(second["hessian"]) == (18, 18)
    assert np.shape(second["members"]) == (2, 12)
    expected = vibrate(molecule("CH3OH"), KinMLCalculator(str(tmp_path / "m*.pt")))
    np.testing.assert_allclose(second["frequencies"], expected.frequencies, rtol=1e-3, atol=0.5)  # of rounded places
    frames = ase.io.read(tmp_path / "modes/in-2-mode-12.xyz", ":")
    assert len(frames) == 24
    moved = np.linalg.norm(frames[6].positions - frames[0].positions, axis=1)
    assert moved.max() == pytest.approx(0.3, abs=1e-6)
    for wrong, sentence in (
        (["--temperature", "0"], "give a temperature and a pressure above 0"),
        (["--temperature", "nan"], "give a temperature and a pressure above 0"),
        (["--pressure", "inf"], "give a temperature and a pressure above 0"),
        (["--fmax", "nan"], "give a force above 0 and at least 1 step"),
        (["--steps", "0"], "give a force above 0 and at least 1 step"),
        (["-o", str(tmp_path / "none" / "out.json")], "out.json: cannot be written (No such file or directory)"),
        (["--modes", str(tmp_path / "in.xyz")], "in.xyz: cannot be made (File exists)"),
        (["--spin", "0.3"], "a spin of 0.3"),
        (["-o", str(tmp_path / "in.xyz")], "is what is read and would be overwritten"),
        (["--steps", "1", "--optimize"], "in.xyz: frame 1: "),
    ):
        assert main(["vibrations", *arguments, *wrong]) == 2
        assert sentence in capsys.readouterr().err


def test_the_spin_of_a_radical_is_that_of_its_electrons(tmp_path, capsys):
    model_file.save(tmp_path / "m.pt", model())
    ase.io.write(tmp_path / "in.xyz", [molecule("CH3"), molecule("H2O")], format="xyz")
    assert main(["vibrations", str(tmp_path / "m.pt"), str(tmp_path / "in.xyz"), "-o", str(tmp_path / "o.json")]) == 0
    radical, water = json.loads((tmp_path / "o.json").read_text())
    assert (radical["spin"], water["spin"]) == (0.5, 0.0)
    assert "does not fit" not in capsys.readouterr().out
    found = vibrate(molecule("CH3"), KinMLCalculator(tmp_path / "m.pt"))
    doublet, singlet = (found.thermochemistry(spin=spin)["entropy"] for spin in (None, 0.0))
    assert doublet - singlet == pytest.approx(ase.units.kB * np.log(2))


def test_a_model_that_no_forces_were_trained_on_is_said(tmp_path, caplog):
    notes = {"training": {"loss": {"forces": False}}}
    model_file.save(tmp_path / "alone.pt", model(), notes)
    model_file.save(tmp_path / "of_members.pt", Ensemble([model(0), model(1)]), {"members": [{"epoch": 1}, notes]})
    model_file.save(tmp_path / "good.pt", model(), {"training": {"loss": {"forces": True}}})
    model_file.save(tmp_path / "other.pt", model(), {"training": "elsewhere"})
    ase.io.write(tmp_path / "in.xyz", molecule("H2O"), format="xyz")
    for name, said in (("alone", True), ("of_members", True), ("good", False), ("other", False)):
        caplog.clear()
        assert main(["vibrations", str(tmp_path / f"{name}.pt"), str(tmp_path / "in.xyz")]) == 0
        assert (f"{name}.pt: was trained on energies alone" in caplog.text) == said


def test_what_arc_reads(tmp_path, capsys):
    """Its five results, recomputed from the Hessian in the file in SI units, as ARC's documentation of them says."""
    model_file.save(tmp_path / "m.pt", model())
    atoms = molecule("CH3CH2OH")
    ase.io.write(tmp_path / "one.xyz", atoms, format="xyz")
    ase.io.write(tmp_path / "two.xyz", [atoms, atoms], format="xyz")
    output = tmp_path / "output.yml"
    assert main(["vibrations", str(tmp_path / "m.pt"), str(tmp_path / "one.xyz"), "-o", str(output)]) == 0
    found = yaml.safe_load(output.read_text())
    n, k = len(atoms), 3 * len(atoms) - 6
    assert set(found) >= {"freqs", "hessian", "modes", "force_constants", "reduced_masses"}
    frequencies, hessian, modes = (np.array(found[key]) for key in ("freqs", "hessian", "modes"))
    assert (frequencies.shape, hessian.shape, modes.shape) == ((k,), (3 * n, 3 * n), (k, n, 3))
    assert (np.diff(frequencies) >= 0).all()
    assert (frequencies < 0).any()  # the geometry is no minimum of random weights
    np.testing.assert_allclose(np.linalg.norm(modes, axis=(1, 2)), 1)
    # A mode's curvature along its unit vector: translations and rotations are no part of it.
    si = hessian * 1.602176634e-19 * 1e20  # N/m
    rows = modes.reshape(k, -1)
    curvature = np.einsum("ki,ij,kj->k", rows, si, rows)
    np.testing.assert_allclose(np.array(found["force_constants"]) * 100, curvature, rtol=1e-6, atol=1e-6)
    masses = np.repeat(atoms.get_masses(), 3)
    np.testing.assert_allclose(found["reduced_masses"], np.square(rows) @ masses, rtol=1e-9)
    omega = np.sqrt(np.abs(curvature) / (np.array(found["reduced_masses"]) * 1.66053906660e-27))
    np.testing.assert_allclose(np.abs(frequencies), omega / (2 * np.pi * 2.99792458e10), rtol=1e-6, atol=1e-3)
    assert found["sp"] == pytest.approx(KinMLCalculator(model()).get_property("energy", atoms) * 96.485332, rel=1e-6)
    assert main(["vibrations", str(tmp_path / "m.pt"), str(tmp_path / "two.xyz"), "-o", str(output)]) == 2
    assert "contains 2 molecules, but ARC has one in a file: take one, or .json" in capsys.readouterr().err
