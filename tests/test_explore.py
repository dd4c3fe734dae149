"""Explorations: labels by processes that fail, geometries that are chosen, whole runs, cut off anywhere."""

from __future__ import annotations

import csv
import io
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed
from ase.data import covalent_radii
from label_calculators import Deeper, Springs
from rich.console import Console
from scipy.spatial.distance import pdist
from training_helpers import kill

from kinml_fast import KinMLCalculator, report
from kinml_fast.cli import main
from kinml_fast.data import Selection, read
from kinml_fast.deploy import calibrate, members, model_file
from kinml_fast.errors import ConfigError, DataError, InputError
from kinml_fast.explore import calculators, data, labels, sampling, selection
from kinml_fast.explore import config as configuration
from kinml_fast.explore import report as explore_report
from kinml_fast.explore.config import GeometriesConfig, LabelsConfig, SamplingConfig, SelectionConfig
from kinml_fast.explore.folder import ExploreFolder, read_json
from kinml_fast.explore.geometry import Geometry, broken
from kinml_fast.explore.rounds import explore
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble
from kinml_fast.train.progress import LiveProgress

KILLS = int(os.environ.get("KINML_KILLS", "3"))
"""How often an exploration is killed."""
SPRINGS = "label_calculators:Springs"
SMALL = """\
geometries: {files: start.xyz, count: 16, temperatures: [300, 1000]}
labels: {calculator: "label_calculators:Springs", validation: 0.25}
sampling: {temperatures: [300, 1000], trajectories: 1, steps: 60, every: 10, modes: 6}
selection: {lower: 0.0, upper: 100, most: 6, distinct: 1.0e-4}
rounds: {most: 2, fewest: 2}
descriptor: {n_radial: 4, n_angular: 2, n_sections: 2}
network: {layers: [6, 1]}
training: {epochs: 40, checkpoint_seconds: 0.1, optimizer: {learning_rate: 2.0e-2}}
ensemble: {members: 2}
"""


@pytest.fixture(autouse=True)
def _calculators_of_the_tests(monkeypatch):
    """Processes that label find label_calculators."""
    places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    # Drawing takes longer than all that is tested here.
    monkeypatch.setattr(report, "_save", lambda figure, path: path.touch())


def water(count: int = 1, seed: int = 0) -> list[Geometry]:
    rng = np.random.default_rng(seed)
    atoms = molecule("H2O")
    return [
        Geometry(tuple(atoms.symbols), atoms.positions + rng.normal(0, 0.05, (3, 3)), "displaced") for _ in range(count)
    ]


def small(folder: Path, *changes: str, name: str = "run", atoms: Atoms | None = None) -> configuration.ExploreConfig:
    """A small exploration of water in a folder."""
    folder.mkdir(exist_ok=True)
    ase.io.write(folder / "start.xyz", atoms or molecule("H2O"), format="extxyz")
    (folder / "small.yaml").write_text(SMALL.replace("start.xyz", str(folder / "start.xyz")), encoding="utf-8")
    return configuration.load(folder / "small.yaml", [f"run={folder / name}", *changes])


def ensemble(members: int = 2) -> Ensemble:
    torch.manual_seed(0)
    parameters = AEVParameters.aevmod(("H", "O"), n_radial=4, n_angular=2, n_sections=2)
    return Ensemble([EnergyModel(parameters, (6, 1), ("gaussian", "identity")) for _ in range(members)])


def gathered(run: Path) -> dict[str, object]:
    """All that an exploration has gathered, without times and names of folders."""
    folder = ExploreFolder(run)
    files = [*folder.path.glob("round-*/*.json"), *folder.path.glob("round-*/*labels/*.json")]
    structures = read(folder.databases(), Selection(fidelity=1))
    return {
        **{str(file.relative_to(run)): read_json(file) for file in sorted(files)},
        **{str(file.relative_to(run)): file.read_text() for file in sorted(folder.path.glob("round-*/split.txt"))},
        "xyz": folder.xyz.read_text(),
        "energies": structures.energies.tolist(),
        "weights": model_file.load(folder.model).networks.weights.detach().numpy().tobytes(),
    }


