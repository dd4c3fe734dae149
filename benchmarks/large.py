"""Data larger than memory: makes them, and trains on them from disk or from memory. Prints JSON.

python large.py make FILE STRUCTURES              # C5H5 bent at random, Morse bonds: 0.5 GB a million
python large.py train FILE --threads N [--memory] [--cold] [--epochs 1]
torchrun --nproc-per-node=2 large.py train FILE   # by several processes; each prints
"""

# ruff: noqa: E402 (the clock starts before the imports)
from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from process import peak_memory

from kinml_fast.data import blocks, read
from kinml_fast.data.blocks import BlockFile, Piece
from kinml_fast.data.large import LargeData
from kinml_fast.data.split import PARTS, Split
from kinml_fast.data.structures import Structures
from kinml_fast.data.training_data import TrainingData
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train import Trainer, TrainingConfig
from kinml_fast.train.ranks import joined

AT_ONCE = 1 << 14
BEND = 0.07  # Å, standard deviation of each coordinate


def bent(template: Structures, first: int, count: int, seed: int) -> Structures:
    """Structures of random displacements, with the energies and forces of Morse terms between all atoms."""
    rng = np.random.default_rng([seed, first])
    base = template.coordinates
    x = base + BEND * rng.standard_normal((count, *base.shape))
    i, j = np.triu_indices(len(base), 1)
    rest = np.linalg.norm(base[i] - base[j], axis=1)
    depth = np.where(rest < 1.8, 4.0, 0.3)  # eV: bonds, and all else
    arms = x[:, i] - x[:, j]
    lengths = np.linalg.norm(arms, axis=2)
    grown = np.exp(-1.5 * (lengths - rest))
    energies = (depth * (1 - grown) ** 2).sum(axis=1) - 5300.0
    pull = (depth * 2 * (1 - grown) * 1.5 * grown / lengths)[..., None] * arms
    forces = np.zeros_like(x)
    for pair in range(len(i)):
        forces[:, i[pair]] -= pull[:, pair]
        forces[:, j[pair]] += pull[:, pair]
    return Structures.of_one_formula(
        template.symbols(0), x, energies, forces, (f"C5H5/{first + n + 1}" for n in range(count)), template.elements
    )


def make(path: Path, count: int) -> None:
    template = read("shipped:C5H5.db").select([0])
    sizes = {"train": count - 2 * (count // 20), "validation": count // 20, "test": count // 20}

    def pieces() -> Iterator[tuple[str, Piece]]:
        done = 0
        for part in PARTS:
            for first in range(0, sizes[part], AT_ONCE):
                n = min(AT_ONCE, sizes[part] - first)
                yield part, Piece(bent(template, done, n, 0), np.arange(done, done + n), None)
                done += n

    form = {"elements": template.elements, "levels": 1, "forces": True, "weights": False}
    blocks.write(path, pieces(), **form, about={"hash": "synthetic", "fidelities": [1], "baseline": None, "sae": []})


def in_memory(file: BlockFile) -> TrainingData:
    piece = file.read(np.concatenate([file.blocks(part)[0] for part in PARTS]).tolist())
    ends = np.cumsum([0] + [file.sizes[part] for part in PARTS])
    return TrainingData(piece.structures, Split(*(np.arange(*ends[k : k + 2]) for k in range(3))), SAE)


SAE = np.array([-1043.0, -17.0])


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def train(options: argparse.Namespace) -> dict:
    imported, imports = peak_memory(), time.perf_counter() - STARTED
    torch.set_num_threads(options.threads)
    if options.cold:
        forget(options.file)
    with joined() as ranks:
        started = time.perf_counter()
        file = BlockFile(options.file)
        data = in_memory(file) if options.memory else LargeData(file, SAE)
        torch.manual_seed(0)
        model = EnergyModel(AEVParameters.aevmod(file.elements), dtype=getattr(torch, options.dtype))
        config = TrainingConfig(
            dtype=options.dtype, batch_size=options.batch, loss={"forces": True}, optimizer={"learning_rate": 2e-3}
        )
        trainer = Trainer(model, data, config, ranks=ranks)
        trainer.prepare()
        ready = time.perf_counter() - started
        epochs = []
        for _ in range(options.epochs):
            computing = time.process_time()
            row = trainer.train_epoch()
            started, computing = time.perf_counter(), time.process_time() - computing
            (validation,) = trainer.evaluate("validation", True) if options.validate else [None]
            epochs.append(
                {
                    "structures_per_second": round(row.structures_per_second),
                    "seconds": round(row.seconds, 1),
                    "cpu_seconds": round(computing, 1),
                    "rmse": [row.energy.rmse, row.forces.rmse],
                    "validation_rmse": validation
                    and [errors.rmse for errors in validation.errors() if errors is not None],
                    "validation_seconds": round(time.perf_counter() - started, 1),
                }
            )
        return {
            "rank": ranks.rank,
            "structures": sum(file.sizes.values()),
            "from": "memory" if options.memory else "disk, cold" if options.cold else "disk",
            "imports_seconds": round(imports, 2),
            "start_seconds": round(ready, 2),
            "epochs": epochs,
            "imported_MB": imported >> 20,
            "peak_MB": peak_memory() >> 20,
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    parts = commands.add_parser("make")
    parts.add_argument("file", type=Path)
    parts.add_argument("structures", type=int)
    parts = commands.add_parser("train")
    parts.add_argument("file", type=Path)
    parts.add_argument("--threads", type=int, default=2)
    parts.add_argument("--memory", action="store_true")
    parts.add_argument("--cold", action="store_true")
    parts.add_argument("--validate", action="store_true")
    parts.add_argument("--epochs", type=int, default=1)
    parts.add_argument("--batch", type=int, default=50)
    parts.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    logging.disable()
    if options.command == "make":
        make(options.file, options.structures)
    else:
        sys.stdout.write(json.dumps(train(options)) + "\n")


if __name__ == "__main__":
    main()
