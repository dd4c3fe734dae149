"""Training on crystals and their stresses: the term of the loss, every kind of run, from files to predictions."""

from __future__ import annotations

import csv
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.fd import calculate_numerical_stress
from ase.calculators.morse import MorsePotential
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import voigt_6_to_full_3x3_stress
from training_helpers import assert_same_bits, assert_same_run, crystal_data, interrupted_run, model, on_disk, rows

from kinml_fast import KinMLCalculator, cli, ops
from kinml_fast.data import TrainingData
from kinml_fast.deploy import model_file
from kinml_fast.deploy.evaluate import evaluate, groups, parts, run_evaluate
from kinml_fast.errors import ConfigError, DataError
from kinml_fast.nn import EnergyModel, Repulsion
from kinml_fast.train import LossBatch, Trainer, TrainingConfig, config, dataset, runs
from kinml_fast.units import GIGAPASCAL, KCAL_PER_MOL

STRESSES = {"forces": True, "stresses": True}


def settings(loss: dict | None = None, **keys: object) -> TrainingConfig:
    given = {"epochs": 3, "batch_size": 7, "optimizer": {"learning_rate": 0.01}, "loss": {**STRESSES, **(loss or {})}}
    return TrainingConfig(**{**given, **keys})


def fidelities_of(levels: int) -> tuple[int, ...]:
    return tuple(range(levels)) if levels > 1 else (1,)


# ---- the loss ------------------------------------------------------------------------------------


