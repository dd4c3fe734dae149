"""What only a GPU can show: training and evaluation beside the CPU's, streams, graphs, bits, errors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from data_helpers import molecules
from op_helpers import SMALL, changed, each_tensor, ragged
from test_ops_forces import Case, close, outputs_of
from training_helpers import (
    assert_same_run,
    interrupted_run,
    level_data,
    model,
    structures,
    training_data,
)

from kinml_fast import KinMLCalculator, ops, report
from kinml_fast.deploy import evaluate
from kinml_fast.nn import Ensemble
from kinml_fast.train import Trainer, TrainingConfig, checkpoint
from kinml_fast.train.captured import MOST_STEPS, CapturedEpoch

pytestmark = [pytest.mark.cuda, pytest.mark.parametrize("device", ["cuda"], indirect=True)]

FORCES = {"loss": {"forces": True}}
KINDS = {
    "energies": {},
    "forces": {**FORCES, "ema_decay": 0.9, "gradient_clip": 5.0},
    "stored": {**FORCES, "jacobian": "stored"},
    "learned": {"loss": {"forces": True, "forces_from": 2, "weighting": "learned"}},
}
PLAIN = {"energies": {}, "forces": FORCES, "stored": KINDS["stored"]}
TYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
MIXED = (*[1 + 7 * i % 12 for i in range(300)], 600, 1, 0, 3)
"""Many small structures and a large one."""
STOP = 8
"""Reports of a run until it is interrupted: in its second epoch of six batches or, where the second and third epoch are
replayed as a whole with one report each, behind the third."""


@pytest.fixture(autouse=True)
def _without_drawing(monkeypatch):
    monkeypatch.setattr(report, "_save", lambda figure, path: path.touch())


def moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of an op, copies of their tensors on the device."""
    return each_tensor(lambda x: x.detach().to(device, copy=True), arguments)


