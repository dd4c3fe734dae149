"""Fine-tuning and continued training: start models, kept optimizers, frozen layers, added elements."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from data_helpers import molecules
from training_helpers import (
    LEVEL_SAE,
    SAE,
    assert_same_bits,
    assert_same_run,
    interrupted_run,
    level_data,
    model,
    rows,
    training_data,
    write_config,
)

from kinml_fast import cli, report
from kinml_fast.data.split import Split
from kinml_fast.data.structures import Structures, concatenate
from kinml_fast.deploy import model_file
from kinml_fast.errors import InputError
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble, extended
from kinml_fast.nn.extension import parameter_places
from kinml_fast.train import Trainer, TrainingConfig, TrainingData, checkpoint, config, continued, runs
from kinml_fast.train.freezing import FrozenLayers


@pytest.fixture(autouse=True)
def no_drawings(monkeypatch):
    monkeypatch.setattr(report, "write_report", lambda *arguments: [])


def settings(**keys) -> TrainingConfig:
    return TrainingConfig.model_validate({"epochs": 2, "batch_size": 7, "scheduler": {"name": "none"}} | keys)


def fitted(settings_of_run, data=None, folder=None, of=None, **keys):
    trained = of or model(dtype=getattr(torch, settings_of_run.dtype))
    summary = Trainer(trained, data or training_data(), settings_of_run, folder, **keys).fit()
    return trained, summary


def batch(structures: Structures, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    s = structures
    return torch.from_numpy(s.coordinates).to(dtype), torch.from_numpy(s.species), torch.from_numpy(s.offsets)


# Further elements


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layers", [[48, 24, 12, 1], [[7, 5, 1], [9, 4, 1]]])
@pytest.mark.parametrize("biases", [True, False])
def test_predictions_for_the_old_elements_have_the_same_bits(dtype, layers, biases):
    torch.manual_seed(3)
    activations = ["gaussian"] * (3 if len(layers) == 4 else 2) + ["identity"]
    old = EnergyModel(AEVParameters.aevmod(("H", "C")), layers, activations, biases, dtype)
    old.sae.copy_(torch.tensor([-17.0, -1035.0]))
    new = extended(old, ("N", "C", "Cl"))
    assert new.elements == ("H", "C", "N", "Cl")
    assert (new.dtype, new.networks.biases) == (dtype, biases)
    assert new.networks.layers == [*old.networks.layers, old.networks.layers[0], old.networks.layers[0]]
    assert new.sae.tolist() == [-17.0, -1035.0, 0.0, 0.0]
    inputs = batch(molecules("CHHCHC", 40).with_elements(("H", "C")), dtype)
    assert torch.equal(old(*inputs), new(*inputs))
    for a, b in zip(old.energies_and_forces(*inputs), new.energies_and_forces(*inputs), strict=True):
        assert torch.equal(a, b)
        assert a.abs().max() > 1e-3
    places = parameter_places(old, new)
    assert len(set(places.tolist())) == old.networks.weights.numel()
    assert torch.equal(new.networks.weights[places], old.networks.weights)


def test_old_networks_do_not_see_new_elements_at_first():
    old = model()
    new = extended(old, ("O",))
    torch.manual_seed(0)
    assert new.networks.layer(2, 0)[0].abs().min() > 0
    for layer in range(3):
        for part in new.networks.layer(2, layer):
            part.zero_()
    both = molecules("CHHO", 5).with_elements(("C", "H", "O"))
    kept = both.species < 2
    without = (batch(both)[0][kept], batch(both)[1][kept], torch.arange(0, 16, 3))
    torch.testing.assert_close(new(*batch(both)), old(*without), rtol=1e-14, atol=1e-14)


def test_a_model_that_knows_all_elements_is_copied():
    old = model()
    new = extended(old, ("H",), torch.float32)
    assert new.elements == old.elements
    assert torch.equal(new.networks.weights, old.networks.weights.float())
    new.networks.weights.data.zero_()
    assert old.networks.weights.abs().max() > 0


# Frozen layers


def test_names_of_layers():
    trained = model()
    assert FrozenLayers(trained, ["C.0", "H.*"]).names == ("C.0", "H.0", "H.1", "H.2")
    assert FrozenLayers(trained, ["*.1"]).names == ("C.1", "H.1")
    first = FrozenLayers(trained, ["C.0"])
    assert first.count == 8 * (trained.descriptor.length + 1)
    with pytest.raises(
        InputError, match=r"no layer is called C\.3: the layers are C\.0, C\.1, C\.2, H\.0, H\.1, H\.2$"
    ):
        FrozenLayers(trained, ["C.0", "C.3"])
    with pytest.raises(InputError, match="all layers are frozen"):
        FrozenLayers(trained, ["*"])


OPTIMIZERS = {
    "adam": {"optimizer": {"name": "adam", "weight_decay": 0.1}},
    "adamw": {"optimizer": {"name": "adamw", "weight_decay": 0.1, "amsgrad": True}, "ema_decay": 0.8},
    "sgd": {"optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1, "learning_rate": 1e-2}},
    "clip": {"gradient_clip": 0.1, "ema_decay": 0.8},
    "forces": {"loss": {"forces": True, "weighting": "learned"}, "optimizer": {"weight_decay": 0.1}},
    "stored": {"loss": {"forces": True}, "jacobian": "stored", "dtype": "float32"},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kept", [False, True])
def test_frozen_weights_keep_their_bits(tmp_path, name, kept):
    """With weight decay and momentum, the moments that an earlier training left included."""
    data = training_data(forces="all")
    chosen = settings(**OPTIMIZERS[name])
    fitted(chosen, data, tmp_path / "first")
    origin = continued.load(tmp_path / "first/checkpoints/last.pt", averaged=not kept)
    start = origin.model.networks.weights.detach().clone()
    trained, _ = fitted(
        chosen, data, tmp_path / "run", origin.model, freeze=["C.0", "H.1", "H.2"], origin=origin if kept else None
    )
    last = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
    assert last["frozen"] == ["C.0", "H.1", "H.2"]
    frozen = FrozenLayers(trained, ["C.0", "H.1", "H.2"])
    moving = torch.ones_like(start, dtype=torch.bool)
    for part in frozen.parts(moving):
        part.fill_(False)
    results = [last["weights"]["networks.weights"], trained.networks.weights.detach()]
    results += [] if last["average"] is None else last["average"]["averages"]
    for weights in results:
        assert torch.equal(weights[~moving], start[~moving])
        assert (weights[moving] != start[moving]).double().mean() > 0.9


def test_a_term_from_python_does_not_move_frozen_layers():
    trained = model()
    start = trained.networks.weights.detach().clone()
    penalty = {"decay": lambda m, _: m.networks.weights.square().sum()}
    fitted(settings(), of=trained, freeze=["*.0"], extra_losses=penalty)
    same = (trained.networks.weights == start).sum()
    assert same == FrozenLayers(trained, ["*.0"]).count


def test_the_gradient_of_frozen_layers_does_not_count_for_its_length():
    """A single step of a clipped gradient is as long as is allowed, all of it in the layers that move."""
    trained = model()
    start = trained.networks.weights.detach().clone()
    clipped = settings(epochs=1, batch_size=40, gradient_clip=1e-3, optimizer={"name": "sgd", "learning_rate": 1.0})
    fitted(clipped, of=trained, freeze=["*.0"])
    assert float((trained.networks.weights.detach() - start).norm()) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("stop_at", [2, 9])
def test_resumed_runs_with_frozen_layers(tmp_path, stop_at):
    chosen, freeze = settings(ema_decay=0.9, optimizer={"weight_decay": 0.1}), ["C.*"]
    fitted(chosen, folder=tmp_path / "whole", freeze=freeze)
    interrupted_run(tmp_path / "cut", chosen, stop_at, freeze=freeze)
    fitted(chosen, folder=tmp_path / "cut", of=model(99), freeze=freeze, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(InputError, match=r"other frozen layers \(C\.0, C\.1, C\.2\) and cannot go on with none"):
        fitted(chosen, folder=tmp_path / "cut", resume=True)


# The state of the optimizer

STATES = {
    "adam": {},
    "amsgrad": {"optimizer": {"name": "adamw", "amsgrad": True, "weight_decay": 0.01}, "ema_decay": 0.9},
    "momentum": {"optimizer": {"name": "sgd", "momentum": 0.9, "learning_rate": 1e-2}},
    "learned": {"loss": {"forces": True, "weighting": "learned"}},
}


@pytest.mark.parametrize("name", STATES)
def test_with_the_optimizers_state_two_runs_are_one(tmp_path, name):
    data = training_data(forces="all")
    common = {"shuffle": False, **STATES[name]}
    fitted(settings(epochs=5, **common), data, tmp_path / "whole")
    fitted(settings(epochs=3, **common), data, tmp_path / "first")
    origin = continued.load(tmp_path / "first/checkpoints/last.pt", averaged=False)
    fitted(settings(epochs=2, **common), data, tmp_path / "second", origin.model, origin=origin)
    whole, second = (checkpoint.load(tmp_path / run / "checkpoints/last.pt") for run in ("whole", "second"))
    for key in ("weights", "optimizer", "tasks", "average"):
        assert_same_bits(whole[key], second[key])
    errors = [r["energy_rmse"] for r in rows(tmp_path / "whole") if r["epoch"] in "34" and r["split"] == "train"]
    assert [r["energy_rmse"] for r in rows(tmp_path / "second") if r["split"] == "train"] == errors

    # A new optimizer is another one.
    fitted(settings(epochs=2, **common), data, tmp_path / "reset", origin.model)
    other = checkpoint.load(tmp_path / "reset/checkpoints/last.pt")["weights"]["networks.weights"]
    assert not torch.equal(other, whole["weights"]["networks.weights"])


@pytest.mark.parametrize("forces", [False, True])
def test_forces_are_taken_up_and_given_up_with_the_optimizers_state(tmp_path, forces):
    """Learned factors go on, too; a schedule within one run does the same."""
    data = training_data(forces="all")
    common = {"shuffle": False}
    on, off = ({"forces": flag, "weighting": "learned"} for flag in (forces, not forces))
    fitted(settings(loss=on, **common), data, tmp_path / "first")
    origin = continued.load(tmp_path / "first/checkpoints/last.pt", averaged=False)
    fitted(settings(loss=off, **common), data, tmp_path / "second", origin.model, origin=origin)
    both = {"forces": True, "weighting": "learned"} | ({"forces_until": 2} if forces else {"forces_from": 2})
    fitted(settings(epochs=4, loss=both, **common), data, tmp_path / "at once")
    a, b = (checkpoint.load(tmp_path / run / "checkpoints/last.pt") for run in ("second", "at once"))
    for key in ("weights", "optimizer", "tasks"):
        assert_same_bits(a[key], b[key])


def test_the_state_moves_with_the_weights_when_elements_are_added(tmp_path):
    """Before any molecule has the new element, the old weights take the same way."""
    common = {"shuffle": False, "ema_decay": 0.9}
    data = training_data()
    fitted(settings(**common), data, tmp_path / "first")
    results = []
    for elements in (("C", "H"), ("N", "O")):
        origin = continued.load(tmp_path / "first/checkpoints/last.pt", averaged=False)
        larger = extended(origin.model, elements)
        fitted(settings(**common), data, tmp_path / elements[0], larger, origin=origin)
        state = checkpoint.load(tmp_path / elements[0] / "checkpoints/last.pt")
        places = parameter_places(origin.model, larger)
        moments = state["optimizer"]["state"][0]
        parts = (state["weights"]["networks.weights"], moments["exp_avg"], state["average"]["averages"][0])
        results.append([part[places] for part in parts])
    assert results[1][0].numel() == model().networks.weights.numel()
    assert_same_bits(*results)


def test_what_has_no_state_of_the_optimizer(tmp_path):
    fitted(settings(), folder=tmp_path / "run")
    for name in ("model.pt", "checkpoints/best.pt"):
        origin = continued.load(tmp_path / "run" / name)
        with pytest.raises(InputError, match=r"\.pt: holds no state of an optimizer: start from checkpoints/last\.pt"):
            Trainer(origin.model, training_data(), settings(), origin=origin)
    origin = continued.load(tmp_path / "run/checkpoints/last.pt")
    with pytest.raises(InputError, match=r"with name adam, not sgd: set training.optimizer.name=adam, or"):
        Trainer(origin.model, training_data(), settings(optimizer={"name": "sgd"}), origin=origin)
    with pytest.raises(InputError, match="with amsgrad False, not True"):
        Trainer(origin.model, training_data(), settings(optimizer={"amsgrad": True}), origin=origin)
    Trainer(origin.model, training_data(), settings(optimizer={"name": "adamw"}), origin=origin).fit()
    del origin.state["tasks"]
    with pytest.raises(InputError, match=r"last\.pt: does not hold a whole training"):
        Trainer(origin.model, training_data(), settings(), origin=origin)


# Files


def test_every_file_of_a_run_can_be_started_from(tmp_path):
    fitted(settings(epochs=4, save_every=2, ema_decay=0.9), folder=tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    last = checkpoint.load(folder / "last.pt")
    average = last["average"]["averages"][0]
    assert torch.equal(continued.load(folder / "last.pt").model.networks.weights, average)
    moved = continued.load(folder / "last.pt", averaged=False).model
    assert torch.equal(moved.networks.weights, last["weights"]["networks.weights"])
    for path in (tmp_path / "run/model.pt", folder / "best.pt", folder / "epoch-0003.pt"):
        found = continued.load(path).model
        assert torch.equal(found.networks.weights, average)
        assert found.sae.tolist() == SAE.tolist()


@pytest.mark.parametrize("name", ["model.pt", "checkpoints/last.pt"])
@pytest.mark.parametrize(
    "damage", ["missing", "empty", "short", "flipped", "garbage", "other", "code", "version", "part"]
)
def test_files_that_are_none(tmp_path, name, damage):
    fitted(settings(epochs=1), folder=tmp_path / "run")
    path = tmp_path / "run" / name
    raw = bytearray(path.read_bytes())
    contents = torch.load(path, weights_only=True)
    if damage == "missing":
        path.unlink()
    elif damage in ("other", "code", "version", "part"):
        if damage == "version":
            contents |= {"version": 99, "format_version": 99}
        elif damage == "part":
            contents["weights"] = contents["state_dict"] = {"sae": torch.zeros(2)}
        torch.save({"other": torch.zeros(2), "code": Path}.get(damage, contents), path)
    else:
        raw[len(raw) // 2] ^= 0xFF
        path.write_bytes({"empty": b"", "short": raw[: len(raw) // 2], "flipped": raw, "garbage": b"no"}[damage])
    with pytest.raises(InputError) as caught:
        continued.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_run_folder_stands_for_its_model(tmp_path):
    with pytest.raises(InputError, match=r"model\.pt: cannot be read .* name model\.pt or a checkpoint of a run"):
        continued.load(tmp_path)
    trained, _ = fitted(settings(), folder=tmp_path)
    assert torch.equal(continued.load(tmp_path).model.networks.weights, trained.networks.weights)


def test_an_ensemble_is_no_single_model(tmp_path):
    model_file.save(tmp_path / "model.pt", Ensemble([model(0), model(1)]))
    with pytest.raises(InputError, match=r"model\.pt: is an ensemble: name model\.pt of one of its members"):
        continued.load(tmp_path / "model.pt")


# From a configuration


STILL = ("training.epochs=1", "training.optimizer={name: sgd, learning_rate: 1e-300}")
"""An epoch that changes no bit of the weights."""


def first_run(folder: Path, *overrides: str, training: str = "", **keys) -> Path:
    """A run in `folder`/run; returns its configuration."""
    path = write_config(folder, training, **keys)
    runs.start(config.load(path, overrides))
    return path


def started(path: Path, folder: Path, *overrides: str):
    """A second run with the same data that starts from the first's model."""
    loaded = config.load(path, [f"run={folder}", f"start.model={path.parent}/run/model.pt", *overrides])
    return runs.start(loaded)


