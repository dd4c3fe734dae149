"""What is said about predictions: errors in kcal/mol (or kcal/mol/Å) and the coefficient of determination."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kinml_fast.units import KCAL_PER_MOL


@dataclass(frozen=True)
class Errors:
    """Mean absolute, root mean square and largest absolute error, in kcal/mol (or kcal/mol/Å)."""

    mae: float
    rmse: float
    max: float

    @classmethod
    def of(cls, residuals: np.ndarray) -> Errors:
        """The errors of residuals in eV (or eV/Å), any shape but empty; NaN gives NaN."""
        absolute = np.abs(np.ascontiguousarray(residuals, dtype=np.float64).ravel())
        return cls(
            mae=float(absolute.mean()) * KCAL_PER_MOL,
            rmse=float(np.sqrt(np.square(absolute).mean())) * KCAL_PER_MOL,
            max=float(absolute.max()) * KCAL_PER_MOL,
        )

    @classmethod
    def of_sums(cls, sums: np.ndarray, count: int) -> Errors:
        """The errors of `count` residuals of which sums are known.

        `sums` [n, 3]: sum, sum of squares and largest of the absolute values of each of n groups, eV (or eV/Å).
        """
        return cls(
            mae=float(sums[:, 0].sum() / count) * KCAL_PER_MOL,
            rmse=float(np.sqrt(sums[:, 1].sum() / count)) * KCAL_PER_MOL,
            max=float(sums[:, 2].max()) * KCAL_PER_MOL,
        )


def r_squared(reference: np.ndarray, predicted: np.ndarray) -> float:
    """Coefficient of determination, 1 − Σ(y − f)²/Σ(y − ȳ)²; NaN for fewer than two different references."""
    reference, predicted = np.asarray(reference, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    spread = np.square(reference - reference.mean()).sum() if reference.size else 0.0
    return float(1 - np.square(reference - predicted).sum() / spread) if spread > 0 else float("nan")