def outputs(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Copies of the four results among the arguments of `ops.force_step`."""
    return [x.clone() for x in outputs_of(arguments)]


# ---- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_ten_epochs_are_those_of_the_cpu(kind, levels, dtype, device):
    data = training_data(60, "some") if levels == 1 else level_data(60, levels, "some")
    settings = TrainingConfig(epochs=10, batch_size=7, dtype=dtype, **KINDS[kind])
    found = []
    for place in ("cpu", device):
        trained = model(dtype=getattr(torch, dtype), fidelities=range(levels)).to(place)
        found.append((Trainer(trained, data, settings).fit(), trained.networks.weights.detach().cpu()))
    (here, weights), (there, others) = found
    rel = 1e-9 if dtype == "float64" else 1e-2
    for part in ("train", "validation", "test"):
        assert there.errors[part].rmse == pytest.approx(here.errors[part].rmse, rel=rel)
        assert there.forces[part].rmse == pytest.approx(here.forces[part].rmse, rel=rel)
    if dtype == "float64":
        assert there.best_epoch == here.best_epoch
        torch.testing.assert_close(others, weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["energies", "learned"])
def test_a_run_goes_on_on_the_other_device(kind, device, tmp_path):
    settings, data = TrainingConfig(epochs=4, batch_size=7, **KINDS[kind]), training_data(forces="all")
    Trainer(model(), data, settings, tmp_path / "whole").fit()
    for first, second in ((device, "cpu"), ("cpu", device)):
        run = tmp_path / f"first {first}"
        interrupted_run(run, settings, STOP, data=data, device=first)
        Trainer(model().to(second), data, settings, run, resume=True).fit()
        whole, own = (checkpoint.load(folder / "checkpoints" / "last.pt") for folder in (tmp_path / "whole", run))
        torch.testing.assert_close(own["weights"], whole["weights"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own["optimizer"]["state"], whole["optimizer"]["state"], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_the_same_bits_twice_and_after_an_interruption(kind, dtype, device, tmp_path):
    settings = TrainingConfig(epochs=4, batch_size=7, dtype=dtype, **KINDS[kind])
    own, data = getattr(torch, dtype), training_data(forces="all")
    for name in ("one", "two"):
        Trainer(model(dtype=own).to(device), data, settings, tmp_path / name).fit()
    interrupted_run(tmp_path / "three", settings, STOP, data=data, dtype=own, device=device)
    Trainer(model(dtype=own).to(device), data, settings, tmp_path / "three", resume=True).fit()
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "three")


# ---- Evaluation ----------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("members", [1, 3])
def test_evaluation_is_that_of_the_cpu(members, levels, dtype, device):
    models = [model(seed, dtype=dtype, fidelities=range(levels)) for seed in range(members)]
    judged = models[0] if members == 1 else Ensemble(models)
    here = evaluate.evaluate(judged, structures(forces="all"))
    there = evaluate.evaluate(copy.deepcopy(judged).to(device), structures(forces="all"))
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    for name in ("energies", "forces", "energy_std", "forces_std"):
        a, b = getattr(there, name), getattr(here, name)
        assert (a is None) == (b is None) == (members == 1 and name.endswith("std"))
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_the_calculator_of_a_gpu(device):
    trained = model()
    frames = [molecules("CCHH", 1, seed) for seed in range(3)]
    here, there = KinMLCalculator(trained), KinMLCalculator(trained, device="cuda")
    assert (trained.sae.device.type, there.model.sae.device.type) == ("cpu", "cuda")
    for calculator in (there, copy.deepcopy(there), KinMLCalculator([trained, trained], device="cuda:0")):
        for frame in frames:
            atoms = Atoms(frame.symbols(0), frame.coordinates)
            assert calculator.get_potential_energy(atoms) == pytest.approx(here.get_potential_energy(atoms), abs=1e-11)
            np.testing.assert_allclose(calculator.get_forces(atoms), here.get_forces(atoms), rtol=0, atol=1e-11)


@TYPES
@pytest.mark.parametrize("sizes", [MIXED, (600,), (3000,), (700, 0, 900)])
def test_small_and_large_structures_are_those_of_the_cpu(sizes, dtype, device):
    case = Case(dtype=dtype, batch=ragged(sizes, 2, 3))
    rtol = 1e-10 if dtype == torch.float64 else 1e-3
    with torch.inference_mode():
        expected = ops.energy_forces(**case.arguments(False))
        found = ops.energy_forces(**moved(case.arguments(False), device))
        close([x.cpu() for x in found], list(expected), rtol, rtol)
        arguments = case.step_arguments(False, list(range(0, len(sizes), 2)))
        there = moved(arguments, device)
        ops.force_step(**arguments)
        ops.force_step(**there)
        close([x.cpu() for x in outputs(there)], outputs(arguments), rtol, 10 * rtol)


@TYPES
def test_the_same_call_has_the_same_bits(dtype, device):
    case = Case(dtype=dtype, batch=ragged(MIXED, 2, 3))
    arguments = moved(case.step_arguments(False, list(range(case.n_structures))), device)
    evaluated = moved(case.arguments(False), device)
    runs = []
    for _ in range(4):
        ops.force_step(**arguments)
        runs.append([*outputs(arguments), *ops.energy_forces(**evaluated)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# ---- Streams and graphs --------------------------------------------------------------------------


def test_work_goes_to_the_current_stream(device):
    """The coordinates arrive late, in the order of that stream only."""
    case = Case(batch=ragged(MIXED, 2, 3))
    arguments = moved(case.arguments(False), device)
    step = moved(case.step_arguments(False, [3, 0, 1, 300]), device)
    expected = ops.energy_forces(**arguments)
    ops.force_step(**step)
    expected = [*expected, *outputs(step)]
    evaluated, trained = (changed(x, "coordinates", torch.zeros_like) for x in (arguments, step))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for late, source in ((evaluated, arguments), (trained, step)):
            late["system"].coordinates.copy_(source["system"].coordinates)
        found = ops.energy_forces(**evaluated)
        ops.force_step(**trained)
        found = [*found, *outputs(trained)]
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def captured(call) -> tuple[torch.cuda.CUDAGraph, object]:
    """A graph of a call, which has been made before, and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@TYPES
@pytest.mark.parametrize("stored", [False, True])
def test_a_training_step_in_a_graph(stored, dtype, device):
    """Replayed with other weights and other structures of other sizes, in the same memory."""
    arguments = moved(Case(dtype=dtype).step_arguments(stored, [3, 0, 1]), device)
    results = arguments["results"].tensors
    graph, _ = captured(lambda: ops.force_step(**arguments))
    for order in ([5, 4, 1], [2, 2, 3]):
        arguments["parameters"].mul_(1.1)
        arguments["structures"].copy_(torch.tensor(order))
        graph.replay()
        replayed = [x.clone() for x in results]
        for x in results:
            x.fill_(torch.nan)
        ops.force_step(**arguments)
        assert all(torch.equal(a, b) for a, b in zip(replayed, results, strict=True))


@TYPES
@pytest.mark.parametrize("sizes", [None, (700, 0, 900)])
def test_an_evaluation_in_a_graph(sizes, dtype, device):
    """Also of large structures, whose atoms are sorted."""
    case = Case(dtype=dtype, batch=sizes and ragged(sizes, 2, 3))
    arguments = moved(case.arguments(False), device)
    coordinates = arguments["system"].coordinates
    graph, results = captured(lambda: ops.energy_forces(**arguments))
    for shift in (0.01, -0.03):
        coordinates.add_(shift * torch.randn_like(coordinates))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, ops.energy_forces(**arguments), strict=True))


