"""PyKinML's SQLite databases: one file per molecule, geometries with energies and forces at several fidelities.

The file name is the formula in atom order: `C5H5.db` holds five C, then five H; `CH3OH.db` C, H, H, H, O, H. What
follows a `_`, `-` or `.` in the name only tells files apart (`C5H5_run2.db`). Arrays are numpy `.npy` blobs, `force` is
−dE/dx. Nothing here ever unpickles a blob.
"""

from __future__ import annotations

import bisect
import io
import logging
import math
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from ase.data import chemical_symbols
from ase.symbols import string2symbols

from kinml_fast.data.fidelities import merge
from kinml_fast.data.files import check_distinct, expand, first_few, is_sqlite, replacing
from kinml_fast.data.selection import Selection
from kinml_fast.data.structures import Structures, concatenate, element_order, formula_in_order
from kinml_fast.errors import ConfigError, DataError, InputError, first_line

log = logging.getLogger(__name__)

_MOST_ATOMS = 100_000
"""No formula has more of one element."""
_PATIENCE = 10.0
"""Seconds in which another program may end what it writes."""

_NEEDED = {"xyz": ("id", "temp", "name", "geom"), "energy": ("fidelity", "E", "force", "xyz_id")}

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


class MissingIdsError(DataError):
    """Structures are asked for by id that are not there."""


def formula_symbols(name: str, where: str) -> tuple[str, ...]:
    """Chemical symbols in atom order of a file name's formula: "CH3OH" → C, H, H, H, O, H.

    Raises
    ------
    InputError
        It is no formula; `where` names the file.
    """
    formula = re.split(r"[-_.]", name, maxsplit=1)[0]
    counts = [int(digits) for digits in re.findall(r"[0-9]{1,9}", formula)]
    if max(counts, default=0) > _MOST_ATOMS or ("(" in formula and math.prod(counts) > _MOST_ATOMS):
        formula = ""  # ASE would write them all out
    try:
        symbols = tuple(string2symbols(formula))
    except (ValueError, KeyError):
        symbols = ()
    if not symbols or any(symbol not in chemical_symbols[1:] for symbol in symbols):
        raise DataError(f"{where}: the file name must begin with a formula like C5H5 or CH3OH: rename the file")
    return symbols


def read(files: str | os.PathLike | Sequence[str | os.PathLike], selection: Selection = Selection()) -> Structures:
    """Structures of databases at one or several fidelities, in the order of the files and then of the ids.

    Parameters
    ----------
    files
        Paths, glob patterns or `shipped:NAME`, see `files.expand`.
    selection
        What to take. Of several fidelities a structure is taken if it has one. Files of one name in different folders
        may then have one each: their structures are matched by id. Where incomplete structures are kept, it is only
        logged that a file has nothing at all of one fidelity.

    Returns
    -------
    Structures
        With the levels `selection.fidelities_read`. Labels are "C5H5/17"; the forces of a structure without any are
        NaN. With several levels energies and forces have a leading dimension and are NaN where a structure lacks one.

    Raises
    ------
    InputError
        A file that is missing, empty, damaged or lacks a table, column, fidelity or wanted id; a blob that is no
        plain float array or does not fit the formula of the file name; two energies of one geometry at a fidelity;
        numbers that `Structures` refuses; nothing selected.
    """
    paths = expand(files)
    if len(selection.fidelities_read) == 1:
        check_distinct(paths, lambda path: path.stem)
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(path.stem, []).append(path)
    _check_stems(list(groups), selection.ids)
    parts: list[Structures] = []
    for stem, same_stem in groups.items():
        if selection.ids is not None and not selection.ids.get(stem):
            continue
        ids = None if selection.ids is None else frozenset(selection.ids[stem])
        of_files, present = zip(*(_read_one(path, selection, ids) for path in same_stem), strict=True)
        _check_fidelities(same_stem, selection, present)
        found = [part for part in of_files if part is not None]
        if ids is not None:
            _check_ids(same_stem, selection, ids, found)
        parts += found if len(found) < 2 else [_by_id(merge(concatenate(found, selection.elements)))]
    if not parts:
        raise DataError(
            f"{', '.join(map(str, paths[:3]))}{' …' if len(paths) > 3 else ''}: no structure fits the selection "
            f"({_described(selection)}): widen it"
        )
    return concatenate(parts, selection.elements)


