"""PyKinML's HDF5 files of descriptors (its `input_data_type = 'aev'`).

Group `Base_Group` with the attributes `Types` (elements, in the order of the descriptor) and `ndat` (structures), and

| data set | shape | |
|---|---|---|
| symbols | [ndat, ≥ 32] text | elements of the atoms, padded with empty text; older files: a Python list as text |
| xip, xfp | [ndat] | rows of xp of a structure: xip[i] to xfp[i], in the order of its `symbols` |
| xp | [all atoms, 3] | coordinates, Å |
| xit, xft | [ndat, n_types] | rows of xx and dxx of a structure's atoms of a type: xit[i, t] to xft[i, t] |
| xx | [all atoms, D] | descriptors |
| dxx | [all atoms] of [D · 3n] | Jacobians, row-major [D, 3n]: column 3q + c for coordinate c of atom q, 1/Å |
| yy | [ndat, 1] | energies with single-atom energies, eV |
| ww | [ndat, 1] | weights, which PyKinML does not use |
| ff | [ndat, 1] of [3n] | forces, −dE/dx, eV/Å |
| met_e, met_s, met_f | [ndat], [ndat, 6], [ndat] of [3n] | energy; name, method, type, name, path, label; forces |
| tvtmsk | [ndat] | 1 training, 0 validation, −1 test |

Two orders of atoms meet in a file. Rows of xx and dxx are sorted by type within a structure and keep the order of
`symbols` within a type; xp, ff and the columns of dxx are in the order of `symbols`, and so is all that is read here.
Neither the settings of the descriptor nor units are in a file: the latter are those of PyKinML's databases.

PyKinML fills dxx with aevmod's `eval_Jac`, which is not the derivative of xx unless beta = 1 (see
`reference.jacobian`). Files without xp, dxx, ww, ff, met_* or tvtmsk are read as far as they go.
"""

from __future__ import annotations

import ast
import io
import logging
import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from kinml_fast import ops
from kinml_fast.data import stored
from kinml_fast.data.files import replacing
from kinml_fast.data.split import Split
from kinml_fast.data.stored import StoredDescriptors
from kinml_fast.data.structures import Structures, atoms_of, concatenate, element_order
from kinml_fast.errors import DataError, InputError
from kinml_fast.nn import AEVParameters

log = logging.getLogger(__name__)

GROUP = "Base_Group"
_MASKS = {"train": 1, "validation": 0, "test": -1}
_SYMBOLS_WIDTH = 32  # PyKinML's own
_LABEL = re.compile(r"\S+/\d+")
_ROWS_AT_ONCE = 512  # of dxx, which may be larger than the memory
_HEAP = b"GCOL\x01\0\0\0"
_CHECKED = 3  # structures whose descriptors are compared with those of their coordinates
_TOLERANCE = 1e-6


def read(paths: Sequence[Path], elements: Sequence[str] | None = None) -> Structures:
    """Everything of files but descriptors and Jacobians.

    Parameters
    ----------
    paths
        HDF5 files of PyKinML.
    elements
        Order of `species`; default: those that occur, alphabetically.

    Returns
    -------
    Structures
        With coordinates if the files have them (xp). Labels are those of the files ("C5H5/17") where each is there and
        different, otherwise "file.h5/3", counted from 1.

    Raises
    ------
    InputError
        A file that is damaged or of another kind, a missing data set, shapes or indices that do not fit together, an
        unknown element, a NaN or infinite number, a label that two files have.
    """
    parts: list[Structures] = []
    owners: dict[str, Path] = {}
    for path in paths:
        with _opened(path) as group:
            parts.append(_structures(path, group))
        for label in parts[-1].labels:
            if label in owners:
                raise DataError(f"{owners[label]} and {path} both have a structure {label}: leave out one of them")
            owners[label] = path
    return concatenate(parts, elements)


