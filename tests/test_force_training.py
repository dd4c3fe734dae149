"""Training on energies and forces: against a loop in plain PyTorch on the oracle, and what forces change in a run."""

from __future__ import annotations

import itertools
import logging
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from op_helpers import keywords
from test_ops_networks import layers_of
from training_helpers import SAE, assert_same_bits, assert_same_run, interrupted_run, model, rows, training_data

from kinml_fast import reference, report
from kinml_fast.data import DescriptorSource, pykinml_hdf5, read, stored
from kinml_fast.data.selection import Selection
from kinml_fast.data.sources import file_digest
from kinml_fast.data.split import Split
from kinml_fast.deploy import model_file
from kinml_fast.errors import InputError
from kinml_fast.metrics import Errors
from kinml_fast.train import LossBatch, Trainer, TrainingConfig, TrainingData, checkpoint
from kinml_fast.units import KCAL_PER_MOL

MIXED = ("CCHH", "CH", "HHH", "CHHHC")
"""Molecules of two to five atoms, some without carbon."""


@pytest.fixture(autouse=True)
def drawings(request, monkeypatch):
    """Only tests that ask for this fixture draw a report: it takes longer than the rest."""
    if "drawings" not in request.node.function.__code__.co_varnames:
        monkeypatch.setattr(report, "write_report", lambda *arguments: [])


def settings(**keys):
    keys["loss"] = {"forces": True} | keys.get("loss", {})
    return TrainingConfig.model_validate({"epochs": 4, "batch_size": 7} | keys)


def fitted(config, data, folder=None, seed=0, **keys):
    trained = model(seed, dtype=getattr(torch, config.dtype))
    summary = Trainer(trained, data, config, folder, **keys).fit()
    return trained, summary


