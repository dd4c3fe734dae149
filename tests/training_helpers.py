"""What the tests of the trainer share: a small data set, and how runs are compared."""

from __future__ import annotations

import contextlib
import csv
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from data_helpers import molecules

from kinml_fast.data import blocks, large
from kinml_fast.data.blocks import Piece
from kinml_fast.data.large import LargeData
from kinml_fast.data.split import PARTS, Split
from kinml_fast.data.structures import Structures, concatenate
from kinml_fast.deploy.evaluate import evaluate
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train import Trainer, TrainingData, checkpoint
from kinml_fast.train.progress import Progress

SAE = np.array([-100.5, -99.5])


def structures(count: int = 30, forces: str = "none", formulas: tuple[str, ...] = ("CCHH", "CHHH")) -> Structures:
    """`count` structures of each formula, with energies of a few tenths of an eV around single-atom ones.

    `forces`: "none", "all", or "some": every third structure has none.
    """
    parts = [molecules(formula, count, seed, forces=False) for seed, formula in enumerate(formulas, start=1)]
    both = concatenate(parts, ("C", "H"))
    energies, slopes = both.counts() @ SAE, np.zeros_like(both.coordinates)
    for i in range(len(both)):
        x, own = both.coordinates[both.offsets[i] : both.offsets[i + 1]], slice(both.offsets[i], both.offsets[i + 1])
        arms = x[0] - x[1:]
        lengths = np.linalg.norm(arms, axis=1)
        energies[i] += 0.3 * np.sin(3 * lengths).sum()
        pull = (0.9 * np.cos(3 * lengths) / lengths)[:, None] * arms
        slopes[own] = np.concatenate([pull.sum(axis=0)[None], -pull])
        if forces == "some" and i % 3 == 0:
            slopes[own] = np.nan
    values = None if forces == "none" else -slopes
    return Structures(both.elements, both.species, both.coordinates, both.offsets, energies, values, both.labels)


def training_data(
    count: int = 30,
    forces: str = "none",
    formulas: tuple[str, ...] = ("CCHH", "CHHH"),
    weights: np.ndarray | None = None,
) -> TrainingData:
    """A data set with 2/3 of the structures for training, 1/6 for validation and 1/6 for testing."""
    everything = structures(count, forces, formulas)
    order = np.random.default_rng(0).permutation(len(everything))
    first, second = len(order) * 2 // 3, len(order) * 5 // 6
    return TrainingData(everything, Split(order[:first], order[first:second], order[second:]), SAE, weights)


LEVEL_SAE = np.array([SAE, [-101.0, -99.75], [-101.25, -99.5]])
"""Of up to three levels of theory."""


def level_structures(
    count: int = 30, levels: int = 2, forces: str = "all", formulas: tuple[str, ...] = ("CCHH", "CHHH")
) -> Structures:
    """`structures` at several levels of theory, each a little different from the one below.

    With `forces` "some", energies and forces of some structures lack at some levels; of every structure at least one
    energy is known.
    """
    base = structures(count, "none" if forces == "none" else "all", formulas)
    energies = np.stack([base.energies + 0.0 * k for k in range(levels)])
    slopes = None if base.forces is None else np.stack([base.forces] * levels)
    owners = base.owners
    for k in range(1, levels):
        # Further terms in the squares of coordinates, whose forces are simple.
        x = base.coordinates - 1.0
        energies[k] += base.counts() @ (LEVEL_SAE[k] - SAE)
        energies[k] += 0.04 * k * np.bincount(owners, weights=np.cos(x).sum(axis=1))
        if slopes is not None:
            slopes[k] += 0.04 * k * np.sin(x)
    if forces == "some":
        i = np.arange(len(base))
        energies[-1, i % 3 == 0] = np.nan
        energies[0, i % 7 == 1] = np.nan
        energies[0, np.isnan(energies).all(axis=0)] = base.energies[np.isnan(energies).all(axis=0)]
        slopes[:, np.isin(owners, i[i % 5 == 2])] = np.nan
        slopes[np.isnan(energies)[:, owners]] = np.nan
    return Structures(base.elements, base.species, base.coordinates, base.offsets, energies, slopes, base.labels)


def level_data(
    count: int = 30,
    levels: int = 2,
    forces: str = "all",
    formulas: tuple[str, ...] = ("CCHH", "CHHH"),
    weights: np.ndarray | None = None,
) -> TrainingData:
    """As `training_data`, of several levels of theory."""
    everything = level_structures(count, levels, forces, formulas)
    order = np.random.default_rng(0).permutation(len(everything))
    first, second = len(order) * 2 // 3, len(order) * 5 // 6
    split = Split(order[:first], order[first:second], order[second:])
    return TrainingData(everything, split, LEVEL_SAE[:levels], weights)


