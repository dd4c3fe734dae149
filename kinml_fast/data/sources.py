"""Reading data files of any kind: the content decides which reader takes a file."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from kinml_fast.data import pykinml_hdf5, sqlite, stored, xyz
from kinml_fast.data.fidelities import complete, difference
from kinml_fast.data.files import expand, first_few, is_ase_database, is_hdf5, is_sqlite
from kinml_fast.data.selection import Selection
from kinml_fast.data.stored import StoredDescriptors
from kinml_fast.data.structures import Structures, concatenate
from kinml_fast.errors import DataError
from kinml_fast.nn import AEVParameters


@dataclass(frozen=True)
class DescriptorSource:
    """Where the stored descriptors of a data set come from: a backend that computes them, or files that have them.

    Parameters
    ----------
    backend
        "native" or "aevmod", see `stored.compute`; not used where there are files.
    files
        PyKinML's HDF5 files with the sha256 (hexadecimal) of their contents, which have all structures.
    """

    backend: str = "native"
    files: tuple[tuple[Path, str], ...] = ()

    def load(
        self, structures: Structures, parameters: AEVParameters, dtype: torch.dtype, *, jacobian: bool
    ) -> StoredDescriptors:
        """The descriptors of structures, and with `jacobian` their Jacobians, in the order of the structures.

        Raises
        ------
        InputError
            A file has changed, and what `stored.compute` and `pykinml_hdf5.read_descriptors` raise.
        """
        if not self.files:
            return stored.compute(structures, parameters, dtype, jacobian=jacobian, backend=self.backend)
        for path, digest in self.files:
            if file_digest(path) != digest:
                raise DataError(f"{path}: has changed since the data were prepared: prepare them again")
        paths = [path for path, _ in self.files]
        return pykinml_hdf5.read_descriptors(paths, structures, parameters, dtype, jacobian=jacobian)


def read(files: str | os.PathLike | Sequence[str | os.PathLike], selection: Selection = Selection()) -> Structures:
    """Structures of databases, of PyKinML's HDF5 files and of files that ASE reads, in the order of the files.

    What HDF5 files hold beside the structures, `DescriptorSource.load` reads.

    Parameters
    ----------
    files
        Paths, glob patterns or `shipped:NAME`, see `files.expand`.
    selection
        What to take of them.

    Raises
    ------
    InputError
        As `sqlite.read`, `pykinml_hdf5.read` and `xyz.read`; a level that no structure has, or that one lacks and must
        not; several levels of an HDF5 file, which has one.
    """
    return read_and_drop(files, selection)[0]


def read_and_drop(
    files: str | os.PathLike | Sequence[str | os.PathLike], selection: Selection
) -> tuple[Structures, tuple[str, ...]]:
    """What `read` does, and the labels of the structures that were dropped because they lack a level."""
    parts: list[Structures] = []
    for reader, group in itertools.groupby(expand(files), key=_reader):
        paths = list(group)
        if reader is pykinml_hdf5:
            if len(selection.fidelities_read) > 1:
                raise _one_level(paths, selection)
            parts.append(pykinml_hdf5.read(paths, selection.elements))
        elif reader is xyz:
            parts.append(xyz.read(paths, selection))
        else:
            ids = selection.ids
            of_files = None if ids is None else {path.stem: ids[path.stem] for path in paths if ids.get(path.stem)}
            if of_files is None or of_files:
                parts.append(sqlite.read(paths, replace(selection, ids=of_files)))
    if not parts:
        raise sqlite.MissingIdsError(
            "none of the structures that are asked for is in one of the data files: name their files"
        )
    structures = concatenate(parts, selection.elements)
    absent(selection, [bool(at_level.any()) for at_level in structures.known_energies], expand(files))
    structures, dropped = complete(structures, selection)
    return (structures if selection.baseline is None else difference(structures)), dropped


def pieces(files: Sequence[Path], selection: Selection, size: int) -> Iterator[Structures]:
    """What `read` reads, about `size` structures at a time, with the levels `selection.fidelities_read`.

    Structures that lack a level are there still. The selection has no ids. Files of one name, which have one level
    each, and PyKinML's HDF5 files are read as a whole.

    Raises
    ------
    InputError
        As `read`, where it is found in the piece that is read.
    """
    for reader, group in itertools.groupby(files, key=_reader):
        paths = list(group)
        if reader is pykinml_hdf5:
            if len(selection.fidelities_read) > 1:
                raise _one_level(paths, selection)
            yield pykinml_hdf5.read(paths, selection.elements)
            continue
        by_name: dict[str, list[Path]] = {}
        for path in paths:
            by_name.setdefault(path.stem if reader is sqlite else path.name, []).append(path)
        for same_name in by_name.values():
            if len(same_name) > 1:
                yield reader.read(same_name, selection)
            else:
                yield from reader.pieces(same_name[0], selection, size)


def absent(selection: Selection, known: Sequence[bool], files: Sequence[Path]) -> None:
    """Refuse data without any energy of a level of `selection.fidelities_read`; `known` says which are there."""
    for fidelity, is_known in zip(selection.fidelities_read, known, strict=True):
        if not is_known:
            raise DataError(_absent(fidelity, files))


def _one_level(paths: Sequence[Path], selection: Selection) -> DataError:
    return DataError(
        f"{first_few(paths)}: has energies of one level, but those of the fidelities "
        f"{' and '.join(map(str, selection.fidelities_read))} are asked for: take databases or XYZ files"
    )


def _absent(fidelity: int, paths: Sequence[Path]) -> str:
    present = sorted({number for path in paths if is_sqlite(path) for number in sqlite.fidelities(path)})
    if present and fidelity not in present:
        return (
            f"{first_few(paths)}: no energies of fidelity {fidelity}, only of {' '.join(map(str, present))}: leave it "
            "out or add files that have it"
        )
    return f"no structure that is selected has an energy of fidelity {fidelity}: widen the selection or leave it out"


def _reader(path: Path) -> ModuleType:
    if is_ase_database(path):
        return xyz
    return sqlite if is_sqlite(path) else pykinml_hdf5 if is_hdf5(path) else xyz


def file_digest(path: Path) -> str:
    """The sha256 (hexadecimal) of a file.

    Raises
    ------
    InputError
        The file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): correct the path or the file's rights") from error
    return digest.hexdigest()
