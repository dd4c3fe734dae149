"""Training on several levels of theory: against a loop in plain PyTorch, and what lower levels change in a run."""

from __future__ import annotations

import csv
import json
import logging
import math
import weakref
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from op_helpers import keywords
from training_helpers import (
    LEVEL_SAE,
    assert_same_bits,
    assert_same_run,
    interrupted_run,
    level_data,
    model,
    rows,
)

from kinml_fast import cli, reference, report
from kinml_fast.data import DescriptorSource
from kinml_fast.data.split import Split
from kinml_fast.deploy import model_file
from kinml_fast.errors import InputError
from kinml_fast.metrics import Errors
from kinml_fast.nn import EnergyModel
from kinml_fast.train import Trainer, TrainingConfig, TrainingData, checkpoint, config, runs
from kinml_fast.train.results import Summary
from kinml_fast.train.steps import FusedStep
from kinml_fast.units import KCAL_PER_MOL

MIXED = ("CCHH", "CH", "HHH", "CHHHC")
"""Molecules of two to five atoms, some without carbon."""

FIDELITIES = (0, 3, 7)
"""What the levels are called here: not their places, to tell both apart."""


@pytest.fixture(autouse=True)
def drawings(request, monkeypatch):
    """Only tests that ask for this fixture draw a report: it takes longer than the rest."""
    if "drawings" not in request.node.function.__code__.co_varnames:
        monkeypatch.setattr(report, "write_report", lambda *arguments: [])


def settings(**keys) -> TrainingConfig:
    keys["loss"] = {"forces": True} | keys.get("loss", {})
    return TrainingConfig.model_validate({"epochs": 4, "batch_size": 7} | keys)


def fitted(chosen, data, folder=None, seed=0, of=None, **keys):
    levels = data.structures.levels
    trained = of or model(seed, dtype=getattr(torch, chosen.dtype), fidelities=FIDELITIES[:levels])
    summary = Trainer(trained, data, chosen, folder, **keys).fit()
    return trained, summary


def chain(trained: EnergyModel, flat: torch.Tensor) -> list[list[list[reference.Layer]]]:
    """The layers of each level and element as the oracle takes them, as views of `flat`."""

    def view(own: torch.Tensor | None) -> torch.Tensor | None:
        if own is None:
            return None
        return flat[own.storage_offset() : own.storage_offset() + own.numel()].view(own.shape)

    networks = trained.networks
    return [
        [
            [
                tuple(view(part) for part in networks.layer(s, layer, level))
                for layer in range(len(networks.activations))
            ]
            for s in range(len(trained.elements))
        ]
        for level in range(len(trained.fidelities))
    ]


