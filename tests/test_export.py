"""Exported models: other forms of a model with its numbers, readable without running code, whole or not there."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import kinml_fast
from kinml_fast.cli import main
from kinml_fast.deploy import export as exporting
from kinml_fast.deploy import model_file, plain
from kinml_fast.deploy.export import Deployed, export, read_about, structures
from kinml_fast.errors import ModelError
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble, Repulsion
from kinml_fast.nn.networks import ACTIVATIONS

FORMS = ["plain", "torchscript", "metatomic", pytest.param("aoti", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _metatomic_is_there(request):
    """pip install metatomic-torch: without it those tests are skipped."""
    if "metatomic" in request.node.name:
        pytest.importorskip("metatomic.torch", reason="pip install metatomic-torch")


def model(seed: int = 0, elements=("C", "H"), dtype=torch.float64, **options) -> EnergyModel:
    torch.manual_seed(seed)
    made = EnergyModel(AEVParameters.aevmod(elements), dtype=dtype, **options)
    made.sae[...] = torch.arange(made.sae.numel(), dtype=torch.float64).reshape(made.sae.shape) - 100.25
    return made


def saved(path: Path, made: EnergyModel | Ensemble) -> Path:
    model_file.save(path, made, {"epoch": 7, "note": "Å", "tensor": torch.ones(2)})
    return path


def suffix(kind: str) -> str:
    return exporting.FORMATS[kind].suffix


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("which", ["one", "float32", "ensemble", "repulsion"])
def test_an_exported_model_has_the_numbers_of_its_source(tmp_path, kind, which):
    made = {
        "one": lambda: model(),
        "float32": lambda: model(dtype=torch.float32),
        "ensemble": lambda: Ensemble([model(1), model(2)]),
        "repulsion": lambda: model(repulsion=Repulsion.zbl(("C", "H"), 0.3, 1.3)),
    }[which]()
    if kind == "aoti" and which == "float32":
        pytest.skip("compiles for a minute as the others do")
    path = tmp_path / f"model{suffix(kind)}"
    assert main(["export", str(saved(tmp_path / "source.pt", made)), "-o", str(path)]) == 0
    left = {file.name for file in tmp_path.iterdir()} - ({"extensions"} if kind == "metatomic" else set())
    assert left == {"source.pt", path.name}
    opened = exporting.FORMATS[kind].open(path, made)
    for structure in structures(2):
        expected = [value.detach().numpy() for value in Deployed(made)(*structure.tensors(made.dtype))]
        for one, other in zip(opened(structure), expected, strict=True):
            tolerance = {"rtol": 1e-12, "atol": 1e-12} if made.dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
            np.testing.assert_allclose(np.asarray(one).reshape(other.shape), other, **tolerance)


@pytest.mark.parametrize("kind", FORMS)
def test_what_a_file_says_is_read_without_running_it(tmp_path, kind):
    path = tmp_path / f"model{suffix(kind)}"
    export(saved(tmp_path / "source.pt", model()), path)
    about = read_about(path)
    assert about["elements"] == ["C", "H"]
    assert about["model"]["descriptor"]["radial_cutoff"] == 5.2
    assert about["units"]["energy"] == "eV"
    assert about["single_atom_energies"] == [-100.25, -99.25]
    assert about["training"] == {"epoch": 7, "note": "Å", "tensor": "(Tensor)"}
    assert about["version"] == kinml_fast.__version__
    with pytest.raises(ModelError, match="is no file that"):
        read_about(tmp_path / "source.pt")


def parts(path: Path) -> tuple[dict, bytes]:
    """Header and numbers of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def test_a_plain_file_is_a_safetensors_file(tmp_path):
    made = Ensemble([model(1), model(2)])
    export(saved(tmp_path / "source.pt", made), tmp_path / "model.kinml")
    header, numbers = parts(tmp_path / "model.kinml")
    texts = header.pop("__metadata__")
    assert all(isinstance(text, str) for text in texts.values())
    assert json.loads(texts["training"])["epoch"] == 7
    assert json.loads(texts["model"])["elements"] == ["C", "H"]
    assert texts["crc32"] == f"{zlib.crc32(numbers):08x}"
    place = 0
    for name, tensor in (("weights", made.networks.weights), ("sae", made.sae.reshape(2, 1, 2))):
        entry = header.pop(name)
        begin, place = entry["data_offsets"]
        found = np.frombuffer(numbers[begin:place], "<f8").reshape(entry["shape"])
        assert np.array_equal(found, tensor.detach().numpy())
    assert (header, place) == ({}, len(numbers))
    assert (8 + struct.unpack("<Q", (tmp_path / "model.kinml").read_bytes()[:8])[0]) % 64 == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_a_plain_file(tmp_path, activation):
    made = model(elements=("H", "O", "N"), layers=[[5, 1], [4, 1], [3, 1]], activations=(activation, "identity"))
    export(made, tmp_path / "model.kinml")


@pytest.mark.parametrize("options", [{"fidelities": (0, 1)}, {"biases": False}, {"baseline": 0}])
def test_kinds_of_models_in_a_plain_file(tmp_path, options):
    export(model(**options), tmp_path / "model.kinml")


def test_precision_of_a_plain_file(tmp_path):
    export(model(dtype=torch.float32), tmp_path / "model.kinml")
    structure = next(structures(2))
    energies = {
        dtype: plain.PlainPotential(tmp_path / "model.kinml", dtype)(structure.positions, structure.species)["energies"]
        for dtype in (None, "float32", "float64")
    }
    assert energies[None] == energies["float32"] != energies["float64"]
    np.testing.assert_allclose(energies["float32"], energies["float64"], rtol=1e-7)


