"""Structures: molecules and crystals of any size in flat arrays, checked once when they are made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from kinml_fast.errors import DataError

CLOSEST_ALLOWED = 0.1
"""Two atoms nearer to each other than this (Å) are a mistake in the data, not chemistry."""

_SYMBOLS = frozenset(chemical_symbols[1:])

_ALIKE = 1e-3
"""By how much of its largest component a stress may differ from its transpose: codes print rounded numbers."""


@dataclass(frozen=True, eq=False)
class Structures:
    """Molecules and crystals, one after another.

    Parameters
    ----------
    elements
        Chemical symbols; `species` counts in this order.
    species
        int64 [n_atoms], index into `elements`.
    coordinates
        float64 [n_atoms, 3], Å; None where only stored descriptors are known (some of PyKinML's HDF5 files).
    offsets
        int64 [n_structures + 1]; structure i owns the atoms offsets[i] to offsets[i + 1].
    energies
        float64 [n_structures], eV; None for geometries without energies (input of a prediction). Of K > 1 levels of
        theory, lowest first: float64 [K, n_structures], NaN where a structure lacks a level; each has at least one.
    forces
        float64 [n_atoms, 3], eV/Å; the rows of a structure without forces are NaN; None if no structure has any. Of
        K > 1 levels: float64 [K, n_atoms, 3], NaN in all rows of a structure at a level where it has none; it has none
        where it has no energy.
    labels
        What each structure is called in messages and split files: "C5H5/17", "file.xyz/3".
    cells
        float64 [n_structures, 3, 3], rows are lattice vectors in Å, right-handed; those of molecules are not read.
        None: all structures are molecules. Atoms may be anywhere, in the cell or not.
    periodic
        int64 [n_structures, 3], 1 along the vectors that a structure repeats along, 0 0 0 for a molecule; None without
        cells.
    stresses
        float64 [n_structures, 3, 3], eV/Å³, symmetric, in ASE's sign: the derivative of the energy by a strain, divided
        by the volume of the cell. NaN for molecules and for crystals without a stress; None if no structure has one.
        Of K > 1 levels: [K, n_structures, 3, 3], NaN where a structure has no energy.

    Raises
    ------
    InputError
        Shapes that do not fit together, an unknown element, an empty structure, NaN or infinite numbers where there
        must be none, two atoms (or their images) closer than 0.1 Å, a cell without volume or left-handed, the stress of
        a molecule. The message names the first structure concerned.
    """

    elements: tuple[str, ...]
    species: np.ndarray
    coordinates: np.ndarray | None
    offsets: np.ndarray
    energies: np.ndarray | None
    forces: np.ndarray | None
    labels: tuple[str, ...]
    cells: np.ndarray | None = None
    periodic: np.ndarray | None = None
    stresses: np.ndarray | None = None

    def __post_init__(self) -> None:
        self._conform()
        if self.cells is not None and self.periodic is not None:
            self._check_cells(self.cells, self.periodic)
        if self.coordinates is not None:
            self._check_distances(self.coordinates)

    def _conform(self) -> None:
        def array(name: str, dtype: type) -> None:
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else np.ascontiguousarray(value, dtype=dtype))

        object.__setattr__(self, "elements", tuple(self.elements))
        object.__setattr__(self, "labels", tuple(self.labels))
        for name in ("species", "offsets", "periodic"):
            array(name, np.int64)
        for name in ("coordinates", "energies", "forces", "cells", "stresses"):
            array(name, np.float64)
        self._check_shapes()
        self._check_numbers()

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of_one_formula(
        cls,
        symbols: Sequence[str],
        coordinates: np.ndarray,
        energies: np.ndarray | None,
        forces: np.ndarray | None = None,
        labels: Iterable[str] | None = None,
        elements: Sequence[str] | None = None,
    ) -> Structures:
        """Structures that all have the same atoms in the same order.

        Parameters
        ----------
        symbols
            Chemical symbols of the n atoms.
        coordinates
            [n_structures, n, 3], Å.
        energies
            [n_structures] or, of several levels, [K, n_structures], eV, or None.
        forces
            [n_structures, n, 3] or [K, n_structures, n, 3], eV/Å, or None.
        labels
            Default: formula in atom order and 1-based number, "C5H5/17".
        elements
            Default: those of `symbols`, alphabetically.
        """
        coordinates = np.asarray(coordinates, dtype=np.float64)
        if coordinates.ndim != 3 or coordinates.shape[1:] != (len(symbols), 3):
            raise DataError(f"coordinates of shape {coordinates.shape} given, expected [n, {len(symbols)}, 3]")
        count, n_atoms = coordinates.shape[:2]
        elements = element_order(symbols, elements, "these structures")
        species = np.array([elements.index(symbol) for symbol in symbols], dtype=np.int64)
        if forces is not None:
            forces = np.asarray(forces, dtype=np.float64)
            if forces.ndim not in (3, 4) or forces.shape[-3:] != coordinates.shape:
                raise DataError(f"forces of shape {forces.shape} given for coordinates of {coordinates.shape}")
            forces = forces.reshape(*forces.shape[:-3], -1, 3)
        if labels is None:
            stem = formula_in_order(symbols)
            labels = [f"{stem}/{i}" for i in range(1, count + 1)]
        return cls(
            elements=elements,
            species=np.tile(species, count),
            coordinates=coordinates.reshape(-1, 3),
            offsets=np.arange(count + 1, dtype=np.int64) * n_atoms,
            energies=energies,
            forces=forces,
            labels=tuple(labels),
        )

    def changed(self, **fields: object) -> Structures:
        """Other values of fields, checked, for geometries that are checked already: `replace` without the distances."""
        other = object.__new__(Structures)
        for name in Structures.__dataclass_fields__:
            object.__setattr__(other, name, fields.get(name, getattr(self, name)))
        other._conform()
        return other

    @classmethod
    def trusted(cls, **fields: object) -> Structures:
        """Structures of arrays that were in others, contiguous and of the right types: nothing is looked at."""
        structures = object.__new__(cls)
        for name in cls.__dataclass_fields__:
            object.__setattr__(structures, name, fields[name])
        return structures

    @property
    def levels(self) -> int:
        """Number of levels of theory, K; 1 too where there are no energies."""
        values = (self.energies, 1), (self.forces, 2), (self.stresses, 3)
        several = [len(x) for x, ndim in values if x is not None and x.ndim > ndim]
        return several[0] if several else 1

    def coordinates_in(self, dtype: torch.dtype) -> Tensor:
        """Coordinates [n_atoms, 3] of this type, in float32 from the first atom of each structure.

        Far from the origin float32 has too few digits for differences of coordinates: 6e-5 Å at 1000 Å.
        """
        coordinates = self.coordinates
        assert coordinates is not None
        if dtype == torch.float32:  # by numpy: a thread that reads ahead must not wake those of torch
            origins = np.repeat(coordinates[self.offsets[:-1]], self.sizes, axis=0)
            coordinates = (coordinates - origins).astype(np.float32)
        return torch.from_numpy(coordinates)

    @property
    def known_energies(self) -> np.ndarray:
        """Which structures have an energy at each level, bool [K, n_structures], for one level too."""
        if self.energies is None:
            return np.zeros((self.levels, len(self)), dtype=bool)
        return ~np.isnan(self.energies.reshape(self.levels, len(self)))

    @property
    def known_forces(self) -> np.ndarray:
        """Which structures have forces at each level, bool [K, n_structures], for one level too."""
        if self.forces is None:
            return np.zeros((self.levels, len(self)), dtype=bool)
        return ~np.isnan(self.forces.reshape(self.levels, -1, 3)[:, self.offsets[:-1], 0])

    @property
    def known_stresses(self) -> np.ndarray:
        """Which structures have a stress at each level, bool [K, n_structures], for one level too."""
        if self.stresses is None:
            return np.zeros((self.levels, len(self)), dtype=bool)
        return ~np.isnan(self.stresses.reshape(self.levels, len(self), 9)[..., 0])

    @property
    def are_crystals(self) -> np.ndarray:
        """Which structures are periodic along some vector, bool [n_structures]."""
        if self.periodic is None:
            return np.zeros(len(self), dtype=bool)
        return np.asarray(self.periodic.any(axis=1))

    @property
    def volumes(self) -> np.ndarray:
        """Volumes of the cells, float64 [n_structures], Å³; NaN for molecules."""
        if self.cells is None:
            return np.full(len(self), np.nan)
        return np.where(self.are_crystals, np.abs(np.linalg.det(self.cells)), np.nan)

    @property
    def sizes(self) -> np.ndarray:
        """Atoms per structure, int64 [n_structures]."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """The structure that each atom belongs to, int64 [n_atoms]."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.sizes)

    def symbols(self, structure: int) -> tuple[str, ...]:
        """Chemical symbols of one structure in atom order."""
        return tuple(self.elements[s] for s in self.species[self.offsets[structure] : self.offsets[structure + 1]])

    def counts(self) -> np.ndarray:
        """Atoms of each element, int64 [n_structures, n_elements]."""
        n_elements = len(self.elements)
        flat = np.bincount(self.owners * n_elements + self.species, minlength=len(self) * n_elements)
        return flat.astype(np.int64).reshape(len(self), n_elements)

    def formulas(self) -> list[str]:
        """Hill formula of each structure (C, H, then alphabetical; without C all alphabetical)."""
        rows, inverse = np.unique(self.counts(), axis=0, return_inverse=True)
        names = [_hill(dict(zip(self.elements, row.tolist(), strict=True))) for row in rows]
        return [names[i] for i in inverse.ravel()]

    def select(self, indices: np.ndarray | Sequence[int]) -> Structures:
        """The structures `indices` (int [n], any order), as new arrays."""
        indices = np.asarray(indices, dtype=np.int64)
        atoms, offsets = atoms_of(self.offsets, indices)
        return self.changed(
            species=self.species[atoms],
            coordinates=None if self.coordinates is None else self.coordinates[atoms],
            offsets=offsets,
            energies=None if self.energies is None else self.energies[..., indices],
            forces=None if self.forces is None else self.forces[..., atoms, :],
            labels=tuple(self.labels[i] for i in indices),
            cells=None if self.cells is None else self.cells[indices],
            periodic=None if self.periodic is None else self.periodic[indices],
            stresses=None if self.stresses is None else self.stresses[..., indices, :, :],
        )

    def level(self, level: int) -> Structures:
        """The structures that have an energy at a level (0 is the lowest), with what is of this level alone."""
        if self.levels == 1:
            return self
        forces = None
        if self.forces is not None and self.known_forces[level].any():
            forces = self.forces[level]
        stresses = None
        if self.stresses is not None and self.known_stresses[level].any():
            stresses = self.stresses[level]
        assert self.energies is not None
        known = self.known_energies[level]
        if known.all():
            return self.changed(energies=self.energies[level], forces=forces, stresses=stresses)
        energies = np.where(known, self.energies[level], 0.0)  # those that are unknown are left out in the next step
        return self.changed(energies=energies, forces=forces, stresses=stresses).select(np.flatnonzero(known))

    def with_elements(self, elements: Sequence[str]) -> Structures:
        """The same structures with `species` counted in another order.

        Raises
        ------
        InputError
            A structure contains an element that is not in `elements`.
        """
        elements = _checked_elements(elements)
        if elements == self.elements:
            return self
        table = np.array([elements.index(e) if e in elements else -1 for e in self.elements], dtype=np.int64)
        species = table[self.species]
        if species.size and species.min() < 0:
            atom = int(np.argmax(species < 0))
            label = self.labels[np.searchsorted(self.offsets, atom, side="right") - 1]
            raise DataError(
                f"{label} contains {self.elements[self.species[atom]]}, which is not among the elements "
                f"{' '.join(elements)}: add it to the list or leave the structure out"
            )
        return self.changed(elements=elements, species=species)

    # Checks

    def _check_shapes(self) -> None:
        _checked_elements(self.elements)
        n_structures, n_atoms = len(self.labels), len(self.species)
        expected = {
            "species": (n_atoms,),
            "coordinates": (n_atoms, 3),
            "offsets": (n_structures + 1,),
            "energies": (n_structures,),
            "forces": (n_atoms, 3),
            "cells": (n_structures, 3, 3),
            "periodic": (n_structures, 3),
            "stresses": (n_structures, 3, 3),
        }
        if (self.cells is None) != (self.periodic is None):
            raise DataError("cells and periodic come together: give both or neither")
        n_levels = {}
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is None:
                continue
            has_levels = name in ("energies", "forces", "stresses")
            of_levels = has_levels and value.ndim == len(shape) + 1
            if of_levels:
                n_levels[name] = len(value)
                shape = (max(2, len(value)), *shape)
            if value.shape != shape:
                raise DataError(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
            if has_levels and not of_levels:
                n_levels[name] = 1
        if len(set(n_levels.values())) > 1:
            counts = " and ".join(f"{name} of {count} levels of theory" for name, count in n_levels.items())
            raise DataError(f"there are {counts}: give all of the same levels")
        if self.offsets[0] != 0 or self.offsets[-1] != n_atoms or np.any(self.sizes < 0):
            raise DataError(f"offsets must rise from 0 to the number of atoms, {n_atoms}")
        if n_structures and self.sizes.min() == 0:
            raise DataError(f"{self.labels[int(np.argmin(self.sizes))]} has no atoms: leave it out")
        if n_atoms and (self.species.min() < 0 or self.species.max() >= len(self.elements)):
            raise DataError(f"species must lie between 0 and {len(self.elements) - 1}, the indices of `elements`")

    def _check_numbers(self) -> None:
        if self.coordinates is not None:
            self._require_finite(np.isfinite(self.coordinates).all(axis=1), "coordinate")
        if self.energies is not None:
            self._check_energies(self.energies.reshape(-1, len(self)) if len(self) else np.empty((1, 0)))
        if not len(self):
            return
        if self.cells is not None and self.periodic is not None:
            good = np.isfinite(self.cells).all(axis=(1, 2)) | ~self.are_crystals
            if not good.all():
                label = self.labels[int(np.argmin(good))]
                raise DataError(f"{label} has a cell with a NaN or infinite number: correct it")
            if not np.isin(self.periodic, (0, 1)).all():
                raise DataError("periodic must be 0 or 1 for each vector of a cell")
        levels = self.levels
        has_energy = self.known_energies if self.energies is not None else np.ones((levels, len(self)), dtype=bool)
        if self.stresses is not None:
            self._check_stresses(self.stresses.reshape(levels, len(self), 3, 3), has_energy)
        if self.forces is None:
            return
        for k, forces in enumerate(self.forces.reshape(levels, -1, 3)):
            # Absent means NaN in all rows of a structure; anything between that and finite is a mistake.
            absent = np.logical_and.reduceat(np.isnan(forces).all(axis=1), self.offsets[:-1])
            finite = np.isfinite(forces).all(axis=1)
            what = "force" if levels == 1 else f"force of level {k}"
            self._require_finite(finite | np.repeat(absent, self.sizes), what)
            if np.any(~absent & ~has_energy[k]):
                bad = int(np.argmax(~absent & ~has_energy[k]))
                raise DataError(
                    f"{self.labels[bad]} has forces but no energy at level {k} (counted from 0): give both or neither"
                )

    def _check_energies(self, energies: np.ndarray) -> None:
        """Check energies [K, n_structures]."""
        several = len(energies) > 1
        bad = np.isinf(energies) if several else ~np.isfinite(energies)
        if bad.any():
            level, structure = (int(i) for i in np.argwhere(bad)[0])
            where = f" at level {level} (counted from 0)" if several else ""
            raise DataError(
                f"{self.labels[structure]} has the energy {energies[level, structure]}{where}: correct it or leave the "
                "structure out"
            )
        if several and np.isnan(energies).all(axis=0).any():
            structure = int(np.argmax(np.isnan(energies).all(axis=0)))
            raise DataError(
                f"{self.labels[structure]} has no energy at any of the {len(energies)} levels: leave the structure out"
            )

    def _check_cells(self, cells: np.ndarray, periodic: np.ndarray) -> None:
        lattices, along = _lattices(cells, periodic), periodic != 0
        volumes = np.linalg.det(lattices)
        # Relative to the lengths of the vectors, so that rounding of a flat cell does not pass for a volume.
        flat = ~(np.abs(volumes) > 1e-10 * np.linalg.norm(lattices, axis=2).prod(axis=1))
        heights = np.where(along, _heights(np.where(flat[:, None, None], np.eye(3), lattices)), np.inf).min(axis=1)
        bad = flat | (volumes < 0) | (heights < CLOSEST_ALLOWED)
        if not bad.any():
            return
        i = int(np.argmax(bad))
        label, shown = self.labels[i], cells[i].tolist()
        if flat[i]:
            raise DataError(
                f"{label} is periodic, but its cell {shown} has no volume along its periodic vectors: correct it, or "
                "make it a molecule (pbc F F F)"
            )
        if volumes[i] < 0:
            raise DataError(f"{label} has a left-handed cell {shown}: exchange two of its vectors, and their pbc")
        raise DataError(
            f"{label} has a cell only {heights[i]:.3g} Å high along a periodic vector (less than {CLOSEST_ALLOWED} Å): "
            "correct it or leave the structure out"
        )

    def _check_stresses(self, stresses: np.ndarray, has_energy: np.ndarray) -> None:
        """Check stresses [K, n_structures, 3, 3]."""
        absent = np.isnan(stresses).all(axis=(2, 3))
        finite = np.isfinite(stresses).all(axis=(2, 3))
        crystals = self.are_crystals
        flat_layers = np.zeros(len(self), dtype=bool)
        if self.periodic is not None:
            flat_layers = (self.volumes == 0) & ~self.periodic.all(axis=1)  # others are no crystals at all
        sizes = np.abs(stresses).max(axis=(2, 3), initial=0, where=np.isfinite(stresses))
        skew = np.abs(stresses - np.swapaxes(stresses, 2, 3)).max(axis=(2, 3), initial=0, where=np.isfinite(stresses))
        for bad, what in (
            (~absent & ~finite, "has a NaN or infinite stress: correct it or leave the stress out"),
            (~absent & ~crystals, "is a molecule, which has no stress: give its cell and pbc, or leave the stress out"),
            (~absent & flat_layers, "has a stress but a cell without volume: give three vectors, or leave it out"),
            (~absent & (skew > _ALIKE * sizes), "has a stress that is not symmetric: correct it or leave it out"),
            (~absent & ~has_energy, "has a stress but no energy at that level: give both or neither"),
        ):
            if bad.any():
                raise DataError(f"{self.labels[int(np.argwhere(bad)[0, 1])]} {what}")

    def _require_finite(self, good: np.ndarray, what: str) -> None:
        if good.all():
            return
        atom = int(np.argmin(good))
        structure = int(np.searchsorted(self.offsets, atom, side="right")) - 1
        raise DataError(
            f"{self.labels[structure]} has a NaN or infinite {what} at atom {atom - self.offsets[structure] + 1}: "
            "correct it or leave the structure out"
        )

    def _check_distances(self, coordinates: np.ndarray) -> None:
        # A sweep: in the order of a projection onto one direction, close atoms are close in the order too. The
        # direction is a general one, so that planar and symmetric molecules do not pile up on one value.
        owners, atoms = self.owners, np.arange(len(coordinates))
        if self.cells is not None:
            coordinates, atoms = self._with_images(coordinates)
            owners = owners[atoms]
        projection = coordinates @ np.array([0.4743, 0.6021, 0.6423])
        order = np.lexsort((projection, owners))
        projection, owners = projection[order], owners[order]
        first = np.arange(len(order))
        for step in range(1, len(order)):
            first = first[first + step < len(order)]
            second = first + step
            near = (owners[first] == owners[second]) & (projection[second] - projection[first] < CLOSEST_ALLOWED)
            first = first[near]
            if first.size == 0:
                return
            a, b = order[first], order[first + step]
            squared = np.square(coordinates[a] - coordinates[b]).sum(axis=1)
            if squared.min() < CLOSEST_ALLOWED**2:
                pair = int(np.argmin(squared))
                structure = int(owners[first[pair]])
                both = sorted(int(atoms[i[pair]] - self.offsets[structure] + 1) for i in (a, b))
                what = f"{self.labels[structure]} has atoms {both[0]} and {both[1]}"
                remedy = "correct it or leave the structure out"
                places = self.coordinates
                assert places is not None
                apart = places[atoms[a[pair]]] - places[atoms[b[pair]]]
                if np.square(apart).sum() > squared[pair] + 1e-6:  # not where they are, but through the cell
                    what += ", through its periodic cell,"
                    remedy = "correct the cell, or remove it (in a PDB file the line CRYST1) if this is a molecule"
                raise DataError(
                    f"{what} only {squared[pair] ** 0.5:.3g} Å apart (less than {CLOSEST_ALLOWED} Å): {remedy}"
                )

    def _with_images(self, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All atoms, within their cells, then images across the faces that they are near to, and the atom of each."""
        assert self.cells is not None
        assert self.periodic is not None
        owners, along = self.owners, self.periodic != 0
        cells = _lattices(self.cells, self.periodic)
        fractions = np.einsum("ij,ijk->ik", coordinates, np.linalg.inv(cells)[owners])
        shifts = np.where(along[owners], -np.floor(fractions), 0.0)
        places = coordinates + np.einsum("ij,ijk->ik", shifts, cells[owners])
        fractions, atoms = fractions + shifts, np.arange(len(coordinates))
        margins = CLOSEST_ALLOWED / _heights(cells)
        for axis in range(3):
            near = along[owners[atoms], axis] & (fractions[:, axis] < margins[owners[atoms], axis])
            images = places[near] + cells[owners[atoms[near]], axis]
            beyond = fractions[near] + np.eye(3)[axis]
            places, fractions = np.concatenate([places, images]), np.concatenate([fractions, beyond])
            atoms = np.concatenate([atoms, atoms[near]])
        return places, atoms


def concatenate(parts: Sequence[Structures], elements: Sequence[str] | None = None) -> Structures:
    """Join sets of structures, in order.

    Parameters
    ----------
    parts
        At least one set. Either all have energies or none, of the same levels of theory.
    elements
        Element order of the result; default: all that occur in `parts`, alphabetically.
    """
    if not parts:
        raise DataError("no structures to join")
    present = [part.elements[s] for part in parts for s in np.unique(part.species)]
    order = element_order(present, elements, "the structures") if present else tuple(elements or parts[0].elements)
    parts = [part.with_elements(order) for part in parts]
    if len(parts) == 1:
        return parts[0]
    if len({part.energies is None for part in parts}) > 1:
        raise DataError("structures with and without energies cannot be joined: take them from separate files")
    if len({part.coordinates is None for part in parts}) > 1:
        raise DataError("structures with and without coordinates cannot be joined: take them from separate files")
    if len({part.levels for part in parts}) > 1:
        raise DataError(
            f"structures of {' and '.join(map(str, sorted({part.levels for part in parts})))} levels of theory cannot "
            "be joined: give all the same levels"
        )
    shifts = np.cumsum([0] + [len(part.species) for part in parts])
    forces = None
    if any(part.forces is not None for part in parts):
        leading = () if parts[0].levels == 1 else (parts[0].levels,)
        shapes = [(*leading, len(part.species), 3) for part in parts]
        forces = np.concatenate(
            [np.full(s, np.nan) if p.forces is None else p.forces for p, s in zip(parts, shapes, strict=True)], axis=-2
        )
    return parts[0].changed(
        cells=_joined(parts, "cells", np.zeros((3, 3))),
        periodic=_joined(parts, "periodic", np.zeros(3, dtype=np.int64)),
        stresses=_joined(parts, "stresses", np.full((3, 3), np.nan), parts[0].levels),
        species=np.concatenate([part.species for part in parts]),
        coordinates=None if parts[0].coordinates is None else np.concatenate([part.coordinates for part in parts]),
        offsets=np.concatenate([[0], *(part.offsets[1:] + s for part, s in zip(parts, shifts, strict=False))]),
        energies=None if parts[0].energies is None else np.concatenate([part.energies for part in parts], axis=-1),
        forces=forces,
        labels=tuple(label for part in parts for label in part.labels),
    )


def _joined(parts: Sequence[Structures], name: str, absent: np.ndarray, levels: int = 1) -> np.ndarray | None:
    """An array of all structures, one after another; of those that have none it is `absent` for each structure."""
    if all(getattr(part, name) is None for part in parts):
        return None
    leading = () if levels == 1 else (levels,)
    arrays = [
        np.broadcast_to(absent, (*leading, len(part), *absent.shape)) if (own := getattr(part, name)) is None else own
        for part in parts
    ]
    return np.concatenate(arrays, axis=len(leading))


def _lattices(cells: np.ndarray, periodic: np.ndarray) -> np.ndarray:
    """Cells [n, 3, 3] with unit vectors, at right angles to the others, in place of those without periodicity."""
    along = periodic != 0
    counts = along.sum(axis=1)
    lattices = np.where(along[:, :, None], cells, 0.0)
    lattices[counts == 0] = np.eye(3)
    for i in np.flatnonzero((counts == 1) | (counts == 2)):
        lattice = lattices[i]
        # The vector that is periodic, or is not, like no other; the two others follow it in a circle.
        first = int(np.argmax(along[i] == (counts[i] == 1)))
        second, third = (first + 1) % 3, (first + 2) % 3
        if counts[i] == 1:
            lattice[second] = _unit(np.cross(lattice[first], np.eye(3)[np.argmin(np.abs(lattice[first]))]))
            lattice[third] = _unit(np.cross(lattice[first], lattice[second]))
        else:
            lattice[first] = _unit(np.cross(lattice[second], lattice[third]))
    return lattices


def _unit(vector: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vector)
    return vector / length if length else vector


def _heights(cells: np.ndarray) -> np.ndarray:
    """Distances of the opposite faces of cells [n, 3, 3]: [n, 3], Å."""
    return 1 / np.linalg.norm(np.linalg.inv(cells), axis=1)


def atoms_of(offsets: np.ndarray, structures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The atoms of some structures one after another, int64 [n_atoms], and offsets of their own, int64 [n + 1]."""
    sizes = np.diff(offsets)[structures]
    chosen = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return np.arange(chosen[-1]) + np.repeat(offsets[structures] - chosen[:-1], sizes), chosen


def element_order(symbols: Iterable[str], elements: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """The given order of elements, or those present in alphabetical order.

    Raises
    ------
    InputError
        `symbols` contains something that is no element or is not in `elements`; `where` names its place.
    """
    present = sorted(set(symbols))
    order = _checked_elements(present if elements is None else elements)
    missing = [symbol for symbol in present if symbol not in order]
    if missing:
        raise DataError(
            f"{where}: contains {' '.join(missing)}, not among the elements {' '.join(order)}: "
            "add to the list of elements or leave the file out"
        )
    return order


def formula_in_order(symbols: Sequence[str]) -> str:
    """Formula that keeps the atom order: C, C, H, C → "C2HC"."""
    runs: list[tuple[str, int]] = []
    for symbol in symbols:
        if runs and runs[-1][0] == symbol:
            runs[-1] = (symbol, runs[-1][1] + 1)
        else:
            runs.append((symbol, 1))
    return "".join(symbol + (str(count) if count > 1 else "") for symbol, count in runs)


def _checked_elements(elements: Sequence[str]) -> tuple[str, ...]:
    elements = tuple(elements)
    unknown = [element for element in elements if element not in _SYMBOLS]
    if unknown:
        raise DataError(f"{', '.join(map(repr, unknown))}: no such chemical element, expected symbols like C, H, Cl")
    if len(set(elements)) < len(elements):
        raise DataError(f"the list of elements {' '.join(elements)} names one twice: name each once")
    return elements


def _hill(counts: dict[str, int]) -> str:
    present = sorted(symbol for symbol, count in counts.items() if count)
    if "C" in present:
        present = ["C"] + ["H"] * ("H" in present) + [symbol for symbol in present if symbol not in ("C", "H")]
    return "".join(symbol + (str(counts[symbol]) if counts[symbol] > 1 else "") for symbol in present)
