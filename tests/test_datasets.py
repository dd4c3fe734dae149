"""The shipped data are what their README says: complete, physical, at both levels, without duplicates."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from kinml_fast import datasets
from kinml_fast.data import sqlite
from kinml_fast.data.selection import Selection
from kinml_fast.errors import InputError

COUNTS = {"C5H5.db": 1100, "C2H2.db": 60, "C2H3.db": 80, "C3H2.db": 80, "C3H3.db": 100}
LEVELS = {1: "GFN2-xTB", 0: "GFN1-xTB"}
TEMPERATURES = {300.0, 600.0, 1000.0, 2000.0}


def columns(name: str, sql: str) -> list[tuple]:
    """Return the rows of a query to a shipped database."""
    with closing(sqlite3.connect(f"{datasets.path(name).as_uri()}?mode=ro&immutable=1", uri=True)) as database:
        return database.execute(sql).fetchall()


def arrays(name: str, fidelity: int, **selection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return coordinates [n, atoms, 3] (Å), energies [n] (eV), forces [n, atoms, 3] (eV/Å) of a shipped database."""
    data = sqlite.read([datasets.path(name)], Selection(fidelity, **selection))
    shape = (len(data), -1, 3)
    return data.coordinates.reshape(shape), data.energies, data.forces.reshape(shape)


def distances(coordinates: np.ndarray) -> np.ndarray:
    """Return the interatomic distances [n, pairs] of coordinates [n, atoms, 3]."""
    first, second = np.triu_indices(coordinates.shape[1], 1)
    return np.linalg.norm(coordinates[:, first] - coordinates[:, second], axis=2)


def test_names_are_the_files():
    assert set(datasets.names()) == {*COUNTS, "example.yaml", "forces.yaml"}
    assert all(datasets.path(name).is_file() for name in datasets.names())


@pytest.mark.parametrize("name", ["C6H6.db", "", "../errors.py", "README.md"])
def test_unknown_name(name):
    with pytest.raises(InputError, match=r"C2H2\.db, C2H3\.db.*example\.yaml"):
        datasets.path(name)


def test_together_under_three_megabytes():
    assert sum(datasets.path(name).stat().st_size for name in datasets.names()) < 3_000_000


@pytest.mark.parametrize("name", COUNTS)
def test_rows(name):
    rows = columns(name, "SELECT id, temp, name FROM xyz ORDER BY id")
    assert [row[0] for row in rows] == list(range(1, COUNTS[name] + 1))
    for _, temperature, label in rows:
        assert re.fullmatch(r"[\w-]+:(minimum|modes|md)", label)
        assert temperature in ({0.0} if label.endswith(":minimum") else TEMPERATURES)
    isomers = {row[2].split(":")[0] for row in rows}
    assert sum(row[1] == 0 for row in rows) == len(isomers)
    labels = columns(
        name, "SELECT fidelity, calc, count(*), count(force), count(DISTINCT xyz_id) FROM energy GROUP BY 1, 2"
    )
    assert sorted(labels) == sorted((f, calc, *[COUNTS[name]] * 3) for f, calc in LEVELS.items())


@pytest.mark.parametrize("fidelity", LEVELS)
@pytest.mark.parametrize("name", COUNTS)
def test_forces_are_those_of_a_free_molecule(name, fidelity):
    coordinates, energies, forces = arrays(name, fidelity)
    assert np.all(np.isfinite(energies))
    assert np.abs(forces).max() <= 30.0
    np.testing.assert_allclose(forces.sum(axis=1), 0.0, atol=1e-6)
    np.testing.assert_allclose(np.cross(coordinates, forces).sum(axis=1), 0.0, atol=1e-6)


@pytest.mark.parametrize("name", COUNTS)
def test_geometries(name):
    sampled = distances(arrays(name, 1)[0])
    assert sampled.min() >= 0.5
    for i in range(1, len(sampled)):
        assert np.abs(sampled[:i] - sampled[i]).max(axis=1).min() > 1e-3, f"row {i} repeats an earlier one"


@pytest.mark.parametrize("name", COUNTS)
def test_minima_lie_below_their_surroundings(name):
    _, energies, forces = arrays(name, 1, temperature=0.0)
    assert np.abs(forces).max() < 0.005
    for (label,), minimum in zip(
        columns(name, "SELECT name FROM xyz WHERE temp = 0 ORDER BY id"), energies, strict=True
    ):
        _, sampled, _ = arrays(name, 1, names=[label.replace(":minimum", ":modes")])
        assert sampled.min() > minimum


@pytest.mark.parametrize("fidelity", LEVELS)
@pytest.mark.parametrize("name", ["C5H5.db", "C3H3.db"])
def test_tblite_agrees_and_forces_are_energy_differences(name, fidelity):
    interface = pytest.importorskip("tblite.interface")
    from ase import Atoms, units

    symbols = re.sub(r"([A-Z])(\d)", lambda m: m[1] * int(m[2]), name.removesuffix(".db"))
    numbers = Atoms(symbols).numbers
    coordinates, energies, forces = arrays(name, fidelity)

    def energy(x: np.ndarray) -> float:
        xtb = interface.Calculator(LEVELS[fidelity], numbers, x / units.Bohr, charge=0.0, uhf=int(numbers.sum() % 2))
        xtb.set("verbosity", 0)
        xtb.set("accuracy", 0.001)
        return xtb.singlepoint().get("energy") * units.Hartree

    rng = np.random.default_rng(0)
    for i in rng.choice(len(energies), 5, replace=False):
        assert energy(coordinates[i]) == pytest.approx(energies[i], abs=1e-6)
        direction = rng.normal(size=coordinates[i].shape)
        step = 1e-3 * direction / np.linalg.norm(direction)
        slope = (energy(coordinates[i] + step) - energy(coordinates[i] - step)) / 2e-3
        assert -slope == pytest.approx(np.sum(forces[i] * step) / 1e-3, abs=2e-4)


def test_example_configuration_is_valid_and_reads_shipped_data():
    from kinml_fast.train.config import load  # needs the compiled ops, which the tests above do not

    config = load(datasets.path("example.yaml"))
    data = sqlite.read(config.data.files, config.data.selection)
    assert len(data) == COUNTS["C5H5.db"] - 10  # without the ten minima, which lie at 0 K