class PlainLoop:
    """The same training, structure by structure, level by level, with the oracle and autograd twice."""

    def __init__(self, data: TrainingData, chosen: TrainingConfig, seed: int = 0) -> None:
        self.data, self.config, self.levels = data, chosen, data.structures.levels
        self.model = model(seed, fidelities=FIDELITIES[: self.levels])
        self.weights = self.model.networks.weights.detach().clone().requires_grad_()
        self.log_sigma = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        self.parameters = keywords(self.model.descriptor)

    def errors(self, index: int) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Residuals of energy and forces at each level; None where there is no reference."""
        s, atoms = self.data.structures, slice(*self.data.structures.offsets[index : index + 2].tolist())
        x = torch.from_numpy(s.coordinates[atoms]).requires_grad_()
        species, offsets = torch.from_numpy(s.species[atoms]), torch.tensor([0, len(x)])
        features = reference.aev(x, species, offsets, **self.parameters)
        of_atoms, found = torch.zeros(len(x), dtype=torch.float64), []
        for level, layers in enumerate(chain(self.model, self.weights)):
            inputs = features if level == 0 else torch.cat([features, of_atoms[:, None]], dim=1)
            activations = list(self.model.networks.activations)
            of_atoms = of_atoms + reference.networks(inputs, species, layers, activations)
            energy, forces = None, None
            if not np.isnan(s.energies[level, index]):
                target = s.energies[level, index] - s.counts()[index] @ LEVEL_SAE[level]
                energy = of_atoms.sum() - target
            if s.forces is not None and not np.isnan(s.forces[level, atoms]).any():
                (slope,) = torch.autograd.grad(of_atoms.sum(), x, create_graph=True)
                forces = -slope - torch.from_numpy(s.forces[level, atoms])
            found.append((energy, forces))
        return found

    def total(self, batch: list[int], with_forces: bool) -> torch.Tensor:
        """The loss of a batch, written out."""
        loss, weights = self.config.loss, self.data.weights
        terms: list[list[list[torch.Tensor]]] = [[[] for _ in range(self.levels)] for _ in range(2)]
        for index in batch:
            weight = 1.0 if weights is None else float(weights[index])
            for level, (energy, forces) in enumerate(self.errors(index)):
                own = weight * (loss.level_weights or [1.0] * self.levels)[level]
                if energy is not None:
                    self.squares[level]["energy"].append(float(energy.detach()) ** 2)
                    if own:
                        size = self.data.structures.sizes[index] if loss.energy_per_atom else 1
                        terms[0][level].append(own * (energy / size) ** 2)
                if forces is not None and own:
                    self.squares[level]["forces"] += (forces.detach() ** 2).flatten().tolist()
                    terms[1][level].append(own * (forces**2).mean())
        sums = [sum(torch.stack(own).mean() for own in levels if own) for levels in terms]
        if not with_forces:
            return sums[0]
        if loss.weighting == "learned":
            there = [any(levels) for levels in terms]
            return sum(
                torch.exp(-self.log_sigma[t]) * sums[t] + self.log_sigma[t] for t, has in enumerate(there) if has
            )
        return (1 - loss.force_weight) * sums[0] + loss.force_weight * sums[1]

    def run(self) -> list[list[dict[str, float]]]:
        """Train, and return the errors of each epoch and level, kcal/mol, before the updates."""
        optimizer = torch.optim.Adam([self.weights, self.log_sigma], lr=1e-3, eps=1e-6)
        found = []
        for epoch in range(self.config.epochs):
            self.squares = [{"energy": [], "forces": []} for _ in range(self.levels)]
            order = self.data.split.train.tolist()
            for first in range(0, len(order), self.config.batch_size):
                total = self.total(order[first : first + self.config.batch_size], self.config.loss.has_forces(epoch))
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
            found.append(
                [{k: math.sqrt(np.mean(v)) * KCAL_PER_MOL for k, v in own.items() if v} for own in self.squares]
            )
        return found


WEIGHTS = np.where(np.arange(48) % 5 == 0, 0.0, 1 + np.arange(48) % 3)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("loss", "levels", "forces", "weights"),
    [
        ({}, 2, "all", None),
        ({}, 3, "some", None),
        ({"force_weight": 0.4, "level_weights": [2.0, 0.5]}, 2, "some", WEIGHTS),
        ({"weighting": "learned", "energy_per_atom": True}, 2, "some", WEIGHTS),
        ({"weighting": "learned", "level_weights": [0.0, 1.0, 3.0]}, 3, "some", None),
        ({"forces_from": 1, "forces_until": 2}, 2, "some", None),
        ({"forces": False, "energy_per_atom": True}, 3, "some", WEIGHTS),
        ({"forces": False}, 2, "none", None),
    ],
)
@pytest.mark.parametrize("jacobian", ["recompute", "stored"])
def test_epochs_are_those_of_a_plain_loop(tmp_path, loss, levels, forces, weights, jacobian):
    """Molecules of all sizes, levels and forces that lack: losses, metrics, learned weights, phases."""
    data = level_data(12, levels, forces, MIXED, weights)
    chosen = settings(
        epochs=3, shuffle=False, scheduler={"name": "none"}, loss=loss, jacobian=jacobian, optimizer={"eps": 1e-6}
    )
    fitted(chosen, data, tmp_path / "run")
    last = checkpoint.load(tmp_path / "run/checkpoints/last.pt")

    plain = PlainLoop(data, chosen)
    expected = plain.run()
    torch.testing.assert_close(last["weights"]["networks.weights"], plain.weights.detach(), rtol=1e-9, atol=1e-9)
    if chosen.loss.weighting == "learned":
        torch.testing.assert_close(last["tasks"]["log_sigma"], plain.log_sigma.detach(), rtol=1e-9, atol=1e-11)
        assert last["tasks"]["log_sigma"].abs().min() > 0
    train = [r for r in rows(tmp_path / "run") if r["split"] == "train"]
    for epoch, (row, errors) in enumerate(zip(train, expected, strict=True)):
        for level, own in enumerate(errors):
            suffix = "" if level == levels - 1 else f"_fidelity{FIDELITIES[level]}"
            assert float(row[f"energy_rmse{suffix}"]) == pytest.approx(own["energy"], rel=1e-9)
            has_forces = chosen.loss.has_forces(epoch) and "forces" in own
            assert (row[f"forces_rmse{suffix}"] != "") == has_forces
            if has_forces:
                assert float(row[f"forces_rmse{suffix}"]) == pytest.approx(own["forces"], rel=1e-9)


@pytest.mark.parametrize("source", ["native", "aevmod"])
@pytest.mark.parametrize("levels", [2, 3])
def test_ten_epochs_from_stored_jacobians(source, levels):
    data = level_data(6, levels, "some", MIXED)
    expected, of_expected = fitted(settings(epochs=10), data)
    if source == "aevmod":
        pytest.importorskip("aevmod")
        data = replace(data, source=DescriptorSource("aevmod"))
    found, summary = fitted(settings(epochs=10, jacobian="stored"), data)
    start = model(fidelities=FIDELITIES[:levels]).networks.weights
    assert (expected.networks.weights - start).abs().max() > 1e-3
    torch.testing.assert_close(found.networks.weights, expected.networks.weights, rtol=1e-9, atol=1e-9)
    assert summary.lower.keys() == of_expected.lower.keys() == set(FIDELITIES[: levels - 1])
    assert summary.lower[0][1]["test"].rmse == pytest.approx(of_expected.lower[0][1]["test"].rmse, rel=1e-8)


def test_energy_steps_of_one_level_and_of_several_agree():
    """A level that does not count changes nothing."""
    data = level_data(12, 2, "none", MIXED)
    one = TrainingData(data.structures.level(0), data.split, LEVEL_SAE[0])
    chosen = settings(loss={"forces": False, "level_weights": [1.0, 0.0]}, score={"level_weights": [1.0, 0.0]})
    both, _ = fitted(chosen, data)
    alone, _ = fitted(settings(loss={"forces": False}), one)
    first = alone.networks.weights.numel()
    torch.testing.assert_close(both.networks.weights[:first], alone.networks.weights, rtol=1e-9, atol=1e-9)
    start = model(fidelities=FIDELITIES[:2]).networks.weights
    assert torch.equal(both.networks.weights[first:], start[first:])


@pytest.mark.parametrize("forces", [False, True])
def test_structures_with_the_low_level_alone_train_it(forces):
    """A step is that of all structures at the low level plus that of the complete ones at the high level."""
    data = level_data()
    complete = np.arange(60) % 2 == 1
    energies, slopes = data.structures.energies.copy(), data.structures.forces.copy()
    energies[1, ~complete] = np.nan
    slopes[1, ~complete[data.structures.owners]] = np.nan
    masked = replace(data, structures=replace(data.structures, energies=energies, forces=slopes))
    some = replace(data, split=replace(data.split, train=data.split.train[complete[data.split.train]]))
    start = model(fidelities=FIDELITIES[:2]).networks.weights.detach()

    def change(own: TrainingData, factors: list[float]) -> torch.Tensor:
        chosen = settings(
            epochs=1,
            batch_size=1000,
            loss={"forces": forces, "level_weights": factors},
            optimizer={"name": "sgd", "learning_rate": 1.0},
        )
        return fitted(chosen, own)[0].networks.weights.detach() - start

    low, high = change(data, [1.0, 0.0]), change(some, [0.0, 1.0])
    torch.testing.assert_close(change(masked, [1.0, 1.0]), low + high, rtol=1e-9, atol=1e-11)
    assert min(low.abs().max(), high.abs().max()) > 1e-3


def test_masked_structures_are_counted(caplog):
    data = level_data(24, 2, "some")
    with caplog.at_level(logging.INFO):
        fitted(settings(epochs=1), data)
    s = data.structures
    for level, fidelity in enumerate(FIDELITIES[:2]):
        for what, known in (("energies", s.known_energies), ("forces", s.known_forces)):
            own = [int(known[level, getattr(data.split, part)].sum()) for part in ("train", "validation", "test")]
            assert (
                f"{what} of fidelity {fidelity}: {own[0]} of 32 train, {own[1]} of 8 validation, {own[2]} of 8 test"
                in (caplog.text)
            )
    assert "(fidelity 0: " in caplog.text


# Runs


RUNS = {
    "static": {"ema_decay": 0.9, "loss": {"force_weight": 0.5, "level_weights": [0.5, 1.0]}},
    "learned": {"loss": {"weighting": "learned"}, "gradient_clip": 0.5, "score": {"level_weights": [1.0, 1.0]}},
    "phases": {"loss": {"forces_from": 1, "forces_until": 3, "weighting": "learned"}, "scheduler": {"patience": 0}},
    "stored": {"jacobian": "stored", "dtype": "float32", "optimizer": {"name": "sgd", "momentum": 0.9}},
    "energies": {"loss": {"forces": False}},
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stop_at", [2, 7, 15, 24])
def test_resumed_runs_have_the_same_bits(tmp_path, name, stop_at):
    chosen, data = settings(**RUNS[name]), level_data(forces="some")
    dtype = getattr(torch, chosen.dtype)
    fitted(chosen, data, tmp_path / "whole")
    interrupted_run(tmp_path / "cut", chosen, stop_at, data=data, dtype=dtype, fidelities=FIDELITIES[:2])
    state = checkpoint.load(tmp_path / "cut/checkpoints/last.pt")
    assert state["epoch"] * 6 + state["batch"] == stop_at - 1
    assert state["residuals"].shape == (2, min(7 * state["batch"], 40))
    resumed, _ = fitted(chosen, data, tmp_path / "cut", seed=99, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    best = checkpoint.load(tmp_path / "whole/checkpoints/best.pt")
    assert_same_bits(dict(resumed.state_dict()), best["weights"])


@pytest.mark.parametrize("name", RUNS)
def test_the_number_of_threads_does_not_count(tmp_path, name):
    data = level_data(60, 3, "some")
    chosen = RUNS[name] | {"epochs": 2, "batch_size": 50}
    chosen["loss"] = {k: v for k, v in chosen["loss"].items() if k != "level_weights"} if "loss" in chosen else {}
    chosen.pop("score", None)
    for threads in (1, 2, 5):
        fitted(settings(**chosen, threads=threads), data, tmp_path / str(threads))
    for threads in (2, 5):
        assert rows(tmp_path / "1") == rows(tmp_path / str(threads))
        a, b = (checkpoint.load(tmp_path / run / "checkpoints/last.pt") for run in ("1", str(threads)))
        for key in ("weights", "optimizer", "tasks", "average", "residuals", "force_errors"):
            assert_same_bits(a[key], b[key])


@pytest.mark.slow
def test_metrics_summary_and_report(tmp_path, drawings, caplog):
    data = level_data(24, 3, "some")
    trained, summary = fitted(settings(epochs=5, test_every=1), data, tmp_path / "run")
    s = data.structures
    with torch.no_grad():
        energies, forces = trained.level_energies_and_forces(
            *map(torch.from_numpy, (s.coordinates, s.species, s.offsets))
        )
    levels = [*summary.lower.values(), (summary.errors, summary.forces)]
    assert list(summary.lower) == [0, 3]
    best = {r["split"]: r for r in rows(tmp_path / "run") if int(r["epoch"]) == summary.best_epoch}
    for level, (of_energies, of_forces, *_) in enumerate(levels):
        suffix = "" if level == 2 else f"_fidelity{FIDELITIES[level]}"
        for part in ("train", "validation", "test"):
            chosen = getattr(data.split, part)
            known = chosen[s.known_energies[level, chosen]]
            expected = Errors.of(energies[level].numpy()[known] - s.energies[level, known])
            errors = of_energies[part]
            assert (errors.mae, errors.rmse, errors.max) == pytest.approx((expected.mae, expected.rmse, expected.max))
            atoms = np.isin(s.owners, chosen[s.known_forces[level, chosen]])
            expected = Errors.of(forces[level].numpy()[atoms] - s.forces[level, atoms])
            errors = of_forces[part]
            assert (errors.mae, errors.rmse, errors.max) == pytest.approx((expected.mae, expected.rmse, expected.max))
            if part != "train":
                assert float(best[part][f"forces_max{suffix}"]) == of_forces[part].max
                assert float(best[part][f"energy_mae{suffix}"]) == of_energies[part].mae
    names = sorted(path.name for path in (tmp_path / "run/report").iterdir())
    parts = ("test", "train", "validation")
    pictures = [f"parity_{part}{suffix}.png" for part in parts for suffix in ("", "_fidelity0", "_fidelity3")]
    assert names == sorted(["errors.csv", "learning_curves.png", *pictures])
    with (tmp_path / "run/report/errors.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    kinds = [f"{kind}{suffix}" for suffix in ("", "_fidelity0", "_fidelity3") for kind in ("energy", "forces")]
    assert [(r["split"], r["quantity"]) for r in table] == [
        (part, kind) for part in ("train", "validation", "test") for kind in kinds
    ]
    (row,) = [r for r in table if (r["split"], r["quantity"]) == ("test", "energy_fidelity3")]
    assert float(row["rmse"]) == summary.lower[3][0]["test"].rmse
    log = (tmp_path / "run/train.log").read_text()
    assert "energy, fidelity 3 " in log
    assert "kcal/mol and kcal/mol/Å" in log


def test_summaries_come_back_from_the_processes_of_an_ensemble():
    _, summary = fitted(settings(epochs=1), level_data(levels=3, forces="some"))
    assert len(summary.lower) == 2
    assert Summary.from_dict(json.loads(json.dumps(asdict(summary)))) == summary


def test_learning_curves_have_a_column_for_each_level(tmp_path):
    data = level_data(24, 3, "some")
    fitted(settings(), data, tmp_path / "run")
    figure = report.draw_learning_curves(report.read_metrics(tmp_path / "run/metrics.csv"))
    titles = [ax.get_title(loc="left").partition(" validation")[0] for ax in figure.axes[:3]]
    assert titles == ["best", "fidelity 3:", "fidelity 0:"]
    assert len(figure.axes) == 9
    assert all(len(ax.lines) > 3 for ax in figure.axes[:6])


def test_tensorboard_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fitted(settings(), level_data(forces="some"), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    scalars = [event.value for event in events.Scalars("forces_rmse_fidelity0/train")]
    table = [r for r in rows(tmp_path / "run") if r["split"] == "train"]
    assert scalars == [np.float32(r["forces_rmse_fidelity0"]) for r in table]


@pytest.mark.parametrize("factors", [None, [1.0, 0.0], [0.5, 2.0]])
def test_the_score_is_that_of_the_levels_that_are_asked_for(tmp_path, factors):
    score = {"energy": 2.0, "forces": 0.5, "level_weights": factors}
    chosen = settings(epochs=12, optimizer={"learning_rate": 0.1}, score=score)
    _, summary = fitted(chosen, level_data(12, 2, "some"), tmp_path / "run")
    table = [r for r in rows(tmp_path / "run") if r["split"] == "validation"]
    low, high = factors or (0.0, 1.0)
    scores = [
        sum(
            factor * (2.0 * float(r[f"energy_rmse{suffix}"]) + 0.5 * float(r[f"forces_rmse{suffix}"]))
            for factor, suffix in ((low, "_fidelity0"), (high, ""))
        )
        for r in table
    ]
    assert summary.best_epoch == int(np.argmin(scores))
    assert checkpoint.load(tmp_path / "run/checkpoints/best.pt")["score"] == pytest.approx(min(scores), rel=1e-14)


def test_what_can_change_when_resuming(tmp_path, caplog):
    data = level_data(forces="some")
    fitted(settings(epochs=2), data, tmp_path / "run")
    with caplog.at_level(logging.INFO):
        fitted(
            settings(epochs=3, score={"level_weights": [1.0, 1.0]}, loss={"level_weights": [1.0, 2.0]}),
            data,
            tmp_path / "run",
            resume=True,
        )
    assert "the score is another one than before" in caplog.text
    assert len([r for r in rows(tmp_path / "run") if r["split"] == "train"]) == 3
    other = model(fidelities=(0, 4))
    with pytest.raises(InputError, match=r"another architecture \(fidelities is \[0, 3\] there and \[0, 4\] here\)"):
        fitted(settings(epochs=3), data, tmp_path / "run", of=other, resume=True)


def test_a_run_that_diverges_says_so(tmp_path):
    chosen = settings(epochs=30, scheduler={"name": "none"}, optimizer={"name": "sgd", "learning_rate": 1e200})
    with pytest.raises(InputError, match=r"the loss became infinite or NaN in epoch \d+: lower training\.optimizer"):
        fitted(chosen, level_data(forces="some"), tmp_path / "run")
    state = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
    assert torch.isfinite(state["weights"]["networks.weights"]).all()


def test_descriptors_are_kept_only_while_energies_are_trained_on_alone():
    chosen = settings(loss={"forces_from": 1, "forces_until": 2})
    trainer = Trainer(model(fidelities=(0, 1)), level_data(), chosen)
    trainer.prepare()
    kept = weakref.ref(trainer.step(False, trainer.data.whole))
    assert isinstance(kept(), FusedStep)
    trainer.train_epoch()
    assert kept() is not None
    trainer.train_epoch()
    assert kept() is None
    trainer.train_epoch()


def test_float32_follows_float64():
    data = level_data(15, 2, "some", MIXED)
    summaries = []
    for dtype in (torch.float64, torch.float32):
        trained = model(dtype=dtype, fidelities=FIDELITIES[:2])
        with torch.no_grad():
            trained.networks.weights.copy_(model(fidelities=FIDELITIES[:2]).networks.weights)
        chosen = settings(epochs=3, dtype=str(dtype).removeprefix("torch."))
        summaries.append(fitted(chosen, data, of=trained)[1])
    double, single = ([s.errors, s.forces, *s.lower[0][:2]] for s in summaries)
    for a, b in zip(double, single, strict=True):
        for part in ("train", "validation", "test"):
            assert a[part].rmse == pytest.approx(b[part].rmse, rel=1e-4)


def test_single_atom_energies_of_each_level_go_with_their_elements():
    data = level_data(forces="some")
    swapped = TrainingData(data.structures.with_elements(("H", "C")), data.split, LEVEL_SAE[:2, ::-1])
    a, _ = fitted(settings(epochs=1), data)
    b, _ = fitted(settings(epochs=1), swapped)
    assert a.sae.tolist() == b.sae.tolist() == LEVEL_SAE[:2].tolist()
    assert torch.equal(a.networks.weights, b.networks.weights)


def test_further_terms_of_the_loss():
    """A term on the highest energies alone is the same as its level's own term, but for what the lower level adds."""
    data = level_data(10, 2, "none")
    targets = torch.from_numpy(data.structures.energies[1])

    def high(trained, batch):
        energies = trained(batch.coordinates, batch.species, batch.offsets)
        return (energies - targets[batch.structures]).square().mean()

    common = {"loss": {"forces": False}, "optimizer": {"eps": 1e-6}}
    expected, _ = fitted(settings(**common), data)
    common["loss"]["level_weights"] = [1.0, 0.0]
    found, _ = fitted(settings(**common), data, extra_losses={"high": high})
    torch.testing.assert_close(found.networks.weights, expected.networks.weights, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": {"level_weights": [1.0]}}, r"training\.loss\.level_weights has 1 entries, but there are 2 levels"),
        ({"score": {"level_weights": [1.0] * 3}}, r"training\.score\.level_weights has 3 entries, but there are 2"),
    ],
)
def test_factors_of_levels_that_are_none(keys, message):
    with pytest.raises(InputError, match=message):
        fitted(settings(**keys), level_data())
    with pytest.raises(ValueError, match="level_weights are all 0"):
        settings(loss={"level_weights": [0.0, 0.0]})
    with pytest.raises(ValueError, match="level_weights are all 0"):
        settings(score={"level_weights": [0.0, 0.0]})