def test_an_exploration_gathers_labels_and_trains_on_them(tmp_path):
    ase.io.write(tmp_path / "test.xyz", _labelled(water(5, seed=3)), format="extxyz")
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    config = small(tmp_path, f"test={tmp_path / 'test.xyz'}", "rounds.most=1")
    results = explore(config, LiveProgress(console))
    drawn = console.file.getvalue()
    assert "round 0/1: labelling" in drawn
    assert "16 of 16" in drawn
    assert "round 0/1: member 2/2, epoch 0/39" in drawn
    assert "round 1/1, 16 labels: driving, modes at 1000 K" in drawn
    energy, forces = (results[0]["test"][kind] for kind in ("energy", "forces"))
    assert f"4 of 4, test RMSE {energy:.2f} kcal/mol, {forces:.2f} kcal/mol/Å" in drawn
    folder = ExploreFolder(tmp_path / "run")
    more = len(read_json(folder.round(1).chosen)["geometries"])
    assert 2 <= more <= 6
    assert [one["labels"] for one in results] == [[16], [16 + more]]
    assert [one["end"] for one in results] == [False, False]
    assert all(one["test"]["energy"] > 0 and one["validation"]["forces"] > 0 for one in results)
    assert len(results[1]["surprises"]) == more
    frames = ase.io.read(folder.xyz, ":")
    assert [frame.info["round"] for frame in frames] == [0] * 16 + [1] * more
    assert {frame.info["source"] for frame in frames} > {"start", "displaced"}
    structures = read(folder.databases(), Selection())
    for i, frame in enumerate(frames):
        again = Atoms(frame.symbols, frame.positions, calculator=Springs())
        assert frame.get_potential_energy() == pytest.approx(again.get_potential_energy(), abs=1e-6)
        assert structures.energies[i] == pytest.approx(again.get_potential_energy(), abs=1e-6)
        atoms = slice(structures.offsets[i], structures.offsets[i + 1])
        np.testing.assert_allclose(structures.forces[atoms], again.get_forces(), atol=1e-6)
    names = [read(folder.databases(), Selection(names=[f"round-00{i}/%"])).labels for i in range(2)]
    assert [len(one) for one in names] == [16, more]
    # A structure is validated on in all rounds or in none.
    of_rounds = [
        {line.split()[0]: line.split()[3] for line in folder.round(i).split.read_text().splitlines()} for i in range(2)
    ]
    assert of_rounds[0].items() < of_rounds[1].items()
    assert list(of_rounds[1].values()).count("validation") == (16 + more) // 4
    assert model_file.load(folder.model).n_members == 2
    assert {path.name for path in folder.report.iterdir()} == {"rounds.csv", "rounds.png", "surprises.png"}
    # The models of a round begin with those before.
    before, first = (model_file.load(folder.round(i).model / "model.pt") for i in (0, 1))
    assert torch.equal(before.sae, first.sae)
    log = (folder.round(1).model / "member-2" / "train.log").read_text()
    assert f"starts from {folder.round(0).model}/member-2/model.pt" in log


def _labelled(geometries: list[Geometry]) -> list[Atoms]:
    frames = []
    for one in geometries:
        atoms = Atoms(one.symbols, one.positions, calculator=Springs())
        atoms.get_forces()
        frames.append(atoms)
    return frames


@pytest.mark.slow
def test_an_exploration_ends_when_little_is_uncertain_and_is_not_done_again(tmp_path, caplog):
    config = small(tmp_path, "selection.lower=99", "rounds.most=5", "sampling.trajectories=0")
    results = explore(config)
    assert [one["end"] for one in results] == [False, True]
    assert [one["found"] for one in results] == [16, 0]
    assert not (tmp_path / "run/round-001/model").exists()  # there was nothing to learn
    assert results[1]["counts"]["modes"]["certain"] == results[1]["counts"]["modes"]["seen"] > 0
    before = gathered(tmp_path / "run")
    with caplog.at_level("INFO"):
        assert explore(config) == results
    assert gathered(tmp_path / "run") == before
    assert "fewer than 2 structures are uncertain" in caplog.text


