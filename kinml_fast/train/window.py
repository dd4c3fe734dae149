"""Structures as tensors: what steps read."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.data import stored
from kinml_fast.data.blocks import Piece
from kinml_fast.data.sources import DescriptorSource
from kinml_fast.data.stored import StoredDescriptors
from kinml_fast.data.structures import Structures
from kinml_fast.errors import DataError
from kinml_fast.nn import EnergyModel, Repulsion
from kinml_fast.train.config import TrainingConfig

_TENSORS = (
    "coordinates",
    "species",
    "offsets",
    "energies",
    "forces",
    "energy_weights",
    "force_weights",
    "origin",
    "cells",
    "periodic",
    "stresses",
    "stress_weights",
)


class Window:
    """M structures of a run with N atoms: all of them, or some that are in memory for a while.

    What depends on the level of theory has a leading dimension of K levels, also for K = 1.

    Parameters
    ----------
    piece
        The structures, their elements in the order of the model's.
    sae
        The model's single-atom energies, float64 [K, n_elements].
    repulsion
        The model's, or None.
    dtype
        The model's precision.
    config
        What the energies of a structure weigh, and whether there are stresses.
    source
        Where stored descriptors come from; None: they are computed.
    lasting
        Whether the window is the same in every epoch, so that it pays to keep descriptors for it.

    Attributes
    ----------
    coordinates : [N, 3], Å, of the model's dtype, as `Structures.coordinates_in` gives them; None where only stored
        descriptors are known
    species : [N] int64
    offsets : [M + 1] int64
    levels : int, K
    energies : [K, M] float64, eV, without single-atom energies and repulsion; NaN where a level is unknown
    forces : [K, N, 3] float64, eV/Å, without repulsion; NaN for structures without forces
    n_atoms : int, N
    cells, periodic : [M, 3, 3] float64, Å, and [M, 3] int64; None where the data set has no crystals
    stresses : [K, M, 3, 3] float64, eV/Å³; NaN for structures without a stress; None if they are not trained on
    energy_weights, force_weights : [K, M] float64, weights in L_E and L_F; 0 where nothing is known
    stress_weights : [K, M] float64, Å⁶, weights in L_S with (volume / number of atoms)², which makes virials of
        stresses: errors of an atom's virial in eV are of the size of errors of forces in eV/Å, and do not depend on the
        vacuum beside a layer. None with the stresses.
    origin : [M] int64, where each structure is in the data that were given
    known_energies, known_forces, known_stresses : numpy bool [K, M], which structures have them at each level
    labels : tuple of str, what each structure is called
    lasting : bool
    """

    def __init__(
        self,
        piece: Piece,
        sae: np.ndarray,
        repulsion: Repulsion | None,
        dtype: torch.dtype,
        config: TrainingConfig,
        source: DescriptorSource | None = None,
        lasting: bool = True,
    ) -> None:
        structures = piece.structures
        self.labels, self.lasting = structures.labels, lasting
        atoms = structures.sizes
        self.n_atoms = len(structures.species)
        self._structures, self._source = structures, source
        self.levels = structures.levels
        self.known_energies, self.known_forces = structures.known_energies, structures.known_forces
        self.known_stresses = structures.known_stresses
        assert structures.energies is not None
        targets = structures.energies.reshape(self.levels, -1) - (structures.counts() * sae[:, None]).sum(axis=-1)
        if structures.forces is None:
            forces = np.full((self.levels, self.n_atoms, 3), np.nan)
        else:
            forces = structures.forces.reshape(self.levels, -1, 3)
        if repulsion is not None:
            # Taken off once, so that steps neither compute it nor tell it from the energies of networks.
            if structures.coordinates is None:
                raise DataError(
                    f"{structures.labels[0]} has no coordinates, only stored descriptors, by which atoms do not repel "
                    "each other: leave out network.repulsion, or give data with coordinates"
                )
            system = _system(structures, structures.coordinates)
            found, slopes = repulsion.energies_and_forces(system)
            targets, forces = targets - found.numpy(), forces - slopes.numpy()
        weights = np.ones(len(piece)) if piece.weights is None else piece.weights
        factors = np.array(config.loss.level_weights or [1.0] * self.levels)[:, None]
        energy_weights = (weights / atoms**2 if config.loss.energy_per_atom else weights) * factors
        energy_weights = energy_weights * self.known_energies
        force_weights = weights * factors * self.known_forces
        tensor = torch.from_numpy
        self.coordinates = None
        if structures.coordinates is not None:
            self.coordinates = structures.coordinates_in(dtype)
        self.species, self.offsets = tensor(structures.species), tensor(structures.offsets)
        self.energies, self.forces, self.origin = tensor(targets), tensor(forces), tensor(piece.origin)
        self.energy_weights, self.force_weights = tensor(energy_weights), tensor(force_weights)
        self._first_atoms = structures.offsets
        self.cells = None if structures.cells is None else tensor(structures.cells)
        self.periodic = None if structures.periodic is None else tensor(structures.periodic)
        self.stresses, self.stress_weights = None, None
        if config.loss.stresses:
            shape = self.levels, len(piece), 3, 3
            stresses = np.full(shape, np.nan) if structures.stresses is None else structures.stresses.reshape(shape)
            if repulsion is not None and self.known_stresses.any():
                assert structures.coordinates is not None
                virials = repulsion.virials(_system(structures, structures.coordinates)).numpy()
                crystals = structures.are_crystals
                stresses = stresses.copy()
                stresses[:, crystals] -= virials[crystals] / structures.volumes[crystals, None, None]
            scales = np.where(self.known_stresses, (structures.volumes / atoms) ** 2, 0.0)
            self.stresses, self.stress_weights = tensor(stresses), tensor(weights * factors * scales)

    def pinned(self) -> Window:
        """The same in memory from which a GPU copies while others compute."""
        for name in _TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.pin_memory())
        return self

    def to(self, device: torch.device) -> Window:
        """The same, moved to a device; what only Python looks at stays."""
        for name in _TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device, non_blocking=True))
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def atoms(self, where: slice) -> slice:
        """Where the atoms of consecutive structures are."""
        return slice(int(self._first_atoms[where.start]), int(self._first_atoms[where.stop]))

    def known_components(self, where: slice) -> np.ndarray:
        """Which atoms of consecutive structures have forces at each level, bool [K, n_atoms]."""
        sizes = np.diff(self._first_atoms[where.start : where.stop + 1])
        return np.repeat(self.known_forces[:, where], sizes, axis=1)

    def descriptors(self, model: EnergyModel, jacobian: bool) -> StoredDescriptors:
        """Descriptors of all atoms, and their Jacobians, from where the configuration says, on the model's device."""
        if self._source is None:
            device = model.sae.device
            found = stored.compute(self._structures, model.descriptor, model.dtype, jacobian=jacobian, device=device)
        else:
            found = self._source.load(self._structures, model.descriptor, model.dtype, jacobian=jacobian)
        device, jacobians = model.sae.device, found.jacobian
        return StoredDescriptors(found.features.to(device), None if jacobians is None else jacobians.to(device))

    def gather(self, structures: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Coordinates, species, offsets, cells and periodicity of some structures as a ragged batch of their own."""
        sizes = self.offsets.diff()[structures]
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        shifts = torch.repeat_interleave(self.offsets[structures] - offsets[:-1], sizes)
        atoms = torch.arange(len(shifts), device=shifts.device) + shifts
        coordinates = None if self.coordinates is None else self.coordinates[atoms]
        cells, periodic = (None if x is None else x[structures] for x in (self.cells, self.periodic))
        return coordinates, self.species[atoms], offsets, cells, periodic

    def known_reference(self, where: slice, level: int) -> tuple[list[str], np.ndarray]:
        """Labels and energies, eV without single-atom energies, of those consecutive structures that have the level."""
        known = self.known_energies[level, where]
        labels = list(itertools.compress(self.labels[where], known))
        return labels, self.energies[level, where].cpu().numpy()[known]

    def known_force_reference(self, where: slice, level: int) -> tuple[np.ndarray, np.ndarray]:
        """The place of the structure and the value, eV/Å, of each force component that is known at the level."""
        counts = 3 * np.diff(self._first_atoms)[where] * self.known_forces[level, where]
        places = np.repeat(np.arange(where.start, where.stop), counts)
        known = self.known_components(where)[level]
        return places, self.forces[level, self.atoms(where)].cpu().numpy()[known].ravel()

    def known_stress_reference(self, where: slice, level: int) -> tuple[np.ndarray, np.ndarray]:
        """The place of the structure and the value, eV/Å³, of each stress component that is known at the level."""
        assert self.stresses is not None
        known = self.known_stresses[level, where]
        places = np.repeat(np.arange(where.start, where.stop)[known], 9)
        return places, self.stresses[level, where].cpu().numpy()[known].ravel()


def _system(structures: Structures, coordinates: np.ndarray) -> ops.System:
    """As the ops take them, in float64."""
    x, species, offsets = map(torch.from_numpy, (coordinates, structures.species, structures.offsets))
    cells, periodic = (
        None if part is None else torch.from_numpy(part) for part in (structures.cells, structures.periodic)
    )
    return ops.System(x, species, offsets, cells=cells, periodic=periodic)
