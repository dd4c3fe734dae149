"""Training and evaluation on a GPU: network 224-48-24-12-1 gaussian, C5H5, beside plain PyTorch and TorchANI there.

A round makes several calls and waits for the GPU at its end. A training step has forward and backward pass and Adam, as
a part of an epoch that is recorded as one graph. Rows with `bytes` can be held against the rate of copying on the
device, which is measured too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import tasks
import torch
from baselines import DESCRIPTOR, FORCE_WEIGHT, PlainTorch
from forms import OURS, PLAIN, TORCHANI, baseline, jacobian_bytes, model, training

from kinml_fast import devices, ops
from kinml_fast.data.structures import Structures
from kinml_fast.ops import System
from kinml_fast.train import Trainer, TrainingConfig, TrainingData
from kinml_fast.train.captured import CapturedEpoch
from kinml_fast.train.epoch_errors import EpochErrors

pytestmark = pytest.mark.skipif(devices.why_no_gpu() is not None, reason=str(devices.why_no_gpu()))

GPU = "cuda"
TYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])


def timed(benchmark, row: str, dtype: str, call: Callable[[], object], calls: int, *, steps: int = 1, **info) -> None:
    """Measure rounds of so many calls, each of so many steps, whose time is that of a row in the table."""

    def some() -> None:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()

    benchmark.group = f"gpu {dtype}"
    benchmark.extra_info.update(form=row, dtype=dtype, calls=calls * steps, **info)
    benchmark.pedantic(some, rounds=10, warmup_rounds=2)


@functools.cache
def structures(count: int) -> Structures:
    return tasks.c5h5(count)


@functools.cache
def data(count: int) -> TrainingData:
    return tasks.training_data(structures(count))


def calls_for(batch: int) -> int:
    return max(2, 10_000 // batch)


@TYPES
@pytest.mark.parametrize("batch", [50, 500, 5000, 50_000])
@pytest.mark.parametrize("terms", ["energies", "energies and forces", "energies and stored forces"])
def test_step(benchmark, terms, batch, dtype):
    kind, with_forces, count = getattr(torch, dtype), terms != "energies", max(batch, 2000)
    info = {}
    if terms.endswith("stored forces"):
        if batch > 5000:
            pytest.skip("the Jacobians take too much memory")
        info["bytes"] = jacobian_bytes(structures(batch), kind, padded=False)
    loss = {"forces": with_forces, "force_weight": FORCE_WEIGHT}
    jacobian = "stored" if info else "recompute"
    settings = TrainingConfig(batch_size=batch, dtype=dtype, loss=loss, jacobian=jacobian)
    trainer = Trainer(model(kind).to(GPU), data(count), settings)
    trainer.train_epoch()
    order, errors = torch.from_numpy(trainer.data.order(1)).to(GPU), EpochErrors(1, batch, torch.device(GPU))
    errors.begin(0, np.ones((1, count), dtype=bool), with_forces)
    step = trainer.step(with_forces, trainer.data.whole)
    epoch = CapturedEpoch(step, trainer.optimizer, errors, count, batch, order.device)
    row = f"training step, {terms}, {batch:,} C5H5"
    timed(benchmark, row, dtype, lambda: epoch.run(order), 5, steps=count // batch, atoms=10 * batch, **info)


@TYPES
@pytest.mark.parametrize("form", [OURS, PLAIN, TORCHANI])
@pytest.mark.parametrize("batch", [50, 500])
def test_epoch_with_forces(benchmark, batch, form, dtype):
    """As a user sees it: shuffling, all steps, and the errors of the epoch."""
    if form == TORCHANI:
        need_cuaev(dtype)
    epoch = training(form, structures(2000), getattr(torch, dtype), batch, GPU)
    row = f"epoch of 2000 C5H5 with forces, batches of {batch}: {form}"
    timed(benchmark, row, dtype, epoch, 1, atoms=20_000)


def need_cuaev(dtype: str) -> None:
    csrc = pytest.importorskip("torchani.csrc", reason="TorchANI is optional: pip install torchani")
    if dtype != "float32":
        pytest.skip("cuAEV computes in float32")
    if not csrc.CUAEV_IS_INSTALLED:
        pytest.skip("TorchANI is there without cuAEV: ani build-extensions")


@TYPES
@pytest.mark.parametrize("batch", [50, 500])
@pytest.mark.parametrize("form", [OURS, "plain PyTorch, AEVs cached"])
def test_epoch_on_energies(benchmark, form, batch, dtype):
    kind = getattr(torch, dtype)
    if form == OURS:
        trainer = Trainer(model(kind).to(GPU), data(2000), TrainingConfig(batch_size=batch, dtype=dtype))
        trainer.prepare()
        epoch = trainer.train_epoch
    else:
        features = ops.aev(System(*tensors(structures(2000), torch.float64)), DESCRIPTOR.packed()).to(kind)
        targets = torch.from_numpy(tasks.targets(structures(2000)))
        epoch = PlainTorch(structures(2000), features, targets, batch).epoch
    timed(benchmark, f"epoch of 2000 C5H5, batches of {batch}: {form}", dtype, epoch, 1, atoms=20_000)


def tensors(some: Structures, dtype: torch.dtype) -> list[torch.Tensor]:
    """Coordinates, species and offsets on the GPU."""
    coordinates, species, offsets = (
        torch.from_numpy(getattr(some, name)).to(GPU) for name in ("coordinates", "species", "offsets")
    )
    return [coordinates.to(dtype), species, offsets]


@TYPES
@pytest.mark.parametrize("count", [1, 50, 2000])
def test_evaluation(benchmark, count, dtype):
    arguments, own = tensors(structures(2000).select(np.arange(count)), getattr(torch, dtype)), model_on_gpu(dtype)
    row = f"energies and forces, {count:,} C5H5"
    timed(benchmark, row, dtype, lambda: own.energies_and_forces(*arguments), calls_for(count), atoms=10 * count)


@TYPES
def test_evaluation_by_plain_torch(benchmark, dtype):
    form = baseline(PLAIN, structures(2000), getattr(torch, dtype), 50, GPU)
    timed(benchmark, f"energies and forces, 2,000 C5H5: {PLAIN}", dtype, form.evaluate, 5, atoms=20_000)


@TYPES
@pytest.mark.parametrize("n_atoms", [10_000, 100_000])
def test_large_molecule(benchmark, n_atoms, dtype):
    coordinates, species = tasks.cluster(n_atoms)
    x = torch.from_numpy(coordinates).to(GPU, getattr(torch, dtype))
    arguments = x, torch.from_numpy(species).to(GPU), torch.tensor([0, n_atoms], device=GPU)
    own = model_on_gpu(dtype)
    assert all(result.isfinite().all() for result in own.energies_and_forces(*arguments))
    row = f"energy and forces, one molecule of {n_atoms:,} atoms"
    timed(benchmark, row, dtype, lambda: own.energies_and_forces(*arguments), 2, atoms=n_atoms)


def model_on_gpu(dtype: str) -> torch.nn.Module:
    return model(getattr(torch, dtype)).to(GPU).requires_grad_(False)


@TYPES
@pytest.mark.parametrize("product", ["AEV a", "Jᵀ·g", "J·v"])
def test_aev(benchmark, product, dtype):
    kind, count = getattr(torch, dtype), 5000
    arguments = tensors(structures(count), kind)
    g, v = torch.randn(10 * count, DESCRIPTOR.length, dtype=kind, device=GPU), torch.randn_like(arguments[0])
    packed = DESCRIPTOR.packed()
    call = {
        "AEV a": lambda: ops.aev(System(*arguments), packed),
        "Jᵀ·g": lambda: ops.aev_vjp(System(*arguments), g, packed),
        "J·v": lambda: ops.aev_jvp(System(*arguments), v, packed),
    }[product]
    timed(benchmark, f"{product}, {count:,} C5H5", dtype, call, 5, atoms=10 * count, bytes=g.nbytes)


def test_copy(benchmark):
    """What memory-bound work is held against: the bytes of a row are read or written once, a copy does both."""
    source = torch.ones(2**28, dtype=torch.float32, device=GPU)
    target = torch.empty_like(source)
    timed(benchmark, "copy", "float32", lambda: target.copy_(source), 10, bytes=2 * source.nbytes)
