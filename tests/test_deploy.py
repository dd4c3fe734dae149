"""The model file, evaluation and prediction."""

from __future__ import annotations

import csv
import logging
import os
import pickle
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from scipy import stats

from kinml_fast import reference
from kinml_fast.data import concatenate, read
from kinml_fast.data.selection import Selection
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import evaluate, model_file, predict
from kinml_fast.errors import InputError
from kinml_fast.metrics import Errors
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble
from kinml_fast.units import KCAL_PER_MOL

WATER = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]])


@pytest.fixture
def model() -> EnergyModel:
    return make_model()


def make_model(elements=("H", "O", "C"), dtype=torch.float64, seed=0, **settings) -> EnergyModel:
    torch.manual_seed(seed)
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


def test_reading_a_model_draws_no_random_numbers(tmp_path, model):
    model_file.save(tmp_path / "model.pt", model)
    before = torch.get_rng_state()
    model_file.load(tmp_path / "model.pt")
    model_file.load_many([tmp_path / "model.pt", tmp_path / "model.pt"])
    assert torch.equal(torch.get_rng_state(), before)


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
        with pytest.raises(InputError, match=rf"{name}.pt: is no model file.*: name one that was written by training"):
            model_file.load(path)
    assert not ran.exists()


def test_damaged_and_later_model_files(tmp_path, model):
    path = tmp_path / "model.pt"
    model_file.save(path, model)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is no model file, or damaged"):
        model_file.load(path)

    # A bit of a weight that has flipped, which torch itself does not see.
    weights = next(iter(torch.load(_written(path, whole), weights_only=True)["state_dict"].values()))
    at = whole.index(weights.numpy().tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(InputError, match="is no model file, or damaged"):
        model_file.load(path)

    contents = torch.load(_written(path, whole), weights_only=True)
    torch.save(contents | {"format_version": 4}, path)
    with pytest.raises(InputError, match="version 4, this program reads versions up to 3"):
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


def test_an_energy_that_is_not_a_number_is_refused():
    model = make_model()
    model.sae[model.elements.index("O")] = torch.nan
    both = concatenate([hydrogens(3), waters(2)])
    with pytest.raises(InputError, match=r"^w\.xyz/1 has an energy that is NaN or infinite: .* leave it out"):
        evaluate.evaluate(model, both, batch_size=2)
    assert np.isfinite(evaluate.evaluate(model, hydrogens(3)).energies).all()


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


# Ensembles, several levels, differences


def make_ensemble(n: int = 3, **settings) -> Ensemble:
    return Ensemble([make_model(seed=seed, **settings) for seed in range(n)])


KEYS = ["low_energy", "high_energy"]


def of_levels(structures: Structures, missing: dict[int, list[int]] | None = None) -> Structures:
    """The structures at two levels, the lower one half an eV up; `missing`: structures that lack a level."""
    energies = np.stack([structures.energies + 0.5, structures.energies])
    forces = np.stack([structures.forces * 0.5, structures.forces])
    for level, lacking in (missing or {}).items():
        energies[level, lacking] = np.nan
        forces[level, np.isin(structures.owners, lacking)] = np.nan
    return replace(structures, energies=energies, forces=forces)


def write_levels(path: Path, structures: Structures) -> Path:
    """The structures of two levels as an extended XYZ file."""
    frames = []
    for i in range(len(structures)):
        atoms = slice(structures.offsets[i], structures.offsets[i + 1])
        frame = Atoms(structures.symbols(i), structures.coordinates[atoms])
        for level, key in enumerate(KEYS):
            if structures.known_energies[level, i]:
                frame.info[key] = structures.energies[level, i]
            if structures.known_forces[level, i]:
                frame.arrays[key.replace("energy", "forces")] = structures.forces[level, atoms]
        frames.append(frame)
    ase.io.write(path, frames, format="extxyz")
    return path


@pytest.mark.parametrize("fidelities", [(1,), (0, 1)])
def test_predictions_of_an_ensemble_are_means_with_deviations(fidelities):
    ensemble = make_ensemble(fidelities=fidelities)
    structures = concatenate([waters(4), hydrogens(3)])
    found = evaluate.evaluate(ensemble, structures, 3, forces=True)
    alone = [evaluate.evaluate(ensemble.member(i), structures, forces=True) for i in range(3)]
    for name in ("energies", "forces"):
        values = np.stack([getattr(one, name) for one in alone])
        expected_std = getattr(found, {"energies": "energy_std", "forces": "forces_std"}[name])
        np.testing.assert_allclose(getattr(found, name), values.mean(axis=0), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(expected_std, values.std(axis=0, ddof=1), rtol=1e-10, atol=1e-13)
    leading = () if fidelities == (1,) else (2,)
    assert found.energies.shape == found.energy_std.shape == (*leading, 7)
    assert found.forces.shape == found.forces_std.shape == (*leading, 18, 3)
    assert alone[0].energy_std is alone[0].forces_std is None
    # Without forces: the same energies, to the last bit.
    energies = evaluate.evaluate(ensemble, structures, forces=False)
    np.testing.assert_array_equal(energies.energies, found.energies)
    np.testing.assert_array_equal(energies.energy_std, found.energy_std)
    assert energies.forces is energies.forces_std is None


def test_the_number_of_threads_and_batches_change_no_bit_of_an_ensemble(any_threads):
    ensemble = make_ensemble(9, fidelities=(0, 1), dtype=torch.float32)
    structures = waters(400)
    results = []
    for threads, size in ((1, 400), (2, 400), (2, 1), (3, 7)):
        torch.set_num_threads(threads)
        results.append(evaluate.evaluate(ensemble, structures, size))
    for other in results[1:]:
        for name in ("energies", "forces", "energy_std", "forces_std"):
            np.testing.assert_array_equal(getattr(other, name), getattr(results[0], name))


def test_run_evaluate_of_an_ensemble_shows_the_spread(tmp_path, caplog):
    ensemble = make_ensemble(2)
    for i in range(2):
        (tmp_path / f"member-{i}").mkdir()
        model_file.save(tmp_path / f"member-{i}" / "model.pt", ensemble.member(i))
    data = write_xyz(tmp_path / "mixed.xyz", concatenate([waters(5), hydrogens(3)]))
    out = tmp_path / "errors.csv"
    with caplog.at_level(logging.INFO):
        rows = evaluate.run_evaluate(f"{tmp_path}/member-*", data, csv_path=out, plots=tmp_path / "plots")
    assert [(row.formula, row.n_structures) for row in rows] == [("H2O", 5), ("H2", 3), ("all", 8)]
    found = evaluate.evaluate(ensemble, read(data), forces=True)
    with out.open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    energy_std = np.array([float(w["energy_std"]) for w in written])
    np.testing.assert_allclose(energy_std, found.energy_std * KCAL_PER_MOL, rtol=1e-12)
    of_first = np.sqrt(np.mean(found.forces_std[:3] ** 2)) * KCAL_PER_MOL
    assert float(written[0]["forces_std"]) == pytest.approx(of_first, rel=1e-12)
    assert [row.spread.energy for row in rows] == pytest.approx(
        [energy_std[:5].mean(), energy_std[5:].mean(), energy_std.mean()]
    )
    # Force deviations are shown where there are forces to compare with.
    expected = found.forces_std[:15].mean() * KCAL_PER_MOL
    assert [row.spread.forces for row in rows] == [pytest.approx(expected), None, pytest.approx(expected)]
    errors = np.abs([float(w["energy_error"]) for w in written])
    for row, own in zip(rows, (slice(5), slice(5, 8), slice(8)), strict=True):
        correlation = stats.spearmanr(energy_std[own], errors[own]).statistic
        assert row.spread.correlation == pytest.approx(correlation)
    (message,) = (record.getMessage() for record in caplog.records if "energies in kcal/mol" in record.getMessage())
    assert message == evaluate.table(rows)
    _, head, *lines, last = message.splitlines()
    assert " ".join(head.split()) == "file formula structures energy MAE RMSE max std forces MAE RMSE max std"
    assert lines[0].split()[-1] == f"{rows[0].spread.forces:.3f}"
    assert last.endswith(f"its rank correlation with the energy error is {rows[-1].spread.correlation:.2f}")
    assert (tmp_path / "plots" / "parity_evaluated.png").exists()


def test_run_evaluate_of_several_levels_has_rows_for_each(tmp_path, caplog):
    model = make_model(fidelities=(0, 1))
    model_file.save(tmp_path / "model.pt", model)
    structures = of_levels(waters(6), {0: [5], 1: [0, 1]})
    data = write_levels(tmp_path / "levels.xyz", structures)
    out = tmp_path / "errors.csv"
    with caplog.at_level(logging.INFO):
        rows = evaluate.run_evaluate(
            tmp_path / "model.pt", data, Selection(energy_key=KEYS), csv_path=out, plots=tmp_path / "plots"
        )
    assert [(row.fidelity, row.n_structures) for row in rows] == [(0, 5), (1, 4)]
    found = evaluate.evaluate(model, structures)
    for level, row in enumerate(rows):
        known = structures.known_energies[level]
        assert_close(row.energy, Errors.of((found.energies - structures.energies)[level, known]))
        assert_close(row.forces, Errors.of((found.forces - structures.forces)[level, np.repeat(known, 3)]))
    assert rows[0].energy.mae != pytest.approx(rows[1].energy.mae)
    with out.open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [(w["structure"], w["fidelity"]) for w in written] == [
        *((f"levels.xyz/{i}", "0") for i in range(1, 6)),
        *((f"levels.xyz/{i}", "1") for i in range(3, 7)),
    ]
    assert float(written[-1]["energy_predicted"]) == pytest.approx(found.energies[1, 5], abs=1e-6)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "errors.csv",
        "parity_evaluated_fidelity0.png",
        "parity_evaluated_fidelity1.png",
    }

    title, head, *_ = evaluate.table(rows).splitlines()
    assert head.split()[:4] == ["file", "formula", "fidelity", "structures"]
    assert title in caplog.text

    # Two files: a row for all of each level.
    other = write_levels(tmp_path / "more.xyz", of_levels(waters(3, seed=2)))
    rows = evaluate.run_evaluate(tmp_path / "model.pt", [data, other], Selection(energy_key=KEYS))
    assert [(row.formula, row.fidelity, row.n_structures) for row in rows[-2:]] == [("all", 0, 8), ("all", 1, 7)]
    # One level alone.
    (row,) = evaluate.run_evaluate(tmp_path / "model.pt", other, Selection(energy_key=KEYS[1]), fidelity=1)
    assert row == rows[3]
    for wanted, shown in ((2, "2"), ([1, 2], "1 and 2"), ([0, 1, 2], "0 and 1 and 2")):
        message = rf"model\.pt: has the fidelity 0 and 1, but {shown} is asked for: name levels"
        with pytest.raises(InputError, match=message):
            evaluate.run_evaluate(tmp_path / "model.pt", data, Selection(energy_key=KEYS), fidelity=wanted)


def test_run_evaluate_of_a_delta_model_compares_differences(tmp_path, caplog):
    model = make_model(fidelities=(1,), baseline=0)
    model_file.save(tmp_path / "model.pt", model)
    structures = of_levels(waters(5), {0: [3]})
    data = write_levels(tmp_path / "levels.xyz", structures)
    with pytest.raises(InputError, match=r"fidelity 0: 1.*levels\.xyz/4"):
        evaluate.run_evaluate(tmp_path / "model.pt", data, Selection(energy_key=KEYS))
    with caplog.at_level(logging.INFO):
        (row,) = evaluate.run_evaluate(tmp_path / "model.pt", data, Selection(energy_key=KEYS, incomplete="drop"))
    assert "differences of fidelity 1 to fidelity 0" in caplog.text
    found = evaluate.evaluate(model, structures)
    known = structures.known_energies.all(axis=0)
    assert_close(row.energy, Errors.of((found.energies + 0.5)[known]))
    assert_close(row.forces, Errors.of((found.forces - 0.5 * structures.forces[1])[np.repeat(known, 3)]))
    assert (row.fidelity, row.n_structures) == (None, 4)


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
    frames = ase.io.read(source, ":")
    expected = by_reference(
        model, concatenate([Structures.of_one_formula(f.symbols, f.positions[None], None) for f in frames])
    )
    written = ase.io.read(out, ":")
    assert [str(frame.symbols) for frame in written] == ["OH2"] * 3 + ["H2"] * 2
    assert written[0].info["name"] == "first"
    np.testing.assert_allclose([f.info["REF_energy"] for f in written], [f.info["REF_energy"] for f in frames])
    np.testing.assert_allclose([f.get_potential_energy() for f in written], expected[0], rtol=0, atol=1e-7)
    np.testing.assert_allclose(np.concatenate([f.get_forces() for f in written]), expected[1], rtol=0, atol=1e-7)
    # What was written can be evaluated: the model agrees with itself.
    (row,) = evaluate.run_evaluate(tmp_path / "model.pt", _only_waters(out, tmp_path), Selection(energy_key="energy"))
    assert row.energy.max < 1e-4


def test_predictions_of_an_ensemble_of_two_levels(tmp_path):
    ensemble = make_ensemble(fidelities=(0, 1))
    model_file.save(tmp_path / "model.pt", ensemble)
    source = write_xyz(tmp_path / "in.xyz", concatenate([waters(3), hydrogens(2)]))
    assert predict.predict(tmp_path / "model.pt", source, tmp_path / "out.xyz") == 5
    found = evaluate.evaluate(ensemble, read(source), forces=True)
    written = ase.io.read(tmp_path / "out.xyz", ":")
    expected = {
        "energy": (found.energies[1], [f.get_potential_energy() for f in written]),
        "energy_std": (found.energy_std[1], [f.info["energy_std"] for f in written]),
        "energy_fidelity0": (found.energies[0], [f.info["energy_fidelity0"] for f in written]),
        "forces": (found.forces[1], np.concatenate([f.get_forces() for f in written])),
        "forces_std": (found.forces_std[1], np.concatenate([f.arrays["forces_std"] for f in written])),
        "forces_fidelity0": (found.forces[0], np.concatenate([f.arrays["forces_fidelity0"] for f in written])),
    }
    for name, (ours, theirs) in expected.items():
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-7, err_msg=name)
    # What was written is data of two levels.
    rows = evaluate.run_evaluate(
        tmp_path / "model.pt", tmp_path / "out.xyz", Selection(energy_key=["energy_fidelity0", "energy"])
    )
    assert max(row.energy.max for row in rows) < 1e-4


