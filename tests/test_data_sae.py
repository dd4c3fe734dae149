from __future__ import annotations

import logging

import numpy as np
import pytest
from data_helpers import SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares

from kinml_fast.data import sae, sqlite
from kinml_fast.errors import InputError


@needs_shared
def test_example_numbers():
    """reference.md: PyKinML's answer on the 2048 training and validation structures."""
    structures = sqlite.read(SHARED / "C5H5.db").select(np.arange(2048))
    counts = structures.counts()
    found = sae.fit(counts, structures.energies, structures.elements)
    assert found == pytest.approx([-1035.4398438, -16.97113695], rel=1e-9)
    shifted = structures.energies - counts @ found
    assert shifted.min() == pytest.approx(-1.711258999, abs=1e-9)
    assert shifted.max() == pytest.approx(1.377637104, abs=1e-9)
    assert abs(shifted.mean()) < 1e-11


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_within_bounds_it_is_the_solver_started_at_the_guess(seed):
    rng = np.random.default_rng(seed)
    elements = ["C", "H", "O"]
    counts = rng.integers(1, 9, (rng.integers(1, 30), 3))
    guess = np.array([sae.GUESSES[element] for element in elements])
    energies = counts @ (guess + rng.uniform(-0.3, 0.3, 3)) + rng.normal(0, 0.1, len(counts))
    found = sae.fit(counts, energies, elements)
    solver = least_squares(
        lambda x: counts @ x - energies, guess, bounds=(guess - 8, guess + 8), xtol=1e-12, ftol=1e-12
    )
    assert counts @ found == pytest.approx(counts @ solver.x, rel=1e-7)
    assert np.linalg.norm(found - guess) <= np.linalg.norm(solver.x - guess) + 1e-4


def test_bounds_hold_where_they_matter():
    # Two formulas whose exact solution would move C up and H down by more than 8 eV.
    elements = ["C", "H"]
    counts = np.array([[2, 2], [2, 3]])
    guess = np.array([sae.GUESSES[element] for element in elements])
    energies = counts @ (guess + np.array([9.0, -9.0]))
    found = sae.fit(counts, energies, elements)
    assert (np.abs(found - guess) <= 8).all()
    by_grid = least_squares(lambda x: counts @ x - energies, guess, bounds=(guess - 8, guess + 8), xtol=1e-14)
    assert np.square(counts @ found - energies).sum() <= np.square(by_grid.fun).sum() + 1e-6


def test_energies_of_another_method_are_fitted_freely(caplog):
    counts = np.array([[2, 2], [2, 3], [3, 2], [3, 3]])
    true = np.array([-48.9, -10.7])
    with caplog.at_level(logging.INFO):
        found = sae.fit(counts, counts @ true, ["C", "H"])
    assert found == pytest.approx(true, rel=1e-9)
    assert "do not fit these energies" in caplog.text


def test_free_fit_of_one_formula_centres_it():
    counts = np.full((50, 2), 5)
    energies = -300 + np.random.default_rng(0).normal(size=50)
    shifted = energies - counts @ sae.fit(counts, energies, ["C", "H"])
    assert abs(shifted.mean()) < 1e-10


def test_elements_without_a_guess():
    counts = np.array([[1, 4, 0], [2, 6, 0], [1, 3, 1], [3, 2, 2]])
    true = np.array([sae.GUESSES["C"] - 1, sae.GUESSES["H"] + 2, -7890.5])
    assert sae.fit(counts, counts @ true, ["C", "H", "Si"]) == pytest.approx(true, rel=1e-7)


def test_an_unknown_element_takes_what_a_known_one_cannot():
    counts = np.full((9, 2), 2)  # C2Si2 alone: only the sum of the two is settled
    energies = np.full(9, 2 * (sae.GUESSES["C"] - 7890.0))
    found = sae.fit(counts, energies, ["C", "Si"])
    assert counts @ found == pytest.approx(energies, rel=1e-12)
    assert found[0] == pytest.approx(sae.GUESSES["C"], abs=0.1)


def test_an_element_that_does_not_occur_keeps_its_guess():
    counts = np.array([[1, 4, 0, 0], [2, 6, 0, 0]])
    energies = counts @ [sae.GUESSES["C"], sae.GUESSES["H"], 0, 0]
    found = sae.fit(counts, energies, ["C", "H", "O", "Si"])
    assert found[2:].tolist() == [sae.GUESSES["O"], 0]


@settings(deadline=None)
@given(st.permutations(range(12)))
def test_the_order_of_structures_does_not_matter(order):
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 5, (12, 2))
    energies = counts @ [-1035.0, -16.0] + rng.normal(size=12)
    a, b = (sae.fit(counts[i], energies[i], ["C", "H"]) for i in (np.arange(12), np.array(order)))
    assert a == pytest.approx(b, rel=1e-12)


def test_settings():
    counts, energies = np.array([[1, 4]]), np.array([-1100.0])
    assert sae.resolve("none", counts, energies, ["C", "H"]).tolist() == [0, 0]
    assert sae.resolve({"H": -16, "C": -1035.5, "O": 1.0}, counts, energies, ["C", "H"]).tolist() == [-1035.5, -16]
    assert sae.resolve("fit", counts, energies, ["C", "H"]) == pytest.approx(sae.fit(counts, energies, ["C", "H"]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fitted", "expected fit, none or an energy"),
        ({"C": -1035.0}, "lack H: add them or write fit"),
        ({"C": -1035.0, "H": float("nan")}, "energy of H is nan, not a number"),
        ({"C": -1035.0, "H": "low"}, "energy of H is 'low', not a number"),
        ({"C": -1035.0, "H": 1.0, "Qq": 1.0}, "'Qq', which is no element"),
    ],
)
def test_settings_that_cannot_be(setting, message):
    with pytest.raises(InputError, match=message):
        sae.resolve(setting, np.array([[1, 4]]), np.array([-1100.0]), ["C", "H"])


def test_nothing_to_fit():
    with pytest.raises(InputError, match="no structures to fit"):
        sae.fit(np.empty((0, 2)), np.empty(0), ["C", "H"])