def with_nitrogen(path: Path, count: int = 12) -> None:
    """Molecules of C and H, and of C, H and N, N counting -50 eV."""
    frames = []
    for symbols, seed in (("CCHH", 5), ("CHHN", 6)):
        part = molecules(symbols, count, seed, forces=False)
        for i in range(count):
            frame = ase.Atoms(symbols, part.coordinates[4 * i : 4 * i + 4])
            own = {"C": SAE[0], "H": SAE[1], "N": -50.0}
            x = frame.positions
            frame.info["REF_energy"] = (
                sum(own[s] for s in symbols) + 0.3 * np.sin(np.linalg.norm(x[0] - x[1:], axis=1)).sum()
            )
            frames.append(frame)
    ase.io.write(path, frames, format="extxyz")


def test_a_run_starts_where_the_other_one_ended(tmp_path, caplog):
    path = first_run(tmp_path, "training.epochs=40", "training.optimizer.learning_rate=0.01")
    before = model_file.load(tmp_path / "run/model.pt")
    with caplog.at_level(logging.INFO):
        started(path, tmp_path / "again", *STILL)
    now = model_file.load(tmp_path / "again/model.pt")
    assert_same_bits(dict(before.state_dict()), dict(now.state_dict()))
    rmse = min(float(r["energy_rmse"]) for r in rows(tmp_path / "run") if r["split"] == "validation")
    log = (tmp_path / "again/train.log").read_text()
    assert f"before training: validation RMSE {rmse:.4f} kcal/mol" in log
    assert "starts from" in log
    assert "another level of theory" not in log
    written = config.load(tmp_path / "again/config.yaml")
    assert (written.network.layers, written.descriptor.n_radial) == ([8, 4, 1], 4)


