"""One C5H5, and many replicas of it, evaluated again and again: op, model, calculator; network 224-48-24-12-1.

`--threads 1` is what a molecular dynamics run of one small molecule uses.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from ase import Atoms
from forms import model

from kinml_fast import KinMLCalculator, ops
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import members

DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])
HESSIANS = (
    *("energy and forces", "op", "model.hessian", "calculator", "forces, 6N times"),
    *("product with a vector", "product by autograd"),
)
FORMS = ("op", "op, weights prepared", "energies_and_forces", "calculator", "calculator in a box")


def describe(benchmark, form: str, dtype: str, count: int = 1) -> None:
    benchmark.group = f"inference {count} {dtype}"
    benchmark.extra_info.update(form=form, dtype=dtype, structures=count)


def replicas(c5h5: Structures, count: int, dtype: torch.dtype) -> ops.System:
    chosen = c5h5.select(np.arange(count))
    assert chosen.coordinates is not None
    coordinates = torch.from_numpy(chosen.coordinates).to(dtype)
    return ops.System(coordinates, torch.from_numpy(chosen.species), torch.from_numpy(chosen.offsets))


@DTYPES
@pytest.mark.parametrize("form", FORMS)
def test_molecule(benchmark, c5h5, form, dtype):
    """Energy and forces; the calculator gets new positions each time."""
    own = model(getattr(torch, dtype)).requires_grad_(False)
    system = replicas(c5h5, 1, own.dtype)
    description = ops.Model(own.aev.packed, own.networks.packed)
    weights = own.networks.weights
    prepared = ops.prepare_weights(weights, description) if form == FORMS[1] else None
    symbols = [c5h5.elements[code] for code in c5h5.species[: c5h5.offsets[1]]]
    box = form == FORMS[4]
    atoms = Atoms(symbols, system.coordinates.numpy(), cell=[12.0] * 3 if box else None, pbc=box)
    atoms.calc = KinMLCalculator(own)
    shifts = itertools.cycle(1e-6 * np.arange(1, 1000))

    def calculate() -> None:
        atoms.positions[0, 0] += next(shifts)
        atoms.get_forces()

    functions = {
        "op": lambda: ops.energy_forces(system, weights, own.sae, description),
        "op, weights prepared": lambda: ops.energy_forces(system, weights, own.sae, description, 0, prepared),
        "energies_and_forces": lambda: own.energies_and_forces(system.coordinates, system.species, system.offsets),
        "calculator": calculate,
        "calculator in a box": calculate,
    }
    describe(benchmark, form, dtype)
    with torch.inference_mode():
        benchmark.pedantic(functions[form], iterations=20, rounds=300, warmup_rounds=10)


@DTYPES
@pytest.mark.parametrize("form", [*HESSIANS])
def test_hessian(benchmark, c5h5, form, dtype):
    """The Hessian of one molecule, and beside it what one may do without: differences of forces, one column."""
    own = model(getattr(torch, dtype)).requires_grad_(False)
    system = replicas(c5h5, 1, own.dtype)
    assert system.coordinates is not None
    description = ops.Model(own.aev.packed, own.networks.packed)
    symbols = [c5h5.elements[code] for code in c5h5.species[: c5h5.offsets[1]]]
    atoms = Atoms(symbols, system.coordinates.numpy())
    calculator = KinMLCalculator(own)
    place = (system.coordinates, system.species, system.offsets)
    moved = system.coordinates.repeat(6 * len(symbols), 1)
    copies = (moved, system.species.repeat(6 * len(symbols)), len(symbols) * torch.arange(6 * len(symbols) + 1))
    direction = torch.randn_like(system.coordinates)

    def product() -> None:
        x = system.coordinates.clone().requires_grad_()
        (slope,) = torch.autograd.grad(own(x, *place[1:]).sum(), x, create_graph=True)
        torch.autograd.grad(slope, x, direction)

    prepared = ops.prepare_weights(own.networks.weights, description)
    weights = own.networks.weights
    functions = {
        "energy and forces": lambda: ops.energy_forces(system, weights, own.sae, description, 0, prepared),
        "product with a vector": lambda: ops.hessian_products(system, weights, direction, description, 0, prepared),
        "op": lambda: ops.energy_hessians(system, own.networks.weights, description),
        "model.hessian": lambda: own.hessian(*place),
        "calculator": lambda: calculator.get_hessian(atoms),
        "forces, 6N times": lambda: own.energies_and_forces(*copies),
        "product by autograd": product,
    }
    benchmark.group = f"hessian {dtype}"
    benchmark.extra_info.update(form=form, dtype=dtype, structures=1)
    with torch.inference_mode(form != "product by autograd"):
        benchmark.pedantic(functions[form], iterations=5, rounds=200, warmup_rounds=5)


@DTYPES
@pytest.mark.parametrize("count", [8, 64, 512])
def test_replicas(benchmark, c5h5, count, dtype):
    """Energies and forces of all in one call, as arrays."""
    own = model(getattr(torch, dtype)).requires_grad_(False)
    system = replicas(c5h5, count, own.dtype)
    describe(benchmark, "members.energies_and_forces", dtype, count)
    benchmark.pedantic(
        lambda: members.energies_and_forces(own, system.coordinates, system.species, system.offsets),
        rounds=200,
        warmup_rounds=5,
    )
