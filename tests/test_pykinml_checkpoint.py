"""PyKinML's checkpoints: its numbers come out, and nothing that a file might smuggle in is run."""

from __future__ import annotations

import io
import logging
import os
import pickle
import sqlite3
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from kinml_fast import cli, reference
from kinml_fast.deploy import model_file, pykinml_checkpoint
from kinml_fast.errors import InputError

PYKINML = Path(__file__).parents[2] / "shared" / "data" / "pykinml"
needs_pykinml_data = pytest.mark.skipif(not PYKINML.is_dir(), reason="needs ../shared/data/pykinml")
LENGTH = 224
FUNCTIONS = ("gaussian", "Tanh", "identity")


def contents(
    *,
    layers: tuple[tuple[int, ...], ...] = ((5, 3, 1), (5, 3, 1)),
    biases: bool = True,
    prefix: str = "",
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o),
) -> dict:
    """A checkpoint as PyKinML writes it, after two steps of the optimizer."""
    generator = torch.Generator().manual_seed(0)
    state = OrderedDict(log_sigma=torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    for species, widths in enumerate(layers):
        for layer, (width, previous) in enumerate(zip(widths, (LENGTH, *widths), strict=False)):
            name = f"NNs.{species}.{layer}.linear"
            for part, shape in [("weight", (width, previous)), ("bias", (width,))][: 1 + biases]:
                random = torch.randn(shape, generator=generator, dtype=torch.float64) / previous**0.5
                state[f"{name}.{part}"] = torch.nn.Parameter(random)
    trained = optimizer(state.values(), lr=1e-3)
    schedule = scheduler(trained)
    for _ in range(2):
        for value in state.values():
            value.grad = torch.ones_like(value)
        trained.step()
        schedule.step(*[1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else [])
    schedule.best = np.float64(2.5)
    return {
        "epoch": 7,
        "optimizer": trained,
        "optimizer_state_dict": trained.state_dict(),
        "lr_scheduler": schedule,
        "model_state_dict": OrderedDict((prefix + name, value) for name, value in state.items()),
        "sae_energies": np.array([-1000.0, -16.0]),
        "params": {
            "n_input": [LENGTH] * len(layers),
            "neurons": [list(widths) for widths in layers],
            "activations": [["silu", "tanh", "identity"]] * len(layers),
            "sae_energies": np.array([-1000.0, -16.0]),
            "add_sae": True,
            "biases": biases,
        },
    }


def two_levels(
    monkeypatch, *, biases: bool = False, sae: bool = True, prefix: str = "", functions: tuple[str, ...] = FUNCTIONS
) -> dict:
    """A checkpoint for two levels: PyKinML keeps the functions of the second networks as functions and modules."""
    nnpes = ModuleType("pykinml.nnpes")
    for name in ("gaussian", "my_relu", "silu", "identity"):
        function = FunctionType((lambda x: x).__code__, {}, name)
        function.__module__, function.__qualname__ = "pykinml.nnpes", name
        setattr(nnpes, name, function)
    monkeypatch.setitem(sys.modules, "pykinml", ModuleType("pykinml"))
    monkeypatch.setitem(sys.modules, "pykinml.nnpes", nnpes)
    values = contents(biases=biases, prefix=prefix)
    params, generator = values["params"], torch.Generator().manual_seed(1)
    params["activations"] = [[{"my_relu": "relu", "Tanh": "tanh"}.get(name, name) for name in functions]] * 2
    own = [torch.nn.Tanh() if name == "Tanh" else getattr(nnpes, name) for name in functions]
    params |= {"neurons_hf": params["neurons"], "activations_hf": [own] * 2, "pass_eng": True, "pass_aev": True}
    for name, value in list(values["model_state_dict"].items()):
        if "NNs." in name:
            shape = list(value.shape)
            if name.endswith("0.linear.weight"):
                shape[1] += 1
            weight = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
            values["model_state_dict"][name.replace("NNs.", "NNs_hf.")] = torch.nn.Parameter(weight)
    if not sae:
        values["sae_energies"] = params["sae_energies"] = np.zeros(2)
    return values


def pykinml_energies(values: dict, prefix: str, x: torch.Tensor, species: list[int]) -> list[float]:
    """Energies of both levels as PyKinML has them: the second network is fed with single-atom energies."""
    vectors = reference.aev(x, torch.tensor(species), torch.tensor([0, len(x)]), **reference.aevmod_parameters(2))
    state, names = values["model_state_dict"], values["params"]["activations"][0]

    def network(kind: str, s: int, y: torch.Tensor) -> torch.Tensor:
        for layer, name in enumerate(names):
            y = state[f"{prefix}{kind}.{s}.{layer}.linear.weight"] @ y
            y = y + state.get(f"{prefix}{kind}.{s}.{layer}.linear.bias", 0.0)
            y = reference.ACTIVATIONS[name](y)
        return y

    lower = [network("NNs", s, v) + values["sae_energies"][s] for v, s in zip(vectors, species, strict=True)]
    added = [network("NNs_hf", s, torch.cat([v, e])) for v, e, s in zip(vectors, lower, species, strict=True)]
    return [sum(lower).item(), (sum(lower) + sum(added)).item()]


def saved(folder: Path, values: object) -> Path:
    path = folder / "model-0007.pt"
    torch.save(values, path)
    return path


def energy(model: torch.nn.Module, x: torch.Tensor, species: torch.Tensor) -> float:
    return model(x, species, torch.tensor([0, len(x)])).item()


@needs_pykinml_data
def test_the_shipped_checkpoint_gives_the_quoted_energy_and_minus_its_derivative(tmp_path):
    model, notes = pykinml_checkpoint.load(PYKINML / "single_fid_epoch9.pt")
    assert notes == {"source": "PyKinML checkpoint single_fid_epoch9.pt", "epoch": 9}
    with sqlite3.connect(f"file:{PYKINML / 'C5H5.db'}?mode=ro", uri=True) as database:
        (blob,) = database.execute("SELECT geom FROM xyz WHERE id = 1").fetchone()
    x = torch.tensor(np.load(io.BytesIO(blob)), requires_grad=True)
    species = torch.tensor([0] * 5 + [1] * 5)
    result = model(x, species, torch.tensor([0, 10]))
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert result.item() == pytest.approx(-5261.334742955, rel=0, abs=1e-9)

    checkpoint = pykinml_checkpoint.read(PYKINML / "single_fid_epoch9.pt")
    parts = (reference.aevmod_parameters(2), checkpoint.weights, checkpoint.activations, checkpoint.sae)
    forces = reference.forces(x, species, torch.tensor([0, 10]), *parts)
    np.testing.assert_allclose(-gradient, forces, rtol=0, atol=1e-10)
    # PyKinML's own row, (-0.5163497494, 0.0531174466, -0.1883366843), comes from aevmod's eval_Jac; test_reference.py.
    np.testing.assert_allclose(-gradient[0], [-0.510768302788, 0.054955793505, -0.188735108369], rtol=0, atol=1e-9)

    model_file.save(tmp_path / "model.pt", model, notes)
    assert energy(model_file.load(tmp_path / "model.pt"), x, species) == result.item()


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        (torch.optim.Adam, lambda o: lr_scheduler.ReduceLROnPlateau(o)),
        (torch.optim.AdamW, lambda o: lr_scheduler.StepLR(o, 3)),
        (torch.optim.SGD, lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    ],
)
def test_checkpoints_of_every_kind(tmp_path, biases, prefix, optimizer, scheduler):
    values = contents(biases=biases, prefix=prefix, optimizer=optimizer, scheduler=scheduler)
    model, notes = pykinml_checkpoint.load(saved(tmp_path, values))
    assert notes["epoch"] == 7

    state = values["model_state_dict"]
    names = [[f"{prefix}NNs.{s}.{i}.linear" for i in range(3)] for s in range(2)]
    weights = [[(state[f"{n}.weight"], state.get(f"{n}.bias")) for n in network] for network in names]
    x = torch.tensor([[0.0, 0, 0], [1.1, 0.1, 0], [-0.3, 1.0, 0.2]], dtype=torch.float64)
    species = torch.tensor([0, 1, 1])
    parts = (reference.aevmod_parameters(2), weights, ["silu", "tanh", "identity"], [-1000.0, -16.0])
    expected = reference.energies(x, species, torch.tensor([0, 3]), *parts).item()
    assert energy(model, x, species) == pytest.approx(expected, rel=1e-14)


def test_unequal_networks_and_energies_that_are_not_added(tmp_path):
    values = contents(layers=((6, 3, 1), (4, 2, 1)))
    values["params"]["add_sae"] = False
    model, _ = pykinml_checkpoint.load(saved(tmp_path, values))
    assert model.networks.layers == [[6, 3, 1], [4, 2, 1]]
    assert model.sae.tolist() == [0, 0]


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("sae", [True, False])
@pytest.mark.parametrize(
    ("prefix", "functions"), [("", FUNCTIONS), ("module.", ("silu", "my_relu", "identity")), ("", ("silu",) * 3)]
)
def test_two_levels_of_theory(tmp_path, monkeypatch, biases, sae, prefix, functions):
    values = two_levels(monkeypatch, biases=biases, sae=sae, prefix=prefix, functions=functions)
    path = saved(tmp_path, values)
    monkeypatch.undo()  # PyKinML is not there when the file is read
    model, notes = pykinml_checkpoint.load(path)
    assert notes["epoch"] == 7
    assert model.fidelities == (0, 1)
    assert model.networks.biases == (biases or sae)
    x = torch.tensor([[0.0, 0, 0], [1.1, 0.1, 0], [-0.3, 1.0, 0.2]], dtype=torch.float64)
    found = model.level_energies(x, torch.tensor([0, 1, 1]), torch.tensor([0, 3]))[:, 0]
    np.testing.assert_allclose(found.detach(), pykinml_energies(values, prefix, x, [0, 1, 1]), rtol=1e-13)


def test_levels_are_named_as_asked(tmp_path, monkeypatch):
    both, one = saved(tmp_path, two_levels(monkeypatch)), tmp_path / "one.pt"
    torch.save(contents(), one)
    assert pykinml_checkpoint.load(both, fidelities=(2, 5))[0].fidelities == (2, 5)
    model, _ = pykinml_checkpoint.load(one, fidelities=[3], baseline=0)
    assert (model.fidelities, model.baseline) == ((3,), 0)
    with pytest.raises(InputError, match="a model for 2 levels of theory, but the fidelities 1 are given: name 2"):
        pykinml_checkpoint.load(both, fidelities=[1])
    with pytest.raises(InputError, match="a model for 1 level of theory, but the fidelities 0 1 are given: name 1"):
        pykinml_checkpoint.load(one, fidelities=[0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(neurons_hf=[[4, 3, 1]] * 2), "different layers or activation functions"),
        (lambda p: p.update(activations_hf=[["silu", "silu", "silu"]] * 2), "different layers or activation functions"),
        (lambda p: p.update(activations_hf=[["gaussian"]] * 2), "do not fit together"),
        (lambda p: p.update(pass_aev=False), "pass_aev=False"),
        (lambda p: p.update(pass_eng=False), "pass_eng=False"),
    ],
)
def test_two_levels_of_another_kind(tmp_path, monkeypatch, change, message):
    values = two_levels(monkeypatch)
    change(values["params"])
    with pytest.raises(InputError, match=message):
        pykinml_checkpoint.load(saved(tmp_path, values))


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path, function=os.system) -> None:
        self.reduced = (function, (f"touch {target}",))

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("place", ["optimizer", "lr_scheduler", "epoch", "sae_energies", "params", "kinml_fast"])
@pytest.mark.parametrize("function", [os.system, eval, exec, __import__])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, place, function):
    target = tmp_path / "was_run"
    values = contents()
    values[place] = Evil(target, function)
    path = saved(tmp_path, values)
    name = {"system": "posix.system"}.get(function.__name__, function.__name__)
    with pytest.raises(InputError, match=name) as caught:
        pykinml_checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert not target.exists()
    # The same file does run it where it is trusted: the test means something.
    if function is os.system:
        torch.load(path, weights_only=False)
        assert target.exists()


