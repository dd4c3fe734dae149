"""The trainer: against a loop written out in PyTorch, its options, its run folder, its checkpoints."""

from __future__ import annotations

import copy
import io
import logging
import math
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from training_helpers import (
    SAE,
    HastyClock,
    Interrupter,
    Killed,
    assert_same_bits,
    assert_same_run,
    interrupted_run,
    model,
    rows,
    training_data,
)

from kinml_fast import report
from kinml_fast.data.split import Split
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import model_file
from kinml_fast.errors import InputError
from kinml_fast.metrics import Errors
from kinml_fast.train import Trainer, TrainingConfig, TrainingData, checkpoint
from kinml_fast.train.config import OptimizerConfig, SchedulerConfig
from kinml_fast.train.metrics import COLUMNS
from kinml_fast.train.optimizers import FusedAdam, WeightAverage, make_optimizer
from kinml_fast.train.progress import LiveProgress
from kinml_fast.train.schedulers import advance, forget_best, make_scheduler
from kinml_fast.units import KCAL_PER_MOL


@pytest.fixture(autouse=True)
def drawings(request, monkeypatch):
    """Only tests that ask for this fixture draw a report: it takes longer than the rest."""
    if "drawings" not in request.node.function.__code__.co_varnames:
        monkeypatch.setattr(report, "write_report", lambda *arguments: [])


def settings(**keys):
    return TrainingConfig.model_validate({"epochs": 4, "batch_size": 7} | keys)


def fitted(config, folder=None, seed=0, **keys):
    trained = model(seed)
    summary = Trainer(trained, training_data(), config, folder, **keys).fit()
    return trained, summary


# Parts


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_that_of_torch(name, amsgrad, weight_decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1001, dtype=torch.float64, generator=generator)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    a, b = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    config = OptimizerConfig(
        name=name, learning_rate=0.01, betas=[0.8, 0.99], eps=1e-6, amsgrad=amsgrad, weight_decay=weight_decay
    )
    ours = make_optimizer([a], config)
    theirs = kind([b], lr=0.01, betas=(0.8, 0.99), eps=1e-6, amsgrad=amsgrad, weight_decay=weight_decay, fused=True)
    assert isinstance(ours, FusedAdam)
    for step in range(6):
        a.grad = b.grad = torch.randn(1001, dtype=torch.float64, generator=generator)
        ours.step()
        theirs.step()
        if step == 2:  # each goes on from the other's state
            states = ours.state_dict(), theirs.state_dict()
            ours.load_state_dict(states[1])
            theirs.load_state_dict(states[0])
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    ours, theirs = (optimizer.state_dict()["state"][0] for optimizer in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-15, check_dtype=name != "step")


def test_steps_are_counted_in_float64_from_any_state():
    def optimizer_of(weights):
        return make_optimizer([weights], OptimizerConfig(name="adam", learning_rate=0.01, betas=[0.9, 1 - 1e-8]))

    a, b = (torch.nn.Parameter(torch.arange(5.0, dtype=torch.float64)) for _ in range(2))
    ours, other = optimizer_of(a), optimizer_of(b)
    a.grad = b.grad = torch.ones_like(a)
    ours.step()
    # A checkpoint of before: what it says of the steps is a float32. The run goes on with the same bits.
    saved = copy.deepcopy(ours.state_dict())
    saved["state"][0]["step"] = saved["state"][0]["step"].float()
    b.data.copy_(a.data)
    other.load_state_dict(saved)
    for optimizer in (ours, other):
        optimizer.step()
    assert torch.equal(a, b)
    assert other.state[b]["step"].dtype == torch.float64
    assert saved["state"][0]["step"] == 1  # the saved state is left alone
    # The count goes on where a float32 stops, also when it was saved there.
    ours.state[a]["step"].fill_(2.0**24)
    for _ in range(2):
        ours.step()
        other.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert other.state[b]["step"] == ours.state[a]["step"] == 2**24 + 2