def test_predictions_of_a_delta_model_add_the_base(tmp_path):
    delta, low = make_model(fidelities=(1,), baseline=0), make_model(seed=5)
    model_file.save(tmp_path / "delta.pt", delta)
    model_file.save(tmp_path / "low.pt", low)
    source = write_xyz(tmp_path / "in.xyz", waters(3))
    predict.predict(tmp_path / "delta.pt", source, tmp_path / "out.xyz", base=str(tmp_path / "low.pt"))
    structures = read(source)
    both = [evaluate.evaluate(model, structures, forces=True) for model in (delta, low)]
    written = ase.io.read(tmp_path / "out.xyz", ":")
    expected = both[0].energies + both[1].energies, both[0].forces + both[1].forces
    np.testing.assert_allclose([f.get_potential_energy() for f in written], expected[0], rtol=0, atol=1e-7)
    np.testing.assert_allclose(np.concatenate([f.get_forces() for f in written]), expected[1], rtol=0, atol=1e-7)

    with pytest.raises(InputError, match="differences of fidelity 1 to fidelity 0: give base"):
        predict.predict(tmp_path / "delta.pt", source, tmp_path / "out2.xyz")
    with pytest.raises(InputError, match="leave out base"):
        predict.predict(tmp_path / "low.pt", source, tmp_path / "out2.xyz", base="tblite:GFN1-xTB")
    model_file.save(tmp_path / "small.pt", make_model(elements=("H", "C")))
    with pytest.raises(InputError, match=r"in\.xyz: frame 1: the base cannot compute it \(OH2 contains O"):
        predict.predict(tmp_path / "delta.pt", source, tmp_path / "out2.xyz", base=str(tmp_path / "small.pt"))
    assert not (tmp_path / "out2.xyz").exists()


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
        ([Atoms("OH2", WATER, cell=[9, 9, 0], pbc=True)], "is periodic, but its cell .* has no volume"),
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
