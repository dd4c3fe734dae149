"""Second derivatives of energies: against the definition in plain torch, differences of forces; layouts, errors."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from force_oracle import atomic_energies
from op_helpers import (
    ANI_1X,
    ON_CPU,
    SMALL,
    Ragged,
    changed,
    each_tensor,
    keywords,
    normal,
    not_contiguous,
    ragged,
    raw,
)
from periodic_helpers import ALONG, crystals, with_pairs

from kinml_fast import ops, reference
from kinml_fast.nn import ACTIVATIONS, AEVParameters, EnergyModel, Ensemble, Repulsion
from kinml_fast.ops import System

pytestmark = pytest.mark.usefixtures("on_device")

OPS = torch.ops.kinml_fast
SIZES = (5, 1, 0, 8, 3, 2)
AEVMOD = AEVParameters.aevmod(("C", "H"))


def model(
    descriptor: AEVParameters = SMALL,
    levels: int = 1,
    layers: tuple[int, ...] = (9, 6, 1),
    activations: tuple[str, ...] = ("gaussian", "tanh", "identity"),
    dtype: torch.dtype = torch.float64,
    biases: bool = True,
    seed: int = 1,
    **options: Any,
) -> EnergyModel:
    torch.manual_seed(seed)
    return EnergyModel(descriptor, layers, activations, biases, dtype, tuple(range(levels)), **options)


def arguments(own: EnergyModel | Ensemble, system: System, first_level: int = 0) -> dict[str, Any]:
    weights = own.networks.weights.detach()
    return {
        "system": system,
        "parameters": weights,
        "model": ops.Model(own.aev.packed, own.networks.packed),
        "first_level": first_level,
        "max_atoms": int(system.offsets.diff().max()),
    }


def molecules(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = SIZES, n_species: int = 2) -> System:
    coordinates, species, offsets = ragged(sizes, n_species, 4)
    if len(sizes) > 4:
        species[offsets[4] : offsets[5]] = 1  # without the first element
    return System(coordinates.to(dtype), species, offsets)


def by_definition(own: EnergyModel, system: System) -> torch.Tensor:
    """[K, n_atoms, 3, 3 max_atoms] by two derivatives of torch's."""
    most, n_atoms = int(system.offsets.diff().max()), len(system.species)
    result = torch.zeros(own.levels, n_atoms, 3, 3 * most, dtype=torch.float64)
    for first, last in zip(system.offsets[:-1].tolist(), system.offsets[1:].tolist(), strict=True):
        n = last - first
        assert system.coordinates is not None

        def energies(x: torch.Tensor, first: int = first, last: int = last, n: int = n) -> torch.Tensor:
            own_batch: Ragged = (x, system.species[first:last], torch.tensor([0, n]))
            features = reference.aev(*own_batch, **keywords(own.descriptor))
            return reference_energies(own, features, system.species[first:last])

        for level in range(own.levels if n else 0):
            hessian = torch.autograd.functional.hessian(
                lambda x, level=level: energies(x)[level].sum(), system.coordinates[first:last]
            )
            result[level, first:last, :, : 3 * n] = hessian.reshape(n, 3, 3 * n)
    return result


def reference_energies(own: EnergyModel, features: torch.Tensor, species: torch.Tensor) -> torch.Tensor:
    return atomic_energies(features, species, own.networks.weights.detach(), own.networks.packed)


