"""One training epoch on energies: 2000 C5H5, batches of 50, network 224-48-24-12-1, Adam.

An epoch includes shuffling, batching, loss, gradient and optimizer. The floor is the arithmetic of the networks at the
rate of torch.mm on this machine (forward and weight gradients of all layers, deltas of all but the first).
"""

from __future__ import annotations

import itertools

import pytest
import tasks
import torch
from baselines import LAYERS, PlainTorch, TorchANI

from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train.config import TrainingConfig
from kinml_fast.train.trainer import Trainer

DTYPES = ("float64", "float32")


def flops_per_atom() -> int:
    products = [a * b for a, b in itertools.pairwise(LAYERS)]
    return 2 * (2 * sum(products) + sum(products[1:]))


def describe(benchmark, structures, form: str, dtype: str) -> None:
    benchmark.group = f"energy epoch {dtype}"
    benchmark.extra_info.update(form=form, dtype=dtype, structures=len(structures), flops=flops_per_atom() * 10 * 2000)


@pytest.fixture(scope="module")
def targets(c5h5) -> torch.Tensor:
    return torch.from_numpy(tasks.targets(c5h5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kinml_fast(benchmark, c5h5, dtype):
    describe(benchmark, c5h5, "kinml_fast", dtype)
    model = EnergyModel(AEVParameters.aevmod(("C", "H")), biases=False, dtype=getattr(torch, dtype))
    trainer = Trainer(model, tasks.training_data(c5h5), TrainingConfig(batch_size=50, dtype=dtype))
    trainer.prepare()
    benchmark.pedantic(trainer.train_epoch, rounds=60, warmup_rounds=10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch(benchmark, c5h5, targets, dtype):
    describe(benchmark, c5h5, "plain PyTorch, AEVs cached", dtype)
    aev = EnergyModel(AEVParameters.aevmod(("C", "H"))).aev
    x, species, offsets = (torch.from_numpy(a) for a in (c5h5.coordinates, c5h5.species, c5h5.offsets))
    features = aev(x, species, offsets).to(getattr(torch, dtype))
    training = PlainTorch(c5h5, features, targets)
    benchmark.pedantic(training.epoch, rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchani(benchmark, c5h5, targets, dtype):
    pytest.importorskip("torchani", reason="TorchANI is optional: pip install torchani")
    describe(benchmark, c5h5, "TorchANI 2.9", dtype)
    training = TorchANI(c5h5, targets, getattr(torch, dtype))
    benchmark.pedantic(training.epoch, rounds=5, warmup_rounds=1)