class PlainLoop:
    """The same training, structure by structure, with the oracle's energies and forces and autograd twice."""

    def __init__(self, data: TrainingData, config: TrainingConfig, extra=None, seed: int = 0) -> None:
        self.data, self.config, self.extra = data, config, extra or {}
        self.model = model(seed)
        self.weights = self.model.networks.weights.detach().clone().requires_grad_()
        self.log_sigma = torch.zeros(2 + len(self.extra), dtype=torch.float64, requires_grad=True)
        self.parameters = keywords(self.model.descriptor)

    def predicted(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Energy without single-atom energies, and forces."""
        s, atoms = self.data.structures, slice(*self.data.structures.offsets[index : index + 2].tolist())
        x = torch.from_numpy(s.coordinates[atoms]).requires_grad_()
        arguments = (
            torch.from_numpy(s.species[atoms]),
            torch.tensor([0, len(x)]),
            self.parameters,
            layers_of(self.model.networks, self.weights),
            list(self.model.networks.activations),
            [0.0, 0.0],
        )
        forces = reference.forces(x, *arguments, create_graph=True)
        return reference.energies(x, *arguments)[0], forces

    def errors(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Residuals of energy and forces; None without reference forces."""
        s, atoms = self.data.structures, slice(*self.data.structures.offsets[index : index + 2].tolist())
        energy, forces = self.predicted(index)
        target = s.energies[index] - s.counts()[index] @ SAE
        known = not np.isnan(s.forces[atoms]).any()
        return energy - target, forces - torch.from_numpy(s.forces[atoms]) if known else None

    def total(self, batch: list[int], with_forces: bool) -> torch.Tensor:
        """The loss of a batch, written out."""
        loss, weights = self.config.loss, self.data.weights
        of_energies, of_forces = [], []
        for index in batch:
            weight = 1.0 if weights is None else weights[index]
            energy, forces = self.errors(index)
            if loss.energy_per_atom:
                energy = energy / self.data.structures.sizes[index]
            if weight:
                of_energies.append(weight * energy**2)
                if forces is not None:
                    of_forces.append(weight * (forces**2).mean())
            self.squares["energy"].append(float(self.errors(index)[0].detach()) ** 2)
            if forces is not None and weight:
                self.squares["forces"] += (forces.detach() ** 2).flatten().tolist()
        terms = {0: of_energies, 1: of_forces if with_forces else []}
        means = {place: torch.stack(values).mean() for place, values in terms.items() if values}
        for place, term in enumerate(self.extra.values(), start=2):
            means[place] = term(self.weights, batch)
        several = with_forces or self.extra
        if loss.weighting == "learned" and several:
            return sum(torch.exp(-self.log_sigma[t]) * value + self.log_sigma[t] for t, value in means.items())
        share = loss.force_weight if with_forces and loss.weighting == "static" else float(not several)
        if not with_forces:
            share = 0.0
        factors = [1 - share, share, *(loss.extra_weights.get(name, 1.0) for name in self.extra)]
        return sum(factors[t] * value for t, value in means.items())

    def run(self, optimizer) -> list[dict[str, float]]:
        """Train, and return the root mean square errors of the training structures in each epoch, before updates."""
        found = []
        for epoch in range(self.config.epochs):
            self.squares = {"energy": [], "forces": []}
            order = self.data.split.train.tolist()
            for first in range(0, len(order), self.config.batch_size):
                total = self.total(order[first : first + self.config.batch_size], self.config.loss.has_forces(epoch))
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
            found.append({k: math.sqrt(np.mean(v)) * KCAL_PER_MOL for k, v in self.squares.items() if v})
        return found


WEIGHTS = np.where(np.arange(48) % 5 == 0, 0.0, 1 + np.arange(48) % 3)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("loss", "weights"),
    [
        ({}, None),
        ({"force_weight": 0.4}, None),
        ({"force_weight": 1.0}, None),
        ({"weighting": "learned"}, None),
        ({"weighting": "learned", "energy_per_atom": True}, WEIGHTS),
        ({"energy_per_atom": True}, WEIGHTS),
        ({"forces_from": 1, "forces_until": 2}, WEIGHTS),
        ({"forces_from": 1, "forces_until": 2, "weighting": "learned"}, None),
    ],
)
@pytest.mark.parametrize("jacobian", ["recompute", "stored"])
def test_epochs_are_those_of_a_plain_loop(tmp_path, loss, weights, jacobian):
    """Molecules of all sizes, some without forces: losses, metrics, learned weights, phases."""
    data = training_data(12, "some", MIXED, weights)
    config = settings(
        epochs=3, shuffle=False, scheduler={"name": "none"}, loss=loss, jacobian=jacobian, optimizer={"eps": 1e-6}
    )
    trained = model()
    trainer = Trainer(trained, data, config, tmp_path / "run")
    trainer.fit()
    last = checkpoint.load(tmp_path / "run/checkpoints/last.pt")

    plain = PlainLoop(data, config)
    optimizer = torch.optim.Adam([plain.weights, plain.log_sigma], lr=1e-3, eps=1e-6)
    expected = plain.run(optimizer)
    torch.testing.assert_close(last["weights"]["networks.weights"], plain.weights.detach(), rtol=1e-9, atol=1e-9)
    if config.loss.weighting == "learned":
        torch.testing.assert_close(last["tasks"]["log_sigma"], plain.log_sigma.detach(), rtol=1e-9, atol=1e-11)
        assert last["tasks"]["log_sigma"].abs().min() > 0
    train = [r for r in rows(tmp_path / "run") if r["split"] == "train"]
    for epoch, (row, errors) in enumerate(zip(train, expected, strict=True)):
        assert float(row["energy_rmse"]) == pytest.approx(errors["energy"], rel=1e-9)
        assert (row["forces_rmse"] != "") == config.loss.has_forces(epoch)
        if row["forces_rmse"]:
            assert float(row["forces_rmse"]) == pytest.approx(errors["forces"], rel=1e-9)