def test_code_behind_another_protocol_or_in_a_bare_pickle_is_refused(tmp_path):
    target = tmp_path / "was_run"
    path = tmp_path / "model.pt"
    torch.save({"epoch": Evil(target)}, path, pickle_protocol=4)
    with pytest.raises(InputError):
        pykinml_checkpoint.load(path)
    path.write_bytes(pickle.dumps({"epoch": Evil(target)}))
    with pytest.raises(InputError):
        pykinml_checkpoint.load(path)
    assert not target.exists()


def test_what_a_checkpoint_may_name_is_allowed_only_while_it_is_read(tmp_path):
    path = saved(tmp_path, contents())
    pykinml_checkpoint.load(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def without(values: dict, *keys: str) -> dict:
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return values


def with_value(values: dict, value: object, *keys: str) -> dict:
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: without(v, "model_state_dict"), "no model_state_dict"),
        (lambda v: without(v, "params"), "no params"),
        (lambda v: without(v, "params", "neurons"), "do not fit together .*neurons"),
        (lambda v: without(v, "model_state_dict", "NNs.1.0.linear.weight"), r"NNs\.1\.0\.linear\.weight"),
        (lambda v: with_value(v, [[9, 3, 1]] * 2, "params", "neurons"), r"\[5, 224\], expected \[9, 224\]"),
        (lambda v: with_value(v, [[5, 3]] * 2, "params", "neurons"), "do not fit together"),
        (lambda v: with_value(v, False, "params", "biases"), "belongs to no layer"),
        (lambda v: with_value(v, [["elu"] * 3] * 2, "params", "activations"), "'elu', expected one of gaussian"),
        (lambda v: with_value(v, [LENGTH, 10], "params", "n_input"), "n_input differs from element to element"),
        (lambda v: with_value(v, np.zeros(3), "sae_energies"), "3 single-atom energies for 2 elements"),
        (lambda v: with_value(v, [[5, 3, 1]] * 2, "params", "neurons_hf"), "do not fit together .*activations_hf"),
        (lambda v: with_value(v, torch.ones(3, 3), "model_state_dict", "NNs_hf.0.0.linear.weight"), "neurons_hf"),
        (
            lambda v: with_value(v, torch.full((5, LENGTH), torch.nan), "model_state_dict", "NNs.0.0.linear.weight"),
            "NaN or infinite",
        ),
        (lambda v: [v], "is no checkpoint of PyKinML"),
        (lambda v: with_value(v, 5, "model_state_dict"), "is no checkpoint of PyKinML"),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path, change, message):
    path = saved(tmp_path, change(contents()))
    with pytest.raises(InputError, match=message) as caught:
        pykinml_checkpoint.load(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"elements": ("C", "H", "O")}, "networks for 2 elements, but C H O are given"),
        ({"n_radial": 8}, "take 224 numbers for an atom, but 8 8 8 for C H give 208"),
    ],
)
def test_elements_and_settings_that_do_not_fit(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        pykinml_checkpoint.load(saved(tmp_path, contents()), **settings)


def test_other_settings_and_elements_are_used(tmp_path):
    values = contents()
    model, _ = pykinml_checkpoint.load(saved(tmp_path, values), elements=("O", "N"), cutoffs=(5.0, 3.5), beta=0.9)
    assert model.elements == ("O", "N")
    assert (model.descriptor.radial_cutoff, model.descriptor.angular_cutoff, model.descriptor.beta) == (5.0, 3.5, 0.9)


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(InputError, match="cannot be read"):
        pykinml_checkpoint.load(path)
    for content in [b"", b"no checkpoint", b"PK\x03\x04 no archive"]:
        path.write_bytes(content)
        with pytest.raises(InputError, match="is no checkpoint of PyKinML, or damaged"):
            pykinml_checkpoint.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x")
    with pytest.raises(InputError):
        pykinml_checkpoint.load(path)
    whole = saved(tmp_path, contents()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError):
        pykinml_checkpoint.load(path)


# The command line


def complaint(capsys, *arguments: object) -> str:
    """The one line that a mistake gives, with exit code 2."""
    assert cli.main(["convert", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kinml-fast: ")
    return line


@pytest.fixture
def quiet_logger():
    """Each call of main adds a handler; a process calls it once."""
    logger = logging.getLogger("kinml_fast")
    before = logger.level, list(logger.handlers)
    yield
    logger.setLevel(before[0])
    logger.handlers[:] = before[1]


@pytest.mark.usefixtures("quiet_logger")
def test_convert_writes_a_model_file(tmp_path, capsys, monkeypatch):
    path, target = saved(tmp_path, contents()), tmp_path / "model.pt"
    options = ["--elements", "O", "N", "--cutoffs", "5", "3.5", "--beta", "0.9", "--fidelity", "2", "--baseline", "1"]
    assert cli.main(["convert", str(path), "-o", str(target), *options]) == 0
    assert "fidelity 2 minus 1 of O N, epoch 7" in capsys.readouterr().out
    model = model_file.load(target)
    assert (model.elements, model.fidelities, model.baseline) == (("O", "N"), (2,), 1)
    assert (model.descriptor.radial_cutoff, model.descriptor.angular_cutoff, model.descriptor.beta) == (5.0, 3.5, 0.9)
    expected, _ = pykinml_checkpoint.load(path)
    assert torch.equal(model.networks.weights, expected.networks.weights)
    assert model_file.load_training(target) == {"source": "PyKinML checkpoint model-0007.pt", "epoch": 7}

    path = saved(tmp_path, two_levels(monkeypatch))
    assert cli.main(["convert", str(path), "-o", str(target)]) == 0
    out = capsys.readouterr().out
    assert "fidelities 0 1 of C H" in out
    assert "become biases of its first layer" in out
    assert model_file.load(target).fidelities == (0, 1)


@pytest.mark.usefixtures("quiet_logger")
def test_convert_refuses_what_is_no_checkpoint(tmp_path, capsys):
    target = tmp_path / "out.pt"
    path = saved(tmp_path, contents())
    assert "networks for 2 elements, but C H O" in complaint(capsys, path, "-o", target, "--elements", "C", "H", "O")
    assert "8 8 8 for C H give 208" in complaint(capsys, path, "-o", target, "--aev-params", 8, 8, 8)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is no checkpoint of PyKinML, or damaged" in complaint(capsys, path, "-o", target)
    path.write_text("C5H5/1 2\n", encoding="utf-8")
    assert "is no checkpoint of PyKinML, or damaged" in complaint(capsys, path, "-o", target)
    assert "cannot be read" in complaint(capsys, tmp_path / "missing.pt", "-o", target)
    values = contents()
    values["optimizer"] = Evil(tmp_path / "was_run")
    assert "it names posix.system, which is no plain value; nothing of it was run" in complaint(
        capsys, saved(tmp_path, values), "-o", target
    )
    assert "no/such/out.pt: cannot be written" in complaint(
        capsys, saved(tmp_path, contents()), "-o", tmp_path / "no" / "such" / "out.pt"
    )
    assert not target.exists()
    assert not (tmp_path / "was_run").exists()