def test_the_architecture_is_that_of_the_start_model(tmp_path):
    path = first_run(tmp_path, "training.dtype=float32", "network.biases=false")
    other = tmp_path / "other.yaml"
    other.write_text(f"data: {{files: ['{tmp_path}/data.xyz']}}\ntraining: {{epochs: 1}}\n")
    loaded = config.load(other, [f"run={tmp_path}/b", f"start.model={tmp_path}/run/model.pt"])
    runs.start(loaded)
    found = model_file.load(tmp_path / "b/model.pt")
    assert found.to_dict() == model_file.load(tmp_path / "run/model.pt").to_dict()
    assert found.dtype == torch.float32
    runs.start(
        config.load(other, [f"run={tmp_path}/c", f"start.model={path.parent}/run/model.pt", "training.dtype=float64"])
    )
    assert model_file.load(tmp_path / "c/model.pt").dtype == torch.float64
    for key, value, own in (
        ("network.layers", "[9, 1]", r"\[8, 4, 1\]"),
        ("network.activations", "[tanh, tanh, identity]", "gaussian"),
        ("network.biases", "true", "False"),
        ("descriptor.n_radial", "5", "4"),
        ("descriptor.cutoffs", "[5.0, 3.8]", r"\[5\.2, 3\.8\]"),
        ("descriptor.beta", "0.9", "0.95"),
    ):
        wrong = config.load(
            other,
            [f"run={tmp_path}/d", f"start.model={tmp_path}/run/model.pt", "network.layers=[8, 4, 1]", f"{key}={value}"],
        )
        with pytest.raises(
            InputError, match=rf"{key} is .* in the configuration and .*{own}.* in the start model .*model"
        ):
            runs.start(wrong)
    assert not (tmp_path / "d").exists()


