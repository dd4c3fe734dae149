"""The objects that a trainer works with, each by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_helpers import assert_same_bits, level_data, model, training_data

from kinml_fast import ops
from kinml_fast.metrics import Errors
from kinml_fast.train import TrainingConfig
from kinml_fast.train.captured import EpochRecorder
from kinml_fast.train.dataset import InMemory
from kinml_fast.train.epoch_errors import EpochErrors
from kinml_fast.train.judge import Judge
from kinml_fast.train.loss import TaskWeights
from kinml_fast.train.metrics import LevelErrors
from kinml_fast.train.rhythm import Rhythm
from kinml_fast.train.update import Update
from kinml_fast.units import KCAL_PER_MOL

CPU = torch.device("cpu")


def dataset(levels: int) -> InMemory:
    """40 training structures, of which some lack forces or levels."""
    config = TrainingConfig(batch_size=7, loss={"forces": True})
    if levels == 1:
        return InMemory(model(), training_data(forces="some"), config)
    return InMemory(model(fidelities=tuple(range(levels))), level_data(levels=levels, forces="some"), config)


@pytest.mark.parametrize("change", ["nothing", "betas", "eps", "weight_decay", "lr", "weights", "gradient", "state"])
def test_an_epoch_is_recorded_anew_when_what_it_holds_on_to_changes(change, monkeypatch):
    """A recording has numbers and addresses of its time: with others it must not be replayed."""
    recordings = []

    class Recording:
        def __init__(self, *arguments):
            recordings.append(arguments)

    monkeypatch.setattr("kinml_fast.train.captured.CapturedEpoch", Recording)
    trained, step = model(), object()
    update = Update(trained, TrainingConfig(), TaskWeights(TrainingConfig().loss, (), CPU))
    weights, group = trained.networks.weights, update.optimizer.param_groups[0]
    weights.grad = torch.ones_like(weights)
    recorder = EpochRecorder(update, None, 14, 7, torch.device("cuda"))
    assert recorder.recorded(step) is None  # the first epoch
    update.step(None)
    first = recorder.recorded(step)
    assert first is not None
    assert recorder.recorded(step) is first
    old = weights.data, weights.grad, update.optimizer.state[weights]["exp_avg"]  # nobody else gets their addresses
    match change:
        case "betas":
            group["betas"] = (0.5, 0.999)
        case "eps" | "weight_decay" | "lr":
            group[change] = 0.25
        case "weights":
            weights.data = weights.data.clone()
        case "gradient":
            weights.grad = weights.grad.clone()
        case "state":
            update.optimizer.state[weights]["exp_avg"] = old[-1].clone()
    again = recorder.recorded(step) or recorder.recorded(step)
    assert (again is first) == (change == "nothing")
    assert len(recordings) == (1 if change == "nothing" else 2)


@pytest.mark.parametrize("levels", [1, 2])
def test_data_have_the_dimension_of_levels_always(levels):
    data = dataset(levels).whole
    assert data.energies.shape == data.energy_weights.shape == data.force_weights.shape == (levels, 60)
    assert data.forces.shape == (levels, data.n_atoms, 3)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("size", [7, 20, 64])
def test_structures_with_a_weight_are_counted_batch_by_batch(levels, size):
    order, data = torch.from_numpy(dataset(levels).order(3)), dataset(levels).whole
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


class Epoch:
    """Errors of three stretches of 4, 8 and 7 structures, in batches of 4, with and without a break."""

    def __init__(self, levels: int) -> None:
        rng = np.random.default_rng(0)
        self.levels, self.sizes = levels, (4, 8, 7)
        self.energies = [rng.normal(size=(levels, n)) for n in self.sizes]
        self.forces = [rng.random((levels, n, 3)) for n in self.sizes]
        self.known = [rng.random((levels, n)) < 0.8 for n in self.sizes]

    def run(self, errors: EpochErrors, done: int = 0, stop: int | None = None, with_forces: bool = True) -> None:
        """Do the batches from `done` on, up to `stop`."""
        first, begun = 0, errors.first
        for energies, forces, known in zip(self.energies, self.forces, self.known, strict=True):
            batches = -(-energies.shape[1] // 4)
            if first >= begun:
                errors.begin(first, known, with_forces)
                for number in range(max(done - first, 0), batches):
                    if first + number == stop:
                        return
                    some = slice(4 * number, 4 * number + 4)
                    errors.energies[number].copy_(torch.from_numpy(energies[:, some]))
                    if with_forces:
                        errors.forces[number].copy_(torch.from_numpy(forces[:, some]))
                errors.end()
            first += batches


@pytest.mark.parametrize("levels", [1, 2])
def test_errors_of_an_epoch_are_those_of_all_its_structures(levels):
    epoch, errors = Epoch(levels), EpochErrors(levels, 4, CPU)
    epoch.run(errors)
    energies, forces, known = (np.concatenate(x, axis=1) for x in (epoch.energies, epoch.forces, epoch.known))
    for level, (energy, force, _) in enumerate(errors.of_levels([30] * levels, True)):
        expected = Errors.of(energies[level, known[level]])
        assert (energy.mae, energy.rmse, energy.max) == pytest.approx((expected.mae, expected.rmse, expected.max))
        sums = forces[level].sum(axis=0)
        assert force.mae / KCAL_PER_MOL == pytest.approx(sums[0] / 30)
        assert force.rmse / KCAL_PER_MOL == pytest.approx((sums[1] / 30) ** 0.5)
        assert force.max / KCAL_PER_MOL == forces[level, :, 2].max()
    assert [of_level[1] for of_level in errors.of_levels([30] * levels, False)] == [None] * levels


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("stop", range(5))
def test_errors_of_an_epoch_come_back_from_a_checkpoint(levels, stop):
    epoch, whole, cut, again = Epoch(levels), *(EpochErrors(levels, 4, CPU) for _ in range(3))
    epoch.run(whole)
    epoch.run(cut, stop=stop)
    assert cut.is_finite(stop)
    state = cut.state_dict(stop)
    leading = () if levels == 1 else (2,)
    kept = 4 * (stop - cut.first)
    assert cut.first == {0: 0, 1: 1, 2: 1, 3: 3, 4: 3}[stop]
    assert (state["residuals"].shape, state["force_errors"].shape) == ((*leading, kept), (*leading, kept, 3))
    again.load_state_dict(state)
    assert_same_bits(again.state_dict(stop), state)  # saved again before anything was done
    epoch.run(again, done=stop)
    assert again.of_levels([30] * levels, True) == whole.of_levels([30] * levels, True)


def test_errors_that_are_not_finite_show_in_every_stretch():
    epoch = Epoch(1)
    epoch.known[0][:] = epoch.known[2][:] = True
    for stretch, (first, last) in {0: (1, 5), 2: (4, 5)}.items():
        for values in (epoch.energies, epoch.forces):
            before, values[stretch].ravel()[0] = values[stretch].ravel()[0], np.nan
            errors = EpochErrors(1, 4, CPU)
            for batches in range(first, last + 1):
                epoch.run(errors, stop=batches)
                assert not errors.is_finite(batches)
                errors.clear()
            values[stretch].ravel()[0] = before


def test_an_epoch_without_forces_has_no_errors_of_an_earlier_one():
    epoch, errors = Epoch(1), EpochErrors(1, 4, CPU)
    epoch.run(errors)
    errors.clear()
    epoch.run(errors, stop=1, with_forces=False)
    assert not errors.state_dict(1)["force_errors"].any()
    assert not errors.state_dict(1)["error_sums"][1].any()


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
    assert judge.score([LevelErrors(error, error)]) == 3.0  # of energies alone
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
