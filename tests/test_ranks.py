"""Several processes that train one model together: the bits of one, on any number of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from op_helpers import SMALL, normal, ragged
from rank_helpers import again, sentences, start
from rank_program import KINDS
from training_helpers import assert_same_bits, rows, write_config

from kinml_fast import ops
from kinml_fast.nn import EnergyModel
from kinml_fast.ops import Loss, Model, StepResults, System
from kinml_fast.train import checkpoint
from kinml_fast.train.ranks import Ranks

TESTS = Path(__file__).parent
PLANNED = {"energies", "energies_float32"}
"""What one process computes with another op, whose sums have another order."""


def digests(size: int) -> dict[str, list[str]]:
    done = start(size, str(TESTS / "rank_program.py"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
    differing = {kind for kind in KINDS if found[kind][0] != alone[kind][0]}
    assert differing <= PLANNED


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
    # Each part of the run has looked at the test set at its end.
    assert [row for row in rows(parts) if row["split"] != "test"] == [r for r in rows(whole) if r["split"] != "test"]
    states = [checkpoint.load(run / "checkpoints" / "last.pt") for run in (whole, parts)]
    assert_same_bits(*({k: v for k, v in state.items() if k not in ("elapsed", "metrics_length")} for state in states))


def test_mistakes_are_said_once_and_end_all_processes(tmp_path):
    again(check_mistakes, tmp_path)


def check_mistakes(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for arguments, sentence in [
        (["data.files=[nothing.db]"], "nothing.db"),
        (["ensemble.members=2"], "several processes cannot train an ensemble"),
        (["no.such=1"], "unknown key no"),
    ]:
        done = start(2, "-m", "kinml_fast.cli", "train", str(config), *arguments, f"run={tmp_path / 'run'}")
        assert done.returncode != 0
        said = sentences(done)
        assert len(said) == 1, done.stderr
        assert sentence in said[0]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_shares_are_all_and_differ_by_one_at_most(size):
    for count in (0, 1, 5, 8, 32):
        shares = [Ranks(rank, size).share(count) for rank in range(size)]
        assert shares[0][0] == 0
        assert shares[-1][1] == count
        assert all(one[1] == other[0] for one, other in itertools.pairwise(shares))
        lengths = {last - first for first, last in shares}
        assert max(lengths) - min(lengths) <= 1


# ---- the ops ------------------------------------------------------------------------------------


class Case:
    """A batch of molecules of all sizes in any order, and the loss of a data set that holds them."""

    def __init__(self, dtype: torch.dtype, levels: int) -> None:
        x, z, o = ragged((10, 3, 40, 0, 25, 1, 33, 12, 70, 9), 2, 1)
        self.system = System(x.to(dtype), z, o)
        torch.manual_seed(1)
        model = EnergyModel(
            SMALL,
            layers=(9, 5, 1),
            activations=["gaussian", "gaussian", "identity"],
            dtype=dtype,
            fidelities=tuple(range(levels)),
        )
        self.weights, self.model = model.networks.weights.detach(), Model(SMALL.packed(), model.networks.packed)
        self.structures = torch.tensor([4, 0, 8, 1, 2, 6, 5, 7, 3])
        n = len(o) - 1
        self.weight = normal(levels, n, seed=4).abs()
        self.weight[:, 2] = 0
        (counts,) = ops.count_weights(ops.weighted(self.weight, self.weight), self.structures, n)
        scales = torch.tensor([0.3, 0.7], dtype=torch.float64)
        forces = normal(levels, len(z), 3, seed=5)
        self.loss = Loss(normal(levels, n, seed=3), self.weight, forces, self.weight, scales, counts)

    def results(self) -> StepResults:
        levels, count = len(self.weight), len(self.structures)
        shapes = (2,), (levels, count), (levels, count, 3)
        losses, residuals, errors = (torch.full(shape, 7.0, dtype=torch.float64) for shape in shapes)
        return StepResults(losses, torch.empty_like(self.weights), residuals, errors)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_a_batch_joined_are_the_whole_step(size, dtype, levels):
    case = Case(dtype, levels)
    expected, joint = case.results(), case.results()
    ops.force_step(case.system, case.structures, case.weights, case.loss, expected, case.model)
    bounds = ops.batch_parts(case.system.offsets, case.structures)
    assert len(bounds) > 3
    assert bounds[0] == 0
    assert bounds[-1] == len(case.structures)
    rows = []
    for rank in range(size):
        first, last = Ranks(rank, size).share(len(bounds) - 1)
        own = slice(int(bounds[first]), int(bounds[last]))
        count = own.stop - own.start
        residuals = torch.empty(levels, count, dtype=torch.float64)
        errors = torch.empty(levels, count, 3, dtype=torch.float64)
        gradients = torch.empty(last - first, len(case.weights), dtype=dtype)
        ops.force_step_parts(
            case.system,
            case.structures[own],
            bounds[first : last + 1] - bounds[first],
            case.weights,
            case.loss,
            gradients,
            residuals,
            errors,
            case.model,
        )
        joint.energy_residuals[:, own], joint.force_errors[:, own] = residuals, errors
        rows.append(gradients)
    ops.force_step_join(case.system, case.structures, case.loss, torch.cat(rows), joint)
    for name in ("losses", "gradient", "energy_residuals", "force_errors"):
        assert torch.equal(getattr(joint, name), getattr(expected, name)), name


def test_wrong_parts_are_refused():
    case = Case(torch.float64, 1)
    bounds = ops.batch_parts(case.system.offsets, case.structures)
    found = case.results()
    rows = torch.empty(len(bounds) - 1, len(case.weights), dtype=torch.float64)

    def refused(message: str, bounds=bounds, rows=rows) -> None:
        with pytest.raises(RuntimeError, match=f"^kinml_fast: .*{message}"):
            ops.force_step_parts(
                case.system,
                case.structures,
                bounds,
                case.weights,
                case.loss,
                rows,
                found.energy_residuals,
                found.force_errors,
                case.model,
            )

    refused("bounds must increase from 0 to the number of structures, 9", bounds=bounds.flip(0))
    refused("bounds must increase from 0", bounds=bounds[:-1])
    refused(r"gradients must be contiguous of shape", rows=rows[1:])
    refused("gradients is .*float32|gradients", rows=rows.float())
    with pytest.raises(RuntimeError, match=r"structures\[1\] = 10 is not in \[0, 10\)"):
        ops.batch_parts(case.system.offsets, torch.tensor([0, 10]))
    assert ops.batch_parts(case.system.offsets, case.structures[:0]).tolist() == [0]
