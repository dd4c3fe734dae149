"""What the tests of the ops share: descriptors, ragged batches, arguments, aevmod and the oracle in the ops' terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kinml_fast import ops, reference
from kinml_fast.nn import AEVParameters

PYKINML = Path(__file__).parents[2] / "shared" / "data" / "pykinml"
ELEMENTS = ["C", "H", "N", "O"]
needs_pykinml_data = pytest.mark.skipif(not PYKINML.is_dir(), reason="needs ../shared/data/pykinml")

ON_CPU = pytest.mark.parametrize("device", ["cpu"], indirect=True)
"""For tests about the CPU among those that run on every device: threads; values of indices, which GPUs do not check."""

Ragged = tuple[Tensor, Tensor, Tensor]
"""coordinates [n_atoms, 3], species [n_atoms], offsets [n_structures + 1]"""

SMALL = AEVParameters.aevmod(("C", "H"), n_radial=3, n_angular=2, n_sections=2)
"""D = 18: for checks whose cost grows with the vector."""

ANI_1X = AEVParameters.ani(
    ("H", "C", "N", "O"),
    [0.9 + 0.26875 * i for i in range(16)],
    16.0,
    5.2,
    [0.9 + 0.65 * i for i in range(4)],
    8.0,
    3.5,
    [math.pi / 16 * (2 * i + 1) for i in range(8)],
    32.0,
)
ANI_2X = AEVParameters.ani(
    ("H", "C", "N", "O", "S", "F", "Cl"),
    [0.8 + 0.26875 * i for i in range(16)],
    19.7,
    5.1,
    [0.8 + 0.3375 * i for i in range(8)],
    12.5,
    3.5,
    [math.pi / 8 * (2 * i + 1) for i in range(4)],
    14.1,
)


def keywords(descriptor: AEVParameters) -> dict:
    """The keyword arguments of `reference.aev` that mean this descriptor."""
    values = {field.name: getattr(descriptor, field.name) for field in fields(descriptor)}
    return {"n_species": len(values.pop("elements")), **values}


def ragged(sizes: Sequence[int], n_species: int, seed: int, spacing: float = 1.5) -> Ragged:
    """Structures of `sizes` atoms on a shaken cubic lattice: no two atoms are closer than 0.6 spacing."""
    rng = np.random.default_rng(seed)
    parts = []
    for n in sizes:
        side = math.ceil(n ** (1 / 3) + 0.3)
        places = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
        chosen = places[rng.permutation(len(places))[:n]]
        parts.append(spacing * (chosen + rng.uniform(-0.2, 0.2, (n, 3))))
    offsets = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int64)
    n_atoms = int(offsets[-1])
    coordinates = torch.tensor(np.concatenate(parts) if parts else np.zeros((0, 3))).reshape(-1, 3)
    return coordinates, torch.tensor(rng.integers(0, n_species, n_atoms)), offsets


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of a normal distribution, the same ones in both types and on every device."""
    generator = torch.Generator().manual_seed(seed)
    return here(torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype))


def here(x: Tensor) -> Tensor:
    """On the device of the test; see the fixture `on_device`."""
    return x.to(torch.get_default_device())


def random_molecule(rng: np.random.Generator, n_atoms: int, n_species: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Atoms at least 0.7 Å apart at a molecule's density: coordinates [n_atoms, 3] and species [n_atoms]."""
    atoms: list[np.ndarray] = []
    while len(atoms) < n_atoms:
        atom = rng.uniform(0, 1.0 + 2.0 * n_atoms ** (1 / 3), 3)
        if all(np.linalg.norm(atom - other) > 0.7 for other in atoms):
            atoms.append(atom)
    return torch.tensor(np.array(atoms)), torch.tensor(rng.integers(0, n_species, n_atoms))


def from_aevmod(
    coordinates: torch.Tensor,
    species: torch.Tensor,
    n_species: int,
    *,
    beta: float = 0.95,
    settings: tuple = (16, 8, 8, [5.2, 3.8]),
    jacobian: str | None = None,
) -> np.ndarray:
    """aevmod's vectors [n_structures, n, D] or Jacobians [n_structures, n, D, 3n] of many structures."""
    aevmod = pytest.importorskip("aevmod")
    computer = aevmod.aev(ELEMENTS[:n_species], *settings, beta)
    config = aevmod.config([ELEMENTS[s] for s in species.tolist()])
    config.add_structures(coordinates.reshape(-1, 3 * len(species)).cpu().numpy())
    computer.build_index_sets(config)
    return np.array(getattr(computer, jacobian)(config) if jacobian else computer.eval(config))


def reference_aev(batch: Ragged, descriptor: AEVParameters) -> Tensor:
    return reference.aev(*batch, **keywords(descriptor))


def not_contiguous(x: Tensor) -> Tensor:
    """The same values, each row and number in memory at a stride."""
    room = x.new_full([2 * n + 1 for n in x.shape], 99)
    view = room[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


# ---- arguments of the ops ------------------------------------------------------------------------


def each_tensor(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same arguments with `function` of each of their tensors, also of those in groups such as `ops.System`."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(each_tensor(function, x) for x in value)
    if isinstance(value, dict):
        return {name: each_tensor(function, x) for name, x in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: each_tensor(function, getattr(value, f.name)) for f in fields(value)})
    return value


def changed(arguments: dict[str, Any], name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """Arguments of a function of `ops`, one of them, or of the entries of their groups, changed."""
    if name in arguments:
        return {**arguments, name: change(arguments[name])}
    (group,) = [key for key, value in arguments.items() if is_dataclass(value) and hasattr(value, name)]
    own = arguments[group]
    return {**arguments, group: replace(own, **{name: change(getattr(own, name))})}


def raw(arguments: dict[str, Any]) -> tuple:
    """What the op itself takes for the arguments of its function in `ops`."""
    values: list[Any] = []
    for value in arguments.values():
        if isinstance(value, ops.Model):
            values += [value.descriptor, value.networks]
        else:
            values.append(value.tensors if is_dataclass(value) else value)
    return tuple(values)
