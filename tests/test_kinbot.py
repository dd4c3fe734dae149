"""KinBot with models: its own templates, a search from start to MESS input, and what an ensemble measures."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.db import connect
from ase.vibrations import Vibrations

from kinml_fast import KinMLCalculator
from kinml_fast.cli import main
from kinml_fast.deploy import model_file
from kinml_fast.kinetics import kinbot, nn_pes, vibrate
from kinml_fast.kinetics.kinbot import Point
from kinml_fast.nn import AEVParameters, Calibration, EnergyModel, Ensemble

pytest.importorskip("sella", reason="pip install sella")
package = pytest.importorskip("kinbot", reason="pip install kinbot")

TEMPLATES = Path(package.__file__).parent / "tpl"
MASSES = {"C": 12.0, "H": 1.00782503207}
"""KinBot's, of one isotope."""

VINYL = Atoms("C2H3", [[0, 0, 0], [1.3, 0, 0], [-0.57, 0.93, 0], [-0.57, -0.93, 0], [1.98, 0.85, 0]])
CHEMID = "270630410040000000002"
"""KinBot's name for it."""
LINEAR = Atoms("C2H3", [[0, 0, 0], [1.29, 0, 0], [-0.57, 0.93, 0], [-0.57, -0.93, 0], [2.37, 0.02, 0]])
"""Near the saddle point at which the single hydrogen goes from one side to the other."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Two models of vinyl, good enough to have its minima and the saddle point between them."""
    folder = tmp_path_factory.mktemp("models")
    config = folder / "c.yaml"
    config.write_text(
        "data: {files: ['shipped:C2H3.db', 'shipped:C2H2.db'], split: [0.95, 0.05, 0]}\n"
        "network: {layers: [24, 12, 1]}\n"
        "training: {epochs: 300, batch_size: 10, loss: {forces: true, force_weight: 0.7},\n"
        "  optimizer: {name: adam, learning_rate: 1.0e-2}, scheduler: {name: cosine}}\n"
    )
    for seed in (0, 1):
        assert main(["train", str(config), f"run={folder / f'run{seed}'}", f"network.seed={seed}"]) == 0
    return [str(folder / f"run{seed}" / "model.pt") for seed in (0, 1)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with those that KinBot makes."""
    monkeypatch.chdir(tmp_path)
    for name in ("perm/hir", "perm/conf", "hir", "conf"):
        Path(name).mkdir(parents=True)
    return tmp_path


def random_model(elements=("C", "H", "N", "O"), seed: int = 2) -> EnergyModel:
    torch.manual_seed(seed)
    descriptor = AEVParameters.aevmod(elements, n_radial=8, n_angular=4, n_sections=4)
    return EnergyModel(descriptor, (8, 1), ("gaussian", "identity"))


def filled(name: str, job: str, atoms: Atoms, files: list[str], **options: object) -> str:
    """A script as KinBot writes it, with what `_queue` has it import."""
    values = {
        "label": job,
        "working_dir": str(Path.cwd()),
        "atom": list(atoms.symbols),
        "geom": atoms.positions.tolist(),
        "kwargs": {"fname": files},
        "prod_kwargs": {"fname": files},
        "sella_kwargs": {"internal": False, "gamma": 0.0},
        "code": "nn_pes",
        "Code": "Nn_surr",
        "order": 0,
        "fmax": 0.005,
        "steps": 250,
        "fix": [],
        "change": [],
    }
    return (TEMPLATES / f"ase_sella_{name}.tpl.py").read_text().format(**(values | options))


def ours(text: str) -> str:
    for theirs, own in kinbot._IMPORTS.items():
        text = text.replace(theirs, own)
    return text


def row(name: str):
    return list(connect("kinbot.db").select(name=name))[-1]


@pytest.mark.slow
@pytest.mark.parametrize("members", [1, 2])
def test_a_minimum_has_the_energy_and_the_frequencies_of_the_model(models, folder, members):
    files = models[:members]
    assert kinbot._run_script("well", ours(filled("opt_well", "well", VINYL, files))) is None
    found = row("well")
    assert found.data.status == "normal"
    calculator = KinMLCalculator(files)
    assert found.data.energy == pytest.approx(calculator.get_property("energy", found.toatoms()), abs=1e-9)
    atoms = Atoms(found.symbols, found.positions, masses=[MASSES[s] for s in found.symbols])
    expected = vibrate(atoms, calculator, fmax=0.01)
    np.testing.assert_allclose(found.data.frequencies, expected.frequencies, atol=0.05)
    np.testing.assert_allclose(np.array(found.data.hess) * 97.17370087, expected.hessian, atol=1e-9)


@pytest.mark.slow
def test_the_other_templates_run(models, folder):
    # A step of a search for a saddle point, which KinBot would have Gaussian make: two distances are held.
    options = {"code": "gaussian", "Code": "Gaussian", "fix": [[1, 5], [2, 5]]}
    assert kinbot._run_script("search", ours(filled("ts_search", "search", LINEAR, models, **options))) is None
    for pair in ((0, 4), (1, 4)):
        assert row("search").toatoms().get_distance(*pair) == pytest.approx(LINEAR.get_distance(*pair), abs=0.01)

    assert kinbot._run_script("end", ours(filled("ts_end", "end", LINEAR, models))) is None
    saddle = row("end")
    assert saddle.data.status == "normal"
    assert (np.array(saddle.data.frequencies) < 0).sum() == 1
    assert Path("end_vib.xyz").exists()  # from which KinBot takes the imaginary mode
    from kinbot.reader_sella import read_imag_mode

    mode = read_imag_mode("end", 5)
    assert np.linalg.norm(mode, axis=1).argmax() == 4  # the hydrogen that goes to the other side

    ends = []
    for side in "FR":
        script = ours(filled("irc", f"path_IRC_{side}", saddle.toatoms(), models))
        assert kinbot._run_script(f"path_IRC_{side}", script) is None
        assert row(f"path_IRC_{side}_prod").data.status == "normal"
        ends.append(row(f"path_IRC_{side}_prod"))
    assert ends[0].data.energy == pytest.approx(ends[1].data.energy, abs=1e-4)  # mirror images
    assert ends[0].data.energy < saddle.data.energy - 0.03

    turned = VINYL.copy()
    turned.set_dihedral(2, 0, 1, 4, 15, indices=[4])
    assert kinbot._run_script("hir/turned", ours(filled("hir", "hir/turned", turned, models, fix=[3, 1, 2, 5]))) is None
    assert row("hir/turned").data.status == "normal"
    assert row("hir/turned").toatoms().get_dihedral(2, 0, 1, 4) == pytest.approx(15, abs=1)
    assert row("hir/turned").data.energy > ends[0].data.energy

    script = ours(filled("ring_conf", "conf/ring", turned, models, change=[[3, 1, 2, 5, 15.0]]))
    assert kinbot._run_script("conf/ring", script) is None
    assert row("conf/ring").data.energy == pytest.approx(row("hir/turned").data.energy, abs=1e-3)


@pytest.mark.slow
def test_the_file_does_in_the_place_of_kinbots_own(models, folder):
    copied = folder / "site" / "kinbot"
    shutil.copytree(Path(package.__file__).parent, copied)
    shutil.copy(nn_pes.__file__, copied / "ase_modules" / "calculators" / "nn_pes.py")
    Path("well.py").write_text(filled("opt_well", "well", VINYL, models))
    code = f"import sys; sys.path.insert(0, {str(folder / 'site')!r}); exec(open('well.py').read())"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert row("well").data.status == "normal"
    assert len(row("well").data.frequencies) == 9


def test_the_patch_fits_kinbot():
    patch = Path(__file__).resolve().parent.parent / "docs" / "kinbot-2.4.1.patch"
    if version("kinbot") != "2.4.1":
        pytest.skip(f"KinBot is {version('kinbot')}: the patch is for 2.4.1")
    site = Path(package.__file__).parent.parent
    subprocess.run(["git", "apply", "--check", str(patch)], cwd=site, check=True, capture_output=True)


def test_frequencies_take_no_forces_of_displaced_atoms(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model_file.save("m.pt", random_model())
    atoms = molecule("NH3")
    atoms.calc = nn_pes.Nn_surr(["m.pt"], guess="Read")
    from kinbot import frequencies

    expected = Vibrations(atoms, name="differences")
    expected.run()
    monkeypatch.setattr(type(atoms.calc), "calculate", None)
    analytic = frequencies.Vibrations(atoms)
    analytic.run()
    analytic.write_jmol()
    got, wanted = analytic.get_frequencies(), expected.get_frequencies()
    np.testing.assert_allclose(got.real - got.imag, wanted.real - wanted.imag, atol=1)
    assert analytic.get_zero_point_energy() == pytest.approx(expected.get_zero_point_energy(), abs=1e-4)
    assert (tmp_path / "vib.xyz").read_text().count("Mode #") == 12


def test_what_a_script_says_and_leaves_behind(folder, caplog):
    model_file.save("m.pt", random_model(("H", "O")))
    water = molecule("H2O")
    stretched = water.copy()
    stretched.symbols[0] = "N"
    said = kinbot._run_script("search", ours(filled("ts_search", "search", stretched, ["m.pt"], fix=[[1, 2]])))
    assert (
        said == "NH2 contains N, but the model knows only H O: take another molecule or train a model with this element"
    )
    assert row("search").data.status == "error"  # without which KinBot would wait for ever
    np.testing.assert_allclose(row("search").positions, stretched.positions)
    # One that KinBot's template catches is said too.
    assert "contains N" in kinbot._run_script("well", ours(filled("opt_well", "well", stretched, ["m.pt"])))
    assert row("well").data.status == "error"
    assert "No module named 'nowhere'" in kinbot._run_script("other", "import nowhere")
    assert row("other").data.status == "error"
    assert Path("perm/other.err").read_text().startswith("Traceback")


def test_uncertainties_give_back_what_kinbot_draws():
    from kinbot.uncertaintyAnalysis import UQ

    limits = {"well_uq": 0.4, "barrier_uq": 0.9, "freq_uq": 1.3, "imagfreq_uq": 1.15}
    others = {f"{name}_uq": 1.2 for name in ("epsilon", "sigma", "enrelfact", "enrelpow", "pstsymm")}
    drawn = UQ({"uq_n": 2, **limits, **others})
    members = 4000
    random.seed(0)

    def draws(kind: str) -> np.ndarray:
        return np.array([drawn.calc_factor(kind, 1) for _ in range(members)])

    one = vibrate(molecule("NH3"), KinMLCalculator(random_model()), fmax=np.inf)
    real = np.linspace(120.0, 900.0, len(one.frequencies))

    def point(kind: str) -> Point:
        frequencies = real.copy()
        shown = frequencies[:, None] * draws("freq") ** np.minimum(100 / frequencies[:, None], 4)
        energies = draws("barrier" if kind == "barrier" else "energy")
        if kind == "barrier":
            frequencies[0] = -500.0
            shown[0] = -500.0 * draws("imagfreq")
        found = dataclasses.replace(one, frequencies=frequencies, members=shown.T)
        # KinBot varies energies with their zero-point energies in them.
        bare = energies / 23.060548012069493 - found.calibrated_zero_point_energies
        return Point(kind, kind, [dataclasses.replace(found, member_energies=bare)])

    points = [point(kind) for kind in ("well", "well", "products", "barrier", "well", "barrier", "well")]
    got = dataclasses.asdict(kinbot.uncertainties(points))
    for key, limit in limits.items():
        measure = (lambda x: x) if key in ("well_uq", "barrier_uq") else np.log
        assert measure(got[key]) == pytest.approx(measure(limit), rel=0.08), key
    alone = kinbot.uncertainties(points[:1])
    assert (alone.well_uq, alone.barrier_uq, alone.imagfreq_uq) == (None, None, None)

    def calibrated(one: Vibrations) -> Vibrations:
        return dataclasses.replace(one, energy_factor=1.5, factors=np.full(len(one.factors), 1.5))

    wider = [dataclasses.replace(one, parts=[calibrated(part) for part in one.parts]) for one in points]
    for key, limit in dataclasses.asdict(kinbot.uncertainties(wider)).items():
        measure = (lambda x: x) if key in ("well_uq", "barrier_uq") else np.log
        assert measure(limit) == pytest.approx(1.5 * measure(got[key]), rel=1e-6), key


def test_the_factors_of_a_file_are_in_what_kinbot_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members = [random_model(seed=seed) for seed in (2, 3)]
    stds = []
    for calibration in (None, Calibration((3.0,), ((3.0,) * 4,))):
        ensemble = Ensemble(members)
        ensemble.calibration = calibration
        model_file.save("m.pt", ensemble)
        calculator = KinMLCalculator("m.pt")
        found = [vibrate(molecule(name), calculator, fmax=np.inf) for name in ("NH3", "CH4")]
        points = [Point(name, "well", [one]) for name, one in zip("ab", found, strict=True)]
        kinbot._tell(points, kinbot.uncertainties(points))
        told = json.loads(Path("uncertainties.json").read_text())["points"]
        stds.append((np.array(told[0]["frequencies_std"][0]), told[1]["energy_std"], told[1]["energy"]))
    np.testing.assert_allclose(stds[1][0], 3 * stds[0][0], rtol=1e-9)
    assert stds[1][1] > 2 * stds[0][1] > 0  # modes of members that are imaginary count nothing
    assert stds[1][2] == pytest.approx(stds[0][2], abs=1e-9)


INPUT = {"qc": "nn_pes", "use_sella": 1, "nn_model": ["m.pt"], "queuing": "local", "barrier_threshold": 60.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qc": "gauss"}, "qc is 'gauss': with models it must be \"nn_pes\""),
        ({"use_sella": 0}, "use_sella is 0: with models it must be 1"),
        ({"nn_model": []}, "there is no nn_model: give a list of model files"),
        ({"nn_model": ["nowhere.pt"]}, "nn_model: nowhere.pt: cannot be read (No such file or directory)"),
        ({"nn_model": ["in.json"]}, "nn_model: in.json: is no model file: name one that was written by training"),
        ({"nn_model": ["cut.pt"]}, "nn_model: cut.pt: is no model file, or damaged ("),
        ({"nn_model": ["delta.pt"]}, "nn_model: the model gives differences of fidelity 1 to fidelity 0"),
        ({"nn_model": ["m.pt", "other.pt"]}, "other.pt knows the elements H O, but m.pt C H N O"),
        ({"nn_model": 3}, "nn_model: int is no model: give a model, its file or run folder, or a list of these"),
        ({"nn_model": ["tblite:GFN9"]}, "nn_model: tblite:GFN9: "),  # what tblite knows, or that it is not there
        ({"structure": ["S", 0, 0, 0, "H", 0, 0, 1]}, "structure contains S, but the model knows only C H N O"),
        ({"nonsense": 1, "structure": ["H", 0, 0, 0]}, "KinBot does not recognize option nonsense"),
    ],
)
def test_inputs_that_cannot_be_used(folder, capsys, changes, said):
    model_file.save("m.pt", random_model())
    model_file.save("other.pt", random_model(("H", "O")))
    model_file.save("delta.pt", EnergyModel(random_model().descriptor, (8, 1), ("gaussian", "identity"), baseline=0))
    Path("cut.pt").write_bytes(Path("m.pt").read_bytes()[:900])
    Path("in.json").write_text(json.dumps(INPUT | changes))
    assert main(["kinbot", "in.json"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("kinml-fast: in.json: ")
    assert logging.getLogger("KinBot").handlers == []


def test_a_model_that_no_forces_were_trained_on_is_said(folder, capsys, caplog):
    notes = {"epoch": 3, "training": {"loss": {"forces": False}}}
    model_file.save("m.pt", random_model(), notes)
    Path("in.json").write_text(json.dumps(INPUT | {"nonsense": 1, "structure": ["H", 0, 0, 0]}))
    assert main(["kinbot", "in.json"]) == 2  # of another mistake, after the warning
    assert "m.pt: was trained on energies alone" in caplog.text
    caplog.clear()
    model_file.save("m.pt", random_model(), {"training": {"loss": {"forces": True}}})
    assert main(["kinbot", "in.json"]) == 2
    assert "energies alone" not in caplog.text


def test_an_input_that_is_no_json(folder, capsys):
    Path("in.json").write_text("{")
    assert main(["kinbot", "in.json"]) == 2
    assert "in.json: cannot be read as JSON" in capsys.readouterr().err
    assert main(["kinbot", "in.json", "--workers", "0"]) == 2
    assert "workers is 0: give a number of at least 1" in capsys.readouterr().err


WELL, SADDLE = "Well  ", "Barrier       ts_"
"""How blocks of a MESS input begin; those of bonds that break have names that KinBot's pes fills in."""


@pytest.mark.slow
def test_a_search_from_start_to_mess_input(models, folder, capsys):
    structure = [
        x for symbol, place in zip(VINYL.symbols, VINYL.positions.tolist(), strict=True) for x in (symbol, *place)
    ]
    values = INPUT | {
        "nn_model": models,
        "structure": structure,
        "charge": 0,
        "mult": 2,
        "families": ["intra_H_migration", "hom_sci"],
        "skip_reactions": [f"{CHEMID}_intra_H_migration_{pair}" for pair in ("1_5", "2_4")],
        "barrier_threshold": 200.0,
        "sella_kwargs": {"internal": False, "gamma": 0.0},
        "me": 2,
        "uq": 1,
        "uq_n": 4,
        "sigma": 4.0,
        "epsilon": 100.0,
        "barrier_uq": 0.7,
    }
    Path("in.json").write_text(json.dumps(values))
    assert main(["kinbot", "in.json"]) == 0
    said = capsys.readouterr().out
    assert "KinBot: KinBot finished." in said
    found = json.loads(Path("uncertainties.json").read_text())
    kinds = {one["kind"] for one in found["points"]}
    assert kinds >= {"well", "products", "barrier"}
    assert found["points"][0]["energy_std"] == 0
    calculator = KinMLCalculator(models)
    # The first well as KinBot has it in its database, and as the file tells of it.
    first = vibrate(row(f"{CHEMID}_well").toatoms(), calculator, fmax=0.01)
    np.testing.assert_allclose(found["points"][0]["frequencies"][0], first.frequencies, atol=0.1)
    (barrier,) = (one for one in found["points"] if one["kind"] == "barrier")
    assert barrier["name"] == f"{CHEMID}_intra_H_migration_2_3"
    assert (np.array(barrier["frequencies"][0]) < 0).sum() == 1

    inputs = sorted(Path("me").glob("mess_*.inp"))
    assert len(inputs) == 4
    # KinBot leaves frequencies out where there is no search for conformers.
    for text in (one.read_text() for one in inputs):
        well, barrier = (re.search(rf"^  {kind}.*?End ! RRHO", text, re.M | re.S) for kind in (WELL, SADDLE))
        assert re.search(r"Frequencies\[1/cm\]\s+9\n", well.group())
        assert re.search(r"Frequencies\[1/cm\]\s+8\n", barrier.group())
    # KinBot's first input is without variations; the others are within the limits, the given one and those measured.
    wells = np.array([energies(one.read_text(), WELL) for one in inputs])
    barriers = np.array([energies(one.read_text(), SADDLE) for one in inputs])
    assert (wells.std(axis=0) > 0).all()
    assert (np.abs(wells - wells[0]) <= found["measured"]["well_uq"] + 0.01).all()
    assert (np.abs(wells - wells[0]) > 0.5).any()  # KinBot's own limit is much smaller than these two models need
    assert (np.abs(barriers - barriers[0]) <= 0.7 + 0.01).all()
    assert (barriers[1:] != barriers[0]).any()
    assert f"barrier_uq {found['measured']['barrier_uq']:.4g}" in said  # measured all the same


def energies(text: str, kind: str) -> list[float]:
    """Of the wells or barriers of a MESS input, kcal/mol."""
    blocks = re.split(r"^  (?=Well |Barrier |Bimolecular )", text, flags=re.M)
    found = [re.search(r"ZeroEnergy\[kcal/mol\]\s+(\S+)", one) for one in blocks if one.startswith(kind)]
    return [float(one.group(1)) for one in found if one]