def crystal_structures(count: int = 60, levels: int = 1) -> Structures:
    """Crystals of CHCH with the energies, forces and stresses of random models, one for each level of theory.

    Every fifth structure is a molecule, every seventh crystal has no stress, and some are layers; of several levels
    every third structure lacks the highest.
    """
    rng = np.random.default_rng(7)
    cells = np.eye(3) * rng.uniform(3.3, 4.0, (count, 3, 1)) + rng.uniform(-0.3, 0.3, (count, 3, 3))
    periodic = np.ones((count, 3), dtype=np.int64)
    periodic[::5], periodic[2::10] = 0, (1, 1, 0)
    places = np.array([[0, 0, 0], [1.1, 0, 0], [0, 1.8, 0.2], [0.2, 1.7, 1.4]])
    bare = Structures.of_one_formula("CHCH", places + rng.normal(0, 0.1, (count, 4, 3)), None)
    bare = bare.changed(cells=cells, periodic=periodic)
    found = [evaluate(model(20 + k), bare, forces=True, stresses=True) for k in range(levels)]
    energies, forces, stresses = (
        np.stack([getattr(x, name) for x in found]) for name in ("energies", "forces", "stresses")
    )
    energies = energies + bare.counts() @ SAE
    stresses[:, 1::7] = np.nan
    if levels == 1:
        return bare.changed(energies=energies[0], forces=forces[0], stresses=stresses[0])
    energies[-1, ::3] = np.nan
    forces[-1, np.isnan(energies[-1])[bare.owners]] = np.nan
    stresses[-1, ::3] = np.nan
    return bare.changed(energies=energies, forces=forces, stresses=stresses)


