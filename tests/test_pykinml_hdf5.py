"""PyKinML's HDF5 files of descriptors: reading, writing, and as data of a run."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from data_helpers import molecules, same

from kinml_fast.data import (
    Split,
    concatenate,
    prepare,
    prepared,
    pykinml_hdf5,
    read,
    sources,
    splits,
    sqlite,
    stored,
)
from kinml_fast.data.split import PARTS
from kinml_fast.data.stored import StoredDescriptors
from kinml_fast.data.structures import Structures
from kinml_fast.errors import InputError
from kinml_fast.nn import AEVParameters

SETTINGS = {"n_radial": 4, "n_angular": 3, "n_sections": 2, "cutoffs": [5.2, 3.8], "beta": 0.95}
PARAMETERS = AEVParameters.aevmod(("C", "H"), **SETTINGS)


def mixed_structures() -> Structures:
    """Atoms in no order of elements, two sizes, a structure without carbon."""
    return concatenate([molecules("CHHCH", 4, 1), molecules("HH", 3, 2), molecules("HCC", 3, 3)])


def descriptors_of(structures: Structures, jacobian: bool = True) -> StoredDescriptors:
    parameters = AEVParameters.aevmod(structures.elements, **SETTINGS)
    return stored.compute(structures, parameters, torch.float64, jacobian=jacobian)


@pytest.fixture
def structures() -> Structures:
    return mixed_structures()


@pytest.fixture
def path(tmp_path, structures) -> Path:
    """A file with all data sets."""
    split = Split([4, 0, 1, 2, 7, 8], [3, 5], [6, 9])
    pykinml_hdf5.write(tmp_path / "data.h5", structures, descriptors_of(structures), split)
    return tmp_path / "data.h5"


@contextlib.contextmanager
def changed(path: Path):
    """The group of a file, to change it."""
    with h5py.File(path, "r+") as file:
        yield file["Base_Group"]


def put(group: h5py.Group, name: str, values: np.ndarray, **options) -> None:
    """Replace a data set."""
    if name in group:
        del group[name]
    group.create_dataset(name, data=values, **options)


def load(path: Path, parameters: AEVParameters = PARAMETERS, dtype: torch.dtype = torch.float64, jacobian: bool = True):
    structures = pykinml_hdf5.read([path], parameters.elements)
    return structures, pykinml_hdf5.read_descriptors([path], structures, parameters, dtype, jacobian=jacobian)


# ---- The format ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_written_is_read(path, structures, dtype):
    found, descriptors = load(path, dtype=dtype)
    assert same(found, structures)
    expected = descriptors_of(structures)
    assert torch.equal(descriptors.features, expected.features.to(dtype))
    assert torch.equal(descriptors.jacobian, expected.jacobian.to(dtype))
    assert load(path, jacobian=False)[1].jacobian is None


def test_padding_may_hold_anything(path, tmp_path, structures):
    expected = descriptors_of(structures)
    wide = torch.full((len(structures.species), PARAMETERS.length, 40), float("nan"), dtype=torch.float64)
    for i, size in enumerate(structures.sizes[structures.owners]):
        wide[i, :, : 3 * size] = expected.jacobian[i, :, : 3 * size]
    pykinml_hdf5.write(tmp_path / "wide.h5", structures, replace(expected, jacobian=wide))
    assert torch.equal(load(tmp_path / "wide.h5")[1].jacobian, expected.jacobian)


def test_pykinml_finds_everything_where_it_looks(path, structures):
    """The accesses of PyKinML's reader, and its meaning of each."""
    expected = descriptors_of(structures)
    with h5py.File(path) as file:
        group = file["Base_Group"]
        assert list(group.attrs["Types"]) == ["C", "H"]
        assert group.attrs["ndat"] == 10
        assert group["met_s"].shape == (10, 6)
        assert group["symbols"].shape == (10, 32)
        assert group["yy"].shape == group["ww"].shape == (10, 1)
        assert group["ff"].shape == (10, 1)
        assert group["tvtmsk"][()].tolist() == [1, 1, 1, 0, 1, 0, -1, 1, 1, -1]
        for i in range(10):
            a, b = structures.offsets[i : i + 2]
            assert (group["xip"][i], group["xfp"][i]) == (a, b)
            np.testing.assert_array_equal(group["xp"][a:b], structures.coordinates[a:b])
            symbols = [s.decode() for s in group["symbols"][i]]
            assert symbols == [*structures.symbols(i), *[""] * (32 - (b - a))]
            assert group["yy"][i, 0] == group["met_e"][i] == structures.energies[i]
            np.testing.assert_array_equal(group["ff"][i][0], structures.forces[a:b].ravel())
            np.testing.assert_array_equal(group["met_f"][i].reshape(-1, 3), structures.forces[a:b])
            assert group["met_s"][i][5].decode() == structures.labels[i]
            for t, element in enumerate("CH"):
                atoms = [a + k for k, symbol in enumerate(structures.symbols(i)) if symbol == element]
                rows = slice(group["xit"][i][t], group["xft"][i][t])
                np.testing.assert_array_equal(group["xx"][rows], expected.features[atoms])
                for row, atom in zip(group["dxx"][rows], atoms, strict=True):
                    matrix = row.reshape(PARAMETERS.length, -1)
                    np.testing.assert_array_equal(matrix, expected.jacobian[atom, :, : 3 * (b - a)])