def test_sgd_has_its_options():
    weights = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = make_optimizer(
        [weights], OptimizerConfig(name="sgd", learning_rate=0.1, momentum=0.5, nesterov=True, weight_decay=0.2)
    )
    buffer, expected = 0.0, 1.0
    for _ in range(3):
        weights.grad = torch.full_like(weights, 2.0)
        optimizer.step()
        gradient = 2.0 + 0.2 * expected
        buffer = 0.5 * buffer + gradient
        expected -= 0.1 * (gradient + 0.5 * buffer)
    torch.testing.assert_close(weights.detach(), torch.full((3,), expected, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("keys", "rmse", "expected"),
    [
        ({"name": "exp", "gamma": 0.5}, [1, 1, 1], [0.5, 0.25, 0.125]),
        ({"name": "exp"}, [1], [0.99]),
        ({"name": "step", "gamma": 0.1, "step_size": 2}, [1, 1, 1, 1], [1, 0.1, 0.1, 0.01]),
        ({"name": "none"}, [1, 1], [1, 1]),
        # 9.6 is less than 5 % below 10, 9.4 is more.
        ({"name": "rop", "patience": 1}, [10, 9.6, 9.6, 9.6, 9.6], [1, 1, 0.5, 0.5, 0.25]),
        ({"name": "rop", "patience": 1}, [10, 9.6, 9.4, 9.4, 9.4], [1, 1, 1, 1, 0.5]),
        ({"name": "rop", "patience": 0, "threshold": 1, "threshold_mode": "abs"}, [10, 9.1, 8.9], [1, 0.5, 0.5]),
        ({"name": "rop", "patience": 0, "cooldown": 1}, [1, 1, 1, 1], [1, 0.5, 0.5, 0.25]),
        ({"name": "rop", "patience": 0, "factor": 0.1, "min_lr": 0.05}, [1, 1, 1], [1, 0.1, 0.05]),
    ],
)
def test_schedules(keys, rmse, expected):
    weights = torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([weights], OptimizerConfig(learning_rate=1.0))
    scheduler = make_scheduler(optimizer, SchedulerConfig(**keys))
    rates = []
    for value in rmse:
        weights.grad = torch.zeros(1)
        optimizer.step()
        advance(scheduler, float(value))
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected, rel=1e-12)


def test_a_plateau_can_begin_anew():
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], OptimizerConfig(learning_rate=1.0))
    scheduler = make_scheduler(optimizer, SchedulerConfig(patience=1))
    rates = []
    for score in (1.0, 1.0, 5.0, 5.0, 5.0):
        if score == 5.0 and len(rates) == 2:
            forget_best(scheduler)
        advance(scheduler, score)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1, 1, 1, 1, 0.5]
    forget_best(make_scheduler(optimizer, SchedulerConfig(name="exp")))
    forget_best(None)


def test_weight_average():
    weights = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    average = WeightAverage([weights], 0.5)
    expected = 0.0
    for step in range(1, 13):
        weights.data.fill_(step)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.applied():
        torch.testing.assert_close(weights.detach(), torch.full((2,), expected, dtype=torch.float64))
    assert weights.tolist() == [12, 12]


def test_errors_are_in_kcal_per_mol():
    errors = Errors.of(np.array([[3.0], [-4.0]]))
    assert errors.mae == pytest.approx(3.5 * KCAL_PER_MOL)
    assert errors.rmse == pytest.approx(math.sqrt(12.5) * KCAL_PER_MOL)
    assert errors.max == pytest.approx(4 * KCAL_PER_MOL)