def by_forces(own: EnergyModel, system: System, step: float = 1e-4) -> torch.Tensor:
    """The same by differences of forces (of fourth order), of structures in any surroundings."""
    given = arguments(own, system)
    most, n_atoms = given.pop("max_atoms"), len(system.species)
    result = torch.zeros(own.levels, n_atoms, 3, 3 * most, dtype=torch.float64)
    for first, last in zip(system.offsets[:-1].tolist(), system.offsets[1:].tolist(), strict=True):
        for column in range(3 * (last - first)):
            for steps, weight in ((1, 8.0), (-1, -8.0), (2, -1.0), (-2, 1.0)):
                assert system.coordinates is not None
                x = system.coordinates.clone()
                x[first + column // 3, column % 3] += steps * step
                moved = given | {"system": replace(system, coordinates=x), "sae": None}
                _, forces = ops.energy_forces(**moved)
                result[:, first:last, :, column] -= weight * forces[:, first:last] / (12 * step)
    return result


def close(a: torch.Tensor, b: torch.Tensor, rtol: float) -> None:
    scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
    torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("biases", [True, False])
def test_hessians_match_the_definition(levels, biases):
    own, system = model(levels=levels, biases=biases), molecules()
    expected = by_definition(own, system)
    assert expected.abs().max() > 1e-2
    close(ops.energy_hessians(**arguments(own, system)), expected, 1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_matches_the_definition(activation):
    own = model(activations=(activation, activation, activation), levels=2)
    with torch.no_grad():
        own.networks.weights.mul_(0.7)
    system = molecules(sizes=(5, 3))
    close(ops.energy_hessians(**arguments(own, system)), by_definition(own, system), 1e-9)


@pytest.mark.parametrize(
    ("descriptor", "layers", "sizes", "n_species"),
    [
        (AEVMOD, (48, 24, 12, 1), (10, 4), 2),
        (ANI_1X, (160, 128, 96, 1), (7, 2), 4),
        (AEVMOD, (1,), (5,), 2),
        (AEVMOD, (17, 1), (26,), 2),
        (AEVParameters.aevmod(("C", "H", "N"), n_radial=5, n_angular=3, n_sections=5), (7, 33, 5, 1), (9, 6), 3),
        (replace(SMALL, zeta=3.0), (9, 1), (6,), 2),
        (replace(SMALL, zeta=1.0), (9, 1), (6,), 2),
        (replace(SMALL, zeta=2.5), (9, 1), (6,), 2),
        (replace(SMALL, beta=1.0), (9, 1), (6,), 2),
        (replace(SMALL, radial_cutoff=3.0, angular_cutoff=4.0), (9, 1), (9,), 2),
    ],
)
def test_shapes_of_descriptors_and_networks_match_the_definition(descriptor, layers, sizes, n_species):
    names = ("gaussian",) * (len(layers) - 1) + ("identity",)
    own = model(descriptor, layers=layers, activations=names)
    system = molecules(sizes=sizes, n_species=n_species)
    close(ops.energy_hessians(**arguments(own, system)), by_definition(own, system), 1e-9)


def test_float32_has_the_digits_of_float32():
    own = model(AEVMOD, layers=(48, 24, 12, 1), activations=("gaussian",) * 3 + ("identity",))
    expected = ops.energy_hessians(**arguments(own, molecules()))
    single = model(AEVMOD, layers=(48, 24, 12, 1), activations=("gaussian",) * 3 + ("identity",), dtype=torch.float32)
    with torch.no_grad():
        single.networks.weights.copy_(own.networks.weights)
    found = ops.energy_hessians(**arguments(single, molecules(torch.float32)))
    assert found.dtype == torch.float32
    close(found, expected, 5e-5)


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("given", [False, True])
def test_crystals_ghosts_and_given_pairs_match_differences_of_forces(along, given):
    own, system = model(levels=2), crystals(along=along, sizes=(4, 1, 2))
    system = replace(system, centres=torch.tensor([3, 1, 2]))
    if given:
        system = with_pairs(system, max(SMALL.radial_cutoff, SMALL.angular_cutoff))
    found = ops.energy_hessians(**arguments(own, system))
    close(found, by_forces(own, system), 1e-8)


def test_repulsion_is_in_it():
    own = model(AEVParameters.aevmod(("H", "C")), repulsion=Repulsion.zbl(("H", "C"))).double()
    system = System(
        torch.tensor([[0.0, 0.0, 0.0], [0.55, 0.1, 0.0], [0.2, 0.7, 0.3]]).double(),
        torch.tensor([0, 1, 0]),
        torch.tensor([0, 3]),
    )
    bare = arguments(own, system)
    bare["model"] = ops.Model(own.descriptor.packed(), own.networks.packed)
    found = ops.energy_hessians(**arguments(own, system))
    assert (found - ops.energy_hessians(**bare)).abs().max() > 1
    close(found, by_forces(own, system, 1e-4), 1e-8)


def test_collinear_and_coincident_atoms():
    own = model(AEVMOD, layers=(9, 6, 1))
    line = System(
        torch.tensor([[0.0, 0.0, 0.0], [1.2, 0.0, 0.0], [2.4, 0.0, 0.0], [3.5, 0.0, 0.0]]).double(),
        torch.tensor([1, 0, 0, 1]),
        torch.tensor([0, 4]),
    )
    close(ops.energy_hessians(**arguments(own, line)), by_forces(own, line), 1e-8)
    twice = replace(line, coordinates=torch.tensor([[0.0] * 3, [0.0] * 3, [1.0, 0, 0], [1.0, 1, 0]]).double())
    assert torch.isfinite(ops.energy_hessians(**arguments(own, twice))).all()
    lost = replace(line, coordinates=torch.full((4, 3), torch.nan).double())
    assert torch.isnan(ops.energy_hessians(**arguments(own, lost))).any()


def test_rows_of_some_atoms_are_those_of_all():
    own, system = model(levels=2), crystals()
    given = arguments(own, system)
    whole = ops.energy_hessians(**given)
    some = torch.tensor([7, 0, 15, 5])
    assert torch.equal(ops.energy_hessians(**given, atoms=some), whole[:, some])
    assert ops.energy_hessians(**given, atoms=some[:0]).shape == (2, 0, 3, 24)


def test_members_levels_and_methods():
    members = [model(levels=2, seed=s) for s in (1, 2, 3)]
    together, system = Ensemble(members), molecules()
    given = arguments(together, system)
    found = ops.energy_hessians(**given)
    for m, member in enumerate(members):
        alone = ops.energy_hessians(**arguments(member, system))
        assert torch.equal(found[m], alone)
        assert torch.equal(ops.energy_hessians(**arguments(member, system, 1))[0], alone[1])
        assert torch.equal(member.hessian(system.coordinates, system.species, system.offsets), alone[1])
    assert torch.equal(together.member_hessians(system.coordinates, system.species, system.offsets), found[:, 1])
    mean = together.hessian(system.coordinates, system.species, system.offsets)
    torch.testing.assert_close(mean, found[:, 1].mean(0), rtol=1e-12, atol=1e-12)


def test_a_scripted_model_gives_it_too(tmp_path):
    own, system = model(), molecules()
    torch.jit.script(own).save(tmp_path / "model.ts")
    loaded = torch.jit.load(tmp_path / "model.ts")
    expected = own.hessian(system.coordinates, system.species, system.offsets)
    assert torch.equal(loaded.hessian(system.coordinates, system.species, system.offsets), expected)


def test_hessians_are_symmetric_and_do_not_feel_translations():
    own, system = model(AEVMOD, layers=(48, 24, 12, 1), activations=("gaussian",) * 3 + ("identity",)), molecules()
    found = ops.energy_hessians(**arguments(own, system))[0]
    for first, last in zip(system.offsets[:-1].tolist(), system.offsets[1:].tolist(), strict=True):
        n = last - first
        square = found[first:last, :, : 3 * n].reshape(3 * n, 3 * n)
        assert torch.equal(square, square.T)
        assert not found[first:last, :, 3 * n :].any()
        if n:
            torch.testing.assert_close(
                square.reshape(3 * n, n, 3).sum(1), torch.zeros(3 * n, 3).double(), rtol=0, atol=1e-12
            )


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_threads_change_no_bit(device, dtype):
    own = model(levels=2, dtype=dtype)
    system = molecules(dtype, (10,) * 20 + (1, 0, 150))
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(ops.energy_hessians(**arguments(own, system)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0], other)


def test_layout_does_not_matter():
    own, system = model(), crystals()
    given = arguments(own, system)
    assert torch.equal(
        ops.energy_hessians(**given),
        ops.energy_hessians(**{k: each_tensor(not_contiguous, v) for k, v in given.items()}),
    )
    with torch.inference_mode():
        assert torch.equal(ops.energy_hessians(**given), ops.energy_hessians(**given))


def test_empty_batches():
    own = model()
    nothing = System(torch.zeros(0, 3).double(), torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert ops.energy_hessians(nothing, own.networks.weights.detach(), arguments(own, molecules())["model"]).shape == (
        1,
        0,
        3,
        0,
    )
    atom = System(torch.zeros(1, 3).double(), torch.tensor([1]), torch.tensor([0, 1]))
    assert not ops.energy_hessians(**arguments(own, atom)).any()


def test_opcheck():
    for own, system in ((model(levels=2), molecules()), (model(), crystals())):
        torch.library.opcheck(OPS.energy_hessians, raw(arguments(own, system)))
        torch.library.opcheck(OPS.energy_hessians, (*raw(arguments(own, system)), torch.tensor([3, 0])))


def test_there_is_no_further_derivative():
    own, system = model(), molecules()
    assert system.coordinates is not None
    x = system.coordinates.clone().requires_grad_()
    found = ops.energy_hessians(**arguments(own, replace(system, coordinates=x)))
    with pytest.raises(RuntimeError, match="energy_hessians has no derivative"):
        found.sum().backward()


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("max_atoms", lambda n: n - 1, "max_atoms = 7, but a structure has 8 atoms"),
        ("parameters", lambda w: w[:-1], "parameters"),
        ("parameters", lambda w: w.float(), "Float"),
        ("first_level", lambda n: 1, "first_level = 1 is not in"),
        ("atoms", lambda a: torch.tensor([0, 0]), "is there twice"),
        ("atoms", lambda a: torch.tensor([-1]), r"atoms\[0\] = -1 is not one of 19 atoms"),
        ("atoms", lambda a: torch.tensor([0.5]), "int64"),
    ],
)
@ON_CPU
def test_wrong_arguments(device, argument, change, message):
    given = arguments(model(), molecules()) | {"atoms": torch.tensor([0])}
    with pytest.raises(RuntimeError, match=message):
        ops.energy_hessians(**changed(given, argument, change))


def test_stored_descriptors_have_no_second_derivatives():
    own, system = model(), molecules()
    features = ops.aev(system, SMALL.packed())
    given = arguments(own, system) | {"system": System(None, system.species, system.offsets, features)}
    with pytest.raises(RuntimeError, match="needs coordinates"):
        ops.energy_hessians(**given)


@pytest.mark.skipif("KINML_FULL_TESTS" not in os.environ, reason="long: set KINML_FULL_TESTS=1")
def test_many_random_molecules():
    for seed in range(200):
        coordinates, species, offsets = ragged((3 + seed % 20,), 2, seed)
        own, system = model(seed=seed), System(coordinates, species, offsets)
        close(ops.energy_hessians(**arguments(own, system)), by_definition(own, system), 1e-9)


# ---- products with one vector --------------------------------------------------------------------


def products(own: EnergyModel | Ensemble, system: System, v: torch.Tensor, first_level: int = 0) -> torch.Tensor:
    given = arguments(own, system, first_level)
    return ops.hessian_products(system, given["parameters"], v, given["model"], first_level)


def multiplied(hessians: torch.Tensor, system: System, v: torch.Tensor) -> torch.Tensor:
    """[..., n_atoms, 3] of the Hessians [..., n_atoms, 3, 3 max_atoms]."""
    result = torch.zeros(hessians.shape[:-1], dtype=hessians.dtype)
    for first, last in zip(system.offsets[:-1].tolist(), system.offsets[1:].tolist(), strict=True):
        square = hessians[..., first:last, :, : 3 * (last - first)]
        result[..., first:last, :] = torch.einsum("...ixc,c->...ix", square, v[first:last].reshape(-1))
    return result


def systems() -> dict[str, System]:
    boxes = crystals(sizes=(4, 1, 2))
    return {
        "molecules": molecules(),
        "crystals": crystals(),
        "ghosts": replace(boxes, centres=torch.tensor([3, 1, 2])),
        "given pairs": with_pairs(boxes, max(SMALL.radial_cutoff, SMALL.angular_cutoff)),
        "large": molecules(sizes=(60, 3)),
    }


@pytest.mark.parametrize("name", systems())
@pytest.mark.parametrize("levels", [1, 3])
def test_products_are_those_of_the_hessians(name, levels):
    system = systems()[name]
    together = Ensemble([model(levels=levels, seed=s) for s in (1, 2)])
    v = normal(len(system.species), 3, seed=5)
    expected = multiplied(ops.energy_hessians(**arguments(together, system)), system, v)
    assert expected.abs().max() > 1e-2
    close(products(together, system, v), expected, 1e-11)
    one = together.member(1)
    assert torch.equal(products(one, system, v, levels - 1)[0], products(together, system, v)[1, levels - 1])
    place = (system.coordinates, system.species, system.offsets, v, system.tensors[5:] or None)
    if place[-1] is not None:
        place = (*place[:-1], place[-1] + [None] * (6 - len(place[-1])))
    scripted = torch.jit.script(together)
    for own in (together, scripted):
        found = own.hessian_product(*place)
        torch.testing.assert_close(found, products(together, system, v)[:, -1].mean(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(one.hessian_product(*place), products(one, system, v)[-1])


def test_products_in_float32_with_repulsion_and_prepared_weights():
    own = model(AEVParameters.aevmod(("H", "C")), repulsion=Repulsion.zbl(("H", "C"))).double()
    near = torch.tensor([[0.0, 0.0, 0.0], [0.55, 0.1, 0.0], [0.2, 0.7, 0.3]]).double()
    system = System(near, torch.tensor([0, 1, 0]), torch.tensor([0, 3]))
    v = normal(3, 3, seed=1)
    expected = multiplied(ops.energy_hessians(**arguments(own, system)), system, v)
    close(products(own, system, v), expected, 1e-11)
    given = arguments(own, system)
    prepared = ops.prepare_weights(given["parameters"], given["model"])
    assert torch.equal(
        ops.hessian_products(system, given["parameters"], v, given["model"], 0, prepared), products(own, system, v)
    )
    single = model(dtype=torch.float32)
    same = model()
    same.networks.weights.data.copy_(single.networks.weights.double())
    v = normal(19, 3, seed=2)
    found = products(single, molecules(torch.float32), v.float())
    assert found.dtype == torch.float32
    close(found, products(same, molecules(), v), 1e-4)


@ON_CPU
def test_threads_change_no_bit_of_products(device):
    own, system = model(levels=2), molecules(sizes=(10,) * 20 + (1, 0, 150))
    v = normal(len(system.species), 3, seed=3)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(products(own, system, v))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_products_opcheck_layout_and_errors():
    own, system = model(levels=2), molecules()
    v = normal(19, 3, seed=3)
    given = arguments(own, system)
    torch.library.opcheck(
        OPS.hessian_products, (system.tensors, given["parameters"], v, *raw({"model": given["model"]}), 0)
    )
    other = replace(system, coordinates=not_contiguous(system.coordinates))
    assert torch.equal(products(own, other, not_contiguous(v)), products(own, system, v))
    with pytest.raises(RuntimeError, match="v must"):
        products(own, system, v[:-1])
    with pytest.raises(RuntimeError, match="v"):
        products(own, system, v.float())
    x = replace(system, coordinates=system.coordinates.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="hessian_products has no derivative"):
        products(own, x, v).sum().backward()