def test_further_terms_of_the_loss(tmp_path):
    """A third term, static and learned, with forces and without, against the plain loop."""
    data = training_data(8, "all", MIXED)

    def ours(trained, batch: LossBatch):
        assert trained.networks.weights.requires_grad
        energies = trained(batch.coordinates, batch.species, batch.offsets)
        return (energies - torch.from_numpy(data.structures.energies)[batch.structures]).abs().mean()

    for loss in (
        {"extra_weights": {"absolute": 0.3}},
        {"weighting": "learned"},
        {"forces": False, "weighting": "learned"},
        {"forces": False},
    ):
        config = settings(epochs=2, shuffle=False, scheduler={"name": "none"}, loss=loss, optimizer={"eps": 1e-6})
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        Trainer(model(), data, config, folder, extra_losses={"absolute": ours}).fit()
        plain = PlainLoop(data, config)
        plain.extra = {"absolute": lambda _, batch, p=plain: torch.stack([p.errors(i)[0] for i in batch]).abs().mean()}
        plain.log_sigma = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        plain.run(torch.optim.Adam([plain.weights, plain.log_sigma], lr=1e-3, eps=1e-6))
        last = checkpoint.load(folder / "checkpoints/last.pt")
        torch.testing.assert_close(last["weights"]["networks.weights"], plain.weights.detach(), rtol=1e-9, atol=1e-9)
        if config.loss.weighting == "learned":
            torch.testing.assert_close(last["tasks"]["log_sigma"], plain.log_sigma.detach(), rtol=1e-9, atol=1e-11)
            (row, *_) = [r for r in rows(folder) if r["split"] == "train"]
            assert {"log_sigma_energy", "log_sigma_forces", "log_sigma_absolute"} <= row.keys()


def test_terms_of_the_loss_that_are_none():
    data = training_data(forces="all")
    with pytest.raises(InputError, match="extra_weights names dipoles, but the loss has no such term"):
        Trainer(model(), data, settings(loss={"extra_weights": {"dipoles": 1.0}}))
    with pytest.raises(InputError, match="give each its own name"):
        Trainer(model(), data, settings(), extra_losses={"forces": lambda *_: None})
    for term, found in ((lambda *_: 1.0, "not float"), (lambda m, b: m.networks.weights, r"not Parameter\[\d+\]")):
        with pytest.raises(InputError, match=f"the term t of the loss must return one number .* {found}"):
            Trainer(model(), data, settings(), extra_losses={"t": term}).fit()