@pytest.mark.slow
def test_where_all_is_lost_the_nearest_are_taken(tmp_path):
    changes = ["selection.upper=1e-3", "rounds.most=1", "training.epochs=10"]
    first, second = explore(small(tmp_path, *changes))
    total = second["counts"]["dynamics"]
    assert total["uncertain"] == 0
    assert total["lost"] > 0
    assert 0 < second["found"] <= 6
    values = [one["deviations"][0] for one in read_json(tmp_path / "run/round-001/chosen.json")["geometries"]]
    assert min(values) > 1e-3
    assert first["found"] == 16


@pytest.mark.slow
def test_an_exploration_goes_on_with_more_rounds_but_is_no_other_one(tmp_path):
    whole = explore(small(tmp_path, name="whole"))
    explore(small(tmp_path, "rounds.most=1", name="cut"))
    assert explore(small(tmp_path, "labels.workers=2", name="cut")) == whole
    assert gathered(tmp_path / "whole") == gathered(tmp_path / "cut")
    with pytest.raises(InputError, match=r"another seed, selection\.most: give the same"):
        explore(small(tmp_path, "seed=1", "selection.most=7", name="cut"))


@pytest.mark.slow
def test_two_levels(tmp_path):
    changes = ["labels.upper.calculator=label_calculators:Deeper", "labels.upper.first=0.5", "rounds.most=1"]
    (first, second) = explore(small(tmp_path, *changes, "selection.lower=1e-3"))
    assert first["labels"] == [16, 9]
    chosen = read_json(tmp_path / "run/round-001/chosen.json")["geometries"]
    unsure = [one["deviations"][1] >= 1e-3 for one in chosen]
    assert second["labels"] == [16 + len(chosen), 9 + sum(unsure)]
    structures = read([tmp_path / "run/data/OH2.db"], Selection(fidelity=[0, 1]))
    upper = structures.known_energies[1]
    assert upper.tolist() == [True] + [i % 2 == 1 for i in range(1, 16)] + unsure
    for i in np.flatnonzero(upper):
        atoms = Atoms("OH2", structures.coordinates[structures.offsets[i] : structures.offsets[i + 1]])
        for level, calculator in enumerate((Springs(), Deeper())):
            atoms.calc = calculator
            assert structures.energies[level, i] == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    assert model_file.load(tmp_path / "run" / "model.pt").fidelities == (0, 1)


@pytest.mark.slow
def test_of_two_levels_deviations_are_those_of_the_difference_with_its_factor(tmp_path):
    changes = ["labels.upper.calculator=label_calculators:Deeper", "labels.upper.first=1", "selection.lower=1e-3"]
    config = small(tmp_path, *changes, "rounds.most=0")
    explore(config)
    folder = ExploreFolder(tmp_path / "run")
    ensemble = model_file.load(folder.model)
    validation = data.validation(folder, config.labels)
    assert len(validation) == 4
    steps = calibrate.fit_steps(ensemble, validation)
    explore(config.model_copy(update={"rounds": config.rounds.model_copy(update={"most": 1})}))
    atoms = [Geometry(**values) for values in read_json(folder.round(1).chosen)["geometries"]]
    species = np.array([ensemble.elements.index(symbol) for symbol in atoms[0].symbols])
    for one in atoms:
        _, forces = members.energies_and_forces(
            ensemble,
            torch.from_numpy(one.positions).to(ensemble.dtype),
            torch.from_numpy(species),
            torch.tensor([0, len(species)]),
        )
        difference = np.std(forces[:, 1] - forces[:, 0], axis=0, ddof=1)
        expected = np.linalg.norm(difference, axis=1) * np.array(steps.forces[1])[species]
        assert one.deviations[1] == pytest.approx(expected.max(), rel=1e-4)
    assert steps.forces[1] != pytest.approx(ensemble.calibration.forces[1], rel=0.1)


@pytest.mark.parametrize(("structures", "epochs"), [(18, 1250), (248, 100), (10000, 100)])
def test_few_structures_are_trained_for_as_many_steps_as_more(structures, epochs):
    config = configuration.with_values({"run": "x", "geometries": {"files": ["x.xyz"]}}, "here")
    made = config.of_training(Path("run"), [Path("a.db")], Path("split"), structures, None)
    assert made.training.epochs == epochs
    fixed = config.model_copy(update={"training": config.training.model_copy(update={"epochs": 7})})
    assert fixed.of_training(Path("run"), [Path("a.db")], Path("split"), structures, None).training.epochs == 7


