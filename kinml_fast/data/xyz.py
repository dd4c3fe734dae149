"""Extended XYZ, and every other file of molecules and crystals that ASE reads."""

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
from ase.stress import voigt_6_to_full_3x3_stress

from kinml_fast.data import xyz_text
from kinml_fast.data.fidelities import merge
from kinml_fast.data.files import expand, first_few, is_ase_database
from kinml_fast.data.selection import Selection
from kinml_fast.data.structures import Structures, concatenate, element_order
from kinml_fast.errors import ConfigError, DataError, InputError

log = logging.getLogger(__name__)

_ENERGY_KEYS = ("energy", "REF_energy")
_STRESS_NAMES = ("stress", "virial", "virials")
"""What stands for "energy" in the key of a stress that belongs to the key of an energy."""
_STATE_KEYS = {
    "the charge": ("charge", "total_charge"),
    "the multiplicity": ("multiplicity", "mult", "spin_multiplicity"),
    "the spin": ("spin", "total_spin"),
}
"""What other programs call them in the comment of a frame."""
_OTHER_UNITS = frozenset(
    ["hartree", "hartrees", "ha", "eh", "a.u.", "au", "ry", "rydberg", "kcal/mol", "kj/mol", "kcal", "kj", "bohr"]
)
"""Words of a comment that name units in which nothing is taken."""

