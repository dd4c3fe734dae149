"""Second derivatives as a term of the loss: read, in the loss and its gradient, learned from, kept by the run."""

from __future__ import annotations

import io
import sqlite3
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from training_helpers import assert_same_run, write_config

from kinml_fast import report
from kinml_fast.data import hessians
from kinml_fast.data.hessians import MoleculeHessian
from kinml_fast.deploy import model_file
from kinml_fast.errors import ConfigError, DataError, InputError
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train import config as configuration
from kinml_fast.train import runs
from kinml_fast.train.hessians import HessianTerm
from kinml_fast.train.loss import LossBatch


@pytest.fixture(autouse=True)
def _plots_are_not_rendered(monkeypatch):
    monkeypatch.setattr(report, "_save", lambda figure, path: path.touch())


def model(dtype: torch.dtype = torch.float64, seed: int = 0, elements: tuple[str, ...] = ("C", "H")) -> EnergyModel:
    torch.manual_seed(seed)
    return EnergyModel(AEVParameters.aevmod(elements), (12, 1), ("tanh", "identity"), True, dtype)


def acetylene(seed: int = 0) -> Atoms:
    rng = np.random.default_rng(seed)
    places = np.array([[0.0, 0, 0], [1.2, 0, 0], [-1.06, 0, 0], [2.26, 0, 0]])
    return Atoms("C2H2", places + rng.normal(0, 0.08, places.shape))


def hessian_of(own: EnergyModel, atoms: Atoms) -> np.ndarray:
    species = torch.tensor([own.elements.index(s) for s in atoms.symbols])
    with torch.no_grad():
        x = torch.from_numpy(atoms.positions).to(own.dtype)
        found = own.hessian(x, species, torch.tensor([0, len(atoms)]))
    return found.double().numpy().reshape(3 * len(atoms), -1)


def known(own: EnergyModel, count: int = 3) -> list[MoleculeHessian]:
    """Those that a model says."""
    frames = [acetylene(i) for i in range(count)]
    return [
        MoleculeHessian(f"frame {i}", tuple(one.get_chemical_symbols()), one.positions, hessian_of(own, one))
        for i, one in enumerate(frames)
    ]


def batch(number: int = 0) -> LossBatch:
    empty = torch.zeros(0, dtype=torch.int64)
    return LossBatch(torch.tensor([number]), None, empty, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 1e-3)])
def test_the_expectation_of_the_term_is_the_error_of_the_entries(dtype, tolerance):
    teacher, own = model(seed=1), model(dtype, seed=2)
    data = known(teacher)
    term = HessianTerm(data, own, 3)
    assert HessianTerm(data, teacher, 3)(teacher, batch()) < tolerance * term(own, batch())
    mean = np.mean([float(term(own, batch(i)).detach()) for i in range(400)])
    assert mean == pytest.approx(term.error(own) ** 2, rel=0.1)
    squares = [np.square(hessian_of(own, acetylene(i)) - data[i].values).mean() for i in range(3)]
    assert term.error(own) == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-6 if dtype == torch.float64 else 1e-3)
    assert term(own, batch(5)) == term(own, batch(5))
    assert term(own, batch(5)) != term(own, batch(6))