def test_a_file_of_aevmods_numbers(tmp_path):
    """A file written from nothing but aevmod and the description of the format."""
    aevmod = pytest.importorskip("aevmod")
    geometries = [("HCH", molecules("HCH", 1, 5)), ("OHCHC", molecules("OHCHC", 1, 6)), ("HO", molecules("HO", 1, 7))]
    types = ["H", "O", "C"]
    computer = aevmod.aev(types, 4, 3, 2, [5.2, 3.8], 0.95)
    xx, dxx, xit, xft, forces = [], [], [], [], []
    vectors_of, slopes_of = [], []
    for symbols, molecule in geometries:
        config = aevmod.config(list(symbols))
        config.add_structures(molecule.coordinates.reshape(1, -1))
        computer.build_index_sets(config)
        vectors, slopes = np.array(computer.eval(config)[0]), np.array(computer.eval_Jac_sac(config)[0])
        xit.append([])
        xft.append([])
        for t in types:
            xit[-1].append(len(xx))
            atoms = [k for k, symbol in enumerate(symbols) if symbol == t]
            xx += [vectors[k] for k in atoms]
            dxx += [slopes[k].ravel() for k in atoms]
            xft[-1].append(len(xx))
        vectors_of.append(vectors)
        slopes_of.append(slopes)
        forces.append(molecule.forces.ravel())
    sizes = [3, 5, 2]
    path = tmp_path / "aevmod.hdf5"
    with h5py.File(path, "w") as file:
        group = file.create_group("Base_Group")
        group.attrs["Types"], group.attrs["ndat"] = types, 3
        padded = [[*symbols, *[""] * (32 - len(symbols))] for symbols, _ in geometries]
        group.create_dataset("symbols", data=padded, dtype=h5py.string_dtype())
        numbers = h5py.vlen_dtype(np.float64)
        for name, rows in (("dxx", dxx), ("ff", forces), ("met_f", forces)):
            data = group.create_dataset(name, (len(rows), 1) if name == "ff" else (len(rows),), dtype=numbers)
            for i, row in enumerate(rows):
                data[i] = row
        group["xit"], group["xft"], group["xx"] = xit, xft, xx
        group["xip"], group["xfp"] = [0, 3, 8], [3, 8, 10]
        group["xp"] = np.concatenate([molecule.coordinates for _, molecule in geometries])
        group["yy"] = np.array([[molecule.energies[0]] for _, molecule in geometries])
        group["tvtmsk"] = [1, 0, -1]

    parameters = AEVParameters.aevmod(types, **SETTINGS)
    structures, descriptors = load(path, parameters)
    assert structures.labels == ("aevmod.hdf5/1", "aevmod.hdf5/2", "aevmod.hdf5/3")
    assert [structures.symbols(i) for i in range(3)] == [tuple(symbols) for symbols, _ in geometries]
    assert descriptors.jacobian.shape == (10, parameters.length, 15)
    for i, (_, molecule) in enumerate(geometries):
        a, b = structures.offsets[i : i + 2]
        np.testing.assert_array_equal(structures.coordinates[a:b], molecule.coordinates)
        np.testing.assert_array_equal(structures.forces[a:b], molecule.forces)
        assert structures.energies[i] == molecule.energies[0]
        np.testing.assert_array_equal(descriptors.features[a:b], vectors_of[i])
        np.testing.assert_array_equal(descriptors.jacobian[a:b, :, : 3 * sizes[i]], slopes_of[i])
        assert not descriptors.jacobian[a:b, :, 3 * sizes[i] :].any()
    # The sign: column 3 q + c of row (i, d) is d a_id / d x_qc.
    moved = replace(structures, coordinates=structures.coordinates + 1e-5 * np.eye(10)[:, :1] * [0, 1, 0])
    change = (descriptors_of(moved).features - descriptors_of(structures).features)[:3] / 1e-5
    torch.testing.assert_close(change, descriptors.jacobian[:3, :, 1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("elements", [("H", "C"), ("O", "H", "N", "C"), ("C", "N", "H")])
def test_elements_in_another_order(path, elements):
    """The blocks of the descriptor are put where the model wants them."""
    parameters = AEVParameters.aevmod(elements, **SETTINGS)
    structures, descriptors = load(path, parameters)
    expected = stored.compute(structures, parameters, torch.float64, jacobian=True)
    torch.testing.assert_close(descriptors.features, expected.features, rtol=0, atol=1e-14)
    torch.testing.assert_close(descriptors.jacobian, expected.jacobian, rtol=0, atol=1e-14)


def test_an_element_that_does_not_occur_may_be_left_out(tmp_path):
    structures = molecules("HCH", 3).with_elements(("N", "C", "H"))
    pykinml_hdf5.write(tmp_path / "a.h5", structures, descriptors_of(structures))
    _, descriptors = load(tmp_path / "a.h5")
    expected = descriptors_of(molecules("HCH", 3))
    torch.testing.assert_close(descriptors.features, expected.features, rtol=0, atol=1e-14)
    torch.testing.assert_close(descriptors.jacobian, expected.jacobian, rtol=0, atol=1e-14)


def test_labels_when_the_metadata_are_no_table(path):
    with changed(path) as group:
        del group["met_s"]
        group["met_s"] = "text"
    assert read(path).labels[0] == f"{path.name}/1"


def test_some_structures_of_several_files_in_any_order(path, tmp_path, structures):
    other = molecules("CHHHHCH", 5, 9)
    pykinml_hdf5.write(tmp_path / "other.h5", other, descriptors_of(other))
    everything = concatenate([structures, other])
    some = everything.select([13, 2, 6, 10, 0])
    found = pykinml_hdf5.read_descriptors([path, tmp_path / "other.h5"], some, PARAMETERS, torch.float64, jacobian=True)
    expected = descriptors_of(some)
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.jacobian, expected.jacobian)
    assert same(read([path, tmp_path / "other.h5"]), everything)


def test_molecules_of_more_than_32_atoms(tmp_path):
    structures = molecules("CH" * 20, 1)
    pykinml_hdf5.write(tmp_path / "a.h5", structures, descriptors_of(structures, jacobian=False))
    assert same(pykinml_hdf5.read([tmp_path / "a.h5"]), structures)


def test_structures_without_forces(tmp_path, structures):
    forces = structures.forces.copy()
    forces[:5] = np.nan
    some = replace(structures, forces=forces)
    pykinml_hdf5.write(tmp_path / "some.h5", some, descriptors_of(some))
    assert same(pykinml_hdf5.read([tmp_path / "some.h5"]), some)
    none = replace(structures, forces=None)
    pykinml_hdf5.write(tmp_path / "none.h5", none, descriptors_of(none))
    assert same(pykinml_hdf5.read([tmp_path / "none.h5"]), none)


# ---- Files that have less ------------------------------------------------------------------------


def test_files_without_this_and_that(path, structures):
    with changed(path) as group:
        for name in ("xp", "xip", "xfp", "ww", "met_e", "met_s", "met_f", "tvtmsk"):
            del group[name]
    found, descriptors = load(path)
    assert found.coordinates is None
    assert found.labels == tuple(f"data.h5/{i}" for i in range(1, 11))
    np.testing.assert_array_equal(found.forces, structures.forces)
    assert torch.equal(descriptors.jacobian, descriptors_of(structures).jacobian)
    selected = found.select([3, 1])
    assert selected.coordinates is None
    assert selected.with_elements(("H", "C")).labels == ("data.h5/4", "data.h5/2")
    with pytest.raises(InputError, match="with and without coordinates cannot be joined"):
        concatenate([found, structures])


def test_forces_are_taken_from_the_metadata_where_ff_is_empty(path, structures):
    """What PyKinML leaves when it could not write ff."""
    with changed(path) as group:
        del group["ff"]
        group.create_dataset("ff", (10, 1), dtype=h5py.vlen_dtype(np.float64))
    assert same(pykinml_hdf5.read([path]), structures)


def test_symbols_and_metadata_of_older_files(path, structures):
    texts = [str(list(structures.symbols(i))) for i in range(10)]
    meta = [["0.0", "", "", "", "", "", label, ""] for label in structures.labels]
    with changed(path) as group:
        put(group, "symbols", texts, dtype=h5py.string_dtype())
        del group["met_s"]
        put(group, "meta", meta, dtype=h5py.string_dtype())
    assert same(pykinml_hdf5.read([path]), structures)


def test_jacobians_are_needed_only_for_forces(path, structures):
    with changed(path) as group:
        del group["dxx"]
    assert torch.equal(load(path, jacobian=False)[1].features, descriptors_of(structures).features)
    with pytest.raises(InputError, match=r"has no Jacobians \(dxx\) .*: train on energies only"):
        load(path)


# ---- What is refused -----------------------------------------------------------------------------


def set_value(name: str, where: tuple, value: float) -> Callable[[h5py.Group], None]:
    def change(group: h5py.Group) -> None:
        values = group[name][()]
        values[where] = value
        group[name][...] = values

    return change


def set_row(name: str, row: int, value: np.ndarray) -> Callable[[h5py.Group], None]:
    def change(group: h5py.Group) -> None:
        group[name][row] = value

    return change


def delete(name: str) -> Callable[[h5py.Group], None]:
    return lambda group: group.__delitem__(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (delete("xx"), "Base_Group has no data set xx"),
        (delete("symbols"), "has no data set symbols"),
        (delete("xit"), "has no data set xit"),
        (delete("yy"), "has no data set yy"),
        (delete("xip"), "has no data set xip"),
        (lambda group: group.attrs.__delitem__("Types"), "no attribute Types"),
        (lambda group: group.attrs.__setitem__("Types", ["C", "Hx"]), "'Hx': no such chemical element"),
        (lambda group: group.attrs.__setitem__("Types", ["C", "C"]), "names one twice"),
        (
            lambda group: group.attrs.__setitem__("Types", ["C", "N"]),
            "structure 1 contains 'H', which is not among its",
        ),
        (lambda group: group.attrs.__setitem__("ndat", 11), "symbols of 10 structures, and ndat is 11"),
        (set_value("symbols", (2, 0), b"X"), "structure 3 contains 'X'"),
        (set_value("symbols", (2,), b""), "structure 3 has no atoms"),
        (set_value("xft", (1, 0), 0), r"xit and xft give structure 2 .* atoms of C H"),
        (lambda group: (set_value("xit", (1,), 0)(group), set_value("xft", (1,), [2, 3])(group)), "own row of xx"),
        (set_value("xfp", (0,), 4), "xip and xfp do not fit"),
        (lambda group: put(group, "xx", group["xx"][:-1]), r"xx has the shape \[34, 26\]"),
        (lambda group: put(group, "xx", group["xx"][:, :-1]), "has descriptors of 25 numbers, .* have 26 for C H"),
        (lambda group: put(group, "yy", group["yy"][:-1]), r"yy has the shape \[9, 1\]"),
        (lambda group: put(group, "xp", group["xp"][:, :2]), r"xp has the shape \[35, 2\]"),
        (lambda group: put(group, "dxx", group["dxx"][:-1], dtype=group["dxx"].dtype), "has no Jacobians"),
        (set_value("xx", (30, 5), np.nan), r"row 30 of xx \(HC2/2\) has a NaN"),
        (set_value("yy", (3,), np.inf), r"CH2CH/4 has the energy inf"),
        (set_value("xp", (7,), np.nan), r"CH2CH/2 has a NaN or infinite coordinate"),
        (set_row("dxx", 21, np.zeros(5)), r"row 21 of dxx \(H2/1\) has 5 numbers, expected 26 x 6"),
        (set_row("dxx", 21, np.full(26 * 6, np.nan)), r"row 21 of dxx \(H2/1\) has a NaN"),
        (set_row("ff", 4, np.zeros(9)), "ff has 9 numbers for H2/1, expected 6 force components"),
        (set_row("ff", 4, np.full(6, np.nan)), "ff has a NaN or infinite number for H2/1"),
    ],
)
def test_what_is_wrong_is_said(path, change, message):
    with changed(path) as group:
        change(group)
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


