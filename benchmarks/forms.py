"""The forms of training on energies and forces that are measured side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from baselines import DESCRIPTOR, FORCE_WEIGHT, PlainTorchForces, TorchANIForces, check
from tasks import targets, training_data

from kinml_fast.data.structures import Structures
from kinml_fast.nn import EnergyModel
from kinml_fast.train import Trainer, TrainingConfig

OURS, STORED = "kinml_fast", "kinml_fast, Jacobians stored"
PLAIN, TORCHANI = "plain PyTorch, Jacobians stored", "TorchANI 2.9"
FORMS = (OURS, STORED, PLAIN, TORCHANI)
WITH_JACOBIANS = (STORED, PLAIN)

Epoch = Callable[[], object]


def model(dtype: torch.dtype) -> EnergyModel:
    """The network of all forms, 224-48-24-12-1 gaussian without biases."""
    return EnergyModel(DESCRIPTOR, biases=False, dtype=dtype)


def training(
    form: str, structures: Structures, dtype: torch.dtype, batch_size: int = 50, device: torch.device | str = "cpu"
) -> Epoch:
    """Make everything ready and return what trains one epoch: shuffling, batching, loss, gradient and Adam.

    A form that is not ours has then shown for its first batch that it computes the same as our ops.
    """
    if form in (OURS, STORED):
        config = TrainingConfig(
            batch_size=batch_size,
            dtype=str(dtype).removeprefix("torch."),
            loss={"forces": True, "force_weight": FORCE_WEIGHT},
            jacobian="stored" if form == STORED else "recompute",
        )
        trainer = Trainer(model(dtype).to(device), training_data(structures), config)
        trainer.prepare()
        return trainer.train_epoch
    return baseline(form, structures, dtype, batch_size, device).epoch


def baseline(
    form: str, structures: Structures, dtype: torch.dtype, batch_size: int = 50, device: torch.device | str = "cpu"
) -> PlainTorchForces:
    """One of the forms that are not ours, checked."""
    kind = {PLAIN: PlainTorchForces, TORCHANI: TorchANIForces}[form]
    result = kind(structures, torch.from_numpy(targets(structures)), dtype, batch_size, device)
    check(result, structures)
    return result


def jacobian_bytes(structures: Structures, dtype: torch.dtype, padded: bool) -> int:
    """Bytes of the Jacobians, with or without padding to the largest structure."""
    columns = 3 * (structures.sizes.max() if padded else structures.sizes)
    return int((structures.sizes * columns).sum()) * DESCRIPTOR.length * dtype.itemsize