def crystal_data(count: int = 60, levels: int = 1, weights: np.ndarray | None = None) -> TrainingData:
    """As `training_data`, of crystals beside molecules."""
    everything = crystal_structures(count, levels)
    order = np.random.default_rng(0).permutation(count)
    split = Split(order[: count * 2 // 3], order[count * 2 // 3 : count * 5 // 6], order[count * 5 // 6 :])
    return TrainingData(everything, split, SAE if levels == 1 else np.tile(SAE, (levels, 1)), weights)


def on_disk(data: TrainingData, folder: Path, name: str = "data.blocks") -> LargeData:
    """Training data as a file of blocks."""

    def pieces():
        for part in PARTS:
            indices = getattr(data.split, part)
            weights = None if data.weights is None else data.weights[indices]
            yield part, Piece(data.structures.select(indices), indices, weights)

    s = data.structures
    form = {"elements": s.elements, "levels": s.levels, "forces": s.forces is not None}
    form |= {"cells": s.cells is not None, "stresses": s.stresses is not None}
    about = {"fidelities": list(range(s.levels)), "baseline": None, "sae": np.atleast_2d(data.sae).tolist()}
    about |= {"tables": [], "hash": "none"}
    blocks.write(folder / name, pieces(), **form, weights=data.weights is not None, about=about)
    return large.load(folder / name)


def model(
    seed: int = 0,
    layers: tuple[int, ...] = (8, 4, 1),
    dtype: torch.dtype = torch.float64,
    fidelities: tuple[int, ...] = (1,),
) -> EnergyModel:
    """A small model of carbon and hydrogen."""
    torch.manual_seed(seed)
    descriptor = AEVParameters.aevmod(("C", "H"), n_radial=4, n_angular=2, n_sections=2)
    activations = ["gaussian"] * (len(layers) - 1) + ["identity"]
    return EnergyModel(descriptor, list(layers), activations, True, dtype, fidelities)


def write_xyz(path: Path, count: int = 30, forces: str = "none") -> None:
    """The structures as an extended XYZ file."""
    everything = structures(count, forces)
    frames = []
    for i in range(len(everything)):
        atoms = slice(everything.offsets[i], everything.offsets[i + 1])
        frame = ase.Atoms(everything.symbols(i), everything.coordinates[atoms])
        frame.info["REF_energy"] = everything.energies[i]
        if everything.forces is not None and not np.isnan(everything.forces[atoms]).any():
            frame.arrays["REF_forces"] = everything.forces[atoms]
        frames.append(frame)
    ase.io.write(path, frames, format="extxyz")


def write_config(folder: Path, training: str = "", count: int = 30, forces: str = "none") -> Path:
    """A configuration of a small run in `folder`, and its data."""
    write_xyz(folder / "data.xyz", count, forces)
    path = folder / "small.yaml"
    path.write_text(
        f"run: {folder / 'run'}\n"
        f"data: {{files: ['{folder / 'data.xyz'}'], split: [0.7, 0.15, 0.15]}}\n"
        "descriptor: {n_radial: 4, n_angular: 2, n_sections: 2}\n"
        "network: {layers: [8, 4, 1]}\n"
        f"training: {{epochs: 4, batch_size: 7{training and ', ' + training}}}\n",
        encoding="utf-8",
    )
    return path


class Killed(Exception):
    """Stands for the end of a process."""


class Interrupter(Progress):
    """Raises Killed, or sends SIGINT, after so many batches that were reported."""

    def __init__(self, stop_at, act):
        self.left, self.act = stop_at, act

    def batch(self, epoch, fraction):
        self.left -= 1
        if self.left == 0:
            self.act()


def interrupted_run(
    folder, config, stop_at, act=None, data=None, dtype=torch.float64, fidelities=(1,), device="cpu", **keys
):
    """A run that ends after `stop_at` batches; last.pt is of the batch before that."""

    def kill():
        raise Killed

    progress = Interrupter(stop_at, act or kill)
    trained = model(dtype=dtype, fidelities=fidelities).to(device)
    trainer = Trainer(trained, data or training_data(), config, folder, progress=progress, clock=HastyClock(), **keys)
    with pytest.raises((Killed, KeyboardInterrupt)):
        trainer.fit()
    return trainer


class HastyClock:
    """A clock on which so many seconds pass between two looks: with an hour, everything is due after every batch."""

    def __init__(self, seconds: float = 3600.0) -> None:
        self.seconds, self.now = seconds, 0.0

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def train(*arguments: object) -> subprocess.Popen:
    """`kinml-fast train` as a process of its own."""
    command = [sys.executable, "-m", "kinml_fast.cli", "train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def start_ranks(
    size: int,
    *arguments: object,
    program: Sequence[object] = ("-m", "kinml_fast.cli", "train"),
    of_last: Sequence[object] = (),
    of_last_environment: Mapping[str, str] | None = None,
    of_first: Callable[[], None] | None = None,
) -> list[subprocess.Popen]:
    """So many processes of `kinml-fast train`, or of another program, that train together, without torchrun.

    The last one has further arguments and variables, the first one a function to call before it begins.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        last = rank == size - 1
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "RANK": str(rank)}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **place}
        if last:
            environment |= of_last_environment or {}
        processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, (*program, *arguments, *(of_last if last else ())))],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                preexec_fn=of_first if rank == 0 else None,
            )
        )
    return processes


def finish(process: subprocess.Popen) -> None:
    """Wait for its end, which must be a good one."""
    _, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err


def kill_and_resume(run: Path, awaited: Sequence[Path | None], *arguments: object, seed: int = 0) -> None:
    """Train with these arguments, kill (kill -9) and resume the run again and again, and let it end.

    Each kill comes up to 0.2 s after its file in `awaited` was written anew, or, with None, after the process began.
    """
    generator = random.Random(seed)
    killed = 0
    for path in awaited:
        process = train("--resume", run) if (run / "config.yaml").exists() else train(*arguments)
        if not kill(process, path, generator.uniform(0, 0.2)):
            break
        killed += 1
    assert killed > 0
    finish(train("--resume", run))


def kill(process: subprocess.Popen, awaited: Path | None, seconds: float) -> bool:
    """Kill (kill -9) a process so long after a file, or something in a folder, was written anew; with None, from now.

    Returns whether it had not ended before.
    """
    if awaited is not None:
        before = newest(awaited)
        while process.poll() is None and newest(awaited) == before:
            time.sleep(0.005)
    time.sleep(seconds)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return True


def newest(path: Path) -> int:
    """When a file, or something in a folder, was last written; 0 if it is not there."""
    found = 0
    for one in path.rglob("*") if path.is_dir() else [path]:
        with contextlib.suppress(FileNotFoundError):
            found = max(found, one.stat().st_mtime_ns)
    return found


def rows(run: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that tell the time."""
    with (run / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if "second" not in key} for row in table]


def assert_same_run(a: Path, b: Path) -> None:
    """Both runs ended with the same bits: weights, optimizer, random states, metrics."""
    assert rows(a) == rows(b)
    for name in ("last.pt", "best.pt"):
        assert_same_bits(
            *(
                {k: v for k, v in checkpoint.load(run / "checkpoints" / name).items() if k not in _TIMES}
                for run in (a, b)
            )
        )


_TIMES = {"elapsed", "metrics_length"}


def assert_same_bits(a: object, b: object) -> None:
    """Nested dictionaries and lists of tensors and values are equal, NaN being equal to NaN."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
    else:
        assert a == b
