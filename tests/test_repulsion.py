"""The repulsion of nuclei at short distances: against its definition, and the same in everything that runs a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from op_helpers import normal
from periodic_helpers import cluster, crystals, with_pairs

from kinml_fast import KinMLCalculator, ops, reference
from kinml_fast.deploy import members, model_file, plain
from kinml_fast.errors import ConfigError, ModelError
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble, Repulsion, extended
from kinml_fast.ops import System

pytestmark = pytest.mark.usefixtures("on_device")

ELEMENTS = ("C", "H")
LONG = Repulsion.zbl(ELEMENTS, 0.5, 1.4)
"""Reaches beyond bonds, so that structures of any kind have pairs at all of its distances."""
DESCRIPTOR = AEVParameters.aevmod(ELEMENTS, n_radial=3, n_angular=2, n_sections=2)


def model(repulsion: Repulsion | None = LONG, dtype: torch.dtype = torch.float64, seed: int = 1, **options):
    torch.manual_seed(seed)
    own = EnergyModel(DESCRIPTOR, (6, 1), ("gaussian", "identity"), dtype=dtype, repulsion=repulsion, **options)
    own.sae.copy_(normal(*own.sae.shape, seed=3))
    return own


def around(system: System) -> list[torch.Tensor | None]:
    return system.tensors[5:]


def called(function, system: System):
    return function(system.coordinates, system.species, system.offsets, around(system))


def definition(system: System, repulsion: Repulsion = LONG) -> torch.Tensor:
    numbers = {name: getattr(repulsion, name) for name in ("charges", "radii", "inner", "outer")}
    where = {"cells": system.cells, "periodic": system.periodic, "centres": system.centres}
    return reference.repulsion(system.coordinates, system.species, system.offsets, **numbers, **where)


def systems(dtype: torch.dtype = torch.float64) -> dict[str, System]:
    boxes = crystals(dtype)
    return {
        "crystals": boxes,
        "molecules": replace(boxes, cells=None, periodic=None),
        "ghosts": cluster(crystals(dtype, sizes=(9,)), DESCRIPTOR.radial_cutoff)[0],
    }


KINDS = ["crystals", "molecules", "ghosts"]


@pytest.mark.parametrize("kind", KINDS)
def test_energies_and_all_derivatives_match_the_definition(kind):
    system = systems()[kind]
    x = system.coordinates.clone().requires_grad_()
    moving = replace(system, coordinates=x)
    g, v = normal(len(x), seed=1), normal(len(x), 3, seed=2)
    own, defined = ops.aev(moving, LONG.alone())[:, 0], definition(moving)
    assert (defined > 0.1).sum() > 1
    torch.testing.assert_close(own, defined, rtol=1e-12, atol=1e-12)
    first = [torch.autograd.grad((g * e).sum(), x, create_graph=True)[0] for e in (own, defined)]
    torch.testing.assert_close(*first, rtol=1e-11, atol=1e-10)
    second = [torch.autograd.grad((v * f).sum(), x)[0] for f in first]
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    system = systems()[kind]
    g, v = normal(len(system.species), 1), normal(len(system.species), 3, seed=1)
    calls = {
        "aev": (),
        "aev_vjp": (g,),
        "aev_virials": (g,),
        "aev_jvp": (v,),
        "aev_hvp": (g, v),
    }
    for name, values in calls.items():
        torch.library.opcheck(getattr(torch.ops.kinml_fast, name), (system.tensors, *values, LONG.alone()))
    most = int(system.offsets.diff().max())
    jacobian = ops.aev_jacobian(system, most, LONG.alone())
    along = ops.aev_jvp(system, v, LONG.alone())
    for start, end in zip(system.offsets[:-1].tolist(), system.offsets[1:].tolist(), strict=True):
        product = jacobian[start:end, :, : 3 * (end - start)] @ v[start:end].reshape(-1)
        torch.testing.assert_close(product, along[start:end], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_fused_results_are_those_of_the_networks_and_the_definition(kind, dtype, rtol):
    system = systems(dtype)[kind]
    own, without = model(dtype=dtype), model(None, dtype)
    with_it, bare = called(own.level_results, system), called(without.level_results, system)
    x = system.coordinates.clone().double().requires_grad_()
    strain = torch.zeros(len(system.offsets) - 1, 3, 3, dtype=torch.float64, requires_grad=True)
    owners = torch.repeat_interleave(torch.arange(len(strain)), system.offsets.diff())
    strained = x + (strain[owners] @ x[:, :, None])[:, :, 0]
    cells = None if system.cells is None else system.cells + system.cells @ strain.mT
    atoms = definition(replace(system, coordinates=strained, cells=cells))
    slope, virial = torch.autograd.grad(atoms.sum(), (x, strain))
    sums = torch.zeros(len(strain), dtype=torch.float64).index_add(0, owners, atoms)
    scale = max(1.0, float(slope.abs().max()))
    expected = (sums, -slope, virial, atoms)
    for a, b, more in zip(with_it, bare, expected, strict=False):
        torch.testing.assert_close((a - b)[0].double(), more.detach(), rtol=rtol, atol=rtol * scale)
    by_atoms = torch.zeros_like(virial).index_add(0, owners, (with_it[4] - bare[4])[0].double())
    torch.testing.assert_close(by_atoms, virial, rtol=rtol, atol=rtol * scale)
    # The other ways to the same numbers.
    if system.centres is None:
        values = system.coordinates, system.species, system.offsets, around(system)
        assert np.array_equal(members.energies(own, *values)[0], with_it[0].detach().numpy())
    torch.testing.assert_close(called(own, system), with_it[0][-1], rtol=rtol, atol=rtol * scale)
    energies, forces = called(own.energies_and_forces, system)
    assert torch.equal(energies, with_it[0][-1])
    assert torch.equal(forces, with_it[1][-1])
    both = Ensemble([own, model(dtype=dtype, seed=2)])
    for member in range(2):
        alone = called(both.member(member).level_results, system)
        for a, b in zip(called(both.member_level_results, system), alone, strict=True):
            torch.testing.assert_close(a[member], b, rtol=rtol, atol=rtol * scale)


def test_given_pairs_and_several_levels():
    system, own = systems()["crystals"], model(fidelities=(0, 1))
    found = called(own.level_results, system)
    pairs = with_pairs(system, DESCRIPTOR.radial_cutoff + 0.3)
    for a, b in zip(called(own.level_results, pairs), found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-9)
    bare = called(model(None, fidelities=(0, 1)).level_results, system)
    added = (found[0] - bare[0]).unbind(0)
    torch.testing.assert_close(added[0], added[1], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(called(own.level_energies, system), found[0], rtol=1e-12, atol=1e-11)


def test_it_fades_smoothly_and_is_zbl_within():
    repulsion = Repulsion.zbl(("H", "O"))
    reach = 0.31 + 0.66
    for edge in (0.4 * reach, 0.75 * reach):
        values = []
        for r in (edge - 1e-9, edge + 1e-9):
            x = torch.tensor([[0, 0, 0], [0, 0, r]], dtype=torch.float64, requires_grad=True)
            system = System(x, torch.tensor([0, 1]), torch.tensor([0, 2]))
            energy = ops.aev(system, repulsion.alone()).sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
            (curvature,) = torch.autograd.grad(slope[1, 2], x)
            values.append([energy.item(), slope[1, 2].item(), curvature[1, 2].item()])
        before, after = np.array(values)
        assert np.abs(before - after) == pytest.approx(0, abs=1e-3)
        if edge > 0.5:
            assert after.tolist() == [0, 0, 0]
    # 0.2 Å: the formula by hand.
    x = torch.tensor([[0, 0, 0], [0, 0, 0.2]], dtype=torch.float64)
    energy = float(ops.aev(System(x, torch.tensor([0, 1]), torch.tensor([0, 2])), repulsion.alone()).sum())
    s = 0.2 * (1 + 8**0.23) / 0.4685
    phi = 0.18175 * np.exp(-3.1998 * s) + 0.50986 * np.exp(-0.94229 * s)
    phi += 0.28022 * np.exp(-0.4029 * s) + 0.02817 * np.exp(-0.20162 * s)
    assert energy == pytest.approx(14.399645478 * 8 / 0.2 * phi, rel=1e-12)


@pytest.mark.parametrize("outer", [0.75, 1.4])
def test_large_structures_and_any_number_of_threads(any_threads, outer):
    rng = np.random.default_rng(0)
    places = np.stack(np.meshgrid(*[np.arange(10)] * 3), -1).reshape(-1, 3)[:900] * 1.5
    x = torch.tensor(places + rng.uniform(-0.4, 0.4, places.shape))
    species, offsets = torch.tensor(rng.integers(0, 2, 900)), torch.tensor([0, 900])
    own, results = model(Repulsion.zbl(ELEMENTS, 0.3, outer)), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([*own.energies_and_forces(x, species, offsets), own(x, species, offsets)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    expected = definition(System(x, species, offsets), own.repulsion).sum()
    without = model(None)(x, species, offsets)
    torch.testing.assert_close(results[0][0] - without, expected[None], rtol=1e-10, atol=1e-8)


def test_two_atoms_at_a_tenth_of_an_angstrom_repel_in_every_form(tmp_path):
    """Whatever the networks, which know nothing of it, say."""
    own = model(Repulsion.zbl(ELEMENTS))
    atoms = ase.Atoms("HH", [[0, 0, 0], [0, 0, 0.101]])
    atoms.calc = KinMLCalculator(own)
    assert atoms.get_forces()[1, 2] > 1000
    plain.save(tmp_path / "model.kinml", own)
    found = plain.PlainPotential(tmp_path / "model.kinml")(atoms.positions, np.array([1, 1]))
    np.testing.assert_allclose(found["forces"][0], atoms.get_forces(), rtol=1e-11)
    np.testing.assert_allclose(found["energies"][0], atoms.get_potential_energy(), rtol=1e-12)
    torch.jit.save(torch.jit.script(own), tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    x, species, offsets = torch.tensor(atoms.positions), torch.tensor([1, 1]), torch.tensor([0, 2])
    assert torch.equal(loaded.energies_and_forces(x, species, offsets)[1], torch.tensor(atoms.get_forces()))
    hessian = atoms.calc.get_hessian(atoms)
    step = 1e-5
    moved = [atoms.copy(), atoms.copy()]
    for copy, sign in zip(moved, (1, -1), strict=True):
        copy.positions[1, 2] += sign * step
        copy.calc = atoms.calc
    slope = (moved[0].get_forces() - moved[1].get_forces()) / (2 * step)
    np.testing.assert_allclose(-slope.ravel(), hessian[5], rtol=1e-6, atol=1e-3)


def test_files_keep_it_and_say_so(tmp_path):
    own = model()
    for made, version in ((own, 2), (model(None), 1), (Ensemble([own, model(seed=2)]), 2)):
        model_file.save(tmp_path / "model.pt", made)
        assert torch.load(tmp_path / "model.pt", weights_only=True)["format_version"] == version
        read = model_file.load(tmp_path / "model.pt")
        assert read.repulsion == made.repulsion
        plain.save(tmp_path / "model.kinml", made)
        header = (tmp_path / "model.kinml").read_bytes()[8:400]
        assert f'"format_version": "{version}"'.encode() in header
    values = own.to_dict()
    values["repulsion"]["kind"] = "morse"
    with pytest.raises(ConfigError, match="of the kind 'morse'"):
        EnergyModel.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b'\\"zbl\\"', b'\\"abc\\"'), "unknown kind 'abc'"),
        ((b'"format_version": "2"', b'"format_version": "4"'), "version 4"),
    ],
)
def test_what_a_plain_file_must_not_say(tmp_path, change, message):
    path: Path = tmp_path / "model.kinml"
    plain.save(path, model())
    raw = path.read_bytes()
    assert change[0] in raw
    path.write_bytes(raw.replace(*change))
    with pytest.raises(ModelError, match=message):
        plain.PlainPotential(path)


def test_further_elements_repel_as_well():
    own = model(Repulsion.zbl(ELEMENTS, 0.3, 0.7))
    more = extended(own, ("H", "O"))
    assert more.repulsion == Repulsion.zbl(("C", "H", "O"), 0.3, 0.7)
    x = torch.tensor([[0, 0, 0], [0, 0, 0.5], [0, 0.6, 0]], dtype=torch.float64)
    species, offsets = torch.tensor([0, 1, 1]), torch.tensor([0, 3])
    torch.testing.assert_close(more(x, species, offsets), own(x, species, offsets), rtol=1e-12, atol=1e-11)


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="A model of differences has no repulsion"):
        model(baseline=0)
    with pytest.raises(ConfigError, match="inner < outer"):
        Repulsion.zbl(ELEMENTS, 0.8, 0.7)
    with pytest.raises(ConfigError, match=r"farther than the descriptor's 5\.2 Å: make outer smaller than 3\.42"):
        model(Repulsion.zbl(ELEMENTS, 0.5, 4))
    with pytest.raises(ConfigError, match="of 3 elements, the model of 2"):
        model(Repulsion.zbl(("C", "H", "O")))
    with pytest.raises(ModelError, match="has the repulsion"):
        Ensemble([model(), model(None)])
    system = systems()["molecules"]
    for numbers, message in (([0.5, 0.4, 6, 1, 1, 1], "inner < outer"), ([0.1, 0.4, 6, -1, 1, 1], "positive charges")):
        with pytest.raises(RuntimeError, match=message):
            ops.aev(system, [2.0, *[0.0] * 11, *map(float, numbers)])
    with pytest.raises(RuntimeError, match="must end within the cutoffs"):
        ops.aev(system, [*DESCRIPTOR.packed(), 0.1, 9.0, 6.0, 1.0, 1.0, 1.0])
