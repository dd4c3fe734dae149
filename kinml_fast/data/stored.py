"""Stored descriptors: the vectors of all atoms of a data set and, for training on forces, their Jacobians.

The second source of force training, beside recomputing both from the coordinates in every step
(`training.jacobian: stored`). A Jacobian takes D · 3 n_max numbers an atom, where n_max is the size of the largest
structure: what that comes to is said before it is made, and refused where it does not fit into memory.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.data.structures import Structures
from kinml_fast.errors import ConfigError, DataError, DeviceError
from kinml_fast.nn import AEVParameters

log = logging.getLogger(__name__)

BACKENDS = ("native", "aevmod")
"""What computes descriptors: the op of this package, or the package aevmod."""

_AEVMOD_CHUNK = 16  # structures at a time: aevmod returns nested lists, which take many times the memory of arrays
_SECONDS_BETWEEN_LINES = 10.0
_MEMORY_KEPT = 0.95  # of what is available: training needs a little beside the Jacobians


@dataclass(frozen=True, eq=False)
class StoredDescriptors:
    """Descriptors of structures, in the order of their atoms.

    Parameters
    ----------
    features
        [n_atoms, D]
    jacobian
        [n_atoms, D, C] in 1/Å, of the same type, with C ≥ 3 n for the largest structure; None without derivatives.
        Column 3 q + c is the derivative with respect to coordinate c of the q-th atom of the same structure; columns
        that a structure does not have are padding, which nothing reads.
    """

    features: Tensor
    jacobian: Tensor | None


def compute(
    structures: Structures,
    parameters: AEVParameters,
    dtype: torch.dtype,
    *,
    jacobian: bool,
    backend: str = "native",
    device: torch.device | str = "cpu",
) -> StoredDescriptors:
    """Descriptors of structures from their coordinates.

    Parameters
    ----------
    structures
        With coordinates; `species` in the order of `parameters.elements`.
    parameters
        The descriptor.
    dtype
        float64 or float32: of the results, and for the native backend of the computation.
    jacobian
        Whether Jacobians are made.
    backend
        "native", or "aevmod": the package of that name computes in float64, some 10⁴ times slower. Its Jacobians are
        those of its `eval_Jac_sac`, because its `eval_Jac` is the derivative of its vectors only for beta = 1.
    device
        Where the native backend computes, and the results are; those of aevmod are on the CPU.

    Raises
    ------
    InputError
        The Jacobians do not fit into memory; aevmod is not installed or does not have this form of descriptor.
    """
    if structures.coordinates is None:
        raise DataError("the structures have no coordinates, so that descriptors cannot be computed: take other files")
    if structures.elements != parameters.elements:
        raise DataError(
            f"the structures count elements as {' '.join(structures.elements)} and the descriptor as "
            f"{' '.join(parameters.elements)}: give both the same order"
        )
    if backend not in BACKENDS:
        raise ConfigError(f"there is no backend {backend} for descriptors: take {' or '.join(BACKENDS)}")
    if backend == "aevmod":
        if structures.are_crystals.any():
            label = structures.labels[int(np.argmax(structures.are_crystals))]
            raise ConfigError(f"{label} is periodic, which aevmod does not know: set descriptor.backend=native")
        return _from_aevmod(structures, structures.coordinates, parameters, dtype, jacobian)
    cells, periodic = (
        None if x is None else torch.from_numpy(x).to(device) for x in (structures.cells, structures.periodic)
    )
    system = ops.System(
        structures.coordinates_in(dtype).to(device),
        torch.from_numpy(structures.species).to(device),
        torch.from_numpy(structures.offsets).to(device),
        cells=cells,
        periodic=periodic,
    )
    packed = parameters.packed()
    with torch.no_grad():
        if not jacobian:
            return StoredDescriptors(ops.aev(system, packed), None)
        _check_memory(structures, parameters.length, dtype)
        largest = int(structures.sizes.max(initial=0))
        return StoredDescriptors(ops.aev(system, packed), ops.aev_jacobian(system, largest, packed))


def allocate(structures: Structures, length: int, dtype: torch.dtype, jacobian: bool) -> StoredDescriptors:
    """Room for the descriptors of structures, zero everywhere.

    Raises
    ------
    InputError
        The Jacobians do not fit into memory.
    """
    n_atoms, largest = len(structures.species), int(structures.sizes.max(initial=0))
    features = torch.zeros(n_atoms, length, dtype=dtype)
    if not jacobian:
        return StoredDescriptors(features, None)
    _check_memory(structures, length, dtype)
    return StoredDescriptors(features, torch.zeros(n_atoms, length, 3 * largest, dtype=dtype))


def jacobian_bytes(structures: Structures, length: int, dtype: torch.dtype) -> int:
    """Bytes of the Jacobians of structures for descriptors of so many numbers."""
    return len(structures.species) * length * 3 * int(structures.sizes.max(initial=0)) * dtype.itemsize


def available_memory() -> int | None:
    """Bytes that this process can still take, of the machine or of its control group; None if the system is silent."""
    found = []
    lines = _read(Path("/proc/meminfo")).splitlines()
    found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    # A control group limits a container or a batch job; one of its parents may limit more.
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        controllers, _, name = line.partition(":")[2].partition(":")
        if controllers == "":
            root, limit, usage, cache = "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif controllers == "memory":
            root, limit, usage = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = Path(root) / name.lstrip("/")
        for folder in (group, *group.parents):
            most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if most.isdecimal() and used.isdecimal():
                # Cached files count as used, and go when memory is needed.
                statistics = dict(entry.split()[:2] for entry in _read(folder / "memory.stat").splitlines())
                found.append(int(most) - int(used) + int(statistics.get(cache, 0)))
    return max(0, min(found)) if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _check_memory(structures: Structures, length: int, dtype: torch.dtype) -> None:
    needed, available = jacobian_bytes(structures, length, dtype), available_memory()
    largest = int(structures.sizes.max(initial=0))
    what = (
        f"the Jacobians of {len(structures)} structures of up to {largest} atoms ({len(structures.species)} atoms x "
        f"{length} x {3 * largest} numbers of {dtype.itemsize} bytes)"
    )
    if available is not None and needed > _MEMORY_KEPT * available:
        narrower = " or training.dtype: float32" if dtype == torch.float64 else ""
        raise DeviceError(
            f"{what} need {needed / 1e9:.2f} GB and {available / 1e9:.2f} GB of memory are available: "
            f"take training.jacobian: recompute, which stores none{narrower}, or fewer structures"
        )
    log.info("%s take %.0f MB", what, needed / 1e6)


def _from_aevmod(
    structures: Structures, coordinates: np.ndarray, parameters: AEVParameters, dtype: torch.dtype, jacobian: bool
) -> StoredDescriptors:
    try:
        import aevmod
    except ImportError as error:
        raise ConfigError(
            f"descriptor.backend: aevmod needs the package aevmod, which cannot be imported ({error}): "
            "pip install aevmod, or take descriptor.backend: native"
        ) from error
    settings = (len(parameters.radial_shifts), len(parameters.angular_shifts), len(parameters.sections))
    cutoffs = [parameters.radial_cutoff, parameters.angular_cutoff]
    if AEVParameters.aevmod(parameters.elements, *settings, cutoffs, parameters.beta) != parameters:
        raise ConfigError(
            "aevmod does not have this form of descriptor: take evenly spread shifts (AEVParameters.aevmod), or "
            "descriptor.backend: native"
        )
    stored = allocate(structures, parameters.length, dtype, jacobian)
    computer = aevmod.aev(list(parameters.elements), *settings, cutoffs, parameters.beta)
    # With beta = 1 both are the derivative; eval_Jac takes a tenth of the time.
    derivative = computer.eval_Jac if parameters.beta == 1 else computer.eval_Jac_sac

    # aevmod takes many structures of one formula in one order of atoms.
    groups: dict[bytes, list[int]] = {}
    for i, (begin, end) in enumerate(zip(structures.offsets[:-1], structures.offsets[1:], strict=True)):
        groups.setdefault(structures.species[begin:end].tobytes(), []).append(i)
    chunks = [group[i : i + _AEVMOD_CHUNK] for group in groups.values() for i in range(0, len(group), _AEVMOD_CHUNK)]
    started = said = time.monotonic()
    done = 0
    for chunk in chunks:
        config = aevmod.config(list(structures.symbols(chunk[0])))
        rows = [slice(structures.offsets[i], structures.offsets[i + 1]) for i in chunk]
        config.add_structures(np.stack([coordinates[row].ravel() for row in rows]))
        computer.build_index_sets(config)
        for row, vectors in zip(rows, computer.eval(config), strict=True):
            stored.features[row] = torch.tensor(np.array(vectors), dtype=dtype)
        if stored.jacobian is not None:
            for row, slopes in zip(rows, derivative(config), strict=True):
                stored.jacobian[row, :, : 3 * (row.stop - row.start)] = torch.tensor(np.array(slopes), dtype=dtype)
        done += len(chunk)
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            rest = (said - started) / done * (len(structures) - done)
            log.info("aevmod: %d of %d structures, %.0f s left", done, len(structures), rest)
    return stored
