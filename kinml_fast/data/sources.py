"""Reading data files of any kind: the content decides which reader takes a file."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from kinml_fast.data import pykinml_hdf5, sqlite, stored, xyz
from kinml_fast.data.files import expand, is_hdf5, is_sqlite
from kinml_fast.data.stored import StoredDescriptors
from kinml_fast.data.structures import Structures, concatenate
from kinml_fast.errors import InputError
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
                raise InputError(f"{path}: has changed since the data were prepared: prepare them again")
        paths = [path for path, _ in self.files]
        return pykinml_hdf5.read_descriptors(paths, structures, parameters, dtype, jacobian=jacobian)


def read(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    fidelity: int = 1,
    temperature: float | None = None,
    names: Sequence[str] | None = None,
    ids: Mapping[str, Collection[int]] | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    elements: Sequence[str] | None = None,
) -> Structures:
    """Structures of databases, of PyKinML's HDF5 files and of files that ASE reads, in the order of the files.

    What HDF5 files hold beside the structures, `DescriptorSource.load` reads.

    Parameters
    ----------
    files
        Paths, glob patterns or `shipped:NAME`, see `files.expand`.
    fidelity, temperature, names
        Selections from databases, see `sqlite.read`; other files have no such marks and are taken whole.
    ids
        Only these ids of databases, see `sqlite.read`; other files are taken whole.
    energy_key, forces_key
        For files that are not databases, see `xyz.read`.
    elements
        Order of `species`; default: alphabetical.

    Raises
    ------
    InputError
        As `sqlite.read`, `pykinml_hdf5.read` and `xyz.read`.
    """
    parts: list[Structures] = []
    for reader, group in itertools.groupby(expand(files), key=_reader):
        paths = list(group)
        if reader is pykinml_hdf5:
            parts.append(pykinml_hdf5.read(paths, elements))
            continue
        if reader is xyz:
            parts.append(xyz.read(paths, energy_key, forces_key, elements))
            continue
        wanted = None if ids is None else {path.stem: ids[path.stem] for path in paths if ids.get(path.stem)}
        if wanted is None or wanted:
            parts.append(sqlite.read(paths, fidelity, temperature, names, wanted, elements))
    if not parts:
        raise sqlite.MissingIdsError(
            "none of the structures that are asked for is in one of the data files: name their files"
        )
    return concatenate(parts, elements)


def _reader(path: Path) -> ModuleType:
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
        raise InputError(f"{path}: cannot be read ({error.strerror}): correct the path or the file's rights") from error
    return digest.hexdigest()
