"""Stored descriptors: both backends, memory, and what is refused."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_helpers import molecules
from op_helpers import ANI_1X, keywords

from kinml_fast import reference
from kinml_fast.data import concatenate, stored
from kinml_fast.data.structures import Structures
from kinml_fast.errors import InputError
from kinml_fast.nn import AEVParameters

PARAMETERS = AEVParameters.aevmod(("C", "H", "O"), n_radial=4, n_angular=3, n_sections=2)


@pytest.fixture
def mixed() -> Structures:
    """Sizes 5, 1 and 3, elements that a structure lacks, atoms in no order of elements, formulas in turns."""
    parts = [molecules("HCHCO", 3, 1), molecules("C", 2, 2), molecules("OHH", 3, 3), molecules("HOH", 2, 4)]
    return concatenate(parts, PARAMETERS.elements).select([0, 5, 3, 1, 8, 6, 2, 4, 7, 9])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_native_descriptors_match_the_oracle(mixed, dtype):
    result = stored.compute(mixed, PARAMETERS, dtype, jacobian=True)
    assert result.features.dtype == result.jacobian.dtype == dtype
    assert result.jacobian.shape == (len(mixed.species), PARAMETERS.length, 15)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5
    for a, b in zip(mixed.offsets[:-1], mixed.offsets[1:], strict=True):
        x, z = torch.from_numpy(mixed.coordinates[a:b]), torch.from_numpy(mixed.species[a:b])
        vectors = reference.aev(x, z, torch.tensor([0, b - a]), **keywords(PARAMETERS))
        torch.testing.assert_close(result.features[a:b].double(), vectors, rtol=0, atol=tolerance)
        slopes = reference.jacobian(x, z, **keywords(PARAMETERS))
        found = result.jacobian[a:b, :, : 3 * (b - a)].double()
        torch.testing.assert_close(found, slopes, rtol=0, atol=10 * tolerance)
    without = stored.compute(mixed, PARAMETERS, dtype, jacobian=False)
    assert torch.equal(without.features, result.features)
    assert without.jacobian is None


@pytest.mark.parametrize("beta", [0.95, 1.0])
def test_aevmod_gives_the_same_as_the_native_op(mixed, beta):
    pytest.importorskip("aevmod")
    parameters = replace(PARAMETERS, beta=beta)
    ours = stored.compute(mixed, parameters, torch.float64, jacobian=True)
    theirs = stored.compute(mixed, parameters, torch.float64, jacobian=True, backend="aevmod")
    torch.testing.assert_close(theirs.features, ours.features, rtol=0, atol=5e-13)
    torch.testing.assert_close(theirs.jacobian, ours.jacobian, rtol=0, atol=5e-12)
    single = stored.compute(mixed, parameters, torch.float32, jacobian=True, backend="aevmod")
    assert torch.equal(single.features, theirs.features.float())
    assert torch.equal(single.jacobian, theirs.jacobian.float())
    assert stored.compute(mixed, parameters, torch.float64, jacobian=False, backend="aevmod").jacobian is None


def test_many_structures_of_one_formula_go_through_aevmod_in_parts(monkeypatch):
    pytest.importorskip("aevmod")
    structures = molecules("HCC", 2 * stored._AEVMOD_CHUNK + 3)
    parameters = AEVParameters.aevmod(("C", "H"), n_radial=4, n_angular=2, n_sections=2)
    ours = stored.compute(structures, parameters, torch.float64, jacobian=False)
    theirs = stored.compute(structures, parameters, torch.float64, jacobian=False, backend="aevmod")
    torch.testing.assert_close(theirs.features, ours.features, rtol=0, atol=5e-13)


def test_the_package_aevmod_may_be_missing(mixed, monkeypatch):
    monkeypatch.setitem(sys.modules, "aevmod", None)
    with pytest.raises(InputError, match=r"descriptor.backend: aevmod needs .* pip install aevmod"):
        stored.compute(mixed, PARAMETERS, torch.float64, jacobian=True, backend="aevmod")


def test_what_cannot_be_computed(mixed):
    def compute(structures=mixed, parameters=PARAMETERS, **options):
        return stored.compute(structures, parameters, torch.float64, jacobian=True, **options)

    with pytest.raises(InputError, match="no coordinates"):
        compute(replace(mixed, coordinates=None))
    with pytest.raises(InputError, match="as C H O and the descriptor as H C O: give both the same order"):
        compute(parameters=replace(PARAMETERS, elements=("H", "C", "O")))
    with pytest.raises(InputError, match="no backend other"):
        compute(backend="other")
    pytest.importorskip("aevmod")
    with pytest.raises(InputError, match="aevmod does not have this form"):
        compute(mixed.with_elements(ANI_1X.elements), ANI_1X, backend="aevmod")


def test_memory_is_said_beforehand_and_refused(mixed, monkeypatch, caplog):
    n_atoms = len(mixed.species)
    needed = n_atoms * PARAMETERS.length * 15 * 8
    assert stored.jacobian_bytes(mixed, PARAMETERS.length, torch.float64) == needed
    assert stored.jacobian_bytes(mixed, PARAMETERS.length, torch.float32) == needed // 2
    monkeypatch.setattr(stored, "available_memory", lambda: needed)
    with pytest.raises(InputError, match=r"GB .* training.jacobian: recompute.* or training.dtype: float32"):
        stored.compute(mixed, PARAMETERS, torch.float64, jacobian=True)
    with caplog.at_level(logging.INFO):
        stored.compute(mixed, PARAMETERS, torch.float32, jacobian=True)
    said = f"10 structures of up to 5 atoms ({n_atoms} atoms x {PARAMETERS.length} x 15 numbers of 4 bytes) take 0 MB"
    assert said in caplog.text
    stored.compute(mixed, PARAMETERS, torch.float64, jacobian=False)
    monkeypatch.setattr(stored, "available_memory", lambda: None)
    stored.compute(mixed, PARAMETERS, torch.float64, jacobian=True)


MEMINFO = "MemTotal:       1000 kB\nMemFree:        10 kB\nMemAvailable:    800 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"/proc/meminfo": MEMINFO}, 800 * 1024),
        # Version 2: a limit of the group, one of a parent, cached files that can go, a limit that is none.
        (
            {
                "/proc/meminfo": MEMINFO,
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/b/memory.max": "500000\n",
                "/sys/fs/cgroup/a/b/memory.current": "400000\n",
                "/sys/fs/cgroup/a/b/memory.stat": "anon 300000\ninactive_file 50000\n",
                "/sys/fs/cgroup/a/memory.max": "600000\n",
                "/sys/fs/cgroup/a/memory.current": "580000\n",
                "/sys/fs/cgroup/memory.max": "max\n",
                "/sys/fs/cgroup/memory.current": "1\n",
            },
            20000,
        ),
        # Version 1, in a batch job; another controller's limit is not ours.
        (
            {
                "/proc/self/cgroup": "9:memory:/slurm/job_7\n8:pids:/x\n0::/\n",
                "/sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "9000\n",
                "/sys/fs/cgroup/memory/slurm/job_7/memory.usage_in_bytes": "8000\n",
                "/sys/fs/cgroup/memory/slurm/job_7/memory.stat": "cache 1\ntotal_inactive_file 500\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": "10\n",
            },
            1500,
        ),
        # More used than allowed: nothing is left, not less than nothing.
        (
            {
                "/proc/self/cgroup": "0::/\n",
                "/sys/fs/cgroup/memory.max": "10\n",
                "/sys/fs/cgroup/memory.current": "20\n",
            },
            0,
        ),
    ],
)
def test_available_memory(monkeypatch, files, expected):
    monkeypatch.setattr(stored, "_read", lambda path: files.get(str(path), ""))
    assert stored.available_memory() == expected


def test_available_memory_of_this_machine():
    available = stored.available_memory()
    if Path("/proc/meminfo").exists():
        assert 0 < available < 1 << 50
