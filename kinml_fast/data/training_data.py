"""Structures that are divided and ready to train on, whether they come from files or from a program."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kinml_fast.data.sources import DescriptorSource
from kinml_fast.data.split import Split
from kinml_fast.data.structures import Structures


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a trainer takes: structures and their division.

    The stage between `Structures`, which are read, and `train.dataset.Dataset`, the tensors of a run. `Prepared` is the
    same of files, with what it takes to recognise them.

    Parameters
    ----------
    structures
        With energies, and with forces if they are trained on; of one level of theory or of several, like the model.
    split
        Indices of the structures for training, validation and test. Training without reshuffling keeps their order.
    sae
        Single-atom energies, float64 [n_elements] in the order of `structures.elements`, eV, which the model is given;
        of K > 1 levels [K, n_elements]. None: those that the model has.
    weights
        Weights of the structures in the loss, float64 [n_structures]; None: all 1.
    source
        Where stored descriptors come from (training.jacobian: stored). They stay in their files: only what is used of
        them is read, when it is.
    """

    structures: Structures
    split: Split
    sae: np.ndarray | None = None
    weights: np.ndarray | None = None
    source: DescriptorSource = field(default_factory=DescriptorSource)

    @property
    def elements(self) -> tuple[str, ...]:
        """In the order of `sae`."""
        return self.structures.elements
