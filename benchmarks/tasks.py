"""The structures that benchmarks train on: C5H5, mixed sizes from C2H2 to C10H16, alkanes of any length."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from kinml_fast import datasets
from kinml_fast.data import sae, sqlite
from kinml_fast.data.split import Split
from kinml_fast.data.structures import Structures
from kinml_fast.train import TrainingData

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
PYKINML = ROOT.parent / "shared" / "data" / "pykinml"
MIXED = ROOT / "benchmarks" / "data" / "mixed"
N_STRUCTURES = 2000


def c5h5_file() -> Path:
    """PyKinML's example if it is at hand, else the shipped database."""
    file = PYKINML / "C5H5.db"
    return file if file.exists() else datasets.path("C5H5.db")


def c5h5(count: int = N_STRUCTURES) -> Structures:
    """Structures of C5H5, repeated where the file has fewer."""
    structures = sqlite.read([c5h5_file()])
    return structures.select(np.arange(count) % len(structures))


def mixed() -> Structures:
    """2000 structures of twelve hydrocarbons of 4 to 26 atoms, in random order.

    The first call makes them with python_examples/make_training_data.py, which needs tblite and two minutes.
    """
    if not MIXED.exists():
        log.warning("making %s, which takes two minutes", MIXED)
        MIXED.parent.mkdir(exist_ok=True)
        script = ROOT / "python_examples" / "make_training_data.py"
        with tempfile.TemporaryDirectory(dir=MIXED.parent) as folder:
            made = Path(folder) / "mixed"
            subprocess.run([sys.executable, script, "mixed", "--kinds", "modes", "--output", made], check=True)
            made.rename(MIXED)
    structures = sqlite.read([MIXED / "*.db"])
    return structures.select(np.random.default_rng(0).permutation(len(structures))[:N_STRUCTURES])


def alkanes(n_carbon: int, count: int) -> Structures:
    """Shaken zigzag chains of 3 n_carbon + 2 atoms with random energies and forces: only for timing."""
    zigzag = np.array([[1.27 * i, 0.43 * (-1) ** i, 0.0] for i in range(n_carbon + 2)])  # Å; the ends become hydrogens
    carbons = zigzag[1:-1]
    outwards = np.sign(carbons[:, 1:2]) * [0.0, 0.60, 0.0]
    sides = [carbons + outwards + [0.0, 0.0, z] for z in (0.90, -0.90)]
    ends = [at + (to - at) * 1.09 / np.linalg.norm(to - at) for at, to in (zigzag[1::-1], zigzag[-2:])]
    atoms = np.concatenate([carbons, *sides, ends])
    rng = np.random.default_rng(n_carbon)
    coordinates = atoms + rng.normal(scale=0.05, size=(count, *atoms.shape))
    symbols = ["C"] * n_carbon + ["H"] * (2 * n_carbon + 2)
    return Structures.of_one_formula(symbols, coordinates, rng.normal(size=count), rng.normal(size=coordinates.shape))


def cluster(n_atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates [n_atoms, 3] (Å) and species of atoms as dense as a liquid hydrocarbon: only for timing."""
    side = int(np.ceil(n_atoms ** (1 / 3)))
    places = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n_atoms]
    rng = np.random.default_rng(n_atoms)
    return 2.15 * (places + rng.uniform(-0.2, 0.2, places.shape)), rng.integers(0, 2, n_atoms)


def targets(structures: Structures) -> np.ndarray:
    """Energies without single-atom energies, eV, [n_structures]."""
    counts = structures.counts()
    return structures.energies - counts @ sae.fit(counts, structures.energies, structures.elements)


def training_data(structures: Structures) -> TrainingData:
    """All structures for training; the trainer wants one more for validation and gets the first again."""
    order = np.arange(len(structures))
    split = Split(order, [len(structures)], [])
    single_atoms = sae.fit(structures.counts(), structures.energies, structures.elements)
    return TrainingData(structures.select([*order, 0]), split, single_atoms)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/tasks.py FILE    (writes the coordinates that bench_force_step reads)")
    c5h5().coordinates.tofile(sys.argv[1])
