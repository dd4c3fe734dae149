"""The shape of a molecule: an atom, linear or not, and how many rotations leave it as it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np
from ase import Atoms
from scipy.spatial.distance import cdist

TOLERANCE = 0.05
"""Å, by which an atom may miss its image."""
_STRAIGHT = 1e-3
"""Least moment of inertia of what is not linear, as a share of the largest."""


Shape = Literal["monatomic", "linear", "nonlinear"]


def shape(atoms: Atoms) -> Shape:
    """What `ase.thermochemistry` calls the geometry of a molecule: monatomic, linear or nonlinear."""
    if len(atoms) < 2:
        return "monatomic"
    moments = np.sort(atoms.get_moments_of_inertia())
    return "linear" if moments[0] < _STRAIGHT * moments[2] else "nonlinear"


def rotations(atoms: Atoms, tolerance: float = TOLERANCE) -> int:
    """The rotational symmetry number σ: how many proper rotations take a molecule to itself.

    Parameters
    ----------
    atoms
        The molecule; isotopes count as different if their masses do.
    tolerance
        By how much (Å) an atom may miss the place of an equal one.

    Returns
    -------
    int
        1 of an atom, 1 or 2 of a linear molecule, up to 60 (icosahedral) of others.
    """
    kind = shape(atoms)
    if kind == "monatomic":
        return 1
    x = atoms.positions - atoms.get_center_of_mass()
    kinds = np.unique(np.column_stack([atoms.numbers, np.round(atoms.get_masses(), 3)]), axis=0, return_inverse=True)[1]
    kinds = kinds.ravel()
    if kind == "linear":
        return 2 if _is_image(x, -x, kinds, tolerance) else 1
    found = [np.eye(3)]
    for rotation in _candidates(x, kinds, tolerance):
        if all(np.abs(rotation - other).max() > 0.1 for other in found) and _is_image(
            x, x @ rotation.T, kinds, tolerance
        ):
            found.append(rotation)
    return len(found)


def _candidates(x: np.ndarray, kinds: np.ndarray, tolerance: float) -> Iterator[np.ndarray]:
    """Rotations [3, 3] that take two atoms, not in line with the centre, to atoms of their kinds."""
    distances = np.linalg.norm(x, axis=1)
    pair = _frame_atoms(x, kinds, distances)
    if pair is None:
        return
    a, b = pair
    own = _axes(x[a], x[b])
    for i, j in itertools.permutations(range(len(x)), 2):
        same = kinds[i] == kinds[a] and kinds[j] == kinds[b]
        near = abs(distances[i] - distances[a]) < tolerance and abs(distances[j] - distances[b]) < tolerance
        if same and near and abs(np.linalg.norm(x[i] - x[j]) - np.linalg.norm(x[a] - x[b])) < 2 * tolerance:
            yield _axes(x[i], x[j]) @ own.T


def _frame_atoms(x: np.ndarray, kinds: np.ndarray, distances: np.ndarray) -> tuple[int, int] | None:
    """Two atoms that span a plane with the centre, well and of a rare kind."""
    best: tuple[float, int, int] | None = None
    numbers = np.bincount(kinds)
    for a, b in itertools.combinations(range(len(x)), 2):
        area = np.linalg.norm(np.cross(x[a], x[b]))
        if min(distances[a], distances[b]) > 0.3 and area > 0.3 * distances[a] * distances[b]:
            this = float(numbers[kinds[a]] * numbers[kinds[b]]), a, b
            best = this if best is None else min(best, this)
    return None if best is None else best[1:]


def _axes(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Orthonormal columns [3, 3], the first along one vector, the second in the plane of both."""
    e = first / np.linalg.norm(first)
    f = second - e * (e @ second)
    f = f / max(np.linalg.norm(f), 1e-12)
    return np.column_stack([e, f, np.cross(e, f)])


def _is_image(x: np.ndarray, moved: np.ndarray, kinds: np.ndarray, tolerance: float) -> bool:
    """Whether each moved atom is at the place of one of its kind, and no two at the same."""
    distances = cdist(moved, x)
    distances[kinds[:, None] != kinds] = np.inf
    nearest = distances.argmin(axis=1)
    return len(set(nearest.tolist())) == len(x) and bool((distances.min(axis=1) < tolerance).all())
