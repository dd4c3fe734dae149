"""What is said of data that look wrong, and that nothing is said of those that do not."""

from __future__ import annotations

import itertools

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from scipy.spatial.transform import Rotation
from training_helpers import crystal_data

from kinml_fast.data import Split, Structures, large, plausible, prepare, read
from kinml_fast.data.sae import GUESSES


def trajectory(count: int = 40, sign: float = 1.0, factor: float = 1.0) -> Structures:
    """A molecule of springs, turned in each frame, with forces -dE/dx times the sign and energies times the factor."""
    rng = np.random.default_rng(0)
    bond = covalent_radii[atomic_numbers["C"]] + covalent_radii[atomic_numbers["H"]]
    rest = bond * np.array([[0, 0, 0], [1, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]]) / np.sqrt(3)
    rest[0] = 0
    places = rest + np.cumsum(rng.normal(0, 0.01, (count, 5, 3)), axis=0)
    total = sum(GUESSES[e] for e in "CHHHH")
    energies, forces = np.full(count, total), np.zeros_like(places)
    for i, j in itertools.combinations(range(5), 2):
        between = places[:, i] - places[:, j]
        length = np.linalg.norm(between, axis=1, keepdims=True)
        stretch = length - np.linalg.norm(rest[i] - rest[j])
        energies += 10 * stretch[:, 0] ** 2
        forces[:, i] -= 20 * stretch * between / length
        forces[:, j] += 20 * stretch * between / length
    turns = Rotation.random(count, rng=rng).as_matrix()
    return Structures.of_one_formula("CHHHH", places @ turns, factor * energies, sign * forces @ turns)


def split_of(count: int) -> Split:
    return Split(np.arange(count - 10), np.arange(count - 10, count - 5), np.arange(count - 5, count))


def said(structures: Structures, differences: bool = False) -> list[str]:
    return list(plausible.doubts(structures, split_of(len(structures)), differences))


def test_nothing_is_said_of_sound_data():
    assert said(trajectory()) == []
    assert said(read("shipped:C5H5.db")) == []
    assert said(crystal_data().structures) == []


@pytest.mark.parametrize(
    ("unit", "factor"), [("Hartree", 1 / plausible.HARTREE), ("kcal/mol", 23.060548), ("kJ/mol", 96.4853)]
)
def test_units_of_energies(unit, factor):
    first, *others = said(trajectory(factor=factor))
    assert first.startswith(f"the energies are about those of all electrons in {unit}, but are taken as eV")
    assert f"multiply energies and forces by {1 / factor:.4g}"[:45] in first
    assert ["not consistent" in other for other in others] == [True]
    assert not any("electrons" in sentence for sentence in said(trajectory(factor=factor), differences=True))


@pytest.mark.parametrize("sign", [1, -1])
def test_gradients_for_forces(sign):
    shipped = read("shipped:C2H3.db")
    for data in (trajectory(sign=sign), shipped.changed(forces=sign * shipped.forces)):
        assert ["the forces have the sign of gradients" in sentence for sentence in said(data)] == [True] * (sign < 0)


def test_gradients_in_an_external_field():
    """Frames that are near as they are need not be turned, which would lose what holds a molecule in its place."""
    rng = np.random.default_rng(0)
    data = trajectory()
    rest = data.coordinates[:5]
    shifts = np.cumsum(rng.normal(0, 0.01, (len(data), 5, 3)), axis=0)
    energies = data.energies.mean() + 10 * (shifts**2).sum(axis=(1, 2))
    held = Structures.of_one_formula("CHHHH", rest + shifts, energies, 20 * shifts)
    assert ["the forces have the sign of gradients" in sentence for sentence in said(held)] == [True]


def test_energies_of_calculations_that_failed():
    data = trajectory()
    energies = data.energies.copy()
    energies[[5, 7]] = 0
    (sentence,) = said(data.changed(energies=energies, forces=None))
    assert sentence.startswith(
        f"2 energies are far from those of the same molecule ({data.labels[5]}: 0 eV, the median"
    )
    assert not said(data.changed(energies=energies, forces=None), differences=True)
    warm = data.changed(energies=data.energies + 25 * np.arange(len(data)) / len(data), forces=None)
    assert not said(warm)


def test_lengths_in_bohr():
    data = trajectory()
    far = data.changed(coordinates=data.coordinates / 0.529177, forces=None)
    (sentence,) = said(far)
    assert "lengths are taken as Å; if they are in Bohr, multiply them by 0.529177" in sentence


def test_copies_across_parts_however_they_are_turned(tmp_path, caplog):
    data = trajectory()
    x = data.coordinates.reshape(-1, 5, 3).copy()
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    x[36] = (x[3] @ turn + 5.0)[[0, 3, 1, 4, 2]]
    (sentence,) = said(data.changed(coordinates=x.reshape(-1, 3), forces=None))
    assert sentence.startswith("1 of 5 structures for test are copies of training structures (CH4/37 of CH4/4)")


def test_elements_that_are_not_trained():
    data = trajectory()
    species = data.species.reshape(-1, 5).copy()
    species[36, 4] = 2
    changed = Structures(
        ("C", "H", "F"), species.ravel(), data.coordinates, data.offsets, data.energies, None, data.labels
    )
    assert any("no training structure has the element F, which structures for test have" in s for s in said(changed))


def test_what_is_read_from_disk_is_looked_at_as_well(tmp_path, caplog):
    frames = [
        Atoms("CH4" if i < 39 else "CH3F", x, info={"energy": e}, cell=None)
        for i, (x, e) in enumerate(
            zip(
                trajectory().coordinates.reshape(-1, 5, 3),
                trajectory(factor=1 / plausible.HARTREE).energies,
                strict=True,
            )
        )
    ]
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    (tmp_path / "split").write_text("".join(f"a.xyz/{i + 1} {2 if i < 38 else -1}\n" for i in range(40)))
    large.prepare(
        tmp_path / "a.xyz", path=tmp_path / "p.blocks", split=[0.8, 0.2, 0], split_file=tmp_path / "split", sae="none"
    )
    said = [record.getMessage() for record in caplog.records]
    assert any(
        s.startswith("of the first 40 structures: the energies are about those of all electrons in H") for s in said
    )
    assert any("no training structure has the element F, which structures for test have" in s for s in said)


def test_prepare_logs_it(caplog):
    prepare("shipped:C5H5.db")
    assert not [record for record in caplog.records if "copies" in record.getMessage()]