def pieces(path: Path, selection: Selection, size: int) -> Iterator[Structures]:
    """What `read` gives of one database, about `size` structures at a time; not more of it is in memory.

    Raises
    ------
    InputError
        As `read`, where it is found in the piece that is read.
    """
    symbols = formula_symbols(path.stem, str(path))
    condition, values = _of_geometries(selection)
    fidelities = selection.fidelities_read
    with _opened(path) as database:
        _check_tables(path, database, symbols)
        _check_fidelities([path], selection, [_fidelities(database)])
        _warn(path, database, fidelities)
        # Sorting large rows is SQLite's business: it does so in a temporary file.
        geometries = database.execute(*_geometries(fidelities, condition, values))
        energies = database.execute(*_energies(fidelities, condition, values))
        known: list[tuple] = []
        while some := geometries.fetchmany(size):
            last = some[-1][0]
            while (not known or known[-1][0] <= last) and (rows := energies.fetchmany(size)):
                known += rows
            count = bisect.bisect_right([row[0] for row in known], last)
            yield _built(path, symbols, selection, some, known[:count])
            known = known[count:]


def hessians(path: Path, fidelity: int) -> list[tuple[int, object, object]]:
    """Ids of geometries, geometries and second derivatives of rows that have some at a fidelity, as they are stored."""
    with _opened(path) as database:
        _check_tables(path, database, formula_symbols(path.stem, str(path)))
        if "hessian" not in {row[1].lower() for row in database.execute("PRAGMA table_info(energy)")}:
            return []
        return database.execute(
            "SELECT xyz.id, xyz.geom, energy.Hessian FROM energy JOIN xyz ON xyz.id = energy.xyz_id "
            "WHERE energy.fidelity = ? AND energy.Hessian IS NOT NULL ORDER BY xyz.id",
            (fidelity,),
        ).fetchall()


def fidelities(path: Path) -> list[int]:
    """The fidelities of the energies in a database, ascending."""
    with _opened(path) as database:
        return _fidelities(database)