def test_the_report(tmp_path, monkeypatch):
    monkeypatch.undo()
    counts = {"seen": 30, "certain": 11, "uncertain": 12, "lost": 2, "broken": 5}
    first = {"round": 0, "structures": 16, "labels": [16], "failed": 0, "added": {"start": 1, "displaced": 15}}
    first |= {"counts": {}, "duplicates": 0, "left": 0, "surprises": [], "test": {}, "end": False}
    first |= {"validation": {"energy": 2.0, "forces": 5.0, "deviation": 1.0}}
    second = first | {"round": 1, "labels": [22], "counts": {"dynamics": counts, "modes": counts}, "duplicates": 4}
    second |= {"added": {"dynamics": 6}, "surprises": [[0.1, 0.2], [0.3, 0.1]], "failed": 1}
    config = configuration.with_values({"run": "x", "geometries": {"files": ["x.xyz"]}}, "here")
    explore_report.write(ExploreFolder(tmp_path), config, [first, second])
    for name in ("rounds.png", "surprises.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "report" / "rounds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1]["broken"] == "10"
    assert rows[1]["seen"] == "60"
    assert [row["labels"] for row in rows] == ["16", "22"]
    assert [row["validation_forces"] for row in rows] == ["5.0", "5.0"]


# Labels


def test_labels_do_not_depend_on_processes_and_order(tmp_path):
    geometries = water(9)
    one = labels.label(geometries, SPRINGS, {}, LabelsConfig(workers=1), tmp_path / "one")
    for number in (2, 5):  # as if those had been labelled first
        (tmp_path / "three").mkdir(exist_ok=True)
        name = f"{number:05}.json"
        (tmp_path / "three" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    three = labels.label(geometries, SPRINGS, {}, LabelsConfig(workers=3), tmp_path / "three")
    for a, b, geometry in zip(one, three, geometries, strict=True):
        atoms = geometry.atoms
        atoms.calc = Springs()
        assert a.energy == b.energy == atoms.get_potential_energy()
        assert a.forces.tolist() == b.forces.tolist() == atoms.get_forces().tolist()
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == [f"{i:05}.json" for i in range(9)]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise", "RuntimeError: did not converge"),
        ("nan", "an energy or force is NaN or infinite"),
        ("crash", "the process of the calculator ended by signal SIGSEGV"),
        ("hang", "took more than 1 s"),
    ],
)
def test_each_failure_is_recorded_and_tried_once_more(tmp_path, fault, said):
    geometries = water(6)
    faulty = [sum(one.positions.tobytes()) % 3 == 0 for one in geometries]
    assert 0 < sum(faulty) < 6
    options = {"fault": fault}
    settings = LabelsConfig(seconds=1.0, workers=2)
    found = labels.label(geometries, SPRINGS, options, settings, tmp_path / "always")
    assert [one.failures for one in found] == [(said, said) if bad else () for bad in faulty]
    assert [one.energy is None for one in found] == faulty
    left = [path.name for path in (tmp_path / "always").iterdir() if path.is_dir()]
    assert sorted(left) == [f"{i:05}" for i, bad in enumerate(faulty) if bad]
    (tmp_path / "marks").mkdir()
    options["once"] = str(tmp_path / "marks")
    found = labels.label(geometries, SPRINGS, options, settings, tmp_path / "once")
    assert [one.failures for one in found] == [(said,) if bad else () for bad in faulty]
    assert all(one.energy is not None for one in found)


