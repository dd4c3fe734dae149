"""Saddle points by Sella: the inversion of a pyramid, which must lie at the plane whatever the potential."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from rich.console import Console
from training_helpers import kill

from kinml_fast import KinMLCalculator, lock
from kinml_fast.cli import main
from kinml_fast.deploy import model_file
from kinml_fast.errors import DataError, InputError
from kinml_fast.kinetics import files, record, saddle, vibrate
from kinml_fast.nn import AEVParameters, Calibration, EnergyModel, Ensemble

pytest.importorskip("sella", reason="pip install sella")

KILLS = int(os.environ.get("KINML_KILLS", "3"))
"""How often a search is killed."""


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
    # After a search that fails nothing is left that another guess would be refused for.
    model_file.save(tmp_path / "m.pt", model(9))
    ase.io.write(tmp_path / "guess.xyz", summit, format="xyz")
    assert main(["saddle", str(tmp_path / "m.pt"), str(tmp_path / "guess.xyz"), "-o", str(tmp_path / "out")]) == 2
    assert "guess.xyz: NH3: the search ends in a point with 2 imaginary modes" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("seed", "name"), [(2, "NH3"), (14, "C2H2"), (14, "HCN"), (18, "H2O")])  # two are linear
def test_sella_finds_the_same_minimum_from_an_exact_hessian(seed, name, monkeypatch):
    calculator = KinMLCalculator(model(seed))
    expected = vibrate(molecule(name), calculator, optimise=True, fmax=1e-4)
    asked, told = [], []
    exact = calculator.get_hessian
    monkeypatch.setattr(calculator, "get_hessian", lambda atoms: asked.append(len(told)) or exact(atoms))
    found = vibrate(
        molecule(name), calculator, optimise="sella", fmax=1e-4, tell=lambda number, force: told.append(number)
    )
    assert asked == [1]  # between the beginning and the first step
    assert told == list(range(len(told)))
    assert found.imaginary == 0
    assert found.largest_force < 2e-4
    assert found.energy == pytest.approx(expected.energy, abs=1e-5)
    np.testing.assert_allclose(found.frequencies, expected.frequencies, atol=2)


def test_the_optimiser_is_chosen_on_the_command_line(tmp_path, capsys):
    model_file.save(tmp_path / "m.pt", model())
    ase.io.write(tmp_path / "in.xyz", molecule("NH3"), format="xyz")
    arguments = ["vibrations", str(tmp_path / "m.pt"), str(tmp_path / "in.xyz"), "-o", str(tmp_path / "out.json")]
    found = []
    for how in (["--optimize"], ["--optimizer", "sella"]):
        assert main([*arguments, *how]) == 0
        assert "at a minimum after" in capsys.readouterr().out
        found.append(json.loads((tmp_path / "out.json").read_text())[0])
    assert found[0]["positions"] != found[1]["positions"]
    np.testing.assert_allclose(found[1]["frequencies"], found[0]["frequencies"], atol=2)


def test_barriers_have_the_factors_of_a_calibrated_ensemble():
    models = [model(), model()]
    with torch.no_grad():
        models[1].networks.weights.mul_(1.001)
    ensemble = Ensemble(models)
    ensemble.calibration = Calibration((3.0,), ((5.0,) * 4,))
    calculator = KinMLCalculator(ensemble)
    found, _ = saddle.search(flat(), calculator)
    minimum = vibrate(molecule("NH3"), calculator, optimise=True)
    said = files.barriers(found, [minimum, minimum])
    electronic = 3 * (found.member_energies - minimum.member_energies).std(ddof=1)
    zero_points = [5 * (one.members * (one.members > 0)).sum(axis=1) / 2 / 8065.544 for one in (found, minimum)]
    both = 3 * (found.member_energies - minimum.member_energies) + zero_points[0] - zero_points[1]
    assert f" ± {electronic * 23.060548:.2f} " in said
    assert f" ± {both.std(ddof=1) * 23.060548:.2f} " in said
    assert f"{-found.frequencies[0]:.1f}i ± {5 * found.members[:, 0].std(ddof=1):.1f} cm⁻¹" in said
    path = saddle.follow(found, calculator)
    differences = path.member_energies[path.saddle] - path.member_energies[0]
    assert path.energies_std[path.saddle] == pytest.approx(3 * differences.std(ddof=1))
    assert path.energies_std[0] == 0


# What is cut off


RESULTS = ("saddle.json", "saddle.xyz", "path.xyz", "minima.xyz")


def two_minima(folder: Path) -> tuple[Path, Path]:
    """A model file, and a file with a pyramid and its mirror image."""
    model_file.save(folder / "m.pt", model())
    minimum = molecule("NH3")
    mirrored = minimum.copy()
    mirrored.positions[:, 2] *= -1
    ase.io.write(folder / "both.xyz", [minimum, mirrored], format="xyz")
    return folder / "m.pt", folder / "both.xyz"


def results(folder: Path) -> list[bytes]:
    assert not (folder / files.UNFINISHED).exists()
    assert not list(folder.rglob("*.part"))
    return [(folder / name).read_bytes() for name in RESULTS]


class Cut(BaseException):
    """What ends a process."""


def test_what_is_cut_off_goes_on_and_ends_in_the_same(tmp_path, monkeypatch):
    arguments = two_minima(tmp_path)
    stages: dict[str, int] = {}
    step = record.Record.step

    def counted(self, stage, number, force, state=None):
        stages[stage] = number
        step(self, stage, number, force, state)

    monkeypatch.setattr(record.Record, "step", counted)
    monkeypatch.setattr(saddle, "_LEG", 1)
    files.reaction(*arguments, tmp_path / "whole", fmax=1e-4)
    assert list(stages) == [
        *("first minimum", "second minimum", "band", "saddle point"),
        *("path reverse", "path forward", "one end", "other end"),
    ]
    assert min(list(stages.values())[:6]) > 1  # the path leads to minima
    monkeypatch.setattr(record, "SECONDS_BETWEEN_FILES", 0.0)
    cut, continued, seen, left = set(), set(), set(), 0

    def killed(self, stage, number, force, state=None):
        nonlocal left
        if stage not in seen and 0 < number < stages[stage]:
            continued.add(stage)
        seen.add(stage)
        step(self, stage, number, force, state)
        left -= 1
        if left < 0:
            cut.add(stage)
            raise Cut

    monkeypatch.setattr(record.Record, "step", killed)
    for number_of_cut, lives in enumerate(([35, 20], [2, 9, 11, 20], [9, 5, 16])):
        run = tmp_path / f"cut{number_of_cut}"
        for steps in itertools.islice(itertools.cycle(lives), 100):
            left = steps
            seen.clear()
            with contextlib.suppress(Cut):
                files.reaction(*arguments, run, fmax=1e-4)
                break
            assert (run / files.UNFINISHED).exists()
        assert results(run) == results(tmp_path / "whole")
    assert cut >= {"first minimum", "band", "saddle point", "path reverse", "path forward"}
    assert continued >= {"band", "saddle point", "path reverse", "path forward"}


def test_an_unfinished_search_of_something_else_is_refused(tmp_path, capsys):
    files_given = two_minima(tmp_path)
    out = tmp_path / "out"
    held = record.Record(out / files.UNFINISHED)
    frames = ase.io.read(files_given[1], ":")
    given = {"fmax": 1e-3, "steps": 500, "images": 9}
    held.begin(files._inputs(frames, files_given[0], None, **given))
    command = ["saddle", *map(str, files_given), "-o", str(out)]
    assert main([*command, "--images", "5", "--fmax", "0.01"]) == 2
    said = capsys.readouterr().err
    assert "unfinished: holds an unfinished search with another fmax, images: give the same, choose another" in said
    model_file.save(files_given[0], model(14))
    assert main(command) == 2
    assert "holds an unfinished search with another model" in capsys.readouterr().err
    (out / files.UNFINISHED / "inputs.json").write_text("{")
    assert main(command) == 2
    assert "inputs.json: cannot be read" in capsys.readouterr().err
    model_file.save(files_given[0], model())
    held.remove()
    held.begin(files._inputs(frames, files_given[0], None, **given))
    assert main(command) == 0
    assert "goes on where it was" in capsys.readouterr().out
    assert results(out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["saddle.xyz", "-o", "."], "saddle.xyz: is what is read and would be overwritten"),
        (["in.xyz", "-o", "mine"], "mine/path.xyz: was not written by a search before"),
        (["in.xyz", "-o", "in.xyz"], "in.xyz: cannot be made, or written (File exists)"),
        (["in.xyz", "-o", "new", "--fmax", "nan"], "give a force above 0 and at least 1 step"),
        (["in.xyz", "-o", "new", "--steps", "0"], "give a force above 0 and at least 1 step"),
        (["in.xyz", "-o", "new", "--images", "0"], "0 images: give a number of at least 1"),
    ],
)
def test_what_is_there_stays(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    model_file.save(tmp_path / "m.pt", model())
    for name in ("in.xyz", "saddle.xyz"):
        ase.io.write(tmp_path / name, flat(), format="xyz")
    (tmp_path / "mine").mkdir()
    for name in ("mine/path.xyz", "mine/.other.part"):
        (tmp_path / name).write_text("of somebody")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["saddle", "m.pt", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_steps_are_shown_on_a_terminal(tmp_path):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    files.reaction(*two_minima(tmp_path), tmp_path / "out", console=console)
    text = shown.getvalue()
    for stage in ("first minimum", "band", "saddle point", "path reverse", "other end"):
        assert stage in text
    assert "of at most 500, largest force" in text


def start(folder: Path, arguments: tuple[Path, Path]) -> subprocess.Popen:
    command = [sys.executable, "-m", "kinml_fast.cli", "saddle", *map(str, arguments), "-o", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    arguments = two_minima(tmp_path)
    process = start(tmp_path / "whole", arguments)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    run, generator, killed = tmp_path / "cut", random.Random(0), 0
    while killed < KILLS:
        process = start(run, arguments)
        if not kill(process, None if killed % 5 == 4 else run, generator.uniform(0, 1.0 if killed % 2 else 0.2)):
            break
        killed += 1
    assert killed > 0
    process = start(run, arguments)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert results(run) == results(tmp_path / "whole")


def test_a_second_search_in_the_folder_is_refused(tmp_path, capsys):
    (out := tmp_path / "out").mkdir()
    descriptor = os.open(out / lock.NAME, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, b"process 1 on somewhere,")
    assert main(["saddle", *map(str, two_minima(tmp_path)), "-o", str(out)]) == 2
    os.close(descriptor)
    assert "out: process 1 on somewhere, works there: wait for its end" in capsys.readouterr().err


def test_a_signal_says_how_to_go_on(tmp_path):
    arguments = two_minima(tmp_path)
    process = start(tmp_path / "out", arguments)
    while not (tmp_path / "out" / files.UNFINISHED / "inputs.json").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert f"what is done is in {tmp_path / 'out'}: continue with the same command" in said
    assert (tmp_path / "out" / files.UNFINISHED).exists()


def test_a_disk_that_is_full_loses_nothing(tmp_path, monkeypatch):
    arguments = two_minima(tmp_path)
    files.reaction(*arguments, tmp_path / "whole")
    keep = record.Record.keep

    def full(self, stage, state):
        if stage == "path forward":
            raise InputError("could not be written (No space left on device)")
        keep(self, stage, state)

    monkeypatch.setattr(record.Record, "keep", full)
    with pytest.raises(InputError, match="No space left"):
        files.reaction(*arguments, tmp_path / "out")
    kept = {path.name for path in (tmp_path / "out" / files.UNFINISHED).iterdir()}
    assert kept >= {"first-minimum.json", "band.json", "saddle-point.json", "path-reverse.json"}
    monkeypatch.undo()
    files.reaction(*arguments, tmp_path / "out")
    assert results(tmp_path / "out") == results(tmp_path / "whole")
