"""Training and evaluation with energies and forces: network 224-48-24-12-1 gaussian, Adam.

An epoch includes shuffling, batching, loss, gradient and optimizer. The floor counts, at the rate of torch.mm, the
products of the networks (first layer: forward, gradient of the vector, tangent, two for the weights; the others one
more, the second reverse pass), and for each triple of the vectors n_angular exponentials (28 FLOP each), n_sections
eighth powers (10), about 40 for the geometry, and 2 + 4 + 4 FLOP for each of the n_angular x n_sections products in the
vector and its two products with the Jacobian. Forms with stored Jacobians have another floor: to read these once,
without padding.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from baselines import DESCRIPTOR, LAYERS
from conftest import count_triples
from forms import FORMS, OURS, PLAIN, STORED, TORCHANI, WITH_JACOBIANS, baseline, jacobian_bytes, model, training
from tasks import PYKINML, alkanes, c5h5_file

from kinml_fast.data.structures import Structures

HERE = Path(__file__).parent
DTYPES = ("float64", "float32")


def flops(structures: Structures) -> int:
    """Of a training step on all structures."""
    first, *others = (a * b for a, b in itertools.pairwise(LAYERS))
    per_atom = 2 * (5 * first + 6 * sum(others))
    per_triple = 8 * 28 + 8 * 10 + 40 + 64 * (2 + 4 + 4)
    triples = count_triples(structures, DESCRIPTOR.angular_cutoff)
    return per_atom * len(structures.species) + per_triple * triples


def describe(benchmark, group: str, form: str, dtype: str, structures: Structures, **more) -> None:
    benchmark.group = f"{group} {dtype}"
    benchmark.extra_info.update(
        form=form, dtype=dtype, structures=len(structures), atoms=len(structures.species), **more
    )


def need(form: str) -> None:
    if form == TORCHANI:
        pytest.importorskip("torchani", reason="TorchANI is optional: pip install torchani")


def need_memory(structures: Structures, dtype: torch.dtype) -> None:
    needed = 1.2 * jacobian_bytes(structures, dtype, padded=True)
    there = int(re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    if needed > there:
        pytest.skip(f"the Jacobians take {needed / 1e9:.1f} GB, {there / 1e9:.1f} GB are free")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", ["c5h5", "mixed"])
def test_epoch(benchmark, request, task, form, dtype):
    structures, kind = request.getfixturevalue(task), getattr(torch, dtype)
    need(form)
    if form in WITH_JACOBIANS:
        need_memory(structures, kind)
        floor = {
            "bytes": jacobian_bytes(structures, kind, padded=False),
            "padded": jacobian_bytes(structures, kind, padded=True),
        }
    else:
        floor = {"flops": flops(structures)}
    describe(benchmark, f"forces epoch {task}", form, dtype, structures, **floor)
    rounds, warmup = {OURS: (30, 3), STORED: (15, 2), PLAIN: (8, 1), TORCHANI: (3, 0)}[form]
    benchmark.pedantic(training(form, structures, kind), rounds=rounds, warmup_rounds=warmup)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 8, 50, 256, 2048])
def test_batch_size(benchmark, c5h5, batch_size, dtype, threads):
    structures = c5h5.select(np.arange(2048) % len(c5h5))
    describe(benchmark, f"forces batch {threads}", str(batch_size), dtype, structures)
    torch.set_num_threads(threads)
    epoch = training(OURS, structures, getattr(torch, dtype), batch_size)
    benchmark.pedantic(epoch, rounds=8, warmup_rounds=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_carbon", [1, 2, 4, 6, 10, 16])
def test_molecule_size(benchmark, n_carbon, dtype, threads):
    """About 20,000 atoms in all, 500 in a batch."""
    n_atoms = 3 * n_carbon + 2
    structures = alkanes(n_carbon, 20000 // n_atoms)
    triples = count_triples(structures, DESCRIPTOR.angular_cutoff)
    describe(benchmark, f"forces size {threads}", str(n_atoms), dtype, structures, triples=triples)
    torch.set_num_threads(threads)
    epoch = training(OURS, structures, getattr(torch, dtype), 500 // n_atoms)
    benchmark.pedantic(epoch, rounds=8, warmup_rounds=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [OURS, PLAIN, TORCHANI])
def test_evaluate(benchmark, c5h5, form, dtype):
    """Energies and forces of 2000 C5H5 at once."""
    need(form)
    describe(benchmark, "forces evaluation", form, dtype, c5h5)
    rounds = {OURS: 20, PLAIN: 5, TORCHANI: 3}[form]
    benchmark.pedantic(evaluation(form, c5h5, getattr(torch, dtype)), rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [OURS, TORCHANI])
def test_one_structure(benchmark, c5h5, form, dtype):
    """Energy and forces of one C5H5."""
    need(form)
    one = c5h5.select([0])
    describe(benchmark, "forces call", form, dtype, one)
    benchmark.pedantic(evaluation(form, one, getattr(torch, dtype)), rounds=200, warmup_rounds=20)


def evaluation(form: str, structures: Structures, dtype: torch.dtype):
    """What computes energies and forces of all structures at once."""
    if form != OURS:
        return baseline(form, structures, dtype).evaluate
    ours = model(dtype)
    arguments = [torch.from_numpy(getattr(structures, name)) for name in ("coordinates", "species", "offsets")]
    arguments[0] = arguments[0].to(dtype)

    def evaluate():
        with torch.inference_mode():
            return ours.energies_and_forces(*arguments)

    return evaluate


def process(*arguments: object) -> dict:
    """What a process of its own reports."""
    command = [sys.executable, HERE / "process.py", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_memory(benchmark, form, dtype, request):
    need(form)
    benchmark.group = f"forces memory {dtype}"
    threads = request.config.getoption("--threads")
    found = benchmark.pedantic(process, ("memory", form, dtype, "--threads", threads), rounds=1)
    benchmark.extra_info.update(form=form, dtype=dtype, **found)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cold_start(benchmark, seed, request):
    """From the first line of a process to test errors below 1 kcal/mol and 2.3 kcal/mol/Å."""
    benchmark.group = "cold start"
    overrides = [f"data.files=[{c5h5_file()}]", "training.epochs=60", f"network.seed={seed}", f"training.seed={seed}"]
    overrides.append(f"training.threads={request.config.getoption('--threads')}")
    if PYKINML.is_dir():
        overrides += [f"data.split_file={PYKINML / 'sample_tvt.txt'}", "data.split=[2000, 48, 0]"]
    found = benchmark.pedantic(process, ("cold-start", "forces", *overrides), rounds=1)
    benchmark.extra_info.update(form=f"seed {seed}", **found)