_Keys = tuple[str | None, str | None, str | None]
"""Those of energy, forces and stress at one level."""


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
        forces without one have the energy's key with "forces" or "force" for "energy" (`dft_energy` goes with
        `dft_forces`), so that both never come from two methods, and a frame need not have any; with "grad" in their key
        they are gradients, whose sign is changed; a stress without one has "stress",
        "virial" or "virials" for "energy". Of several levels of theory, each with a key, a frame has at least one.
        Files of one name in different folders may then have one level each: frames are matched by their numbers. Where
        incomplete structures are kept, it is only logged that a file has nothing at all of one level.
    labelled
        False: take geometries only, whatever energies, forces and stresses the files have.

    Notes
    -----
    A stress is what ASE calls so: dE/dε / volume in eV/Å³, six numbers xx yy zz yz xz xy or nine. A virial, by the name
    of its key, is -dE/dε in eV, as in QUIP and GAP: stress = -virial / volume. A frame that is periodic (pbc) along any
    vector is a crystal, another one a molecule, whatever its Lattice is.

    Returns
    -------
    Structures
        With the levels `selection.fidelities_read`. Labels are "file.xyz/3" (counted from 1; white space in a file name
        becomes "_"), of files that have one name "folder/file.xyz/3". With several levels energies and forces have a
        leading dimension and are NaN where a frame lacks one.

    Raises
    ------
    InputError
        A file that ASE cannot read, a frame without energy or with two that differ, numbers that `Structures` refuses;
        another number of keys than of levels.
    """
    paths = expand(files)
    keys = _all_keys(selection, paths)
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(_file_label(path), []).append(path)
    if len(keys) == 1:
        groups = {label: [path] for same in groups.values() for label, path in _told_apart(same).items()}
    parts = []
    remarks = _Remarks(keys)
    for label, same_label in groups.items():
        found = [_read_one(path, label, keys, selection, labelled, remarks) for path in same_label]
        if labelled and len(keys) > 1:
            _check_levels(same_label, [energy_key for energy_key, *_ in keys], found, selection)
        parts += found if len(found) < 2 else [merge(concatenate(found))]
    if labelled:
        remarks.warn()
    return concatenate(parts, selection.elements)


def pieces(path: Path, selection: Selection, size: int) -> Iterator[Structures]:
    """What `read` gives of one file, at most `size` structures at a time; not more of it is in memory.

    Raises
    ------
    InputError
        As `read`, where it is found in the piece that is read.
    """
    keys = _all_keys(selection, [path])
    left, first = frames(path, selection.format), 0
    remarks = _Remarks(keys)
    while some := list(itertools.islice(left, size)):
        remarks.add(path, some, first)
        yield _built(path, _file_label(path), some, keys, selection.elements, True, first)
        first += len(some)
    remarks.warn()


class _Remarks:
    """What is said of frames that are read: charges and multiplicities that differ, gradients not taken, units."""

    def __init__(self, keys: Sequence[_Keys]) -> None:
        self._forces_unnamed = any(forces is None for _, forces, _ in keys)
        self._first: dict[str, dict[float, str]] = {}
        """For each kind its values, and where each is first."""
        self._gradients: tuple[str, str] | None = None
        """Where they are first, and their key."""
        self._unit: tuple[str, str] | None = None
        """Where one is named first, and how."""

    def add(self, path: Path, frames: Sequence[Atoms], first: int) -> None:
        """Look at frames, before which there are `first` others in the file."""
        for i, frame in enumerate(frames, start=first + 1):
            for kind, keys in _STATE_KEYS.items():
                value = next((frame.info[key] for key in keys if key in frame.info), None)
                if isinstance(value, int | float | np.number) and not isinstance(value, bool):
                    self._first.setdefault(kind, {}).setdefault(float(value), f"{path}: frame {i}")
            if self._forces_unnamed and self._gradients is None:
                key = next((key for key in frame.arrays if _is_gradient(key)), None)
                has_forces = frame.calc is not None and "forces" in frame.calc.results
                if key is not None and not has_forces:
                    self._gradients = f"{path}: frame {i}", key
            if self._unit is None:
                words = (key if value is True else value for key, value in frame.info.items())
                word = next((word for word in words if isinstance(word, str) and word.lower() in _OTHER_UNITS), None)
                self._unit = None if word is None else (f"{path}: frame {i}", word)

    def warn(self) -> None:
        """Say what differs."""
        for kind, values in self._first.items():
            if len(values) > 1:
                (one, where), (other, there), *_ = values.items()
                log.warning(
                    "%s has %s %g and %s %g: a model knows nothing of it and gives all the same energies; train on one",
                    *(where, kind, one, there, other),
                )
        if self._gradients is not None:
            where, key = self._gradients
            log.warning("%s has %s, no forces: the key %s for forces takes them with the other sign", where, key, key)
        if self._unit is not None:
            log.warning("%s names %s in its comment line, but energies are taken as eV and lengths as Å", *self._unit)


def _all_keys(selection: Selection, paths: Sequence[Path]) -> list[_Keys]:
    """The keys of each level."""
    of_kinds = [
        _keys(name, getattr(selection, f"{name}_key"), selection, paths) for name in ("energy", "forces", "stress")
    ]
    return list(zip(*of_kinds, strict=True))


def _keys(
    name: str, key: str | Sequence[str] | None, selection: Selection, paths: Sequence[Path]
) -> Sequence[str | None]:
    """The key of each level; None where the user leaves it to the file."""
    fidelities = selection.fidelities_read
    keys = [key] if isinstance(key, str) else key
    if keys is not None and len(keys) == len(fidelities):
        return keys
    if keys is None and (len(fidelities) == 1 or name != "energy"):
        return [None] * len(fidelities)
    asked = f"those of the fidelities {' and '.join(map(str, fidelities))}" if len(fidelities) > 1 else "one"
    raise ConfigError(
        f"{first_few(paths)}: data.{name}_key names {'no key' if keys is None else ', '.join(keys)}, but {asked} are "
        "needed: give a list with one for each, in this order"
    )


def _file_label(path: Path) -> str:
    return _one_word(path.name)


def _one_word(name: str) -> str:
    """A name for split files, whose words stand between white space and whose comments begin with #."""
    word = "_".join(name.split())
    return f"_{word[1:]}" if word.startswith("#") else word


def _told_apart(paths: Sequence[Path]) -> dict[str, Path]:
    """Files of one name by labels with as many of their folders as make them different."""
    depth, whole = 1, [path.resolve().parts for path in paths]
    while True:
        labels = [_one_word("/".join(parts[-depth:])) for parts in whole]
        if len(set(labels)) == len(paths) or depth > max(map(len, whole)):
            return dict(zip(labels, paths, strict=True))
        depth += 1


