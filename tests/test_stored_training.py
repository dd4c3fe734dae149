"""Training from stored descriptors and Jacobians: the same runs as from coordinates, whatever the source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from data_helpers import SHARED, molecules, needs_shared
from training_helpers import model, training_data

from kinml_fast import cli
from kinml_fast.data import DescriptorSource, Split, concatenate, pykinml_hdf5, read, stored
from kinml_fast.data.sources import file_digest
from kinml_fast.data.structures import Structures
from kinml_fast.errors import InputError
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train import Trainer, TrainingConfig, TrainingData

MIXED = ("CCHH", "CHHH", "HH", "HCHHC", "C")


def settings(jacobian: str, **changes) -> TrainingConfig:
    values = {"epochs": 10, "batch_size": 7, "jacobian": jacobian, "loss": {"forces": True}}
    return TrainingConfig.model_validate({**values, **changes})


def in_file(path: Path, data: TrainingData, descriptor: AEVParameters, coordinates: bool = True) -> TrainingData:
    """The data with descriptors in an HDF5 file, which counts elements in another order than the model."""
    turned = data.structures.with_elements(("H", "C"))
    descriptors = stored.compute(
        turned, replace(descriptor, elements=("H", "C")), torch.float64, jacobian=turned.forces is not None
    )
    pykinml_hdf5.write(path, turned, descriptors)
    if not coordinates:
        with h5py.File(path, "r+") as file:
            del file["Base_Group/xp"]
    return replace(data, structures=read(path), source=DescriptorSource(files=((path, file_digest(path)),)))


def trained(data: TrainingData, config: TrainingConfig, **options) -> tuple[torch.Tensor, object]:
    network = model(dtype=getattr(torch, config.dtype))
    trainer = Trainer(network, data, config, **options)
    summary = trainer.fit()
    return network.networks.weights.detach(), summary


def assert_same(a: tuple, b: tuple, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=tolerance)
    for part in ("train", "validation", "test"):
        assert a[1].errors[part].rmse == pytest.approx(b[1].errors[part].rmse, rel=10 * tolerance)
        assert (part in a[1].forces) == (part in b[1].forces)
        if part in a[1].forces:
            assert a[1].forces[part].rmse == pytest.approx(b[1].forces[part].rmse, rel=10 * tolerance)


@pytest.mark.parametrize("source", ["native", "aevmod", "file", "file without coordinates"])
def test_ten_epochs_of_mixed_molecules(tmp_path, source):
    """Sizes from one to five, elements that molecules lack, molecules without forces."""
    data = training_data(10, "some", MIXED)
    expected = trained(data, settings("recompute"))
    if source == "aevmod":
        pytest.importorskip("aevmod")
        data = replace(data, source=DescriptorSource("aevmod"))
    elif source != "native":
        data = in_file(tmp_path / "data.h5", data, model().descriptor, source == "file")
        assert (data.structures.coordinates is None) == (source == "file without coordinates")
    assert_same(trained(data, settings("stored")), expected)


def of_files(structures: Structures, count: int) -> TrainingData:
    order = np.random.default_rng(1).permutation(len(structures))[:count]
    a, b = count * 2 // 3, count * 5 // 6
    sae = np.linalg.lstsq(structures.counts(), structures.energies, rcond=None)[0]
    return TrainingData(structures, Split(order[:a], order[a:b], order[b:]), sae)


@pytest.mark.parametrize("name", [pytest.param("C5H5 of PyKinML", marks=needs_shared), "mixed shipped"])
def test_ten_epochs_of_real_data(name):
    if name == "mixed shipped":
        names = ("C2H2", "C2H3", "C3H2", "C3H3")
        parts = [read(f"shipped:{formula}.db") for formula in names]
        data = of_files(concatenate(parts, ("C", "H")), sum(map(len, parts)))
        assert len(set(data.structures.sizes.tolist())) == 3
    else:
        data = of_files(read(SHARED / "C5H5.db"), 240)
    results = []
    for jacobian in ("recompute", "stored"):
        torch.manual_seed(3)
        network = EnergyModel(AEVParameters.aevmod(("C", "H")))
        start = network.networks.weights.detach().clone()
        summary = Trainer(network, data, settings(jacobian, batch_size=20)).fit()
        results.append((network.networks.weights.detach(), summary))
    assert (results[0][0] - start).abs().max() > 1e-3
    assert_same(*results)


def test_float32_is_stored_in_float32(tmp_path):
    data = training_data(10, "all", MIXED)
    config = settings("stored", epochs=2, dtype="float32")
    expected = trained(data, settings("recompute", epochs=2, dtype="float32"))
    assert_same(trained(data, config), expected, 1e-4)
    assert_same(trained(in_file(tmp_path / "a.h5", data, model().descriptor), config), expected, 1e-4)


def test_energies_alone_need_no_jacobians(tmp_path):
    data = training_data(10, "none", MIXED)
    without = {"loss": {"forces": False}}
    expected = trained(data, settings("recompute", **without))
    assert_same(
        trained(in_file(tmp_path / "a.h5", data, model().descriptor, False), settings("stored", **without)), expected
    )


def test_forces_taken_up_and_given_up(tmp_path):
    data = training_data(10, "some", MIXED)
    phases = {"loss": {"forces": True, "forces_from": 3, "forces_until": 7}}
    expected = trained(data, settings("recompute", **phases))
    assert_same(
        trained(in_file(tmp_path / "a.h5", data, model().descriptor, False), settings("stored", **phases)), expected
    )


def test_what_needs_coordinates_says_so(tmp_path):
    data = in_file(tmp_path / "data.h5", training_data(10, "all", MIXED), model().descriptor, False)
    with pytest.raises(InputError, match=r"no coordinates, only stored descriptors: set training.jacobian=stored"):
        Trainer(model(), data, settings("recompute"))
    seen = []

    def penalty(trained, batch):
        seen.append(batch.coordinates)
        return trained.networks.weights.square().sum()

    Trainer(model(), data, settings("stored", epochs=1), extra_losses={"penalty": penalty}).fit()
    assert seen
    assert all(coordinates is None for coordinates in seen)


def test_a_checkpoint_knows_its_descriptors(tmp_path):
    data = in_file(tmp_path / "data.h5", training_data(10, "all", MIXED), model().descriptor)
    Trainer(model(), data, settings("stored", epochs=1), tmp_path / "run").fit()
    with h5py.File(tmp_path / "data.h5", "r+") as file:
        file["Base_Group/dxx"][0] = 2 * file["Base_Group/dxx"][0]
    other = replace(data, source=DescriptorSource(files=((tmp_path / "data.h5", file_digest(tmp_path / "data.h5")),)))
    with pytest.raises(InputError, match="belongs to other data"):
        Trainer(model(), other, settings("stored", epochs=2), tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="has changed since the data were prepared"):
        Trainer(model(), data, settings("stored", epochs=2), tmp_path / "run", resume=True).fit()


def test_a_run_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    structures = concatenate([molecules("HCH", 12, 1), molecules("CHHCH", 12, 2)])
    descriptor = AEVParameters.aevmod(("C", "H"), n_radial=4, n_angular=2, n_sections=2)
    descriptors = stored.compute(structures, descriptor, torch.float64, jacobian=True)
    split = Split(np.arange(0, 16), np.arange(16, 20), np.arange(20, 24))
    pykinml_hdf5.write(tmp_path / "data.h5", structures, descriptors, split)
    with h5py.File("data.h5", "r+") as file:
        del file["Base_Group/xp"]
    Path("run.yaml").write_text(
        "data: {files: [data.h5], split_file: data.h5, elements: [H, C]}\n"
        "descriptor: {n_radial: 4, n_angular: 2, n_sections: 2}\n"
        "network: {layers: [6, 1]}\n"
        "training: {epochs: 2, batch_size: 5, jacobian: stored, loss: {forces: true}}\n"
    )
    assert cli.main(["train", "run.yaml"]) == 0
    assert Path("runs/run/report").is_dir()
    assert cli.main(["train", "--resume", "runs/run", "training.epochs=3"]) == 0
    capsys.readouterr()
    for arguments, message in (
        (["train", "run.yaml", "run=runs/b", "training.jacobian=recompute"], "set training.jacobian=stored"),
        (["train", "run.yaml", "run=runs/c", "descriptor.n_radial=5"], "have 22 for C H: set descriptor.n_radial"),
        (["evaluate", "runs/run/model.pt", "data.h5"], "no coordinates, only stored descriptors"),
        (["predict", "runs/run/model.pt", "data.h5", "-o", "out.xyz"], "data.h5"),
        (
            ["train", "run.yaml", "descriptor.backend=aevmod", "training.jacobian=recompute"],
            "descriptor.backend is aevmod, which computes only what is stored",
        ),
    ):
        assert cli.main(arguments) == 2, arguments
        assert message in " ".join(capsys.readouterr().err.split())
