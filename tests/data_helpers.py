"""What several tests of the data code share."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from kinml_fast.data.split import Split
from kinml_fast.data.splits import read_tvtmsk
from kinml_fast.data.structures import Structures

SHARED = Path(__file__).parents[2] / "shared" / "data" / "pykinml"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no example databases in {SHARED}")


def molecules(symbols: str, count: int, seed: int = 0, forces: bool = True) -> Structures:
    """`count` random structures of the atoms in `symbols` (one letter each), no two atoms near each other."""
    rng = np.random.default_rng(seed)
    lattice = np.stack(np.unravel_index(np.arange(len(symbols)), (4, 4, 4)), axis=1) * 1.5
    coordinates = lattice + rng.uniform(-0.3, 0.3, (count, len(symbols), 3))
    energies = -100.0 * len(symbols) + rng.normal(size=count)
    values = rng.normal(size=coordinates.shape) if forces else None
    return Structures.of_one_formula(list(symbols), coordinates, energies, values)


def same(a: Structures, b: Structures) -> bool:
    """Whether two sets are equal bit by bit."""
    forces = (a.forces is None and b.forces is None) or (
        a.forces is not None and b.forces is not None and np.array_equal(a.forces, b.forces, equal_nan=True)
    )
    return (
        forces
        and a.elements == b.elements
        and a.labels == b.labels
        and np.array_equal(a.species, b.species)
        and np.array_equal(a.coordinates, b.coordinates)
        and np.array_equal(a.offsets, b.offsets)
        and np.array_equal(a.energies, b.energies)
    )


def pykinml_split(structures: Structures, split_file: Path, n_train: int, n_validation: int, seed: int) -> Split:
    """PyKinML's choice: the training and validation lines in the order of the data, shuffled by its seeding."""
    masks = dict(zip(*(lambda file: (file.labels, file.masks))(read_tvtmsk(split_file)), strict=True))
    candidates = [i for i, label in enumerate(structures.labels) if masks.get(label) == 2]
    test = [i for i, label in enumerate(structures.labels) if masks.get(label) == -1]
    generator = random.Random(seed)
    generator.randrange(200000)  # for torch
    generator.randrange(200000)  # for numpy
    generator.seed(generator.randrange(200000))
    order = list(range(n_train + n_validation))
    generator.shuffle(order)
    chosen = [candidates[i] for i in order]
    return Split(np.array(chosen[:n_train]), np.array(chosen[n_train:]), np.array(test))