def _read_one(
    path: Path,
    label: str,
    keys: Sequence[_Keys],
    selection: Selection,
    labelled: bool,
    remarks: _Remarks,
) -> Structures:
    found = list(frames(path, selection.format))
    if not found:
        raise DataError(f"{path}: contains no structures: take a file with data")
    remarks.add(path, found, 0)
    return _built(path, label, found, keys, selection.elements, labelled, 0)


def _built(
    path: Path,
    label: str,
    frames: Sequence[Atoms],
    keys: Sequence[_Keys],
    elements: Sequence[str] | None,
    labelled: bool,
    first: int,
) -> Structures:
    """Structures of frames, before which there are `first` others in the file."""
    labels = tuple(f"{label}/{first + i}" for i in range(1, len(frames) + 1))
    energies, forces, stresses = None, None, None
    if labelled:
        found = _values_of(path, frames, keys, first)
        energies, forces, stresses = (x if x is None or len(keys) > 1 else x[0] for x in found)
    periodic = np.array([frame.pbc for frame in frames], dtype=np.int64).reshape(-1, 3)
    cells = None
    if periodic.any():
        cells = np.array([frame.cell.array if frame.pbc.any() else np.zeros((3, 3)) for frame in frames])
    numbers = np.concatenate([frame.numbers for frame in frames])
    present, inverse = np.unique(numbers, return_inverse=True)
    for number, frame in enumerate(frames, start=first + 1):
        wrong = frame.numbers[(frame.numbers < 0) | (frame.numbers >= len(chemical_symbols))]
        if len(wrong):
            raise DataError(f"{path}: frame {number}: {wrong[0]} is the atomic number of no element: correct it")
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
            cells=cells,
            periodic=None if cells is None else periodic,
            stresses=stresses,
        )
    except InputError as error:
        raise DataError(f"{path}: {error}") from error


def frames(path: Path, form: str | None = None) -> Iterator[Atoms]:
    """The frames of a file, one after another.

    Parameters
    ----------
    path
        The file.
    form
        ASE's name of its format; None: XYZ by its suffix, others as ASE recognises them.

    Raises
    ------
    DataError
        It cannot be read to its end.
    """
    try:
        if form == "extxyz" or (form is None and xyz_text.is_xyz(path)):
            yield from xyz_text.frames(path)
            return
        if form is None and is_ase_database(path):
            form = "db"
        yield from ase.io.iread(path, index=":", format=form, do_not_split_by_at_sign=True)
    except InputError:
        raise
    except Exception as error:  # ASE's many readers raise whatever their parsing runs into
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: ASE cannot read it ({reason}): correct the file or its suffix, or name its format"
        ) from error