@pytest.mark.parametrize(
    ("calculator", "options", "sentence"),
    [
        ("nonsense", {}, "the calculator nonsense cannot be made .* give tblite:METHOD"),
        ("label_calculators:Absent", {}, "AttributeError"),
        (SPRINGS, {"colour": 3}, "colour"),
    ],
)
def test_calculators_that_cannot_be_made(tmp_path, calculator, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        labels.label(water(), calculator, options, LabelsConfig(), tmp_path / "labels")


def test_a_model_and_calculators_of_ase_label(tmp_path):
    model_file.save(tmp_path / "model.pt", ensemble())
    geometries = water(2)
    found = labels.label(geometries, str(tmp_path / "model.pt"), {}, LabelsConfig(), tmp_path / "model")
    expected = KinMLCalculator(tmp_path / "model.pt").get_property("energy", geometries[0].atoms)
    assert found[0].energy == expected
    assert all(one.energy is not None for one in labels.label(geometries, "emt", {}, LabelsConfig(), tmp_path / "emt"))


def test_tblite_labels_with_options(tmp_path):
    ase_tblite = pytest.importorskip("tblite.ase")
    (one,) = water()
    (found,) = labels.label([one], "tblite:GFN2-xTB", {"charge": 1.0}, LabelsConfig(), tmp_path / "labels")
    atoms = one.atoms
    atoms.calc = ase_tblite.TBLite(method="GFN2-xTB", charge=1.0, verbosity=0)
    assert found.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    atoms.calc = ase_tblite.TBLite(method="GFN2-xTB", verbosity=0)
    assert abs(found.energy - atoms.get_potential_energy()) > 1


@pytest.mark.parametrize("level", ["HF/sto-3g", "MP2/sto-3g", "CCSD/sto-3g", "PBE/sto-3g"])
@pytest.mark.parametrize("name", ["H2O", "CH3"])
def test_pyscf_labels(level, name):
    pytest.importorskip("pyscf", reason="pip install pyscf")
    atoms = molecule(name)
    atoms.rattle(0.05, seed=1)
    energies = []
    for shift in (2e-3, -2e-3, 0):
        moved = atoms.copy()
        moved.positions[1, 1] += shift
        moved.calc = calculators.make(f"pyscf:{level}", {})
        energies.append(moved.get_potential_energy())
    assert moved.get_forces()[1, 1] == pytest.approx((energies[1] - energies[0]) / 4e-3, abs=1e-3)


def test_what_pyscf_cannot_label(monkeypatch):
    pytest.importorskip("pyscf", reason="pip install pyscf")
    with pytest.raises(ConfigError, match="pyscf:B3LYP: is not of the form pyscf:METHOD/BASIS"):
        calculators.make("pyscf:B3LYP", {})
    with pytest.raises(ConfigError, match=r"unexpected keyword argument 'multiplicity'"):
        calculators.make("pyscf:HF/sto-3g", {"multiplicity": 2})
    water = molecule("H2O")
    water.calc = calculators.make("pyscf:HF/sto-3g", {"mult": 2})
    with pytest.raises(CalculationFailed, match="has 10 electrons, which the multiplicity 2 does not fit"):
        water.get_potential_energy()
    water.calc = calculators.make("pyscf:HF/sto-3g", {"charge": 1})
    ion = water.get_potential_energy()
    water.calc = calculators.make("pyscf:HF/sto-3g", {})
    assert 5 < ion - water.get_potential_energy() < 20
    water.positions *= 4
    monkeypatch.setattr("pyscf.scf.hf.SCF.max_cycle", 1)
    with pytest.raises(CalculationFailed, match="did not converge"):
        water.get_potential_energy()


def test_nothing_that_can_be_labelled(tmp_path):
    with pytest.raises(DataError, match=r"could label none of 2 structures \(PropertyNotImplementedError"):
        labels.label(water(2), "label_calculators:WithoutForces", {}, LabelsConfig(), tmp_path / "labels")
    ammonia = small(tmp_path, atoms=molecule("NH3"))
    with pytest.raises(DataError, match=r"could label none .* no springs for NH3\): correct"):
        explore(ammonia)


# Geometries


def test_broken_geometries():
    atoms = molecule("H2O")
    assert not broken(atoms, 1)
    apart = atoms.copy()
    apart.positions[1] += 3.0
    assert broken(apart, 1)
    assert not broken(apart, 2)
    close = atoms.copy()
    close.positions[1] = close.positions[0] + 0.4
    close.positions[2] = close.positions[0] - [0, 0, 0.4]
    assert broken(close, 3)


def test_displaced_geometries_have_the_energy_of_their_temperature_in_the_springs():
    start = Geometry(("O",) + ("H",) * 2, molecule("H2O").positions, "start")
    settings = GeometriesConfig(files=["x"], count=601, temperatures=[300.0, 1000.0])
    found = sampling.displaced([start], settings, seed=4)
    assert found[0] is start
    constants = sampling.springs(start)
    for temperature in (300.0, 1000.0):
        moves = np.array(
            [(one.positions - start.positions).ravel() for one in found[1:] if one.temperature == temperature]
        )
        assert len(moves) == 300
        # kT/2 for each degree of freedom; the few that are broken were drawn again.
        energies = np.einsum("ni,ij,nj->n", moves, constants, moves) / 2
        assert energies.mean() == pytest.approx(9 * 8.617333e-5 * temperature / 2, rel=0.08)
    again = sampling.displaced([start], settings.model_copy(update={"count": 5}), seed=4)
    assert [one.to_dict() for one in again] == [one.to_dict() for one in found[:5]]
    with pytest.raises(DataError, match="falls apart whenever its atoms are displaced as at 1e\\+07 K"):
        sampling.displaced([start], settings.model_copy(update={"temperatures": [1e7]}), seed=4)


def test_springs_are_second_derivatives():
    start = Geometry(("O", "H", "H", "H"), np.random.default_rng(0).normal(0, 1, (4, 3)), "start")
    radii = covalent_radii[start.atoms.numbers]
    a, b = np.triu_indices(4, 1)
    lengths = pdist(start.positions)
    constants = 43.7 * np.exp((radii[a] + radii[b]) ** 2 - lengths**2)

    def energy(moves):
        stretches = pdist(start.positions + moves.reshape(4, 3)) - lengths
        return (constants * stretches**2).sum() / 2 + 3.0 * (moves**2).sum() / 2

    step, found = 1e-3 * np.eye(12), sampling.springs(start)
    for i, j in np.ndindex(12, 12):
        signs = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
        second = sum(x * y * energy(x * step[i] + y * step[j]) for x, y in signs) / 4e-6
        assert found[i, j] == pytest.approx(second, abs=2e-3 * abs(found).max())


def test_the_farthest_are_taken_first_and_near_duplicates_are_not():
    rng = np.random.default_rng(0)
    known, candidates = rng.normal(size=(5, 3)), rng.normal(size=(40, 3))
    candidates[30:] = candidates[:10] + 1e-4
    taken, left = selection.farthest(candidates, known, 12, 0.01)
    others = list(known)
    for row in taken:
        distances = [min(np.linalg.norm(one - other) for other in others) for one in candidates]
        assert distances[row] == pytest.approx(max(distances))
        others.append(candidates[row])
    assert len(taken) == 12
    everything, none = selection.farthest(candidates, known, 100, 0.01)
    assert len(everything) == 30
    assert none == 0
    distances = [min(np.linalg.norm(candidates[i] - candidates[j]) for j in taken) for i in range(40)]
    near_known = [min(np.linalg.norm(candidates[i] - other) for other in known) for i in range(40)]
    assert left == sum(min(a, b) >= 0.01 for a, b in zip(distances, near_known, strict=True))
    assert selection.farthest(np.empty((0, 0)), known, 3, 0.0) == ([], 0)


def test_fingerprints_do_not_depend_on_places_and_order():
    model = ensemble()
    (one, other) = water(2)
    turned = one.atoms
    turned.rotate(40, (1, 2, 3))
    turned.translate((1, 2, 3))
    turned = turned[[0, 2, 1]]
    same = Geometry(tuple(turned.symbols), turned.positions, "start")
    rows = selection.fingerprints([one, same, other], model)
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-12)
    assert np.linalg.norm(rows[0] - rows[2]) > 1e-3
    assert selection.fingerprints([], model).shape == (0, 0)


