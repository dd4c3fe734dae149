"""What can be seen from data that is probably wrong with them: units, signs, copies. Nothing is refused for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from ase.data import atomic_numbers, covalent_radii

from kinml_fast.data.sae import GUESSES
from kinml_fast.data.split import PARTS, Split
from kinml_fast.data.structures import Structures
from kinml_fast.units import KCAL_PER_MOL

HARTREE = 27.211386245988
"""eV"""
_ENERGY_UNITS = {"Hartree": 1 / HARTREE, "kcal/mol": KCAL_PER_MOL, "kJ/mol": 4.184 * KCAL_PER_MOL}
"""How many of them are one eV."""
_AT_MOST = 2000
_ENOUGH = 10  # structures of a formula, to say what is usual
_FAR, _FAR_SPREADS = 30.0, 20.0  # eV; interquartile ranges
_NEAR = 0.3  # Å, of the atom that moves most from one frame to the next


_OF_ALL_SIZES = np.errstate(over="ignore", invalid="ignore")
"""Coordinates may be beyond all measure."""


def doubts(structures: Structures, split: Split, differences: bool = False) -> Iterator[str]:
    """One sentence for each thing that looks wrong.

    Parameters
    ----------
    structures
        As they were read, in the order of the files.
    split
        Which of them are for what.
    differences
        Whether energies are differences of two levels, whose size says nothing.
    """
    yield from of_structures(structures, differences)
    if structures.coordinates is not None:
        yield from untrained_elements(structures.elements, structures.counts() > 0, split)
        yield from _copies(structures, split)


def of_structures(structures: Structures, differences: bool = False) -> Iterator[str]:
    """Those of `doubts` that the division has no part in."""
    if structures.coordinates is None:
        return
    unit = None if differences else _energy_unit(structures)
    if unit is not None:
        yield (
            f"the energies are about those of all electrons in {unit}, but are taken as eV: if they are in {unit}, "
            f"multiply energies and forces by {1 / _ENERGY_UNITS[unit]:.6g}"
        )
    if not differences:
        yield from _far_energies(structures)
    yield from _of_forces(structures)
    length = _bond_length(structures)
    if length > 1.6:
        yield (
            f"nearest atoms are {length:.2f} times the sum of their covalent radii apart: lengths are taken as Å; if "
            "they are in Bohr, multiply them by 0.529177"
        )


def _energy_unit(s: Structures) -> str | None:
    """The unit other than eV in which energies would be those of all electrons."""
    if s.energies is None or not set(s.elements) <= set(GUESSES):
        return None
    expected = s.counts() @ np.array([GUESSES[element] for element in s.elements])
    ratios = s.energies.reshape(s.levels, -1) / expected
    ratio = float(np.median(ratios[np.isfinite(ratios)])) if np.isfinite(ratios).any() else np.nan
    return next((unit for unit, factor in _ENERGY_UNITS.items() if abs(ratio / factor - 1) < 0.03), None)


def _far_energies(s: Structures) -> Iterator[str]:
    """Energies that are far from those of the same molecule, as a calculation that failed leaves them."""
    if s.energies is None:
        return
    for level in s.energies.reshape(s.levels, -1):
        far: list[tuple[int, float]] = []
        for group in _formulas(s):
            some = group[np.isfinite(level[group])]
            if len(some) < _ENOUGH:
                continue
            first, middle, last = np.quantile(level[some], (0.25, 0.5, 0.75))
            limit = max(_FAR, _FAR_SPREADS * (last - first))
            far += [(int(i), float(middle)) for i in some[np.abs(level[some] - middle) > limit]]
        if far:
            i, middle = far[0]
            yield (
                f"{len(far)} energies are far from those of the same molecule ({s.labels[i]}: {level[i]:.6g} eV, the "
                f"median is {middle:.6g} eV): leave out calculations that failed"
            )


def _formulas(s: Structures) -> list[np.ndarray]:
    """The structures of each formula, in the order of the data."""
    _, groups = np.unique(s.counts(), axis=0, return_inverse=True)
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _of_forces(s: Structures) -> Iterator[str]:
    """Whether energies change between near neighbours in a file as their forces say: dE = -F dx."""
    if s.energies is None or s.forces is None or s.coordinates is None:
        return
    energies, forces = s.energies.reshape(s.levels, -1), s.forces.reshape(s.levels, -1, 3)
    first, moved, turns = _steps(s)
    for level in range(s.levels):
        changes = []
        for i, move, turn in zip(first, moved, turns, strict=True):
            a, b, c = s.offsets[i : i + 3]
            work = -0.5 * ((forces[level, a:b] + forces[level, b:c] @ turn) * move).sum()
            changes.append((energies[level, i + 1] - energies[level, i], work))
        found = np.array(changes).reshape(-1, 2)
        found = found[np.isfinite(found).all(axis=1)]
        if len(found) < 10 or not found.any(axis=0).all():
            continue
        change, work = found.T
        cosine = (change @ work) / np.sqrt((change @ change) * (work @ work))
        factor = (change @ work) / (work @ work)
        if cosine < -0.9 and 0.7 < -factor < 1.4:
            yield (
                "the forces have the sign of gradients: from one structure to the next the energy rises along them; "
                "forces are -dE/dx, change their sign"
            )
        elif cosine > 0.9 and not 0.7 < factor < 1.4:
            yield (
                f"energies change {factor:.3g} times as much from one structure to the next as the forces say, which "
                "is not consistent: are they in different units? eV and eV/Å are expected"
            )


@_OF_ALL_SIZES
def _steps(s: Structures) -> tuple[list[int], list[np.ndarray], list[np.ndarray]]:
    """Pairs of structures (the first of each) one after the other in a file, of which one is nearly the other.

    With the displacements [n, 3] from one to the other, turned to it (Kabsch, Acta Cryst. 1976, A32, 922, DOI
    10.1107/S0567739476001873), and these rotations [3, 3], which rows of the second are multiplied by. Crystals, and
    what is near as it is, are not turned.
    """
    found: tuple[list[int], list[np.ndarray], list[np.ndarray]] = ([], [], [])
    assert s.coordinates is not None
    sizes = s.sizes
    for size in np.unique(sizes):
        pairs = np.flatnonzero((sizes[:-1] == size) & (sizes[1:] == size))
        pairs = pairs[:: max(1, len(pairs) // _AT_MOST)]
        atoms = s.offsets[pairs][:, None] + np.arange(size)
        same = (s.species[atoms] == s.species[atoms + size]).all(axis=1)
        pairs, atoms = pairs[same], atoms[same]
        x, y = s.coordinates[atoms], s.coordinates[atoms + size]
        sound = np.isfinite(x).all(axis=(1, 2)) & np.isfinite(y).all(axis=(1, 2))
        pairs, x, y = pairs[sound], x[sound], y[sound]
        as_they_are = s.are_crystals[pairs] | s.are_crystals[pairs + 1] | (np.abs(y - x) < _NEAR).all(axis=(1, 2))
        turned = ~as_they_are[:, None, None]
        x, y = (z - z.mean(axis=1, keepdims=True) * turned for z in (x, y))
        u, _, vt = np.linalg.svd(y.transpose(0, 2, 1) @ x)
        u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]
        turns = np.where(turned, u @ vt, np.eye(3))
        moved = y @ turns - x
        largest = np.abs(moved).max(axis=(1, 2), initial=0)
        for i in np.flatnonzero((largest > 1e-6) & (largest < _NEAR)):
            found[0].append(int(pairs[i]))
            found[1].append(moved[i])
            found[2].append(turns[i])
    return found


@_OF_ALL_SIZES
def _bond_length(s: Structures) -> float:
    """The median, over atoms, of the distance to the nearest one in covalent radii; NaN without molecules."""
    radii = np.array([covalent_radii[atomic_numbers[element]] for element in s.elements])
    found: list[float] = []
    assert s.coordinates is not None
    for i in np.flatnonzero(~s.are_crystals & (s.sizes > 1))[:: max(1, len(s) // _AT_MOST)]:
        atoms = slice(s.offsets[i], s.offsets[i + 1])
        x, r = s.coordinates[atoms], radii[s.species[atoms]]
        ratios = np.linalg.norm(x[:, None] - x, axis=-1) / (r[:, None] + r)
        np.fill_diagonal(ratios, np.inf)
        found += ratios.min(axis=1).tolist()
    return float(np.median(found)) if found else np.nan


def untrained_elements(elements: Sequence[str], present: np.ndarray, split: Split) -> Iterator[str]:
    """One sentence for each element of a part that is not trained on; `present` is bool [n_structures, n_elements]."""
    trained = present[split.train].any(axis=0)
    for part in PARTS[1:]:
        lacking = present[getattr(split, part)].any(axis=0) & ~trained
        for place in np.flatnonzero(lacking).tolist():
            yield (
                f"no training structure has the element {elements[place]}, which structures for {part} have: their "
                "errors say nothing about it"
            )


def _copies(s: Structures, split: Split) -> Iterator[str]:
    """Structures for validation or testing whose distances are those of one for training."""
    keys = _fingerprints(s)
    trained = {keys[i]: i for i in split.train.tolist()}
    for part in PARTS[1:]:
        indices = getattr(split, part).tolist()
        same = [(i, trained[keys[i]]) for i in indices if keys[i] in trained]
        if same:
            one, other = (s.labels[i] for i in same[0])
            yield (
                f"{len(same)} of {len(indices)} structures for {part} are copies of training structures ({one} of "
                f"{other}): errors there are too small; remove duplicates"
            )


@_OF_ALL_SIZES
def _fingerprints(s: Structures) -> list[bytes]:
    """The same for structures that differ by rotation, translation and the order of atoms only."""
    found = [b""] * len(s)
    assert s.coordinates is not None
    for group in _formulas(s):
        for some in np.array_split(group, -(-len(group) // _AT_MOST)):
            atoms = s.offsets[some][:, None] + np.arange(s.sizes[some[0]])
            atoms = np.take_along_axis(atoms, np.argsort(s.species[atoms], axis=1, kind="stable"), axis=1)
            x, species = s.coordinates[atoms], s.species[atoms[0]]
            j, k = np.triu_indices(len(species), 1)
            distances = np.round(np.linalg.norm(x[:, j] - x[:, k], axis=-1), 4)
            kinds = species[j] * len(s.elements) + species[k]
            for kind in np.unique(kinds):
                distances[:, kinds == kind] = np.sort(distances[:, kinds == kind], axis=1)
            cells = np.zeros((len(some), 0)) if s.cells is None else np.round(s.cells[some], 4).reshape(-1, 9)
            for i, row in zip(some.tolist(), np.hstack([distances, cells]) + 0.0, strict=True):
                found[i] = species.tobytes() + row.tobytes()
    return [hashlib.sha256(key).digest() for key in found]
