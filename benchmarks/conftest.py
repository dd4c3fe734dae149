"""What every benchmark needs: the data, the number of threads, and what goes into the JSON about the machine."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import tasks
import torch

import kinml_fast
from kinml_fast import _library, devices
from kinml_fast.data.structures import Structures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=os.cpu_count(), help="threads of torch and of the ops")
    parser.addoption("--kernels", type=Path, help="JSON list of {kernel, dtype, threads, seconds, flops or bytes}")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.config.getoption("--threads"))


def gemm_rate(dtype: torch.dtype, threads: int, rows: int = 1000) -> float:
    """GFLOP/s of torch.mm [rows, 224] x [224, 48], one thread on a product, times the threads."""
    torch.set_num_threads(1)
    a, b = torch.randn(rows, 224, dtype=dtype), torch.randn(224, 48, dtype=dtype)
    out = torch.empty(rows, 48, dtype=dtype)
    seconds = []
    for _ in range(200):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return threads * 2 * rows * 224 * 48 / statistics.median(seconds) / 1e9


def read_rate(threads: int) -> float:
    """GB/s of a sum over 1 GiB."""
    torch.set_num_threads(threads)
    memory = torch.ones(2**27, dtype=torch.float64)
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        memory.sum()
        seconds.append(time.perf_counter() - started)
    return memory.nbytes / statistics.median(seconds) / 1e9


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    threads = config.getoption("--threads")
    machine_info["kinml_fast"] = {
        "version": kinml_fast.__version__,
        "threads": threads,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "build": _library.build_info(),
        "gemm_gflops": {
            name: max(gemm_rate(getattr(torch, name), threads, rows) for rows in (250, 1000))
            for name in ("float64", "float32")
        },
        "read_gb_per_s": read_rate(threads),
    }
    if devices.why_no_gpu() is None:
        machine_info["kinml_fast"]["gpu"] = {
            "name": torch.cuda.get_device_name(),
            "memory_gb": torch.cuda.get_device_properties().total_memory / 1e9,
            "cuda": torch.version.cuda,
        }
    if kernels := config.getoption("--kernels"):
        machine_info["kinml_fast"]["kernels"] = json.loads(kernels.read_text())


@pytest.fixture(scope="session")
def c5h5() -> Structures:
    """2000 structures of C5H5: PyKinML's example if it is at hand, else the shipped ones, repeated."""
    return tasks.c5h5()


@pytest.fixture(scope="session")
def mixed() -> Structures:
    """2000 structures of twelve hydrocarbons, C2H2 to C10H16."""
    if not tasks.MIXED.exists():
        pytest.importorskip("tblite", reason="making the structures of mixed sizes needs tblite: pip install tblite")
    return tasks.mixed()


def count_triples(structures: Structures, cutoff: float) -> int:
    """Triples (unordered neighbour pairs of a centre) within the angular cutoff in Å."""
    total = 0
    for first, last in zip(structures.offsets[:-1], structures.offsets[1:], strict=True):
        x = structures.coordinates[first:last]
        distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
        neighbours = (distance <= cutoff).sum(axis=1) - 1
        total += int((neighbours * (neighbours - 1) // 2).sum())
    return total
