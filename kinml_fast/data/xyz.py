"""Extended XYZ, and every other file of molecules that ASE reads."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from kinml_fast.data.files import check_distinct, expand, first_few
from kinml_fast.data.levels import merge
from kinml_fast.data.structures import Structures, concatenate, element_order
from kinml_fast.errors import InputError

log = logging.getLogger(__name__)

_ENERGY_KEYS = ("energy", "REF_energy")
_FORCES_KEYS = ("forces", "REF_forces")


def read(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    energy_key: str | Sequence[str] | None = None,
    forces_key: str | Sequence[str] | None = None,
    elements: Sequence[str] | None = None,
    labelled: bool = True,
    every_level: bool = True,
) -> Structures:
    """Structures of files that ASE reads, in the order of the files and of their frames.

    Parameters
    ----------
    files
        Paths, glob patterns or `shipped:NAME`, see `files.expand`.
    energy_key
        Name of the energy (eV); default: `energy` or `REF_energy`, whichever a frame has. Of a list of several, the
        levels of theory of the result in this order (lowest first), a frame has at least one. Files of one name in
        different folders may then have one level each: frames are matched by their numbers.
    forces_key
        Name of the forces (eV/Å), which a frame need not have. Default: the energy's key with "forces" for "energy"
        (`dft_energy` goes with `dft_forces`), so that energies and forces never come from two methods. With several
        levels a list of as many names.
    elements
        Order of `species`; default: alphabetical.
    labelled
        False: take geometries only, whatever energies and forces the files have.
    every_level
        Whether it is an error that a file has nothing at all of one of several levels, or is only logged.

    Returns
    -------
    Structures
        Labels are "file.xyz/3" (counted from 1; white space in a file name becomes "_"). With several levels energies
        and forces have a leading dimension and are NaN where a frame lacks a level.

    Raises
    ------
    InputError
        A file that ASE cannot read, a frame without energy or with two that differ, a periodic frame, numbers that
        `Structures` refuses.
    """
    paths = expand(files)
    energy_keys = [energy_key] if energy_key is None or isinstance(energy_key, str) else list(energy_key)
    forces_keys = [forces_key] if isinstance(forces_key, str) else list(forces_key or [None] * len(energy_keys))
    if len(forces_keys) != len(energy_keys) or not energy_keys:
        raise InputError(
            f"{len(energy_keys)} keys of energies and {len(forces_keys)} of forces are given: give one of each for "
            "every level"
        )
    keys = list(zip(energy_keys, forces_keys, strict=True))
    if len(keys) == 1:
        check_distinct(paths, _file_label)
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(_file_label(path), []).append(path)
    parts = []
    for same_label in groups.values():
        own = [_read_one(path, keys, elements, labelled) for path in same_label]
        if labelled and len(keys) > 1:
            _check_keys(same_label, [key for key, _ in keys], own, every_level)
        parts += own if len(own) < 2 else [merge(concatenate(own))]
    return concatenate(parts, elements)


def _file_label(path: Path) -> str:
    # Split files separate words by white space.
    return "_".join(path.name.split())


def _read_one(
    path: Path,
    keys: Sequence[tuple[str | None, str | None]],
    elements: Sequence[str] | None,
    labelled: bool,
) -> Structures:
    frames = list(_frames(path))
    if not frames:
        raise InputError(f"{path}: contains no structures: take a file with data")
    label = _file_label(path)
    labels = tuple(f"{label}/{i}" for i in range(1, len(frames) + 1))
    energies, forces = None, None
    if labelled:
        energies, forces = _energies_and_forces(path, frames, keys)
        if len(keys) == 1:
            energies, forces = energies[0], None if forces is None else forces[0]
    numbers = np.concatenate([frame.numbers for frame in frames])
    present, inverse = np.unique(numbers, return_inverse=True)
    symbols = [chemical_symbols[z] for z in present]
    order = element_order(symbols, elements, str(path))
    try:
        return Structures(
            elements=order,
            species=np.array([order.index(symbol) for symbol in symbols], dtype=np.int64)[inverse],
            coordinates=np.concatenate([frame.positions for frame in frames]),
            offsets=np.cumsum([0] + [len(frame) for frame in frames]),
            energies=energies,
            forces=forces,
            labels=labels,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _frames(path: Path) -> Iterator[Atoms]:
    try:
        for number, frame in enumerate(ase.io.iread(path, index=":", do_not_split_by_at_sign=True), start=1):
            if frame.pbc.any():
                raise InputError(
                    f"{path}: frame {number} is periodic, only molecules can be used so far: "
                    'leave out its Lattice or write pbc="F F F"'
                )
            yield frame
    except InputError:
        raise
    except Exception as error:  # ASE's many readers raise whatever their parsing runs into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: ASE cannot read it ({reason}): correct the file or its suffix") from error


def _energies_and_forces(
    path: Path, frames: Sequence[Atoms], keys: Sequence[tuple[str | None, str | None]]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Energies [K, n_frames] and forces [K, n_atoms, 3], NaN where there are none; None instead of no forces at all."""
    energies = np.full((len(keys), len(frames)), np.nan)
    offsets = np.cumsum([0] + [len(frame) for frame in frames])
    forces = np.full((len(keys), offsets[-1], 3), np.nan)
    for i, frame in enumerate(frames):
        where = f"{path}: frame {i + 1}"
        there = _there(frame)
        # Of several levels a frame may lack some, but not all.
        levels = [k for k, (key, _) in enumerate(keys) if key in there] if len(keys) > 1 else [0]
        if not levels:
            raise InputError(
                f"{where} has no energy under any of the keys {', '.join(str(key) for key, _ in keys)}{_others(there)}"
            )
        for k in levels:
            energies[k, i], own = _energy_and_forces(where, there, len(frame), *keys[k])
            if len(keys) > 1 and np.isnan(energies[k, i]):
                raise InputError(f"{where}: {keys[k][0]} is NaN: correct it or leave it out of the frame")
            if own is not None:
                forces[k, offsets[i] : offsets[i + 1]] = own
    return energies, None if np.isnan(forces).all() else forces