def test_a_descriptor_that_no_configuration_can_name(tmp_path):
    path = write_config(tmp_path)
    torch.manual_seed(0)
    ani = AEVParameters.ani(("H", "C"), [0.9, 2.0], 16.0, 5.2, [0.9, 2.0], 8.0, 3.5, [0.2, 1.2], 32.0)
    trained = EnergyModel(ani, [8, 4, 1], ["celu", "celu", "identity"])
    model_file.save(tmp_path / "ani.pt", trained)
    text = path.read_text().replace("descriptor: {n_radial: 4, n_angular: 2, n_sections: 2}\n", "")
    path.write_text(text)
    run = tmp_path / "run"
    runs.start(config.load(path, [f"start.model={tmp_path}/ani.pt", "start.sae=data"]))
    assert model_file.load(run / "model.pt").descriptor == ani
    (tmp_path / "ani.pt").unlink()
    runs.resume(run, ["training.epochs=5"])
    assert model_file.load(run / "model.pt").descriptor == ani


def test_elements_are_added(tmp_path, caplog):
    path = first_run(tmp_path)
    before = model_file.load(tmp_path / "run/model.pt")
    with_nitrogen(tmp_path / "data.xyz")
    with caplog.at_level(logging.INFO):
        started(path, tmp_path / "zero", *STILL)
    assert "a model of C H, with new networks for N" in caplog.text
    assert "single-atom energies of the start model are kept and others added, eV: C" in caplog.text
    now = model_file.load(tmp_path / "zero/model.pt")
    assert now.elements == ("C", "H", "N")
    old = batch(molecules("CHCH", 20).with_elements(("C", "H")))
    assert torch.equal(before(*old), now(*old))
    assert torch.equal(before.sae, now.sae[:2])
    # What C and H leave is N's, but for the scatter of the energies and of where the fit of C and H lies.
    assert float(now.sae[2]) == pytest.approx(-50, abs=0.5)

    started(path, tmp_path / "whole", "training.epochs=3")
    trained = model_file.load(tmp_path / "whole/model.pt")
    assert (trained.networks.layer(2, 0)[0] != now.networks.layer(2, 0)[0])[:, :8].all()
    assert not torch.equal(before(*old), trained(*old))
    # Columns of the old networks for new elements learn, too.
    assert trained.networks.layer(0, 0)[0][:, 8:12].abs().min() > 0