def test_samples_are_those_of_their_item_and_classes_of_the_window():
    calculator = KinMLCalculator(ensemble(3))
    start = Geometry(("O", "H", "H"), molecule("H2O").positions, "start")
    settings = SamplingConfig(temperatures=[30.0], trajectories=2, steps=40, every=5, timestep=0.05, modes=7)
    todo = sampling.items([start], settings)
    assert [(item.source, item.number) for item in todo] == [("dynamics", 0), ("dynamics", 1), ("modes", 2)]
    everything = SelectionConfig(lower=0.0, upper=1e9)
    found = [sampling.Sampler(calculator, settings, everything).run(item, [0, 1])[0] for item in todo]
    alone = sampling.Sampler(calculator, settings, everything).run(todo[1], [0, 1])[0]
    assert [one.to_dict() for one in alone] == [one.to_dict() for one in found[1]]
    assert not np.array_equal(found[0][0].positions, found[1][0].positions)
    for one in found[0]:
        forces = [KinMLCalculator(calculator.model.member(i)).get_property("forces", one.atoms) for i in range(3)]
        expected = np.linalg.norm(np.std(forces, axis=0, ddof=1), axis=1).max()
        assert one.deviations == pytest.approx([expected])
    values = sorted(one.deviations[0] for one in found[0])
    window = SelectionConfig(lower=values[1], upper=1e9)
    kept, counts = sampling.Sampler(calculator, settings, window).run(todo[0], [0, 1])
    assert counts.certain == 1
    assert len(kept) == counts.uncertain == counts.seen - 1
    # Above the window a trajectory ends.
    first = found[0][0].deviations[0]
    kept, counts = sampling.Sampler(calculator, settings, SelectionConfig(lower=0.0, upper=first * 0.99)).run(
        todo[0], [0, 1]
    )
    assert (counts.seen, counts.lost) == (1, 1)
    assert [one.deviations for one in kept] == [(first,)]