# The loop


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_epochs_are_those_of_a_plain_loop(tmp_path, dtype):
    """Batches in the order of the split, mean squared error, errors before each update, plateau by validation."""
    kind = getattr(torch, dtype)
    data = training_data()
    ours = model(3, dtype=kind)
    config = settings(shuffle=False, dtype=dtype, test_every=2, scheduler={"patience": 0, "threshold": 0.5})
    Trainer(ours, data, config, tmp_path / "run").fit()
    last = checkpoint.load(tmp_path / "run/checkpoints/last.pt")

    plain = model(3, dtype=kind)
    plain.sae.copy_(torch.from_numpy(SAE))
    energies = torch.from_numpy(data.structures.energies)
    coordinates = torch.from_numpy(data.structures.coordinates).to(kind)
    species, offsets = torch.from_numpy(data.structures.species), torch.from_numpy(data.structures.offsets)

    def predicted(indices):
        # One structure after the other, single-atom energies and all.
        parts = [slice(int(offsets[i]), int(offsets[i + 1])) for i in indices]
        lengths = [part.stop - part.start for part in parts]
        return plain(
            torch.cat([coordinates[part] for part in parts]),
            torch.cat([species[part] for part in parts]),
            torch.tensor([0, *np.cumsum(lengths)]),
        )

    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
    expected = []
    for epoch in range(4):
        squares, rate = [], optimizer.param_groups[0]["lr"]
        for start in range(0, len(data.split.train), 7):
            batch = data.split.train[start : start + 7]
            difference = predicted(batch) - energies[batch]
            loss = difference.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            squares += difference.detach().square().tolist()
        with torch.no_grad():
            residuals = {
                part: predicted(getattr(data.split, part)) - energies[getattr(data.split, part)]
                for part in ("validation", "test")
            }
        rmse = {part: float(r.square().mean().sqrt()) * KCAL_PER_MOL for part, r in residuals.items()}
        expected.append((epoch, "train", math.sqrt(np.mean(squares)) * KCAL_PER_MOL, rate))
        expected.append((epoch, "validation", rmse["validation"], rate))
        if epoch % 2 == 1:
            expected.append((epoch, "test", rmse["test"], rate))
        scheduler.step(rmse["validation"])

    found = [(int(r["epoch"]), r["split"], float(r["energy_rmse"]), float(r["lr"])) for r in rows(tmp_path / "run")]
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    tolerance = 1e-9 if dtype == "float64" else 1e-4
    np.testing.assert_allclose([r[2:] for r in found], [r[2:] for r in expected], rtol=tolerance)
    assert len({rate for *_, rate in found}) > 1
    torch.testing.assert_close(
        last["weights"]["networks.weights"], plain.networks.weights.detach(), rtol=tolerance, atol=tolerance
    )


def test_targets_do_not_depend_on_the_order_of_elements():
    data = training_data()
    swapped = TrainingData(data.structures.with_elements(("H", "C")), data.split, SAE[::-1])
    weights = []
    for variant in (data, swapped):
        trained = model()
        Trainer(trained, variant, settings(epochs=1)).fit()
        assert trained.sae.tolist() == SAE.tolist()
        weights.append(trained.networks.weights.detach())
    assert torch.equal(*weights)


def test_without_sae_the_models_own_are_kept():
    data = training_data()
    trained = model()
    trained.sae.copy_(torch.tensor([-90.0, -98.0]))
    Trainer(trained, TrainingData(data.structures, data.split), settings(epochs=1)).fit()
    assert trained.sae.tolist() == [-90.0, -98.0]


def test_orders_depend_on_seed_and_epoch_only():
    def order(seed, epoch, shuffle=True):
        trainer = Trainer(model(), training_data(), settings(seed=seed, shuffle=shuffle))
        return trainer.data.order(epoch).tolist()

    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert sorted(order(0, 0)) == order(0, 5, shuffle=False) == list(range(40))


def test_shuffling_happens_and_seeds_count():
    weights = [
        fitted(settings(**keys))[0].networks.weights.detach()
        for keys in ({}, {}, {"seed": 1}, {"shuffle": False}, {"threads": 1}, {"validation_batch_size": 3})
    ]
    same = [torch.equal(weights[0], other) for other in weights]
    assert same == [True, True, False, False, True, True]


def test_the_model_ends_with_the_best_weights_and_their_errors(tmp_path):
    trained, summary = fitted(settings(epochs=12, optimizer={"learning_rate": 0.05}), tmp_path / "run")
    saved = model_file.load(tmp_path / "run/model.pt")
    assert_same_bits(dict(saved.state_dict()), dict(trained.state_dict()))
    notes = model_file.load_training(tmp_path / "run/model.pt")
    assert (notes["epoch"], notes["training"]["epochs"]) == (summary.best_epoch, 12)
    table = [float(r["energy_rmse"]) for r in rows(tmp_path / "run") if r["split"] == "validation"]
    assert summary.best_epoch == int(np.argmin(table))
    assert summary.best_epoch != 11
    assert summary.errors["validation"].rmse == min(table)
    best = checkpoint.load(tmp_path / "run/checkpoints/best.pt")
    assert (best["epoch"], best["score"]) == (summary.best_epoch, min(table))
    assert_same_bits(dict(trained.state_dict()), best["weights"])


