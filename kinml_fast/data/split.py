"""Which structures train, validate and test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kinml_fast.errors import DataError

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """Indices of structures, int64, each at most once. The order of `train` is that of an epoch without shuffling."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def __post_init__(self) -> None:
        for part in PARTS:
            object.__setattr__(self, part, np.ascontiguousarray(getattr(self, part), dtype=np.int64))
        everything = self.used
        if len(np.unique(everything)) < len(everything):
            raise DataError("the parts of a split overlap: each structure may be in one part only, and once")

    @property
    def used(self) -> np.ndarray:
        """All indices: training, validation, test."""
        return np.concatenate([self.train, self.validation, self.test])