def test_saddle_points_between_geometries_and_near_guesses(monkeypatch, caplog):
    calculator = KinMLCalculator(ensemble())
    (a, b, other) = water(3)
    starts = [replace(a, source="start"), replace(b, source="start", molecule=1), replace(other, source="guess")]
    starts.append(Geometry(("O", "O"), [[0, 0, 0], [0, 0, 1.2]], "start", 3))
    settings = SamplingConfig(trajectories=0, modes=0, saddles=True)
    todo = sampling.items(starts, settings)
    assert [(item.start.source, item.start.molecule, getattr(item.other, "molecule", None)) for item in todo] == [
        ("guess", 0, None),
        ("start", 0, 1),
    ]
    sampler = sampling.Sampler(calculator, settings, SelectionConfig(lower=0.0, upper=1e9))
    band = molecule("H2O")
    monkeypatch.setattr(sampler, "minimum", lambda start: SimpleNamespace(atoms=start.atoms))
    monkeypatch.setattr(sampling.saddle, "between", lambda first, second, calculator, steps: band)
    monkeypatch.setattr(sampling.saddle, "search", lambda guess, calculator, **options: (guess, 3))
    path = SimpleNamespace(frames=[other.atoms, band])
    monkeypatch.setattr(sampling.saddle, "follow", lambda found, calculator, **options: path)
    found, _ = sampler.run(todo[1], [0, 1])
    assert [one.positions.tolist() for one in found] == [x.positions.tolist() for x in (band, other.atoms, band)]
    assert {one.source for one in found} == {"saddle"}
    assert len(sampler.run(todo[0], [0, 1])[0]) == 2

    def lost(guess, calculator, **options):
        raise np.linalg.LinAlgError("singular")

    monkeypatch.setattr(sampling.saddle, "search", lost)
    with caplog.at_level("INFO"):
        assert len(sampler.run(todo[1], [0, 1])[0]) == 1
        assert sampler.run(todo[0], [0, 1])[0] == []
    assert "the search for a saddle point ends early (singular)" in caplog.text


def test_saddle_points_without_sella(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sampling\.saddles needs Sella, which is not installed"):
        explore(small(tmp_path, "sampling.saddles=true"))


def test_a_minimum_that_dissociates_is_said_and_sampled_around_the_start(caplog):
    torch.manual_seed(1)
    start = Geometry(("O", "H", "H"), molecule("H2O").positions, "start")
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = EnergyModel(
            AEVParameters.aevmod(("H", "O"), n_radial=4, n_angular=2, n_sections=2), (1,), ("identity",)
        )
        with torch.no_grad():
            model.networks.weights.fill_(0.5 + 0.1 * seed)  # atoms repel each other
        models.append(model)
    settings = SamplingConfig(temperatures=[300.0], trajectories=1, steps=10, every=5, modes=3)
    sampler = sampling.Sampler(KinMLCalculator(Ensemble(models)), settings, SelectionConfig(lower=0.0, upper=1e9))
    with caplog.at_level("INFO"):
        found = [sampler.run(item, [0, 1]) for item in sampling.items([start], settings)]
    assert "samples begin at the start, as there is no minimum (H2O falls apart" in caplog.text.replace("OH2", "H2O")
    assert found[0][1].seen > 0
    assert found[1][1].seen == 0


# Mistakes, and what cuts an exploration off


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("training.loss.forces=false", "training.loss.forces is false"),
        ("selection.lower=200", "lower must be smaller than upper, which is 100"),
        ("selection.upperr=3", "unknown key selection.upperr: did you mean selection.upper?"),
        ("ensemble.members=1", "ensemble.members"),
        ("geometries.files=none.xyz", "none.xyz"),
    ],
)
def test_mistakes_are_said_in_a_sentence(tmp_path, capsys, change, sentence):
    small(tmp_path)
    assert main(["explore", str(tmp_path / "small.yaml"), f"run={tmp_path / 'run'}", change]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.strip().splitlines()) == 1


