from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from data_helpers import molecules, same
from hypothesis import given, settings
from hypothesis import strategies as st

from kinml_fast.data.structures import Structures, concatenate, formula_in_order
from kinml_fast.errors import InputError


def mixed() -> Structures:
    return concatenate([molecules("CCHH", 3), molecules("OH", 2, forces=False), molecules("CHOH", 2)])


def test_concatenate_keeps_everything_in_order():
    parts = [molecules("CCHH", 3), molecules("OH", 2, forces=False)]
    joined = concatenate(parts)
    assert joined.elements == ("C", "H", "O")
    assert joined.labels == ("C2H2/1", "C2H2/2", "C2H2/3", "OH/1", "OH/2")
    assert joined.offsets.tolist() == [0, 4, 8, 12, 14, 16]
    assert joined.symbols(0) == ("C", "C", "H", "H")
    assert joined.symbols(4) == ("O", "H")
    assert np.array_equal(joined.coordinates[12:], parts[1].coordinates)
    assert np.array_equal(joined.forces[:12], parts[0].forces)
    assert np.isnan(joined.forces[12:]).all()
    assert np.array_equal(joined.energies, np.concatenate([part.energies for part in parts]))


def test_counts_and_hill_formulas():
    structures = mixed()
    assert structures.counts().tolist() == [[2, 2, 0]] * 3 + [[0, 1, 1]] * 2 + [[1, 2, 1]] * 2
    assert structures.formulas() == ["C2H2"] * 3 + ["HO"] * 2 + ["CH2O"] * 2


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=10))
def test_select_takes_whole_structures(indices):
    structures = mixed()
    chosen = structures.select(np.array(indices, dtype=np.int64))
    assert chosen.labels == tuple(structures.labels[i] for i in indices)
    for new, old in enumerate(indices):
        a = slice(chosen.offsets[new], chosen.offsets[new + 1])
        b = slice(structures.offsets[old], structures.offsets[old + 1])
        assert np.array_equal(chosen.species[a], structures.species[b])
        assert np.array_equal(chosen.coordinates[a], structures.coordinates[b])
        assert np.array_equal(chosen.forces[a], structures.forces[b], equal_nan=True)
        assert chosen.energies[new] == structures.energies[old]


def test_with_elements_renumbers_species():
    structures = mixed()
    other = structures.with_elements(["O", "N", "H", "C"])
    assert [other.symbols(i) for i in range(7)] == [structures.symbols(i) for i in range(7)]
    assert same(other.with_elements(structures.elements), structures)


def test_with_elements_names_the_structure_with_an_unlisted_one():
    with pytest.raises(InputError, match=r"OH/1 contains O, which is not among the elements C H"):
        mixed().with_elements(["C", "H"])


def test_formula_in_order():
    assert formula_in_order(["C", "H", "H", "H", "O", "H"]) == "CH3OH"


@pytest.mark.parametrize(("field", "what"), [("coordinates", "coordinate"), ("forces", "force")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_numbers_name_structure_and_atom(field, what, value):
    structures = molecules("CCHH", 3)
    bad = getattr(structures, field).copy()
    bad[6, 1] = value
    with pytest.raises(InputError, match=rf"C2H2/2 has a NaN or infinite {what} at atom 3"):
        replace(structures, **{field: bad})


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_not_finite_energy(value):
    structures = molecules("CCHH", 3)
    with pytest.raises(InputError, match=r"C2H2/3 has the energy (nan|-inf)"):
        replace(structures, energies=np.array([1.0, 2.0, value]))


def test_infinite_forces_of_a_whole_structure_are_no_absent_forces():
    structures = molecules("CH", 2)
    with pytest.raises(InputError, match="infinite force"):
        replace(structures, forces=np.full((4, 3), np.inf))


def test_close_atoms_are_named():
    structures = molecules("CCHH", 5)
    coordinates = structures.coordinates.copy()
    coordinates[4 * 3 + 3] = coordinates[4 * 3 + 1] + [0.03, -0.04, 0.05]
    with pytest.raises(InputError, match=r"C2H2/4 has atoms 2 and 4 only 0\.0707 Å apart"):
        replace(structures, coordinates=coordinates)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.floats(0.2, 3.0))
def test_the_sweep_finds_what_all_pairs_find(seed, n_atoms, size):
    rng = np.random.default_rng(seed)
    coordinates = rng.uniform(0, size, (3, n_atoms, 3))
    distances = np.linalg.norm(coordinates[:, :, None] - coordinates[:, None], axis=-1) + 10 * np.eye(n_atoms)
    too_close = bool((distances < 0.1).any())
    try:
        Structures.of_one_formula(["C"] * n_atoms, coordinates, np.zeros(3))
        refused = False
    except InputError:
        refused = True
    assert refused == too_close


def test_atoms_of_different_structures_may_coincide():
    x = np.arange(6.0).reshape(1, 2, 3)
    assert len(Structures.of_one_formula(["C", "H"], np.concatenate([x, x]), np.zeros(2))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.array([0, 4, 8, 11])}, "offsets must rise"),
        ({"offsets": np.array([0, 8, 4, 12])}, "offsets must rise"),
        ({"offsets": np.array([0, 4, 4, 12])}, "C2H2/2 has no atoms"),
        ({"offsets": np.array([0, 12])}, "offsets has shape"),
        ({"energies": np.zeros(2)}, "energies has shape"),
        ({"forces": np.zeros((3, 3))}, "forces has shape"),
        ({"species": np.full(12, 2)}, "species must lie between 0 and 1"),
        ({"elements": ("C", "Qq")}, "'Qq': no such chemical element"),
        ({"elements": ("C", "C")}, "names one twice"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(molecules("CCHH", 3), **change)


def test_energies_may_be_absent_but_not_in_part():
    bare = replace(molecules("CH", 2), energies=None, forces=None)
    assert len(concatenate([bare, bare])) == 4
    with pytest.raises(InputError, match="with and without energies"):
        concatenate([bare, molecules("CH", 2)])