def loss_by_definition(trained, data: TrainingData, structures: np.ndarray, factors: tuple[float, float, float]):
    """What docs/crystals.md says, by autograd, of a model of one level."""
    some = data.structures.select(structures)
    weights = torch.ones(len(some)) if data.weights is None else torch.from_numpy(data.weights[structures])
    x, z, o, c, p = map(torch.from_numpy, (some.coordinates, some.species, some.offsets, some.cells, some.periodic))
    energies, forces, virials = trained.energies_forces_virials(x, z, o, ops.surroundings(c, p))
    terms = [(weights * (energies - torch.from_numpy(some.energies)) ** 2)[weights != 0].mean()]
    squares = ((forces - torch.from_numpy(some.forces)) ** 2).mean(dim=1)
    of_forces = torch.stack([squares[o[i] : o[i + 1]].mean() for i in range(len(some))])
    terms.append((weights * of_forces)[weights != 0].mean())
    known = torch.from_numpy(some.known_stresses[0]) & (weights != 0)
    volumes = torch.linalg.det(c).abs()
    errors = (virials - torch.from_numpy(np.nan_to_num(some.stresses)) * volumes[:, None, None]) / torch.diff(o)[
        :, None, None
    ]
    terms.append((weights * (errors**2).mean(dim=(1, 2)))[known].mean())
    return terms, sum(f * term for f, term in zip(factors, terms, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_minimises_what_is_documented(weighted):
    weights = np.random.default_rng(3).integers(0, 3, 60).astype(float) if weighted else None
    data = crystal_data(weights=weights)
    chosen = settings({"force_weight": 0.6, "stress_weight": 0.35}, batch_size=40, shuffle=False)
    chosen = chosen.model_copy(update={"optimizer": config.OptimizerConfig(name="sgd", learning_rate=1e-3)})
    trained, reference = model(), model()
    reference.sae.copy_(torch.from_numpy(data.sae))
    trainer = Trainer(trained, data, chosen)
    trainer.prepare()
    trainer.train_epoch()
    terms, loss = loss_by_definition(reference, data, data.split.train, (0.4, 0.6, 0.35))
    (gradient,) = torch.autograd.grad(loss, reference.networks.weights)
    losses = trainer._update.tasks.losses.tolist()
    assert losses == pytest.approx([float(term.detach()) for term in terms], rel=1e-9)
    moved = (reference.networks.weights - trained.networks.weights).detach() / 1e-3
    torch.testing.assert_close(moved, gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("repulsion", [None, Repulsion.zbl(("C", "H"), 0.5, 1.4)])
def test_errors_of_an_epoch_are_those_of_its_stresses(repulsion):
    data, plain = crystal_data(), model()
    started = EnergyModel(plain.descriptor, plain.networks.layers, plain.networks.activations, repulsion=repulsion)
    started.sae.copy_(torch.from_numpy(data.sae))
    trainer = Trainer(started, data, settings(batch_size=40, shuffle=False))
    trainer.prepare()
    before = evaluate(trainer.model, data.structures.select(data.split.train))
    row = trainer.train_epoch().values()
    energies = before.energies - data.structures.energies[data.split.train]
    assert row["energy_mae"] == pytest.approx(np.abs(energies).mean() * KCAL_PER_MOL, rel=1e-9)
    residuals = before.stresses - data.structures.stresses[data.split.train]
    residuals = residuals[~np.isnan(residuals)] * GIGAPASCAL
    assert row["stress_mae"] == pytest.approx(np.abs(residuals).mean(), rel=1e-9)
    assert row["stress_rmse"] == pytest.approx(np.sqrt((residuals**2).mean()), rel=1e-9)
    assert row["stress_max"] == pytest.approx(np.abs(residuals).max(), rel=1e-9)


def test_a_factor_does_not_depend_on_the_supercell_or_the_vacuum():
    """The weights of stresses turn them into virials of atoms."""
    small = crystal_data()
    layers = small.structures.cells.copy()
    layers[:, 2] *= np.where(small.structures.periodic[:, 2:] == 0, 2.0, 1.0)
    ratio = np.linalg.det(layers) / np.linalg.det(small.structures.cells)
    taller = small.structures.changed(cells=layers, stresses=small.structures.stresses / ratio[:, None, None])
    found = []
    for structures in (small.structures, taller):
        trainer = Trainer(model(), TrainingData(structures, small.split, small.sae), settings(shuffle=False))
        trainer.prepare()
        trainer.train_epoch()
        found.append(trainer.model.networks.weights.detach())
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert (ratio[small.split.train] > 1.5).any()


def test_a_student_finds_the_stresses_of_its_teacher(tmp_path):
    data = crystal_data(240)
    chosen = settings(epochs=300, scheduler={"name": "cosine"})
    student = model(1)
    summary = Trainer(student, data, chosen, tmp_path / "run").fit()
    known = data.structures.stresses[data.split.test]
    spread = np.nanstd(known) * GIGAPASCAL
    assert summary.stresses["test"].rmse < 0.1 * spread
    # Better than without training on them.
    without = Trainer(model(1), data, chosen.model_copy(update={"loss": config.LossConfig(forces=True)}))
    without.fit()
    structures = data.structures.select(data.split.test)
    (group,) = groups(parts(structures, evaluate(without.model, structures))[0])
    assert summary.stresses["test"].rmse < group.stress.rmse
    table = list(csv.DictReader((tmp_path / "run/report/errors.csv").open()))
    row = next(r for r in table if r["split"] == "test" and r["quantity"] == "stress")
    assert row["unit"] == "GPa"
    assert float(row["rmse"]) == pytest.approx(summary.stresses["test"].rmse, rel=1e-9)
    assert int(row["count"]) == 9 * (~np.isnan(known[:, 0, 0])).sum()
    assert (tmp_path / "run/report/parity_test.png").exists()


# ---- kinds of runs -------------------------------------------------------------------------------

KINDS = {
    "static": {},
    "learned": {"loss": {"weighting": "learned"}},
    "from": {"loss": {"forces_from": 1}},
    "until, learned": {"loss": {"forces_until": 2, "weighting": "learned"}},
    "average": {"ema_decay": 0.9},
}


@pytest.mark.sample(2)
@pytest.mark.parametrize(("kind", "levels"), [(kind, levels) for kind in KINDS for levels in (1, 2)])
def test_a_run_goes_on_with_the_same_bits(kind, levels, tmp_path):
    chosen, data, fidelities = settings(**KINDS[kind]), crystal_data(levels=levels), fidelities_of(levels)
    Trainer(model(fidelities=fidelities), data, chosen, tmp_path / "whole").fit()
    interrupted_run(tmp_path / "parts", chosen, 9, data=data, fidelities=fidelities)
    Trainer(model(fidelities=fidelities), data, chosen, tmp_path / "parts", resume=True).fit()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    last = rows(tmp_path / "whole")[-1]
    names = ["stress_rmse"] + ["stress_rmse_fidelity0"] * (levels - 1)
    assert all(float(last[name]) > 0 for name in names)
    train_rows = [row for row in rows(tmp_path / "whole") if row["split"] == "train"]
    told = [row["stress_rmse"] != "" for row in train_rows]
    assert told == [chosen.loss.has_forces(epoch) for epoch in range(3)]
    if "learned" in kind:
        assert float(train_rows[0]["log_sigma_stress"]) != 0


@pytest.mark.parametrize("levels", [1, 2])
def test_the_bits_are_those_of_memory_with_data_on_disk(levels, tmp_path):
    data, fidelities = crystal_data(levels=levels), fidelities_of(levels)
    weights = np.random.default_rng(0).integers(0, 3, 60).astype(float)
    data = TrainingData(data.structures, data.split, data.sae, weights)
    large, found = on_disk(data, tmp_path), []
    assert large.file.known_stresses["train"] == data.structures.known_stresses[:, data.split.train].sum(1).tolist()
    for given in (data, large):
        trainer = Trainer(model(fidelities=fidelities), given, settings())
        trainer.prepare()
        told = [trainer.train_epoch().values() for _ in range(2)]
        errors = [sums.errors() for sums in trainer.evaluate("validation", True)]
        told = [{k: v for k, v in row.items() if "second" not in k} for row in told]
        found.append((told, errors, trainer.model.networks.weights.detach()))
    assert found[0][:2] == found[1][:2]
    assert_same_bits(found[0][2], found[1][2])


@pytest.mark.slow
def test_windows_read_from_disk_have_their_own_cells(tmp_path, monkeypatch):
    monkeypatch.setattr("kinml_fast.data.blocks.BLOCK_BYTES", 2000)
    monkeypatch.setattr(dataset, "WINDOW_BYTES", 6000)
    data = crystal_data(120)
    large = on_disk(data, tmp_path)
    assert len(large.file.blocks("train")[0]) > 10
    for part in ("train", "validation"):
        pieces = [large.file.read([int(number)]).structures for number in large.file.blocks(part)[0]]
        expected = data.structures.select(getattr(data.split, part))
        for name in ("cells", "periodic", "stresses"):
            np.testing.assert_array_equal(
                np.concatenate([getattr(piece, name) for piece in pieces]), getattr(expected, name)
            )
    interrupted_run(tmp_path / "parts", settings(), 9, data=large)
    Trainer(model(), large, settings(), tmp_path / "parts", resume=True).fit()
    Trainer(model(), large, settings(), tmp_path / "whole").fit()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_energies_of_crystals_are_trained_on_alone():
    """Descriptors are kept, and are those of the crystals."""
    data = crystal_data()
    trainer = Trainer(model(), data, TrainingConfig(epochs=1, batch_size=40, shuffle=False))
    trainer.prepare()
    expected = evaluate(trainer.model, data.structures.select(data.split.validation))
    sums = trainer.evaluate("validation")[0]
    residuals = expected.energies - data.structures.energies[data.split.validation]
    assert sums.energies.absolute == pytest.approx(np.abs(residuals).sum(), rel=1e-9)


def test_stored_jacobians_of_crystals_give_their_forces():
    data, found = crystal_data(), []
    for jacobian in ("recompute", "stored"):
        trainer = Trainer(model(), data, TrainingConfig(loss={"forces": True}, jacobian=jacobian, batch_size=7))
        trainer.prepare()
        trainer.train_epoch()
        found.append(trainer.model.networks.weights.detach())
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-10)


def test_further_terms_get_the_cells_of_their_batch():
    data = crystal_data()

    def volume(trained, batch: LossBatch):
        some = data.structures.select(batch.structures.numpy())
        np.testing.assert_array_equal(batch.cells.numpy(), some.cells)
        np.testing.assert_array_equal(batch.periodic.numpy(), some.periodic)
        around = ops.surroundings(batch.cells, batch.periodic)
        return trained(batch.coordinates, batch.species, batch.offsets, around).square().mean()

    trainer = Trainer(model(), data, settings({"weighting": "learned"}), extra_losses={"volume": volume})
    trainer.prepare()
    row = trainer.train_epoch().values()
    assert {"log_sigma_energy", "log_sigma_forces", "log_sigma_stress", "log_sigma_volume"} <= set(row)


@pytest.mark.parametrize(
    ("loss", "keys", "message"),
    [
        ({"forces": False}, {}, "stresses are trained on together with forces"),
        ({}, {"jacobian": "stored"}, "stresses cannot be had from stored Jacobians"),
    ],
)
def test_what_does_not_go_together_is_refused(loss, keys, message):
    with pytest.raises(ValueError, match=message):
        settings(loss, **keys)


def test_data_without_stresses_are_refused():
    data = crystal_data()
    none = data.structures.changed(stresses=None)
    with pytest.raises(DataError, match=r"training\.loss\.stresses is true, but no training structure has stresses"):
        Trainer(model(), TrainingData(none, data.split, data.sae), settings())
    of_training = data.structures.stresses.copy()
    of_training[data.split.validation] = np.nan
    some = TrainingData(data.structures.changed(stresses=of_training), data.split, data.sae)
    with pytest.raises(DataError, match=r"training\.score\.stresses is 1, but no validation structure has stresses"):
        Trainer(model(), some, settings())
    Trainer(model(), some, settings(score={"stresses": 0.0}))


# ---- from files ----------------------------------------------------------------------------------


def morse_frames(count: int, scale: float = 1.0) -> list[Atoms]:
    """Crystals, layers and molecules with the energies, forces and stresses of a Morse potential of ASE."""
    rng, frames = np.random.default_rng(5), []
    places = np.array([[0, 0, 0], [1.3, 0.1, 0], [0, 1.8, 0.2], [0.2, 1.7, 1.5]])
    for i in range(count):
        cell = np.diag(rng.uniform(3.2, 4.2, 3)) + rng.uniform(-0.2, 0.2, (3, 3))
        atoms = Atoms("CHCH", places + rng.normal(0, 0.12, (4, 3)), cell=cell, pbc=i % 5 > 0)
        atoms.calc = MorsePotential(epsilon=0.15 * scale, r0=1.8, rho0=3.0, rcut1=2.6, rcut2=3.6)
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        if atoms.pbc.any():
            results["stress"] = atoms.get_stress()
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    return frames


def write_config(folder: Path, more: str = "", data: str = "", epochs: int = 80) -> Path:
    path = folder / "crystals.yaml"
    path.write_text(
        f"run: {folder / 'run'}\n"
        f"data: {{files: ['{folder / 'data.xyz'}'], split: [0.7, 0.15, 0.15]{data and ', ' + data}}}\n"
        "descriptor: {n_radial: 6, n_angular: 3, n_sections: 3}\n"
        "network: {layers: [12, 6, 1]}\n"
        f"training: {{epochs: {epochs}, batch_size: 10, loss: {{forces: true, stresses: true}}, "
        f"optimizer: {{learning_rate: 0.01}}, scheduler: {{name: cosine}}}}\n{more}",
        encoding="utf-8",
    )
    return path


def test_from_a_file_to_predicted_stresses(tmp_path, capsys):
    """The stresses are those of another program, so that signs and order are too."""
    ase.io.write(tmp_path / "data.xyz", morse_frames(150), format="extxyz")
    assert cli.main(["train", str(write_config(tmp_path))]) == 0
    test = [row for row in rows(tmp_path / "run") if row["split"] == "test"][-1]
    truth = np.array([frame.get_stress() for frame in morse_frames(150) if frame.pbc.any()])
    assert float(test["stress_rmse"]) < 0.2 * truth.std() * GIGAPASCAL
    # Predict, for frames without anything.
    ase.io.write(tmp_path / "bare.xyz", [frame.copy() for frame in morse_frames(12)], format="extxyz")
    out = tmp_path / "out.xyz"
    assert cli.main(["predict", str(tmp_path / "run"), str(tmp_path / "bare.xyz"), "-o", str(out)]) == 0
    calculator = KinMLCalculator(tmp_path / "run/model.pt")
    for given, frame in zip(morse_frames(12), ase.io.read(out, ":"), strict=True):
        assert (frame.pbc == given.pbc).all()
        assert ("stress" in frame.calc.results) == given.pbc.any()
        if given.pbc.any():
            again = frame.copy()
            again.calc = calculator
            np.testing.assert_allclose(frame.get_stress(), again.get_stress(), atol=1e-7)
            numerical = calculate_numerical_stress(again, eps=1e-5)
            np.testing.assert_allclose(again.get_stress(), numerical, atol=1e-8)
            np.testing.assert_allclose(frame.cell, given.cell, atol=1e-7)
    capsys.readouterr()
    text = str(tmp_path / "e.csv")
    found = cli.main(["evaluate", str(tmp_path / "run"), str(tmp_path / "data.xyz"), "--csv", text])
    assert found == 0
    (group,) = run_evaluate(tmp_path / "run", tmp_path / "data.xyz", plots=tmp_path / "plots")
    table = list(csv.DictReader((tmp_path / "e.csv").open()))
    told = np.array([float(row["stress_rmse"]) for row in table if row["stress_rmse"]])
    assert len(told) == 120
    assert np.sqrt((told**2).mean()) == pytest.approx(group.stress.rmse, rel=1e-9)
    assert {"stress"} <= {row["quantity"] for row in csv.DictReader((tmp_path / "plots/errors.csv").open())}


@pytest.mark.slow
def test_a_run_from_disk_is_the_run_from_memory(tmp_path):
    frames = morse_frames(60)
    for frame in frames:
        stress = frame.calc.results.pop("stress", None)
        if stress is not None:
            frame.info["virial"] = -frame.cell.volume * voigt_6_to_full_3x3_stress(stress)
    ase.io.write(tmp_path / "data.xyz", frames, format="extxyz")
    path = str(write_config(tmp_path, epochs=3))
    for name, value in (("memory", "false"), ("disk", "true")):
        assert cli.main(["train", path, f"data.on_disk={value}", f"run={tmp_path / name}"]) == 0
    assert rows(tmp_path / "memory") == rows(tmp_path / "disk")
    assert float(rows(tmp_path / "disk")[-1]["stress_rmse"]) > 0
    assert cli.main(["train", "--resume", str(tmp_path / "disk"), "training.epochs=4"]) == 0
    assert cli.main(["train", "--resume", str(tmp_path / "memory"), "training.epochs=4"]) == 0
    assert rows(tmp_path / "memory") == rows(tmp_path / "disk")


def test_an_ensemble_says_how_far_its_stresses_lie_apart(tmp_path):
    ase.io.write(tmp_path / "data.xyz", morse_frames(60), format="extxyz")
    assert cli.main(["train", str(write_config(tmp_path, "ensemble: {members: 2}", epochs=3))]) == 0
    members = list(csv.DictReader((tmp_path / "run/report/members.csv").open()))
    assert {row["member"] for row in members if row["quantity"] == "stress"} == {"1", "2", "ensemble"}
    ensemble = model_file.load(tmp_path / "run/model.pt")
    (group,) = run_evaluate(tmp_path / "run", tmp_path / "data.xyz")
    assert group.spread.stress > 0
    out = tmp_path / "out.xyz"
    assert cli.main(["predict", str(tmp_path / "run"), str(tmp_path / "data.xyz"), "-o", str(out)]) == 0
    frame = ase.io.read(out, 1)
    alone = []
    for member in range(2):
        again = frame.copy()
        again.calc = KinMLCalculator(ensemble.member(member))
        alone.append(again.get_stress())
    np.testing.assert_allclose(frame.get_stress(), np.mean(alone, axis=0), atol=1e-7)
    np.testing.assert_allclose(frame.info["stress_std"], np.std(alone, axis=0, ddof=1), atol=1e-7)


def test_differences_of_stresses_are_learned_and_predicted(tmp_path):
    low, high = morse_frames(60), morse_frames(60, 1.5)
    frames = []
    for first, second in zip(low, high, strict=True):
        frame = first.copy()
        for name, results in (("low", first.calc.results), ("high", second.calc.results)):
            frame.info[f"{name}_energy"] = results["energy"]
            frame.arrays[f"{name}_forces"] = results["forces"]
            if "stress" in results:
                frame.info[f"{name}_stress"] = results["stress"]
        frames.append(frame)
    ase.io.write(tmp_path / "data.xyz", frames, format="extxyz")
    keys = "fidelity: 1, baseline: 0, energy_key: [low_energy, high_energy]"
    path = write_config(tmp_path, data=keys, epochs=30)
    found = runs.start(config.load(path))
    difference = np.array([b.get_stress() - a.get_stress() for a, b in zip(low, high, strict=True) if a.pbc.any()])
    assert found.stresses["test"].rmse < 0.5 * difference.std() * GIGAPASCAL
    base = MorsePotential(epsilon=0.15, r0=1.8, rho0=3.0, rcut1=2.6, rcut2=3.6)
    atoms = high[1].copy()
    atoms.calc = KinMLCalculator(tmp_path / "run/model.pt", base=base)
    assert np.abs(atoms.get_stress() - high[1].get_stress()).max() < np.abs(difference).max()


def test_a_model_of_two_levels_predicts_the_stresses_of_both(tmp_path):
    data = crystal_data(levels=2)
    trainer = Trainer(model(fidelities=(0, 1)), data, settings(), tmp_path / "run")
    summary = trainer.fit()
    assert set(summary.stresses) == {"train", "validation", "test"}
    assert set(summary.lower[0][2]) == {"train", "validation", "test"}
    atoms = Atoms("CHCH", data.structures.coordinates[4:8], cell=data.structures.cells[1], pbc=True)
    ase.io.write(tmp_path / "in.xyz", atoms, format="extxyz")
    out = tmp_path / "out.xyz"
    assert cli.main(["predict", str(tmp_path / "run"), str(tmp_path / "in.xyz"), "-o", str(out)]) == 0
    frame, structures = ase.io.read(out), data.structures.select([1])
    predicted = evaluate(trainer.model, structures, stresses=True).stresses
    assert predicted.shape == (2, 1, 3, 3)
    np.testing.assert_allclose(
        frame.info["stress_fidelity0"], predicted[0, 0][[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], atol=1e-9
    )
    assert np.abs(predicted[0] - predicted[1]).max() > 0


def test_mistakes_in_a_configuration_are_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="stresses are trained on together with forces"):
        config.load(write_config(tmp_path), ["training.loss.forces=false"])
    ignored = config.load(write_config(tmp_path), ["training.loss.stresses=false", "training.loss.stress_weight=2"])
    assert ignored.ignored() == ["training.loss.stress_weight has no effect with training.loss.stresses = false"]
