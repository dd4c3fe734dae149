"""PyKinML's SQLite databases: one file per molecule, geometries with energies and forces at several fidelities.

The file name is the formula in atom order: `C5H5.db` holds five C, then five H; `CH3OH.db` C, H, H, H, O, H. What
follows a `_`, `-` or `.` in the name only tells files apart (`C5H5_run2.db`). Arrays are numpy `.npy` blobs, `force` is
−dE/dx. Nothing here ever unpickles a blob.
"""

from __future__ import annotations

import io
import os
import re
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols
from ase.symbols import string2symbols

from kinml_fast.data.files import replacing
from kinml_fast.data.structures import Structures, formula_in_order
from kinml_fast.errors import InputError

_SCHEMA = """
CREATE TABLE meta (
    config TEXT NOT NULL,
    created_at TIMESTAMP DEFAULT (datetime('now','localtime'))
);
CREATE TABLE xyz (
    id integer PRIMARY KEY,
    calc text,
    calc_params array,
    temp real,
    name text,
    dist real,
    geom array NOT NULL,
    created_at TIMESTAMP DEFAULT (datetime('now','localtime'))
);
CREATE TABLE energy (
    id integer PRIMARY KEY,
    fidelity integer,
    sample_set_id integer,
    calc text NOT NULL,
    calc_params array,
    E real NOT NULL,
    force array,
    Hessian array,
    xyz_id integer NOT NULL,
    created_at TIMESTAMP DEFAULT (datetime('now','localtime')),
    FOREIGN KEY (xyz_id) REFERENCES xyz (id)
);
"""


def formula_symbols(name: str, where: str) -> tuple[str, ...]:
    """Chemical symbols in atom order of a file name's formula: "CH3OH" → C, H, H, H, O, H.

    Raises
    ------
    InputError
        It is no formula; `where` names the file.
    """
    formula = re.split(r"[-_.]", name, maxsplit=1)[0]
    try:
        symbols = tuple(string2symbols(formula))
    except (ValueError, KeyError):
        symbols = ()
    if not symbols or any(symbol not in chemical_symbols[1:] for symbol in symbols):
        raise InputError(f"{where}: the file name must begin with a formula like C5H5 or CH3OH: rename the file")
    return symbols