@pytest.mark.parametrize("source", ["native", "aevmod", "hdf5", "hdf5 without coordinates"])
def test_all_sources_of_jacobians_give_the_same_training(tmp_path, source):
    """Ten epochs of Adam on molecules of all sizes, some without carbon and some without forces."""
    data = training_data(6 if source == "aevmod" else 12, "some", MIXED)
    expected, _ = fitted(settings(epochs=10), data)
    if source == "aevmod":
        pytest.importorskip("aevmod")
        data = replace(data, source=DescriptorSource("aevmod"))
    elif source != "native":
        path = tmp_path / "data.h5"
        made = stored.compute(data.structures, model().descriptor, torch.float64, jacobian=True)
        pykinml_hdf5.write(path, data.structures, made)
        structures = read(path, Selection(elements=("C", "H")))
        assert np.array_equal(structures.forces, data.structures.forces, equal_nan=True)
        if source != "hdf5":
            structures = replace(structures, coordinates=None)
        data = replace(data, structures=structures, source=DescriptorSource(files=((path, file_digest(path)),)))
    found, summary = fitted(settings(epochs=10, jacobian="stored"), data)
    torch.testing.assert_close(found.networks.weights, expected.networks.weights, rtol=1e-9, atol=1e-9)
    assert set(summary.forces) == {"train", "validation", "test"}

    # Energy-only training takes its descriptors from there, too.
    expected, _ = fitted(
        settings(epochs=2, loss={"forces": False}), training_data(len(data.structures) // 4, "some", MIXED)
    )
    found, summary = fitted(settings(epochs=2, loss={"forces": False}, jacobian="stored"), data)
    torch.testing.assert_close(found.networks.weights, expected.networks.weights, rtol=1e-9, atol=1e-9)
    assert bool(summary.forces) == (data.structures.coordinates is not None)
    if data.structures.coordinates is None:
        with pytest.raises(InputError, match=r"has no coordinates, only stored descriptors: set training\.jacobian"):
            Trainer(model(), data, settings())


def test_float32_follows_float64():
    data = training_data(15, "some", MIXED)
    summaries = []
    for dtype in (torch.float64, torch.float32):
        trained = model(dtype=dtype)
        with torch.no_grad():
            trained.networks.weights.copy_(model().networks.weights)
        config = settings(epochs=3, dtype=str(dtype).removeprefix("torch."))
        summaries.append(Trainer(trained, data, config).fit())
        assert trained.networks.weights.dtype == dtype
    for part in ("train", "validation", "test"):
        for kind in ("errors", "forces"):
            double, single = (getattr(summary, kind)[part] for summary in summaries)
            assert (single.mae, single.rmse, single.max) == pytest.approx(
                (double.mae, double.rmse, double.max), rel=1e-4
            )


def test_energy_only_training_ignores_forces_but_reports_them(tmp_path, drawings, caplog):
    """Data with and without forces give the same bits, until the report."""
    config = settings(loss={"forces": False})
    with caplog.at_level(logging.INFO):
        with_forces, summary = fitted(config, training_data(forces="all"), tmp_path / "run")
    without, plain = fitted(config, training_data())
    assert torch.equal(with_forces.networks.weights, without.networks.weights)
    assert (summary.errors, plain.forces) == (plain.errors, {})
    assert set(summary.forces) == {"train", "validation", "test"}
    assert all(r["forces_rmse"] == "" for r in rows(tmp_path / "run"))
    assert "the data have forces, which training.loss.forces=true would train on" in caplog.text
    written = (tmp_path / "run/report/errors.csv").read_text()
    assert f"test,forces,kcal/mol/Å,{10 * 12}," in written


def test_metrics_summary_and_report(tmp_path, drawings, caplog):
    """Structures without forces are masked, counted and mentioned once; errors are those of the predictions."""
    data = training_data(12, "some", MIXED)
    with caplog.at_level(logging.INFO):
        trained, summary = fitted(settings(test_every=1), data, tmp_path / "run")
    known = {part: int(np.sum(getattr(data.split, part) % 3 != 0)) for part in ("train", "validation", "test")}
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("forces:")]
    assert (
        line
        == f"forces: {known['train']} of 32 train, {known['validation']} of 8 validation, {known['test']} of 8 test"
    )

    s = data.structures
    with torch.no_grad():
        _, forces = trained.energies_and_forces(*map(torch.from_numpy, (s.coordinates, s.species, s.offsets)))
    for part, errors in summary.forces.items():
        atoms = np.isin(s.owners, getattr(data.split, part)) & ~np.isnan(s.forces[:, 0])
        expected = Errors.of(forces.numpy()[atoms] - s.forces[atoms])
        assert (errors.mae, errors.rmse, errors.max) == pytest.approx((expected.mae, expected.rmse, expected.max))
    table = rows(tmp_path / "run")
    best = [r for r in table if int(r["epoch"]) == summary.best_epoch]
    for row in best:
        if row["split"] != "train":
            assert float(row["forces_max"]) == summary.forces[row["split"]].max
    pictures = ["learning_curves.png", "parity_test.png", "parity_train.png", "parity_validation.png"]
    assert sorted(path.name for path in (tmp_path / "run/report").iterdir()) == ["errors.csv", *pictures]
    lines = (tmp_path / "run/report/errors.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [
        [part, kind] for part in ("train", "validation", "test") for kind in ("energy", "forces")
    ]
    log = (tmp_path / "run/train.log").read_text()
    assert "kcal/mol and kcal/mol/Å" in log


@pytest.mark.parametrize(("energy", "forces"), [(1.0, 1.0), (0.0, 2.0), (3.0, 0.0)])
def test_the_score_chooses_the_best_model_and_stops(tmp_path, energy, forces):
    config = settings(
        epochs=25,
        optimizer={"learning_rate": 0.1},
        score={"energy": energy, "forces": forces},
        scheduler={"patience": 0, "threshold": 0.0},
        early_stopping={"patience": 4},
        loss={"force_weight": 0.9},
    )
    _, summary = fitted(config, training_data(12, "some"), tmp_path / "run")
    table = [r for r in rows(tmp_path / "run") if r["split"] == "validation"]
    scores = [energy * float(r["energy_rmse"]) + forces * float(r["forces_rmse"]) for r in table]
    assert summary.best_epoch == int(np.argmin(scores)) == len(scores) - 5
    best = checkpoint.load(tmp_path / "run/checkpoints/best.pt")
    assert best["score"] == pytest.approx(min(scores), rel=1e-14)
    assert model_file.load_training(tmp_path / "run/model.pt")["score"] == best["score"]
    # A plateau is one of the score: the rate is halved after each epoch that was no improvement.
    falls = [scores[i] >= min(scores[:i], default=math.inf) for i in range(len(scores))]
    halvings = [a["lr"] != b["lr"] for a, b in itertools.pairwise(table)]
    assert halvings == falls[:-1]
    assert any(falls[:-1])


