from __future__ import annotations

import gzip
import re
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from kinml_fast.data import Split, sources, splits, sqlite, xyz
from kinml_fast.data.selection import Selection
from kinml_fast.errors import InputError

WATER = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]])
METHANOL = np.array([[0, 0, 0], [1, 0, 0], [-0.4, 0.9, 0], [-0.4, -0.5, 0.9], [-0.5, -0.6, -1.2], [-1.4, -0.5, -1.2]])


def frames(energy: str = "REF_energy", forces: str | None = "REF_forces") -> list[Atoms]:
    result = []
    for i, (symbols, positions) in enumerate([("OH2", WATER), ("CH3OH", METHANOL), ("OH2", WATER + 0.1)]):
        atoms = Atoms(symbols, positions)
        atoms.info[energy] = -10.0 - i
        if forces is not None:
            atoms.arrays[forces] = np.arange(3.0 * len(atoms)).reshape(-1, 3) + i
        result.append(atoms)
    return result


def write(path: Path, atoms: list[Atoms], **options) -> Path:
    ase.io.write(path, atoms, format="extxyz", **options)
    return path


def check(structures) -> None:
    assert len(structures) == 3
    assert structures.elements == ("C", "H", "O")
    assert structures.formulas() == ["H2O", "CH4O", "H2O"]
    assert structures.symbols(1) == ("C", "H", "H", "H", "O", "H")
    assert structures.energies.tolist() == [-10, -11, -12]
    assert np.allclose(structures.coordinates[:3], WATER, atol=1e-7)
    assert structures.forces[3:9].tolist() == (np.arange(18.0).reshape(6, 3) + 1).tolist()


def test_reference_keys(tmp_path):
    structures = xyz.read(write(tmp_path / "a b.xyz", frames()))
    check(structures)
    assert structures.labels == ("a_b.xyz/1", "a_b.xyz/2", "a_b.xyz/3")


def calculated() -> list[Atoms]:
    result = frames()
    for atoms in result:
        energy, forces = atoms.info.pop("REF_energy"), atoms.arrays.pop("REF_forces")
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return result


def test_plain_keys_end_up_in_a_calculator(tmp_path):
    path = write(tmp_path / "a.xyz", calculated())
    assert " energy=" in path.read_text()
    assert "REF" not in path.read_text()
    check(xyz.read(path))


def test_named_keys_and_their_partner(tmp_path):
    path = write(tmp_path / "a.xyz", frames("dft_energy", "dft_forces"))
    check(xyz.read(path, Selection(energy_key="dft_energy")))
    check(xyz.read(path, Selection(energy_key="dft_energy", forces_key="dft_forces")))
    with pytest.raises(InputError, match=r"frame 1 has no energy under the key energy or REF_energy, only dft_energy"):
        xyz.read(path)


def test_forces_of_another_method_are_not_taken(tmp_path):
    atoms = frames("dft_energy", "xtb_forces")
    assert xyz.read(write(tmp_path / "a.xyz", atoms), Selection(energy_key="dft_energy")).forces is None


def test_frames_without_forces_get_nan(tmp_path):
    atoms = frames()
    del atoms[1].arrays["REF_forces"]
    forces = xyz.read(write(tmp_path / "a.xyz", atoms)).forces
    assert np.isnan(forces).all(axis=1).tolist() == [False] * 3 + [True] * 6 + [False] * 3


def test_two_energies_that_differ_are_ambiguous(tmp_path):
    atoms = frames()
    atoms[2].calc = SinglePointCalculator(atoms[2], energy=-99.0)
    path = write(tmp_path / "a.xyz", atoms)
    with pytest.raises(InputError, match="frame 3 has different numbers under energy and REF_energy: name the key"):
        xyz.read(path)
    check(xyz.read(path, Selection(energy_key="REF_energy")))


def test_geometries_only(tmp_path):
    bare = [Atoms("OH2", WATER)]
    structures = xyz.read(write(tmp_path / "a.xyz", bare), labelled=False)
    assert structures.energies is None
    assert structures.forces is None
    assert len(structures) == 1


def test_other_formats_through_ase(tmp_path):
    ase.io.write(tmp_path / "a.traj", calculated())
    check(xyz.read(tmp_path / "a.traj"))


