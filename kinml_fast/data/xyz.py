"""Extended XYZ, and every other file of molecules that ASE reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from kinml_fast.data.files import check_distinct, expand
from kinml_fast.data.structures import Structures, concatenate, element_order
from kinml_fast.errors import InputError

_ENERGY_KEYS = ("energy", "REF_energy")
_FORCES_KEYS = ("forces", "REF_forces")


def read(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    energy_key: str | None = None,
    forces_key: str | None = None,
    elements: Sequence[str] | None = None,
    labelled: bool = True,
) -> Structures:
    """Structures of files that ASE reads, in the order of the files and of their frames.

    Parameters
    ----------
    files
        Paths, glob patterns or `shipped:NAME`, see `files.expand`.
    energy_key
        Name of the energy (eV); default: `energy` or `REF_energy`, whichever a frame has.
    forces_key
        Name of the forces (eV/Å), which a frame need not have. Default: the energy's key with "forces" for "energy"
        (`dft_energy` goes with `dft_forces`), so that energies and forces never come from two methods.
    elements
        Order of `species`; default: alphabetical.
    labelled
        False: take geometries only, whatever energies and forces the files have.

    Returns
    -------
    Structures
        Labels are "file.xyz/3" (counted from 1; white space in a file name becomes "_").

    Raises
    ------
    InputError
        A file that ASE cannot read, a frame without energy or with two that differ, a periodic frame, numbers that
        `Structures` refuses.
    """
    paths = expand(files)
    check_distinct(paths, _file_label)
    parts = [_read_one(path, energy_key, forces_key, elements, labelled) for path in paths]
    return concatenate(parts, elements)


def _file_label(path: Path) -> str:
    # Split files separate words by white space.
    return "_".join(path.name.split())


def _read_one(
    path: Path, energy_key: str | None, forces_key: str | None, elements: Sequence[str] | None, labelled: bool
) -> Structures:
    frames = list(_frames(path))
    if not frames:
        raise InputError(f"{path}: contains no structures: take a file with data")
    label = _file_label(path)
    labels = tuple(f"{label}/{i}" for i in range(1, len(frames) + 1))
    energies, forces = None, None
    if labelled:
        pairs = [
            _energy_and_forces(f"{path}: frame {i}", frame, energy_key, forces_key)
            for i, frame in enumerate(frames, start=1)
        ]
        energies = np.array([energy for energy, _ in pairs])
        if any(force is not None for _, force in pairs):
            forces = np.concatenate(
                [
                    np.full((len(frame), 3), np.nan) if force is None else force
                    for frame, (_, force) in zip(frames, pairs, strict=True)
                ]
            )
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


def _energy_and_forces(
    where: str, frame: Atoms, energy_key: str | None, forces_key: str | None
) -> tuple[float, np.ndarray | None]:
    # ASE moves `energy` and `forces` into a calculator and leaves other keys in info (frame) and arrays (atoms).
    results = frame.calc.results if frame.calc is not None else {}
    there = {**frame.info, **frame.arrays, **results}
    energy_keys = (energy_key,) if energy_key is not None else _ENERGY_KEYS
    found = [key for key in energy_keys if key in there]
    if not found:
        others = sorted(key for key in {**frame.info, **results} if "energy" in key.lower())
        raise InputError(
            f"{where} has no energy under the key {' or '.join(energy_keys)}"
            + (f", only {', '.join(others)}: name the key" if others else ": add it or leave the frame out")
        )
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
            return values[0], _vectors(there[key], len(frame), f"{where}: {key}")
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
