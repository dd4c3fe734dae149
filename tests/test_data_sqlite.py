from __future__ import annotations

import io
import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import SHARED, molecules, needs_shared, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinml_fast import datasets
from kinml_fast.data import sqlite
from kinml_fast.data.selection import Selection
from kinml_fast.errors import InputError


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def change(path: Path, statement: str, values=()) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(statement, values)
        database.commit()


@pytest.fixture
def database(tmp_path) -> Path:
    path = tmp_path / "C2H2.db"
    sqlite.write(
        path,
        {1: molecules("CCHH", 6), 0: replace(molecules("CCHH", 6), energies=np.arange(6.0), forces=None)},
        temperatures=[300, 300, 500, 500, 0, 800],
        names=["red 1", "red 2", "blue 1", "blue 2", "red 3", "green"],
        calc={1: "GFN2-xTB", 0: "GFN1-xTB"},
        calc_params={1: {"accuracy": "0.1"}},
    )
    return path


# The example databases


@needs_shared
def test_example_database():
    structures = sqlite.read(SHARED / "C5H5.db")
    assert len(structures) == 2112
    assert structures.elements == ("C", "H")
    assert structures.labels[0] == "C5H5/1"
    assert structures.labels[-1] == "C5H5/2112"
    assert structures.symbols(5) == ("C",) * 5 + ("H",) * 5
    assert structures.energies[0] == -5261.429334316677
    assert structures.coordinates[0].tolist() == [-0.967966, -0.07529, -0.659798]


@needs_shared
def test_blobs_are_what_numpy_reads():
    structures = sqlite.read(SHARED / "C2H3.db", Selection(fidelity=0))
    with closing(sqlite3.connect(f"file:{SHARED / 'C2H3.db'}?mode=ro", uri=True)) as database:
        rows = database.execute(
            "SELECT geom, force, E FROM energy JOIN xyz ON xyz.id = xyz_id WHERE fidelity = 0 ORDER BY xyz.id"
        ).fetchall()
    load = [[np.load(io.BytesIO(blob), allow_pickle=False) for blob in row[:2]] for row in rows]
    assert np.array_equal(structures.coordinates, np.concatenate([geometry for geometry, _ in load]))
    assert np.array_equal(structures.forces, np.concatenate([force for _, force in load]))
    assert structures.energies.tolist() == [row[2] for row in rows]


@needs_shared
def test_many_files_by_pattern_each_once():
    structures = sqlite.read([SHARED / "C3H3.db", SHARED / "C[23]*.db"])
    assert [structures.labels[i] for i in (0, 14, 28, 42)] == ["C3H3/1", "C2H2/1", "C2H3/1", "C3H2/1"]
    assert len(structures) == 56


@needs_shared
def test_an_example_survives_a_round_trip(tmp_path):
    levels = {fidelity: sqlite.read(SHARED / "C3H2.db", Selection(fidelity=fidelity)) for fidelity in (0, 1)}
    sqlite.write(tmp_path / "C3H2.db", levels, temperatures=2000)
    for fidelity, level in levels.items():
        assert same(sqlite.read(tmp_path / "C3H2.db", Selection(fidelity=fidelity)), level)


@needs_shared
def test_written_tables_are_those_of_the_examples(tmp_path):
    sqlite.write(tmp_path / "CH.db", {1: molecules("CH", 1)}, temperatures=1)

    def columns(path):
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            return {
                table: [
                    database.execute(f"PRAGMA {pragma}({table})").fetchall()
                    for pragma in ("table_info", "foreign_key_list")
                ]
                for table in ("meta", "xyz", "energy")
            }

    assert columns(tmp_path / "CH.db") == columns(SHARED / "C5H5.db")


# Writing


