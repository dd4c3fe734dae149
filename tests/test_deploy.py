"""The model file, evaluation and prediction."""

from __future__ import annotations

import csv
import logging
import os
import pickle
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms

from kinml_fast import reference
from kinml_fast.data import concatenate
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import evaluate, model_file, predict
from kinml_fast.errors import InputError
from kinml_fast.metrics import Errors
from kinml_fast.nn import AEVParameters, EnergyModel

WATER = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]])


@pytest.fixture
def model() -> EnergyModel:
    return make_model()


def make_model(elements=("H", "O", "C"), dtype=torch.float64, **settings) -> EnergyModel:
    torch.manual_seed(0)
    descriptor = AEVParameters.aevmod(elements, n_radial=8, n_angular=4, n_sections=4)
    model = EnergyModel(descriptor, [8, 4, 1], ["gaussian", "tanh", "identity"], dtype=dtype, **settings)
    model.sae.copy_(torch.arange(len(elements), dtype=torch.float64) - 20)
    return model


def waters(n: int, seed: int = 0, forces: bool = True) -> Structures:
    rng = np.random.default_rng(seed)
    x = WATER + rng.normal(0, 0.05, (n, 3, 3))
    labels = [f"w.xyz/{i + 1}" for i in range(n)]
    f = rng.normal(0, 1, x.shape) if forces else None
    return Structures.of_one_formula(["O", "H", "H"], x, rng.normal(-55, 0.1, n), f, labels=labels)


def hydrogens(n: int) -> Structures:
    x = np.array([[0, 0, 0], [0.74, 0, 0]]) * np.linspace(0.9, 1.2, n)[:, None, None]
    return Structures.of_one_formula(["H", "H"], x, np.linspace(-40, -39, n), labels=[f"h.xyz/{i}" for i in range(n)])


