"""Several levels of theory in one data set, and differences between two of them."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from data_helpers import SHARED, molecules, needs_shared, same
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kinml_fast import datasets
from kinml_fast.data import fidelities, prepared, pykinml_hdf5, read, sae, sources, splits, sqlite, stored, xyz
from kinml_fast.data.prepared import prepare
from kinml_fast.data.selection import Selection
from kinml_fast.data.split import PARTS, Split
from kinml_fast.data.splits import make_split
from kinml_fast.data.structures import Structures, concatenate
from kinml_fast.errors import InputError
from kinml_fast.nn import AEVParameters
from kinml_fast.train import config as configuration
from kinml_fast.train import runs


def two_levels(symbols: str = "CCHH", count: int = 6, seed: int = 0, unknown: dict[int, list[int]] | None = None):
    """Structures with two levels; `unknown`: which structures lack which."""
    low, high = molecules(symbols, count, seed), molecules(symbols, count, seed + 100)
    energies, forces = np.stack([low.energies, high.energies]), np.stack([low.forces, high.forces])
    per_structure = forces.reshape(2, count, len(symbols), 3)
    for k, structures in (unknown or {}).items():
        energies[k, structures], per_structure[k, structures] = np.nan, np.nan
    return replace(low, energies=energies, forces=forces)


def equal(a: Structures, b: Structures) -> bool:
    """Equal bit by bit, NaN being equal to NaN."""
    energies = np.array_equal(a.energies, b.energies, equal_nan=True)
    return energies and same(replace(a, energies=None), replace(b, energies=None)) if a.levels == b.levels else False


def change(path: Path, statement: str, values=()) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(statement, values)
        database.commit()


@pytest.fixture
def database(tmp_path) -> Path:
    """20 structures; level 0 lacks 5 and 7, level 1 all from 12 on, 3 has no forces at level 1."""
    both = two_levels(count=20)
    path = tmp_path / "C2H2.db"
    sqlite.write(path, {0: both.level(0), 1: both.level(1)}, temperatures=300, names=["a"] * 10 + ["b"] * 10)
    change(path, "DELETE FROM energy WHERE fidelity = 0 AND xyz_id IN (5, 7)")
    change(path, "DELETE FROM energy WHERE fidelity = 1 AND xyz_id >= 12")
    change(path, "UPDATE energy SET force = NULL WHERE fidelity = 1 AND xyz_id = 3")
    return path


# Structures


def test_arrays_have_a_leading_level_dimension():
    structures = two_levels(unknown={0: [1], 1: [0, 5]})
    assert structures.levels == 2
    assert structures.energies.shape == (2, 6)
    assert structures.forces.shape == (2, 24, 3)
    assert structures.known_energies.tolist() == [[1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]]
    assert structures.known_forces.tolist() == [[1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]]
    single = molecules("CH", 2)
    assert (single.levels, single.known_energies.tolist(), single.known_forces.tolist()) == (1, [[1, 1]], [[1, 1]])
    bare = replace(single, energies=None, forces=None)
    assert (bare.levels, bare.known_energies.any(), bare.known_forces.any()) == (1, False, False)


@settings(deadline=None)
@given(st.lists(st.integers(0, 8), max_size=12))
def test_select_and_concatenate_keep_levels(indices):
    parts = [two_levels("CCHH", 4, unknown={0: [1], 1: [0, 3]}), two_levels("OH", 5, seed=3, unknown={1: [2]})]
    joined = concatenate(parts)
    assert joined.elements == ("C", "H", "O")
    assert np.array_equal(joined.energies, np.concatenate([p.energies for p in parts], axis=1), equal_nan=True)
    assert np.array_equal(joined.forces, np.concatenate([p.forces for p in parts], axis=1), equal_nan=True)
    chosen = joined.select(indices)
    assert np.array_equal(chosen.energies, joined.energies[:, indices], equal_nan=True)
    for new, old in enumerate(indices):
        a = slice(chosen.offsets[new], chosen.offsets[new + 1])
        b = slice(joined.offsets[old], joined.offsets[old + 1])
        assert np.array_equal(chosen.forces[:, a], joined.forces[:, b], equal_nan=True)
    assert equal(joined.with_elements(["O", "H", "C"]).with_elements(joined.elements), joined)


def test_concatenate_fills_in_forces_and_wants_one_number_of_levels():
    bare = replace(two_levels("OH", 2), forces=None)
    joined = concatenate([two_levels("CH", 2), bare])
    assert joined.forces.shape == (2, 8, 3)
    assert joined.known_forces.tolist() == [[1, 1, 0, 0]] * 2
    with pytest.raises(InputError, match="of 1 and 2 levels of theory cannot be joined: give all the same"):
        concatenate([molecules("OH", 2), two_levels("CH", 2)])


def test_one_level_of_several():
    structures = two_levels(unknown={0: [1], 1: [0, 5]})
    low = structures.level(0)
    assert low.labels == tuple(f"C2H2/{i}" for i in (1, 3, 4, 5, 6))
    assert low.energies.tolist() == structures.energies[0, [0, 2, 3, 4, 5]].tolist()
    assert np.array_equal(low.forces[:4], structures.forces[0, :4])
    assert same(two_levels().level(1), replace(molecules("CCHH", 6, 100), coordinates=two_levels().coordinates))
    without = two_levels()
    without.forces[1] = np.nan
    assert replace(without).level(1).forces is None
    assert low.level(0) is low


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, f: (e[:1], f[:1]), r"energies has shape \[1, 6\], expected \[2, 6\]"),
        (lambda e, f: (e[:, :5], f), r"energies has shape \[2, 5\], expected \[2, 6\]"),
        (lambda e, f: (e[0], f), r"energies of 1 levels of theory and forces of 2"),
        (lambda e, f: (e, f[0]), r"energies of 2 levels of theory and forces of 1"),
        (lambda e, f: (e, f[:, :20]), r"forces has shape \[2, 20, 3\], expected \[2, 24, 3\]"),
        (lambda e, f: (e.__setitem__((1, 2), np.inf) or e, f), r"C2H2/3 has the energy inf at level 1 \(counted"),
        (lambda e, f: (e.__setitem__((slice(None), 2), np.nan) or e, None), r"C2H2/3 has no energy at any of the 2 le"),
        (lambda e, f: (e.__setitem__((0, 2), np.nan) or e, f), r"C2H2/3 has forces but no energy at level 0"),
        (
            lambda e, f: (e, f.__setitem__((1, 9, 1), np.nan) or f),
            r"C2H2/3 has a NaN or infinite force of level 1 at at",
        ),
        (
            lambda e, f: (e, f.__setitem__((0, 0, 0), np.inf) or f),
            r"C2H2/1 has a NaN or infinite force of level 0 at at",
        ),
    ],
)
def test_levels_that_do_not_fit(change, message):
    structures = two_levels()
    energies, forces = change(structures.energies.copy(), structures.forces.copy())
    with pytest.raises(InputError, match=message):
        replace(structures, energies=energies, forces=forces)


# Levels that were read one by one


@settings(deadline=None)
@given(st.permutations(range(8)), st.permutations(range(8)), st.integers(0, 8), st.integers(0, 8))
def test_join_is_the_union_in_the_order_of_the_highest_level(first, second, n_low, n_high):
    both = concatenate([two_levels("CCHH", 5), two_levels("OH", 3)])
    low, high = first[:n_low], second[:n_high]
    assume(low or high)
    joined = fidelities.join([both.level(0).select(low), both.level(1).select(high)])
    order = [*high, *(i for i in low if i not in high)]
    expected = both.select(order).with_elements(joined.elements)
    energies, forces = expected.energies.copy(), expected.forces.copy()
    for k, own in enumerate((low, high)):
        lacking = ~np.isin(order, own)
        energies[k, lacking] = np.nan
        forces[k, np.repeat(lacking, expected.sizes)] = np.nan
    assert equal(joined, replace(expected, energies=energies, forces=forces))


def test_join_three_levels_of_which_one_has_no_forces():
    one = molecules("CCHH", 3)
    joined = fidelities.join([one, replace(one, energies=one.energies + 1, forces=None), one.select([2])])
    assert joined.labels == ("C2H2/3", "C2H2/1", "C2H2/2")
    assert joined.known_energies.tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
    assert joined.known_forces.tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert joined.energies[1].tolist() == (one.energies[[2, 0, 1]] + 1).tolist()
    rounded = replace(one, coordinates=np.round(one.coordinates, 7))
    assert np.array_equal(fidelities.join([rounded, one]).coordinates, one.coordinates)


def test_levels_with_other_geometries_are_named():
    low = molecules("CCHH", 9)
    moved = low.coordinates.copy()
    moved[[4, 9, 14, 33], 1] += [0.01, -0.02, 0.03, 1e-5]
    message = (
        r"different geometries of C2H2/2, C2H2/3, C2H2/4 … \(4 in all\), by up to 0\.03 Å: energies of different le"
    )
    with pytest.raises(InputError, match=message):
        fidelities.join([low, replace(low, coordinates=moved)])
    swapped = low.species.copy()
    swapped[[1, 2]] = swapped[[2, 1]]
    with pytest.raises(InputError, match=r"different geometries of C2H2/1: energies"):
        fidelities.join([low, replace(low, species=swapped)])
    with pytest.raises(InputError, match=r"different geometries of C2H2/1: energies"):
        fidelities.join([low.select([0]), replace(molecules("CH", 1), labels=("C2H2/1",))])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([molecules("CH", 2)], "1 levels are given to be joined"),
        (
            [molecules("CH", 2), replace(molecules("CH", 2), energies=None)],
            r"level 1 \(counted from 0\) has no energies",
        ),
        ([two_levels("CH", 2), molecules("CH", 2)], r"level 0 \(counted from 0\) has energies of 2 levels"),
        (
            [molecules("CH", 2).select([0, 0]), molecules("CH", 2)],
            r"two energies of level 0 .* for CH/1: leave out one",
        ),
    ],
)
def test_what_cannot_be_joined(parts, message):
    with pytest.raises(InputError, match=message):
        fidelities.join(parts)


# Databases


def test_a_list_of_fidelities(database):
    found = sqlite.read(database, Selection(fidelity=[0, 1]))
    both = two_levels(count=20)
    assert found.labels == both.labels
    assert np.array_equal(found.coordinates, both.coordinates)
    known = found.known_energies
    assert [np.flatnonzero(~own).tolist() for own in known] == [[4, 6], list(range(11, 20))]
    assert [np.flatnonzero(~own).tolist() for own in found.known_forces] == [[4, 6], [2, *range(11, 20)]]
    assert np.array_equal(found.energies[known], both.energies[known])
    atoms = np.repeat(found.known_forces, 4, axis=1)
    assert np.array_equal(found.forces[atoms], both.forces[atoms])
    for fidelity in (0, 1):
        assert same(sqlite.read(database, Selection(fidelity=fidelity)), found.level(fidelity))
    turned = sqlite.read(database, Selection(fidelity=(1, 0)))
    assert np.array_equal(turned.energies, found.energies[::-1], equal_nan=True)


def test_a_list_of_one_fidelity_is_one_level(database):
    assert same(sqlite.read(database, Selection(fidelity=[1])), sqlite.read(database, Selection(fidelity=1)))
    assert same(read(database, Selection(fidelity=[0])), read(database, Selection(fidelity=0)))


def test_selections_hold_for_all_levels(database):
    found = sqlite.read(database, Selection(fidelity=[0, 1], names=["b"]))
    assert found.labels == tuple(f"C2H2/{i}" for i in range(11, 21))
    assert found.known_energies.sum(axis=1).tolist() == [10, 1]
    few = sqlite.read(database, Selection(fidelity=[0, 1], ids={"C2H2": [5, 12, 3]}))
    assert few.labels == ("C2H2/3", "C2H2/5", "C2H2/12")
    assert few.known_energies.tolist() == [[1, 0, 1], [1, 1, 0]]
    change(database, "DELETE FROM energy WHERE xyz_id = 5")
    with pytest.raises(InputError, match=r"has no structure C2H2/5 \(fidelities 0, 1, temperature above 0\)"):
        sqlite.read(database, Selection(fidelity=[0, 1], ids={"C2H2": [5, 12, 3]}))


def test_shipped_levels():
    structures = read("shipped:C5H5.db", Selection(fidelity=[0, 1]))
    assert structures.known_energies.all()
    assert structures.known_forces.all()
    delta = read("shipped:C5H5.db", Selection(fidelity=1, baseline=0))
    low, high = (read("shipped:C5H5.db", Selection(fidelity=fidelity)) for fidelity in (0, 1))
    assert same(structures.level(0), low)
    assert same(structures.level(1), high)
    assert same(delta, replace(high, energies=high.energies - low.energies, forces=high.forces - low.forces))
    assert np.abs(delta.energies - delta.energies.mean()).max() < 0.5  # eV: the levels are alike


@needs_shared
def test_pykinmls_databases(caplog):
    small = read(SHARED / "C[23]*.db", Selection(fidelity=[0, 1]))
    assert len(small) == 56
    assert small.known_energies.all()
    everything = read(SHARED / "*.db", Selection(fidelity=[0, 1]))
    assert everything.known_energies.sum(axis=1).tolist() == [56, 2168]
    assert "C5H5.db: has no energies of fidelity 0, only of 1" in caplog.text
    for options in ({"fidelity": [0, 1], "incomplete": "drop"}, {"fidelity": 1, "baseline": 0}):
        with pytest.raises(InputError, match=r"C5H5\.db: has no energies of fidelity 0, only of 1: leave the file or"):
            read(SHARED / "*.db", Selection(**options))


@needs_shared
def test_pykinmls_delta_and_split_file():
    data = prepare(SHARED / "C[23]*.db", Selection(baseline=0), split=[34, 6, 0], split_file=SHARED / "mf_tvt.txt")
    assert (data.fidelities, data.baseline) == ((1,), 0)
    expected = {}
    for path in SHARED.glob("C[23]*.db"):
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            sql = "SELECT a.xyz_id, a.E - b.E FROM energy a JOIN energy b USING (xyz_id) WHERE a.fidelity = 1 "
            rows = connection.execute(sql + "AND b.fidelity = 0").fetchall()
        expected |= {f"{path.stem}/{number}": value for number, value in rows}
    assert data.structures.energies.tolist() == [expected[label] for label in data.structures.labels]
    assert len(data.split.test) == 16
    assert data.structures.known_forces.all()
    fitted = data.structures.select(np.concatenate([data.split.train, data.split.validation]))
    assert abs((fitted.energies - fitted.counts() @ data.sae).mean()) < 0.05
    assert np.abs(data.sae).max() < 1  # eV: those of differences


def test_a_fidelity_that_is_not_there(database, caplog):
    for fidelity, incomplete in (([0, 7], None), ([0, 7], "keep"), ([7, 0], "drop"), ([0, 7], "error")):
        with pytest.raises(InputError, match=r"C2H2\.db: (has )?no energies of fidelity 7, only of 0 1: leave "):
            read(database, Selection(fidelity=fidelity, incomplete=incomplete))
    with pytest.raises(InputError, match=r"C2H2\.db: has no energies of fidelity 7 and 8, only of 0 1: ask for one"):
        read(database, Selection(fidelity=[7, 8]))
    with pytest.raises(InputError, match=r"C2H2\.db: has no energies of fidelity 5, only of 0 1: leave the file or"):
        read(database, Selection(baseline=5))
    change(database, "UPDATE xyz SET temp = 500 WHERE id < 12")
    with pytest.raises(InputError, match=r"no structure that is selected has an energy of fidelity 1: widen the sele"):
        read(database, Selection(fidelity=[0, 1], temperature=300))


def test_two_energies_of_one_structure_at_a_level(database):
    change(database, "INSERT INTO energy (fidelity, calc, E, xyz_id) VALUES (0, 'x', 0, 2)")
    assert sqlite.read(database, Selection(fidelity=1)).labels[1] == "C2H2/2"
    with pytest.raises(InputError, match=r"C2H2/2 has more than one energy of fidelity 0"):
        sqlite.read(database, Selection(fidelity=[0, 1]))


def split_in_two(database: Path) -> list[Path]:
    """A database for each level, of the same name."""
    both = []
    for fidelity in (0, 1):
        path = database.parent / f"level{fidelity}" / database.name
        path.parent.mkdir()
        path.write_bytes(database.read_bytes())
        change(path, "DELETE FROM energy WHERE fidelity != ?", [fidelity])
        both.append(path)
    return both


def test_a_database_for_each_level(database, caplog):
    paths = split_in_two(database)
    assert equal(read(paths, Selection(fidelity=[0, 1])), read(database, Selection(fidelity=[0, 1])))
    assert equal(read(paths[::-1], Selection(fidelity=[0, 1])), read(database, Selection(fidelity=[0, 1])))
    assert "has no energies" not in caplog.text
    assert same(
        read(paths, Selection(baseline=0, incomplete="drop", ids={"C2H2": [1, 2, 3]})),
        read(database, Selection(baseline=0, incomplete="drop", ids={"C2H2": [1, 2, 3]})),
    )
    with pytest.raises(InputError, match=r"level0/C2H2\.db, .*level1/C2H2\.db: has no structure C2H2/77 \(fid"):
        read(paths, Selection(fidelity=[0, 1], ids={"C2H2": [1, 77]}))
    with pytest.raises(InputError, match=r"level0/C2H2\.db, .*level1/C2H2\.db: has no energies of fidelity 2, only of"):
        read(paths, Selection(fidelity=[0, 2], incomplete="drop"))
    with pytest.raises(InputError, match="would give their structures the same labels"):
        read(paths, Selection(fidelity=1))


def test_databases_of_levels_with_other_geometries(database):
    paths = split_in_two(database)
    change(paths[0], "UPDATE xyz SET geom = (SELECT geom FROM xyz WHERE id = 20) WHERE id IN (1, 2, 3, 4)")
    with pytest.raises(
        InputError, match=r"different geometries of C2H2/1, C2H2/2, C2H2/3 … \(4 in all\), by up to 0\."
    ):
        read(paths, Selection(fidelity=[0, 1]))
    with pytest.raises(InputError, match=r"two energies of level 0 \(counted from 0\) for C2H2/1, C2H2/2, C2H2/3 … \("):
        read([database, paths[0]], Selection(fidelity=[0, 1]))


# Structures that lack a level


def test_incomplete_structures_are_listed_with_their_number(database):
    message = (
        r"energies are missing \(fidelity 0: 2, fidelity 1: 9\) of C2H2/5, C2H2/7, C2H2/12, C2H2/13, C2H2/14, C2H2/15, "
        r"C2H2/16, C2H2/17, C2H2/18, C2H2/19 … \(11 in all\): set data\.incomplete=drop to leave these structures out"
    )
    with pytest.raises(InputError, match=message + "$"):
        read(database, Selection(fidelity=1, baseline=0))
    with pytest.raises(InputError, match=message + ", or keep to train each level on what there is$"):
        read(database, Selection(fidelity=[0, 1], incomplete="error"))
    with pytest.raises(InputError, match=r"\(fidelity 0: 2\) of C2H2/5, C2H2/7: set"):
        read(database, Selection(fidelity=1, baseline=0, ids={"C2H2": range(1, 12)}))


def test_incomplete_structures_of_several_files_are_counted_together(database, tmp_path):
    other = two_levels("OH", 4)
    sqlite.write(tmp_path / "OH.db", {0: other.level(0), 1: other.level(1)}, temperatures=300)
    change(tmp_path / "OH.db", "DELETE FROM energy WHERE fidelity = 1 AND xyz_id = 2")
    with pytest.raises(InputError, match=r"fidelity 1: 10\) of C2H2/5, .* … \(12 in all\)"):
        read([database, tmp_path / "OH.db"], Selection(fidelity=1, baseline=0))


def test_incomplete_structures_are_dropped_on_request(database, caplog):
    expected = [i for i in range(1, 12) if i not in (5, 7)]
    with caplog.at_level(logging.INFO):
        found = read(database, Selection(fidelity=[0, 1], incomplete="drop"))
    assert found.labels == tuple(f"C2H2/{i}" for i in expected)
    assert found.known_energies.all()
    assert "left out 11 of 20 structures that lack a level (fidelity 0: 2, fidelity 1: 9)" in caplog.text
    delta = read(database, Selection(fidelity=1, baseline=0, incomplete="drop"))
    both = two_levels(count=20).select(np.array(expected) - 1)
    assert delta.labels == found.labels
    assert np.array_equal(delta.energies, both.energies[1] - both.energies[0])
    assert np.flatnonzero(~delta.known_forces[0]).tolist() == [2]
    atoms = np.repeat(delta.known_forces[0], 4)
    assert np.array_equal(delta.forces[atoms], (both.forces[1] - both.forces[0])[atoms])
    change(database, "DELETE FROM energy WHERE fidelity = 0 AND xyz_id < 12")
    with pytest.raises(InputError, match=r"no structure has energies of all the fidelities 0, 1: take other files"):
        read(database, Selection(fidelity=1, baseline=0, incomplete="drop"))


def test_a_difference_without_forces_at_one_level(database):
    change(database, "UPDATE energy SET force = NULL WHERE fidelity = 0")
    assert read(database, Selection(fidelity=1, baseline=0, incomplete="drop")).forces is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fidelity": [0, 1], "baseline": 0}, "a baseline goes with one fidelity, and 2 are given"),
        ({"fidelity": 1, "baseline": 1}, "fidelity and baseline are both 1"),
        ({"fidelity": 1, "baseline": 0, "incomplete": "keep"}, "a difference needs both levels: take error or drop"),
        ({"fidelity": [0, 1], "incomplete": "no"}, "incomplete is 'no': take error, drop or keep"),
        ({"fidelity": [1, 0, 1]}, r"the fidelities are \[1, 0, 1\]: name at least one, lowest first, and each once"),
        ({"fidelity": []}, r"the fidelities are \[\]: name at least one"),
    ],
)
def test_settings_without_meaning(database, options, message):
    with pytest.raises(InputError, match=message):
        read(database, Selection(**options))


# Files of ASE


def write_xyz(path: Path, keys: dict[str, list[int]], count: int = 4, forces: bool = True) -> Path:
    """`count` frames; key K has the energies and forces of level 0, 1, … in the frames that are listed."""
    both = two_levels("OHH", count)
    frames = []
    for i in range(count):
        atoms = slice(both.offsets[i], both.offsets[i + 1])
        frame = ase.Atoms(both.symbols(i), both.coordinates[atoms])
        for k, (key, present) in enumerate(keys.items()):
            if i in present:
                frame.info[f"{key}_energy"] = both.energies[k, i]
                if forces:
                    frame.arrays[f"{key}_forces"] = both.forces[k, atoms]
        frames.append(frame)
    path.parent.mkdir(exist_ok=True)
    ase.io.write(path, frames, format="extxyz")
    return path


def test_keys_of_several_levels(tmp_path):
    path = write_xyz(tmp_path / "a.xyz", {"xtb": [0, 1, 2, 3], "dft": [0, 2]})
    found = read(path, Selection(fidelity=[0, 1], energy_key=["xtb_energy", "dft_energy"]))
    both = two_levels("OHH", 4)
    assert found.known_energies.tolist() == [[1, 1, 1, 1], [1, 0, 1, 0]]
    assert found.known_forces.tolist() == [[1, 1, 1, 1], [1, 0, 1, 0]]
    assert np.allclose(found.energies[found.known_energies], both.energies[found.known_energies], atol=1e-7)
    assert np.allclose(found.forces[0], both.forces[0], atol=1e-7)
    explicit = read(
        path,
        Selection(fidelity=[0, 1], energy_key=["xtb_energy", "dft_energy"], forces_key=["xtb_forces", "none_forces"]),
    )
    assert explicit.known_forces.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    delta = read(path, Selection(baseline=0, energy_key=["xtb_energy", "dft_energy"], incomplete="drop"))
    assert delta.labels == ("a.xyz/1", "a.xyz/3")
    assert np.allclose(delta.energies, (both.energies[1] - both.energies[0])[[0, 2]], atol=1e-7)
    with pytest.raises(InputError, match=r"\(fidelity 1: 2\) of a\.xyz/2, a\.xyz/4: set data\.incomplete=drop"):
        read(path, Selection(baseline=0, energy_key=["xtb_energy", "dft_energy"]))


def test_a_file_of_ase_for_each_level(tmp_path):
    low = write_xyz(tmp_path / "low" / "a.xyz", {"xtb": [0, 1, 2, 3]})
    (tmp_path / "high").mkdir()
    high = tmp_path / "high" / "a.xyz"
    high.write_text(low.read_text().replace("xtb_", "dft_"))
    found = read([low, high], Selection(fidelity=[0, 1], energy_key=["xtb_energy", "dft_energy"], incomplete="error"))
    assert len(found) == 4
    assert np.array_equal(found.energies[0], found.energies[1])
    assert np.array_equal(found.forces[0], found.forces[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fidelity": [0, 1]},
            r"a\.xyz: data\.energy_key names no key, but those of the fidelities 0 and 1 are needed",
        ),
        ({"fidelity": [0, 1], "energy_key": "xtb_energy"}, r"names xtb_energy, but those of the fidelities 0 and 1"),
        ({"baseline": 0, "energy_key": "xtb_energy"}, r"names xtb_energy, but those of the fidelities 0 and 1 are nee"),
        ({"energy_key": ["xtb_energy", "dft_energy"]}, r"names xtb_energy, dft_energy, but one are? needed"),
        (
            {"fidelity": [0, 1], "energy_key": ["xtb_energy", "dft_energy"], "forces_key": ["xtb_forces"]},
            r"data\.forces_key names xtb_forces, but those of the fidelities 0 and 1 are needed",
        ),
        (
            {"fidelity": [0, 1], "energy_key": ["xtb_energy", "hf_energy"], "incomplete": "drop"},
            r"a\.xyz: no frame has an energy under the key hf_energy: leave the file or the level out",
        ),
        (
            {"fidelity": [0, 1], "energy_key": ["xtb_energy", "hf_energy"]},
            r"no structure that is selected has an energy of fidelity 1",
        ),
        (
            {"fidelity": [0, 1], "energy_key": ["hf_energy", "dft_energy"]},
            r"frame 2 has no energy under any of the keys hf_energy, dft_energy, only xtb_energy: name the key",
        ),
    ],
)
def test_keys_that_do_not_fit(tmp_path, options, message):
    path = write_xyz(tmp_path / "a.xyz", {"xtb": [0, 1, 2, 3], "dft": [0, 2]})
    with pytest.raises(InputError, match=message):
        read(path, Selection(**options))


def test_a_nan_is_not_a_missing_level(tmp_path):
    path = write_xyz(tmp_path / "a.xyz", {"xtb": [0, 1], "dft": [0, 1]}, 2)
    text = path.read_text().splitlines()
    text[1] = text[1].replace("dft_energy=", "dft_energy=nan was=")
    path.write_text("\n".join(text))
    with pytest.raises(InputError, match=r"frame 1: dft_energy is NaN: correct it or leave it out of the frame"):
        read(path, Selection(fidelity=[0, 1], energy_key=["xtb_energy", "dft_energy"]))


def test_databases_and_keys_together(database, tmp_path):
    path = write_xyz(tmp_path / "a.xyz", {"xtb": [0, 1], "dft": [0, 1]}, 2)
    both = read([database, path], Selection(fidelity=[0, 1], energy_key=["xtb_energy", "dft_energy"]))
    assert both.labels[-1] == "a.xyz/2"
    assert both.known_energies.sum(axis=1).tolist() == [20, 13]


# Files of descriptors


def test_files_of_descriptors_have_one_level(tmp_path, database):
    structures = molecules("CCHH", 5)
    descriptors = stored.compute(structures, AEVParameters.aevmod(("C", "H")), torch.float64, jacobian=False)
    pykinml_hdf5.write(tmp_path / "a.h5", structures, descriptors)
    assert len(read(tmp_path / "a.h5", Selection(fidelity=[1]))) == 5
    for options in ({"fidelity": [0, 1]}, {"baseline": 0}):
        message = r"a\.h5: has energies of one level, but those of the fidelities 0 and 1 are asked for: take databases"
        with pytest.raises(InputError, match=message):
            read([database, tmp_path / "a.h5"], Selection(**options))
    with pytest.raises(InputError, match=r"b\.h5: can hold one level of theory, and there are 2"):
        pykinml_hdf5.write(tmp_path / "b.h5", two_levels(), descriptors)
    with pytest.raises(InputError, match=r"C2H2\.db: the structures of fidelity 1 have 2 levels: give one"):
        sqlite.write(tmp_path / "C2H2.db", {1: two_levels()}, temperatures=1)


# Splits


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5),
    st.tuples(st.integers(1, 20), st.integers(1, 10), st.integers(0, 10)),
    st.integers(0, 5),
)
def test_every_part_has_its_share_of_every_level(sizes, amounts, seed):
    names = ["C", "CH", "CHH", "CHHH", "OHH"]
    parts = [
        two_levels(name, low + both, unknown={1: list(range(low))})
        for name, (low, both) in zip(names, sizes, strict=False)
        if low + both
    ]
    assume(parts and sum(map(len, parts)) >= sum(amounts))
    structures = concatenate(parts)
    split = make_split(structures, amounts, seed)
    assert [len(getattr(split, part)) for part in PARTS] == list(amounts)
    assert len(np.unique(split.used)) == sum(amounts)
    high = structures.known_energies[1]
    used = 0
    for part, amount in zip(PARTS, amounts, strict=True):
        if amount == 0:
            continue
        # Each part takes its share of what the ones before it left.
        left, total = high.sum() - used, len(structures) - sum(amounts[: PARTS.index(part)])
        share = high[getattr(split, part)].sum()
        assert abs(share - amount * left / total) < 1
        used += share


def test_rare_levels_of_many_formulas_reach_validation_and_test():
    # One structure in ten of each formula has the high level: a formula alone would give validation none of them.
    parts = [two_levels("C" * n, 10, seed=n, unknown={1: list(range(1, 10))}) for n in range(1, 31)]
    structures = concatenate(parts)
    for seed in range(5):
        split = make_split(structures, [0.8, 0.1, 0.1], seed)
        high = structures.known_energies[1]
        assert [int(high[getattr(split, part)].sum()) for part in PARTS] == [24, 3, 3]


def test_the_note_of_a_split_file_is_the_highest_known_level(tmp_path):
    structures = two_levels(unknown={0: [3], 1: [0]})
    split = make_split(structures, [4, 1, 1])
    splits.write_tvtmsk(tmp_path / "s.txt", structures, split)
    notes = {line.split()[0]: float(line.split()[2]) for line in (tmp_path / "s.txt").read_text().splitlines()}
    expected = [structures.energies[0, 0], *structures.energies[1, 1:]]
    assert [notes[label] for label in structures.labels] == expected
    assert np.array_equal(make_split(structures, [0, 0, 0], 0, tmp_path / "s.txt").train, split.train)


def test_table_of_levels():
    structures = two_levels(count=10, unknown={0: [0], 1: [1, 2, 3, 4]})
    structures.forces[1, :20] = np.nan
    split = Split(np.arange(6), np.array([6, 7]), np.array([8]))
    assert splits.level_table(structures, split, (0, 1)).splitlines() == [
        "level        train  validation  test  with forces",
        "fidelity 0       5           2     1            8",
        "fidelity 1       2           2     1            4",
        "all of them      1           2     1            4",
    ]
    text = splits.level_table(molecules("CH", 9), split, (1,), 0)
    assert text.splitlines()[1].split() == ["fidelity", "1", "minus", "0", "6", "2", "1", "9"]


# Single-atom energies


def test_each_level_is_fitted_to_the_structures_that_have_it():
    counts = np.array([[2, 2], [2, 3], [3, 2], [3, 3], [4, 1]])
    first, second = np.array([-48.9, -10.7]), np.array([-50.1, -11.2])
    energies = np.stack([counts @ first, counts @ second])
    energies[0, 4], energies[1, 0] = np.nan, np.nan
    found = sae.resolve_levels("fit", counts, energies, ["C", "H"])
    assert found == pytest.approx(np.stack([first, second]), rel=1e-9)
    mixed = sae.resolve_levels(["none", {"C": 1.0, "H": 2}], counts, energies, ["C", "H"])
    assert mixed.tolist() == [[0, 0], [1, 2]]
    assert sae.resolve_levels({"C": 1.0, "H": 2.0}, counts, energies, ["C", "H"]).tolist() == [[1, 2], [1, 2]]
    assert sae.resolve_levels(["none"], counts, energies[0], ["C", "H"]).tolist() == [0, 0]
    with pytest.raises(InputError, match="3 settings of single-atom energies are given for 2 levels of theory"):
        sae.resolve_levels(["fit"] * 3, counts, energies, ["C", "H"])


@pytest.mark.parametrize("first", [[-48.9, -10.7], [-1035.3, -16.8]])
def test_a_level_with_one_formula_stays_near_the_one_below(first):
    """C5H5 alone does not say what C and H share; the level below knows it from other formulas."""
    counts = np.array([[2, 2], [2, 3], [3, 2], [5, 5]])
    first = np.array(first)
    energies = np.stack([counts @ first, counts @ (first + np.array([0.4, 0.2]))])
    energies[1, :3] = np.nan
    found = sae.resolve_levels("fit", counts, energies, ["C", "H"])
    assert found[0] == pytest.approx(first, rel=1e-9)
    assert found[1] == pytest.approx(first + 0.3, rel=1e-9)
    assert counts[3] @ found[1] == pytest.approx(energies[1, 3], rel=1e-12)


def test_all_electron_energies_above_a_semiempirical_level_start_at_the_guesses():
    counts = np.array([[2, 2], [2, 3], [5, 5]])
    guess = np.array([sae.GUESSES["C"], sae.GUESSES["H"]])
    energies = np.stack([counts @ [-48.9, -10.7], counts @ (guess + 0.5)])
    energies[1, :2] = np.nan
    assert sae.resolve_levels("fit", counts, energies, ["C", "H"])[1] == pytest.approx(guess + 0.5, rel=1e-9)


def test_differences_are_fitted_from_zero(caplog):
    counts = np.array([[2, 2], [2, 3], [3, 2]])
    with caplog.at_level(logging.INFO):
        found = sae.fit(counts, counts @ [0.3, -0.1], ["C", "H"], np.zeros(2))
    assert found == pytest.approx([0.3, -0.1], rel=1e-9)
    assert caplog.text == ""


# Prepared data


def settings_of(data: prepared.Prepared) -> tuple:
    return data.fidelities, data.baseline, data.sae.tolist(), [getattr(data.split, part).tolist() for part in PARTS]


def test_prepared_levels_come_back(database, tmp_path, monkeypatch):
    path = tmp_path / "data.h5"
    first = prepare(database, Selection(fidelity=[0, 1]), split=[12, 4, 4], path=path)
    assert first.fidelities == (0, 1)
    assert first.baseline is None
    assert first.sae.shape == (2, 2)
    monkeypatch.setattr(prepared.sources, "read_and_drop", None)  # would fail if it were called
    again = prepare(database, Selection(fidelity=(0, 1)), split=[12, 4, 4], path=path)
    assert equal(again.structures, first.structures)
    assert settings_of(again) == settings_of(first)
    fitted = np.concatenate([first.split.train, first.split.validation])
    for k in (0, 1):
        chosen = first.structures.select(fitted).level(k)
        assert chosen.energies.mean() == pytest.approx((chosen.counts() @ first.sae[k]).mean(), abs=1e-9)


def test_prepared_differences_come_back(database, tmp_path):
    path = tmp_path / "data.h5"
    first = prepare(database, Selection(fidelity=1, baseline=0, incomplete="drop"), split=[5, 2, 2], path=path)
    again = prepared.load(path)
    assert (again.fidelities, again.baseline) == ((1,), 0)
    assert equal(again.structures, first.structures)
    assert settings_of(again) == settings_of(first)
    assert first.structures.levels == 1
    fitted = first.structures.select(np.concatenate([first.split.train, first.split.validation]))
    assert np.array_equal(first.sae, sae.fit(fitted.counts(), fitted.energies, ["C", "H"], np.zeros(2)))


def test_each_setting_of_levels_counts(database):
    hashes = [
        prepare(database, Selection(**options), split=[5, 2, 2], sae=sae_setting).hash
        for options, sae_setting in (
            ({"fidelity": 1}, "fit"),
            ({"fidelity": 0}, "fit"),
            ({"fidelity": [0, 1]}, "fit"),
            ({"fidelity": [1, 0]}, "fit"),
            ({"fidelity": [0, 1], "incomplete": "drop"}, "fit"),
            ({"fidelity": 1, "baseline": 0, "incomplete": "drop"}, "fit"),
            ({"fidelity": [0, 1]}, ["fit", "none"]),
            ({"fidelity": [0, 1]}, ["none", "fit"]),
            ({"fidelity": [0, 1]}, [{"C": 1.0, "H": 1.0}, "fit"]),
        )
    ]
    assert len(set(hashes)) == len(hashes)
    same_ones = [{"fidelity": [0, 1]}, {"fidelity": (0, 1), "incomplete": "keep"}, {"fidelity": np.array([0, 1])}]
    assert len({prepare(database, Selection(**options), split=[5, 2, 2]).hash for options in same_ones}) == 1


def test_what_is_dropped_may_be_in_the_split_file(database, tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("".join(f"C2H2/{i} {-1 if i in (1, 5) else 2}\n" for i in range(1, 13)))
    options = {"split": [0.8, 0.2, 0], "split_file": path}
    with pytest.raises(InputError, match=r"of C2H2/5, C2H2/7, C2H2/12: set data\.incomplete=drop"):
        prepare(database, Selection(baseline=0), **options)
    data = prepare(database, Selection(baseline=0, incomplete="drop"), **options)
    assert [data.structures.labels[i] for i in data.split.test] == ["C2H2/1"]
    assert len(data.structures) == 9
    path.write_text(path.read_text() + "C2H2/40 2\n")
    with pytest.raises(InputError, match=r"s\.txt: .*has no structure C2H2/40"):
        prepare(database, Selection(baseline=0, incomplete="drop"), **options)


def test_levels_that_nothing_trains_or_validates(database, tmp_path, caplog):
    path = tmp_path / "s.txt"

    def write(train, validation, test):
        parts = {"train": train, "validation": validation, "test": test}
        path.write_text(
            "".join(f"C2H2/{i} {-1 if p == 'test' else 2} 0 {p}\n" for p, own in parts.items() for i in own)
        )

    write([12, 13], [1, 2], [3])
    with pytest.raises(InputError, match="no training structure has an energy of fidelity 1: enlarge the training"):
        prepare(database, Selection(fidelity=[0, 1]), split_file=path)
    write([1, 2], [12, 13], [3])
    with pytest.raises(InputError, match=r"no validation structure has an energy of fidelity 1, the highest, by which"):
        prepare(database, Selection(fidelity=[0, 1]), split_file=path)
    write([1, 2], [3, 5, 12], [13, 14])
    data = prepare(database, Selection(fidelity=[0, 1]), split_file=path)
    assert "no test structure has an energy of fidelity 1, the highest" in caplog.text
    assert data.structures.known_energies.sum(axis=1).tolist() == [6, 4]


# Configurations


def config_of(database: Path, run: Path, **data) -> configuration.Config:
    return configuration.from_dict({"run": str(run), "data": {"files": [str(database)], "split": [5, 2, 2], **data}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"fidelity": []}, "data.fidelity = [] is not allowed: it must be a whole number, or a list of several"),
        ({"fidelity": [0, "1"]}, "data.fidelity = [0, '1'] is not allowed: it must be a whole number, or a list"),
        ({"fidelity": True}, "data.fidelity = True is not allowed: it must be a whole number"),
        ({"fidelity": [0, 0]}, "data.fidelity = [0, 0] is not allowed: it names a level twice"),
        ({"baseline": 1}, "data is not allowed: fidelity and baseline are both 1"),
        ({"baseline": 0, "fidelity": [1, 2]}, "a baseline goes with one fidelity, and 2 are given"),
        ({"baseline": 0, "incomplete": "keep"}, "a difference needs both levels"),
        ({"incomplete": "no"}, "data.incomplete = 'no' is not allowed: it must be 'error', 'drop' or 'keep'"),
        ({"fidelity": [0, 1], "sae": ["fit"]}, "sae has 1 entries and there are 2 fidelities"),
        ({"fidelity": [0, 1], "sae": ["fit", "no"]}, "data.sae = ['fit', 'no'] is not allowed: it must be fit, none"),
        ({"fidelity": [0, 1], "energy_key": "a"}, "energy_key is 'a' and there are 2 levels: give a list"),
        ({"baseline": 0, "forces_key": ["a"]}, "forces_key is ['a'] and there are 2 levels: give a list with a key"),
        ({"baseline": 0, "energy_key": ["a"]}, "(the baseline's, then that of the fidelity)"),
        ({"energy_key": ["a", "b"]}, "energy_key is ['a', 'b'] and there are 1 levels"),
    ],
)
def test_configurations_that_are_refused(data, message):
    with pytest.raises(InputError) as caught:
        configuration.from_dict({"data": {"files": ["a.db"], **data}})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        {"fidelity": [0, 1]},
        {"fidelity": [1]},
        {"fidelity": [0, 1, 2], "incomplete": "drop", "sae": ["fit", "none", {"C": -3.0}]},
        {"baseline": 0, "incomplete": "drop", "energy_key": ["a", "b"]},
        {"energy_key": ["a"], "sae": ["fit"]},
    ],
)
def test_configurations_survive_their_file(tmp_path, data):
    config = configuration.from_dict({"data": {"files": ["a.db"], **data}})
    configuration.save(config, tmp_path / "c.yaml")
    assert configuration.load(tmp_path / "c.yaml").model_dump(exclude={"run"}) == config.model_dump(exclude={"run"})


def test_a_run_says_how_many_structures_have_which_level(database, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        data = runs.prepare(config_of(database, tmp_path / "run", fidelity=[0, 1], split=[12, 4, 4]))
    assert data.fidelities == (0, 1)
    assert splits.level_table(data.structures, data.split, (0, 1)) in caplog.text
    assert "single-atom energies of fidelity 0, eV: C -" in caplog.text
    assert "single-atom energies of fidelity 1, eV: C -" in caplog.text
    assert len((tmp_path / "run" / "split.txt").read_text().splitlines()) == 20


def test_a_run_on_differences(database, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        data = runs.prepare(config_of(database, tmp_path / "run", baseline=0, incomplete="drop"))
    assert (data.fidelities, data.baseline) == ((1,), 0)
    assert "left out 11 of 20 structures that lack a level" in caplog.text
    assert "fidelity 1 minus 0" in caplog.text
    assert "fitting freely" not in caplog.text  # differences are no energies of another kind
    notes = [float(line.split()[2]) for line in (tmp_path / "run" / "split.txt").read_text().splitlines()]
    assert sorted(notes) == sorted(data.structures.energies.tolist())


def test_shipped_configuration_with_levels(tmp_path):
    config = configuration.load(
        datasets.path("example.yaml"), ["data.fidelity=[0, 1]", f"run={tmp_path / 'run'}", "data.split=[100, 20, 20]"]
    )
    data = runs.prepare(config)
    assert data.structures.energies.shape == (2, 140)
    assert sources.read(config.data.files, Selection(fidelity=config.data.fidelity)).levels == 2


def test_xyz_alone_takes_lists_of_keys(tmp_path):
    path = write_xyz(tmp_path / "a.xyz", {"xtb": [0, 1], "dft": [0, 1]}, 2)
    keys = Selection(fidelity=[0, 1], energy_key=["xtb_energy", "dft_energy"])
    assert xyz.read(path, keys).levels == 2
    with pytest.raises(InputError, match="names xtb_forces, but those of the fidelities 0 and 1 are needed: give a"):
        xyz.read(path, replace(keys, forces_key=["xtb_forces"]))