def test_what_is_written(database):
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT config FROM meta").fetchall() == [("C2H2",)]
        assert connection.execute("SELECT calc, count(*) FROM energy GROUP BY calc ORDER BY calc").fetchall() == [
            ("GFN1-xTB", 6),
            ("GFN2-xTB", 6),
        ]
        parameters = connection.execute("SELECT calc_params FROM energy WHERE xyz_id = 3 AND fidelity = 1").fetchone()
        assert connection.execute("SELECT count(*) FROM energy WHERE force IS NULL").fetchone() == (6,)
    found = np.load(io.BytesIO(parameters[0]), allow_pickle=False)
    assert found.tolist() == [["label", "C2H2/3"], ["accuracy", "0.1"]]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    symbols=st.text("CHON", min_size=1, max_size=9),
    count=st.integers(1, 5),
    seed=st.integers(0, 999),
    absent=st.sets(st.integers(0, 4)),
)
def test_round_trip(tmp_path, symbols, count, seed, absent):
    structures = molecules(symbols, count, seed)
    forces = structures.forces.reshape(count, -1, 3)
    forces[[i for i in absent if i < count]] = np.nan
    stem = structures.labels[0].split("/")[0]
    path = tmp_path / f"{stem}.db"
    sqlite.write(path, {2: structures}, temperatures=np.full(count, 10.0))
    found = sqlite.read(path, Selection(fidelity=2))
    if np.isnan(forces).all():
        assert found.forces is None
        found = replace(found, forces=structures.forces)
    assert same(found, structures)


def test_a_fixed_time_stamp_makes_the_file_reproducible(tmp_path):
    contents = []
    for _ in range(2):
        sqlite.write(tmp_path / "CH.db", {1: molecules("CH", 3)}, temperatures=1, created_at="2025-01-01 00:00:00")
        contents.append((tmp_path / "CH.db").read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("name", "levels", "message"),
    [
        ("C2H2.db", {}, "no fidelity"),
        ("C2H2.db", {1: molecules("CHCH", 2)}, r"CHCH/1 has the atoms CHCH, which is not the formula"),
        ("C2H3.db", {1: molecules("CCHH", 2)}, r"C2H2/1 has the atoms C2H2"),
        ("C2H2.db", {0: molecules("CCHH", 2, 1), 1: molecules("CCHH", 2, 2)}, "fidelities 0 and 1 have different"),
        ("C2H2.db", {1: replace(molecules("CCHH", 2), energies=None)}, "fidelity 1 has no energies"),
        ("water.db", {1: molecules("HHO", 2)}, "must begin with a formula"),
    ],
)
def test_nothing_is_written_from_levels_that_do_not_fit(tmp_path, name, levels, message):
    with pytest.raises(InputError, match=message):
        sqlite.write(tmp_path / name, levels, temperatures=1)
    assert list(tmp_path.iterdir()) == []


def test_fidelities_that_lack_structures(tmp_path):
    low = molecules("CCHH", 5, 1)
    high = replace(low, energies=low.energies + 1, forces=2 * low.forces).select(np.array([3, 1]))
    path = tmp_path / "C2H2.db"
    sqlite.write(path, {0: low, 1: high}, temperatures=1, calc={0: "low", 1: "high"})
    assert same(sqlite.read(path, Selection(fidelity=0)), low)
    assert same(sqlite.read(path, Selection(fidelity=1)), high.select(np.array([1, 0])))
    both = sqlite.read(path, Selection(fidelity=[0, 1]))
    assert both.known_energies.tolist() == [[True] * 5, [False, True, False, True, False]]
    for wrong, message in (
        (replace(high, labels=("C2H2/9", "C2H2/2")), "C2H2/9 of one fidelity is not among"),
        (replace(high, labels=("C2H2/1", "C2H2/2")), "different geometries"),
    ):
        with pytest.raises(InputError, match=message):
            sqlite.write(path, {0: low, 1: wrong}, temperatures=1)


def test_a_failed_write_leaves_the_old_file(database, monkeypatch):
    before = database.read_bytes()
    monkeypatch.setattr(sqlite, "_SCHEMA", sqlite._SCHEMA.replace("E real NOT NULL", "E real CHECK (E < -1e9)"))
    with pytest.raises(InputError, match=r"could not be written .*CHECK constraint.*: nothing was changed"):
        sqlite.write(database, {1: molecules("CCHH", 2)}, temperatures=1)
    assert database.read_bytes() == before
    assert list(database.parent.iterdir()) == [database]


