"""Crystals in data files: cells, periodicity, stresses and virials; what is refused."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import voigt_6_to_full_3x3_stress
from training_helpers import crystal_structures

from kinml_fast.data import Structures, concatenate, join_fidelities, prepared, sources, xyz
from kinml_fast.data.fidelities import difference
from kinml_fast.data.selection import Selection
from kinml_fast.errors import DataError, InputError

CELL = np.array([[5.0, 0.0, 0.0], [0.3, 4.5, 0.0], [0.0, 0.2, 4.0]])
VOIGT = np.array([0.01, -0.02, 0.03, 0.004, -0.005, 0.006])
FULL = np.array([[0.01, 0.006, -0.005], [0.006, -0.02, 0.004], [-0.005, 0.004, 0.03]])


def crystal(**info: object) -> Atoms:
    atoms = Atoms("CH", [[0.0, 0.0, 0.0], [1.1, 0.0, 0.0]], cell=CELL, pbc=True)
    atoms.info.update({"REF_energy": -1.0, **info})
    return atoms


def write(path: Path, *frames: Atoms) -> Path:
    ase.io.write(path, list(frames), format="extxyz")
    return path


def test_the_two_forms_are_the_same_stress():
    np.testing.assert_array_equal(voigt_6_to_full_3x3_stress(VOIGT), FULL)


@pytest.mark.parametrize(
    ("info", "selection"),
    [
        ({"REF_stress": VOIGT}, Selection()),
        ({"REF_stress": FULL}, Selection()),
        ({"REF_stress": FULL.ravel()}, Selection()),
        ({"REF_virial": -FULL * 90.0}, Selection()),
        ({"REF_virials": -VOIGT * 90.0}, Selection()),
        ({"other": VOIGT}, Selection(stress_key="other")),
        ({"my_Virial": -FULL * 90.0, "REF_stress": 2 * FULL}, Selection(stress_key="my_Virial")),
        ({"dft_energy": -1.0, "dft_stress": VOIGT, "REF_stress": 2 * FULL}, Selection(energy_key="dft_energy")),
        ({"REF_stress": VOIGT, "REF_virial": FULL}, Selection()),
    ],
)
def test_a_stress_or_virial_is_read(info, selection, tmp_path):
    assert np.linalg.det(CELL) == pytest.approx(90.0)
    structures = xyz.read(write(tmp_path / "a.xyz", crystal(**info)), selection)
    np.testing.assert_allclose(structures.stresses, FULL[None], atol=1e-9)
    np.testing.assert_allclose(structures.cells, CELL[None], atol=1e-9)
    assert structures.periodic.tolist() == [[1, 1, 1]]
    assert structures.volumes == pytest.approx([90.0])


@pytest.mark.parametrize("suffix", ["xyz", "traj"])
def test_what_ase_calls_a_stress_is_read(suffix, tmp_path):
    frames = [crystal(), crystal(), Atoms("CH", [[0, 0, 0], [1.1, 0, 0]], cell=CELL)]
    frames[0].pbc = (True, False, True)
    for i, frame in enumerate(frames):
        results = {"energy": -1.0 - i, "forces": np.ones((2, 3))} | ({"stress": VOIGT} if i == 0 else {})
        frame.info.clear()
        frame.calc = SinglePointCalculator(frame, **results)
    ase.io.write(tmp_path / f"a.{suffix}", frames)
    structures = xyz.read(tmp_path / f"a.{suffix}")
    assert structures.known_stresses.tolist() == [[True, False, False]]
    np.testing.assert_allclose(structures.stresses[0], FULL, atol=1e-9)
    assert structures.periodic.tolist() == [[1, 0, 1], [1, 1, 1], [0, 0, 0]]
    assert structures.are_crystals.tolist() == [True, True, False]
    assert (structures.cells[2] == 0).all()
    assert structures.known_forces.all()


def test_molecules_alone_have_no_cells(tmp_path):
    atoms = crystal()
    atoms.pbc = False
    structures = xyz.read(write(tmp_path / "a.xyz", atoms))
    assert structures.cells is structures.periodic is structures.stresses is None


def spoiled(change) -> Atoms:
    atoms = crystal(REF_stress=VOIGT)
    change(atoms)
    return atoms


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.set_cell(np.zeros((3, 3))),
            r"a\.xyz/2 is periodic, but its cell .* has no volume along its perio",
        ),
        (lambda a: a.set_cell([5, 5, 0]), r"a\.xyz/2 is periodic, but its cell .* has no volume"),
        (lambda a: a.set_cell([[5, 0, 0], [0, 5, 0], [5, 5, 0]]), r"a\.xyz/2 is periodic, but its cell .* has no vol"),
        (lambda a: a.set_cell(CELL[[1, 0, 2]]), r"a\.xyz/2 has a left-handed cell .*: exchange two of its vectors"),
        (lambda a: a.set_cell([5, 5, 0.05]), r"a\.xyz/2 has a cell only 0\.05 Å high along a periodic vector"),
        (lambda a: a.set_pbc(False), r"frame 2: REF_stress is given of a molecule, which has none"),
        (lambda a: (a.set_cell([5, 5, 0]), a.set_pbc((1, 1, 0))), r"a\.xyz/2 has a stress but a cell without volume"),
        (lambda a: a.info.update(REF_stress=VOIGT * np.nan), r"frame 2: REF_stress has a NaN or infinite number"),
        (lambda a: a.info.update(REF_stress=VOIGT[:5]), r"frame 2: REF_stress is not six numbers .* or nine"),
        (lambda a: a.info.update(REF_stress="large"), r"frame 2: REF_stress is not six numbers .* or nine"),
        (lambda a: a.info.update(REF_stress=FULL + [[0, 0.01, 0]] * 3), r"a\.xyz/2 has a stress that is not symmetric"),
        (
            lambda a: a.positions.__setitem__(1, CELL[0] + CELL[2] + 0.02),
            r"a\.xyz/2 has atoms 1 and 2, through its periodic cell, only 0\.0346 Å",
        ),
        (
            lambda a: a.positions.__setitem__(1, 3 * CELL[1] - 0.02),
            r"a\.xyz/2 has atoms 1 and 2, through its periodic cell, only 0\.0346 Å",
        ),
    ],
)
def test_bad_crystals_are_one_sentence_that_names_the_frame(change, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        xyz.read(write(tmp_path / "a.xyz", crystal(), spoiled(change)))
    assert str(tmp_path / "a.xyz") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_virial_needs_a_volume(tmp_path):
    atoms = crystal(REF_virial=FULL)
    atoms.set_cell([5, 5, 0])
    atoms.pbc = (True, True, False)
    with pytest.raises(DataError, match=r"frame 1: REF_virial is given with a cell without volume"):
        xyz.read(write(tmp_path / "a.xyz", atoms))


def test_images_count_only_along_periodic_vectors():
    """Atoms that lie on one another only across a face where there is no periodicity are no mistake."""
    s = Structures.of_one_formula("CH", np.array([[[0.1, 0.2, 0.0], [0.1, 0.2, 4.0]]]), None)
    cell = np.diag([5.0, 5.0, 4.0])[None]

    def periodic(*along: int) -> Structures:
        return Structures(
            s.elements, s.species, s.coordinates, s.offsets, None, None, s.labels, cell, np.array([along])
        )

    assert len(periodic(1, 1, 0)) == len(periodic(0, 0, 0)) == 1
    for along in ((0, 0, 1), (1, 1, 1), (0, 1, 1)):
        with pytest.raises(DataError, match="CH/1 has atoms 1 and 2, through its periodic cell, only 0 Å apart"):
            periodic(*along)


def test_parts_are_joined_taken_and_kept(tmp_path):
    everything = crystal_structures(20)
    molecules = everything.select(np.flatnonzero(~everything.are_crystals)).changed(
        cells=None, periodic=None, stresses=None
    )
    joined = concatenate([molecules, everything])
    assert joined.are_crystals.tolist() == [False] * len(molecules) + everything.are_crystals.tolist()
    np.testing.assert_array_equal(joined.stresses[len(molecules) :], everything.stresses)
    again = joined.select(np.arange(len(molecules), len(joined)))
    for name in ("cells", "periodic", "stresses"):
        np.testing.assert_array_equal(getattr(again, name), getattr(everything, name))


def frames_of(structures: Structures) -> list[Atoms]:
    frames = []
    for i in range(len(structures)):
        some = slice(structures.offsets[i], structures.offsets[i + 1])
        frame = Atoms(structures.symbols(i), structures.coordinates[some], cell=structures.cells[i])
        frame.pbc = structures.periodic[i] != 0
        frame.info["REF_energy"] = structures.energies[i]
        frame.arrays["REF_forces"] = structures.forces[some]
        if structures.known_stresses[0, i]:
            frame.info["REF_stress"] = structures.stresses[i]
        frames.append(frame)
    return frames


def test_prepared_data_keep_crystals(tmp_path):
    structures = crystal_structures(20)
    path = write(tmp_path / "a.xyz", *frames_of(structures))
    made = prepared.prepare(path, path=tmp_path / "p.h5").structures
    again = prepared.load(tmp_path / "p.h5").structures
    assert made.stresses is not None
    for name in ("cells", "periodic", "stresses", "coordinates"):
        np.testing.assert_array_equal(getattr(made, name), getattr(again, name))
    np.testing.assert_allclose(made.stresses, structures.select(range(20)).stresses, atol=1e-8)


def test_pieces_of_a_file_are_the_whole(tmp_path):
    path = write(tmp_path / "a.xyz", *frames_of(crystal_structures(20)))
    whole, parts = xyz.read(path), list(sources.pieces([path], Selection(), 3))
    together = concatenate(parts)
    for name in ("cells", "periodic", "stresses"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(together, name))


def test_levels_are_joined_and_subtracted():
    low = crystal_structures(20)
    high = low.changed(energies=low.energies - 1, stresses=3 * low.stresses).select([1, 2, 3, 6])
    both = join_fidelities([low, high])
    order = [low.labels.index(label) for label in both.labels]
    np.testing.assert_array_equal(both.stresses[0], low.stresses[order])
    np.testing.assert_array_equal(both.stresses[1, :4], high.stresses)
    assert np.isnan(both.stresses[1, 4:]).all()
    alone = both.level(1)
    np.testing.assert_array_equal(alone.stresses, high.stresses)
    np.testing.assert_allclose(difference(both.select(range(4))).stresses, 2 * low.stresses[[1, 2, 3, 6]])
    moved = high.changed(cells=high.cells * 1.01)
    with pytest.raises(DataError, match="the levels have different geometries"):
        join_fidelities([low, moved])


def test_structures_refuse_what_does_not_fit():
    good = crystal_structures(20)
    for fields, message in (
        ({"periodic": None}, "cells and periodic come together"),
        ({"cells": good.cells[:-1]}, r"cells has shape \[19, 3, 3\], expected \[20, 3, 3\]"),
        ({"stresses": np.stack([good.stresses] * 2)}, "stresses of 2 levels"),
        ({"stresses": np.zeros((20, 3, 3))}, r"CHCH/1 is a molecule, which has no stress"),
        ({"periodic": 2 * good.periodic}, "periodic must be 0 or 1"),
    ):
        with pytest.raises(DataError, match=message):
            good.changed(**fields)
