"""Ensembles that groups of processes train: the files of one process, and one sentence when something fails."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from rank_helpers import again, start
from training_helpers import assert_same_run, write_config

from kinml_fast.cli import main
from kinml_fast.train import lock
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
        done = start(size, *TRAIN, *arguments)
        assert done.returncode == 0, done.stderr
        assert_same_ensembles(folder / "one", folder / "run")
        assert done.stdout.count("ensemble of") == 1  # one process reports
        assert not list((folder / "run").rglob(lock.NAME))

    again(check, tmp_path)