def read_descriptors(
    paths: Sequence[Path],
    structures: Structures,
    parameters: AEVParameters,
    dtype: torch.dtype,
    *,
    jacobian: bool,
) -> StoredDescriptors:
    """The descriptors of structures, found in files by label.

    Parameters
    ----------
    paths
        The files.
    structures
        Some structures of the files, in any order; `species` in the order of `parameters.elements`.
    parameters
        The descriptor. Its elements may stand in another order than those of a file, and may be more or fewer: blocks
        are put in place, and are zero for elements that a file does not have. Where a file has coordinates, the
        descriptors of a few structures are compared with theirs.
    dtype
        float64 or float32, of the results.
    jacobian
        Whether Jacobians are read.

    Raises
    ------
    InputError
        A structure that is in no file, descriptors of other settings, a file without Jacobians, a NaN, Jacobians that
        do not fit into memory, and what `read` raises.
    """
    result = stored.allocate(structures, parameters.length, dtype, jacobian)
    places = {label: i for i, label in enumerate(structures.labels)}
    for path in paths:
        with _opened(path) as group:
            index = _Index.of(path, group)
            columns = _columns(path, index, group, parameters)
            chosen = [(i, places.pop(label)) for i, label in enumerate(index.labels) if label in places]
            _fill(path, group, index, chosen, structures, columns, result)
        _compare_with_coordinates(path, chosen, structures, parameters, result)
    if places:
        missing = next(iter(places))
        raise DataError(
            f"{missing} has no stored descriptors in {' '.join(map(str, paths))}: leave out the files that have only "
            "coordinates, or take training.jacobian: recompute"
        )
    return result


