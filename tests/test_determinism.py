"""The same bits for any number of threads and every repetition; the same numbers for every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from op_helpers import ANI_2X, SMALL, normal, ragged

from kinml_fast import ops
from kinml_fast.nn import ACTIVATIONS, AEVParameters, EnergyModel, SpeciesNetworks
from kinml_fast.ops import Loss, Model, StepResults, System

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def results_of_all_ops(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What every op gives for batches of small, of large and of no structures, through several tiles and tasks."""
    found: dict[str, torch.Tensor] = {}
    for name, sizes, descriptor in [
        ("small", (10,) * 40 + (1, 0, 33), AEVParameters.aevmod(("C", "H"))),
        ("ani", (9, 17, 5), ANI_2X),
        ("large", (3, 600, 70, 1), SMALL),
    ]:
        x, z, o = ragged(sizes, len(descriptor.elements), 1)
        x, packed, n = x.to(dtype), descriptor.packed(), len(z)
        gradient, tangent = normal(n, descriptor.length, seed=1, dtype=dtype), normal(n, 3, seed=2, dtype=dtype)
        whole = System(x, z, o)
        found[f"aev {name}"] = ops.aev(whole, packed)
        found[f"aev_vjp {name}"] = ops.aev_vjp(whole, gradient, packed)
        found[f"aev_jvp {name}"] = ops.aev_jvp(whole, tangent, packed)
        found[f"aev_hvp {name}"] = ops.aev_hvp(whole, gradient, tangent, packed)
        small = System(x[:30], z[:30], torch.tensor([0, 20, 30]))
        found[f"aev_jacobian {name}"] = ops.aev_jacobian(small, 20, packed)
        torch.manual_seed(1)
        networks = SpeciesNetworks(
            descriptor.elements, descriptor.length, (13, 1), ["gaussian", "identity"], dtype=dtype
        )
        flat = networks.weights.detach()
        stored = System(None, small.species, small.offsets, found[f"aev {name}"][:30], found[f"aev_jacobian {name}"])
        for source, system in [("", whole), ("stored ", stored)]:
            model = Model([] if source else packed, networks.packed)
            results = ops.energy_forces(system, flat, None, model)
            if not source:
                found[f"energy_hessians {name}"] = ops.energy_hessians(small, flat, model)
            found |= dict(zip((f"{source}energies {name}", f"{source}forces {name}"), results, strict=True))
            n, n_structures = len(system.species), len(system.offsets) - 1
            targets, weights = normal(1, n_structures, seed=4), normal(1, n_structures, seed=6).abs()
            order, scales = torch.arange(n_structures).flip(0), torch.tensor([0.3, 0.7], dtype=torch.float64)
            (counts,) = ops.count_weights(ops.weighted(weights, weights), order, n_structures)
            loss = Loss(targets, weights, normal(1, n, 3, seed=5), weights, scales, counts)
            losses, residuals, errors = (
                torch.empty(shape, dtype=torch.float64) for shape in ((2,), (1, n_structures), (1, n_structures, 3))
            )
            written = StepResults(losses, torch.empty_like(flat), residuals, errors)
            ops.force_step(system, order, flat, loss, written, model)
            names = (f"{source}{part} {name}" for part in ("losses", "gradient", "residuals", "errors"))
            found |= dict(zip(names, written.tensors, strict=True))

    _, z, o = ragged((10,) * 40 + (1, 0, 333), 3, 2)
    features = normal(len(z), 30, seed=3, dtype=dtype).requires_grad_()
    order = ops.species_order(z, o, 3)
    found |= dict(zip(("rows", "owners", "starts"), order.tensors, strict=True))
    for activation in ACTIVATIONS:
        torch.manual_seed(0)
        networks = SpeciesNetworks(("C", "H", "O"), 30, (50, 20, 1), [activation, activation, "identity"], dtype=dtype)
        energies = ops.networks(
            features,
            order,
            networks.weights,
            torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
            networks.packed,
            len(o) - 1,
        )
        gradients = torch.autograd.grad(
            (normal(len(o) - 1) * energies).sum(), (features, networks.weights), create_graph=True
        )
        names = (f"energies {activation}", f"of features {activation}", f"of weights {activation}")
        found |= dict(zip(names, (t.detach() for t in (energies, *gradients)), strict=True))
        names = (f"second of features {activation}", f"second of weights {activation}")
        seconds = torch.autograd.grad((gradients[0] ** 2).sum(), (features, networks.weights))
        found |= dict(zip(names, seconds, strict=True))

    weights = normal(1, len(o) - 1, seed=7).abs()
    (counts,) = ops.count_weights(ops.weighted(weights, weights), torch.arange(len(o) - 1), len(o) - 1)
    flat, scales = networks.weights.detach(), torch.tensor([0.3, 0.0], dtype=torch.float64)
    loss = Loss(normal(1, len(o) - 1, seed=8), weights, None, None, scales, counts)
    errors = weights.new_empty(*weights.shape, 3)
    written = StepResults(torch.empty(2).double(), torch.empty_like(flat), torch.empty_like(weights), errors)
    stored = System(None, z, o, features.detach())
    ops.force_step(stored, torch.arange(len(o) - 1).flip(0), flat, loss, written, Model([], networks.packed))
    names = ("energy step losses", "energy step gradient", "energy step residuals", "energy step errors")
    found |= dict(zip(names, written.tensors, strict=True))

    torch.manual_seed(0)
    model = EnergyModel(AEVParameters.aevmod(("C", "H")), dtype=dtype)
    x, z, o = ragged((10,) * 20 + (4,), 2, 3)
    x = x.to(dtype).requires_grad_()
    energies = model(x, z, o)
    found["model energies"] = energies.detach()
    gradients = torch.autograd.grad(energies.sum(), (x, model.networks.weights))
    found |= dict(zip(("model gradient", "model of weights"), gradients, strict=True))
    return found