def write(
    path: str | os.PathLike,
    by_fidelity: Mapping[int, Structures],
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
    by_fidelity
        For each fidelity the structures with their energies and, where known, forces; the geometries are the same in
        all of them, or some fidelities lack some of those that another has, and labels say which. They get the ids 1,
        2, … in the order of the one that has most.
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
        The structures do not fit together or not the formula, or the file cannot be written (nothing is changed then).
    """
    path = Path(path)
    if not by_fidelity:
        raise ConfigError(f"{path}: no fidelity to write: give at least one")
    geometries = by_fidelity[max(by_fidelity, key=lambda fidelity: (len(by_fidelity[fidelity]), fidelity))]
    count, coordinates = len(geometries), geometries.coordinates
    if coordinates is None:
        raise DataError(f"{path}: the structures have no coordinates: take structures that have them")
    symbols = formula_symbols(path.stem, str(path))
    rows = {fidelity: _rows(path, structures, geometries) for fidelity, structures in by_fidelity.items()}
    energies = _energies_that_fit(path, by_fidelity, geometries, rows, symbols)
    calcs = {fidelity: calc if isinstance(calc, str) else calc[fidelity] for fidelity in by_fidelity}
    of_each = np.broadcast_to(np.asarray(temperatures, dtype=np.float64), (count,)).tolist()
    names = [names] * count if isinstance(names, str) else list(names)
    if len(names) != count:
        raise ConfigError(f"{path}: {len(names)} names given for {count} structures: give one for each")
    stamp = [] if created_at is None else [created_at]
    columns = ", created_at" if stamp else ""
    more = ",?" if stamp else ""

    def blobs(values: np.ndarray) -> list[bytes]:
        return [_npy(value) for value in values.reshape(-1, len(symbols), 3)]

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
                origin = geometry_calc or calcs[max(by_fidelity)]
                database.executemany(
                    f"INSERT INTO xyz (id, calc, calc_params, temp, name, geom{columns}) VALUES (?,?,?,?,?,?{more})",
                    [
                        (i + 1, origin, plain[i], of_each[i], names[i], geometry, *stamp)
                        for i, geometry in enumerate(blobs(coordinates))
                    ],
                )
                for fidelity in sorted(by_fidelity, reverse=True):
                    structures = by_fidelity[fidelity]
                    settings = parameters((calc_params or {}).get(fidelity, {}))
                    forces: list[bytes | None] = [None] * len(structures)
                    if structures.forces is not None:
                        absent = np.isnan(structures.forces).reshape(len(structures), -1).all(axis=1)
                        forces = [None if a else b for a, b in zip(absent, blobs(structures.forces), strict=True)]
                    database.executemany(
                        "INSERT INTO energy (fidelity, sample_set_id, calc, calc_params, E, force, xyz_id"
                        f"{columns}) VALUES (?,?,?,?,?,?,?{more})",
                        [
                            (fidelity, sample_set, calcs[fidelity], settings[i], energy, force, i + 1, *stamp)
                            for i, energy, force in zip(
                                rows[fidelity], energies[fidelity].tolist(), forces, strict=True
                            )
                        ],
                    )
                database.execute("COMMIT")
        except sqlite3.Error as error:
            raise InputError(f"{path}: could not be written ({error}): nothing was changed") from error


def _check_stems(stems: Sequence[str], ids: Mapping[str, Collection[int]] | None) -> None:
    unknown = [stem for stem in ids or () if stem not in stems]
    if unknown:
        raise MissingIdsError(
            f"structures of {first_few(unknown)} are asked for, but no such database is among the files "
            f"({first_few(stems)}): add it"
        )


def _described(selection: Selection) -> str:
    fidelities, temperature = selection.fidelities_read, selection.temperature
    parts = [f"fidelit{'y' if len(fidelities) == 1 else 'ies'} {', '.join(map(str, fidelities))}"]
    parts.append("temperature above 0" if temperature is None else f"temperature {temperature:g} K")
    if selection.names is not None:
        parts.append(f"name like {' or '.join(selection.names)}")
    return ", ".join(parts)


def _of_geometries(selection: Selection) -> tuple[str, list[object]]:
    """A condition on rows of the table xyz, and its values."""
    conditions = ["xyz.temp > 0" if selection.temperature is None else "xyz.temp = ?"]
    values: list[object] = [] if selection.temperature is None else [selection.temperature]
    if selection.names is not None:
        conditions.append("(" + " OR ".join(["xyz.name LIKE ?"] * len(selection.names) or ["0"]) + ")")
        values += selection.names
    return " AND ".join(conditions), values


def _by_id(structures: Structures) -> Structures:
    return structures.select(np.argsort([int(label.rsplit("/", 1)[1]) for label in structures.labels], kind="stable"))


def _check_ids(paths: Sequence[Path], selection: Selection, ids: frozenset[int], parts: Sequence[Structures]) -> None:
    stem = paths[0].stem
    found = {label for part in parts for label in part.labels}
    missing = [label for label in (f"{stem}/{i}" for i in sorted(ids)) if label not in found]
    if missing:
        raise MissingIdsError(
            f"{first_few(paths)}: has no structure {first_few(missing)} ({_described(selection)}): correct the ids or "
            "the selection"
        )


def _read_one(path: Path, selection: Selection, ids: frozenset[int] | None) -> tuple[Structures | None, list[int]]:
    """The structures that are selected, if any are, and fidelities of the file: at least those of the selection."""
    symbols = formula_symbols(path.stem, str(path))
    geometries, energies, present = _query(path, symbols, selection)
    if ids is not None:
        geometries = [row for row in geometries if row[0] in ids]
        energies = [row for row in energies if row[0] in ids]
    return _built(path, symbols, selection, geometries, energies) if geometries else None, present


def _built(
    path: Path, symbols: tuple[str, ...], selection: Selection, geometries: Sequence[tuple], energies: Sequence[tuple]
) -> Structures:
    """Structures of rows (id, geometry) and rows (id, fidelity, E, force), as `_query` gives them."""
    wanted = selection.fidelities_read
    order = element_order(symbols, selection.elements, str(path))
    numbers, blobs = zip(*geometries, strict=True)
    stem = path.stem
    labels = tuple(f"{stem}/{number}" for number in numbers)
    where = {number: i for i, number in enumerate(numbers)}

    def arrays(blobs: Sequence[Any], rows: Sequence[int], what: str) -> np.ndarray:
        return _float_arrays(blobs, symbols, lambda row: f"{path}: the {what} of {labels[rows[row]]}")

    coordinates = arrays(blobs, range(len(labels)), "geometry")
    values = np.full((len(wanted), len(labels)), np.nan)
    forces = np.full((*values.shape, len(symbols), 3), np.nan)
    for k, fidelity in enumerate(wanted):
        of_fidelity = [row for row in energies if row[1] == fidelity]
        places = [where[row[0]] for row in of_fidelity]
        _check_energies(path, fidelity, of_fidelity)
        values[k, places] = [row[2] for row in of_fidelity]
        given = [place for place, (*_, force) in zip(places, of_fidelity, strict=True) if force is not None]
        if not given:
            continue
        found = arrays([force for *_, force in of_fidelity if force is not None], given, "force")
        absent = np.isnan(found).any(axis=(1, 2))
        if absent.any():
            raise DataError(f"{path}: the force of {labels[given[int(np.argmax(absent))]]} has a NaN: correct it")
        forces[k, given] = found
    of_levels = None if np.isnan(forces).all() else forces
    if len(wanted) == 1:
        values, of_levels = values[0], None if of_levels is None else of_levels[0]
    try:
        return Structures.of_one_formula(symbols, coordinates, values, of_levels, labels, order)
    except InputError as error:
        raise DataError(str(error) if str(error).startswith(f"{path}:") else f"{path}: {error}") from error


def _check_energies(path: Path, fidelity: int, rows: Sequence[tuple]) -> None:
    counts = Counter(row[0] for row in rows)
    if len(counts) < len(rows):
        twice = [f"{path.stem}/{number}" for number, count in counts.items() if count > 1]
        raise DataError(f"{path}: {first_few(twice)} has more than one energy of fidelity {fidelity}: keep one of them")
    for number, _, energy, _ in rows:
        # NaN is NULL in a database.
        if type(energy) not in (float, int):
            raise DataError(f"{path}: the energy of {path.stem}/{number} is {energy!r}, not a number: correct it")


def _query(path: Path, symbols: tuple[str, ...], selection: Selection) -> tuple[list[tuple], list[tuple], list[int]]:
    """Rows (id, geometry), rows (id, fidelity, E, force) of these ids, both in the order of the ids, and fidelities."""
    condition, values = _of_geometries(selection)
    fidelities = selection.fidelities_read
    with _opened(path) as database:
        _check_tables(path, database, symbols)
        energies = database.execute(*_energies(fidelities, condition, values)).fetchall()
        geometries = database.execute(*_geometries(fidelities, condition, values)).fetchall()
        _warn(path, database, fidelities)
        present = {row[1] for row in energies}
        if len(present) < len(fidelities):  # more of them need not be looked for
            present = set(_fidelities(database))
    return geometries, energies, sorted(present)


def _energies(fidelities: Sequence[int], condition: str, values: Sequence[Any]) -> tuple[str, list]:
    return (
        "SELECT xyz.id, energy.fidelity, energy.E, energy.force FROM energy JOIN xyz ON xyz.id = energy.xyz_id "
        f"WHERE energy.fidelity IN ({', '.join('?' * len(fidelities))}) AND {condition} ORDER BY xyz.id"
    ), [*fidelities, *values]


def _geometries(fidelities: Sequence[int], condition: str, values: Sequence[Any]) -> tuple[str, list]:
    return (
        f"SELECT xyz.id, xyz.geom FROM xyz WHERE {condition} AND xyz.id IN (SELECT xyz_id FROM energy WHERE "
        f"energy.fidelity IN ({', '.join('?' * len(fidelities))})) ORDER BY xyz.id"
    ), [*values, *fidelities]


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A database for reading, one state of it for all queries; whatever SQLite stumbles over becomes an InputError."""
    if not is_sqlite(path):
        raise DataError(f"{path}: is not an SQLite database: give one, or name an XYZ file .xyz")
    try:
        # mode=ro: never create a file or a journal beside somebody's data.
        address = f"file:{quote(str(path.absolute()))}?mode=ro"
        if not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
            # In WAL mode SQLite wants to write a file beside it, where nobody else can have written either.
            address += "&immutable=1"
        with closing(sqlite3.connect(address, uri=True, isolation_level=None, timeout=_PATIENCE)) as database:
            database.execute("BEGIN")
            yield database
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if "locked" in str(error):
            raise DataError(
                f"{path}: is locked by another program, which writes to it: wait until it is done, or close it"
            ) from error
        raise DataError(
            f"{path}: cannot be read as an SQLite database ({first_line(error)}): get a sound copy"
        ) from error


def _warn(path: Path, database: sqlite3.Connection, fidelities: Sequence[int]) -> None:
    """Say what looks wrong with the rows of these fidelities."""
    columns = {row[1] for row in database.execute("PRAGMA table_info(energy)")}
    of_them = f"FROM energy WHERE fidelity IN ({', '.join('?' * len(fidelities))})"
    methods = f"SELECT fidelity, min(calc), max(calc) {of_them} GROUP BY fidelity HAVING count(DISTINCT calc) > 1"
    for fidelity, one, other in database.execute(methods, fidelities) if "calc" in columns else ():
        log.warning(
            "%s: energies of fidelity %s are by %s and by %s: a level is one method, give others one of their own",
            *(path, fidelity, one, other),
        )
    lost = f"SELECT count(*) {of_them} AND xyz_id NOT IN (SELECT id FROM xyz)"
    for (count,) in database.execute(lost, fidelities):
        if count:
            log.warning("%s: %d energies belong to no geometry of the file and are left out", path, count)


def _fidelities(database: sqlite3.Connection) -> list[int]:
    return sorted(row[0] for row in database.execute("SELECT DISTINCT fidelity FROM energy"))


def _check_fidelities(paths: Sequence[Path], selection: Selection, of_files: Sequence[Sequence[int]]) -> None:
    """Files of one name must have the fidelities that are wanted between them."""
    for path, of_file in zip(paths, of_files, strict=True):
        if not of_file:
            raise DataError(f"{path}: contains no energies: take a file with data")
    wanted, present = selection.fidelities_read, sorted({fidelity for of_file in of_files for fidelity in of_file})
    lacking = " and ".join(str(fidelity) for fidelity in wanted if fidelity not in present)
    if not lacking:
        return
    where, has = first_few(paths), " ".join(map(str, present))
    if not set(wanted) & set(present):
        raise DataError(f"{where}: has no energies of fidelity {lacking}, only of {has}: ask for one of these")
    if selection.if_incomplete != "keep":
        raise DataError(
            f"{where}: has no energies of fidelity {lacking}, only of {has}: leave the file or the fidelity out"
        )
    log.warning("%s: has no energies of fidelity %s, only of %s", where, lacking, has)


def _check_tables(path: Path, database: sqlite3.Connection, symbols: tuple[str, ...]) -> None:
    for table, needed in _NEEDED.items():
        columns = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
        missing = [column for column in needed if column not in columns]
        if not columns:
            raise DataError(f"{path}: has no table {table}: a database with the tables xyz and energy is needed")
        if missing:
            raise DataError(f"{path}: table {table} has no column {', '.join(missing)}: take a complete database")
    if not database.execute("PRAGMA table_info(meta)").fetchall():
        return
    # The file may have been renamed: its own record of the formula has to fit the name, atom order included.
    for (config,) in database.execute("SELECT config FROM meta"):
        try:
            recorded = formula_symbols(str(config), str(path))
        except InputError:
            continue
        if recorded != symbols:
            raise DataError(
                f"{path}: the file name stands for {formula_in_order(symbols)}, but its table meta says {config}: "
                "give the file its right name"
            )


def _float_arrays(blobs: Sequence[Any], symbols: Sequence[str], where: Callable[[int], str]) -> np.ndarray:
    # numpy.load costs 50 µs a blob. The headers of one database are nearly all the same, so each different one is
    # parsed once and the numbers behind it are taken in one piece. `where(row)` names a blob in messages.
    shape = (len(symbols), 3)
    groups: dict[bytes, list[int]] = {}
    header: bytes | None = None
    for row, blob in enumerate(blobs):
        if header is None or not isinstance(blob, bytes) or not blob.startswith(header):
            header = _npy_header(blob) if isinstance(blob, bytes) else None
            if header is None:
                raise DataError(f"{where(row)} is not a numpy array: write it with numpy.save")
        groups.setdefault(header, []).append(row)
    result = np.empty((len(blobs), *shape))
    for header, rows in groups.items():
        found, fortran_order, dtype = _parse_npy_header(header)
        if dtype is None or dtype.kind != "f":
            raise DataError(
                f"{where(rows[0])} is not a plain float array but {'unreadable' if dtype is None else dtype}: "
                "write it with numpy.save as float64"
            )
        if found != shape:
            raise DataError(
                f"{where(rows[0])} has the shape {list(found)}, but the file name's {formula_in_order(symbols)} needs "
                f"{list(shape)}: correct the file name or the row"
            )
        length = len(header) + dtype.itemsize * shape[0] * shape[1]
        for row in rows:
            if len(blobs[row]) != length:
                raise DataError(f"{where(row)} is cut short or too long: replace it")
        numbers = np.frombuffer(b"".join(blobs[row][len(header) :] for row in rows), dtype=dtype)
        if fortran_order:
            result[rows] = numbers.reshape(len(rows), *shape[::-1]).transpose(0, 2, 1)
        else:
            result[rows] = numbers.reshape(len(rows), *shape)
    return result


def _npy_header(blob: bytes) -> bytes | None:
    # Magic, version, length of the text, text: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    if blob[:6] != b"\x93NUMPY" or len(blob) < 12:
        return None
    width = 2 if blob[6] == 1 else 4
    end = 8 + width + int.from_bytes(blob[8 : 8 + width], "little")
    return blob[:end] if len(blob) >= end else None


def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype | None]:
    file = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        # Version 3 differs from 2 only in the names of fields, which a plain array has not.
        return np.lib.format.read_array_header_2_0(file)
    except Exception:  # whatever its parsing as a piece of Python raises
        return (), False, None


