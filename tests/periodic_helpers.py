"""Periodic structures for tests: random cells and batches, pairs by ase, boxes built by hand as clusters of images."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch
from ase.neighborlist import primitive_neighbor_list
from op_helpers import ragged
from torch import Tensor

from kinml_fast.ops import System

SIZES = (5, 1, 0, 8, 3, 2)
"""Atoms of the structures of `crystals`."""

ALONG = list(itertools.product((0, 1), repeat=3))
"""All eight kinds of partial periodicity."""


def random_cells(n: int, shortest: float, longest: float, seed: int = 0) -> Tensor:
    """Right-handed triclinic cells [n, 3, 3] with vectors of about these lengths in Å."""
    rng = np.random.default_rng(seed)
    skew = np.eye(3) + rng.uniform(-0.25, 0.25, (n, 3, 3))
    return torch.tensor(skew * rng.uniform(shortest, longest, (n, 3, 1)))


def crystals(
    dtype: torch.dtype = torch.float64, along: tuple[int, int, int] | None = None, sizes: tuple[int, ...] = SIZES
) -> System:
    """Structures in cells shorter than the cutoffs, each periodic in a way of its own, or all in one."""
    coordinates, species, offsets = ragged(sizes, 2, 4)
    n = len(sizes)
    kinds = [along] * n if along is not None else [ALONG[-1 - 5 * i % 8] for i in range(n)]
    if along is None and n > 3:
        kinds[3] = (0, 0, 0)
    return System(
        coordinates.to(dtype), species, offsets, cells=random_cells(n, 3.5, 6.0), periodic=torch.tensor(kinds)
    )


def with_pairs(system: System, cutoff: float, order: torch.Generator | None = None) -> System:
    """The same with the pairs that ase finds within a cutoff, those of a centre in an order of their own."""
    starts, neighbours, shifts = [0], [], []
    for s in range(len(system.offsets) - 1):
        first, last = int(system.offsets[s]), int(system.offsets[s + 1])
        along, cell = np.zeros(3, dtype=bool), np.zeros((3, 3))
        if system.periodic is not None and system.cells is not None:
            along = system.periodic[s].cpu().numpy() != 0
            cell = system.cells[s].cpu().numpy() * along[:, None]
            full = cell + np.diag(1.0 * ~along) * 100
        else:
            full = np.eye(3) * 100
        assert system.coordinates is not None
        x = system.coordinates[first:last].double().cpu().numpy()
        i, j, n = primitive_neighbor_list("ijS", along, full, x, cutoff) if last > first else (np.zeros(0, int),) * 3
        n = np.reshape(n, (-1, 3))
        for atom in range(last - first):
            own = np.flatnonzero(i == atom)
            if order is not None:
                own = own[torch.randperm(len(own), generator=order, device="cpu").numpy()]
            neighbours += (first + j[own]).tolist()
            shifts += n[own].tolist()
            starts.append(len(neighbours))
    given = {
        "pair_starts": torch.tensor(starts),
        "neighbours": torch.tensor(neighbours, dtype=torch.int64),
        "shifts": None if system.cells is None else torch.tensor(shifts, dtype=torch.int64).reshape(-1, 3),
    }
    return replace(system, **given)


def cluster(system: System, reach: float, s: int = 0) -> tuple[System, Tensor]:
    """Structure s as a molecule built by hand: its atoms, which are centres, then their images as ghosts.

    Returns also the atom [n] of the structure that each is an image of.
    """
    first, last = int(system.offsets[s]), int(system.offsets[s + 1])
    assert system.coordinates is not None
    assert system.cells is not None
    assert system.periodic is not None
    x, z = system.coordinates[first:last], system.species[first:last]
    counts = [6 if p else 0 for p in system.periodic[s].tolist()]
    places, atoms = [x], [torch.arange(last - first)]
    for shift in itertools.product(*(range(-n, n + 1) for n in counts)):
        if shift == (0, 0, 0):
            continue
        there = x + (torch.tensor(shift).double() @ system.cells[s]).to(x)
        near = torch.cdist(there, x).min(1).values <= reach
        places.append(there[near])
        atoms.append(torch.nonzero(near)[:, 0])
    atom = torch.cat(atoms)
    alone = System(torch.cat(places), z[atom], torch.tensor([0, len(atom)]), centres=torch.tensor([last - first]))
    return alone, atom


def supercell(system: System, counts: tuple[int, int, int], s: int = 0) -> System:
    """Structure s repeated along its vectors."""
    first, last = int(system.offsets[s]), int(system.offsets[s + 1])
    assert system.coordinates is not None
    assert system.cells is not None
    assert system.periodic is not None
    places = [
        system.coordinates[first:last]
        + torch.tensor(shift).to(system.coordinates) @ system.cells[s].to(system.coordinates)
        for shift in itertools.product(*(range(n) for n in counts))
    ]
    n = len(places) * (last - first)
    return System(
        torch.cat(places),
        system.species[first:last].repeat(len(places)),
        torch.tensor([0, n]),
        cells=(system.cells[s] * torch.tensor(counts)[:, None])[None],
        periodic=system.periodic[s : s + 1],
    )
