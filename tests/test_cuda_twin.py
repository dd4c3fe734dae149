"""Tests of the ops on the source of the GPU's kernels, compiled for the host (build_twin.py)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rank_helpers import again, digests

TESTS = Path(__file__).resolve().parent

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"),
    pytest.mark.slow,
]

# What runs here in some minutes; KINML_TWIN=1 pytest -m '' runs everything so. Each line: arguments of pytest.
SUBSET = [
    ["test_ops_adam.py", "test_ops_networks.py"],
    ["test_ops_forces.py", "test_ops_levels.py", "test_ops_shared.py", "test_ops_periodic.py"],
    # Without those of hundreds of atoms, which take minutes (test_large_and_small_structures_in_one_batch fails there:
    # together they go another way than alone, to the same numbers but not the same bits), and without descriptors for
    # which the CPU has series of its own.
    ["test_ops_aev.py", "-k", "not large and not dense and not thread and not narrow and not zeta"],
    # Training: ten epochs of the published run, and beside plain loops in torch.
    [
        *("test_parity.py", "test_trainer.py", "test_force_training.py", "test_levels_training.py"),
        *("test_stored_training.py", "-k", "published_run or plain_loop or ten_epochs"),
    ],
]


@pytest.fixture(scope="module")
def twin() -> dict[str, str]:
    """Environment of processes that use the twin, which is built."""
    environment = {**os.environ, "KINML_TWIN": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, str(TESTS / "build_twin.py")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return environment | {"KINML_TWIN_LIBRARY": done.stdout.splitlines()[-1]}


BY_THE_PROCESSOR = {"energy_hessians", "hessian_products"}
"""Ops that hand what is on a GPU to those of the CPU."""


def test_ops_of_the_gpu_are_all_in_the_twin(twin):
    """Every op of the schema is there for a GPU, and takes the CPU's place, but for those that the CPU computes."""
    text = (TESTS.parent / "csrc" / "torch" / "schema.cpp").read_text()
    defined = set(re.findall(r'm\.def\(\s*"(\w+)\(', text))
    for name in BY_THE_PROCESSOR:
        assert f'm.impl("{name}", {name});' in (TESTS.parent / "csrc/torch/force_ops_cuda.cpp").read_text()
    expected = sorted(defined - BY_THE_PROCESSOR)
    code = "import build_twin; build_twin.load(); print('replaced:', *build_twin.replaced_ops())"
    environment = {**twin, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^replaced: (.*)$", done.stdout, re.MULTILINE)[1].split() == expected


def test_forces_of_atoms_that_are_in_no_structure_are_nan(twin):
    """On GPUs offsets are not looked at; on CPUs these are an error."""
    code = """
import build_twin
build_twin.load()
from kinml_fast import ops
from test_ops_forces import Case
arguments = Case().arguments(False)
arguments["system"].offsets[-1] -= 2
print("NaN:", *ops.energy_forces(**arguments)[1][0].isnan().all(1).nonzero().flatten().tolist())
print("atoms:", len(arguments["system"].species))
"""
    environment = {**twin, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n_atoms = int(re.search(r"atoms: (\d+)", done.stdout)[1])
    assert f"NaN: {n_atoms - 2} {n_atoms - 1}\n" in done.stdout


@pytest.mark.parametrize("arguments", SUBSET, ids=" ".join)
def test_ops(twin, arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not cuda"]
    command += [str(TESTS / word) if word.startswith("test_") else word for word in arguments]
    done = subprocess.run(command, env=twin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout)


def test_processes_share_batches_with_the_same_bits(twin, monkeypatch, tmp_path):
    monkeypatch.setenv("KINML_TWIN_LIBRARY", twin["KINML_TWIN_LIBRARY"])
    alone, several = digests(1), []
    again(lambda _: several.append(digests(3)), tmp_path)
    assert several == [{kind: 3 * of_one for kind, of_one in alone.items()}]
