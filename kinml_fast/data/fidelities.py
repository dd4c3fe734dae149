"""Several fidelities (levels of theory) in one data set: structures that lack one, differences, joining."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from kinml_fast.data.files import first_few
from kinml_fast.data.selection import Selection
from kinml_fast.data.structures import Structures, atoms_of, concatenate
from kinml_fast.errors import DataError

log = logging.getLogger(__name__)

SAME_GEOMETRY = 1e-6
"""How far (Å) an atom may be from where it is at another level: coordinates may have been written with fewer digits."""

_SHOWN = 10  # structures that a message names


def complete(structures: Structures, selection: Selection) -> tuple[Structures, tuple[str, ...]]:
    """What becomes of structures that were read, and the labels of those that were dropped for lacking a fidelity.

    Parameters
    ----------
    structures
        With the levels `selection.fidelities_read`.
    selection
        Says what to do with those that lack one.

    Raises
    ------
    InputError
        A structure lacks a level and must not, or all were dropped.
    """
    known = structures.known_energies
    lacking = ~known.all(axis=0)
    if selection.if_incomplete == "keep" or not lacking.any():
        return structures, ()
    labels = tuple(structures.labels[i] for i in np.flatnonzero(lacking))
    without = ", ".join(
        f"fidelity {fidelity}: {int(count)}"
        for fidelity, count in zip(selection.fidelities_read, (~known).sum(axis=1), strict=True)
        if count
    )
    if selection.if_incomplete == "error":
        also = "" if selection.baseline is not None else ", or keep to train each level on what there is"
        raise DataError(
            f"energies are missing ({without}) of {first_few(labels, _SHOWN)}: set data.incomplete=drop to leave "
            f"these structures out{also}"
        )
    if lacking.all():
        raise DataError(
            f"no structure has energies of all the fidelities {', '.join(map(str, selection.fidelities_read))}: take "
            "other files"
        )
    log.info("left out %d of %d structures that lack a level (%s)", len(labels), len(structures), without)
    return structures.select(np.flatnonzero(~lacking)), labels


def difference(structures: Structures) -> Structures:
    """Energies, forces and stresses of the highest level minus the lowest; NaN where one of both is unknown."""
    assert structures.energies is not None
    forces = None if structures.forces is None else structures.forces[-1] - structures.forces[0]
    if forces is not None and np.isnan(forces).all():
        forces = None
    stresses = None if structures.stresses is None else structures.stresses[-1] - structures.stresses[0]
    if stresses is not None and np.isnan(stresses).all():
        stresses = None
    energies = structures.energies[-1] - structures.energies[0]
    return structures.changed(energies=energies, forces=forces, stresses=stresses)


def join(sets: Sequence[Structures]) -> Structures:
    """One set of several levels of theory that were read one by one, matched by label.

    Parameters
    ----------
    sets
        At least two, of the lowest level first, each with energies of one level.

    Returns
    -------
    Structures
        Those that any level has, NaN at levels that they lack: first those of the highest level in its order, then what
        the others have beside them, from the second highest down. Coordinates are those of the highest level.

    Raises
    ------
    InputError
        Geometries that differ, a label that a level has twice, something that is not one level with energies.
    """
    if len(sets) < 2:
        raise DataError(f"{len(sets)} levels are given to be joined: give two or more, lowest first")
    for k, structures in enumerate(sets):
        if structures.energies is None or structures.levels > 1:
            what = "no energies" if structures.energies is None else f"energies of {structures.levels} levels"
            raise DataError(f"level {k} (counted from 0) has {what}: give structures with those of one")
    lifted = []
    for k, structures in reversed(list(enumerate(sets))):
        energies = np.full((len(sets), len(structures)), np.nan)
        energies[k] = structures.energies
        forces = None
        if structures.forces is not None:
            forces = np.full((len(sets), *structures.forces.shape), np.nan)
            forces[k] = structures.forces
        stresses = None
        if structures.stresses is not None:
            stresses = np.full((len(sets), *structures.stresses.shape), np.nan)
            stresses[k] = structures.stresses
        lifted.append(structures.changed(energies=energies, forces=forces, stresses=stresses))
    return merge(concatenate(lifted))


def merge(structures: Structures) -> Structures:
    """Make one structure of those that have the same label and other levels; the first says order and coordinates.

    Parameters
    ----------
    structures
        Of several levels.

    Raises
    ------
    InputError
        Geometries that differ by more than `SAME_GEOMETRY`, two energies of one label at a level.
    """
    places: dict[str, int] = {}
    places_of = np.array([places.setdefault(label, len(places)) for label in structures.labels], dtype=np.int64)
    if len(places) == len(structures):
        return structures
    assert structures.energies is not None
    known, known_forces = structures.known_energies, structures.known_forces
    first = np.unique(places_of, return_index=True)[1]
    twice = np.array([np.bincount(places_of[at_level], minlength=len(places)) > 1 for at_level in known])
    if twice.any():
        labels = [structures.labels[first[i]] for i in np.flatnonzero(twice.any(axis=0))]
        level = int(np.argmax(twice.any(axis=1)))
        raise DataError(
            f"there are two energies of level {level} (counted from 0) for {first_few(labels)}: leave out one, or give "
            "the files of different structures different names"
        )
    _check_same_geometries(structures, first[places_of])
    result = structures.select(first)
    energies = np.full((structures.levels, len(result)), np.nan)
    forces = None if structures.forces is None else np.full((structures.levels, len(result.species), 3), np.nan)
    stresses = None if structures.stresses is None else np.full((structures.levels, len(result), 3, 3), np.nan)
    known_stresses = structures.known_stresses
    for k in range(structures.levels):
        if stresses is not None and structures.stresses is not None:
            stresses[k, places_of[known_stresses[k]]] = structures.stresses[k, known_stresses[k]]
        energies[k, places_of[known[k]]] = structures.energies[k, known[k]]
        if forces is not None and structures.forces is not None:
            with_forces = np.flatnonzero(known_forces[k])
            source, _ = atoms_of(structures.offsets, with_forces)
            target, _ = atoms_of(result.offsets, places_of[with_forces])
            forces[k, target] = structures.forces[k, source]
    return result.changed(energies=energies, forces=forces, stresses=stresses)


def _check_same_geometries(structures: Structures, others: np.ndarray) -> None:
    """Compare each structure with another, int64 [n_structures]."""
    differs = structures.sizes != structures.sizes[others]
    rest = np.flatnonzero(~differs)
    (mine, starts), (theirs, _) = atoms_of(structures.offsets, rest), atoms_of(structures.offsets, others[rest])
    wrong = structures.species[mine] != structures.species[theirs]
    farthest = 0.0
    if structures.coordinates is not None:
        distances = np.abs(structures.coordinates[mine] - structures.coordinates[theirs]).max(axis=1, initial=0)
        farthest = float(distances.max(initial=0))
        wrong |= distances > SAME_GEOMETRY
    if structures.cells is not None and structures.periodic is not None:
        moved = np.abs(structures.cells - structures.cells[others]).max(axis=(1, 2)) > SAME_GEOMETRY
        differs |= (structures.periodic != structures.periodic[others]).any(axis=1) | (moved & structures.are_crystals)
    if len(rest):
        differs[rest] |= np.logical_or.reduceat(wrong, starts[:-1])
    if differs.any():
        labels = list(dict.fromkeys(structures.labels[i] for i in np.flatnonzero(differs)))
        raise DataError(
            f"the levels have different geometries of {first_few(labels)}"
            + (f", by up to {farthest:.3g} Å" if farthest > SAME_GEOMETRY else "")
            + ": energies of different levels must be of the same atoms in the same places"
        )