def _rows(path: Path, structures: Structures, geometries: Structures) -> list[int]:
    """Which of the geometries the structures are."""
    if len(structures) == len(geometries):
        return list(range(len(geometries)))
    places = {label: i for i, label in enumerate(geometries.labels)}
    unknown = [label for label in structures.labels if label not in places]
    if unknown:
        raise DataError(
            f"{path}: {first_few(unknown)} of one fidelity is not among the structures of the one that has most: give "
            "both the same labels"
        )
    return [places[label] for label in structures.labels]


def _energies_that_fit(
    path: Path,
    by_fidelity: Mapping[int, Structures],
    geometries: Structures,
    rows: Mapping[int, Sequence[int]],
    symbols: tuple[str, ...],
) -> dict[int, np.ndarray]:
    """The energies of each fidelity, once it is clear that all are of the same structures of one formula."""
    found = {}
    for fidelity, structures in by_fidelity.items():
        if structures.energies is None:
            raise DataError(f"{path}: fidelity {fidelity} has no energies: a database needs one for each structure")
        if structures.levels > 1:
            raise DataError(
                f"{path}: the structures of fidelity {fidelity} have {structures.levels} levels: give one, "
                "Structures.level"
            )
        coordinates = geometries.select(np.array(rows[fidelity])).coordinates
        if (
            structures.coordinates is None
            or coordinates is None
            or not np.array_equal(structures.coordinates, coordinates)
        ):
            raise DataError(
                f"{path}: fidelities {fidelity} and {max(by_fidelity)} have different geometries: give the same ones"
            )
        elements = structures.elements
        expected = [elements.index(symbol) if symbol in elements else -1 for symbol in symbols]
        for i in range(len(structures)):
            if not np.array_equal(structures.species[structures.offsets[i] : structures.offsets[i + 1]], expected):
                raise DataError(
                    f"{path}: {structures.labels[i]} has the atoms {formula_in_order(structures.symbols(i))}, which is "
                    "not the formula of the file name: write one file per formula and atom order"
                )
        found[fidelity] = structures.energies
    return found


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
