"""What is said about predictions: errors in kcal/mol, kcal/mol/Å or GPa."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kinml_fast.units import KCAL_PER_MOL


@dataclass(frozen=True)
class Errors:
    """Mean absolute, root mean square and largest absolute error, in kcal/mol, kcal/mol/Å or GPa."""

    mae: float
    rmse: float
    max: float

    @classmethod
    def of(cls, residuals: np.ndarray, unit: float = KCAL_PER_MOL) -> Errors:
        """The errors of residuals in eV (or eV/Å, eV/Å³), any shape but empty, times `unit`; NaN gives NaN."""
        sums = ErrorSums()
        sums.add(residuals)
        return sums.errors(unit)


@dataclass
class ErrorSums:
    """What the errors of residuals are computed from, added up piece by piece, eV (or eV/Å, eV/Å³).

    `count` residuals, their sum, the sums of their absolute values and squares, and the largest absolute value.
    """

    count: int = 0
    total: float = 0.0
    absolute: float = 0.0
    square: float = 0.0
    largest: float = 0.0

    def add(self, residuals: np.ndarray) -> None:
        """Count residuals of any shape; NaN makes everything NaN."""
        residuals = np.ascontiguousarray(residuals, dtype=np.float64).ravel()
        if not residuals.size:
            return
        absolute = np.abs(residuals)
        self.count += residuals.size
        self.total += float(residuals.sum())
        self._add(float(absolute.sum()), float(np.square(absolute).sum()), float(absolute.max()))

    def add_groups(self, sums: np.ndarray, count: int) -> None:
        """Count `count` residuals of which sums are known.

        `sums` [n, 3]: sum, sum of squares and largest of the absolute values of each of n groups.
        """
        self.count += count
        if len(sums):
            self._add(float(sums[:, 0].sum()), float(sums[:, 1].sum()), float(sums[:, 2].max()))

    def _add(self, absolute: float, square: float, largest: float) -> None:
        self.absolute += absolute
        self.square += square
        self.largest = float(np.maximum(self.largest, largest))  # NaN stays

    @property
    def is_finite(self) -> bool:
        """Whether no residual was infinite or NaN."""
        return math.isfinite(self.absolute) and math.isfinite(self.largest)

    def errors(self, unit: float = KCAL_PER_MOL) -> Errors:
        """The errors of all that was added, times `unit`: in kcal/mol (or kcal/mol/Å); GPa with `units.GIGAPASCAL`."""
        return Errors(
            mae=self.absolute / self.count * unit,
            rmse=float(np.sqrt(self.square / self.count)) * unit,
            max=self.largest * unit,
        )

    def numbers(self) -> list[float]:
        """All of it as numbers, for a checkpoint."""
        return [float(self.count), self.total, self.absolute, self.square, self.largest]

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> ErrorSums:
        """What `numbers` gave."""
        count, *others = numbers
        return cls(int(count), *others)
