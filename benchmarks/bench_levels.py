"""Several levels of theory against one, and an ensemble against one model: network 224-48-24-12-1 gaussian, C5H5."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from baselines import DESCRIPTOR, FORCE_WEIGHT
from tasks import training_data

from kinml_fast.data.structures import Structures
from kinml_fast.nn import EnergyModel
from kinml_fast.nn.ensemble import Ensemble
from kinml_fast.train import Trainer, TrainingConfig

DTYPES = ("float64", "float32")
TASKS = pytest.mark.parametrize("task", ["energies", "forces"])
BATCH = 50


def model(dtype: str, levels: int = 1) -> EnergyModel:
    return EnergyModel(DESCRIPTOR, biases=False, dtype=getattr(torch, dtype), fidelities=range(levels))


def with_levels(structures: Structures, levels: int) -> Structures:
    """The structures with energies and forces of their one level at all levels: for timing, any will do."""
    if levels == 1:
        return structures
    return replace(
        structures,
        energies=np.repeat(structures.energies[None], levels, axis=0),
        forces=np.repeat(structures.forces[None], levels, axis=0),
    )


@TASKS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_epoch(benchmark, c5h5, levels, dtype, task):
    """Shuffling, batching, loss, gradient and Adam: batches of 50, every structure with all levels."""
    data = training_data(c5h5)
    sae = data.sae if levels == 1 else np.repeat(data.sae[None], levels, axis=0)
    data = replace(data, structures=with_levels(data.structures, levels), sae=sae)
    config = TrainingConfig(
        batch_size=BATCH, dtype=dtype, loss={"forces": task == "forces", "force_weight": FORCE_WEIGHT}
    )
    trainer = Trainer(model(dtype, levels), data, config)
    trainer.prepare()
    benchmark.group = f"levels {task} {dtype}"
    benchmark.extra_info.update(form=str(levels), dtype=dtype, structures=len(c5h5))
    benchmark.pedantic(trainer.train_epoch, rounds=30, warmup_rounds=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, BATCH, 2000])
def test_ensemble(benchmark, c5h5, count, members, dtype):
    """Energies and forces of every member."""
    structures = c5h5.select(np.arange(count))
    models = [model(dtype) for _ in range(members)]
    arguments = [torch.from_numpy(getattr(structures, name)) for name in ("coordinates", "species", "offsets")]
    arguments[0] = arguments[0].to(getattr(torch, dtype))
    function = models[0].energies_and_forces if members == 1 else Ensemble(models).member_energies_and_forces

    def evaluate():
        with torch.inference_mode():
            return function(*arguments)

    benchmark.group = f"ensemble {count} {dtype}"
    benchmark.extra_info.update(form=str(members), dtype=dtype, structures=count)
    benchmark.pedantic(evaluate, rounds={1: 500, BATCH: 200, 2000: 15}[count], warmup_rounds=3)