# Selections


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, [1, 2, 3, 4, 6]),
        ({"temperature": 300}, [1, 2]),
        ({"temperature": 0}, [5]),
        ({"names": ["red%"]}, [1, 2]),
        ({"names": ["red%"], "temperature": 0}, [5]),
        ({"names": ["red _", "%2"]}, [1, 2, 4]),
        ({"names": ["green"]}, [6]),
        ({"ids": {"C2H2": {6, 2}}}, [2, 6]),
    ],
)
def test_selections(database, selection, expected):
    structures = sqlite.read(database, Selection(**selection))
    assert structures.labels == tuple(f"C2H2/{i}" for i in expected)
    assert np.array_equal(structures.energies, molecules("CCHH", 6).energies[np.array(expected) - 1])


def test_fidelities_have_their_own_energies_and_forces(database):
    low = sqlite.read(database, Selection(fidelity=0))
    assert low.energies.tolist() == [0, 1, 2, 3, 5]
    assert low.forces is None


def test_elements_can_be_ordered(database):
    structures = sqlite.read(database, Selection(elements=["H", "O", "C"]))
    assert structures.elements == ("H", "O", "C")
    assert structures.symbols(0) == ("C", "C", "H", "H")


def test_formula_gives_atoms_in_order():
    assert sqlite.formula_symbols("CH3OH", "x") == ("C", "H", "H", "H", "O", "H")
    assert sqlite.formula_symbols("C5H5_run2", "x") == ("C",) * 5 + ("H",) * 5
    assert sqlite.formula_symbols("ClF", "x") == ("Cl", "F")


def test_other_float_types_and_layouts_are_read(database):
    geometry = molecules("CCHH", 6).coordinates[:4]
    for i, array in enumerate([geometry.astype(">f8"), np.asfortranarray(geometry), geometry.astype(np.float32)], 1):
        change(database, "UPDATE xyz SET geom = ? WHERE id = ?", (npy(array), i))
    found = sqlite.read(database).coordinates.reshape(-1, 4, 3)
    assert np.array_equal(found[0], geometry)
    assert np.array_equal(found[1], geometry)
    assert np.array_equal(found[2], geometry.astype(np.float32))


def test_a_database_is_never_changed_by_reading(database):
    before = database.read_bytes()
    database.chmod(0o444)
    sqlite.read(database)
    assert database.read_bytes() == before
    assert list(database.parent.iterdir()) == [database]


def test_names_with_characters_that_mean_something_in_an_address(tmp_path):
    path = tmp_path / "a?b#c %41" / "CH_50%.db"
    path.parent.mkdir()
    sqlite.write(path, {1: molecules("CH", 2)}, temperatures=1)
    assert sqlite.read(path).labels == ("CH_50%/1", "CH_50%/2")


# Bad input