def test_other_hdf5_files(tmp_path, structures):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["something"] = 1
    with pytest.raises(InputError, match=r"no group Base_Group .*there is something"):
        read(path)
    path.write_bytes(b"not HDF5")
    with pytest.raises(InputError, match="cannot be read as HDF5"):
        read(path)


def test_truncated_files(path, tmp_path):
    whole = path.read_bytes()
    for share in (0.01, 0.2, 0.5, 0.8, 0.99):
        part = tmp_path / "part.h5"
        part.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=r"part.h5: cannot be read as HDF5 \(.*\): take an intact copy"):
            load(part)


def test_a_heap_in_which_hdf5_would_not_return(path, tmp_path):
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")
    content[heap + 16 : heap + 32] = bytes(16)
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(content)
    with pytest.raises(InputError, match=f"damaged.h5: is damaged at byte {heap + 16}, in rows of data"):
        load(damaged)
    damaged.write_bytes(content[: heap + 10])
    with pytest.raises(InputError, match=r"damaged.h5: cannot be read as HDF5"):
        load(damaged)


def test_two_files_with_one_label(path, tmp_path):
    (tmp_path / "copy.h5").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="both have a structure CH2CH/1: leave out one"):
        read([path, tmp_path / "copy.h5"])


def test_structures_that_are_not_in_the_file(path, structures):
    more = concatenate([structures, molecules("CCC", 1)])
    with pytest.raises(InputError, match="C3/1 has no stored descriptors"):
        pykinml_hdf5.read_descriptors([path], more, PARAMETERS, torch.float64, jacobian=True)
    other = replace(molecules("CHHHC", 1), labels=("CH2CH/1",))
    with pytest.raises(InputError, match="CH2CH/1 consists of C H H C H, not of C H H H C"):
        pykinml_hdf5.read_descriptors([path], other, PARAMETERS, torch.float64, jacobian=True)