def test_levels_that_data_and_model_do_not_share():
    with pytest.raises(
        InputError, match="the data have 2 levels of theory and the model is for one level: make a model"
    ):
        fitted(settings(), level_data(), of=model())
    with pytest.raises(InputError, match="the data have 3 levels of theory and the model is for 2 levels"):
        fitted(settings(), level_data(levels=3), of=model(fidelities=(0, 1)))


def test_levels_that_a_part_of_the_data_lacks():
    data = level_data(24, 2, "some")
    known = data.structures.known_energies[1]
    with_it, without = np.flatnonzero(known), np.flatnonzero(~known)
    low = Split(with_it, without, without[:0])
    with pytest.raises(InputError, match=r"no validation structure has energies of fidelity 3: .*score\.level_weights"):
        fitted(settings(), replace(data, split=low))
    with pytest.raises(InputError, match=r"no train structure has energies of fidelity 3: .*loss\.level_weights"):
        fitted(settings(), replace(data, split=Split(without, with_it, with_it[:0])))
    only_low = {"score": {"level_weights": [1.0, 0.0]}}
    _, summary = fitted(settings(**only_low), replace(data, split=low))
    assert set(summary.errors) == {"train"}
    assert set(summary.lower[0][0]) == {"train", "validation"}


def test_forces_of_a_level_may_be_wholly_unknown(tmp_path):
    """As of an expensive method: it is trained on energies, and the level below it on both."""
    data = level_data(24, 2)
    forces = data.structures.forces.copy()
    forces[1] = np.nan
    data = replace(data, structures=replace(data.structures, forces=forces))
    with pytest.raises(
        InputError, match=r"no validation structure has forces of fidelity 3 .*training\.score.forces=0"
    ):
        fitted(settings(), data)
    _, summary = fitted(settings(score={"forces": 0.0}), data, tmp_path / "run")
    assert summary.forces == {}
    assert set(summary.lower[0][1]) == {"train", "validation", "test"}
    (row, *_) = rows(tmp_path / "run")
    assert row["forces_rmse"] == ""
    assert float(row["forces_rmse_fidelity0"]) > 0
    judged = {"score": {"level_weights": [1.0, 0.0]}}
    _, summary = fitted(settings(**judged), data)
    assert summary.best_epoch >= 0