def test_early_stopping(tmp_path):
    config = settings(epochs=50, early_stopping={"patience": 2, "min_delta": 1e6})
    _, summary = fitted(config, tmp_path / "run")
    assert summary.epochs == 3  # the first is an improvement on nothing, then two are not
    assert [(r["epoch"], r["split"]) for r in rows(tmp_path / "run")][-1] == ("2", "test")


def test_the_average_of_weights_is_what_is_validated(tmp_path):
    trained, _ = fitted(settings(epochs=3, ema_decay=0.9), tmp_path / "run")
    last = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
    best = checkpoint.load(tmp_path / "run/checkpoints/best.pt")
    assert last["average"]["steps"] == 3 * 6
    assert best["epoch"] == 2
    assert torch.equal(best["weights"]["networks.weights"], last["average"]["averages"][0])
    assert not torch.equal(best["weights"]["networks.weights"], last["weights"]["networks.weights"])
    plain, _ = fitted(settings(epochs=3))
    assert torch.equal(last["weights"]["networks.weights"], plain.networks.weights)
    assert torch.equal(trained.networks.weights, best["weights"]["networks.weights"])


def test_gradients_are_clipped():
    start = model().networks.weights.detach().clone()
    trained, _ = fitted(
        settings(epochs=1, batch_size=40, gradient_clip=1e-3, optimizer={"name": "sgd", "learning_rate": 1.0})
    )
    step = torch.linalg.vector_norm(trained.networks.weights.detach() - start)
    assert float(step) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("seconds", [0, 30])
def test_a_run_that_diverges_says_so_and_keeps_what_it_had(tmp_path, seconds):
    config = settings(
        epochs=30,
        checkpoint_seconds=seconds,
        scheduler={"name": "none"},
        optimizer={"name": "sgd", "learning_rate": 1e200},
    )
    with pytest.raises(InputError, match=r"the loss became infinite or NaN in epoch \d+: lower training\.optimizer"):
        fitted(config, tmp_path / "run")
    assert torch.isfinite(checkpoint.load(tmp_path / "run/checkpoints/last.pt")["residuals"]).all()
    assert all(math.isfinite(float(r["energy_rmse"])) for r in rows(tmp_path / "run"))


def test_no_epochs_keep_the_initial_weights():
    trained, summary = fitted(settings(epochs=0))
    assert torch.equal(trained.networks.weights, model().networks.weights)
    assert (summary.epochs, summary.best_epoch) == (0, -1)


def test_an_empty_test_set_is_left_out(tmp_path):
    data = training_data()
    split = Split(data.split.train, data.split.validation, np.array([], dtype=np.int64))
    summary = Trainer(model(), TrainingData(data.structures, split, SAE), settings(save_every=1), tmp_path).fit()
    assert set(summary.errors) == {"train", "validation"}
    assert {r["split"] for r in rows(tmp_path)} == {"train", "validation"}


def test_data_that_cannot_be_trained_on():
    data = training_data()
    nothing = np.array([], dtype=np.int64)
    with pytest.raises(InputError, match="the validation set is empty"):
        Trainer(model(), TrainingData(data.structures, Split(data.split.train, nothing, nothing)))
    ammonia = Structures.of_one_formula(["N", "H"], np.stack([np.eye(2, 3), np.eye(2, 3) * 2]), np.zeros(2))
    with pytest.raises(InputError, match=r"contains N, which is not among the elements C H"):
        Trainer(model(), TrainingData(ammonia, Split(np.array([0]), np.array([1]), nothing)))


# The run folder