def test_other_settings_of_the_descriptor_are_noticed(path):
    with pytest.raises(InputError, match=r"descriptors differ by up to .* set descriptor.n_radial"):
        load(path, AEVParameters.aevmod(("C", "H"), **{**SETTINGS, "beta": 0.9}))
    with pytest.raises(InputError, match="descriptors differ by up to"):
        load(path, AEVParameters.aevmod(("C", "H"), **{**SETTINGS, "n_angular": 2, "n_sections": 3}))


def test_jacobians_that_are_no_derivatives_are_noticed(path, structures, caplog):
    """PyKinML's files have those of aevmod's eval_Jac: they are taken as they are, and the user is told."""
    with caplog.at_level(logging.WARNING):
        load(path)
        assert not caplog.records
        with changed(path) as group:
            group["dxx"][0] = group["dxx"][0] + 0.01
        _, descriptors = load(path)
    assert "its Jacobians differ by up to 0.01 1/Å from the derivatives of its descriptors" in caplog.text
    difference = descriptors.jacobian[0] - descriptors_of(structures).jacobian[0]
    torch.testing.assert_close(difference, torch.full_like(difference, 0.01), rtol=0, atol=1e-12)


# ---- Writing -------------------------------------------------------------------------------------


def test_what_cannot_be_written(tmp_path, structures):
    path = tmp_path / "a.h5"
    path.write_text("before")
    good = descriptors_of(structures)

    def write(structures=structures, split=None, **changes):
        pykinml_hdf5.write(path, structures, replace(good, **changes), split)

    with pytest.raises(InputError, match="without energies"):
        write(replace(structures, energies=None))
    with pytest.raises(InputError, match="without coordinates"):
        write(replace(structures, coordinates=None))
    with pytest.raises(InputError, match=r"features of shape \[34, 26\] given for 35 atoms"):
        write(features=good.features[1:])
    with pytest.raises(InputError, match=r"Jacobian of shape \[35, 26, 14\] given, expected \[35, 26, 15\]"):
        write(jacobian=good.jacobian[:, :, 1:])
    with pytest.raises(InputError, match="the split does not hold every structure"):
        write(split=Split([0, 1], [2], [3]))
    assert path.read_text() == "before"


