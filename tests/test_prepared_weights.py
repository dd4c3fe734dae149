"""Weights that are laid out once for many evaluations: the same bits, for what they are of and nothing else."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_helpers import SMALL, normal, raw
from periodic_helpers import crystals, with_pairs

from kinml_fast import ops
from kinml_fast.nn import EnergyModel, Ensemble
from kinml_fast.ops import Model, System

OPS = torch.ops.kinml_fast
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def model(levels: int = 1, dtype: torch.dtype = torch.float64, seed: int = 1, biases: bool = True) -> EnergyModel:
    """Widths that differ between the elements, none of them a whole number of registers."""
    torch.manual_seed(seed)
    widths = [[21, 9, 1], [18, 5, 1], [6, 17, 1], [4, 3, 1]][: len(SMALL.elements)]
    made = EnergyModel(SMALL, widths, ["gaussian", "tanh", "identity"], biases, dtype, range(levels))
    made.sae.copy_(normal(*made.sae.shape, seed=2))
    return made.requires_grad_(False)


def described(made: EnergyModel | Ensemble) -> Model:
    return Model(made.aev.packed, made.networks.packed)


def systems(made: EnergyModel | Ensemble) -> dict[str, System]:
    """Structures of every kind that is evaluated."""
    boxes = crystals(made.dtype)
    molecules = replace(boxes, cells=None, periodic=None)
    paired = with_pairs(boxes, 6.0)
    features = ops.aev(molecules, made.aev.packed)
    jacobian = ops.aev_jacobian(molecules, int(boxes.offsets.diff().max()), made.aev.packed)
    stored = replace(molecules, coordinates=None, features=features)
    return {
        "molecules": molecules,
        "crystals": boxes,
        "given pairs": paired,
        "ghosts": replace(paired, centres=boxes.offsets.diff() // 2),
        "stored": replace(stored, jacobian=jacobian),
        "stored, energies only": stored,
    }


def evaluated(made: EnergyModel | Ensemble, system: System, prepared: torch.Tensor | None) -> list[torch.Tensor]:
    sae = made.sae if made.sae.dim() > 1 else made.sae[None]
    if isinstance(made, Ensemble):
        sae = made.sae.reshape(made.n_members, made.levels, -1)
    given: dict[str, Any] = {"parameters": made.networks.weights.detach(), "sae": sae, "model": described(made)}
    found = list(ops.energy_forces(system, **given, prepared=prepared))
    if system.coordinates is not None:
        found += ops.energy_forces_virials(system, **given, atomic=True, prepared=prepared)
    return found


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one, other)


@DTYPES
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("levels", "members"), [(1, None), (3, None), (1, 4), (2, 3)])
def test_they_change_no_bit(dtype, biases, levels, members, any_threads):
    made: EnergyModel | Ensemble = model(levels, dtype, biases=biases)
    if members is not None:
        made = Ensemble([model(levels, dtype, seed, biases) for seed in range(members)])
    prepared = ops.prepare_weights(made.networks.weights.detach(), described(made))
    for system in systems(made).values():
        same(evaluated(made, system, prepared), evaluated(made, system, None))


def test_an_ensemble_without_members():
    own = model()
    none = own.networks.weights.new_empty(0, own.networks.weights.numel())
    prepared = ops.prepare_weights(none, described(own))
    sae = torch.empty(0, 1, len(own.elements), dtype=torch.float64)
    system = systems(own)["molecules"]
    energies, forces = ops.energy_forces(system, none, sae, described(own), prepared=prepared)
    assert (energies.shape[0], forces.shape[0]) == (0, 0)


def test_derivatives_of_parameters_are_as_without():
    own = model()
    system = systems(own)["molecules"]
    slopes = []
    for with_prepared in (True, False):
        flat = own.networks.weights.clone().requires_grad_()
        prepared = ops.prepare_weights(flat, described(own)) if with_prepared else None
        energies, forces = ops.energy_forces(system, flat, None, described(own), prepared=prepared)
        slopes.append(torch.autograd.grad(energies.sum() + forces.square().sum(), flat)[0])
    same(slopes[:1], slopes[1:])


def test_they_are_kept_until_the_parameters_change():
    own = model()
    flat, description = own.networks.weights, described(own)
    first = ops.prepare_weights(flat, description)
    assert ops.prepare_weights(flat, description).data_ptr() == first.data_ptr()
    assert ops.prepare_weights(flat.detach(), description).data_ptr() == first.data_ptr()
    writes = {
        "in place": lambda: flat.mul_(1.25),
        "a view": lambda: flat[: len(flat) // 2].add_(0.5),
        "in inference mode": lambda: torch.inference_mode()(flat.neg_)(),
        "not counted by torch": lambda: flat.data.mul_(0.5),
        "as an optimizer does": lambda: _adam(flat),
    }
    for name, write in writes.items():
        before = ops.prepare_weights(flat, description).clone()
        write()
        after = ops.prepare_weights(flat, description)
        assert not torch.equal(after, before), name
        fresh = ops.prepare_weights(flat.clone(), description)
        assert torch.equal(after, fresh), name


def _adam(flat: torch.Tensor) -> None:
    zeros = [torch.zeros_like(flat) for _ in range(2)]
    gradient = torch.zeros_like(flat)
    gradient[1] = 1.0  # one number, which no sample need see
    step = torch.zeros((), dtype=torch.float64)
    OPS.adam_step(flat, gradient, *zeros, None, 0.1, 0.9, 0.999, 1e-8, 0.0, False, step)


def test_a_tensor_at_the_place_of_one_that_is_gone():
    own = model()
    for seed in range(20):  # memory is used again
        flat = normal(own.networks.weights.numel(), seed=seed)
        prepared = ops.prepare_weights(flat, described(own))
        assert torch.equal(prepared, ops.prepare_weights(flat.clone(), described(own)))
        del flat


def test_parameters_without_a_count_of_changes():
    own = model()
    with torch.inference_mode():
        flat = own.networks.weights.clone()
        first = ops.prepare_weights(flat, described(own)).clone()
        flat[1] += 1
        assert not torch.equal(ops.prepare_weights(flat, described(own)), first)


def test_parameters_need_not_be_contiguous():
    own = model()
    flat = own.networks.weights
    spread = torch.stack([flat, flat], dim=1)[:, 0]
    assert torch.equal(ops.prepare_weights(spread, described(own)), ops.prepare_weights(flat, described(own)))


# ---- what does not fit ---------------------------------------------------------------------------


def _wrong() -> dict[str, tuple[Any, str]]:
    own, system = model(), systems(model())["molecules"]
    right = ops.prepare_weights(own.networks.weights, described(own))

    def with_byte(place: int) -> torch.Tensor:
        changed = right.clone()
        changed[place] += 1
        return changed

    single, other = model(dtype=torch.float32), model(2)
    ensemble = Ensemble([model(seed=seed) for seed in range(2)])
    later = own.networks.weights.clone()
    later[-1] += 1
    del system
    return {
        "nothing": (right[:0].clone(), "not what this version of kinml_fast prepares"),
        "other bytes": (torch.zeros(1000, dtype=torch.uint8), "not what this version of kinml_fast prepares"),
        "another version": (with_byte(7), "not what this version of kinml_fast prepares"),
        "instruction set": (with_byte(8), "for another instruction set than"),
        "dtype": (
            ops.prepare_weights(single.networks.weights, described(single)),
            "are float32, the parameters float64",
        ),
        "shapes": (ops.prepare_weights(other.networks.weights, described(other)), "of networks of other shapes"),
        "members": (
            ops.prepare_weights(ensemble.networks.weights.detach(), described(ensemble)),
            "of 2 members, the parameters of 1",
        ),
        "cut": (right[:-8].clone(), "bytes of"),
        "others": (ops.prepare_weights(later, described(own)), "the parameters have changed since"),
        "numbers": (right.double(), "must be what prepare_weights gave, got Double"),
        "matrix": (right[None], "must be what prepare_weights gave, got Byte"),
        "alignment": (torch.cat([right[:1], right])[1:], "aligned to 64 bytes"),
    }


@pytest.mark.parametrize("name", list(_wrong()))
def test_what_was_prepared_for_something_else_is_refused(name):
    own = model()
    prepared, message = _wrong()[name]
    with pytest.raises(RuntimeError, match=message):
        evaluated(own, systems(own)["molecules"], prepared)


def test_parameters_that_do_not_fit_the_networks():
    own = model()
    with pytest.raises(RuntimeError, match=r"the networks have \d+ parameters, got 3"):
        ops.prepare_weights(torch.zeros(3), described(own))
    with pytest.raises(RuntimeError, match="parameters must be float64 or float32, got Long"):
        ops.prepare_weights(own.networks.weights.long(), described(own))


# ---- in models -----------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("members", [None, 2])
def test_a_model_follows_its_weights(dtype, members):
    made: EnergyModel | Ensemble = model(dtype=dtype)
    if members is not None:
        made = Ensemble([model(dtype=dtype, seed=seed) for seed in range(members)]).requires_grad_(False)
    system = systems(made)["molecules"]
    batch = system.coordinates, system.species, system.offsets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(made)
    for change in (lambda: None, lambda: made.networks.weights.mul_(1.5), lambda: made.networks.weights.data.add_(0.1)):
        change()
        expected = evaluated(made, system, None)
        for module in (made, scripted):
            found = module.energies_and_forces(*batch)
            mean = [t.squeeze(-2 if t is expected[0] else -3) for t in expected[:2]]
            if members is not None:
                mean = [(t[0] + t[1]) / 2 for t in mean]
            same(list(found), mean)


def test_another_dtype_of_the_same_model():
    own = model()
    system = systems(own)["molecules"]
    own.energies_and_forces(system.coordinates, system.species, system.offsets)
    own.float()
    single = replace(system, coordinates=system.coordinates.float())
    found = own.energies_and_forces(single.coordinates, system.species, system.offsets)
    same([t[None] for t in found], evaluated(own, single, None)[:2])


@DTYPES
@pytest.mark.parametrize("members", [None, 2])
def test_opcheck(dtype, members):
    own = model(dtype=dtype)
    flat = own.networks.weights if members is None else torch.stack([own.networks.weights] * members)
    description = described(own)
    torch.library.opcheck(OPS.prepare_weights.default, (flat, description.networks))
    prepared = ops.prepare_weights(flat, description)
    system = systems(own)["molecules"]
    values = {"system": system, "parameters": flat, "sae": None, "model": description, "first_level": 0}
    torch.library.opcheck(OPS.energy_forces.default, (*raw(values), prepared))
    torch.library.opcheck(OPS.energy_forces_virials.default, (*raw(values), True, prepared))
