"""The structures of a run as tensors: the last stage of data, behind `data.TrainingData`."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kinml_fast.data import stored
from kinml_fast.data.files import first_few
from kinml_fast.data.split import PARTS
from kinml_fast.data.stored import StoredDescriptors
from kinml_fast.data.training_data import TrainingData
from kinml_fast.errors import ConfigError, DataError
from kinml_fast.nn import EnergyModel
from kinml_fast.train.config import TrainingConfig


class Dataset:
    """The M structures of a run with N atoms, part after part, as tensors on the model's device: what steps read.

    Only what is used is kept, in the order of the split: a pass in that order goes through memory in order. What
    depends on the level of theory has a leading dimension of K levels, also for K = 1.

    Parameters
    ----------
    model
        Its elements, precision, device and single-atom energies; it is given those of the data, if they have any.
    data
        Structures, split, single-atom energies, weights, source of descriptors.
    config
        Says whether forces are needed, whether descriptors are stored ones, what the energies of a structure weigh, and
        the order of epochs.

    Attributes
    ----------
    coordinates : [N, 3], Å, of the model's dtype; None where only stored descriptors are known
    species : [N] int64
    offsets : [M + 1] int64
    levels : int, K
    energies : [K, M] float64, eV, without single-atom energies; NaN where a level is unknown
    forces : [K, N, 3] float64, eV/Å; NaN for structures without forces
    n_atoms : int, N
    energy_weights, force_weights : [K, M] float64, weights in L_E and L_F; 0 where nothing is known
    origin : [M] int64, where each structure is in the data that were given
    known_energies, known_forces : numpy bool [K, M], which structures have energies and forces at each level
    sizes : dict, number of structures of each part
    labels : tuple of str, what each structure is called
    fingerprint : str, by which a checkpoint knows its data
    trained_components : list of int [K], force components of the training set that have a weight

    Raises
    ------
    InputError
        Elements or levels that the model does not have, an empty training or validation set, no energies, no forces
        where they are asked for, weights that are none, no coordinates where nothing is stored.
    """

    def __init__(self, model: EnergyModel, data: TrainingData, config: TrainingConfig) -> None:
        split = {name: np.asarray(getattr(data.split, name), dtype=np.int64) for name in PARTS}
        for name in ("train", "validation"):
            if split[name].size == 0:
                raise DataError(f"the {name} set is empty: give it at least one structure")
        self.sizes = {name: len(indices) for name, indices in split.items()}
        origin = np.concatenate(list(split.values()))
        structures = data.structures.with_elements(model.elements).select(origin)
        if structures.energies is None:
            raise DataError("the structures have no energies: training needs them")
        if structures.coordinates is None and config.jacobian == "recompute":
            raise DataError(
                f"{structures.labels[0]} has no coordinates, only stored descriptors: set training.jacobian=stored"
            )
        self.labels = structures.labels
        atoms = structures.sizes
        self.n_atoms = len(structures.species)
        self._structures, self._source = structures, data.source if config.jacobian == "stored" else None

        self.levels, self._fidelities = structures.levels, model.fidelities
        if self.levels != len(model.fidelities):
            raise DataError(
                f"the data have {_counted(self.levels)} of theory and the model is for "
                f"{_counted(len(model.fidelities))}: make a model with as many fidelities"
            )
        self.known_energies, self.known_forces = structures.known_energies, structures.known_forces
        if data.sae is not None:
            model.sae.copy_(_of_elements(data.sae, data.structures.elements, model.elements))
        sae = model.sae.view(self.levels, 1, -1).cpu().numpy()
        targets = structures.energies.reshape(self.levels, -1) - (structures.counts() * sae).sum(axis=-1)
        if structures.forces is None:
            forces = np.full((self.levels, self.n_atoms, 3), np.nan)
        else:
            forces = structures.forces.reshape(self.levels, -1, 3)
        self._check_levels(config)
        self._check_forces(config)
        weights = _weights(data)[origin]
        factors = np.array(config.loss.level_weights or [1.0] * self.levels)[:, None]
        energy_weights = (weights / atoms**2 if config.loss.energy_per_atom else weights) * factors
        energy_weights = energy_weights * self.known_energies
        force_weights = weights * factors * self.known_forces

        def tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
            return torch.from_numpy(array).to(model.sae.device, dtype)

        self.coordinates = None if structures.coordinates is None else tensor(structures.coordinates, model.dtype)
        self.species, self.offsets = tensor(structures.species), tensor(structures.offsets)
        self.energies, self.forces, self.origin = tensor(targets), tensor(forces), tensor(origin)
        self.energy_weights, self.force_weights = tensor(energy_weights), tensor(force_weights)
        self._order_seed = config.seed if config.shuffle else None
        self._atoms_known = np.repeat(self.known_forces, atoms, axis=1)
        self._first_atoms = structures.offsets
        train = self.range("train")
        self.trained_components = [3 * int(atoms[train][row != 0].sum()) for row in force_weights[:, train]]

        digest = hashlib.sha256(" ".join(structures.elements).encode())
        for array in (structures.species, structures.coordinates, structures.offsets, targets, forces, weights):
            digest.update(b"" if array is None else array.tobytes())
        digest.update(repr(self.sizes).encode())
        if self._source is not None:
            of_files = [file_digest for _, file_digest in self._source.files]
            digest.update(repr((self._source.backend, of_files)).encode())
        self.fingerprint = digest.hexdigest()

    def range(self, part: str) -> slice:
        """Where the structures of a part are."""
        first = sum(self.sizes[name] for name in PARTS[: PARTS.index(part)])
        return slice(first, first + self.sizes[part])

    def atoms(self, part: str) -> tuple[slice, np.ndarray]:
        """Where the atoms of a part are, and which of them have forces at each level (bool [K, n_atoms])."""
        where = self.range(part)
        atoms = slice(int(self._first_atoms[where.start]), int(self._first_atoms[where.stop]))
        return atoms, self._atoms_known[:, atoms]

    def order(self, epoch: int) -> Tensor:
        """The training structures in the order of an epoch, int64, which depends on the seed and the epoch only."""
        order = np.arange(self.sizes["train"])
        if self._order_seed is not None:
            order = np.random.default_rng([self._order_seed, epoch]).permutation(self.sizes["train"])
        return torch.from_numpy(order).to(self.origin.device)

    def numbers(self, with_forces: bool) -> list[str]:
        """How many structures each part has, and how many of them have energies of several levels, or forces."""
        sentences = [f"structures: {', '.join(f'{size} {part}' for part, size in self.sizes.items())}"]
        several = self.levels > 1
        for fidelity, energies, forces in zip(self._fidelities, self.known_energies, self.known_forces, strict=True):
            if several:
                sentences.append(f"energies of fidelity {fidelity}: {self._shares(energies)}")
            if with_forces:
                sentences.append(f"forces{f' of fidelity {fidelity}' if several else ''}: {self._shares(forces)}")
        if not with_forces and self.known_forces.any():
            sentences.append("the data have forces, which training.loss.forces=true would train on")
        return sentences

    def _shares(self, known: np.ndarray) -> str:
        """How many of the structures of each part are among those that are known, in words."""
        found = {part: int(known[self.range(part)].sum()) for part in PARTS}
        return ", ".join(f"{found[part]} of {self.sizes[part]} {part}" for part in PARTS)

    def descriptors(self, model: EnergyModel, jacobian: bool) -> StoredDescriptors:
        """Descriptors of all atoms, and their Jacobians, from where the configuration says, on the model's device."""
        if self._source is None:
            device = model.sae.device
            found = stored.compute(self._structures, model.descriptor, model.dtype, jacobian=jacobian, device=device)
        else:
            found = self._source.load(self._structures, model.descriptor, model.dtype, jacobian=jacobian)
        device, jacobians = model.sae.device, found.jacobian
        return StoredDescriptors(found.features.to(device), None if jacobians is None else jacobians.to(device))

    def gather(self, structures: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Coordinates, species and offsets of some structures as a ragged batch of their own."""
        sizes = self.offsets.diff()[structures]
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        shifts = torch.repeat_interleave(self.offsets[structures] - offsets[:-1], sizes)
        atoms = torch.arange(len(shifts), device=shifts.device) + shifts
        return None if self.coordinates is None else self.coordinates[atoms], self.species[atoms], offsets

    def known_reference(self, part: str, level: int) -> tuple[list[str], np.ndarray]:
        """Labels and energies, eV without single-atom energies, of the structures of a part that have the level."""
        where = self.range(part)
        known = self.known_energies[level, where]
        labels = list(itertools.compress(self.labels[where], known))
        return labels, self.energies[level, where].cpu().numpy()[known]

    def known_force_reference(self, part: str, level: int) -> tuple[list[str], np.ndarray]:
        """The structure's label and the value, eV/Å, of each force component of a part that is known at the level."""
        where = self.range(part)
        counts = 3 * np.diff(self._first_atoms)[where] * self.known_forces[level, where]
        labels = [label for label, count in zip(self.labels[where], counts.tolist(), strict=True) for _ in range(count)]
        atoms, known = self.atoms(part)
        return labels, self.forces[level, atoms].cpu().numpy()[known[level]].ravel()

    def _check_levels(self, config: TrainingConfig) -> None:
        for name, factors in (("loss", config.loss.level_weights), ("score", config.score.level_weights)):
            if factors is not None and len(factors) != self.levels:
                raise ConfigError(
                    f"training.{name}.level_weights has {len(factors)} entries, but there are {_counted(self.levels)} "
                    "of theory: give a factor for each, lowest first"
                )
        for level, fidelity in enumerate(self._fidelities):
            needed = {"train": config.loss.level_weights, "validation": config.score.level_factors(self.levels)}
            for part, factors in needed.items():
                if (factors is None or factors[level]) and not self.known_energies[level, self.range(part)].any():
                    raise DataError(
                        f"no {part} structure has energies of fidelity {fidelity}: put some into that part, or set "
                        f"the level's factor to 0 (training.{'loss' if part == 'train' else 'score'}.level_weights)"
                    )

    def _check_forces(self, config: TrainingConfig) -> None:
        if not config.loss.forces:
            return
        files = first_few(list(dict.fromkeys(label.rsplit("/", 1)[0] for label in self.labels)))
        if not self.known_forces[:, self.range("train")].any():
            raise DataError(
                f"training.loss.forces is true, but no training structure has forces (data: {files}): take data with "
                "forces, name their key in XYZ files by data.forces_key, or set training.loss.forces=false"
            )
        judged = np.array(config.score.level_factors(self.levels)) > 0
        known = self.known_forces[:, self.range("validation")].any(axis=1)
        if config.score.forces and (judged & ~known).any():
            level = int(np.argmax(judged & ~known))
            of_level = f" of fidelity {self._fidelities[level]}" if self.levels > 1 else ""
            raise DataError(
                f"training.score.forces is {config.score.forces:g}, but no validation structure has forces{of_level} "
                f"(data: {files}): put some into the validation set, or set training.score.forces=0"
            )


def _weights(data: TrainingData) -> np.ndarray:
    """What each structure counts in the loss, [n_structures]."""
    count = len(data.structures)
    if data.weights is None:
        return np.ones(count)
    weights = np.asarray(data.weights, dtype=np.float64)
    if weights.shape != (count,) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise DataError(f"the weights must be {count} numbers that are not negative, one for each structure")
    if not weights[np.asarray(data.split.train, dtype=np.int64)].any():
        raise DataError("the weights of all training structures are 0: give some of them a weight")
    return weights


def _of_elements(sae: np.ndarray, given: Sequence[str], elements: Sequence[str]) -> Tensor:
    """Single-atom energies [..., n] in another order of elements; 0 for those that are not given."""
    values = torch.from_numpy(np.ascontiguousarray(sae, dtype=np.float64))
    result = torch.zeros(*values.shape[:-1], len(elements), dtype=torch.float64)
    for place, element in enumerate(elements):
        if element in given:
            result[..., place] = values[..., list(given).index(element)]
    return result


def _counted(levels: int) -> str:
    return "one level" if levels == 1 else f"{levels} levels"