def write(
    path: str | os.PathLike,
    levels: Mapping[int, Structures],
    *,
    temperatures: float | Sequence[float] | np.ndarray,
    names: str | Sequence[str] = "",
    calc: str | Mapping[int, str] = "unknown",
    calc_params: Mapping[int, Mapping[str, str]] | None = None,
    geometry_calc: str | None = None,
    sample_set: int = 1,
    created_at: str | None = None,
) -> None:
    """Write a database that PyKinML and `read` take, replacing an older file of that name in one step.

    Parameters
    ----------
    path
        Its stem is the formula in atom order, which must fit every structure.
    levels
        For each fidelity the structures with their energies and, where known, forces; the geometries are the same in
        all of them. They get the ids 1, 2, … in their order.
    temperatures
        K, one for all or one per structure. Readers that name no temperature take only those above 0.
    names
        What selections by name look for, one for all or one per structure.
    calc
        The program or method of the energies, one for all or one per fidelity.
    calc_params
        Per fidelity the settings of that method. Each energy stores them as an array of [key, value] strings, the
        first of which is ["label", "C5H5/17"]: PyKinML takes the structure's name from there.
    geometry_calc
        How the geometries were made; default: `calc` of the highest fidelity.
    sample_set
        `sample_set_id` of all energies.
    created_at
        Time stamp of all rows; default: now. With a fixed one equal input gives an equal file.

    Raises
    ------
    InputError
        The levels do not fit together or not the formula, or the file cannot be written (nothing is changed then).
    """
    path = Path(path)
    if not levels:
        raise InputError(f"{path}: no fidelity to write: give at least one")
    geometries = levels[max(levels)]
    count = len(geometries)
    symbols = formula_symbols(path.stem, str(path))
    _check_levels(path, levels, symbols)
    calcs = {fidelity: calc if isinstance(calc, str) else calc[fidelity] for fidelity in levels}
    temperatures = np.broadcast_to(np.asarray(temperatures, dtype=np.float64), (count,)).tolist()
    names = [names] * count if isinstance(names, str) else list(names)
    if len(names) != count:
        raise InputError(f"{path}: {len(names)} names given for {count} structures: give one for each")
    stamp = [] if created_at is None else [created_at]
    columns = ", created_at" if stamp else ""
    more = ",?" if stamp else ""

    def blobs(values: np.ndarray) -> list[bytes]:
        return [_npy(value) for value in values.reshape(count, len(symbols), 3)]

    def parameters(settings: Mapping[str, str]) -> list[bytes]:
        pairs = [list(map(str, pair)) for pair in settings.items()]
        return [_npy(np.array([["label", f"{path.stem}/{i}"], *pairs])) for i in range(1, count + 1)]

    plain = parameters({})
    with replacing(path) as temporary:
        try:
            with closing(sqlite3.connect(temporary, isolation_level=None)) as database:
                # The file is private until it is renamed: a journal would only cost time.
                database.execute("PRAGMA journal_mode = OFF")
                database.execute("PRAGMA synchronous = OFF")
                database.executescript(_SCHEMA)
                database.execute("BEGIN")
                database.execute(f"INSERT INTO meta (config{columns}) VALUES (?{more})", [path.stem, *stamp])
                origin = geometry_calc or calcs[max(levels)]
                database.executemany(
                    f"INSERT INTO xyz (id, calc, calc_params, temp, name, geom{columns}) VALUES (?,?,?,?,?,?{more})",
                    [
                        (i + 1, origin, plain[i], temperatures[i], names[i], geometry, *stamp)
                        for i, geometry in enumerate(blobs(geometries.coordinates))
                    ],
                )
                for fidelity in sorted(levels, reverse=True):
                    level = levels[fidelity]
                    settings = parameters((calc_params or {}).get(fidelity, {}))
                    forces = [None] * count
                    if level.forces is not None:
                        absent = np.isnan(level.forces).reshape(count, -1).all(axis=1)
                        forces = [None if a else b for a, b in zip(absent, blobs(level.forces), strict=True)]
                    database.executemany(
                        "INSERT INTO energy (fidelity, sample_set_id, calc, calc_params, E, force, xyz_id"
                        f"{columns}) VALUES (?,?,?,?,?,?,?{more})",
                        [
                            (fidelity, sample_set, calcs[fidelity], settings[i], energy, forces[i], i + 1)
                            + tuple(stamp)
                            for i, energy in enumerate(level.energies.tolist())
                        ],
                    )
                database.execute("COMMIT")
        except sqlite3.Error as error:
            raise InputError(f"{path}: could not be written ({error}): nothing was changed") from error


def _check_levels(path: Path, levels: Mapping[int, Structures], symbols: tuple[str, ...]) -> None:
    reference = levels[max(levels)]
    for fidelity, level in levels.items():
        if level.energies is None:
            raise InputError(f"{path}: fidelity {fidelity} has no energies: a database needs one for each structure")
        if len(level) != len(reference) or not np.array_equal(level.coordinates, reference.coordinates):
            raise InputError(
                f"{path}: fidelities {fidelity} and {max(levels)} have different geometries: give the same ones"
            )
        expected = [level.elements.index(symbol) if symbol in level.elements else -1 for symbol in symbols]
        for i in range(len(level)):
            if not np.array_equal(level.species[level.offsets[i] : level.offsets[i + 1]], expected):
                raise InputError(
                    f"{path}: {level.labels[i]} has the atoms {formula_in_order(level.symbols(i))}, which is not "
                    "the formula of the file name: write one file per formula and atom order"
                )


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