def _values_of(
    path: Path, frames: Sequence[Atoms], keys: Sequence[_Keys], first: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Energies [K, n_frames], forces [K, n_atoms, 3] and stresses [K, n_frames, 3, 3].

    NaN where there are none; None instead of no forces or stresses at all.
    """
    energies = np.full((len(keys), len(frames)), np.nan)
    offsets = np.cumsum([0] + [len(frame) for frame in frames])
    forces = np.full((len(keys), offsets[-1], 3), np.nan)
    stresses = np.full((len(keys), len(frames), 3, 3), np.nan)
    for i, frame in enumerate(frames):
        where = f"{path}: frame {first + i + 1}"
        values = _values(frame)
        # Of several levels a frame may lack some, but not all.
        present = [k for k, (key, *_) in enumerate(keys) if _meant(values, str(key))] if len(keys) > 1 else [0]
        if not present:
            raise DataError(
                f"{where} has no energy under any of the keys {', '.join(str(key[0]) for key in keys)}{_others(values)}"
            )
        for k in present:
            energies[k, i], of_frame, stress = _of_level(where, frame, values, keys[k])
            if len(keys) > 1 and np.isnan(energies[k, i]):
                raise DataError(f"{where}: {keys[k][0]} is NaN: correct it or leave it out of the frame")
            if of_frame is not None:
                forces[k, offsets[i] : offsets[i + 1]] = of_frame
            if stress is not None:
                stresses[k, i] = stress
    return energies, _if_any(forces), _if_any(stresses)


def _if_any(values: np.ndarray) -> np.ndarray | None:
    return None if np.isnan(values).all() else values


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
    numbers = sorted(key for key, value in values.items() if np.ndim(value) == 0 and not isinstance(value, bool | str))
    others = [key for key in numbers if "energy" in key.lower()] or numbers
    return f", only {', '.join(others)}: name the key" if others else ": add it or leave the frame out"


def _of_level(
    where: str, frame: Atoms, values: Mapping[str, Any], keys: _Keys
) -> tuple[float, np.ndarray | None, np.ndarray | None]:
    """Energy, forces [n, 3] and stress [3, 3] of a frame at one level; None of what it does not have."""
    energy_key, forces_key, stress_key = keys
    energy_keys = (energy_key,) if energy_key is not None else _ENERGY_KEYS
    found = {name: key for name in energy_keys if (key := _meant(values, name)) is not None}
    if not found:
        raise DataError(f"{where} has no energy under the key {' or '.join(energy_keys)}{_others(values)}")
    energies = [_number(values[key], f"{where}: {key}") for key in found.values()]
    if len(set(energies)) > 1 and not np.isnan(energies).all():
        raise DataError(f"{where} has different numbers under {' and '.join(found.values())}: name the key to use")
    # Prefer the partners of the energy that was taken.
    partners = [name for name in found if "energy" in name]
    wanted = [name.replace("energy", kind) for kind in ("forces", "force") for name in partners]
    key = _first_meant(values, wanted if forces_key is None else [forces_key])
    forces = None if key is None else _vectors(values[key], len(frame), f"{where}: {key}")
    if forces is not None and forces_key is not None and _is_gradient(forces_key):
        forces = -forces
    wanted = [name.replace("energy", kind) for name in partners for kind in _STRESS_NAMES]
    key = _first_meant(values, wanted if stress_key is None else [stress_key])
    stress = None if key is None else _stress(values[key], frame, key, f"{where}: {key}")
    return energies[0], forces, stress


def _meant(values: Mapping[str, Any], name: str) -> str | None:
    """The key that has this name, or else the only one that differs from it in capitals alone."""
    if name in values:
        return name
    alike = [key for key in values if key.lower() == name.lower()]
    return alike[0] if len(alike) == 1 else None


def _first_meant(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((key for name in names if (key := _meant(values, name)) is not None), None)


def _is_gradient(key: str) -> bool:
    """Whether what stands under a key is, by its name, the gradient of the energy."""
    return "grad" in key.lower()


def _number(value: object, what: str) -> float:
    if isinstance(value, bool | np.bool_):
        word = what.rpartition(" ")[2]
        raise DataError(f"{what} is a word of its comment line, not a number: write {word}=NUMBER there")
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


def _stress(value: object, frame: Atoms, key: str, what: str) -> np.ndarray:
    """The stress [3, 3] in eV/Å³ that stands under a key, of a crystal."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape == (6,):
        array = voigt_6_to_full_3x3_stress(array)
    elif array.shape in ((9,), (3, 3)):
        array = array.reshape(3, 3)
    else:
        raise DataError(f"{what} is not six numbers (xx yy zz yz xz xy) or nine: correct it")
    if not np.isfinite(array).all():
        raise DataError(f"{what} has a NaN or infinite number: correct it or leave the stress of this frame out")
    if not frame.pbc.any():
        raise DataError(f"{what} is given of a molecule, which has none: give its Lattice and pbc, or leave it out")
    if "virial" in key.lower():
        volume = frame.cell.volume
        if volume == 0:
            raise DataError(f"{what} is given with a cell without volume: give three vectors, or leave it out")
        array = -array / volume
    return array