def test_elements_can_be_named_and_seeded(tmp_path):
    path = first_run(tmp_path)
    common = [*STILL, "data.elements=[O, H, N, C]"]
    started(path, tmp_path / "a", *common)
    started(path, tmp_path / "b", *common, "network.seed=1")
    a, b = (model_file.load(tmp_path / name / "model.pt") for name in "ab")
    assert a.elements == b.elements == ("C", "H", "O", "N")
    assert not torch.equal(a.networks.layer(2, 0)[0], b.networks.layer(2, 0)[0])
    assert torch.equal(a.networks.layer(1, 0)[0], b.networks.layer(1, 0)[0])


@pytest.mark.parametrize("sae", ["keep", "data"])
def test_resuming_does_not_need_the_start_model(tmp_path, sae):
    """Elements were added, layers are frozen, the optimizer's state was kept: same bits as without interruption."""
    path = first_run(tmp_path, training="ema_decay: 0.9")
    with_nitrogen(tmp_path / "data.xyz")
    options = [
        f"start.model={tmp_path}/run/checkpoints/last.pt",
        "start.optimizer=keep",
        f"start.sae={sae}",
        "start.freeze=[C.1]",
    ]
    started(path, tmp_path / "whole", *options)
    started(path, tmp_path / "cut", *options, "training.epochs=2")
    for leftover in (tmp_path / "run/checkpoints").iterdir():
        leftover.unlink()
    assert cli.main(["train", "--resume", str(tmp_path / "cut"), "training.epochs=4"]) == 0
    a, b = (checkpoint.load(tmp_path / run / "checkpoints/last.pt") for run in ("whole", "cut"))
    for key in ("weights", "optimizer", "average", "data", "frozen"):
        assert_same_bits(a[key], b[key])
    with pytest.raises(InputError, match=r"has begun already, so that start\.… cannot change"):
        runs.resume(tmp_path / "cut", ["start.freeze=[]"])
    with pytest.raises(InputError, match=r"network\.layers is \[9, 1\] in the configuration and \[8, 4, 1\] in"):
        runs.resume(tmp_path / "cut", ["network.layers=[9, 1]", "network.activations=null"])