def test_a_full_disk_changes_nothing(tmp_path, structures):
    """Not even at the end of the process, where HDF5 closes what it could not write."""
    path = tmp_path / "a.h5"
    path.write_text("before")
    script = """
import resource, sys
import numpy as np
import torch
from kinml_fast.data import pykinml_hdf5
from kinml_fast.data.stored import StoredDescriptors
from kinml_fast.data.structures import Structures
from kinml_fast.data.split import PARTS
from kinml_fast.errors import InputError

x = np.random.default_rng(0).uniform(size=(20, 5, 3)) + 2 * np.arange(5)[:, None]
structures = Structures.of_one_formula(list("CHCHH"), x, np.zeros(20), x)
descriptors = StoredDescriptors(torch.zeros(100, 30).double(), torch.zeros(100, 30, 15).double())
for limit in (100, 10_000, 100_000, 350_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        pykinml_hdf5.write(sys.argv[1], structures, descriptors)
    except InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"{path}: could not be written (File too large): nothing was changed"] * 4
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_no_folder_to_write_into(tmp_path, structures):
    with pytest.raises(InputError, match="cannot be written"):
        pykinml_hdf5.write(tmp_path / "missing" / "a.h5", structures, descriptors_of(structures))


# ---- As data of a run ----------------------------------------------------------------------------


def test_prepared_data_know_where_the_descriptors_are(path, tmp_path, structures):
    data = prepare(path, split_file=path, descriptor=SETTINGS, path=tmp_path / "prepared.h5")
    assert [getattr(data.split, part).tolist() for part in PARTS] == [[0, 1, 2, 4, 7, 8], [3, 5], [6, 9]]
    assert same(data.structures, structures)
    # The prepared data do not hold the descriptors, but find them again.
    for again in (prepared.load(tmp_path / "prepared.h5"), prepare(path, split_file=path, descriptor=SETTINGS)):
        assert again.source == data.source
        some = again.structures.select([9, 0])
        found = again.source.load(some, PARAMETERS, torch.float64, jacobian=True)
        assert torch.equal(found.jacobian, descriptors_of(some).jacobian)
    with changed(path) as group:
        group["ww"][0] = 2.0
    with pytest.raises(InputError, match=r"data.h5: has changed since the data were prepared"):
        data.source.load(structures, PARAMETERS, torch.float64, jacobian=True)
    path.unlink()
    with pytest.raises(InputError, match=r"data.h5: cannot be read"):
        data.source.load(structures, PARAMETERS, torch.float64, jacobian=True)


def test_prepared_data_without_coordinates(path, tmp_path):
    with changed(path) as group:
        del group["xp"]
    data = prepare(path, split=[6, 2, 2], descriptor=SETTINGS, path=tmp_path / "prepared.h5")
    again = prepared.load(tmp_path / "prepared.h5")
    assert again.structures.coordinates is None
    assert again.structures.labels == data.structures.labels
    assert again.source.load(again.structures, PARAMETERS, torch.float32, jacobian=True).jacobian.dtype == torch.float32


def test_the_backend_is_the_descriptors(tmp_path):
    structures = molecules("CHH", 8)
    sqlite.write(tmp_path / "CH2.db", {1: structures}, temperatures=300)
    settings = {**SETTINGS, "backend": "aevmod"}
    data = prepare(tmp_path / "CH2.db", split=[4, 2, 2], descriptor=settings, path=tmp_path / "a.h5")
    assert data.source == prepared.load(tmp_path / "a.h5").source == sources.DescriptorSource("aevmod")


def test_tvtmsk_with_other_numbers(path):
    with changed(path) as group:
        group["tvtmsk"][0] = 7
    with pytest.raises(InputError, match="tvtmsk contains other numbers than 1, 0 and -1"):
        splits.read_tvtmsk(path)
    with changed(path) as group:
        group["tvtmsk"][...] = 1
    with pytest.raises(InputError, match="leaves no validation structures"):
        prepare(path, split_file=path)
