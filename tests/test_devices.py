"""Where runs, evaluations and calculators compute: which device a name stands for, and that nothing mixes two."""

from __future__ import annotations

import logging

import ase.io
import numpy as np
import pytest
import torch
from pretend_gpu import GPU, pretended
from training_helpers import (
    interrupted_run,
    level_data,
    model,
    rows,
    training_data,
    write_config,
)

from kinml_fast import InputError, KinMLCalculator, _library, cli, devices, report
from kinml_fast.deploy import model_file
from kinml_fast.train import Trainer, TrainingConfig, checkpoint, config, continued, runs

# What torch says of "meta" is not so of the pretended GPU.
pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")


@pytest.fixture(autouse=True)
def _briefly(monkeypatch):
    """Drawing takes most of the time of a short run; and each command adds a handler to the log."""
    monkeypatch.setattr(report, "_save", lambda figure, path: path.touch())
    logger = logging.getLogger("kinml_fast")
    for name, value in {"handlers": [], "level": logger.level}.items():
        monkeypatch.setattr(logger, name, value)


# ---- names ---------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch):
    """As on a machine with two GPUs, of which the second is the current one, and a build with CUDA."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "build_info", lambda: {"cuda": "13.0, sm_90"})
    for name, value in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


def test_names_stand_for_devices(two_gpus):
    for name, device in {"auto": "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cpu": "cpu"}.items():
        assert devices.resolve(name) == torch.device(device)
    with pytest.raises(InputError, match="the device is cuda:2, but there is cuda:0 to cuda:1: name a GPU that is"):
        devices.resolve("cuda:2")
    for name in ("gpu", "cuda:", "cuda:x", "CPU", "meta"):
        with pytest.raises(InputError, match=f"'{name}' is no device: give auto, cpu, cuda or cuda:N"):
            devices.resolve(name)


@pytest.mark.parametrize(
    ("place", "name", "value", "reason"),
    [
        (torch.version, "cuda", None, r"this torch \(.*\) has no CUDA: install one that has, and then kinml_fast"),
        (_library, "build_info", lambda: {"cuda": "none"}, "this build of kinml_fast has no CUDA kernels: install it"),
        (torch.cuda, "is_available", lambda: False, r"torch finds no GPU \(Found no NVIDIA driver\): see nvidia-smi"),
    ],
)
def test_why_a_gpu_cannot_be_used(place, name, value, reason, two_gpus, monkeypatch):
    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver.\nMore lines.")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(place, name, value)
    assert devices.resolve("auto") == torch.device("cpu")
    with pytest.raises(InputError, match=f"^the device is cuda:0, but {reason}.*, or take the device cpu$") as caught:
        devices.resolve("cuda:0")
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_ends_a_command_before_anything_is_written(tmp_path, capsys):
    path = write_config(tmp_path)
    for word in ("cuda:99", "gpu"):
        assert cli.main(["train", str(path), f"training.device={word}"]) == cli.USAGE_ERROR
        assert not (tmp_path / "run").exists()
    assert cli.main(["train", str(path)]) == 0
    run = str(tmp_path / "run")
    capsys.readouterr()
    for command in (
        ["train", "--resume", run, "training.device=cuda:99"],
        ["evaluate", run, str(tmp_path / "data.xyz"), "--device", "cuda:99"],
        ["predict", run, str(tmp_path / "data.xyz"), "-o", str(tmp_path / "out.xyz"), "--device", "cuda:99"],
    ):
        assert cli.main(command) == cli.USAGE_ERROR
        assert "the device is cuda:99, but " in capsys.readouterr().err
    assert not (tmp_path / "out.xyz").exists()


def test_too_little_memory_is_one_sentence(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nMore lines.")

    trainer = Trainer(model(), training_data(), TrainingConfig(epochs=1, batch_size=7))
    monkeypatch.setattr(trainer.step(False, trainer.data.whole), "run", full)
    with pytest.raises(InputError, match=r"^the GPU is out of memory \(CUDA out .*GiB\.\): try batches half") as caught:
        trainer.fit()
    assert "(training.batch_size=3 training.validation_batch_size=500 " in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- Nothing mixes devices -----------------------------------------------------------------------


def extra(trained, batch):
    """A further term of the loss."""
    return trained(batch.coordinates, batch.species, batch.offsets).square().mean()


FORCES = {"loss": {"forces": True}}
KINDS = {
    "energies": {},
    "forces": {**FORCES, "gradient_clip": 1.0, "ema_decay": 0.9},
    "forces taken up later": {"loss": {"forces": True, "forces_from": 1, "weighting": "learned"}},
    "stored": {**FORCES, "jacobian": "stored"},
    "amsgrad": {**FORCES, "optimizer": {"amsgrad": True, "weight_decay": 0.1}, "dtype": "float32"},
}


@pytest.mark.parametrize(("kind", "levels"), [*((kind, 1) for kind in KINDS), ("energies", 2), ("forces", 2)])
def test_training_on_another_device_is_the_same(kind, levels, tmp_path):
    settings = TrainingConfig(epochs=2, batch_size=7, save_every=2, **KINDS[kind])
    data = training_data(forces="some") if levels == 1 else level_data(forces="some")
    frozen = ["*.0"] if kind == "forces" else []
    terms = {"small": extra} if kind in ("forces", "forces taken up later") and levels == 1 else None

    def train(name: str) -> tuple:
        trained = model(dtype=getattr(torch, settings.dtype), fidelities=range(levels))
        if name == "gpu":
            trained.to(GPU)
        trainer = Trainer(trained, data, settings, tmp_path / name, extra_losses=terms, freeze=frozen)
        return trainer.fit(), trained.networks.weights.detach().cpu()

    here = train("cpu")
    with pretended():
        there = train("gpu")
    torch.testing.assert_close(there[1], here[1], rtol=1e-10, atol=1e-12)
    assert [row["epoch"] for row in rows(tmp_path / "gpu")] == [row["epoch"] for row in rows(tmp_path / "cpu")]
    assert there[0].errors["test"].rmse == pytest.approx(here[0].errors["test"].rmse, rel=1e-9)
    # Files hold tensors of the CPU: outside of the other device's world they are read like those of the CPU.
    for name in ("last.pt", "best.pt", "epoch-0001.pt"):
        found = [checkpoint.load(tmp_path / run / "checkpoints" / name) for run in ("gpu", "cpu")]
        assert found[0].keys() == found[1].keys()
    files = [model_file.load(tmp_path / run) for run in ("gpu", "cpu")]
    torch.testing.assert_close(files[0].networks.weights, files[1].networks.weights, rtol=1e-10, atol=1e-12)


def test_a_run_goes_on_on_another_device(tmp_path):
    settings = TrainingConfig(epochs=2, batch_size=7, **KINDS["forces taken up later"])
    data = training_data(forces="all")
    Trainer(model(), data, settings, tmp_path / "whole").fit()
    with pretended():
        interrupted_run(tmp_path / "from gpu", settings, 9, data=data, device=GPU)
    Trainer(model(), data, settings, tmp_path / "from gpu", resume=True).fit()
    interrupted_run(tmp_path / "to gpu", settings, 9, data=data)
    with pretended():
        Trainer(model().to(GPU), data, settings, tmp_path / "to gpu", resume=True).fit()
    whole = checkpoint.load(tmp_path / "whole" / "checkpoints" / "last.pt")
    for name in ("from gpu", "to gpu"):
        found = checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")
        torch.testing.assert_close(found["weights"], whole["weights"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found["optimizer"]["state"], whole["optimizer"]["state"], rtol=1e-9, atol=1e-12)


def test_whole_runs_of_the_command_line(tmp_path):
    """Training, resuming, an ensemble, a start model, evaluation and prediction."""
    path = write_config(tmp_path, "loss: {forces: true}", forces="all")
    data, run = str(tmp_path / "data.xyz"), str(tmp_path / "run")
    with pretended():
        settings = config.load(path, ["training.device=cuda"])
        runs.start(settings)
        runs.resume(run, ["training.epochs=5"])
        origin = [f"start.model={run}/checkpoints/last.pt", "start.optimizer=keep", f"run={tmp_path}/fine"]
        runs.start(config.load(path, [*origin, "training.device=cuda"]))
        runs.start(config.load(path, ["ensemble.members=2", f"run={tmp_path}/two", "training.device=cuda"]))
        for source in (run, f"{tmp_path}/two"):
            assert cli.main(["evaluate", source, data, "--device", "cuda", "--plots", f"{source}/plots"]) == 0
            assert cli.main(["predict", source, data, "-o", f"{source}/gpu.xyz", "--device", "cuda"]) == 0
        atoms = ase.io.read(data)
        trained = model_file.load(run)
        calculator = KinMLCalculator(trained, device="cuda")
        assert calculator.model.sae.device == GPU
        assert trained.sae.device.type == "cpu"
        found = calculator.get_potential_energy(atoms), calculator.get_forces(atoms)
        assert KinMLCalculator(calculator.model).model is calculator.model
    calculator = KinMLCalculator(run)
    np.testing.assert_allclose(found[0], calculator.get_potential_energy(atoms), rtol=1e-12)
    np.testing.assert_allclose(found[1], calculator.get_forces(atoms), rtol=1e-9, atol=1e-12)
    for source in (run, f"{tmp_path}/two"):
        assert cli.main(["predict", source, data, "-o", f"{source}/cpu.xyz", "--device", "cpu"]) == 0
        for there, here in zip(*(ase.io.read(f"{source}/{name}.xyz", ":") for name in ("gpu", "cpu")), strict=True):
            np.testing.assert_allclose(there.get_forces(), here.get_forces(), rtol=1e-7, atol=1e-8)
    assert continued.load(f"{run}/checkpoints/last.pt").model.sae.device.type == "cpu"