@pytest.fixture(scope="module", params=DTYPES)
def one_thread(request: pytest.FixtureRequest) -> tuple[torch.dtype, dict[str, torch.Tensor]]:
    dtype, before = DTYPES[request.param], torch.get_num_threads()
    torch.set_num_threads(1)
    results = results_of_all_ops(dtype)
    torch.set_num_threads(before)
    return dtype, results


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_same_bits_for_any_number_of_threads(threads, one_thread, any_threads):
    dtype, expected = one_thread
    torch.set_num_threads(threads)
    results = results_of_all_ops(dtype)
    different = [name for name, tensor in results.items() if not torch.equal(tensor, expected[name])]
    assert not different
    assert results.keys() == expected.keys()
    assert all(torch.isfinite(tensor).all() for tensor in results.values())


def test_no_result_depends_on_what_was_in_memory(one_thread, nan_memory):
    dtype, expected = one_thread
    assert torch.empty(3).isnan().all()
    results = results_of_all_ops(dtype)
    assert not [name for name, tensor in results.items() if not torch.equal(tensor, expected[name])]


def test_same_bits_from_several_threads_at_a_time(one_thread):
    """Ops that run at the same time do not share scratch memory."""
    dtype, expected = one_thread
    with ThreadPoolExecutor(3) as pool:
        for results in pool.map(results_of_large_structures, [dtype] * 6):
            assert all(torch.equal(tensor, expected[name]) for name, tensor in results.items())


def results_of_large_structures(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A part of the above that touches no global random generator."""
    x, z, o = ragged((3, 600, 70, 1), 2, 1)
    system, packed, n = System(x.to(dtype), z, o), SMALL.packed(), len(z)
    gradient, tangent = normal(n, SMALL.length, seed=1, dtype=dtype), normal(n, 3, seed=2, dtype=dtype)
    return {
        "aev large": ops.aev(system, packed),
        "aev_vjp large": ops.aev_vjp(system, gradient, packed),
        "aev_jvp large": ops.aev_jvp(system, tangent, packed),
        "aev_hvp large": ops.aev_hvp(system, gradient, tangent, packed),
    }


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_instruction_sets_agree(isa, tmp_path):
    """Their sums have other orders, hence the tolerance; a processor without one of them takes the next lower."""
    command = [sys.executable, __file__, str(tmp_path / "results.pt")]
    folders = [str(Path(ops.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "KINML_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used, theirs = torch.load(tmp_path / "results.pt", weights_only=True)
    assert used == isa or used == "baseline"
    for name, dtype in DTYPES.items():
        for key, expected in results_of_all_ops(dtype).items():
            result = theirs[name][key]
            assert result.dtype == expected.dtype
            scale = float(expected.abs().max()) if expected.is_floating_point() else 0.0
            tolerance = 1e-12 if dtype == torch.float64 else 5e-5
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance * scale, msg=f"{name} {key}")


if __name__ == "__main__":
    from kinml_fast._library import build_info

    used = build_info()["instruction set in use"]
    torch.save((used, {name: results_of_all_ops(dtype) for name, dtype in DTYPES.items()}), sys.argv[1])
