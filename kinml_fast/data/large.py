"""Training data that are read from disk while they are needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kinml_fast.data.blocks import BlockFile


@dataclass(frozen=True, eq=False)
class LargeData:
    """Structures in a file of blocks, divided and ready to train on: `TrainingData` that may be larger than memory.

    Parameters
    ----------
    file
        The structures of each part.
    sae
        As in `TrainingData`.
    """

    file: BlockFile
    sae: np.ndarray | None = None

    @property
    def elements(self) -> tuple[str, ...]:
        """In the order of `sae`."""
        return self.file.elements
