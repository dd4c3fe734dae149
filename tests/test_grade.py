"""Extrapolation grades: the formula, the plain file's numbers, what they say of atoms far from the training data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_helpers import crystal_data

from kinml_fast import ops
from kinml_fast.cli import main
from kinml_fast.data import read
from kinml_fast.deploy import grade, model_file, plain
from kinml_fast.deploy.export import structures
from kinml_fast.errors import DataError
from kinml_fast.nn import AEVParameters, EnergyModel


def model(dtype: torch.dtype = torch.float64, elements=("C", "H")) -> EnergyModel:
    torch.manual_seed(0)
    return EnergyModel(AEVParameters.aevmod(elements), dtype=dtype)


@pytest.fixture(scope="module")
def training():
    return read("shipped:C5H5.db").select(range(0, 1000, 3))


@pytest.fixture(scope="module")
def matrices(training):
    return grade.fit(model(), training)


def of(structures, matrices, moved: float = 0.0) -> np.ndarray:
    coordinates = structures.coordinates + moved * np.random.default_rng(1).normal(size=structures.coordinates.shape)
    tensors = [torch.from_numpy(x) for x in (coordinates, structures.species, structures.offsets)]
    return grade.grades(model(), matrices, *tensors).numpy()


@pytest.mark.usefixtures("any_threads")
def test_the_formula(training):
    torch.set_num_threads(2)  # after which torch.linalg.inv does not end
    one, matrices = model(), grade.fit(model(), training)
    tensors = [torch.from_numpy(x) for x in (training.coordinates, training.species, training.offsets)]
    a = one.aev(*tensors).numpy()
    for s in range(2):
        rows = a[training.species == s]
        moment = rows.T @ rows
        ridge = 1e-6 * np.trace(moment) / len(moment)
        solved = np.linalg.solve(moment + ridge * np.eye(len(moment)), rows.T).T
        leverages = np.einsum("ni,ni->n", rows, solved)
        np.testing.assert_allclose(
            of(training, matrices)[training.species == s], leverages / leverages.max(), rtol=1e-6
        )


def test_atoms_far_from_the_training_data_have_larger_ones(training, matrices):
    assert of(training, matrices).max() == pytest.approx(1)
    others = read("shipped:C5H5.db").select(range(1, 1000, 3))
    medians = [np.median(of(others, matrices, moved)) for moved in (0, 0.1, 0.3)]
    assert medians[0] < 0.2 < 1 < medians[2]
    assert medians == sorted(medians)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_plain_file_has_the_same(tmp_path, training, dtype):
    one = model(dtype)
    source, path = tmp_path / "model.pt", tmp_path / "model.kinml"
    model_file.save(source, one)
    assert main(["export", str(source), "-o", str(path), "--training-data", "shipped:C5H5.db"]) == 0
    found = grade.fit(one, read("shipped:C5H5.db"))
    potential = plain.PlainPotential(path)
    for structure in structures(2):
        coordinates, species, offsets, cells, periodic = structure.tensors(dtype)
        around = ops.surroundings(cells, periodic)
        expected = grade.grades(one, found, coordinates, species, offsets, around)
        arguments = structure.positions, structure.species, structure.cell, structure.periodic
        grades = [potential(*arguments, threads=threads)["grades"] for threads in (1, 2)]
        np.testing.assert_allclose(grades[0], expected.numpy(), rtol=1e-6 if dtype == torch.float64 else 1e-3)
        assert np.array_equal(*grades)


def test_training_crystals_have_their_images():
    data, one = crystal_data().structures, model()
    around = ops.surroundings(torch.from_numpy(data.cells), torch.from_numpy(data.periodic))
    tensors = [torch.from_numpy(x) for x in (data.coordinates, data.species, data.offsets)]
    found = grade.grades(one, grade.fit(one, data), *tensors, around)
    for s in range(2):
        assert float(found[data.species == s].max()) == pytest.approx(1, rel=1e-9)


def test_mistakes(tmp_path, training, capsys):
    with pytest.raises(DataError, match="no training structure has the element O"):
        grade.fit(model(elements=("C", "H", "O")), training)
    source = tmp_path / "model.pt"
    model_file.save(source, model())
    assert main(["export", str(source), "-o", str(tmp_path / "m.ts"), "--training-data", "shipped:C5H5.db"]) == 2
    assert "only plain files (.kinml) have extrapolation grades" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