def by_reference(model: EnergyModel, structures: Structures) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies and forces of the oracle."""
    structures = structures.with_elements(model.elements)
    parameters = model.descriptor.to_dict()
    parameters["n_species"] = len(parameters.pop("elements"))
    n_layers = len(model.networks.activations)
    weights = [[model.networks.layer(s, i) for i in range(n_layers)] for s in range(len(model.elements))]
    arguments = (
        torch.from_numpy(structures.coordinates),
        torch.from_numpy(structures.species),
        torch.from_numpy(structures.offsets),
        parameters,
        weights,
        model.networks.activations,
        model.sae,
    )
    return reference.energies(*arguments), reference.forces(*arguments)


# The model file


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", [{}, {"biases": False}])
def test_a_saved_model_predicts_the_same_bits(tmp_path, dtype, settings):
    model = make_model(dtype=dtype, **settings)
    path = tmp_path / "model.pt"
    model_file.save(path, model, {"epoch": 3, "errors": {"rmse": 1.5}})
    loaded = model_file.load(path)
    assert model_file.load_training(path) == {"epoch": 3, "errors": {"rmse": 1.5}}
    assert (loaded.elements, loaded.dtype, loaded.training) == (model.elements, dtype, False)
    structures = waters(5)
    ours, theirs = evaluate.evaluate(model, structures), evaluate.evaluate(loaded, structures)
    np.testing.assert_array_equal(ours.energies, theirs.energies)
    np.testing.assert_array_equal(ours.forces, theirs.forces)


def test_networks_of_unequal_width_are_kept(tmp_path):
    descriptor = AEVParameters.aevmod(("H", "O"), n_radial=4, n_angular=2, n_sections=2)
    model = EnergyModel(descriptor, [[6, 1], [4, 1]], ["celu", "identity"])
    model_file.save(tmp_path / "model.pt", model)
    assert model_file.load(tmp_path / "model.pt").networks.layers == [[6, 1], [4, 1]]


def test_the_contents_of_the_file(tmp_path, model):
    path = tmp_path / "model.pt"
    model_file.save(path, model)
    contents = torch.load(path, weights_only=True)
    assert contents["format"] == "kinml_fast.model"
    assert contents["format_version"] == 1
    assert contents["model"] == model.to_dict()
    assert contents["elements"] == ["H", "O", "C"]
    assert contents["units"] == {"energy": "eV", "length": "Å", "force": "eV/Å"}
    assert contents["training"] == {}
    assert contents["state_dict"].keys() == model.state_dict().keys()


def test_a_failed_write_leaves_the_old_file(tmp_path, model, monkeypatch):
    path = tmp_path / "model.pt"
    model_file.save(path, model)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"model\.pt: could not be written \(No space left on device\)"):
            model_file.save(path, model, {"epoch": 1})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="cannot be written"):
        model_file.save(tmp_path / "nowhere" / "model.pt", model)


def test_notes_that_are_no_plain_values_are_refused_when_written(tmp_path, model):
    with pytest.raises(InputError, match="no plain value"):
        model_file.save(tmp_path / "model.pt", model, {"folder": Path("x")})
    assert not list(tmp_path.iterdir())


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_files_that_are_no_model_file(tmp_path, model):
    path = tmp_path / "model.pt"
    with pytest.raises(InputError, match="cannot be read"):
        model_file.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        model_file.load(tmp_path)

    ran = tmp_path / "ran"
    contents = {"format": "kinml_fast.model", "format_version": 1, "model": Evil(ran)}
    others = {
        "empty": b"",
        "text": b"run: runs/example\n",
        "pickle": pickle.dumps(contents),
        "checkpoint": {"format": "kinml_fast checkpoint", "version": 1},
        "tensor": torch.zeros(3),
        "code": contents,
    }
    for name, content in others.items():
        path = tmp_path / f"{name}.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(InputError, match=f"{name}.pt: is no model file: name one that was written by training"):
            model_file.load(path)
    assert not ran.exists()


def test_damaged_and_later_model_files(tmp_path, model):
    path = tmp_path / "model.pt"
    model_file.save(path, model)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is damaged"):
        model_file.load(path)

    # A bit of a weight that has flipped, which torch itself does not see.
    weights = next(iter(torch.load(_written(path, whole), weights_only=True)["state_dict"].values()))
    at = whole.index(weights.numpy().tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(InputError, match="is damaged"):
        model_file.load(path)

    contents = torch.load(_written(path, whole), weights_only=True)
    torch.save(contents | {"format_version": 2}, path)
    with pytest.raises(InputError, match="version 2, this program reads version 1"):
        model_file.load(path)
    torch.save(contents | {"state_dict": {"sae": torch.zeros(3)}}, path)
    with pytest.raises(InputError, match="do not fit together"):
        model_file.load(path)
    del contents["model"]["layers"]
    torch.save(contents, path)
    with pytest.raises(InputError, match="do not fit together"):
        model_file.load(path)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# Evaluation


def test_energies_and_forces_are_those_of_the_oracle(model):
    structures = concatenate([waters(4), hydrogens(3)])
    energies, forces = by_reference(model, structures)
    found = evaluate.evaluate(model, structures, forces=True)
    np.testing.assert_allclose(found.energies, energies, rtol=1e-13)
    np.testing.assert_allclose(found.forces, forces, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_changes_no_bit(model, batch_size):
    structures = concatenate([waters(5), hydrogens(3)])
    whole = evaluate.evaluate(model, structures, 8)
    parts = evaluate.evaluate(model, structures, batch_size)
    np.testing.assert_array_equal(whole.energies, parts.energies)
    np.testing.assert_array_equal(whole.forces, parts.forces)


def test_forces_are_computed_when_there_are_any_or_when_asked_for(model):
    assert evaluate.evaluate(model, waters(2)).forces.shape == (6, 3)
    assert evaluate.evaluate(model, waters(2), forces=False).forces is None
    assert evaluate.evaluate(model, waters(2, forces=False)).forces is None
    nothing = evaluate.evaluate(model, waters(2).select([]), forces=True)
    assert (nothing.energies.shape, nothing.forces.shape) == ((0,), (0, 3))
    assert model.networks.weights.grad is None


def test_single_precision_stays_near_double():
    single, double = make_model(dtype=torch.float32), make_model()
    with torch.no_grad():
        double.networks.weights.copy_(single.networks.weights)
    a, b = (evaluate.evaluate(m, waters(20)) for m in (single, double))
    np.testing.assert_allclose(a.energies, b.energies, rtol=0, atol=1e-5)
    np.testing.assert_allclose(a.forces, b.forces, rtol=5e-4, atol=5e-5)
    assert a.energies.dtype == a.forces.dtype == np.float64


def test_an_element_that_the_model_does_not_know_is_refused():
    with pytest.raises(InputError, match=r"w\.xyz/1 contains O"):
        evaluate.evaluate(make_model(elements=("H", "C")), waters(2))


def write_xyz(path: Path, structures: Structures) -> Path:
    frames = []
    for i in range(len(structures)):
        atoms = slice(structures.offsets[i], structures.offsets[i + 1])
        frame = Atoms(structures.symbols(i), structures.coordinates[atoms])
        frame.info["REF_energy"] = structures.energies[i]
        if structures.forces is not None and not np.isnan(structures.forces[atoms]).any():
            frame.arrays["REF_forces"] = structures.forces[atoms]
        frames.append(frame)
    ase.io.write(path, frames, format="extxyz")
    return path


def test_run_evaluate_tells_files_and_formulas_apart(tmp_path, model, caplog):
    model_file.save(tmp_path / "model.pt", model)
    mixed = write_xyz(tmp_path / "mixed.xyz", concatenate([waters(3), hydrogens(2)]))
    pure = write_xyz(tmp_path / "pure.xyz", waters(4, seed=1))
    out = tmp_path / "errors.csv"
    with caplog.at_level(logging.INFO):
        rows = evaluate.run_evaluate(tmp_path / "model.pt", [mixed, pure], csv_path=out)
    assert [(row.file, row.formula, row.n_structures) for row in rows] == [
        (str(mixed), "H2O", 3),
        (str(mixed), "H2", 2),
        (str(pure), "H2O", 4),
        ("all", "all", 9),
    ]
    assert rows[1].forces is None

    # extended XYZ keeps eight digits after the point
    parts = [waters(3), hydrogens(2), waters(4, seed=1)]
    found = [evaluate.evaluate(model, part, forces=True) for part in parts]
    energy = [p.energies - part.energies for p, part in zip(found, parts, strict=True)]
    force = [p.forces - part.forces for p, part in zip(found, parts, strict=True) if part.forces is not None]
    for row, residuals in zip(rows, [*energy, np.concatenate(energy)], strict=True):
        assert_close(row.energy, Errors.of(residuals))
    for row, residuals in zip([rows[0], rows[2], rows[3]], [*force, np.concatenate(force)], strict=True):
        assert_close(row.forces, Errors.of(residuals))

    with out.open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [w["structure"] for w in written] == [f"mixed.xyz/{i}" for i in range(1, 6)] + [
        f"pure.xyz/{i}" for i in range(1, 5)
    ]
    assert [w["forces_rmse"] == "" for w in written] == [False] * 3 + [True] * 2 + [False] * 4
    assert float(written[4]["energy_predicted"]) == pytest.approx(found[1].energies[1], abs=1e-6)
    assert_close(Errors.of(np.concatenate(energy)), rows[-1].energy)
    assert max(float(w["forces_max"] or 0) for w in written) == rows[-1].forces.max

    (message,) = (record.getMessage() for record in caplog.records if "energies in kcal/mol" in record.getMessage())
    assert message == evaluate.table(rows)
    title, head, *lines = message.splitlines()
    assert "forces in kcal/mol/Å" in title
    assert head.split()[:3] == ["file", "formula", "structures"]
    assert [line.split()[:3] for line in lines] == [[row.file, row.formula, str(row.n_structures)] for row in rows]
    assert lines[1].split()[-3:] == ["-", "-", "-"]
    assert len({len(line) for line in lines}) == 1


def assert_close(a: Errors, b: Errors) -> None:
    assert (a.mae, a.rmse, a.max) == pytest.approx((b.mae, b.rmse, b.max), rel=1e-5, abs=1e-5)


def test_evaluation_draws_on_request(tmp_path, model, caplog):
    model_file.save(tmp_path / "model.pt", model)
    data = write_xyz(tmp_path / "mixed.xyz", concatenate([waters(3), hydrogens(2)]))
    with caplog.at_level(logging.INFO):
        rows = evaluate.run_evaluate(tmp_path / "model.pt", data, plots=tmp_path / "plots")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["errors.csv", "parity_evaluated.png"]
    with (tmp_path / "plots" / "errors.csv").open(encoding="utf-8", newline="") as file:
        written = {w["quantity"]: w for w in csv.DictReader(file)}
    assert {name: int(w["count"]) for name, w in written.items()} == {"energy": 5, "forces": 27}
    for name, errors in (("energy", rows[-1].energy), ("forces", rows[-1].forces)):
        assert float(written[name]["rmse"]) == pytest.approx(errors.rmse, rel=1e-9)
    assert f"wrote parity plots to {tmp_path}/plots" in caplog.text


def test_one_formula_has_no_row_for_all_and_no_columns_for_forces(tmp_path, model):
    model_file.save(tmp_path / "model.pt", model)
    rows = evaluate.run_evaluate(tmp_path / "model.pt", write_xyz(tmp_path / "h.xyz", hydrogens(3)))
    assert [row.formula for row in rows] == ["H2"]
    assert "forces" not in evaluate.table(rows)


def test_evaluation_of_what_the_model_does_not_know_names_all_three(tmp_path):
    model_file.save(tmp_path / "model.pt", make_model(elements=("H", "C")))
    data = write_xyz(tmp_path / "w.xyz", waters(2))
    with pytest.raises(InputError, match=r"model\.pt cannot evaluate .*w\.xyz: w\.xyz/1 contains O"):
        evaluate.run_evaluate(tmp_path / "model.pt", data, csv_path=tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


# Prediction


def test_predictions_of_a_file(tmp_path, model):
    model_file.save(tmp_path / "model.pt", model)
    structures = concatenate([waters(3), hydrogens(2)])
    source = write_xyz(tmp_path / "in.xyz", structures)
    frames = ase.io.read(source, ":")
    frames[0].info["name"] = "first"
    frames[1].info["energy"] = 5.0  # an old prediction
    ase.io.write(source, frames, format="extxyz")

    out = tmp_path / "out.xyz"
    assert predict.predict(tmp_path / "model.pt", source, out) == 5
    read = ase.io.read(source, ":")
    expected = by_reference(
        model, concatenate([Structures.of_one_formula(f.symbols, f.positions[None], None) for f in read])
    )
    written = ase.io.read(out, ":")
    assert [str(frame.symbols) for frame in written] == ["OH2"] * 3 + ["H2"] * 2
    assert written[0].info["name"] == "first"
    np.testing.assert_allclose([f.info["REF_energy"] for f in written], [f.info["REF_energy"] for f in read])
    np.testing.assert_allclose([f.get_potential_energy() for f in written], expected[0], rtol=0, atol=1e-7)
    np.testing.assert_allclose(np.concatenate([f.get_forces() for f in written]), expected[1], rtol=0, atol=1e-7)
    # What was written can be evaluated: the model agrees with itself.
    (row,) = evaluate.run_evaluate(tmp_path / "model.pt", _only_waters(out, tmp_path), energy_key="energy")
    assert row.energy.max < 1e-4


def _only_waters(path: Path, folder: Path) -> Path:
    ase.io.write(folder / "waters.xyz", ase.io.read(path, ":3"), format="extxyz")
    return folder / "waters.xyz"


def test_other_file_formats_can_be_predicted(tmp_path, model):
    model_file.save(tmp_path / "model.pt", model)
    ase.io.write(tmp_path / "in.traj", [Atoms("OH2", WATER), Atoms("OH2", WATER * 1.1)])
    assert predict.predict(tmp_path / "model.pt", tmp_path / "in.traj", tmp_path / "out.xyz") == 2
    assert len(ase.io.read(tmp_path / "out.xyz", ":")) == 2


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([Atoms("OH2", WATER), Atoms("NH2", WATER)], r"in\.xyz: frame 2 contains N, but .*model\.pt knows only H O C"),
        ([Atoms("OH2", WATER), Atoms("OH2", WATER * 0)], r"in\.xyz: .*in\.xyz/2 has atoms 1 and 2"),
        ([Atoms("OH2", WATER, cell=[9, 9, 9], pbc=True)], "frame 1 is periodic"),
    ],
)
def test_molecules_that_cannot_be_predicted(tmp_path, model, frames, message):
    model_file.save(tmp_path / "model.pt", model)
    ase.io.write(tmp_path / "in.xyz", frames, format="extxyz")
    with pytest.raises(InputError, match=message):
        predict.predict(tmp_path / "model.pt", tmp_path / "in.xyz", tmp_path / "out.xyz")
    assert not (tmp_path / "out.xyz").exists()


def test_files_that_cannot_be_predicted(tmp_path, model):
    model_file.save(tmp_path / "model.pt", model)
    with pytest.raises(InputError, match=r"none\.xyz: cannot be read"):
        predict.predict(tmp_path / "model.pt", tmp_path / "none.xyz", tmp_path / "out.xyz")
    for name in ("a.xyz", "b.xyz"):
        write_xyz(tmp_path / name, waters(1))
    with pytest.raises(InputError, match="matches several files"):
        predict.predict(tmp_path / "model.pt", tmp_path / "?.xyz", tmp_path / "out.xyz")
    with pytest.raises(InputError, match="cannot be written"):
        predict.predict(tmp_path / "model.pt", tmp_path / "a.xyz", tmp_path / "nowhere" / "out.xyz")