@pytest.mark.parametrize(
    ("statement", "values", "message"),
    [
        ("DROP TABLE energy", (), r"C2H2\.db: has no table energy"),
        ("DROP TABLE xyz", (), r"C2H2\.db: has no table xyz"),
        ("ALTER TABLE energy RENAME COLUMN force TO f", (), r"table energy has no column force"),
        ("ALTER TABLE xyz DROP COLUMN temp", (), r"table xyz has no column temp"),
        ("DELETE FROM energy", (), r"C2H2\.db: contains no energies"),
        ("UPDATE xyz SET temp = NULL", (), r"no structure fits the selection \(fidelity 1, temperature above 0\)"),
        ("UPDATE xyz SET geom = 'text' WHERE id = 2", (), r"the geometry of C2H2/2 is not a numpy array"),
        ("UPDATE xyz SET geom = x'00' WHERE id = 2", (), r"the geometry of C2H2/2 is not a numpy array"),
        ("UPDATE xyz SET geom = ? WHERE id = 3", (npy(np.zeros((4, 3), dtype=int)),), r"C2H2/3 is not a plain float"),
        ("UPDATE xyz SET geom = ? WHERE id = 3", (npy(np.array([[print]])),), r"C2H2/3 is not a plain float array"),
        ("UPDATE xyz SET geom = ? WHERE id = 3", (npy(np.array([["a"]])),), r"C2H2/3 is not a plain float array"),
        ("UPDATE xyz SET geom = ? WHERE id = 4", (npy(np.zeros((5, 3))),), r"C2H2/4 has the shape \[5, 3\].*\[4, 3\]"),
        ("UPDATE xyz SET geom = ? WHERE id = 4", (npy(np.zeros((4, 3)))[:-8],), r"C2H2/4 is cut short"),
        ("UPDATE xyz SET geom = ? WHERE id = 4", (b"\x93NUMPY\x01\x00\x04\x00junk",), r"C2H2/4 is not a plain float"),
        ("UPDATE xyz SET geom = ? WHERE id = 1", (npy(np.full((4, 3), np.nan)),), r"C2H2/1 has a NaN or infinite coor"),
        ("UPDATE xyz SET geom = ? WHERE id = 1", (npy(np.zeros((4, 3))),), r"C2H2/1 has atoms 1 and 2 only 0 Å apart"),
        (
            "UPDATE energy SET force = ? WHERE xyz_id = 6",
            (npy(np.zeros((3, 3))),),
            r"force of C2H2/6 has the shape",
        ),
        ("UPDATE energy SET force = ? WHERE xyz_id = 6", (npy(np.full((4, 3), np.nan)),), r"force of C2H2/6 has a NaN"),
        ("UPDATE energy SET force = ? WHERE xyz_id = 6", (npy(np.full((4, 3), np.inf)),), r"C2H2/6 has a NaN or infin"),
        ("UPDATE energy SET E = 9e999 WHERE xyz_id = 6", (), r"C2H2/6 has the energy inf"),
        ("UPDATE energy SET E = 'high' WHERE xyz_id = 6", (), r"energy of C2H2/6 is 'high', not a number"),
        (
            "INSERT INTO energy (fidelity, calc, E, xyz_id) VALUES (1, 'x', 0, 2)",
            (),
            r"C2H2/2 has more than one en",
        ),
        ("UPDATE meta SET config = 'H2C2'", (), r"file name stands for C2H2, but its table meta says H2C2"),
    ],
)
def test_damaged_databases(database, statement, values, message):
    change(database, statement, values)
    with pytest.raises(InputError, match=message) as caught:
        sqlite.read(database)
    assert str(database) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_blob_is_never_unpickled(database, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    change(database, "UPDATE xyz SET calc_params = ?, geom = ? WHERE id = 1", [npy(np.array([Trap()]))] * 2)
    with pytest.raises(InputError, match="C2H2/1 is not a plain float array but object"):
        sqlite.read(database)
    assert not (tmp_path / "sprung").exists()
    assert [structure for structure in sqlite.read(database, Selection(ids={"C2H2": [2]})).labels] == ["C2H2/2"]


def test_files_that_are_no_databases(tmp_path):
    with pytest.raises(InputError, match=r"missing\.db: cannot be read \(No such file"):
        sqlite.read(tmp_path / "missing.db")
    with pytest.raises(InputError, match=r"nothing\*\.db: the pattern matches no file"):
        sqlite.read(tmp_path / "nothing*.db")
    with pytest.raises(InputError, match="is a folder"):
        sqlite.read(tmp_path)
    (tmp_path / "C2H2.db").touch()
    with pytest.raises(InputError, match="is empty"):
        sqlite.read(tmp_path / "C2H2.db")
    (tmp_path / "C2H2.db").write_bytes(b"no database, only words" * 50)
    with pytest.raises(InputError, match=r"C2H2\.db: cannot be read as an SQLite database \(file is not a database\)"):
        sqlite.read(tmp_path / "C2H2.db")
    with pytest.raises(InputError, match="no data files are given"):
        sqlite.read([])


def test_unreadable_file(database, monkeypatch):
    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"C2H2\.db: cannot be read \(Permission denied\)"):
        sqlite.read(database)


