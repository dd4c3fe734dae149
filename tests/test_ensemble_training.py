"""Ensembles as runs: their members, what is varied, interruptions, the file and the report."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_helpers import assert_same_bits, assert_same_run, finish, kill_and_resume, rows, train, write_config

from kinml_fast import report
from kinml_fast.data.split import PARTS, Split
from kinml_fast.data.splits import read_tvtmsk
from kinml_fast.deploy import evaluate, model_file
from kinml_fast.errors import InputError
from kinml_fast.nn import Ensemble
from kinml_fast.train import config as configuration
from kinml_fast.train import ensembles, members, runs
from kinml_fast.train.config import Config
from kinml_fast.train.folder import RunFolder

KILLS = int(os.environ.get("KINML_KILLS", "2"))


@pytest.fixture(autouse=True)
def _plots_are_not_rendered(monkeypatch):
    """Which takes longer than all that is tested here."""
    monkeypatch.setattr(report, "_save", lambda figure, path: path.touch())


def load(path: Path, *overrides: str) -> Config:
    return configuration.load(path, list(overrides))


def run_of(path: Path, *overrides: str):
    """A run in the folder of its configuration, and its summary."""
    config = load(path, *overrides)
    return Path(config.run), runs.start(config, overwrite=True)


def test_members_with_different_seeds_are_single_runs(tmp_path):
    path = write_config(tmp_path, "loss: {forces: true}", forces="some")
    run, summary = run_of(path, "ensemble.members=3")
    for number in (1, 3):
        single, alone = run_of(
            path, f"run={tmp_path}/single{number}", f"network.seed={number - 1}", f"training.seed={number - 1}"
        )
        assert_same_run(single, run / f"member-{number}")
        assert summary.members[number - 1].errors == alone.errors
    contents = {path.name for path in run.iterdir()}
    assert contents == {
        *("config.yaml", "member-1", "member-2", "member-3", "model.pt"),
        *("prepared.h5", "report", "split.txt", "train.log"),
    }
    assert "member 2 of 3" in (run / "train.log").read_text()

    ensemble = model_file.load(run)
    members = [model_file.load(run / f"member-{i}") for i in (1, 2, 3)]
    assert torch.equal(ensemble.networks.weights, torch.stack([m.networks.weights for m in members]))
    assert not torch.equal(members[0].networks.weights, members[1].networks.weights)
    notes = model_file.load_training(run)
    assert notes["ensemble"] == {"members": 3, "vary": "seeds"}
    assert [note["epoch"] for note in notes["members"]] == [member.best_epoch for member in summary.members]


def test_the_report_has_members_and_ensemble(tmp_path, caplog):
    path = write_config(tmp_path, "loss: {forces: true}", forces="all")
    with caplog.at_level("INFO"):
        run, summary = run_of(path, "ensemble.members=2")
    assert {p.name for p in (run / "report").iterdir()} == {
        *("errors.csv", "learning_curves.png", "members.csv", "parity_test.png", "reliability.png")
    }
    with (run / "report" / "members.csv").open(encoding="utf-8", newline="") as file:
        table = {(row["member"], row["split"], row["quantity"]): row for row in csv.DictReader(file)}
    expected = {(name, part, q) for name in "12" for part in PARTS for q in ("energy", "forces")}
    expected |= {("ensemble", part, q) for part in ("validation", "test") for q in ("energy", "forces")}
    assert set(table) == expected

    # The errors of the ensemble are those that a look at its file gives.
    config = load(path)
    data = runs.prepare(config)
    structures = data.structures.select(data.split.test)
    (part,) = evaluate.parts(structures, evaluate.evaluate(model_file.load(run), structures))
    group = evaluate.total([part])
    assert summary.errors["test"] == group.energy
    assert summary.forces["test"] == group.forces
    assert summary.spread["test"] == group.spread
    row = table["ensemble", "test", "forces"]
    assert (float(row["mae"]), float(row["rmse"]), float(row["max"])) == (
        *(group.forces.mae, group.forces.rmse),
        group.forces.max,
    )
    assert float(table["2", "test", "energy"]["rmse"]) == summary.members[1].errors["test"].rmse
    text = ensembles.table(summary)
    assert text in caplog.text
    head, *lines = text.splitlines()[1:]
    columns = ["train energies", "validation energies", "test energies", "train forces", "validation forces"]
    assert " ".join(head.split()) == " ".join(["member best epoch", *columns, "test forces"])
    assert lines[2].split()[:3] == ["ensemble", "-", f"{summary.errors['validation'].rmse:.3f}"]


def parts_of(run: Path) -> dict[str, set[str]]:
    file = read_tvtmsk(run / "split.txt")
    return {part: {x for x, own in zip(file.labels, file.parts, strict=True) if own == part} for part in PARTS}


def test_folds_divide_training_and_validation_structures(tmp_path):
    path = write_config(tmp_path)
    run, summary = run_of(path, "ensemble={members: 4, vary: folds}")
    whole = parts_of(run)
    pool = whole["train"] | whole["validation"]
    folds = [parts_of(run / f"member-{i}") for i in range(1, 5)]
    validated = [label for fold in folds for label in fold["validation"]]
    assert len(validated) == len(set(validated))
    assert set(validated) == pool
    for fold in folds:
        assert fold["test"] == whole["test"]
        assert fold["train"] == pool - fold["validation"]
    # Only the test set is one that no member has seen.
    assert set(summary.errors) == {"test"}
    assert {p.name for p in (run / "report").iterdir()} >= {"members.csv", "parity_test.png"}
    # The members' weights start differently too.
    first = [torch.load(run / f"member-{i}" / "checkpoints" / "best.pt", weights_only=True) for i in (1, 2)]
    assert not torch.equal(*(state["weights"]["networks.weights"] for state in first))


def test_folds_without_a_test_set_have_errors_of_members_only(tmp_path):
    path = write_config(tmp_path)
    run, summary = run_of(path, "data.split=[50,10,0]", "ensemble={members: 2, vary: folds}")
    assert (summary.errors, summary.spread) == ({}, {})
    assert {p.name for p in (run / "report").iterdir()} == {"learning_curves.png", "members.csv"}
    assert "test" not in ensembles.table(summary)


def test_every_fold_has_its_share_of_each_formula(tmp_path):
    data = runs.prepare(load(write_config(tmp_path, count=31)))
    formulas = np.array(data.structures.formulas())
    counts = []
    for index in range(5):
        split = members.fold(data.structures, data.split, 5, index, seed=3)
        counts.append([(formulas[split.validation] == formula).sum() for formula in ("C2H2", "CH3")])
        assert np.array_equal(split.test, data.split.test)
        assert not np.array_equal(split.train, np.sort(split.train))
    assert np.ptp(counts, axis=0).max() <= 1
    assert np.ptp(np.sum(counts, axis=1)) <= 1
    again = members.fold(data.structures, data.split, 5, 2, seed=3)
    other = members.fold(data.structures, data.split, 5, 2, seed=4)
    assert np.array_equal(again.validation, members.fold(data.structures, data.split, 5, 2, 3).validation)
    assert not np.array_equal(again.validation, other.validation)
    with pytest.raises(InputError, match="there are 3 training and validation structures for 4 folds"):
        members.fold(data.structures, Split([0, 1], [2], [3]), 4, 0)


@pytest.mark.parametrize("data", ["fidelity: [0, 1]", "fidelity: 1, baseline: 0"])
@pytest.mark.parametrize("processes", [1, 2])
def test_ensembles_of_several_levels_and_of_differences(tmp_path, data, processes):
    path = tmp_path / "levels.yaml"
    path.write_text(
        f"run: {tmp_path}/run\n"
        f"data: {{files: ['shipped:C2H2.db'], {data}, split: [0.6, 0.2, 0.2]}}\n"
        "descriptor: {n_radial: 4, n_angular: 2, n_sections: 2}\n"
        "network: {layers: [8, 4, 1]}\n"
        "training: {epochs: 2, loss: {forces: true}}\n"
        f"ensemble: {{members: 2, vary: folds, processes: {processes}}}\n"
    )
    run, summary = run_of(path)
    ensemble = model_file.load(run)
    assert (ensemble.fidelities, ensemble.baseline) == (((0, 1), None) if "[" in data else ((1,), 0))
    prepared = runs.prepare(load(path))
    structures = prepared.structures.select(prepared.split.test)
    predictions = evaluate.evaluate(ensemble, structures)
    part = evaluate.parts(structures, predictions, "test", prepared.fidelities, ensemble.fidelities)[-1]
    assert summary.errors["test"] == evaluate.total([part]).energy
    assert summary.forces["test"] == evaluate.total([part]).forces
    assert set(summary.members[0].errors) == {"train", "validation", "test"}
    assert {p.name for p in (run / "report").iterdir()} == {
        *("errors.csv", "learning_curves.png", "members.csv", "parity_test.png")
    }


def assert_same_ensembles(a: Path, b: Path) -> None:
    """Both ended with the same bits."""
    numbers = [member.path.name for member in RunFolder(a).members()]
    assert numbers == [member.path.name for member in RunFolder(b).members()]
    for name in numbers:
        assert_same_run(a / name, b / name)
    assert_same_bits(*(dict(model_file.load(run).state_dict()) for run in (a, b)))
    texts = [(run / "report" / "members.csv").read_text() for run in (a, b)]
    assert texts[0] == texts[1]


def test_processes_and_threads_change_no_bit(tmp_path):
    path = write_config(tmp_path, "loss: {forces: true}, threads: 1", forces="some")
    whole, summary = run_of(path, "ensemble={members: 3, vary: folds}")
    parallel, other = run_of(
        path,
        f"run={tmp_path}/parallel",
        "ensemble={members: 3, vary: folds, processes: 2}",
        "training.threads=2",
    )
    assert summary.errors == other.errors
    for ours, theirs in zip(summary.members, other.members, strict=True):
        assert (ours.epochs, ours.best_epoch, ours.errors, ours.forces) == (
            *(theirs.epochs, theirs.best_epoch),
            *(theirs.errors, theirs.forces),
        )
    for number in (1, 2, 3):
        assert rows(whole / f"member-{number}") == rows(parallel / f"member-{number}")
    assert_same_bits(*(dict(model_file.load(run).state_dict()) for run in (whole, parallel)))
    assert "member 3: best epoch" in (parallel / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments(tmp_path, processes):
    options = "epochs: 60, save_every: 20, checkpoint_seconds: 0.01"
    found = {}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name)
        text = config.read_text().replace("epochs: 4", options)
        config.write_text(text + f"ensemble: {{members: 3, processes: {processes if name == 'cut' else 1}}}\n")
        found[name] = tmp_path / name / "run", config
    whole, config = found["whole"]
    finish(train(config))

    cut, config = found["cut"]
    awaited = [cut / f"member-{min(i + 1, 3)}" / "checkpoints" / "last.pt" for i in range(KILLS)]
    kill_and_resume(cut, awaited, config, seed=processes)
    assert_same_ensembles(whole, cut)
    assert list(cut.rglob("*.part")) == []


@pytest.mark.slow
def test_ctrl_c_lets_the_processes_write_their_checkpoints(tmp_path):
    config = write_config(tmp_path, "checkpoint_seconds: 1000")
    process = train(config, "training.epochs=100000", "ensemble={members: 3, processes: 2}")
    run = tmp_path / "run"
    tables = [run / f"member-{i}" / "metrics.csv" for i in (1, 2)]
    while process.poll() is None and not all(table.exists() and "\n1," in table.read_text() for table in tables):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert f"continue with: kinml-fast train --resume {run}" in err
    assert "Traceback" not in err
    assert not (run / "member-3").exists()
    epochs = max(int(rows(run / f"member-{i}")[-1]["epoch"]) for i in (1, 2))
    assert min(int(rows(run / f"member-{i}")[-1]["epoch"]) for i in (1, 2)) > 0
    # Whatever a member had done is kept: it goes on from there.
    finish(train("--resume", run, f"training.epochs={epochs + 2}", "ensemble.processes=1"))
    assert model_file.load(run).n_members == 3


def test_members_and_epochs_can_be_added(tmp_path):
    path = write_config(tmp_path, "scheduler: {name: none}")
    run, _ = run_of(path, "ensemble.members=2", "training.epochs=3")
    runs.resume(run, ["ensemble.members=3", "training.epochs=5"])
    whole, _ = run_of(path, f"run={tmp_path}/whole", "ensemble.members=3", "training.epochs=5")
    for number in (1, 2, 3):
        assert [r["epoch"] for r in rows(run / f"member-{number}") if r["split"] == "train"] == list("01234")
    ours, theirs = (dict(model_file.load(r).state_dict()) for r in (run, whole))
    assert_same_bits(ours, theirs)
    assert configuration.load(run / "config.yaml").ensemble.members == 3
    # Nothing is left to do: the same again.
    runs.resume(run)
    assert_same_bits(dict(model_file.load(run).state_dict()), theirs)


def test_resumed_in_another_place(tmp_path, monkeypatch):
    path = write_config(tmp_path)
    run, _ = run_of(path, "ensemble.members=2")
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    monkeypatch.chdir(moved)
    runs.resume(".", ["training.epochs=6"])
    assert model_file.load(moved).n_members == 2
    assert not run.exists()


def test_what_cannot_go_on(tmp_path):
    path = write_config(tmp_path)
    run, _ = run_of(path, "ensemble={members: 2, vary: folds}")
    single, _ = run_of(path, f"run={tmp_path}/single")
    before = (run / "config.yaml").read_bytes()
    cases = {
        "training.batch_size=9": "was started with training.batch_size = 7 and cannot go on with 9",
        "network.layers=[9,1]": r"was started with network.layers = \[8, 4, 1\] and cannot go on with \[9, 1\]",
        "ensemble.members=3": "was started with ensemble.members = 2 and cannot go on with 3",
        "ensemble.members=1": "was started with ensemble.members = 2 and cannot go on with 1",
        "ensemble.vary=seeds": "was started with ensemble.vary = folds",
        "training.epochs=0": "an ensemble needs training.epochs of at least 1",
    }
    for override, message in cases.items():
        with pytest.raises(InputError, match=message):
            runs.resume(run, [override])
    assert (run / "config.yaml").read_bytes() == before
    with pytest.raises(InputError, match="is a run of one model and cannot become an ensemble"):
        runs.resume(single, ["ensemble.members=2"])
    with pytest.raises(InputError, match=rf"member-2: is a member of an ensemble: resume {run}"):
        runs.resume(run / "member-2")
    with pytest.raises(InputError, match="holds a run already"):
        runs.start(load(path, "ensemble.members=2"))
    with pytest.raises(InputError, match="for 60 folds"):
        run_of(path, f"run={tmp_path}/many", "ensemble={members: 60, vary: folds}")
    assert not RunFolder(tmp_path / "many").members()


def test_one_kind_of_run_replaces_the_other(tmp_path):
    path = write_config(tmp_path)
    run, _ = run_of(path, "ensemble.members=2")
    run_of(path)
    assert not RunFolder(run).members()
    assert not isinstance(model_file.load(run), Ensemble)
    run_of(path, "ensemble.members=2")
    assert not (run / "metrics.csv").exists()
    assert not (run / "checkpoints").exists()
    assert model_file.load(run).n_members == 2


def test_a_member_that_cannot_be_trained_ends_the_others(tmp_path):
    path = write_config(tmp_path, "optimizer: {name: sgd, learning_rate: 1.0e+6}")
    with pytest.raises(InputError, match=r"^member \d: the loss became infinite or NaN in epoch \d"):
        run_of(path, "ensemble={members: 3, processes: 2}")


def test_keys_without_effect(tmp_path):
    config = load(write_config(tmp_path), "ensemble.vary=folds")
    assert "ensemble.vary has no effect with ensemble.members = 1" in config.ignored()
    with pytest.raises(InputError, match=r"an ensemble needs training\.epochs of at least 1"):
        load(tmp_path / "small.yaml", "ensemble.members=2", "training.epochs=0")


def test_fine_tuning_of_several_models(tmp_path):
    path = write_config(tmp_path)
    first, _ = run_of(path, f"run={tmp_path}/first")
    run, _ = run_of(path, f"start.model={first}/model.pt", "ensemble.members=2", "training.epochs=1")
    start = model_file.load(first).networks.weights
    for number in (1, 2):
        moved = (model_file.load(run / f"member-{number}").networks.weights - start).abs().max()
        assert 0 < moved < 0.1
    with pytest.raises(InputError, match=r"model\.pt: is an ensemble: name model\.pt of one of its members"):
        run_of(path, f"run={tmp_path}/third", f"start.model={run}/model.pt")


def test_members_begin_with_their_namesakes_of_another_ensemble(tmp_path):
    path = write_config(tmp_path)
    first, _ = run_of(path, f"run={tmp_path}/first", "ensemble.members=2")
    rate = "training.optimizer.learning_rate=1e-12"
    run, _ = run_of(path, f"start.model={first}", "ensemble.members=2", "training.epochs=1", rate)
    before, after = (model_file.load(one).networks.weights for one in (first, run))
    assert torch.allclose(before, after, rtol=0, atol=1e-9)
    assert not torch.allclose(before[0], before[1], rtol=0, atol=1e-3)
    with pytest.raises(InputError, match="is an ensemble of 2 members, from which 3 cannot begin"):
        run_of(path, f"run={tmp_path}/third", f"start.model={first}", "ensemble.members=3")