def _check_keys(
    paths: Sequence[Path], keys: Sequence[str | None], parts: Sequence[Structures], every_level: bool
) -> None:
    known = np.any([part.known_energies.any(axis=1) for part in parts], axis=0)
    lacking = " or ".join(str(key) for key, own in zip(keys, known, strict=True) if not own)
    if lacking and every_level:
        raise InputError(
            f"{first_few(paths)}: no frame has an energy under the key {lacking}: leave the file or the level out"
        )
    if lacking:
        log.warning("%s: no frame has an energy under the key %s", first_few(paths), lacking)


def _there(frame: Atoms) -> dict[str, object]:
    # ASE moves `energy` and `forces` into a calculator and leaves other keys in info (frame) and arrays (atoms).
    return {**frame.info, **frame.arrays, **(frame.calc.results if frame.calc is not None else {})}


def _others(there: Mapping[str, object]) -> str:
    others = sorted(key for key, value in there.items() if "energy" in key.lower() and np.size(value) == 1)
    return f", only {', '.join(others)}: name the key" if others else ": add it or leave the frame out"


def _energy_and_forces(
    where: str, there: Mapping[str, object], n_atoms: int, energy_key: str | None, forces_key: str | None
) -> tuple[float, np.ndarray | None]:
    energy_keys = (energy_key,) if energy_key is not None else _ENERGY_KEYS
    found = [key for key in energy_keys if key in there]
    if not found:
        raise InputError(f"{where} has no energy under the key {' or '.join(energy_keys)}{_others(there)}")
    values = [_number(there[key], f"{where}: {key}") for key in found]
    if len(set(values)) > 1 and not np.isnan(values).all():
        raise InputError(f"{where} has different numbers under {' and '.join(found)}: name the key to use")
    if forces_key is None:
        # Prefer the partner of the energy that was taken.
        wanted = [key.replace("energy", "forces") for key in found if "energy" in key]
    else:
        wanted = [forces_key]
    for key in wanted:
        if key in there:
            return values[0], _vectors(there[key], n_atoms, f"{where}: {key}")
    return values[0], None


def _number(value: object, what: str) -> float:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.size != 1:
        raise InputError(f"{what} is {value!r}, not one number: correct it or name another key")
    return float(array.reshape(()))


def _vectors(value: object, n_atoms: int, what: str) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != (n_atoms, 3):
        raise InputError(f"{what} is not three numbers for each of the {n_atoms} atoms: correct it")
    if np.isnan(array).any():
        raise InputError(f"{what} has a NaN: correct it or leave the forces of this frame out")
    return array