def test_file_name_with_at_sign(tmp_path):
    check(xyz.read(write(tmp_path / "a@1.xyz", frames())))


def test_elements_in_a_given_order(tmp_path):
    path = write(tmp_path / "a.xyz", frames())
    assert xyz.read(path, Selection(elements=["O", "H", "C"])).symbols(0) == ("O", "H", "H")
    with pytest.raises(InputError, match=r"a\.xyz: contains O, not among the elements C H"):
        xyz.read(path, Selection(elements=["C", "H"]))


def test_databases_and_xyz_together(tmp_path):
    first, last = write(tmp_path / "a.xyz", frames()), write(tmp_path / "z.xyz", frames())
    water = xyz.read(first).select([0, 2])
    sqlite.write(tmp_path / "OH2.db", {1: water}, temperatures=300)
    joined = sources.read([first, tmp_path / "OH2.db", last])
    assert joined.labels[2:6] == ("a.xyz/3", "OH2/1", "OH2/2", "z.xyz/1")
    assert joined.energies.tolist() == [-10, -11, -12, -10, -12, -10, -11, -12]


# Bad input


def spoil(change) -> list[Atoms]:
    atoms = frames()
    change(atoms[1])
    return atoms


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.info.pop("REF_energy"), r"frame 2 has no energy under the key energy or REF_energy: add it"),
        (lambda a: a.info.update(REF_energy="high"), r"frame 2: REF_energy is 'high', not one number"),
        (lambda a: a.info.update(REF_energy=[1.0, 2.0]), r"frame 2: REF_energy is .*, not one number"),
        (lambda a: a.info.update(REF_energy=np.nan), r"a\.xyz/2 has the energy nan"),
        (lambda a: a.info.update(REF_energy=np.inf), r"a\.xyz/2 has the energy inf"),
        (lambda a: a.positions.__setitem__((2, 0), np.nan), r"a\.xyz/2 has a NaN or infinite coordinate at atom 3"),
        (lambda a: a.arrays["REF_forces"].__setitem__((2, 0), np.nan), r"frame 2: REF_forces has a NaN"),
        (lambda a: a.arrays["REF_forces"].__setitem__((2, 0), np.inf), r"a\.xyz/2 has a NaN or infinite force at ato"),
        (lambda a: a.arrays.update(REF_forces=np.zeros((6, 2))), r"REF_forces is not three numbers for each of the 6"),
        (lambda a: a.positions.__setitem__(2, a.positions[3]), r"a\.xyz/2 has atoms 3 and 4 only 0 Å apart"),
        (lambda a: a.symbols.__setitem__(0, "X"), r"a\.xyz:8: 'X' in frame 2 is no element"),
    ],
)
def test_bad_frames(tmp_path, change, message):
    path = write(tmp_path / "a.xyz", spoil(change))
    with pytest.raises(InputError, match=message):
        xyz.read(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("3\n\nO 0 0 0\n", "a.xyz: ends within frame 1, which has 1 of its 3 atoms"),
        ("three atoms\n\nO 0 0 0\n", "a.xyz:1: 'three atoms' is not the number of atoms with which frame 1 begins"),
        ("1\n\nO 0 0 0\nnotes\n", "a.xyz:4: 'notes' is not the number of atoms with which frame 2 begins"),
        ("1\n", "a.xyz: ends before the comment of frame 1"),
        ("2\nenergy=1\nO 0 0 0\n\nH 0 0 1\n", "a.xyz:4: is blank, but frame 1 has 2 atoms and only 1 before it"),
        ("1\nenergy=1\nO 0 0\n", "a.xyz: frame 1 (line 1) cannot be read ("),
        ("1\nenergy=1\nO 0 ******* 0\n", "a.xyz:3: has stars in column 3, where a number was too long"),
        ("1\nenergy=1\nFoo 0 0 0\n", "a.xyz:3: 'Foo' in frame 1 is no element"),
        ("1\nenergy=1\n119 0 0 0\n", "a.xyz:3: '119' in frame 1 is no element"),
        ("1\nenergy=1\nCA 0 0 0\n", "a.xyz:3: 'CA' in frame 1 is no element"),
        ("1\nenergy=1\nO 0 0 0 1 2 3\n", "a.xyz:3: has 7 columns, but the comment of frame 1 names none"),
        ("1\nfinal energy -76.1\nO 0 0 0\n", "a.xyz: frame 1: energy is a word of its comment line, not a number"),
        ("1\n energy: -5.07 gnorm: 0.0004 xtb: 6.6\nO 0 0 0\n", "has no energy under the key energy or REF_energy"),
        ("1\nE=-5.07 step=1\nO 0 0 0\n", "under the key energy or REF_energy, only E, step: name the key"),
        ("1\nenergy=-1 energy=-2\nO 0 0 0\n", "a.xyz:2: gives energy twice, -1 and -2: leave one of them out"),
        ("1\nenergy=-5.07D+01\nO 0 0 0\n", "frame 1: energy is '-5.07D+01', not one number"),
    ],
)
def test_files_that_are_no_xyz_to_their_end(tmp_path, text, sentence):
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(InputError, match=re.escape(sentence)):
        xyz.read(tmp_path / "a.xyz")


