"""Extended XYZ, and every other file of molecules that ASE reads."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from kinml_fast.data.fidelities import merge
from kinml_fast.data.files import check_distinct, expand, first_few
from kinml_fast.data.selection import Selection
from kinml_fast.data.structures import Structures, concatenate, element_order
from kinml_fast.errors import ConfigError, DataError, InputError

log = logging.getLogger(__name__)

_ENERGY_KEYS = ("energy", "REF_energy")
_FORCES_KEYS = ("forces", "REF_forces")


def read(
    files: str | os.PathLike | Sequence[str | os.PathLike], selection: Selection = Selection(), labelled: bool = True
) -> Structures:
    """Structures of files that ASE reads, in the order of the files and of their frames.

    Parameters
    ----------
    files
        Paths, glob patterns or `shipped:NAME`, see `files.expand`.
    selection
        Its keys say where the numbers are. An energy without a key is `energy` or `REF_energy`, whichever a frame has;
        forces without one have the energy's key with "forces" for "energy" (`dft_energy` goes with `dft_forces`), so
        that both never come from two methods, and a frame need not have any. Of several levels of theory, each with a
        key, a frame has at least one. Files of one name in different folders may then have one level each: frames are
        matched by their numbers. Where incomplete structures are kept, it is only logged that a file has nothing at all
        of one level.
    labelled
        False: take geometries only, whatever energies and forces the files have.

    Returns
    -------
    Structures
        With the levels `selection.fidelities_read`. Labels are "file.xyz/3" (counted from 1; white space in a file name
        becomes "_"). With several levels energies and forces have a leading dimension and are NaN where a frame lacks
        one.

    Raises
    ------
    InputError
        A file that ASE cannot read, a frame without energy or with two that differ, a periodic frame, numbers that
        `Structures` refuses; another number of keys than of levels.
    """
    paths = expand(files)
    energy_keys = _keys("energy", selection.energy_key, selection, paths)
    keys = list(zip(energy_keys, _keys("forces", selection.forces_key, selection, paths), strict=True))
    if len(keys) == 1:
        check_distinct(paths, _file_label)
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(_file_label(path), []).append(path)
    parts = []
    for same_label in groups.values():
        found = [_read_one(path, keys, selection.elements, labelled) for path in same_label]
        if labelled and len(keys) > 1:
            _check_levels(same_label, energy_keys, found, selection)
        parts += found if len(found) < 2 else [merge(concatenate(found))]
    return concatenate(parts, selection.elements)


def pieces(path: Path, selection: Selection, size: int) -> Iterator[Structures]:
    """What `read` gives of one file, at most `size` structures at a time; not more of it is in memory.

    Raises
    ------
    InputError
        As `read`, where it is found in the piece that is read.
    """
    energy_keys = _keys("energy", selection.energy_key, selection, [path])
    keys = list(zip(energy_keys, _keys("forces", selection.forces_key, selection, [path]), strict=True))
    frames, first = _frames(path), 0
    while some := list(itertools.islice(frames, size)):
        yield _built(path, some, keys, selection.elements, True, first)
        first += len(some)


def _keys(
    name: str, key: str | Sequence[str] | None, selection: Selection, paths: Sequence[Path]
) -> Sequence[str | None]:
    """The key of each level; None where the user leaves it to the file."""
    fidelities = selection.fidelities_read
    keys = [key] if isinstance(key, str) else key
    if keys is not None and len(keys) == len(fidelities):
        return keys
    if keys is None and (len(fidelities) == 1 or name == "forces"):
        return [None] * len(fidelities)
    asked = f"those of the fidelities {' and '.join(map(str, fidelities))}" if len(fidelities) > 1 else "one"
    raise ConfigError(
        f"{first_few(paths)}: data.{name}_key names {'no key' if keys is None else ', '.join(keys)}, but {asked} are "
        "needed: give a list with one for each, in this order"
    )


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
        raise DataError(f"{path}: contains no structures: take a file with data")
    return _built(path, frames, keys, elements, labelled, 0)


def _built(
    path: Path,
    frames: Sequence[Atoms],
    keys: Sequence[tuple[str | None, str | None]],
    elements: Sequence[str] | None,
    labelled: bool,
    first: int,
) -> Structures:
    """Structures of frames, before which there are `first` others in the file."""
    label = _file_label(path)
    labels = tuple(f"{label}/{first + i}" for i in range(1, len(frames) + 1))
    energies, forces = None, None
    if labelled:
        energies, forces = _energies_and_forces(path, frames, keys, first)
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
        raise DataError(f"{path}: {error}") from error


def _frames(path: Path) -> Iterator[Atoms]:
    try:
        for number, frame in enumerate(ase.io.iread(path, index=":", do_not_split_by_at_sign=True), start=1):
            if frame.pbc.any():
                raise DataError(
                    f"{path}: frame {number} is periodic, only molecules can be used so far: "
                    'leave out its Lattice or write pbc="F F F"'
                )
            yield frame
    except InputError:
        raise
    except Exception as error:  # ASE's many readers raise whatever their parsing runs into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: ASE cannot read it ({reason}): correct the file or its suffix") from error


def _energies_and_forces(
    path: Path, frames: Sequence[Atoms], keys: Sequence[tuple[str | None, str | None]], first: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Energies [K, n_frames] and forces [K, n_atoms, 3], NaN where there are none; None instead of no forces at all."""
    energies = np.full((len(keys), len(frames)), np.nan)
    offsets = np.cumsum([0] + [len(frame) for frame in frames])
    forces = np.full((len(keys), offsets[-1], 3), np.nan)
    for i, frame in enumerate(frames):
        where = f"{path}: frame {first + i + 1}"
        values = _values(frame)
        # Of several levels a frame may lack some, but not all.
        present = [k for k, (key, _) in enumerate(keys) if key in values] if len(keys) > 1 else [0]
        if not present:
            raise DataError(
                f"{where} has no energy under any of the keys {', '.join(str(key) for key, _ in keys)}{_others(values)}"
            )
        for k in present:
            energies[k, i], of_frame = _energy_and_forces(where, values, len(frame), *keys[k])
            if len(keys) > 1 and np.isnan(energies[k, i]):
                raise DataError(f"{where}: {keys[k][0]} is NaN: correct it or leave it out of the frame")
            if of_frame is not None:
                forces[k, offsets[i] : offsets[i + 1]] = of_frame
    return energies, None if np.isnan(forces).all() else forces


