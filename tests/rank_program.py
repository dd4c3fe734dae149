"""A program for torchrun: small trainings of every kind. The first process prints a digest of each as JSON.

With KINML_TWIN_LIBRARY, the twin's library, the ops are those for GPUs, compiled for the host.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from training_helpers import crystal_data, level_data, model, training_data

from kinml_fast.nn import EnergyModel
from kinml_fast.train import LossBatch, Trainer, TrainingConfig
from kinml_fast.train.ranks import Ranks, joined

TIMES = {"seconds", "structures_per_second"}
FORCES = {"loss": {"forces": True}}
KINDS: dict[str, dict] = {
    "energies": {},
    "energies_float32": {"dtype": "float32"},
    "forces": FORCES,
    "forces_float32": {**FORCES, "dtype": "float32"},
    "some_forces": FORCES,
    "learned": {"loss": {"forces": True, "weighting": "learned"}},
    "levels": FORCES,
    "level_energies": {},
    "stored": {**FORCES, "jacobian": "stored"},
    "average": {**FORCES, "ema_decay": 0.9, "gradient_clip": 1.0},
    "small_batches": {**FORCES, "batch_size": 8},
    "frozen": FORCES,
    "extra": {"loss": {"forces": True, "weighting": "learned"}},
    "crystal_energies": {},
    "crystals": {"loss": {"forces": True, "stresses": True}},
    "crystals_learned": {"loss": {"forces": True, "stresses": True, "weighting": "learned"}, "dtype": "float32"},
    "crystal_levels": {"loss": {"forces": True, "stresses": True}},
}


def smooth(trained: EnergyModel, batch: LossBatch) -> Tensor:
    """A further term of the loss; processes differ in what they compute."""
    energies = trained(batch.coordinates, batch.species, batch.offsets)
    other = dist.is_initialized() and dist.get_rank() > 0
    return (energies**2).mean() * (2.0 if other else 1.0)


def trained(kind: str, ranks: Ranks) -> tuple[Trainer, list]:
    """A trainer after three epochs, and what it said of them."""
    config = TrainingConfig(**{"epochs": 3, "batch_size": 70, "seed": 3, **KINDS[kind]})
    some = "some" if kind in ("some_forces", "levels") else "all"
    if kind.startswith("crystal"):
        data = crystal_data(120, levels=1 + kind.endswith("levels"))
    else:
        data = level_data(90, levels=2, forces=some) if kind.startswith("level") else training_data(90, forces=some)
    fidelities = (0, 1) if "level" in kind else (1,)
    made = model(dtype=getattr(torch, config.dtype), fidelities=fidelities)
    freeze = ["*.0"] if kind == "frozen" else []
    extra = {"smooth": smooth} if kind == "extra" else None
    trainer = Trainer(made, data, config, ranks=ranks, freeze=freeze, extra_losses=extra)
    trainer.prepare()
    said = [{k: v for k, v in trainer.train_epoch().values().items() if k not in TIMES} for _ in range(3)]
    return trainer, [*said, *(sums.errors() for sums in trainer.evaluate("validation", config.loss.forces))]


def main() -> None:
    """Train, compare the processes, print."""
    if library := os.environ.get("KINML_TWIN_LIBRARY"):
        torch.ops.load_library(library)
    found = {}
    with joined() as ranks:
        for kind in KINDS:
            trainer, said = trained(kind, ranks)
            digest = hashlib.sha256(repr(said).encode())
            for parameter in trainer.optimizer.param_groups[0]["params"]:
                digest.update(parameter.detach().numpy().tobytes())
            digests = [digest.hexdigest()] * ranks.size
            if not ranks.alone:
                dist.all_gather_object(digests, digest.hexdigest())
            found[kind] = digests
    if ranks.is_first:
        json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