@pytest.mark.parametrize("comment", ["energy=-1 energy=-1", "energy=-1 note='energy=-2'", 'energy=-1 note="a=1 a=2"'])
def test_one_value_of_a_key(tmp_path, comment):
    (tmp_path / "a.xyz").write_text(f"1\n{comment}\nO 0 0 0\n")
    assert xyz.read(tmp_path / "a.xyz").energies.tolist() == [-1]


@pytest.mark.parametrize("comment", ["energy=-76.1 Hartree", "energy=-76.1 energy_unit=Eh", "energy=-76.1 kcal/mol"])
def test_units_that_are_named_are_said(tmp_path, caplog, comment):
    (tmp_path / "a.xyz").write_text(f"1\nenergy=-1 eV\nO 0 0 0\n1\n{comment}\nO 0 0 0\n")
    xyz.read(tmp_path / "a.xyz")
    (record,) = caplog.records
    word = comment.split()[-1].rpartition("=")[2]
    assert f"a.xyz: frame 2 names {word} in its comment line, but energies are taken as eV" in record.getMessage()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_byte_order_mark_of_another_encoding(tmp_path, encoding):
    """As a redirection in Windows PowerShell writes it."""
    (tmp_path / "a.xyz").write_bytes("\ufeff1\r\nenergy=-1.5\r\nO 0 0 0\r\n".encode(encoding))
    assert xyz.read(tmp_path / "a.xyz").energies.tolist() == [-1.5]


@pytest.mark.parametrize("name", ["a.xyz", "OUTCAR_train.xyz", "CONFIG.extxyz", "a.xyz.gz"])
def test_what_other_programs_write(tmp_path, name, caplog):
    """Blank lines, a byte order mark, numbers for symbols; the suffix decides what a file is."""
    text = "\ufeff2\nenergy=-1.5\n8 0 0 0\nD 0 0 1\n\n\n2\nenergy=-1.25\nO1 0 0 0\nh 0 0 1.1\n\n"
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(text)
    found = xyz.read(tmp_path / name)
    assert found.symbols(0) == found.symbols(1) == ("O", "H")
    assert found.energies.tolist() == [-1.5, -1.25]
    assert found.coordinates[:, 2].tolist() == [0, 1, 0, 1.1]
    said = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert said == ["8 is read as O", "D is read as H", "O1 is read as O", "h is read as H"]


def test_a_format_that_is_named_overrules_the_suffix(tmp_path):
    path = write(tmp_path / "OUTCAR_train", frames())
    with pytest.raises(InputError, match="correct the file or its suffix, or name its format"):
        xyz.read(path)
    check(xyz.read(path, Selection(format="extxyz")))
    with pytest.raises(InputError, match=r"'extxys' is none of ASE's \(did you mean extxyz\?\)"):
        Selection(format="extxys")


def test_capitals_of_keys_do_not_matter(tmp_path):
    path = write(tmp_path / "a.xyz", calculated())
    path.write_text(path.read_text().replace(":forces:", ":FORCES:").replace("energy=", "Energy="))
    check(xyz.read(path))
    path.write_text(path.read_text().replace("Energy=", "ENERGY=1 Energy="))
    with pytest.raises(InputError, match=r"no energy under the key energy or REF_energy, only ENERGY, Energy: name"):
        xyz.read(path)


