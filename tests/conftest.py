"""What tests of several files use: switches (long comparisons, the twin), devices, threads that are put back."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator

import pytest

# Threads that wait give their core away. Tests run in several processes, and those of one would else keep the others'
# from working: on two cores they take a third of the time. Read when torch is loaded, here and in programs of tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A script in the background ignores SIGINT, and so would all programs that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

# torch's CPU functions come from MKL, which picks the kernel of each on its first call. When that call runs on several
# threads, one may get a kernel of half the precision (github.com/pytorch/pytorch/issues/188792): call each once on one.
for _dtype in (torch.float64, torch.float32):
    for _name in ("exp", "expm1", "log", "log1p", "sqrt", "sin", "cos", "acos", "tanh", "erf"):
        getattr(torch, _name)(torch.full((1,), 0.5, dtype=_dtype))


# KINML_TWIN=1: the ops are those for GPUs, compiled for the host.
TWIN = os.environ.get("KINML_TWIN", "0") not in ("", "0")
if TWIN:
    import build_twin

    build_twin.load()


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what a sample leaves out as slow; skip beside the twin what is about the CPU's own ops."""
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sample") and not item.get_closest_marker("cuda"):
            families.setdefault(item.nodeid.partition("[")[0], []).append(item)
        # Tests that name their device: op_helpers.ON_CPU.
        if TWIN and any(mark.args[0] == "device" for mark in item.iter_markers("parametrize")):
            item.add_marker(pytest.mark.skip(reason="about the ops for CPUs"))
    for family in families.values():
        (number,) = family[0].get_closest_marker("sample").args
        kept = {round(i * (len(family) - 1) / max(number - 1, 1)) for i in range(number)}
        for place, item in enumerate(family):
            if place not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    """Tests run away from the clone: a `python -c` there would import its folder instead of what is installed."""
    monkeypatch.chdir(tmp_path)


def why_no_gpu() -> str | None:
    """Why tests on a GPU are skipped here."""
    from kinml_fast._library import build_info

    if build_info()["cuda"] == "none":
        return "kinml_fast was built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no GPU"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Where there is a GPU, only tests of it use it: elsewhere the device auto is the CPU, and results are its."""
    from kinml_fast import devices

    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("cuda") is None and torch.cuda.is_available():
            patch.setattr(devices, "why_no_gpu", lambda: "this test is about the CPU")
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of programs that it starts
        return (yield)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test's tensors are; pytest -m cuda runs those of the GPU."""
    if request.param == "cuda" and (reason := why_no_gpu()) is not None:
        # scripts/gpu_check.sh: nothing is skipped in silence.
        (pytest.fail if os.environ.get("KINML_NEED_GPU") == "1" else pytest.skip)(reason)
    return torch.device(request.param)


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether to make the long comparisons whole (KINML_FULL_TESTS=1) and not only a part of them."""
    return os.environ.get("KINML_FULL_TESTS", "0") not in ("", "0")


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """New tensors of torch are full of NaN instead of anything: what an op forgets to write shows."""
    torch.use_deterministic_algorithms(True)  # with which comes torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def any_threads() -> Iterator[None]:
    """The test sets the number of threads; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """Tensors that the test makes are on its device, unless it says otherwise; `op_helpers.here` moves others there."""
    # Without a default device, torch's functions are called directly: tests on the CPU take no longer.
    with contextlib.nullcontext() if device.type == "cpu" else device:
        yield


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """What a test lets the package log to, such as a captured standard output, is closed when it ends."""
    logger = logging.getLogger("kinml_fast")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