def test_gradients_are_clipped_and_weights_averaged(tmp_path):
    data = training_data(forces="all")
    start = model().networks.weights.detach().clone()
    config = settings(epochs=1, batch_size=40, gradient_clip=1e-3, optimizer={"name": "sgd", "learning_rate": 1.0})
    trained, _ = fitted(config, data)
    assert float((trained.networks.weights.detach() - start).norm()) == pytest.approx(1e-3, rel=1e-2)

    fitted(settings(ema_decay=0.9, loss={"weighting": "learned"}), data, tmp_path / "run")
    last, best = (checkpoint.load(tmp_path / f"run/checkpoints/{name}.pt") for name in ("last", "best"))
    assert len(last["average"]["averages"]) == 1
    assert torch.equal(best["weights"]["networks.weights"], last["average"]["averages"][0])


@pytest.mark.parametrize("loss", [{}, {"weighting": "learned"}, {"forces_until": 1}])
def test_a_run_that_diverges_says_so(tmp_path, loss):
    config = settings(
        epochs=30, scheduler={"name": "none"}, optimizer={"name": "sgd", "learning_rate": 1e200}, loss=loss
    )
    with pytest.raises(InputError, match=r"the loss became infinite or NaN in epoch \d+: lower training\.optimizer"):
        fitted(config, training_data(forces="all"), tmp_path / "run")
    assert torch.isfinite(checkpoint.load(tmp_path / "run/checkpoints/last.pt")["force_errors"]).all()


def test_descriptors_are_kept_only_while_energies_are_trained_on_alone():
    trainer = Trainer(model(), training_data(forces="all"), settings(loss={"forces_from": 1, "forces_until": 2}))
    trainer.prepare()
    kept = weakref.ref(trainer.step(False, trainer.data.whole))
    trainer.train_epoch()
    assert kept() is not None
    trainer.train_epoch()
    assert kept() is None
    trainer.train_epoch()


def test_data_without_the_forces_that_are_asked_for():
    with pytest.raises(InputError, match=r"forces is true, but no training structure has forces \(data: .*C2H2, CH3\)"):
        Trainer(model(), training_data(), settings())
    data = training_data(12, "some")
    with_forces = np.flatnonzero(np.arange(24) % 3)
    without = np.flatnonzero(np.arange(24) % 3 == 0)
    split = Split(with_forces, without, without[:0])
    with pytest.raises(InputError, match=r"score\.forces is 1, but no validation structure has forces"):
        Trainer(model(), TrainingData(data.structures, split, SAE), settings())
    _, summary = fitted(settings(score={"forces": 0.0}), TrainingData(data.structures, split, SAE))
    assert set(summary.forces) == {"train"}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3), "the weights must be 24 numbers"),
        (-np.ones(24), "not negative"),
        (np.full(24, np.nan), "not negative"),
        (np.zeros(24), "weights of all training structures are 0"),
    ],
)
def test_weights_that_are_none(weights, message):
    with pytest.raises(InputError, match=message):
        Trainer(model(), training_data(12, weights=weights), settings(loss={"forces": False}))


# Resuming

