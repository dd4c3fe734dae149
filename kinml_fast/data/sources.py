"""Reading data files of any kind: the content decides which reader takes a file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping, Sequence

from kinml_fast.data import sqlite, xyz
from kinml_fast.data.files import expand, is_sqlite
from kinml_fast.data.structures import Structures, concatenate


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
    """Structures of databases and of files that ASE reads, in the order of the files.

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
        As `sqlite.read` and `xyz.read`.
    """
    parts: list[Structures] = []
    for database, group in itertools.groupby(expand(files), key=is_sqlite):
        paths = list(group)
        if not database:
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