def test_run_folder(tmp_path, drawings):
    run = tmp_path / "deep" / "run"
    fitted(settings(epochs=5, save_every=2), run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best.pt",
        "epoch-0001.pt",
        "epoch-0003.pt",
        "last.pt",
    ]
    assert (run / "metrics.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    table = rows(run)
    assert [(r["epoch"], r["split"]) for r in table] == [
        (str(epoch), split)
        for epoch in range(5)
        for split in ("train", "validation", "test")
        if split != "test" or epoch in (1, 3, 4)
    ]
    assert all(r["forces_mae"] == "" and float(r["energy_max"]) >= float(r["energy_rmse"]) for r in table)
    text = (run / "train.log").read_text()
    assert "epoch 0/4: train RMSE" in text
    assert "epoch 4/4: train RMSE" in text
    assert "best epoch 4 of 5" in text
    assert "R²" in text
    pictures = ["learning_curves.png", "parity_test.png", "parity_train.png", "parity_validation.png"]
    assert sorted(path.name for path in (run / "report").iterdir()) == ["errors.csv", *pictures]
    assert not list(run.glob("*.part"))
    assert "epochs: 5" in (run / "config.yaml").read_text()


def test_the_package_logger_is_left_as_it_was(tmp_path):
    logger = logging.getLogger("kinml_fast")
    before = logger.level, list(logger.handlers)
    fitted(settings(epochs=1), tmp_path / "run")
    assert (logger.level, logger.handlers) == before


def test_no_file_stays_open(tmp_path):
    trainer = Trainer(model(), training_data(), settings(epochs=2), tmp_path / "run")
    trainer.fit()
    places = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert len(places) > 2
    assert not [place for place in places if place.startswith(str(tmp_path))]


def test_tensorboard_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    interrupted_run(run, settings(), stop_at=9)
    Trainer(model(), training_data(), settings(), run, resume=True).fit()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    for column, split in (("energy_rmse", "train"), ("energy_mae", "validation"), ("lr", "train")):
        scalars = [(e.step, e.value) for e in events.Scalars(f"{column}/{split}")]
        expected = [(int(r["epoch"]), np.float32(r[column])) for r in rows(run) if r["split"] == split]
        assert scalars == expected


def test_an_earlier_run_is_not_overwritten_unasked(tmp_path):
    run = tmp_path / "run"
    fitted(settings(epochs=2, save_every=1), run)
    (run / "notes.txt").write_text("mine")
    before = (run / "metrics.csv").read_bytes()
    with pytest.raises(InputError, match=r"holds a run already: continue it with .*--resume.*--overwrite"):
        fitted(settings(epochs=1), run)
    assert (run / "metrics.csv").read_bytes() == before
    fitted(settings(epochs=1), run, overwrite=True)
    assert len(rows(run)) == 3
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.pt", "last.pt"]
    assert "epochs: 1" in (run / "config.yaml").read_text()
    assert (run / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made, or written"):
        fitted(settings(), tmp_path / "file" / "run")


# Resuming


RUNS = {
    "default": {},
    "average": {"ema_decay": 0.9, "save_every": 2, "early_stopping": {"patience": 40}},
    "sgd": {
        "optimizer": {"name": "sgd", "learning_rate": 1e-3, "momentum": 0.9},
        "scheduler": {"name": "exp", "gamma": 0.9},
        "shuffle": False,
        "test_every": 1,
    },
    "adamw": {
        "optimizer": {"name": "adamw", "amsgrad": True, "weight_decay": 0.1},
        "scheduler": {"name": "step", "step_size": 2},
        "gradient_clip": 0.5,
    },
    "plateau": {"optimizer": {"learning_rate": 0.05}, "scheduler": {"patience": 0, "threshold": 0.3}},
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stop_at", [1, 2, 6, 7, 16, 24])
def test_resumed_runs_have_the_same_bits(tmp_path, name, stop_at):
    config = settings(**RUNS[name])
    fitted(config, tmp_path / "whole")
    interrupted_run(tmp_path / "cut", config, stop_at)
    state = checkpoint.load(tmp_path / "cut/checkpoints/last.pt")
    assert state["epoch"] * 6 + state["batch"] == stop_at - 1
    resumed, summary = fitted(config, tmp_path / "cut", seed=99, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert summary.epochs == 4
    best = checkpoint.load(tmp_path / "whole/checkpoints/best.pt")
    assert_same_bits(dict(resumed.state_dict()), best["weights"])


def test_a_run_can_be_interrupted_again_and_again(tmp_path):
    config = settings()
    fitted(config, tmp_path / "whole")
    interrupted_run(tmp_path / "cut", config, 3)
    for _ in range(3):
        progress = Interrupter(6, lambda: (_ for _ in ()).throw(Killed))
        keys = {"resume": True, "progress": progress, "clock": HastyClock()}
        trainer = Trainer(model(), training_data(), config, tmp_path / "cut", **keys)
        with pytest.raises(Killed):
            trainer.fit()
    fitted(config, tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_longer_runs_go_on_where_shorter_ones_ended(tmp_path):
    fitted(settings(epochs=5, test_every=1), tmp_path / "whole")
    fitted(settings(epochs=2, test_every=1), tmp_path / "two")
    fitted(settings(epochs=5, test_every=1, checkpoint_seconds=5), tmp_path / "two", resume=True)
    assert rows(tmp_path / "whole") == rows(tmp_path / "two")
    weights = [checkpoint.load(tmp_path / run / "checkpoints/last.pt")["weights"] for run in ("whole", "two")]
    assert_same_bits(*weights)


def test_a_finished_run_stays_as_it_is(tmp_path):
    _, first = fitted(settings(), tmp_path / "run")
    before = rows(tmp_path / "run")
    _, second = fitted(settings(), tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == before
    assert (second.best_epoch, second.errors) == (first.best_epoch, first.errors)


def test_resuming_without_a_checkpoint_starts(tmp_path):
    fitted(settings(), tmp_path / "whole")
    fitted(settings(), tmp_path / "never", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "never")
    trainer = Trainer(model(), training_data(), settings(), tmp_path / "cut")
    assert not trainer.folder.last.exists()
    fitted(settings(), tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_lost_checkpoint_is_not_replaced_by_a_new_start(tmp_path):
    fitted(settings(save_every=2), tmp_path / "run")
    (tmp_path / "run/checkpoints/last.pt").unlink()
    with pytest.raises(InputError, match=r"last\.pt: is missing: put another checkpoint"):
        fitted(settings(save_every=2), tmp_path / "run", resume=True)


def test_random_generators_are_restored(tmp_path):
    def draw():
        return random.random(), float(np.random.normal()), float(torch.rand(1))  # noqa: NPY002

    np.random.normal()  # noqa: NPY002 - leaves a second number waiting in the generator
    interrupted_run(tmp_path / "run", settings(), 3)  # training itself draws nothing: these are the states of last.pt
    expected = draw()
    draw()
    Trainer(model(), training_data(), settings(), tmp_path / "run", resume=True)
    assert draw() == expected


def test_ctrl_c_writes_a_checkpoint_between_two_batches(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    fitted(settings(), tmp_path / "whole")
    trainer = Trainer(
        model(),
        training_data(),
        settings(checkpoint_seconds=1e6),
        tmp_path / "cut",
        progress=Interrupter(2, lambda: signal.raise_signal(signal.SIGINT)),
        clock=HastyClock(1.0),  # draws after every batch, and has no time to save
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is handler
    state = checkpoint.load(tmp_path / "cut/checkpoints/last.pt")
    assert (state["epoch"], state["batch"]) == (0, 2)
    fitted(settings(), tmp_path / "cut", resume=True)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "training.batch_size = 7 and cannot go on with 8"),
        ({"seed": 5}, "training.seed = 0 and cannot go on with 5"),
        ({"optimizer": {"name": "sgd"}}, "training.optimizer.name = adam and cannot go on with sgd"),
        ({"ema_decay": 0.9}, "training.ema_decay = None and cannot go on with 0.9"),
    ],
)
def test_a_run_cannot_change_on_the_way(tmp_path, change, message):
    fitted(settings(), tmp_path / "run")
    with pytest.raises(InputError) as caught:
        fitted(settings(**change), tmp_path / "run", resume=True)
    assert message in str(caught.value)
    assert "checkpoint_seconds, device, early_stopping, epochs, loss.force_weight, loss.forces" in str(caught.value)


def test_checkpoints_of_another_model_or_other_data(tmp_path):
    fitted(settings(), tmp_path / "run")
    other = model(layers=(9, 4, 1))
    with pytest.raises(InputError, match=r"last\.pt: is a checkpoint of another architecture \(layers is \[8, 4, 1\]"):
        Trainer(other, training_data(), settings(), tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"last\.pt: belongs to other data"):
        Trainer(model(), training_data(31), settings(), tmp_path / "run", resume=True)


@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "garbage", "other", "version", "part"])
def test_damaged_checkpoints(tmp_path, damage):
    run = tmp_path / "run"
    fitted(settings(), run)
    last = run / "checkpoints" / "last.pt"
    raw = bytearray(last.read_bytes())
    if damage == "empty":
        raw = b""
    elif damage == "short":
        raw = raw[: len(raw) // 2]
    elif damage == "flipped":
        raw[len(raw) // 2] ^= 0xFF
    elif damage == "garbage":
        raw = b"nonsense"
    last.write_bytes(bytes(raw))
    if damage == "other":
        torch.save({"weights": torch.zeros(3)}, last)
    elif damage == "version":
        torch.save({"format": checkpoint.FORMAT, "version": 99}, last)
    elif damage == "part":
        state = checkpoint.load(last)
        del state["stopping"]
        checkpoint.save(last, state)
    with pytest.raises(InputError) as caught:
        fitted(settings(), run, resume=True)
    assert str(caught.value).startswith(str(last))
    assert "\n" not in str(caught.value)


def test_a_metrics_file_that_was_cut_is_noticed(tmp_path):
    fitted(settings(), tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").write_text("epoch\n")
    with pytest.raises(InputError, match=r"metrics\.csv: is shorter"):
        fitted(settings(), tmp_path / "run", resume=True)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    import os

    trainer = Trainer(model(), training_data(), settings(), tmp_path / "run", clock=HastyClock())
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((InputError, OSError), match="No space left on device"):
        trainer.fit()
    monkeypatch.undo()
    fitted(settings(), tmp_path / "run", resume=True)
    fitted(settings(), tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert list((tmp_path / "run").rglob("*.part")) == []


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    interrupted_run(tmp_path / "run", settings(), 3)
    leftover = tmp_path / "run" / "checkpoints" / ".last.pt.abc.part"
    leftover.write_bytes(b"half")
    fitted(settings(), tmp_path / "run", resume=True)
    assert not leftover.exists()


def test_a_kept_checkpoint_can_take_the_place_of_the_last(tmp_path):
    fitted(settings(save_every=2), tmp_path / "run")
    before = rows(tmp_path / "run")
    shutil.copy(tmp_path / "run/checkpoints/epoch-0001.pt", tmp_path / "run/checkpoints/last.pt")
    fitted(settings(save_every=2), tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == before


# Progress


def test_live_progress_draws_a_line():
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=150)
    Trainer(model(), training_data(), settings(), progress=LiveProgress(console), clock=HastyClock()).fit()
    drawn = console.file.getvalue()
    assert "epoch 3/3" in drawn
    assert "validation RMSE" in drawn
    assert "structures/s" in drawn
    assert "0:00 left" in drawn


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
def test_other_logs_show_as_much_as_without_the_run_folder(level, tmp_path):
    logger = logging.getLogger("kinml_fast")
    shown = logging.StreamHandler(io.StringIO())
    before = logger.level
    logger.addHandler(shown)
    logger.setLevel(level)
    try:
        fitted(settings(epochs=1), tmp_path / "run")
    finally:
        logger.removeHandler(shown)
        logger.setLevel(before)
    assert "epoch 0/0" in (tmp_path / "run/train.log").read_text()
    assert ("epoch 0/0" in shown.stream.getvalue()) == (level == logging.INFO)
    assert not shown.filters
