"""Several processes that train one model together: the bits of one, on any number of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_helpers import again, digests, sentences, start
from rank_program import KINDS
from training_helpers import assert_same_bits, rows, write_config

from kinml_fast.train import checkpoint

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def alone() -> dict[str, list[str]]:
    return digests(1)


@pytest.mark.parametrize(
    "size", [2, 3, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_any_number_of_processes_gives_the_same_bits(alone, size, tmp_path):
    of_size: list[dict[str, list[str]]] = []
    again(lambda _: of_size.append(digests(size)), tmp_path)
    (found,) = of_size
    assert found.keys() == alone.keys() == KINDS.keys()
    for kind, of_ranks in found.items():
        assert len(of_ranks) == size
        assert len(set(of_ranks)) == 1, f"the weights of {kind} differ between processes"
    assert [kind for kind in KINDS if found[kind][0] != alone[kind][0]] == []


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    again(check_a_run_that_goes_on, tmp_path)


def check_a_run_that_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, "loss: {forces: true}", 60, "all")
    whole, parts, more = tmp_path / "whole", tmp_path / "parts", ["training.batch_size=60"]
    cli = ["-m", "kinml_fast.cli", "train"]
    assert start(1, *cli, str(config), *more, "training.epochs=6", f"run={whole}").returncode == 0
    for size, arguments in [
        (2, [str(config), *more, "training.epochs=2", f"run={parts}"]),
        (3, ["--resume", str(parts), "training.epochs=4"]),
        (1, ["--resume", str(parts), "training.epochs=6"]),
    ]:
        done = start(size, *cli, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("best epoch") == 1  # one process reports
    for rank, times in ((1, 2), (2, 1)):  # three processes were there once, two or more twice
        log = (parts / f"train-{rank}.log").read_text()
        assert log.count(f" process {rank} of ") == times
        assert "best epoch" not in log
        assert "epoch 3/3" in log
    # Each part of the run has looked at the test set at its end.
    assert [row for row in rows(parts) if row["split"] != "test"] == [r for r in rows(whole) if r["split"] != "test"]
    states = [checkpoint.load(run / "checkpoints" / "last.pt") for run in (whole, parts)]
    assert_same_bits(*({k: v for k, v in state.items() if k not in ("elapsed", "metrics_length")} for state in states))


@pytest.mark.slow
def test_mistakes_are_said_once_and_end_all_processes(tmp_path):
    again(check_mistakes, tmp_path)


def check_mistakes(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for arguments, sentence in [
        (["data.files=[nothing.db]"], "nothing.db"),
        (["ensemble.members=2", "training.per_rank=[batch_size]"], "training.per_rank does not go together with"),
        (["no.such=1"], "unknown key no"),
    ]:
        done = start(2, "-m", "kinml_fast.cli", "train", str(config), *arguments, f"run={tmp_path / 'run'}")
        assert done.returncode != 0
        said = sentences(done)
        assert len(said) == 1, done.stderr
        assert sentence in said[0]
