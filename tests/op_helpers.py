"""What the tests of the ops share: descriptors, ragged batches, and the oracle in the ops' terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from kinml_fast import reference
from kinml_fast.nn import AEVParameters

Ragged = tuple[Tensor, Tensor, Tensor]
"""coordinates [n_atoms, 3], species [n_atoms], offsets [n_structures + 1]"""

SMALL = AEVParameters.aevmod(("C", "H"), n_radial=3, n_angular=2, n_sections=2)
"""D = 18: for checks whose cost grows with the vector."""

ANI_1X = AEVParameters.ani(
    ("H", "C", "N", "O"),
    [0.9 + 0.26875 * i for i in range(16)],
    16.0,
    5.2,
    [0.9 + 0.65 * i for i in range(4)],
    8.0,
    3.5,
    [math.pi / 16 * (2 * i + 1) for i in range(8)],
    32.0,
)
ANI_2X = AEVParameters.ani(
    ("H", "C", "N", "O", "S", "F", "Cl"),
    [0.8 + 0.26875 * i for i in range(16)],
    19.7,
    5.1,
    [0.8 + 0.3375 * i for i in range(8)],
    12.5,
    3.5,
    [math.pi / 8 * (2 * i + 1) for i in range(4)],
    14.1,
)


def keywords(descriptor: AEVParameters) -> dict:
    """The keyword arguments of `reference.aev` that mean this descriptor."""
    values = {field.name: getattr(descriptor, field.name) for field in fields(descriptor)}
    return {"n_species": len(values.pop("elements")), **values}


def ragged(sizes: Sequence[int], n_species: int, seed: int, spacing: float = 1.5) -> Ragged:
    """Structures of `sizes` atoms on a shaken cubic lattice: no two atoms are closer than 0.6 spacing."""
    rng = np.random.default_rng(seed)
    parts = []
    for n in sizes:
        side = math.ceil(n ** (1 / 3) + 0.3)
        places = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
        chosen = places[rng.permutation(len(places))[:n]]
        parts.append(spacing * (chosen + rng.uniform(-0.2, 0.2, (n, 3))))
    offsets = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int64)
    n_atoms = int(offsets[-1])
    coordinates = torch.tensor(np.concatenate(parts) if parts else np.zeros((0, 3))).reshape(-1, 3)
    return coordinates, torch.tensor(rng.integers(0, n_species, n_atoms)), offsets


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of a normal distribution, the same ones in both types."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference_aev(batch: Ragged, descriptor: AEVParameters) -> Tensor:
    return reference.aev(*batch, **keywords(descriptor))


def not_contiguous(x: Tensor) -> Tensor:
    """The same values, each row and number in memory at a stride."""
    room = x.new_full([2 * n + 1 for n in x.shape], 99)
    view = room[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view