def test_the_ops_of_a_step_do_not_wait(device):
    case = Case(batch=ragged(MIXED, 2, 3))
    arguments = moved(case.arguments(False), device)
    large = moved(Case(batch=ragged((700, 0, 900), 2, 3)).arguments(False), device)
    step = moved(case.step_arguments(False, [3, 0, 1, 300]), device)
    stored = moved(Case().step_arguments(True, [3, 0, 1]), device)
    flat = arguments["parameters"]
    state = torch.zeros_like(flat), torch.zeros_like(flat)
    steps = torch.zeros((), dtype=torch.float64, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.energy_forces(**arguments)
        ops.energy_forces(**large)
        ops.force_step(**step)
        ops.force_step(**stored)
        vectors = ops.aev(arguments["system"], SMALL.packed())
        ops.aev_vjp(arguments["system"], vectors, SMALL.packed())
        ops.adam_step(flat, flat.clone(), *state, None, 1e-3, 0.9, 0.99, 1e-8, 0.0, False, steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["energies", "forces", "stored"])
def test_epochs_that_are_replayed_have_the_bits_of_their_steps(kind, device, monkeypatch):
    """From the second epoch on with one learning rate an epoch is a graph; here once not at all."""
    settings = TrainingConfig(epochs=6, batch_size=7, scheduler={"name": "step", "step_size": 3}, **PLAIN[kind])
    data, found, replayed = training_data(forces="all"), [], []
    run = CapturedEpoch.run
    monkeypatch.setattr(CapturedEpoch, "run", lambda own, order: replayed.append(own) or run(own, order))
    for most in (MOST_STEPS, 0):
        monkeypatch.setattr("kinml_fast.train.captured.MOST_STEPS", most)
        trained = model().to(device)
        Trainer(trained, data, settings).fit()
        found.append(trained.networks.weights.detach())
    assert len(replayed) == 4  # of three epochs with one learning rate the second and third, twice
    assert len(set(map(id, replayed))) == 2
    assert torch.equal(*found)


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["species", "offsets", "parameters", "sae"])
def test_tensors_on_two_devices(name, device):
    case = Case()
    arguments = changed(moved(case.arguments(False), device), name, torch.Tensor.cpu)
    with pytest.raises(RuntimeError, match=r"^kinml_fast: .*; move all tensors to one device"):
        ops.energy_forces(**arguments)
    if name in ("species", "offsets"):
        with pytest.raises(RuntimeError, match=r"^kinml_fast: .*; move all tensors to one device"):
            ops.aev(arguments["system"], SMALL.packed())
    with pytest.raises(RuntimeError, match=r"^kinml_fast: .*; move all tensors to one device"):
        model().to(device)(case.coordinates.to(device), case.species, case.offsets.to(device))


@pytest.mark.parametrize("wrong", [2, -1, 1 << 40])
def test_a_species_that_does_not_exist_gives_nan(wrong, device):
    """Values of indices are not looked at, since that would wait; nothing else of the batch is touched."""
    for sizes in ((5, 1, 0, 8, 3, 2), (600, 500)):
        case = Case(batch=ragged(sizes, 2, 4))
        arguments = moved(case.arguments(False), device)
        expected = ops.energy_forces(**arguments)[0][0]
        arguments["system"].species[1] = wrong
        energies, forces = (x[0] for x in ops.energy_forces(**arguments))
        assert energies[0].isnan()
        assert forces[: sizes[0]].isnan().any()
        close([energies[1:]], [expected[1:]], 1e-12, 1e-12)


@pytest.mark.parametrize("wrong", [6, -1, 1 << 40])
def test_a_structure_that_does_not_exist_gives_nan(wrong, device):
    arguments = moved(Case().step_arguments(False, [3, 0, 1]), device)
    ops.force_step(**arguments)
    expected = outputs(arguments)
    arguments["structures"][1] = wrong
    ops.force_step(**arguments)
    residuals, _, losses, gradient = outputs(arguments)
    assert residuals.isnan().tolist() == [False, True, False]
    close([residuals[::2]], [expected[0][::2]], 1e-12, 1e-12)
    assert losses[0].isnan()
    assert gradient.isnan().any()
