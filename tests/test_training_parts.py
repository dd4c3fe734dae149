"""The objects that a trainer works with, each by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_helpers import level_data, model, training_data

from kinml_fast import ops
from kinml_fast.metrics import Errors
from kinml_fast.train import TrainingConfig
from kinml_fast.train.dataset import Dataset
from kinml_fast.train.epoch_errors import EpochErrors
from kinml_fast.train.judge import Judge
from kinml_fast.train.rhythm import Rhythm

CPU = torch.device("cpu")


def dataset(levels: int) -> Dataset:
    """40 training structures, of which some lack forces or levels."""
    config = TrainingConfig(batch_size=7, loss={"forces": True})
    if levels == 1:
        return Dataset(model(), training_data(forces="some"), config)
    return Dataset(model(fidelities=tuple(range(levels))), level_data(levels=levels, forces="some"), config)


@pytest.mark.parametrize("levels", [1, 2])
def test_data_have_the_dimension_of_levels_always(levels):
    data = dataset(levels)
    assert data.energies.shape == data.energy_weights.shape == data.force_weights.shape == (levels, 60)
    assert data.forces.shape == (levels, data.n_atoms, 3)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("size", [7, 20, 64])
def test_structures_with_a_weight_are_counted_batch_by_batch(levels, size):
    data = dataset(levels)
    order = data.order(3)
    expected = [
        [[np.count_nonzero(level[batch]) for level in weights] for weights in (data.energy_weights, data.force_weights)]
        for batch in order.split(size)
    ]
    counts = ops.count_weights(ops.weighted(data.energy_weights, data.force_weights), order, size)
    assert counts.dtype == torch.float64
    assert counts.tolist() == expected
    assert len({tuple(batch[1]) for batch in expected}) > 1 or size == 64


def test_an_order_depends_on_seed_and_epoch_only():
    data = dataset(1)
    assert data.order(2).tolist() == dataset(1).order(2).tolist() != data.order(1).tolist()


@pytest.mark.parametrize("levels", [1, 2])
def test_errors_of_an_epoch_come_back_from_a_checkpoint(levels):
    errors = EpochErrors(levels, 10, 4, CPU)
    for number, (energies, forces) in enumerate(zip(errors.energies, errors.forces, strict=True)):
        energies.fill_(number + 1)
        forces.fill_(10 * (number + 1))
    state = errors.state_dict(2)
    leading = () if levels == 1 else (2,)
    assert (state["residuals"].shape, state["force_errors"].shape) == ((*leading, 8), (*leading, 8, 3))
    again = EpochErrors(levels, 10, 4, CPU)
    again.load_state_dict(state)
    assert all(torch.equal(*pair) for pair in zip(again.joined(2), errors.joined(2), strict=True))
    assert not again.energies[2].any()
    again.load_state_dict(errors.state_dict(0))
    again.clear_forces()
    assert not again.joined()[1].any()


class Moments:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rhythm_draws_often_and_saves_seldom():
    clock, done = Moments(), []
    rhythm = Rhythm(clock, checkpoint_seconds=10.0)

    def tick(seconds: float) -> list[str]:
        clock.now += seconds
        done.clear()
        if rhythm.due():
            rhythm.tick(lambda: done.append("draw"), lambda: done.append("save"))
        return list(done)

    assert tick(1e6) == []  # nothing is due before the run begins
    rhythm.begin()
    assert tick(0.0) == ["draw"]
    assert tick(0.125) == []
    assert tick(0.25) == ["draw"]
    assert not rhythm.flushing.passed()
    assert tick(9.75) == ["draw", "save"]
    assert rhythm.flushing.passed()
    rhythm.flushing.restart()
    assert not rhythm.flushing.passed()
    assert tick(9.0) == ["draw"]
    assert tick(1.0) == ["draw", "save"]


def test_an_interrupted_run_is_saved_before_it_ends():
    clock, done = Moments(), []
    rhythm = Rhythm(clock, checkpoint_seconds=1e6)
    rhythm.begin()
    rhythm.tick(lambda: None, None)
    rhythm.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        rhythm.tick(lambda: done.append("draw"), lambda: done.append("save"))
    assert done == ["save"]


def test_a_judge_keeps_the_best_weights_and_loses_patience():
    judged = model()
    judge = Judge(TrainingConfig(early_stopping={"patience": 2, "min_delta": 1.0}), 1, judged)
    error = Errors(0.5, 3.0, 4.0)
    assert judge.score([(error, error)]) == 3.0  # of energies alone
    stopped = []
    for epoch, score in enumerate([3.0, 2.5, 2.4, 2.9, 2.8]):
        with torch.no_grad():
            judged.networks.weights.fill_(epoch)
        judge.judge(epoch, score)
        stopped.append(judge.out_of_patience)
    assert stopped == [False, False, True, True, True]  # 2.5 and 2.4 are less than 1 below 3
    assert (judge.best.epoch, judge.best.score) == (2, 2.4)
    assert set(judge.best.weights["networks.weights"].tolist()) == {2.0}
    same, other = (Judge(TrainingConfig(score={"energy": factor}), 1, judged) for factor in (1.0, 2.0))
    assert same.load_state_dict(judge.state_dict())
    assert same.best.epoch == 2
    assert not other.load_state_dict(judge.state_dict())
    assert other.best.epoch == -1
