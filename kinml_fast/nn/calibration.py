"""What turns the standard deviations of an ensemble's members into deviations that can be believed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kinml_fast.errors import ConfigError


@dataclass(frozen=True)
class Calibration:
    """Factors of the members' standard deviations, found on data that no member was trained on.

    An error is within a standard deviation (ddof = 1) times its factor with a probability of 68.27 %; see
    `kinml_fast.deploy.calibrate` for how they are found.

    Attributes
    ----------
    energies
        [K], of the energies of structures at each of K levels of theory.
    forces
        [K, S], of the components of forces on the atoms of each of S elements.
    """

    energies: tuple[float, ...]
    forces: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        wrong = [x for x in (*self.energies, *(x for of in self.forces for x in of)) if not 0 < x < math.inf]
        if wrong or len(self.forces) != len(self.energies):
            raise ConfigError(f"The factors of deviations are positive numbers of each level, not {wrong or self}.")

    def checked(self, levels: int, elements: Sequence[str]) -> Calibration:
        """The same, if it is of so many levels and of these elements."""
        if len(self.energies) != levels or any(len(of) != len(elements) for of in self.forces):
            raise ConfigError(
                f"The factors of deviations are of {len(self.energies)} levels and {len(self.forces[0])} elements, the "
                f"model of {levels} and {len(elements)}."
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return {"energies": list(self.energies), "forces": [list(of) for of in self.forces]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """What :meth:`to_dict` gave."""
        return cls(tuple(values["energies"]), tuple(tuple(of) for of in values["forces"]))
