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
from kinml_fast.data.files import expand, first_few, is_hdf5, is_sqlite
from kinml_fast.data.levels import Levels
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
    fidelity: int | Sequence[int] = 1,
    baseline: int | None = None,
    incomplete: str | None = None,
    temperature: float | None = None,
    names: Sequence[str] | None = None,
    ids: Mapping[str, Collection[int]] | None = None,
    energy_key: str | Sequence[str] | None = None,
    forces_key: str | Sequence[str] | None = None,
    elements: Sequence[str] | None = None,
) -> Structures:
    """Structures of databases, of PyKinML's HDF5 files and of files that ASE reads, in the order of the files.

    What HDF5 files hold beside the structures, `DescriptorSource.load` reads.

    Parameters
    ----------
    files
        Paths, glob patterns or `shipped:NAME`, see `files.expand`.
    fidelity
        Level of theory, or several, lowest first, which the result then has as its levels. For databases these are the
        fidelities to take; of other files one level is one key, see below.
    baseline
        Level that is subtracted (delta learning): energies and forces of the result are E(fidelity) - E(baseline).
    incomplete
        What becomes of structures that lack a level: "error", "drop" or, with several fidelities, "keep": unknown
        energies and forces are NaN. None: "keep" with several fidelities, "error" with a baseline.
    temperature, names
        Selections from databases, see `sqlite.read`; other files have no such marks and are taken whole.
    ids
        Only these ids of databases, see `sqlite.read`; other files are taken whole.
    energy_key, forces_key
        For files that are not databases, see `xyz.read`; with several fidelities lists with a key for each, with a
        baseline its key and that of the fidelity.
    elements
        Order of `species`; default: alphabetical.

    Raises
    ------
    InputError
        As `sqlite.read`, `pykinml_hdf5.read` and `xyz.read`; a level that no structure has, or that one lacks and must
        not; several levels of an HDF5 file, which has one.
    """
    levels = Levels.of(fidelity, baseline, incomplete)
    return read_levels(files, levels, temperature, names, ids, energy_key, forces_key, elements)[0]


def read_levels(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    levels: Levels,
    temperature: float | None = None,
    names: Sequence[str] | None = None,
    ids: Mapping[str, Collection[int]] | None = None,
    energy_key: str | Sequence[str] | None = None,
    forces_key: str | Sequence[str] | None = None,
    elements: Sequence[str] | None = None,
) -> tuple[Structures, tuple[str, ...]]:
    """What `read` does, and the labels of the structures that were dropped because they lack a level."""
    parts: list[Structures] = []
    every_level = levels.incomplete != "keep"
    for reader, group in itertools.groupby(expand(files), key=_reader):
        paths = list(group)
        if reader is pykinml_hdf5:
            if len(levels.read) > 1:
                raise InputError(
                    f"{first_few(paths)}: has energies of one level, but those of the fidelities "
                    f"{' and '.join(map(str, levels.read))} are asked for: take databases or XYZ files"
                )
            parts.append(pykinml_hdf5.read(paths, elements))
            continue
        if reader is xyz:
            keys = [_keys(name, key, levels, paths) for name, key in (("energy", energy_key), ("forces", forces_key))]
            parts.append(xyz.read(paths, *keys, elements, every_level=every_level))
            continue
        wanted = None if ids is None else {path.stem: ids[path.stem] for path in paths if ids.get(path.stem)}
        if wanted is None or wanted:
            parts.append(sqlite.read(paths, levels.read, temperature, names, wanted, elements, every_level))
    if not parts:
        raise sqlite.MissingIdsError(
            "none of the structures that are asked for is in one of the data files: name their files"
        )
    structures = concatenate(parts, elements)
    for number, known in zip(levels.read, structures.known_energies, strict=True):
        if not known.any():
            raise InputError(_absent(number, expand(files)))
    return levels.apply(structures)


def _absent(fidelity: int, paths: Sequence[Path]) -> str:
    there = sorted({number for path in paths if is_sqlite(path) for number in sqlite.fidelities(path)})
    if there and fidelity not in there:
        return (
            f"{first_few(paths)}: no energies of fidelity {fidelity}, only of {' '.join(map(str, there))}: leave it "
            "out or add files that have it"
        )
    return f"no structure that is selected has an energy of fidelity {fidelity}: widen the selection or leave it out"


def _keys(name: str, key: str | Sequence[str] | None, levels: Levels, paths: Sequence[Path]) -> str | list[str] | None:
    """The key of the only level, or those of all levels."""
    number = len(levels.read)
    keys = [key] if isinstance(key, str) else None if key is None else list(key)
    if keys is not None and len(keys) == number:
        return keys if number > 1 else keys[0]
    if keys is None and (number == 1 or name == "forces"):
        return None
    asked = f"those of the fidelities {' and '.join(map(str, levels.read))}" if number > 1 else "one"
    raise InputError(
        f"{first_few(paths)}: data.{name}_key names {'no key' if keys is None else ', '.join(keys)}, but {asked} are "
        "needed: give a list with one for each, in this order"
    )


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
