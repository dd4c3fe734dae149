"""The structures of a run, divided and as tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kinml_fast.data import stored
from kinml_fast.data.files import first_few
from kinml_fast.data.sources import DescriptorSource
from kinml_fast.data.splits import PARTS, Split
from kinml_fast.data.stored import StoredDescriptors
from kinml_fast.data.structures import Structures
from kinml_fast.errors import InputError
from kinml_fast.nn import EnergyModel
from kinml_fast.train.config import TrainingConfig


class Data(Protocol):
    """What a trainer needs of a data set: `TrainingData`, or a prepared data set."""

    structures: Structures
    split: Split
    sae: np.ndarray | None
    weights: np.ndarray | None
    source: DescriptorSource


@dataclass(frozen=True)
class TrainingData:
    """Structures and their division.

    Parameters
    ----------
    structures
        With energies, and with forces if they are trained on.
    split
        Indices of the structures for training, validation and test. Training without reshuffling keeps their order.
    sae
        Single-atom energies, float64 [n_elements] in the order of `structures.elements`, eV, which the model is given;
        None: those that the model has.
    weights
        Weights of the structures in the loss, float64 [n_structures]; None: all 1.
    source
        Where stored descriptors come from (training.jacobian: stored).
    """

    structures: Structures
    split: Split
    sae: np.ndarray | None = None
    weights: np.ndarray | None = None
    source: DescriptorSource = field(default_factory=DescriptorSource)


class Dataset:
    """The M structures of a run with N atoms, part after part, as tensors on the model's device.

    Only what is used is kept, in the order of the split: a pass in that order goes through memory in order.

    Parameters
    ----------
    model
        Its elements, precision, device and single-atom energies; it is given those of the data, if they have any.
    data
        Structures, split, single-atom energies, weights, source of descriptors.
    config
        Says whether forces are needed, whether descriptors are stored ones, and what the energies of a structure weigh.

    Attributes
    ----------
    coordinates : [N, 3], Å, of the model's dtype; None where only stored descriptors are known
    species : [N] int64
    offsets : [M + 1] int64
    energies : [M] float64, eV, without single-atom energies
    forces : [N, 3] float64, eV/Å; NaN for structures without forces
    n_atoms : int, N
    energy_weights, force_weights : [M] float64, weights in L_E and L_F; the latter 0 without forces
    origin : [M] int64, where each structure is in the data that were given
    known : numpy bool [M], which structures have forces
    sizes : dict, number of structures of each part
    labels : tuple of str, what each structure is called
    fingerprint : str, by which a checkpoint knows its data

    Raises
    ------
    InputError
        Elements that the model does not have, an empty training or validation set, no energies, no forces where they
        are asked for, weights that are none, no coordinates where nothing is stored.
    """

    def __init__(self, model: EnergyModel, data: Data, config: TrainingConfig) -> None:
        split = {name: np.asarray(getattr(data.split, name), dtype=np.int64) for name in PARTS}
        for name in ("train", "validation"):
            if split[name].size == 0:
                raise InputError(f"the {name} set is empty: give it at least one structure")
        self.sizes = {name: len(indices) for name, indices in split.items()}
        origin = np.concatenate(list(split.values()))
        structures = data.structures.with_elements(model.elements).select(origin)
        if structures.energies is None:
            raise InputError("the structures have no energies: training needs them")
        if structures.coordinates is None and config.jacobian == "recompute":
            raise InputError(
                f"{structures.labels[0]} has no coordinates, only stored descriptors: set training.jacobian=stored"
            )
        self.labels = structures.labels
        atoms = structures.sizes
        self.n_atoms = len(structures.species)
        self._structures, self._source = structures, data.source if config.jacobian == "stored" else None

        if data.sae is not None:
            given = dict(zip(data.structures.elements, data.sae, strict=True))
            values = torch.tensor([given.get(element, 0.0) for element in model.elements], dtype=torch.float64)
            model.sae.copy_(values)
        targets = structures.energies - (structures.counts() * model.sae.cpu().numpy()).sum(axis=1)
        if structures.forces is None:
            forces, self.known = np.full((self.n_atoms, 3), np.nan), np.zeros(len(structures), dtype=bool)
        else:
            forces, self.known = structures.forces, ~np.isnan(structures.forces[structures.offsets[:-1], 0])
        self._check_forces(config)
        weights = self._weights(data)[origin]

        def tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
            return torch.from_numpy(array).to(model.sae.device, dtype)

        self.coordinates = None if structures.coordinates is None else tensor(structures.coordinates, model.dtype)
        self.species, self.offsets = tensor(structures.species), tensor(structures.offsets)
        self.energies, self.forces, self.origin = tensor(targets), tensor(forces), tensor(origin)
        self.energy_weights = tensor(weights / atoms**2 if config.loss.energy_per_atom else weights)
        self.force_weights = tensor(weights * self.known)
        self._atoms_known = np.repeat(self.known, atoms)
        self._first_atoms = structures.offsets
        counted = (weights * self.known)[self.range("train")] != 0
        self.trained_components = 3 * int(atoms[self.range("train")][counted].sum())

        digest = hashlib.sha256(" ".join(structures.elements).encode())
        for array in (structures.species, structures.coordinates, structures.offsets, targets, forces, weights):
            digest.update(b"" if array is None else array.tobytes())
        digest.update(repr(self.sizes).encode())
        if self._source is not None:
            digest.update(repr((self._source.backend, [own for _, own in self._source.files])).encode())
        self.fingerprint = digest.hexdigest()

    def range(self, part: str) -> slice:
        """Where the structures of a part are."""
        first = sum(self.sizes[name] for name in PARTS[: PARTS.index(part)])
        return slice(first, first + self.sizes[part])

    def atoms(self, part: str) -> tuple[slice, np.ndarray]:
        """Where the atoms of a part are, and which of them have forces (bool)."""
        where = self.range(part)
        atoms = slice(int(self._first_atoms[where.start]), int(self._first_atoms[where.stop]))
        return atoms, self._atoms_known[atoms]

    def descriptors(self, model: EnergyModel, jacobian: bool) -> StoredDescriptors:
        """Descriptors of all atoms, and their Jacobians, from where the configuration says, on the model's device."""
        if self._source is None:
            found = stored.compute(self._structures, model.descriptor, model.dtype, jacobian=jacobian)
        else:
            found = self._source.load(self._structures, model.descriptor, model.dtype, jacobian=jacobian)
        tensors = (found.features, found.jacobian)
        return StoredDescriptors(*(None if x is None else x.to(model.sae.device) for x in tensors))

    def gather(self, structures: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Coordinates, species and offsets of some structures as a ragged batch of their own."""
        sizes = self.offsets.diff()[structures]
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        shifts = torch.repeat_interleave(self.offsets[structures] - offsets[:-1], sizes)
        atoms = torch.arange(len(shifts), device=shifts.device) + shifts
        return None if self.coordinates is None else self.coordinates[atoms], self.species[atoms], offsets

    def component_labels(self, part: str) -> list[str]:
        """The structure's label for each force component of a part that is known."""
        where = self.range(part)
        counts = 3 * np.diff(self._first_atoms)[where] * self.known[where]
        return [label for label, count in zip(self.labels[where], counts.tolist(), strict=True) for _ in range(count)]

    def _weights(self, data: Data) -> np.ndarray:
        count = len(data.structures)
        if data.weights is None:
            return np.ones(count)
        weights = np.asarray(data.weights, dtype=np.float64)
        if weights.shape != (count,) or not (np.isfinite(weights) & (weights >= 0)).all():
            raise InputError(f"the weights must be {count} numbers that are not negative, one for each structure")
        if not weights[np.asarray(data.split.train, dtype=np.int64)].any():
            raise InputError("the weights of all training structures are 0: give some of them a weight")
        return weights

    def _check_forces(self, config: TrainingConfig) -> None:
        if not config.loss.forces:
            return
        files = first_few(list(dict.fromkeys(label.rsplit("/", 1)[0] for label in self.labels)))
        if not self.known[self.range("train")].any():
            raise InputError(
                f"training.loss.forces is true, but no training structure has forces (data: {files}): take data with "
                "forces, name their key in XYZ files by data.forces_key, or set training.loss.forces=false"
            )
        if config.score.forces and not self.known[self.range("validation")].any():
            raise InputError(
                f"training.score.forces is {config.score.forces:g}, but no validation structure has forces (data: "
                f"{files}): put some into the validation set, or set training.score.forces=0"
            )