def _check_levels(
    paths: Sequence[Path], keys: Sequence[str | None], parts: Sequence[Structures], selection: Selection
) -> None:
    known = np.any([part.known_energies.any(axis=1) for part in parts], axis=0)
    lacking = " or ".join(str(key) for key, at_level in zip(keys, known, strict=True) if not at_level)
    if lacking and selection.if_incomplete != "keep":
        raise DataError(
            f"{first_few(paths)}: no frame has an energy under the key {lacking}: leave the file or the level out"
        )
    if lacking:
        log.warning("%s: no frame has an energy under the key %s", first_few(paths), lacking)


def _values(frame: Atoms) -> dict[str, Any]:
    """All that a frame has, by key."""
    # ASE moves `energy` and `forces` into a calculator and leaves other keys in info (frame) and arrays (atoms).
    return {**frame.info, **frame.arrays, **(frame.calc.results if frame.calc is not None else {})}


def _others(values: Mapping[str, Any]) -> str:
    others = sorted(key for key, value in values.items() if "energy" in key.lower() and np.size(value) == 1)
    return f", only {', '.join(others)}: name the key" if others else ": add it or leave the frame out"


def _energy_and_forces(
    where: str, values: Mapping[str, Any], n_atoms: int, energy_key: str | None, forces_key: str | None
) -> tuple[float, np.ndarray | None]:
    energy_keys = (energy_key,) if energy_key is not None else _ENERGY_KEYS
    found = [key for key in energy_keys if key in values]
    if not found:
        raise DataError(f"{where} has no energy under the key {' or '.join(energy_keys)}{_others(values)}")
    energies = [_number(values[key], f"{where}: {key}") for key in found]
    if len(set(energies)) > 1 and not np.isnan(energies).all():
        raise DataError(f"{where} has different numbers under {' and '.join(found)}: name the key to use")
    if forces_key is None:
        # Prefer the partner of the energy that was taken.
        wanted = [key.replace("energy", "forces") for key in found if "energy" in key]
    else:
        wanted = [forces_key]
    for key in wanted:
        if key in values:
            return energies[0], _vectors(values[key], n_atoms, f"{where}: {key}")
    return energies[0], None


def _number(value: object, what: str) -> float:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.size != 1:
        raise DataError(f"{what} is {value!r}, not one number: correct it or name another key")
    return float(array.reshape(()))


def _vectors(value: object, n_atoms: int, what: str) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != (n_atoms, 3):
        raise DataError(f"{what} is not three numbers for each of the {n_atoms} atoms: correct it")
    if np.isnan(array).any():
        raise DataError(f"{what} has a NaN: correct it or leave the forces of this frame out")
    return array