def test_a_wrong_configuration_leaves_no_folder(tmp_path):
    for change in (
        "labels.calculator=nonsense",
        "test=none.xyz",
        "geometries.files=none.xyz",
        f"test={tmp_path / 'small.yaml'}",
    ):
        with pytest.raises(InputError):
            explore(small(tmp_path, change))
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(ConfigError):
        explore(small(tmp_path, "labels.calculator=nonsense"))
    assert (tmp_path / "run" / "mine").exists()


def test_what_was_wrong_is_corrected_in_the_same_folder(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError):
        explore(small(tmp_path, "labels.calculator=nonsense"))
    results = explore(small(tmp_path, "geometries.count=9", "rounds.most=0", "training.epochs=2"))
    assert results[0]["labels"] == [9]
    with pytest.raises(InputError, match=r"another geometries\.count: give the same"):
        explore(small(tmp_path, "geometries.count=8", "rounds.most=0", "training.epochs=2"))


def test_geometries_that_cannot_be_explored(tmp_path):
    crystal = molecule("H2O", vacuum=3.0, pbc=True)
    with pytest.raises(DataError, match="frame 1: is periodic"):
        explore(small(tmp_path, atoms=crystal))
    with pytest.raises(DataError, match="frame 1: has 1 atoms"):
        explore(small(tmp_path, atoms=Atoms("O")))


def start(config: Path, run: Path, *changes: str, limit: int | None = None) -> subprocess.Popen:
    """`kinml-fast explore` as a process of its own, which may write files of no more than some bytes."""
    program = "from kinml_fast.cli import main\nimport sys\n"
    if limit is not None:
        program += f"import resource, signal\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        program += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    command = [sys.executable, "-c", program + "sys.exit(main(sys.argv[1:]))", "explore", str(config), f"run={run}"]
    return subprocess.Popen([*command, *changes], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path):
    explore(small(tmp_path, name="whole"))
    for limit in (300, 2000, 12000):
        process = start(tmp_path / "small.yaml", tmp_path / "cut", limit=limit)
        _, said = process.communicate(timeout=600)
        assert process.returncode == 2, said
        assert "could not be written" in said
    explore(small(tmp_path, name="cut"))
    assert gathered(tmp_path / "whole") == gathered(tmp_path / "cut")


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    changes = ["labels.workers=2", "labels.options={fault: raise, every: 7, pause: 0.05}", "rounds.fewest=1"]
    changes.append(f"rounds.most={1 + KILLS // 3}")
    explore(small(tmp_path, *changes, name="whole"))
    run, generator, killed = tmp_path / "cut", random.Random(0), 0
    while killed < KILLS:
        process = start(tmp_path / "small.yaml", run, *changes)
        # Every fifth moment lies anywhere from the start of the process on, the others after it has written something.
        if not kill(process, None if killed % 5 == 4 else run, generator.uniform(0, 2)):
            break
        killed += 1
    process = start(tmp_path / "small.yaml", run, *changes)
    _, said = process.communicate(timeout=1800)
    assert process.returncode == 0, said
    assert killed == KILLS
    assert gathered(tmp_path / "whole") == gathered(run)
    assert list(run.rglob("*.part")) == []


def test_interrupted_by_a_signal(tmp_path):
    small(tmp_path)
    process = start(tmp_path / "small.yaml", tmp_path / "run", "labels.options={pause: 0.3}")
    while not list((tmp_path / "run").glob("round-000/labels/*.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "continue with the same command" in said
    assert 0 < len(list((tmp_path / "run").glob("round-000/labels/*.json"))) < 16