RUNS = {
    "static": {"ema_decay": 0.9, "loss": {"force_weight": 0.5}},
    "learned": {"loss": {"weighting": "learned"}, "gradient_clip": 0.5},
    "phases": {"loss": {"forces_from": 1, "forces_until": 3, "weighting": "learned"}, "scheduler": {"patience": 0}},
    "stored": {"jacobian": "stored", "dtype": "float32", "optimizer": {"name": "sgd", "momentum": 0.9}},
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stop_at", [2, 7, 15, 24])
def test_resumed_runs_have_the_same_bits(tmp_path, name, stop_at):
    config, data = settings(**RUNS[name]), training_data(forces="some")
    dtype = getattr(torch, config.dtype)
    fitted(config, data, tmp_path / "whole")
    interrupted_run(tmp_path / "cut", config, stop_at, data=data, dtype=dtype)
    state = checkpoint.load(tmp_path / "cut/checkpoints/last.pt")
    assert state["epoch"] * 6 + state["batch"] == stop_at - 1
    resumed, _ = fitted(config, data, tmp_path / "cut", seed=99, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    best = checkpoint.load(tmp_path / "whole/checkpoints/best.pt")
    assert_same_bits(dict(resumed.state_dict()), best["weights"])


@pytest.mark.parametrize("weighting", ["static", "learned"])
def test_forces_are_taken_up_and_given_up_when_resuming(tmp_path, weighting, caplog):
    """An epoch-by-epoch schedule and changes by hand give the same weights; the score starts anew with forces."""
    data, run = training_data(forces="some"), tmp_path / "run"
    common = {"scheduler": {"name": "none"}}
    off, on = ({"forces": forces, "weighting": weighting} for forces in (False, True))
    _, first = fitted(settings(epochs=2, loss=off, **common), data, run)
    assert first.best_epoch == 1
    with caplog.at_level(logging.INFO):
        _, second = fitted(settings(epochs=4, loss=on, **common), data, run, resume=True)
    assert "the score is another one than before" in caplog.text
    assert second.best_epoch in (2, 3)
    fitted(settings(epochs=5, loss=off, **common), data, run, resume=True)
    table = {(int(r["epoch"]), r["split"]): r["forces_rmse"] != "" for r in rows(run)}
    assert [table[epoch, "train"] for epoch in range(5)] == [False, False, True, True, False]
    assert [table[epoch, "validation"] for epoch in range(5)] == [False, False, True, True, False]

    schedule = {"forces_from": 2, "forces_until": 4, "weighting": weighting}
    fitted(settings(epochs=5, loss=schedule, **common), data, tmp_path / "at once")
    a, b = (checkpoint.load(path / "checkpoints/last.pt") for path in (run, tmp_path / "at once"))
    for key in ("weights", "tasks", "optimizer"):
        assert_same_bits(a[key], b[key])


def test_a_random_state_that_is_none(tmp_path):
    """One changed number of Python's, which raises what nothing else in a checkpoint does."""
    data, path = training_data(forces="some"), tmp_path / "run" / "checkpoints" / "last.pt"
    fitted(settings(), data, tmp_path / "run")
    state = checkpoint.load(path)
    version, words, gauss = state["random"]["python"]
    state["random"]["python"] = (version, (-5, *words[1:]), gauss)
    torch.save(state, path)
    with pytest.raises(InputError, match=r"last\.pt: does not hold a whole run \(can't convert negative value"):
        fitted(settings(epochs=9), data, tmp_path / "run", resume=True)


def test_what_cannot_change_when_resuming(tmp_path):
    data = training_data(forces="some")
    fitted(settings(), data, tmp_path / "run")
    with pytest.raises(InputError, match=r"training\.loss\.weighting = static and cannot go on with learned"):
        fitted(settings(loss={"weighting": "learned"}), data, tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"does not hold a whole run \(the loss had the terms energy, forces, here"):
        Trainer(model(), data, settings(), tmp_path / "run", resume=True, extra_losses={"t": lambda *_: None})
    other = TrainingData(data.structures, data.split, data.sae, np.full(60, 2.0))
    with pytest.raises(InputError, match=r"belongs to other data \(structures, energies, forces, weights"):
        Trainer(model(), other, settings(), tmp_path / "run", resume=True)


def test_stored_descriptors_are_part_of_the_data_of_a_run(tmp_path):
    data = training_data(forces="some")
    fitted(settings(jacobian="stored"), data, tmp_path / "run")
    other = replace(data, source=DescriptorSource("aevmod"))
    with pytest.raises(InputError, match="belongs to other data"):
        Trainer(model(), other, settings(jacobian="stored"), tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"training\.jacobian = stored and cannot go on with recompute"):
        Trainer(model(), data, settings(), tmp_path / "run", resume=True)
