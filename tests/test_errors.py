"""Mistakes are told apart by class, by where they are, and all of them are InputErrors that end in exit code 2."""

from __future__ import annotations

import ase
import pytest

import kinml_fast
from kinml_fast import KinMLCalculator, cli, devices
from kinml_fast.data import Selection, prepare, read
from kinml_fast.deploy import model_file, pykinml_checkpoint
from kinml_fast.errors import ConfigError, DataError, DeviceError, InputError, ModelError
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train import config, continued


def model() -> EnergyModel:
    return EnergyModel(AEVParameters.aevmod(("C", "H"), 2, 2, 2), [1], ["identity"])


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        (DataError, lambda: read("nothing.db")),
        (DataError, lambda: read("nothing*.xyz")),
        (DataError, lambda: read("shipped:C2H2.db", Selection(fidelity=7))),
        (DataError, lambda: prepare("shipped:C2H2.db", split_file="nothing.txt")),
        (DataError, lambda: prepare("shipped:C2H2.db", weights="nothing.txt")),
        (DataError, lambda: KinMLCalculator(model()).get_potential_energy(ase.Atoms("O"))),
        (ModelError, lambda: model_file.load("nothing.pt")),
        (ModelError, lambda: model_file.load_many("nothing*.pt")),
        (ModelError, lambda: pykinml_checkpoint.load("nothing.pt")),
        (ModelError, lambda: continued.load("nothing.pt")),
        (ConfigError, lambda: Selection(fidelity=[0, 0])),
        (ConfigError, lambda: prepare("shipped:C2H2.db", split=[1, 2])),
        (ConfigError, lambda: prepare("shipped:C2H2.db", sae="guess")),
        (ConfigError, lambda: EnergyModel(AEVParameters.aevmod(("C", "H")), [4], ["identity"])),
        (ConfigError, lambda: KinMLCalculator(model(), base="tblite:GFN1-xTB")),
        (ConfigError, lambda: config.load("nothing.yaml")),
        (ConfigError, lambda: config.load("example", ["training.epoch=3"])),
        (DeviceError, lambda: devices.resolve("tpu")),
        (DeviceError, lambda: devices.resolve("cuda:99")),
        (DeviceError, lambda: KinMLCalculator(model(), device="cuda:99")),
    ],
)
def test_the_class_says_where_the_mistake_is(kind, mistake):
    with pytest.raises(InputError) as caught:
        mistake()
    assert isinstance(caught.value, kind)
    assert "\n" not in str(caught.value)


def test_no_class_is_another():
    kinds = [ConfigError, DataError, DeviceError, ModelError]
    for kind in kinds:
        assert issubclass(kind, InputError)
        assert not any(issubclass(kind, other) for other in kinds if other is not kind)
        assert getattr(kinml_fast, kind.__name__) is kind


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "nothing.pt", "shipped:C2H2.db"],
        ["predict", "nothing.pt", "in.xyz", "-o", "out.xyz"],
        ["prepare", "example", "data.files=[nothing.db]"],
        ["prepare", "example", "data.split=[1, 2]"],
        ["train", "example", "training.device=cuda:99"],
        ["train"],
        ["convert", "nothing.pt", "-o", "model.pt"],
    ],
)
def test_all_end_in_exit_code_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kinml-fast: ")
