"""Ensembles that groups of processes train: the files of one process, and one sentence when something fails."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
from pathlib import Path

import pytest
from rank_helpers import again, start
from test_cli import wait_for
from test_faults import ended
from training_helpers import assert_same_run, start_ranks, write_config

from kinml_fast import lock
from kinml_fast.cli import main
from kinml_fast.train import checkpoint
from kinml_fast.train.folder import RunFolder

TRAIN = ("-m", "kinml_fast.cli", "train")
LONG = ("training.epochs=100000", "training.checkpoint_seconds=1000")


def assert_same_ensembles(a: Path, b: Path) -> None:
    """Both ended with the same files, but for times and for the name of the folder in config.yaml."""
    members = [member.path.name for member in RunFolder(a).members()]
    assert members == [member.path.name for member in RunFolder(b).members()]
    for name in members:
        assert_same_run(a / name, b / name)
    assert contents(a) == contents(b)


def contents(run: Path) -> dict[str, str]:
    """The files of a run that have no times in them, with digests."""
    patterns = ("model.pt", "split.txt", "report/*", "member-*/model.pt", "member-*/split.txt", "member-*/report/*")
    found = [path for pattern in patterns for path in run.glob(pattern)]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.parametrize(
    ("size", "members", "more"),
    [
        (3, 2, ["ensemble.vary=folds"]),  # one and two processes
        pytest.param(2, 3, [], marks=pytest.mark.slow),  # one of them trains two, one after the other
        pytest.param(4, 2, ["training.ema_decay=0.9"], marks=pytest.mark.slow),
    ],
)
def test_members_that_groups_of_processes_train_have_the_bits_of_one(tmp_path, monkeypatch, size, members, more):
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def check(folder: Path) -> None:
        config = write_config(folder, "loss: {forces: true}", 20, "some")
        arguments = [str(config), f"ensemble.members={members}", "training.epochs=2", *more]
        assert main(["train", *arguments, f"run={folder / 'one'}"]) == 0
        done = start(size, *TRAIN, *arguments, "ensemble.processes=2")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ensemble.processes has no effect") == 1
        assert_same_ensembles(folder / "one", folder / "run")
        assert done.stdout.count("ensemble of") == 1  # one process reports
        assert not list((folder / "run").rglob(lock.NAME))

    again(check, tmp_path)


def small(folder: Path, more: str = "") -> Path:
    """A configuration whose members take seconds."""
    return write_config(folder, "loss: {forces: true}, checkpoint_seconds: 1000" + more, 10, "all")


def wait_for_members(run: Path, *numbers: int) -> None:
    """Wait until these members are being trained."""
    for number in numbers:
        wait_for(run / f"member-{number}" / "train.log", "epoch ")


@pytest.mark.parametrize(
    ("size", "asked", "number"),
    [
        (2, 1, signal.SIGTERM),
        pytest.param(3, 0, signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(3, 2, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_ends_all_groups_after_a_checkpoint(tmp_path, size, asked, number):
    config, run = small(tmp_path), tmp_path / "run"
    processes = start_ranks(size, config, *LONG, "ensemble.members=2")
    wait_for_members(run, 1, 2)
    processes[asked].send_signal(number)
    (said,) = ended(processes, [128 + number] * size)
    what = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert said == f"{what}; continue with: kinml-fast train --resume {run}"
    for member in RunFolder(run).members():
        assert checkpoint.load(member.last)["epoch"] > 0
    assert not list(run.rglob(lock.NAME))


@pytest.mark.slow
def test_an_ensemble_goes_on_with_another_number_of_processes(tmp_path):
    config, run, whole = small(tmp_path), tmp_path / "run", tmp_path / "whole"
    assert ended(start_ranks(2, config, "training.epochs=2", "ensemble.members=2"), [0] * 2) == []
    more = ["training.epochs=4", "ensemble.members=3"]  # one is added
    assert ended(start_ranks(4, "--resume", run, *more), [0] * 4) == []
    assert main(["train", "--resume", str(run)]) == 0  # nothing is left to do
    assert main(["train", str(config), *more, f"run={whole}"]) == 0
    # Each part of the run has looked at the test set at its end, which curves show.
    ours, theirs = ({k: v for k, v in contents(path).items() if "curves" not in k} for path in (run, whole))
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize(("size", "killed"), [(2, 1), (3, 0), (3, 1), (3, 2)])
def test_a_process_that_is_killed_is_named_and_ends_all_groups(tmp_path, size, killed):
    config, run = small(tmp_path), tmp_path / "run"
    processes = start_ranks(size, config, *LONG, "ensemble.members=2")
    wait_for_members(run, 1, 2)
    processes[killed].kill()
    (said,) = ended(processes, [-9 if rank == killed else 2 for rank in range(size)])
    who = f"process {killed} (process id {processes[killed].pid} on {os.uname().nodename})"
    assert said.startswith(f"kinml-fast: {who} is gone: ")
    epochs = [checkpoint.load(member.last)["epoch"] for member in RunFolder(run).members()]
    assert epochs[1 if killed == 0 else 0] > 0  # that group has written what it had


@pytest.mark.slow
@pytest.mark.parametrize(("size", "hanging"), [(2, 1), (3, 2)])
def test_a_process_that_hangs_is_named_by_another(tmp_path, size, hanging):
    config, run = small(tmp_path, ", rank_timeout_seconds: 4"), tmp_path / "run"
    processes = start_ranks(size, config, *LONG, "ensemble.members=2")
    wait_for_members(run, 1, 2)
    processes[hanging].send_signal(signal.SIGSTOP)
    others = [process for process in processes if process is not processes[hanging]]
    for process in others:
        process.wait(120)
    processes[hanging].kill()
    (said,) = ended(processes, [-9 if rank == hanging else 2 for rank in range(size)])
    assert f"process {hanging} (process id {processes[hanging].pid} on " in said
    assert "did not answer in time (training.rank_timeout_seconds)" in said


@pytest.mark.slow
def test_a_group_that_has_finished_waits_for_the_others(tmp_path):
    """Longer than for a process that hangs; it is told of signals to them, and notices when one is gone."""
    config = small(tmp_path, ", rank_timeout_seconds: 4")
    short = ["training.epochs=2000", "training.checkpoint_seconds=0.5", "ensemble.members=3"]
    for end in (None, signal.SIGTERM, signal.SIGKILL):
        run = tmp_path / f"run{end or 0}"
        processes = start_ranks(2, config, *short, f"run={run}")
        wait_for(run / "member-2" / "train.log", "best epoch")  # process 1 has nothing more to do
        wait_for_members(run, 3)
        if end is not None:
            processes[0 if end == signal.SIGKILL else 1].send_signal(end)
        codes = {None: [0, 0], signal.SIGTERM: [143, 143], signal.SIGKILL: [-9, 2]}
        said = ended(processes, codes[end])
        assert (len(said), (run / "model.pt").exists()) == ((0, True) if end is None else (1, False))
        if end == signal.SIGKILL:
            assert "process 0 (process id" in said[0]
        elif end is None:
            assert "member 2: best epoch" in (run / "train.log").read_text()


@pytest.mark.slow
def test_what_one_group_cannot_do_ends_all(tmp_path):
    config, run = small(tmp_path), tmp_path / "run"
    assert main(["train", str(config), "training.epochs=2", "ensemble.members=2"]) == 0
    before = {path: path.read_bytes() for path in run.rglob("member-1/checkpoints/*")}

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    arguments = ["--resume", run, *LONG, "training.checkpoint_seconds=0"]
    (said,) = ended(start_ranks(3, *arguments, of_first=full), [2] * 3)
    assert said.startswith(f"kinml-fast: {run}/member-1/checkpoints/")
    assert "could not be written" in said
    assert {path: path.read_bytes() for path in run.rglob("member-1/checkpoints/*")} == before
    checkpoint.load(run / "member-2/checkpoints/last.pt")
    steep = ["training.optimizer={name: sgd, learning_rate: 1.0e+300}", "training.loss.forces=false"]
    (said,) = ended(start_ranks(3, config, *steep, "ensemble.members=2", f"run={tmp_path / 'steep'}"), [2] * 3)
    assert "the loss became infinite or NaN in epoch" in said
    (said,) = ended(start_ranks(2, config, "ensemble={members: 60, vary: folds}", f"run={tmp_path / 'many'}"), [2] * 2)
    assert "for 60 folds" in said


@pytest.mark.slow
def test_a_second_job_in_the_folder_is_refused(tmp_path):
    config, run = small(tmp_path), tmp_path / "run"
    processes = start_ranks(2, config, *LONG, "ensemble.members=2")
    wait_for_members(run, 1, 2)
    (said,) = ended(start_ranks(2, "--resume", run), [2, 2])
    assert said.startswith(f"kinml-fast: {run}: process {processes[0].pid} on ")
    processes[1].send_signal(signal.SIGTERM)
    ended(processes, [143, 143])
