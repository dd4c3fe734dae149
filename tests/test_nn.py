"""The modules: energies and forces of whole models, and all the ways in which a model leaves the process."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from op_helpers import SMALL, Ragged, keywords, normal, ragged
from test_ops_networks import layers_of
from torch.utils import cpp_extension

from kinml_fast import ops, reference
from kinml_fast._library import library_path
from kinml_fast.errors import InputError
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
SAE = (-1035.4398438, -16.97113695)


def model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> EnergyModel:
    """A small model of carbon and hydrogen with single-atom energies."""
    torch.manual_seed(seed)
    arguments = {"layers": [8, 5, 1], "activations": ["gaussian", "tanh", "identity"], **changes}
    result = EnergyModel(changes.pop("descriptor", SMALL), **{**arguments, "dtype": dtype})
    result.sae.copy_(torch.tensor(SAE, dtype=torch.float64))
    return result


def batch(sizes=(5, 1, 0, 8, 3), seed: int = 0, dtype: torch.dtype = torch.float64) -> Ragged:
    x, z, o = ragged(sizes, 2, seed)
    return x.to(dtype), z, o


def forces(energy_model, x: torch.Tensor, z: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    x = x.detach().clone().requires_grad_()
    return -torch.autograd.grad(energy_model(x, z, o).sum(), x)[0]


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("layers", [[8, 5, 1], [[8, 5, 1], [3, 7, 1]]])
def test_energies_forces_and_weight_gradients_match_the_oracle(layers, biases):
    ours = model(layers=layers, biases=biases)
    x, z, o = batch()
    arguments = (z, o, keywords(SMALL), layers_of(ours.networks), list(ours.networks.activations), SAE)
    energies = ours(x, z, o)
    assert energies.dtype == torch.float64
    torch.testing.assert_close(energies, reference.energies(x, *arguments), rtol=1e-12, atol=1e-10)
    expected = reference.forces(x, *arguments)
    torch.testing.assert_close(forces(ours, x, z, o), expected, rtol=1e-10, atol=1e-11)
    slopes = normal(5, seed=1)
    (ours_w,) = torch.autograd.grad((slopes * energies).sum(), ours.networks.weights)
    (expected_w,) = torch.autograd.grad((slopes * reference.energies(x, *arguments)).sum(), ours.networks.weights)
    torch.testing.assert_close(ours_w, expected_w, rtol=1e-10, atol=1e-11)
    assert torch.equal(ours.aev(x, z, o), ours.aev(x, z, o))
    assert ours.aev(x, z, o).shape == (17, 18)


@pytest.mark.parametrize("activation", ["gaussian", "tanh", "silu", "gelu", "celu"])
@pytest.mark.parametrize("biases", [True, False])
def test_loss_on_forces_has_the_weight_gradients_of_the_oracle(activation, biases):
    ours = model(biases=biases, activations=[activation, "tanh", "identity"])
    x, z, o = batch()
    arguments = (z, o, keywords(SMALL), layers_of(ours.networks), list(ours.networks.activations), SAE)
    targets = normal(*x.shape, seed=2)
    results = []
    for energies_of in (lambda x: ours(x, z, o), lambda x: reference.energies(x, *arguments)):
        moved = x.clone().requires_grad_()
        energies = energies_of(moved)
        (gradient,) = torch.autograd.grad(energies.sum(), moved, create_graph=True)
        loss = (gradient + targets).square().mean() + energies.square().mean() * 1e-6
        results.append((gradient.detach(), *torch.autograd.grad(loss, (ours.networks.weights, moved))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_hessian_is_the_differences_of_forces():
    ours = model()
    x, z, o = batch((4, 3), seed=3)
    hessian = torch.autograd.functional.hessian(lambda x: ours(x, z, o).sum(), x).reshape(21, 21)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-10, atol=1e-11)
    assert hessian[:12, :12].abs().max() > 0.01
    assert not hessian[:12, 12:].any()  # different molecules
    step, columns = 1e-4, []
    for move in step * torch.eye(21, dtype=torch.float64).reshape(21, 7, 3):
        near = forces(ours, x - move, z, o) - forces(ours, x + move, z, o)
        far = forces(ours, x - 2 * move, z, o) - forces(ours, x + 2 * move, z, o)
        columns.append(((8 * near - far) / (12 * step)).reshape(-1))
    torch.testing.assert_close(torch.stack(columns, 1), hessian, rtol=1e-7, atol=1e-9)


def test_forces_are_the_differences_of_energies():
    ours = model()
    ours.sae.zero_()  # thousands of eV would hide the last digits of a difference
    x, z, o = batch((4, 3), seed=3)
    numerical = torch.zeros_like(x)

    def central(i: int, d: int, step: float) -> float:
        move = torch.zeros_like(x)
        move[i, d] = step
        return float((ours(x + move, z, o) - ours(x - move, z, o)).sum() / (2 * step))

    with torch.no_grad():
        for i in range(7):
            for d in range(3):
                numerical[i, d] = -(4 * central(i, d, 1e-4) - central(i, d, 2e-4)) / 3
    torch.testing.assert_close(forces(ours, x, z, o), numerical, rtol=0, atol=1e-7)


def test_float32_is_near_float64():
    wide, narrow = model(), model(torch.float32)
    with torch.no_grad():
        wide.networks.weights.copy_(narrow.networks.weights)
    x, z, o = batch(dtype=torch.float32)
    assert narrow.dtype == torch.float32
    energies = narrow(x, z, o)
    assert energies.dtype == torch.float64
    torch.testing.assert_close(energies, wide(x.double(), z, o), rtol=0, atol=5e-5)
    narrow_forces = forces(narrow, x, z, o)
    assert narrow_forces.dtype == torch.float32
    torch.testing.assert_close(narrow_forces.double(), forces(wide, x.double(), z, o), rtol=5e-4, atol=5e-4)
    with pytest.raises(RuntimeError, match="parameters is Float but features is Double"):
        narrow(x.double(), z, o)


@pytest.mark.parametrize("convert", [torch.nn.Module.float, lambda module: module.to(torch.float32)])
def test_a_model_that_is_converted_keeps_its_single_atom_energies(convert):
    """They are a thousand eV, of which float32 keeps 6e-5."""
    x, z, o = batch(dtype=torch.float32)
    narrow = model(torch.float32)
    for wide in (model(), Ensemble([model(), model()])):
        before = wide.sae.clone()
        assert convert(wide) is wide
        assert (wide.dtype, wide.sae.dtype) == (torch.float32, torch.float64)
        assert torch.equal(wide.sae, before)
        with torch.no_grad():
            narrow.networks.weights.copy_(wide.networks.weights.reshape(-1)[: narrow.networks.weights.numel()])
        assert torch.equal(wide(x, z, o), narrow(x, z, o))
        assert dict(wide.double().named_buffers())["sae"].dtype == torch.float64
    ensemble = Ensemble([model(), model()]).float()
    assert ensemble.to_dict()["dtype"] == "float32"
    assert torch.equal(ensemble.member(1)(x, z, o), ensemble(x, z, o))


def test_energy_of_a_structure_does_not_depend_on_its_company():
    ours = model()
    x, z, o = batch()
    energies = ours(x, z, o)
    for s, (a, b) in enumerate(zip(o[:-1].tolist(), o[1:].tolist(), strict=True)):
        alone = ours(x[a:b], z[a:b], torch.tensor([0, b - a]))
        assert torch.equal(alone, energies[s : s + 1])
    assert energies[2] == 0  # no atoms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_energies_and_forces_in_one_pass(dtype):
    ours = model(dtype)
    inputs = batch(dtype=dtype)
    energies, found = ours.energies_and_forces(*inputs)
    assert (energies.dtype, found.dtype) == (torch.float64, dtype)
    tolerance = 1e-11 if dtype == torch.float64 else 5e-5
    torch.testing.assert_close(energies, ours(*inputs), rtol=1e-12, atol=tolerance)
    torch.testing.assert_close(found, forces(ours, *inputs), rtol=10 * tolerance, atol=10 * tolerance)
    with torch.inference_mode():
        again = ours.energies_and_forces(*inputs)
    scripted = torch.jit.script(ours).energies_and_forces(*inputs)
    for other in (again, scripted):
        assert torch.equal(other[0], energies)
        assert torch.equal(other[1], found)


def test_inference_mode_and_no_grad_give_the_same_bits():
    ours = model()
    inputs = batch()
    expected = ours(*inputs).detach()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(ours(*inputs), expected)


# ---- Dictionaries --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layers", [[8, 5, 1], [[8, 5, 1], [3, 7, 1]]])
def test_architecture_and_state_survive_their_dictionaries(layers, dtype):
    ours = model(dtype, layers=layers, biases=False)
    values = json.loads(json.dumps(ours.to_dict()))
    again = EnergyModel.from_dict(values)
    assert again.to_dict() == ours.to_dict()
    assert again.descriptor == ours.descriptor
    assert again.elements == ("C", "H")
    inputs = batch(dtype=dtype)
    assert not torch.equal(again(*inputs), ours(*inputs))
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert set(state) == {"networks.weights", "sae"}
    again.load_state_dict(state)
    assert torch.equal(again(*inputs), ours(*inputs))


def test_incomplete_and_unknown_architectures_are_explained():
    values = model().to_dict()
    for key in values:
        with pytest.raises(InputError, match=f"lacks or does not know '{key}'"):
            EnergyModel.from_dict({k: v for k, v in values.items() if k != key})
    with pytest.raises(InputError, match="float16"):
        EnergyModel.from_dict({**values, "dtype": "float16"})
    with pytest.raises(InputError, match=r"unknown entries \['colour'\]"):
        EnergyModel.from_dict({**values, "descriptor": {**values["descriptor"], "colour": 1}})
    with pytest.raises(InputError, match="zeta"):
        EnergyModel.from_dict({**values, "descriptor": {k: v for k, v in values["descriptor"].items() if k != "zeta"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"elements": ()}, "'elements' is empty"),
        ({"elements": ("C", "C")}, r"\['C', 'C'\] name one element twice"),
        ({"radial_shifts": ()}, "'radial_shifts' is empty"),
        ({"radial_cutoff": 0.0}, "cutoffs of the descriptor must be positive lengths in Å, not 0.0 and 3.8"),
        ({"angular_cutoff": float("nan")}, "must be positive lengths"),
        ({"zeta": 0.5}, "zeta must be at least 1, not 0.5"),
        ({"beta": 1.1}, "beta must lie between 0 and 1, not 1.1"),
    ],
)
def test_wrong_descriptors_are_explained(change, message):
    with pytest.raises(InputError, match=message):
        AEVParameters.from_dict({**SMALL.to_dict(), **change})
    with pytest.raises(InputError, match="at least 1, not 16, 0, 8"):
        AEVParameters.aevmod(("C",), n_angular=0)


# ---- Scripting, export, C++ ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scripted_saved_and_loaded_model(dtype, tmp_path):
    ours = model(dtype)
    scripted = torch.jit.script(ours)
    scripted.save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    for sizes in [(5, 1, 0, 8, 3), (2,), ()]:
        inputs = batch(sizes, dtype=dtype)
        for other in (scripted, loaded):
            for _ in range(3):  # the profiling executor optimises after the first calls
                assert torch.equal(other(*inputs), ours(*inputs))
                assert torch.equal(forces(other, *inputs), forces(ours, *inputs))
                both = zip(other.energies_and_forces(*inputs), ours.energies_and_forces(*inputs), strict=True)
                assert all(torch.equal(a, b) for a, b in both)
    # Weights are parameters there too: their gradient, also that of forces.
    x, z, o = batch(dtype=dtype)
    slopes = [torch.autograd.grad(m(x, z, o).sum(), next(m.parameters()))[0] for m in (ours, loaded)]
    assert torch.equal(*slopes)
    slopes = []
    for m in (ours, loaded):
        energies, found = m.energies_and_forces(x, z, o)
        slopes.append(torch.autograd.grad(energies.sum() + found.square().sum(), next(m.parameters()))[0])
    assert torch.equal(*slopes)
    vectors = [m.aev(x, z, o) for m in (ours, loaded)]
    assert torch.equal(*vectors)


def test_scripted_networks_take_batches():
    ours = model()
    inputs = batch()
    order = ops.species_order(*inputs[1:], 2).tensors
    features = ours.aev(*inputs)
    scripted = torch.jit.script(ours.networks)
    assert torch.equal(scripted.energies(features, *order, 5), ours.networks.energies(features, *order, 5))


def test_a_scripted_function_calls_the_ops_with_what_a_system_has():
    """TorchScript knows no `ops.System`, but its list."""

    class Stored(torch.nn.Module):
        def __init__(self, model: EnergyModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, coordinates: torch.Tensor, species: torch.Tensor, offsets: torch.Tensor):
            features = self.model.aev(coordinates, species, offsets)
            return torch.ops.kinml_fast.energy_forces(
                ops.system_tensors(None, species, offsets, features),
                self.model.networks.weights,
                None,
                self.model.aev.packed,
                self.model.networks.packed,
                0,
            )

    ours, inputs = model(), batch()
    found = torch.jit.script(Stored(ours))(*inputs)
    system = ops.System(None, *inputs[1:], features=ours.aev(*inputs))
    expected = ops.energy_forces(system, ours.networks.weights, None, ops.Model([], ours.networks.packed))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exported_model_takes_any_number_of_atoms(dtype, tmp_path):
    ours = model(dtype)
    n_atoms = torch.export.Dim("n_atoms", min=2)
    n_offsets = torch.export.Dim("n_offsets", min=3)  # torch.export fixes sizes of 0 and 1, here of n_structures
    for offsets, cases in [
        (None, [(5, 3), (2, 2), (1, 40)]),
        ({0: n_offsets}, [(5, 3), (5, 1, 0, 8, 3)]),
    ]:
        shapes = {"coordinates": {0: n_atoms}, "species": {0: n_atoms}, "offsets": offsets}
        program = torch.export.export(ours, batch((4, 3), dtype=dtype), dynamic_shapes=shapes, strict=False)
        torch.export.save(program, tmp_path / "model.pt2")
        for exported in (program.module(), torch.export.load(tmp_path / "model.pt2").module()):
            for sizes in cases:
                inputs = batch(sizes, seed=7, dtype=dtype)
                assert torch.equal(exported(*inputs), ours(*inputs))
                assert torch.equal(forces(exported, *inputs), forces(ours, *inputs))


class EnergiesAndForces(torch.nn.Module):
    """What a user exports who wants both."""

    def __init__(self, energy_model: EnergyModel) -> None:
        super().__init__()
        self.energy_model = energy_model

    def forward(self, coordinates: torch.Tensor, species: torch.Tensor, offsets: torch.Tensor):
        return self.energy_model.energies_and_forces(coordinates, species, offsets)


def test_exported_energies_and_forces(tmp_path):
    ours = model()
    n_atoms, n_offsets = torch.export.Dim("n_atoms", min=2), torch.export.Dim("n_offsets", min=3)
    shapes = {"coordinates": {0: n_atoms}, "species": {0: n_atoms}, "offsets": {0: n_offsets}}
    program = torch.export.export(EnergiesAndForces(ours), batch((4, 3)), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for sizes in [(5, 3), (5, 1, 0, 8, 3)]:
        inputs = batch(sizes, seed=7)
        both = zip(exported(*inputs), ours.energies_and_forces(*inputs), strict=True)
        assert all(torch.equal(a, b) for a, b in both)


@pytest.fixture(scope="session")
def load_model(request: pytest.FixtureRequest) -> Path:
    """tests/cpp/load_model.cpp, compiled once for each torch and kept in pytest's cache."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler '{compiler}'")
    source = Path(__file__).parent / "cpp" / "load_model.cpp"
    folders = cpp_extension.library_paths()
    command = [
        compiler,
        "-std=c++20",
        "-O0",
        "-w",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        str(source),
        *(f"-L{path}" for path in folders),
        *(f"-Wl,-rpath,{path}" for path in folders),
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
    ]
    key = hashlib.sha256(f"{command}{torch.__version__}{source.read_text()}".encode()).hexdigest()[:16]
    program = request.config.cache.mkdir("load_model") / key
    if not program.exists():
        partial = program.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        partial.replace(program)
    return program


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scripted_model_in_a_cpp_process(dtype, load_model, tmp_path):
    """Bit for bit the same energies and gradient, differentiated without Python."""
    ours = model(dtype)
    inputs = batch(dtype=dtype)
    torch.jit.script(ours).save(tmp_path / "model.pt")
    torch.save(inputs, tmp_path / "tensors.pt")
    command = [load_model, library_path(), tmp_path / "model.pt", tmp_path / "tensors.pt"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert [row[0] for row in rows[:5]] == ours(*inputs).tolist()
    assert np.array_equal(rows[5:], -forces(ours, *inputs).double().numpy())


def test_cpp_process_without_the_ops_library_says_what_is_missing(load_model, tmp_path):
    torch.jit.script(model()).save(tmp_path / "model.pt")
    torch.save(batch(), tmp_path / "tensors.pt")
    command = [load_model, tmp_path / "absent.so", tmp_path / "model.pt", tmp_path / "tensors.pt"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 1
    assert "absent.so" in done.stderr