def read_split(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Labels [ndat] and tvtmsk (int64 [ndat]; 1 training, 0 validation, −1 test) of a file.

    Raises
    ------
    InputError
        The file has no tvtmsk, or one with other numbers, and what `read` raises.
    """
    with _opened(path) as group:
        index = _Index.of(path, group)
        mask = _array(path, group, "tvtmsk", (len(index.labels),), np.int64)
    if not np.isin(mask, list(_MASKS.values())).all():
        raise DataError(f"{path}: tvtmsk contains other numbers than 1, 0 and -1: correct it or name a split file")
    return index.labels, mask


def write(
    path: str | os.PathLike, structures: Structures, descriptors: StoredDescriptors, split: Split | None = None
) -> None:
    """Write a file that PyKinML reads.

    Parameters
    ----------
    path
        The file; written as a whole or not at all.
    structures
        With energies and coordinates. PyKinML wants every element in the first structure.
    descriptors
        Of these structures, for `structures.elements` in this order; dxx is left out if there are no Jacobians.
    split
        Becomes tvtmsk and has to hold every structure; None: all are for training.

    Raises
    ------
    InputError
        Something is missing, shapes that do not fit together, or the file cannot be written.
    """
    path = Path(path)
    features, jacobian = descriptors.features, descriptors.jacobian
    n_atoms, count = len(structures.species), len(structures)
    energies, coordinates = structures.energies, structures.coordinates
    if energies is None or coordinates is None:
        lacking = "energies" if energies is None else "coordinates"
        raise DataError(f"{path}: cannot be written without {lacking}: take structures that have them")
    if structures.levels > 1:
        raise DataError(
            f"{path}: can hold one level of theory, and there are {structures.levels}: write one, Structures.level"
        )
    if features.ndim != 2 or len(features) != n_atoms:
        raise DataError(f"features of shape {list(features.shape)} given for {n_atoms} atoms, expected [{n_atoms}, D]")
    expected = (n_atoms, features.shape[1], 3 * int(structures.sizes.max(initial=0)))
    if jacobian is not None and (tuple(jacobian.shape[:2]) != expected[:2] or jacobian.shape[2] < expected[2]):
        raise DataError(f"a Jacobian of shape {list(jacobian.shape)} given, expected {list(expected)} or more columns")
    mask = np.ones(count, dtype=np.int64)
    if split is not None:
        parts = [getattr(split, part) for part in _MASKS]
        if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(count)):
            raise DataError(f"{path}: the split does not hold every structure: write only those that it holds")
        for part, value in zip(parts, _MASKS.values(), strict=True):
            mask[part] = value

    atoms = np.lexsort((structures.species, structures.owners))  # that the rows of xx belong to
    ends = np.cumsum(structures.counts(), axis=1) + structures.offsets[:-1, None]
    forces = np.full((n_atoms, 3), np.nan) if structures.forces is None else structures.forces
    flat = [forces[a:b].ravel() for a, b in zip(structures.offsets[:-1], structures.offsets[1:], strict=True)]
    flat = [row if np.isfinite(row).all() else row[:0] for row in flat]  # without forces: nothing
    width = max(_SYMBOLS_WIDTH, int(structures.sizes.max(initial=0)))
    symbols = [structures.symbols(i) for i in range(count)]

    text = h5py.string_dtype()
    with replacing(path) as temporary, _Remembering(temporary, "r+b") as room:
        with h5py.File(room, "w", locking=False) as file:
            group = file.create_group(GROUP)
            group.attrs["Types"] = list(structures.elements)
            group.attrs["ndat"] = count
            group.attrs["User"] = "kinml_fast"
            group.create_dataset("symbols", data=[[*s, *[""] * (width - len(s))] for s in symbols], dtype=text)
            group["xip"], group["xfp"] = structures.offsets[:-1], structures.offsets[1:]
            group["xit"], group["xft"] = ends - structures.counts(), ends
            group["xp"] = coordinates
            group["xx"] = features.detach().to("cpu", torch.float64).numpy()[atoms]
            group["yy"] = energies[:, None]
            group["ww"] = np.ones((count, 1))
            group["tvtmsk"] = mask
            group["met_e"] = energies
            group.create_dataset("met_s", data=[[*[""] * 5, label] for label in structures.labels], dtype=text)
            _write_rows(room, group, "met_f", (count,), flat)
            if structures.forces is not None:
                _write_rows(room, group, "ff", (count, 1), flat)
            if jacobian is not None:
                sizes = structures.sizes[structures.owners]
                rows_of_dxx = (
                    jacobian[a, :, : 3 * sizes[a]].detach().to("cpu", torch.float64).numpy().ravel() for a in atoms
                )
                _write_rows(room, group, "dxx", (n_atoms,), rows_of_dxx)
        room.check()


@dataclass(frozen=True, eq=False)
class _Index:
    """What says where things are in a file."""

    labels: tuple[str, ...]
    types: tuple[str, ...]
    species: np.ndarray
    """int64 [n_atoms], index into `types`, in the order of `symbols`"""
    offsets: np.ndarray
    """int64 [ndat + 1]"""
    rows: np.ndarray
    """int64 [n_atoms]: the row of xx and dxx of each atom"""

    @classmethod
    def of(cls, path: Path, group: h5py.Group) -> _Index:
        types = _types(path, group)
        symbols = _symbols(path, group, types)
        count = len(symbols)
        offsets = np.cumsum([0] + [len(s) for s in symbols])
        species = np.array([types.index(symbol) for s in symbols for symbol in s], dtype=np.int64)
        first = _array(path, group, "xit", (count, len(types)), np.int64)
        last = _array(path, group, "xft", (count, len(types)), np.int64)
        owners = np.repeat(np.arange(count), np.diff(offsets))
        keys = owners * len(types) + species
        counts = np.bincount(keys, minlength=count * len(types)).reshape(count, len(types))
        if not np.array_equal(last - first, counts):
            i = int(np.argmax(np.any(last - first != counts, axis=1)))
            raise DataError(
                f"{path}: xit and xft give structure {i + 1} {(last - first)[i].tolist()} atoms of "
                f"{' '.join(types)}, its symbols {counts[i].tolist()}: take an intact file"
            )
        rows = first[owners, species] + _ranks(keys)
        if not np.array_equal(np.sort(rows), np.arange(len(rows))):
            raise DataError(f"{path}: xit and xft do not give each atom its own row of xx: take an intact file")
        return cls(_labels(path, group, count), types, species, offsets, rows)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.Group]:
    """The group of a file, for reading; whatever HDF5 stumbles over becomes an InputError."""
    try:
        _check_heaps(path)
        with h5py.File(path, "r", locking=False) as file:
            if not isinstance(file.get(GROUP), h5py.Group):
                present = ", ".join(file) or "nothing"
                raise DataError(
                    f"{path}: has no group {GROUP} and is no file of PyKinML's (there is {present}): name another file"
                )
            yield file[GROUP]
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as HDF5 ({reason}): take an intact copy") from error


def _check_heaps(path: Path) -> None:
    """That HDF5 gets to the end of each global heap, where rows of different lengths are.

    They have no checksum, and of an entry for free space without length HDF5 (2.0.0) does not return:
    https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html, III.E.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        heap = content.find(_HEAP)
        while 0 <= heap <= len(content) - 16:
            (size,) = struct.unpack_from("<Q", content, heap + 8)
            end, entry = min(heap + size, len(content)), heap + 16
            while entry + 16 <= end:
                index, length = struct.unpack_from("<HxxxxxxQ", content, entry)
                if index == 0 and length == 0:
                    raise DataError(f"{path}: is damaged at byte {entry}, in rows of data: take an intact copy")
                entry += length if index == 0 else 16 + (length + 7) // 8 * 8
            heap = content.find(_HEAP, heap + 1)


class _Remembering(io.FileIO):
    """A file that remembers the first failure to write instead of raising it, which HDF5 would not survive."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self.error is None:
            try:
                done += super().write(view[done:])
            except OSError as error:
                self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def _structures(path: Path, group: h5py.Group) -> Structures:
    index = _Index.of(path, group)
    count, n_atoms = len(index.labels), len(index.species)
    _features(path, group, n_atoms)
    coordinates = None
    if "xp" in group:
        begins = _array(path, group, "xip", (count,), np.int64)
        ends = _array(path, group, "xfp", (count,), np.int64)
        if not (np.array_equal(begins, index.offsets[:-1]) and np.array_equal(ends, index.offsets[1:])):
            raise DataError(f"{path}: xip and xfp do not fit the numbers of atoms in symbols: take an intact file")
        coordinates = _array(path, group, "xp", (n_atoms, 3), np.float64)
    energies = _array(path, group, "yy", (count, 1), np.float64)[:, 0]
    try:
        return Structures(
            elements=index.types,
            species=index.species,
            coordinates=coordinates,
            offsets=index.offsets,
            energies=energies,
            forces=_forces(path, group, index),
            labels=index.labels,
        )
    except InputError as error:
        raise DataError(f"{path}: {error}") from error


def _forces(path: Path, group: h5py.Group, index: _Index) -> np.ndarray | None:
    # PyKinML leaves ff empty when all molecules have one size, and has the same numbers in met_f.
    sizes = np.diff(index.offsets)
    for name in ("ff", "met_f"):
        if name not in group:
            continue
        rows = _ragged_rows(path, group, name, len(sizes))
        if not any(len(row) for row in rows):
            continue
        forces = np.full((len(index.species), 3), np.nan)
        for i, row in enumerate(rows):
            if len(row) not in (0, 3 * sizes[i]) or not np.isfinite(row).all():
                fault = "a NaN or infinite number" if len(row) == 3 * sizes[i] else f"{len(row)} numbers"
                raise DataError(
                    f"{path}: {name} has {fault} for {index.labels[i]}, expected {3 * sizes[i]} force components: "
                    "correct it or leave the structure out"
                )
            if len(row):
                forces[index.offsets[i] : index.offsets[i + 1]] = row.reshape(-1, 3)
        return forces
    return None


def _fill(
    path: Path,
    group: h5py.Group,
    index: _Index,
    chosen: Sequence[tuple[int, int]],
    structures: Structures,
    columns: np.ndarray,
    result: StoredDescriptors,
) -> None:
    """Put what is chosen, pairs (structure of the file, structure), where it belongs."""
    atom_of_row = np.full(len(index.rows), -1, dtype=np.int64)
    for i, place in chosen:
        atoms = slice(index.offsets[i], index.offsets[i + 1])
        symbols = [index.types[s] for s in index.species[atoms]]
        if symbols != list(structures.symbols(place)):
            raise DataError(
                f"{path}: {index.labels[i]} consists of {' '.join(symbols)}, not of "
                f"{' '.join(structures.symbols(place))}: prepare the data again"
            )
        atom_of_row[index.rows[atoms]] = np.arange(structures.offsets[place], structures.offsets[place + 1])
    xx = _features(path, group, len(index.rows))
    dxx = None
    if result.jacobian is not None:
        if "dxx" not in group or group["dxx"].shape[:1] != (len(index.rows),):
            raise DataError(
                f"{path}: has no Jacobians (dxx) of all atoms: train on energies only, or on forces with "
                "training.jacobian: recompute"
            )
        dxx = group["dxx"]
    length = xx.shape[1]
    known = columns >= 0
    features = result.features.numpy()
    jacobian = None if result.jacobian is None else result.jacobian.numpy()
    sizes, owners = structures.sizes, structures.owners
    for begin in range(0, len(index.rows), _ROWS_AT_ONCE):
        atoms_of_rows = atom_of_row[begin : begin + _ROWS_AT_ONCE]
        if not (atoms_of_rows >= 0).any():
            continue
        vectors = np.asarray(xx[begin : begin + len(atoms_of_rows)], dtype=np.float64)
        slopes = None if dxx is None else dxx[begin : begin + len(atoms_of_rows)]
        for k in np.flatnonzero(atoms_of_rows >= 0):
            atom = atoms_of_rows[k]
            label = structures.labels[owners[atom]]
            if not np.isfinite(vectors[k]).all():
                raise DataError(f"{path}: row {begin + k} of xx ({label}) has a NaN or infinite number: correct it")
            features[atom, known] = vectors[k, columns[known]]
            if slopes is None or jacobian is None:
                continue
            width = 3 * int(sizes[owners[atom]])
            values = np.asarray(slopes[k], dtype=np.float64)
            if values.shape != (length * width,) or not np.isfinite(values).all():
                fault = "a NaN or infinite number" if values.shape == (length * width,) else f"{values.size} numbers"
                raise DataError(
                    f"{path}: row {begin + k} of dxx ({label}) has {fault}, expected {length} x {width} derivatives: "
                    "correct it or leave the structure out"
                )
            jacobian[atom, known, :width] = values.reshape(length, width)[columns[known]]


def _columns(path: Path, index: _Index, group: h5py.Group, parameters: AEVParameters) -> np.ndarray:
    """For each number of the descriptor its place in the vectors of a file, −1 where the file has none: int64 [D]."""
    n_radial = len(parameters.radial_shifts)
    block = len(parameters.angular_shifts) * len(parameters.sections)
    n_types = len(index.types)
    length = n_types * n_radial + n_types * (n_types + 1) // 2 * block
    found = _features(path, group, len(index.rows)).shape[1]
    if found != length:
        raise DataError(
            f"{path}: has descriptors of {found} numbers, but those of the configuration have {length} for "
            f"{' '.join(index.types)}: set descriptor.n_radial, n_angular and n_sections to those of the file"
        )
    pairs: dict[tuple[int, int], int] = {}
    for a in range(n_types):
        for b in range(a, n_types):
            pairs[a, b] = pairs[b, a] = n_types * n_radial + len(set(pairs.values())) * block
    places = [index.types.index(e) if e in index.types else None for e in parameters.elements]
    starts = [(None if p is None else p * n_radial, n_radial) for p in places]
    for i, p in enumerate(places):
        starts += [(None if p is None or q is None else pairs[p, q], block) for q in places[i:]]
    return np.concatenate([np.full(n, -1) if start is None else np.arange(start, start + n) for start, n in starts])


def _compare_with_coordinates(
    path: Path,
    chosen: Sequence[tuple[int, int]],
    structures: Structures,
    parameters: AEVParameters,
    result: StoredDescriptors,
) -> None:
    """Find descriptors of other settings, and Jacobians that are not their derivatives."""
    if structures.coordinates is None or not chosen:
        return
    places = [place for _, place in chosen]
    some = np.array(sorted({places[0], places[len(places) // 2], places[-1]})[:_CHECKED])
    few = structures.select(some)
    rows, _ = atoms_of(structures.offsets, some)
    system = ops.System(
        torch.from_numpy(structures.coordinates[rows]), torch.from_numpy(few.species), torch.from_numpy(few.offsets)
    )
    tolerance = _TOLERANCE if result.features.dtype == torch.float64 else 1e-4
    worst = float((result.features[rows] - ops.aev(system, parameters.packed())).abs().max())
    if not worst <= tolerance:
        raise DataError(
            f"{path}: its descriptors differ by up to {worst:.2g} from those of its coordinates with the settings of "
            "the configuration: set descriptor.n_radial, n_angular, n_sections, cutoffs and beta to those of the file"
        )
    if result.jacobian is not None:
        slopes = ops.aev_jacobian(system, int(few.sizes.max()), parameters.packed())
        worst = float((result.jacobian[rows][:, :, : slopes.shape[2]] - slopes).abs().max())
        if not worst <= 10 * tolerance:
            log.warning(
                "%s: its Jacobians differ by up to %.2g 1/Å from the derivatives of its descriptors, as those of "
                "aevmod's eval_Jac do, which PyKinML takes: the model will predict other forces than those that are "
                "trained; training.jacobian: recompute takes exact ones",
                path,
                worst,
            )


def _types(path: Path, group: h5py.Group) -> tuple[str, ...]:
    if "Types" not in group.attrs:
        raise DataError(f"{path}: {GROUP} has no attribute Types, the elements: take an intact file")
    types = [_text(value) for value in np.atleast_1d(group.attrs["Types"]).tolist()]
    try:
        return element_order(types, types, "Types")
    except InputError as error:
        raise DataError(f"{path}: {error}") from error


def _symbols(path: Path, group: h5py.Group, types: tuple[str, ...]) -> list[tuple[str, ...]]:
    values = np.asarray(_dataset(path, group, "symbols")[()])
    if values.ndim == 2:
        symbols = [tuple(_text(v) for v in row if len(v)) for row in values.tolist()]
    elif values.ndim == 1:
        symbols = [_from_list(path, _text(value)) for value in values.tolist()]
    else:
        raise DataError(f"{path}: symbols has the shape {list(values.shape)}, expected [ndat, n]: take an intact file")
    expected = group.attrs.get("ndat", len(symbols))
    if not symbols or len(symbols) != expected:
        raise DataError(
            f"{path}: has symbols of {len(symbols)} structures, and ndat is {expected}: take an intact file"
        )
    for i, row in enumerate(symbols):
        unknown = [symbol for symbol in row if symbol not in types]
        if unknown:
            raise DataError(
                f"{path}: structure {i + 1} contains {unknown[0]!r}, which is not among its Types {' '.join(types)}: "
                "correct it or leave the structure out"
            )
        if not row:
            raise DataError(f"{path}: structure {i + 1} has no atoms: leave it out")
    return symbols


def _from_list(path: Path, text: str) -> tuple[str, ...]:
    try:
        return tuple(map(str, ast.literal_eval(text)))
    except (ValueError, SyntaxError) as error:
        raise DataError(f"{path}: symbols has {text[:40]!r}, expected a list of elements: correct it") from error


def _labels(path: Path, group: h5py.Group, count: int) -> tuple[str, ...]:
    labels: list[str] = []
    for name, column in (("met_s", 5), ("meta", 6)):
        if name in group:
            values = np.asarray(group[name][()])
            if values.ndim == 2 and values.shape[0] == count and values.shape[1] > column:
                labels = [_text(value) for value in values[:, column].tolist()]
            break
    if len(set(labels)) == count and all(_LABEL.fullmatch(label) for label in labels):
        return tuple(labels)
    stem = "_".join(path.name.split())
    return tuple(f"{stem}/{i}" for i in range(1, count + 1))


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _dataset(path: Path, group: h5py.Group, name: str) -> h5py.Dataset:
    if not isinstance(group.get(name), h5py.Dataset):
        raise DataError(f"{path}: {GROUP} has no data set {name}: take an intact file")
    return group[name]


def _features(path: Path, group: h5py.Group, n_atoms: int) -> h5py.Dataset:
    xx = _dataset(path, group, "xx")
    if xx.ndim != 2 or len(xx) != n_atoms or xx.dtype.kind != "f":
        raise DataError(
            f"{path}: xx has the shape {list(xx.shape)} and type {xx.dtype}, expected [{n_atoms}, D] of numbers: take "
            "an intact file"
        )
    return xx


def _array(path: Path, group: h5py.Group, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    values = np.asarray(_dataset(path, group, name)[()])
    if values.shape == shape[:1] and shape[1:] == (1,):
        values = values[:, None]
    if values.shape != shape or values.dtype.kind not in "iuf" or (dtype is np.int64 and values.dtype.kind == "f"):
        raise DataError(
            f"{path}: {name} has the shape {list(values.shape)} and type {values.dtype}, expected {list(shape)} of "
            f"{'whole numbers' if dtype is np.int64 else 'numbers'}: take an intact file"
        )
    return values.astype(dtype)


def _ragged_rows(path: Path, group: h5py.Group, name: str, count: int) -> list[np.ndarray]:
    values = np.asarray(_dataset(path, group, name)[()])
    if len(values) == count and values.dtype == object and values.size == count:
        return [np.asarray(row, dtype=np.float64).ravel() for row in values.ravel()]
    if len(values) == count and values.dtype.kind == "f":
        return list(values.reshape(count, -1))
    raise DataError(f"{path}: {name} has the shape {list(values.shape)}, expected {count} rows: take an intact file")


def _write_rows(
    room: _Remembering, group: h5py.Group, name: str, shape: tuple[int, ...], rows: Iterable[np.ndarray]
) -> None:
    # One by one: h5py takes several rows for a matrix where they happen to have one length.
    data = group.create_dataset(name, shape, dtype=h5py.vlen_dtype(np.float64))
    for i, row in enumerate(rows):
        data[i] = row
        room.check()


def _ranks(keys: np.ndarray) -> np.ndarray:
    """How many equal keys come before each: int64 [n]."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.searchsorted(ordered, ordered)
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = np.arange(len(keys)) - starts
    return ranks
