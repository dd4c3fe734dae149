"""Saddle points by Sella: the inversion of a pyramid, which must lie at the plane whatever the potential."""

from __future__ import annotations

import json

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from kinml_fast import KinMLCalculator
from kinml_fast.cli import main
from kinml_fast.deploy import model_file
from kinml_fast.errors import DataError
from kinml_fast.kinetics import saddle, vibrate
from kinml_fast.nn import AEVParameters, EnergyModel

pytest.importorskip("sella", reason="pip install sella")


def model(seed: int = 2) -> EnergyModel:
    """Random weights of which NH3 is a pyramid, as of seeds 2, 14 and 18."""
    torch.manual_seed(seed)
    descriptor = AEVParameters.aevmod(("C", "H", "N", "O"), n_radial=8, n_angular=4, n_sections=4)
    made = EnergyModel(descriptor, (8, 1), ("gaussian", "identity"))
    with torch.no_grad():
        made.networks.weights.mul_(3)
    return made


def flat(rattle: float = 0.08) -> Atoms:
    atoms = molecule("NH3")
    atoms.positions[:, 2] = 0
    atoms.rattle(rattle, seed=0)
    return atoms


@pytest.mark.parametrize("every", [0, 1, 5])
def test_the_plane_is_the_saddle_point_of_a_pyramid(every):
    calculator = KinMLCalculator(model())
    found, steps = saddle.search(flat(), calculator, exact_every=every)
    assert 0 < steps < 30
    assert (found.imaginary, found.symmetry_number) == (1, 6)
    assert abs(np.linalg.svd(found.atoms.positions - found.atoms.positions.mean(axis=0))[1][2]) < 1e-2  # flat
    path = saddle.follow(found, calculator)
    assert path.saddle == np.argmax(path.energies)
    before, after = path.energies[: path.saddle + 1], path.energies[path.saddle :]
    assert (np.diff(before) > -1e-4).all()  # at its foot the path steps to and fro
    assert (np.diff(after) < 1e-4).all()
    assert path.lengths[path.saddle] == 0
    assert (np.diff(path.lengths) > 0).all()
    ends = saddle.minima(path, calculator)
    assert [(one.imaginary, one.symmetry_number) for one in ends] == [(0, 3), (0, 3)]
    assert ends[0].energy == pytest.approx(ends[1].energy, abs=1e-5)
    assert found.energy > ends[0].energy + 0.1


def test_a_band_between_two_minima_leads_there(tmp_path, capsys):
    models = [model(), model()]
    with torch.no_grad():
        models[1].networks.weights.mul_(1.001)
    calculator = KinMLCalculator(models)
    for i, one in enumerate(models):
        model_file.save(tmp_path / f"m{i}.pt", one)
    minimum = vibrate(molecule("NH3"), calculator, optimise=True).atoms
    mirrored = minimum.copy()
    mirrored.positions[:, 2] *= -1
    ase.io.write(tmp_path / "both.xyz", [minimum, mirrored], format="xyz")
    out = tmp_path / "out"
    assert main(["saddle", str(tmp_path / "m*.pt"), str(tmp_path / "both.xyz"), "-o", str(out), "--images", "5"]) == 0
    said = capsys.readouterr().out
    assert "saddle point of NH3" in said
    assert " ± " in said
    entries = json.loads((out / "saddle.json").read_text())
    expected, _ = saddle.search(flat(), calculator)
    assert entries["saddle"]["frequencies"][0] == pytest.approx(expected.frequencies[0], abs=2)
    assert entries["saddle"]["energy"] == pytest.approx(expected.energy, abs=1e-5)
    assert len(entries["minima"]) == len(ase.io.read(out / "minima.xyz", ":")) == 2
    assert len(ase.io.read(out / "path.xyz", ":")) > 5
    assert (out / "path.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_saddle_point(tmp_path, capsys):
    calculator = KinMLCalculator(model())
    with pytest.raises(DataError, match="NH3 is at no saddle point after 1 steps: allow more, or a better guess"):
        saddle.search(flat(0.3), calculator, steps=1)
    other = KinMLCalculator(model(9))  # of which the plane is a saddle point of second order
    summit = vibrate(flat(0), other, optimise=True).atoms
    with pytest.raises(DataError, match="NH3: the search ends in a point with 2 imaginary modes, no saddle point"):
        saddle.search(summit, other)
    with pytest.raises(DataError, match="have not the same atoms in the same order"):
        saddle.between(molecule("NH3"), molecule("NH3")[[1, 0, 2, 3]], calculator)
    crystal = molecule("NH3")
    crystal.set_cell([9, 9, 9])
    crystal.pbc = True
    with pytest.raises(DataError, match="is periodic: saddle points are of molecules"):
        saddle.search(crystal, calculator)
    model_file.save(tmp_path / "m.pt", model())
    ase.io.write(tmp_path / "three.xyz", [molecule("NH3")] * 3, format="xyz")
    assert main(["saddle", str(tmp_path / "m.pt"), str(tmp_path / "three.xyz"), "-o", str(tmp_path / "out")]) == 2
    assert "has 3 frames: give one, a guess of the saddle point, or two minima" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