def test_a_run_that_was_killed_before_its_first_checkpoint(tmp_path):
    path = first_run(tmp_path)
    started(path, tmp_path / "whole")
    started(path, tmp_path / "cut")
    for name in ("checkpoints/last.pt", "checkpoints/best.pt", "metrics.csv"):
        (tmp_path / "cut" / name).unlink()
    runs.resume(tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_energies_of_another_level_of_theory(tmp_path, caplog):
    path = first_run(tmp_path)
    frames = ase.io.read(tmp_path / "data.xyz", ":")
    for frame in frames:
        energy = frame.info.pop("REF_energy", None)
        frame.info["REF_energy"] = (frame.get_potential_energy() if energy is None else energy) - 7.0 * len(frame)
        frame.calc = None
    ase.io.write(tmp_path / "data.xyz", frames, format="extxyz")
    with caplog.at_level(logging.INFO):
        started(path, tmp_path / "keep", *STILL)
    assert re.search(r"are -2\d\.\d{3} eV away", caplog.text)
    assert "start.sae=data takes single-atom energies from the data" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        started(path, tmp_path / "data", *STILL, "start.sae=data")
    assert "another level of theory" not in caplog.text
    kept, taken = (model_file.load(tmp_path / name / "model.pt") for name in ("keep", "data"))
    counts = torch.tensor([[2.0, 2.0], [1.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(counts @ (taken.sae - kept.sae), torch.full((2,), -28.0).double(), rtol=0, atol=0.05)


def test_what_a_configuration_cannot_say(tmp_path, caplog):
    path = first_run(tmp_path)
    with pytest.raises(InputError, match=r"start.optimizer is keep, but start.model names no checkpoint"):
        config.load(path, ["start.optimizer=keep"])
    with pytest.raises(InputError, match=r"is in the run folder .* itself: choose another with run="):
        runs.start(config.load(path, [f"start.model={tmp_path}/run/model.pt"]), overwrite=True)
    assert (tmp_path / "run/model.pt").exists()
    with pytest.raises(InputError, match=r"no layer is called N.0: the layers are C.0"):
        started(path, tmp_path / "a", "start.freeze=[N.0]")
    with pytest.raises(InputError, match=r"model\.pt: holds no state of an optimizer"):
        started(path, tmp_path / "b", "start.optimizer=keep")
    with caplog.at_level(logging.INFO):
        runs.start(config.load(path, [f"run={tmp_path}/c", "start.sae=data", "start.freeze=['*.1']"]))
    assert "start.sae has no effect without start.model" in caplog.text
    assert "frozen: C.1, H.1 (72 of" in caplog.text


def test_other_data_other_split_from_python(tmp_path):
    """What README shows: a model on new structures with new elements, in a few lines."""
    fitted(settings(), folder=tmp_path / "first")
    origin = continued.load(tmp_path / "first/model.pt")
    parts = [molecules("CHHN", 20, 3, forces=False), molecules("CHHH", 20, 4, forces=False)]
    structures = concatenate(parts)
    structures = replace(structures, energies=structures.energies * 1e-3)
    split = Split(np.arange(0, 40, 2), np.arange(1, 40, 4), np.arange(3, 40, 4))
    trained, summary = fitted(
        settings(epochs=3),
        TrainingData(structures, split, np.zeros(3)),
        of=extended(origin.model, structures.elements),
        freeze=["C.0"],
    )
    assert trained.elements == ("C", "H", "N")
    assert set(summary.errors) == {"train", "validation", "test"}


# Several levels of theory


def two_levels(**keys) -> EnergyModel:
    return model(fidelities=(0, 3), **keys)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_elements_and_levels_are_added_to_several_levels(dtype):
    old = two_levels(dtype=dtype)
    old.sae.copy_(torch.from_numpy(LEVEL_SAE[:2]))
    new = extended(old, ("N", "C"), fidelities=(0, 3, 7))
    assert (new.elements, new.fidelities) == (("C", "H", "N"), (0, 3, 7))
    assert torch.equal(new.sae[:2, :2], old.sae)
    assert not new.sae[2].any()
    inputs = batch(molecules("CHHCHC", 40).with_elements(("C", "H")), dtype)
    for a, b in zip(old.level_energies_and_forces(*inputs), new.level_energies_and_forces(*inputs), strict=True):
        assert torch.equal(a, b[:2])
        assert (b[2] - b[1]).abs().max() > 1e-3
    places = parameter_places(old, new)
    assert len(set(places.tolist())) == old.networks.weights.numel()
    assert torch.equal(new.networks.weights[places], old.networks.weights)


def test_names_of_layers_at_several_levels(tmp_path):
    trained = two_levels()
    assert FrozenLayers(trained, ["0:C.1", "3:H.*"]).names == ("0:C.1", "3:H.0", "3:H.1", "3:H.2")
    assert FrozenLayers(trained, ["C.0"]).names == FrozenLayers(trained, ["*:C.0"]).names == ("0:C.0", "3:C.0")
    lowest = FrozenLayers(trained, ["0:*"])
    assert lowest.count == model().networks.weights.numel()
    with pytest.raises(InputError, match=r"no layer is called 1:C\.0: the layers are 0:C\.0, .*, 3:H\.2$"):
        FrozenLayers(trained, ["1:C.0"])
    assert FrozenLayers(model(), ["1:C.0"]).names == ("C.0",)

    data, start = level_data(forces="some"), trained.networks.weights.detach().clone()
    chosen = settings(loss={"forces": True}, optimizer={"weight_decay": 0.1}, ema_decay=0.9)
    fitted(chosen, data, tmp_path / "run", trained, freeze=["0:*"])
    last = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
    for weights in (last["weights"]["networks.weights"], last["average"]["averages"][0]):
        assert torch.equal(weights[: lowest.count], start[: lowest.count])
        assert (weights[lowest.count :] != start[lowest.count :]).double().mean() > 0.9


def test_with_the_optimizers_state_two_runs_of_levels_are_one(tmp_path):
    data = level_data(forces="some")
    common = {"shuffle": False, "loss": {"forces": True, "weighting": "learned"}, "ema_decay": 0.9}
    fitted(settings(epochs=4, **common), data, tmp_path / "whole", two_levels())
    fitted(settings(epochs=2, **common), data, tmp_path / "first", two_levels())
    origin = continued.load(tmp_path / "first/checkpoints/last.pt", averaged=False)
    fitted(settings(epochs=2, **common), data, tmp_path / "second", origin.model, origin=origin)
    whole, second = (checkpoint.load(tmp_path / run / "checkpoints/last.pt") for run in ("whole", "second"))
    for key in ("weights", "optimizer", "tasks", "average"):
        assert_same_bits(whole[key], second[key])


def two_level_xyz(path: Path, elements: str = "CCHH") -> None:
    """Molecules with the energies of two levels, the higher one 3 eV an atom lower."""
    frames = []
    for symbols, seed in (("CCHH", 5), ("CHHH", 6), (elements, 7)):
        part = molecules(symbols, 12, seed, forces=False)
        for i in range(12):
            x = part.coordinates[4 * i : 4 * i + 4]
            frame = ase.Atoms(symbols, x)
            own = {"C": SAE[0], "H": SAE[1], "N": -50.0}
            energy = sum(own[s] for s in symbols) + 0.3 * np.sin(np.linalg.norm(x[0] - x[1:], axis=1)).sum()
            frame.info |= {"REF_energy": energy, "low_energy": energy, "high_energy": energy - 12.0}
            frames.append(frame)
    ase.io.write(path, frames, format="extxyz")


BOTH = ("data.fidelity=[1, 2]", "data.energy_key=[low_energy, high_energy]")


def test_a_level_is_added_to_a_trained_model(tmp_path, caplog):
    path = first_run(tmp_path, "training.epochs=20", "training.optimizer.learning_rate=0.01")
    two_level_xyz(tmp_path / "data.xyz", "CHHN")
    before = model_file.load(tmp_path / "run/model.pt")
    with caplog.at_level(logging.INFO):
        started(path, tmp_path / "two", *BOTH, *STILL)
    assert "a model of C H, with new networks for N, fidelity 2" in caplog.text
    assert "before training: validation RMSE of fidelity 1 " in caplog.text
    assert "single-atom energies of the start model are kept and others added, eV, fidelity 2: C " in caplog.text
    now = model_file.load(tmp_path / "two/model.pt")
    assert (now.fidelities, now.elements) == ((1, 2), ("C", "H", "N"))
    old = batch(molecules("CHCH", 20).with_elements(("C", "H")))
    for a, b in zip(before.energies_and_forces(*old), now.level_energies_and_forces(*old), strict=True):
        assert torch.equal(a, b[0])
    assert torch.equal(before.sae, now.sae[0, :2])
    # Those of the new level are the data's.
    counts = torch.tensor([[2.0, 2.0, 0.0], [1.0, 2.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(counts @ (now.sae[1] - now.sae[0]), torch.full((2,), -12.0).double(), rtol=0, atol=0.5)

    (tmp_path / "run/model.pt").rename(tmp_path / "elsewhere.pt")
    options = [f"start.model={tmp_path}/elsewhere.pt", *BOTH, "start.freeze=['1:*']"]
    started(path, tmp_path / "whole", *options, "training.epochs=3")
    started(path, tmp_path / "cut", *options, "training.epochs=1")
    (tmp_path / "elsewhere.pt").unlink()
    runs.resume(tmp_path / "cut", ["training.epochs=3"])
    a, b = (checkpoint.load(tmp_path / run / "checkpoints/last.pt") for run in ("whole", "cut"))
    for key in ("weights", "optimizer", "data", "frozen"):
        assert_same_bits(a[key], b[key])
    trained = model_file.load(tmp_path / "cut/model.pt")
    for a, b in zip(before.energies_and_forces(*old), trained.level_energies_and_forces(*old), strict=True):
        assert torch.equal(a, b[0])


def test_levels_of_the_start_model(tmp_path):
    """They are taken over if none are named, may be called otherwise, and must fit."""
    path = tmp_path / "small.yaml"
    path.write_text(
        f"run: {tmp_path}/run\n"
        "data: {files: ['shipped:C2H2.db'], split: [20, 5, 5]}\n"
        "descriptor: {n_radial: 4, n_angular: 2, n_sections: 2}\n"
        "network: {layers: [8, 4, 1]}\n"
        "training: {epochs: 1}\n"
    )
    runs.start(config.load(path, ["data.fidelity=[0, 1]"]))
    before = model_file.load(tmp_path / "run/model.pt")
    started(path, tmp_path / "a", *STILL)
    a = model_file.load(tmp_path / "a/model.pt")
    assert a.fidelities == (0, 1)
    assert_same_bits(dict(a.state_dict()), dict(before.state_dict()))
    assert config.load(tmp_path / "a/config.yaml").data.fidelity == [0, 1]
    for fidelity in ("1", "[1, 0, 2]"):
        with pytest.raises(InputError, match=r"is a model of the fidelities \[0, 1\], and data\.fidelity is"):
            started(path, tmp_path / "c", f"data.fidelity={fidelity}")
    renamed = config.load(path, [f"run={tmp_path}/b", f"start.model={tmp_path}/run/model.pt", "data.fidelity=[1, 0]"])
    runs.start(renamed)
    assert model_file.load(tmp_path / "b/model.pt").fidelities == (1, 0)

    runs.start(config.load(path, [f"run={tmp_path}/run2", "data.fidelity=1", "data.baseline=0"]))
    delta = f"start.model={tmp_path}/run2/model.pt"
    runs.start(config.load(path, [f"run={tmp_path}/d", delta, *STILL]))
    found = model_file.load(tmp_path / "d/model.pt")
    assert (found.fidelities, found.baseline) == ((1,), 0)
    with pytest.raises(InputError, match=r"of differences .*, and the configuration trains one of whole .*baseline=0$"):
        runs.start(config.load(path, [f"run={tmp_path}/e", delta, "data.fidelity=1"]))
    with pytest.raises(InputError, match=r"of whole energies, and the configuration trains one of differences"):
        started(path, tmp_path / "e", "data.fidelity=1", "data.baseline=0")
