"""A geometry that may be labelled, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from scipy.spatial.distance import pdist

from kinml_fast.kinetics.vibrations import fragments

_TOO_CLOSE = 0.5
"""Times the sum of covalent radii: nearer to each other two atoms are in no molecule that is worth a calculation."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """A geometry of n atoms.

    Attributes
    ----------
    symbols
        Of the atoms.
    positions
        [n, 3], Å.
    source
        How it was made: start, displaced, dynamics, modes, saddle.
    molecule
        The number of the geometry that it descends from, among those of the user.
    temperature
        K; 0 of none.
    step
        Of the trajectory, or the number of the sample.
    item
        What of the round it comes from.
    deviations
        Of the ensemble that it was found with, at the lowest level and of what each further level adds to that below,
        in the unit of selection.deviation; none without an ensemble.
    """

    symbols: tuple[str, ...]
    positions: np.ndarray
    source: str
    molecule: int = 0
    temperature: float = 0.0
    step: int = 0
    item: int = 0
    deviations: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "symbols", tuple(self.symbols))
        object.__setattr__(self, "deviations", tuple(self.deviations))
        object.__setattr__(self, "positions", np.asarray(self.positions, dtype=np.float64).reshape(-1, 3))

    @property
    def atoms(self) -> Atoms:
        """As ASE's."""
        return Atoms(self.symbols, self.positions)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "positions": self.positions.tolist()}


def broken(atoms: Atoms, pieces: int) -> bool:
    """Whether a molecule that shall be of so many pieces has fallen apart, or two of its atoms are too close."""
    radii = covalent_radii[atoms.numbers]
    pairs = np.triu_indices(len(atoms), 1)
    if (pdist(atoms.positions) < _TOO_CLOSE * (radii[pairs[0]] + radii[pairs[1]])).any():
        return True
    return fragments(atoms) > pieces