@pytest.mark.parametrize("options", [{}, {"fidelities": (0, 1)}, {"dtype": torch.float32}])
def test_second_derivatives_of_a_plain_file(tmp_path, options):
    made = model(**options)
    export(made, tmp_path / "model.kinml")
    structure = next(structures(2))
    found = plain.PlainPotential(tmp_path / "model.kinml")(structure.positions, structure.species, hessians=True)
    n = len(structure.species)
    species, ends = torch.from_numpy(structure.species), torch.tensor([0, n])
    expected = made.hessian(torch.from_numpy(structure.positions).to(made.dtype), species, ends).reshape(3 * n, 3 * n)
    tolerance = 1e-12 if made.dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(found["hessians"][0], expected.numpy(), rtol=tolerance, atol=tolerance)


def test_ghosts_and_given_pairs_of_a_plain_file(tmp_path):
    """Two halves of a molecule, each with the atoms of the other one as ghosts, have its energy and forces."""
    export(model(), tmp_path / "model.kinml")
    potential = plain.PlainPotential(tmp_path / "model.kinml")
    structure = next(structures(2))
    whole = potential(structure.positions, structure.species)
    n, forces, energy, virial = len(structure.species), np.zeros((len(structure.species), 3)), 0.0, np.zeros((3, 3))
    for first in (0, n // 2):
        centres = n // 2 if first == 0 else n - n // 2
        order = np.roll(np.arange(n), -first)
        neighbours = np.array([j for i in range(centres) for j in range(n) if j != i])
        starts = np.minimum(np.arange(n + 1), centres) * (n - 1)
        found = potential(
            structure.positions[order], structure.species[order], pairs=(starts, neighbours), n_centres=centres
        )
        forces[order] += found["forces"][0]
        energy += found["energies"][0]
        virial += found["virials"][0].sum(0)
        assert not found["atomic_energies"][0, centres:].any()
    np.testing.assert_allclose(energy, whole["energies"][0], rtol=1e-13)
    np.testing.assert_allclose(forces, whole["forces"][0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(virial, whole["virials"][0].sum(0), rtol=1e-10, atol=1e-12)


def damaged(header: dict, numbers: bytes, path: Path) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + numbers)
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda raw: b"", "is no plain model file"),
        (lambda raw: b"PK" * 50, "is no plain model file"),
        (lambda raw: raw[:200], "is cut off"),
        (lambda raw: raw[:-8], "is cut off"),
        (lambda raw: raw[:-8] + bytes(8), "its checksum is another one"),
        (lambda raw: raw.replace(b"gaussian", b"gaussiun"), "the activation 'gaussiun' is unknown"),
        (lambda raw: raw.replace(b'"format_version": "1"', b'"format_version": "9"'), "of version 9, this program"),
        (lambda raw: raw.replace(b'"F64"', b'"F16"', 1), "weights are of type F16"),
        (lambda raw: raw.replace(b'\\"zeta\\"', b'\\"zita\\"'), "'zeta' is missing"),
        (lambda raw: raw.replace(b'"sae"', b'"sea"'), "'sae' is missing"),
        (lambda raw: raw.replace(b"48, 24", b"48, 25"), "not as many as the layers say"),
    ],
)
def test_damaged_plain_files(tmp_path, change, sentence):
    export(model(), tmp_path / "model.kinml")
    path = tmp_path / "damaged.kinml"
    path.write_bytes(change((tmp_path / "model.kinml").read_bytes()))
    with pytest.raises(ModelError, match=sentence) as raised:
        plain.PlainPotential(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_numbers_that_are_none(tmp_path):
    export(model(), tmp_path / "model.kinml")
    header, numbers = parts(tmp_path / "model.kinml")
    numbers = np.array(np.nan).tobytes() + numbers[8:]
    with pytest.raises(ModelError, match="hold what is no number"):
        plain.PlainPotential(damaged(header, numbers, tmp_path / "damaged.kinml"))


def test_structures_that_cannot_be_computed(tmp_path):
    export(model(), tmp_path / "model.kinml")
    potential = plain.PlainPotential(tmp_path / "model.kinml")
    positions, species = np.array([[0.0, 0, 0], [0, 0, 1.1]]), np.array([0, 1])
    for arguments, sentence in (
        ((positions * np.nan, species), "the position of atom 0 is no number"),
        ((positions, species + 1), "atom 1 has the species 2, the model knows 2"),
        ((positions, species, np.zeros((3, 3))), "the cell has no volume"),
        ((positions, species, np.diag([5.0, 5.0, -5.0])), "the cell is left-handed"),
        ((positions, species, None, None, (np.array([0, 1, 1]), np.array([2]))), "pair 0 has the neighbour 2"),
        ((positions, species, None, None, None, 3), "3 atoms with energies of 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            potential(*arguments)


def test_other_numbers_leave_no_file(tmp_path, monkeypatch):
    wrong = exporting.Format(".kinml", plain.save, lambda path, made: lambda structure: (0.0, 0.0, 0.0))
    monkeypatch.setitem(exporting.FORMATS, "plain", wrong)
    (tmp_path / "model.kinml").write_text("what was there")
    with pytest.raises(ModelError, match="the energies of the exported model differ"):
        export(model(), tmp_path / "model.kinml")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.kinml", "what was there")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing.pt", "-o", "model.kinml"], "missing.pt: cannot be read"),
        (["source.pt", "-o", "model.xyz"], "name a format with --format, or take its suffix: plain (.kinml)"),
        (["source.pt", "-o", "none/model.kinml"], "none"),
        (["source.pt", "-o", "source.pt", "--format", "plain"], "source.pt: is the model itself"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "source.pt", model())
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["source.pt"]