def test_truncated_database(database):
    database.write_bytes(database.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"C2H2\.db: cannot be read as an SQLite database \(.*malformed"):
        sqlite.read(database)


@pytest.mark.parametrize("name", ["C99999999999H5.db", "(C9999)9999.db", "water.db", "C0.db", "Xx3.db", "c2h2.db"])
def test_file_names_without_formula(database, name):
    other = database.with_name(name)
    database.rename(other)
    with pytest.raises(InputError, match=f"{re.escape(name)}: the file name must begin with a formula"):
        sqlite.read(other)


def test_formula_of_another_size(database):
    other = database.with_name("C3H2.db")
    database.rename(other)
    with pytest.raises(InputError, match="stands for C3H2, but its table meta says C2H2"):
        sqlite.read(other)
    change(other, "DELETE FROM meta")
    with pytest.raises(InputError, match=r"geometry of C3H2/1 has the shape \[4, 3\].*C3H2 needs \[5, 3\]"):
        sqlite.read(other)


def test_missing_fidelity_says_which_are_there(database):
    with pytest.raises(InputError, match=r"no energies of fidelity 4, only of 0 1"):
        sqlite.read(database, Selection(fidelity=4))


def test_two_methods_in_one_fidelity_and_energies_without_geometry_are_said(database, caplog):
    sqlite.read(database)
    assert not caplog.records
    change(database, "UPDATE energy SET calc = 'B3LYP' WHERE fidelity = 0 AND id % 2 = 0")
    change(database, "DELETE FROM xyz WHERE id = 2")
    sqlite.read(database, Selection(fidelity=0))
    methods, lost = (record.getMessage() for record in caplog.records)
    assert "C2H2.db: energies of fidelity 0 are by B3LYP and by GFN1-xTB: a level is one method" in methods
    assert "C2H2.db: 1 energies belong to no geometry of the file and are left out" in lost
    caplog.clear()
    change(database, "ALTER TABLE energy DROP COLUMN calc")
    sqlite.read(database, Selection(fidelity=0))
    assert [record.getMessage() for record in caplog.records] == [lost]
    caplog.clear()
    list(sqlite.pieces(database, Selection(fidelity=0), 2))
    assert [record.getMessage() for record in caplog.records] == [lost]


def test_element_that_is_not_listed(database):
    with pytest.raises(InputError, match=r"C2H2\.db: contains H, not among the elements C O"):
        sqlite.read(database, Selection(elements=["C", "O"]))


def test_ids_that_are_not_there(database):
    with pytest.raises(InputError, match=r"has no structure C2H2/5, C2H2/7, C2H2/8 … \(4 in all\)"):
        sqlite.read(database, Selection(ids={"C2H2": [1, 5, 7, 8, 9]}))
    with pytest.raises(InputError, match=r"structures of C9 are asked for, but no such database"):
        sqlite.read(database, Selection(ids={"C9": [1]}))


def test_two_databases_with_one_name(database):
    other = database.parent / "other" / database.name
    other.parent.mkdir()
    other.write_bytes(database.read_bytes())
    with pytest.raises(InputError, match=r"the same labels: rename one, for instance to C2H2_2\.db"):
        sqlite.read([database, other])
    other = other.rename(other.with_name("C2H2_2.db"))
    assert len(sqlite.read([database, other])) == 10


def test_shipped_data(database, monkeypatch):
    monkeypatch.setattr(datasets, "_FOLDER", database.parent)
    assert same(sqlite.read("shipped:C2H2.db"), sqlite.read(database))
    with pytest.raises(InputError, match=r"nothing\.db.*C2H2\.db"):
        sqlite.read("shipped:nothing.db")