def test_its_gradient_is_that_of_finite_differences():
    own = model(seed=2)
    term = HessianTerm(known(model(seed=1)), own, 2)
    term(own, batch()).backward()
    weights = own.networks.weights
    assert weights.grad is not None
    direction = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            weights += step * direction
            values.append(float(term(own, batch())))
    assert float((weights.grad * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def database(path: Path, values: np.ndarray | None, fidelity: int = 1, column: str = "Hessian array,") -> Path:
    def blob(array: np.ndarray) -> bytes:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE xyz (id integer PRIMARY KEY, temp real, name text, geom array)")
        base.execute(
            "CREATE TABLE energy (id integer PRIMARY KEY, fidelity integer, E real, force array, "
            f"{column} xyz_id integer)"
        )
        base.execute("INSERT INTO xyz VALUES (7, 300, 'a', ?)", (blob(acetylene().positions),))
        if column:
            row = (fidelity, blob(np.zeros((4, 3))), None if values is None else blob(values))
            base.execute("INSERT INTO energy VALUES (1, ?, -77.0, ?, ?, 7)", row)
    return path


def test_databases_and_files_are_read(tmp_path):
    own = model(seed=1)
    values = hessian_of(own, acetylene())
    (found,) = hessians.read(database(tmp_path / "C2H2.db", values))
    assert (found.label, found.symbols) == ("C2H2/7", ("C", "C", "H", "H"))
    np.testing.assert_allclose(found.values, values, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found.positions, acetylene().positions)
    frames = [acetylene(1), acetylene(2)]
    frames[1].info["hessian"] = hessian_of(own, frames[1])
    ase.io.write(tmp_path / "some.xyz", frames, format="extxyz")
    (other,) = hessians.read(tmp_path / "some.xyz")
    np.testing.assert_allclose(other.values, hessian_of(own, frames[1]), rtol=0, atol=1e-7)
    hessians.write(tmp_path / "copy.xyz", [found, other])
    again = hessians.read(tmp_path / "copy.xyz")
    for one, copy in zip((found, other), again, strict=True):
        assert (one.label, one.symbols) == (copy.label, copy.symbols)
        np.testing.assert_array_equal(one.values, copy.values)
        np.testing.assert_allclose(one.positions, copy.positions, rtol=0, atol=1e-8)


def test_what_is_no_hessian_is_refused(tmp_path):
    values = hessian_of(model(), acetylene())
    lopsided = values.copy()
    lopsided[0, 5] += 1.0
    for number, (wrong, message) in enumerate(
        [
            (values[:9, :9], r"C2H2/7: its Hessian has 81 numbers, 4 atoms have 144"),
            (lopsided, "C2H2/7: its Hessian is not symmetric"),
            (np.where(np.eye(12) > 0, np.nan, values), "NaN or infinite"),
            (np.array(["a"]), "its Hessian is no array of numbers"),
            (None, "contains no rows of fidelity 1 with a Hessian"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(DataError, match=message):
            hessians.read(database(folder / "C2H2.db", wrong))
    with pytest.raises(DataError, match="contains no rows of fidelity 2 with a Hessian"):
        hessians.read(tmp_path / "0" / "C2H2.db", 2)
    (tmp_path / "old").mkdir()
    with pytest.raises(DataError, match="contains no rows"):
        hessians.read(database(tmp_path / "old" / "C2H2.db", None, column=""))
    ase.io.write(tmp_path / "none.xyz", acetylene(), format="extxyz")
    with pytest.raises(DataError, match=r"none\.xyz: contains no frames with hessian="):
        hessians.read(tmp_path / "none.xyz")
    with pytest.raises(DataError, match=r"frame 0: has a Hessian and contains C, the model knows only H O"):
        HessianTerm(known(model()), model(elements=("H", "O")), 1)


def run_of(folder: Path, *overrides: str) -> Path:
    folder.mkdir()
    path = write_config(folder, "loss: {forces: true}", forces="all")
    config = configuration.load(path, list(overrides))
    runs.start(config, overwrite=True)
    return Path(config.run)


def teachings(path: Path) -> Path:
    hessians.write(path, known(model(seed=1), 4))
    return path


def test_training_learns_them_and_goes_on_with_the_same_bits(tmp_path, caplog):
    file = teachings(tmp_path / "teacher.xyz")
    chosen = (f"training.loss.hessians={file}", "training.loss.hessian_weight=1.0")
    with caplog.at_level("INFO"):
        run = run_of(tmp_path / "a", *chosen, "training.epochs=8")
    assert "second derivatives are trained on: RMSE at first" in caplog.text
    plain = run_of(tmp_path / "b", "training.epochs=8")
    data = hessians.read(run / "hessians.xyz")
    errors = []
    for folder in (run, plain):
        own = model_file.load(folder)
        assert isinstance(own, EnergyModel)
        errors.append(HessianTerm(data, own, 1).error(own))
    assert errors[0] < errors[1]
    file.unlink()  # the run has its own copy
    part = run_of(tmp_path / "c", f"training.loss.hessians={run / 'hessians.xyz'}", *chosen[1:], "training.epochs=3")
    config = configuration.load(part / "config.yaml", ["training.epochs=8"])
    runs.resume(part, ["training.epochs=8"])
    assert config.training.epochs == 8
    torch.testing.assert_close(
        model_file.load(part).networks.weights, model_file.load(run).networks.weights, rtol=0, atol=0
    )


def test_learned_factors_have_one_for_them(tmp_path):
    file = teachings(tmp_path / "teacher.xyz")
    run = run_of(tmp_path / "a", f"training.loss.hessians={file}", "training.loss.weighting=learned")
    assert "log_sigma_hessian" in (run / "metrics.csv").read_text().splitlines()[0]


def test_the_same_run_twice(tmp_path):
    file = teachings(tmp_path / "teacher.xyz")
    found = [run_of(tmp_path / name, f"training.loss.hessians={file}") for name in "ab"]
    assert_same_run(*found)


def test_wrong_files_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.xyz"):
        run_of(tmp_path / "a", f"training.loss.hessians={tmp_path / 'nowhere.xyz'}")
    with pytest.raises(ConfigError, match=r"training\.loss\.hessian_weight"):
        run_of(tmp_path / "b", "training.loss.hessian_weight=-1")