# From a configuration


TEXT = """
data: {{files: ["shipped:C5H5.db"], {data}, split: [100, 20, 20]}}
network: {{layers: [24, 12, 1], biases: false}}
training: {{epochs: 4, batch_size: 10, test_every: 1, optimizer: {{learning_rate: 1.0e-2}}, loss: {{forces: true}}}}
"""


def test_a_multi_fidelity_run_of_shipped_data(tmp_path):
    path, run = tmp_path / "multi.yaml", tmp_path / "run"
    path.write_text(TEXT.format(data="fidelity: [0, 1]"))
    assert cli.main(["train", str(path), f"run={run}"]) == 0
    assert cli.main(["train", "--resume", str(run), "training.epochs=6"]) == 0
    assert cli.main(["train", str(path), f"run={tmp_path}/whole", "training.epochs=6"]) == 0
    assert rows(run) == rows(tmp_path / "whole")
    trained = model_file.load(run / "model.pt")
    assert trained.fidelities == (0, 1)
    assert trained.sae.shape == (2, 2)
    table = [r for r in rows(run) if r["split"] == "validation"]
    for name in ("energy_rmse", "energy_rmse_fidelity0", "forces_rmse", "forces_rmse_fidelity0"):
        values = [float(r[name]) for r in table]
        assert values[-1] < values[0]


def test_a_run_on_differences_of_shipped_data(tmp_path):
    path = tmp_path / "delta.yaml"
    path.write_text(TEXT.format(data="fidelity: 1, baseline: 0"))
    runs.start(config.load(path, [f"run={tmp_path}/run"]))
    trained = model_file.load(tmp_path / "run/model.pt")
    assert (trained.fidelities, trained.baseline) == ((1,), 0)
    runs.resume(tmp_path / "run", ["training.epochs=5"])
    errors = [float(r["energy_rmse"]) for r in rows(tmp_path / "run") if r["split"] == "validation"]
    assert len(errors) == 5
    assert errors[-1] < errors[0]
