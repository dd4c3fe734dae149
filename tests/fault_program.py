"""A program for several processes: what differs between them is found, and connections end with the block.

The first one prints what they heard as JSON, and whether nothing keeps the process group.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import weakref

import torch.distributed as dist
from training_helpers import SAE, model, training_data

from kinml_fast.errors import InputError
from kinml_fast.train import Trainer, TrainingConfig
from kinml_fast.train.ranks import Ranks, joined


def heard(ranks: Ranks, what: str) -> str:
    """What training says when something is different in process 1."""
    other = ranks.rank == 1
    data = training_data()
    if other and what == "data":
        data = dataclasses.replace(data, sae=SAE + 1e-9)
    config = TrainingConfig(epochs=1, seed=5 if other and what == "configuration" else 0, threads=1 + other)
    trainer = Trainer(model(seed=1 if other and what == "weights" else 0), data, config, ranks=ranks)
    try:
        trainer.fit()
    except InputError as error:
        return str(error)
    return "nothing"


def main() -> None:
    """Train with differences, and without."""
    with joined() as ranks:
        found = {what: heard(ranks, what) for what in ("nothing", "configuration", "data", "weights")}
        turns = [ranks.told(lambda: "of the first"), str(ranks.largest(7 * ranks.rank))]
        group = weakref.ref(dist.group.WORLD)
        everyone = [None] * ranks.size
        dist.all_gather_object(everyone, (found, turns))
    if ranks.is_first:
        json.dump((everyone, group() is None), sys.stdout)


if __name__ == "__main__":
    main()