@pytest.mark.parametrize("key", ["force", "gradients", "gradient"])
def test_forces_by_other_names(tmp_path, caplog, key):
    atoms = calculated()
    for frame in atoms:
        forces = frame.calc.results.pop("forces")
        frame.arrays[key] = forces if key == "force" else -forces
    path = write(tmp_path / "a.xyz", atoms)
    if key != "force":
        assert xyz.read(path).forces is None
        (record,) = caplog.records
        assert f"frame 1 has {key}, no forces: the key {key} for forces takes them" in record.message
    check(xyz.read(path, Selection(forces_key=None if key == "force" else key)))


def test_charges_and_multiplicities_that_differ_are_said(tmp_path, caplog):
    atoms = frames()
    for i, frame in enumerate(atoms):
        frame.info |= {"charge": int(i == 1), "multiplicity": 1}
    xyz.read(write(tmp_path / "a.xyz", atoms))
    (record,) = caplog.records
    assert re.search(
        r"a\.xyz: frame 1 has the charge 0 and .*a\.xyz: frame 2 1: a model knows nothing of it", record.message
    )
    caplog.clear()
    xyz.read(tmp_path / "a.xyz", labelled=False)
    assert not caplog.records


def test_names_of_files_in_split_files(tmp_path):
    structures = xyz.read(write(tmp_path / "# 1 a.xyz", frames()))
    assert structures.labels[0] == "__1_a.xyz/1"
    chosen = Split(*(np.array([i]) for i in range(3)))
    splits.write_tvtmsk(tmp_path / "split", structures, chosen)
    found = splits.make_split(structures, [1, 1, 1], split_file=tmp_path / "split")
    assert all(np.array_equal(getattr(found, part), getattr(chosen, part)) for part in ("train", "validation", "test"))


def test_unknown_kind_of_file(tmp_path):
    (tmp_path / "a.words").write_text("nothing that ASE knows")
    with pytest.raises(InputError, match=r"a\.words: ASE cannot read it"):
        xyz.read(tmp_path / "a.words")


def test_empty_missing_and_folder(tmp_path):
    (tmp_path / "a.xyz").touch()
    with pytest.raises(InputError, match=r"a\.xyz: is empty"):
        xyz.read(tmp_path / "a.xyz")
    with pytest.raises(InputError, match=r"b\.xyz: cannot be read \(No such file"):
        xyz.read(tmp_path / "b.xyz")
    with pytest.raises(InputError, match=r"is a folder"):
        xyz.read(tmp_path)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = []
    for job in ("a/job_1", "a/job_2", "b/job 1"):
        (tmp_path / job).mkdir(parents=True)
        paths.append(write(tmp_path / job / "orca.xyz", frames()[:1]))
    paths.append(write(tmp_path / "other.xyz", frames()[:1]))
    found = xyz.read(paths).labels
    assert found == ("a/job_1/orca.xyz/1", "a/job_2/orca.xyz/1", "b/job_1/orca.xyz/1", "other.xyz/1")
    assert xyz.read(paths[:2]).labels == ("job_1/orca.xyz/1", "job_2/orca.xyz/1")


def test_a_comment_in_another_encoding(tmp_path):
    """As Latin-1 of a program of another time: what is no UTF-8 is written out, and can be written again."""
    (tmp_path / "a.xyz").write_bytes('1\nenergy=-1.5 by="Mme Ém\xe9" \nO 0 0 0\n'.encode("latin-1"))
    found = xyz.read(tmp_path / "a.xyz")
    assert found.energies.tolist() == [-1.5]
    (frame,) = xyz.frames(tmp_path / "a.xyz")
    ase.io.write(tmp_path / "b.xyz", frame, format="extxyz")
    assert "xc9m" in (tmp_path / "b.xyz").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [200, -3])
def test_atomic_numbers_of_no_element(tmp_path, number):
    atoms = Atoms(numbers=[1, number], positions=[[0, 0, 0], [0, 0, 1]])
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    ase.io.write(tmp_path / "some.traj", atoms)
    with pytest.raises(InputError, match=rf"some\.traj: frame 1: {number} is the atomic number of no element"):
        xyz.read([tmp_path / "some.traj"])
