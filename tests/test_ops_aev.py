"""The AEV ops: vectors, Jacobian products and the Hessian product, against aevmod, the oracle and one another.

KINML_FULL_TESTS=1 compares the Jacobians of all structures with aevmod, which takes some twenty minutes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import sqlite3
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from op_helpers import (
    ANI_1X,
    ANI_2X,
    ELEMENTS,
    ON_CPU,
    PYKINML,
    SMALL,
    Ragged,
    changed,
    each_tensor,
    from_aevmod,
    keywords,
    needs_pykinml_data,
    normal,
    not_contiguous,
    ragged,
    random_molecule,
    raw,
    reference_aev,
)

from kinml_fast import datasets, ops, reference
from kinml_fast.nn import AEV, AEVParameters
from kinml_fast.ops import System

pytestmark = pytest.mark.usefixtures("on_device")

AEVMOD = AEVParameters.aevmod(("C", "H"))
DERIVATIVES = ("aev_vjp", "aev_jvp", "aev_hvp")


def general(n_radial: int, n_angular: int, n_sections: int, **changes) -> AEVParameters:
    """Two elements, uneven shifts, a zeta that is not whole."""
    rng = np.random.default_rng(100 * n_radial + 10 * n_angular + n_sections)
    values = {
        "elements": ("C", "H"),
        "radial_shifts": rng.uniform(0.5, 4.0, n_radial).tolist(),
        "radial_eta": 4.3,
        "radial_cutoff": 4.4,
        "angular_shifts": rng.uniform(0.5, 3.0, n_angular).tolist(),
        "angular_eta": 3.1,
        "angular_cutoff": 3.2,
        "sections": rng.uniform(0, math.pi, n_sections).tolist(),
        "zeta": 5.7,
        "beta": 0.9,
        "radial_factor": 0.7,
        "angular_factor": 1.3,
    }
    return AEVParameters(**{**values, **changes})


GENERAL = {
    "ani_1x": ANI_1X,
    "ani_2x": ANI_2X,
    **{f"{m} sections": general(5, 4, m) for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17)},
    **{f"{a} angular shifts": general(3, a, 4) for a in (1, 2, 3, 5, 6, 7, 8, 9)},
    **{f"{r} radial shifts": general(r, 2, 3) for r in (1, 2, 8, 17)},
    **{f"zeta {zeta}": general(3, 3, 4, zeta=zeta) for zeta in (1.0, 1.5, 2.0, 3.0, 14.1, 32.0, 64.0)},
    **{f"beta {beta}": general(3, 3, 4, beta=beta) for beta in (0.0, 0.5, 1.0)},
    "radial cutoff below the angular one": general(4, 3, 5, radial_cutoff=2.4, angular_cutoff=3.9),
    "equal cutoffs": general(4, 3, 5, radial_cutoff=3.9, angular_cutoff=3.9),
    "one element": general(4, 3, 5, elements=("H",)),
    "four elements": general(4, 3, 5, elements=("H", "C", "N", "O")),
    # Evenly spaced shifts and zeta 8 have ways of their own, for 4 and 8 shifts and for any other number.
    **{
        f"aevmod {a} x {m}": AEVParameters.aevmod(("C", "H"), 5, a, m)
        for a, m in ((1, 8), (2, 16), (3, 4), (4, 5), (4, 16), (7, 9), (8, 1), (8, 9), (9, 8), (12, 3))
    },
    "4 shifts of any zeta": general(5, 4, 8, zeta=7.0),
    "8 even shifts of any zeta": dataclasses.replace(AEVParameters.aevmod(("C", "H"), 4, 8, 8), zeta=8.5),
    # The gaussian of the middle shift underflows within the cutoff, or nearly so.
    **{f"{a} narrow shifts": AEVParameters.aevmod(("C", "H"), 4, a, 2) for a in (24, 28, 32)},
}


def derivative_arguments(name: str, batch: Ragged, descriptor: AEVParameters, seed: int = 1) -> dict:
    """Arguments of an op with a random gradient or direction, or both."""
    x, z, o = batch
    gradient = normal(len(z), descriptor.length, seed=seed, dtype=x.dtype)
    tangent = normal(len(z), 3, seed=seed + 1, dtype=x.dtype)
    extra = {
        "aev": {},
        "aev_vjp": {"gradient": gradient},
        "aev_jvp": {"tangent": tangent},
        "aev_hvp": {"gradient": gradient, "tangent": tangent},
        "aev_jacobian": {"max_atoms": int(o.diff().max()) if len(o) > 1 else 0},
    }
    return {"system": System(x, z, o), **extra[name], "descriptor": descriptor.packed()}


def reference_derivatives(batch: Ragged, descriptor: AEVParameters, gradient, tangent) -> dict[str, torch.Tensor]:
    """The three products by autograd through the oracle."""
    x = batch[0].detach().clone().requires_grad_()
    g = gradient.clone().requires_grad_()
    vectors = reference.aev(x, *batch[1:], **keywords(descriptor))
    (vjp,) = torch.autograd.grad(vectors, x, g, create_graph=True)
    # J v is the derivative of v . J^T g with respect to g.
    product = (vjp * tangent).sum()
    (jvp,) = torch.autograd.grad(product, g, create_graph=True)
    (hvp,) = torch.autograd.grad(product, x)
    return {"aev_vjp": vjp.detach(), "aev_jvp": jvp.detach(), "aev_hvp": hvp}


def close(actual, expected, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# ---- Against aevmod ------------------------------------------------------------------------------


def test_a_thousand_random_molecules_match_aevmod(full):
    rng = np.random.default_rng(2017)
    n_jacobians = 0
    for n_species in (1, 2, 3, 4):
        # Of 1 to 40 atoms, more small than large ones: aevmod's time grows with the cube.
        sizes = [40 - i for i in range(40)] + [1 + int(40 * u**2) for u in rng.uniform(size=210)]
        molecules = [random_molecule(rng, n, n_species) for n in sizes]
        x, z = torch.cat([m[0] for m in molecules]), torch.cat([m[1] for m in molecules])
        offsets = torch.tensor([0, *np.cumsum(sizes)])
        descriptor = AEVParameters.aevmod(ELEMENTS[:n_species])
        ours = ops.aev(System(x, z, offsets), descriptor.packed()).cpu().numpy()
        for (a, b), molecule in zip(itertools.pairwise(offsets), molecules, strict=True):
            np.testing.assert_allclose(ours[a:b], from_aevmod(*molecule, n_species)[0], rtol=0, atol=5e-13)
        for i, (xi, zi) in enumerate(molecules):
            if full or (i >= 40 and len(zi) <= 9 and i % 4 == 0):
                j = ops.aev_jacobian(System(xi, zi, torch.tensor([0, len(zi)])), len(zi), descriptor.packed()).cpu()
                theirs = from_aevmod(xi, zi, n_species, jacobian="eval_Jac_sac")[0]
                np.testing.assert_allclose(j, theirs, rtol=0, atol=5e-13)
                n_jacobians += 1
    assert n_jacobians > 60


@pytest.mark.parametrize("n_species", [1, 2, 3, 4])
def test_jacobians_of_random_molecules_match_aevmod_with_beta_one(n_species, full):
    """With beta = 1 aevmod's fast `eval_Jac` is the derivative: molecules of up to 40 atoms can be compared."""
    rng = np.random.default_rng(2017 + n_species)
    descriptor = AEVParameters.aevmod(ELEMENTS[:n_species], beta=1.0).packed()
    for n_atoms in range(1, 41) if full else range(1, 41, 6):
        x, z = random_molecule(rng, n_atoms, n_species)
        ours = ops.aev_jacobian(System(x, z, torch.tensor([0, n_atoms])), n_atoms, descriptor).cpu()
        theirs = from_aevmod(x, z, n_species, beta=1.0, jacobian="eval_Jac")[0]
        # Without the 0.95 nearly collinear atoms make the angle ill-conditioned, in both programs.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-12)


@pytest.mark.parametrize("source", ["shipped", pytest.param("PyKinML", marks=needs_pykinml_data)])
def test_structures_of_c5h5_match_aevmod(source, full):
    path = datasets.path("C5H5.db") if source == "shipped" else PYKINML / "C5H5.db"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        blobs = database.execute("SELECT geom FROM xyz ORDER BY id").fetchall()
    x = torch.tensor(np.array([np.load(BytesIO(blob)) for (blob,) in blobs])).reshape(-1, 10, 3)
    assert len(x) > 1000
    x = x if full or source == "PyKinML" else x[::4]
    z = torch.tensor([0] * 5 + [1] * 5)
    offsets = torch.arange(len(x) + 1) * 10
    ours = ops.aev(System(x.reshape(-1, 3), z.repeat(len(x)), offsets), AEVMOD.packed()).cpu()
    np.testing.assert_allclose(ours, from_aevmod(x, z, 2).reshape(ours.shape), rtol=0, atol=5e-13)
    for start in range(0, len(x), 32 if full else 640):
        some = x[start : start + (32 if full else 8)]
        offsets = torch.arange(len(some) + 1) * 10
        ours = ops.aev_jacobian(System(some.reshape(-1, 3), z.repeat(len(some)), offsets), 10, AEVMOD.packed()).cpu()
        theirs = from_aevmod(some, z, 2, jacobian="eval_Jac_sac").reshape(ours.shape)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-13)


# ---- Against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERAL)
def test_general_parameters_match_the_oracle(name):
    descriptor = GENERAL[name]
    batch = ragged([7, 1, 0, 12, 2], len(descriptor.elements), 5)
    close(ops.aev(System(*batch), descriptor.packed()), reference_aev(batch, descriptor))
    n = len(batch[0])
    gradient, tangent = normal(n, descriptor.length, seed=1), normal(n, 3, seed=2)
    expected = reference_derivatives(batch, descriptor, gradient, tangent)
    close(ops.aev_vjp(System(*batch), gradient, descriptor.packed()), expected["aev_vjp"], 1e-10, 1e-11)
    close(ops.aev_jvp(System(*batch), tangent, descriptor.packed()), expected["aev_jvp"], 1e-10, 1e-11)
    close(ops.aev_hvp(System(*batch), gradient, tangent, descriptor.packed()), expected["aev_hvp"], 1e-10, 1e-9)


def dense(n_atoms: int, n_species: int, edge: float, closest: float, seed: int) -> Ragged:
    """One structure of atoms at random in a cube, so near that all are within the angular cutoff of most others."""
    rng = np.random.default_rng(seed)
    atoms: list[np.ndarray] = []
    while len(atoms) < n_atoms:
        atom = rng.uniform(0, edge, 3)
        if all(np.linalg.norm(atom - other) > closest for other in atoms):
            atoms.append(atom)
    x = torch.tensor(np.array(atoms)).float().double()  # the same places in both types
    return x, torch.tensor(rng.integers(0, n_species, n_atoms)), torch.tensor([0, n_atoms])


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["aevmod", "ani_1x", "ani_2x", "zeta 1.5", "angular cutoff beyond"])
def test_dense_surroundings_match_the_oracle(name, dtype):
    """Some forty neighbours within the angular cutoff, a thousand triples of each atom."""
    descriptor = {
        "aevmod": AEVMOD,
        "angular cutoff beyond": GENERAL["radial cutoff below the angular one"],
    }.get(name) or GENERAL[name]
    batch = dense(46, len(descriptor.elements), 0.62 * descriptor.angular_cutoff, 0.45, 7)
    x = batch[0]
    near = ((x[:, None] - x[None]).norm(dim=2) < descriptor.angular_cutoff).sum(1) - 1
    assert near.min() >= 40
    gradient, tangent = (normal(*shape).float().double() for shape in ((46, descriptor.length), (46, 3)))
    expected = {"aev": reference_aev(batch, descriptor)}
    expected |= reference_derivatives(batch, descriptor, gradient, tangent)
    arguments = {"aev": [], "aev_vjp": [gradient], "aev_jvp": [tangent], "aev_hvp": [gradient, tangent]}
    for op, extra in arguments.items():
        system = System(x.to(dtype), *batch[1:])
        ours = getattr(ops, op)(system, *(t.to(dtype) for t in extra), descriptor.packed())
        assert ours.dtype == dtype
        tolerance = {torch.float64: 1e-11, torch.float32: 5e-5 if op == "aev" else 5e-4}[dtype]
        close(ours.double(), expected[op], tolerance, tolerance * float(expected[op].abs().max()))


def test_jacobian_of_a_ragged_batch_matches_the_oracle_and_pads_with_zeros():
    sizes = [4, 1, 0, 9, 2]
    x, z, o = batch = ragged(sizes, 2, 3)
    jacobian = ops.aev_jacobian(System(*batch), 11, AEVMOD.packed())
    assert jacobian.shape == (16, AEVMOD.length, 33)
    for a, b in zip(o[:-1].tolist(), o[1:].tolist(), strict=True):
        if b > a:
            expected = reference.jacobian(x[a:b], z[a:b], **keywords(AEVMOD))
            close(jacobian[a:b, :, : 3 * (b - a)], expected, 1e-10, 1e-12)
        assert not jacobian[a:b, :, 3 * (b - a) :].any()


@pytest.mark.parametrize("name", ["ani_2x", "zeta 1.5", "beta 1.0", "3 sections"])
def test_products_are_those_of_the_jacobian(name):
    descriptor = GENERAL[name]
    n, d = 13, descriptor.length
    batch = ragged([n], len(descriptor.elements), 11)
    jacobian = ops.aev_jacobian(System(*batch), n, descriptor.packed()).reshape(n, d, 3 * n)
    gradient, tangent = normal(n, d, seed=3), normal(n, 3, seed=4)
    vjp = torch.einsum("id,idk->k", gradient, jacobian).reshape(n, 3)
    jvp = torch.einsum("idk,k->id", jacobian, tangent.reshape(-1))
    close(ops.aev_vjp(System(*batch), gradient, descriptor.packed()), vjp, 1e-11, 1e-11)
    close(ops.aev_jvp(System(*batch), tangent, descriptor.packed()), jvp, 1e-11, 1e-11)


def test_hessian_product_is_symmetric_in_the_two_directions():
    batch = ragged([9], 2, 12)
    gradient, u, v = normal(9, AEVMOD.length, seed=1), normal(9, 3, seed=2), normal(9, 3, seed=3)
    one = (u * ops.aev_hvp(System(*batch), gradient, v, AEVMOD.packed())).sum()
    other = (v * ops.aev_hvp(System(*batch), gradient, u, AEVMOD.packed())).sum()
    close(one, other, 1e-11, 1e-11)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("which", "distance"), [("radial", 5.2), ("angular", 3.8)])
def test_cutoff_exactly_at_a_distance(which, distance):
    """The cutoff function and its slope vanish there, so the atom on the cutoff adds nothing, from either side."""
    z, o = torch.tensor([0, 1, 1]), torch.tensor([0, 3])
    for there in (distance, math.nextafter(distance, 0), math.nextafter(distance, 9)):
        x = torch.tensor([[0.0, 0, 0], [1.1, 0.2, 0], [0, 0, there]], dtype=torch.float64)
        close(ops.aev(System(x, z, o), AEVMOD.packed()), reference_aev((x, z, o), AEVMOD))
        ours = ops.aev_jacobian(System(x, z, o), 3, AEVMOD.packed())
        close(ours, reference.jacobian(x, z, **keywords(AEVMOD)), 1e-10, 1e-12)
        if which == "radial":
            pair = ops.aev(System(x[:2], z[:2], torch.tensor([0, 2])), AEVMOD.packed())
            close(ops.aev(System(x, z, o), AEVMOD.packed())[0], pair[0])


# ---- Special places ------------------------------------------------------------------------------


def line(direction: list[float]) -> Ragged:
    """Four atoms on a line."""
    axis = torch.tensor(direction, dtype=torch.float64)
    places = torch.tensor([-1.1, 0.0, 1.2, 2.3], dtype=torch.float64)
    return places[:, None] * (axis / axis.norm()), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 4])


@pytest.mark.parametrize("direction", [[1.0, 0, 0], [0, 0, 1.0], [1.0, 2.0, -0.7]])
def test_collinear_atoms(direction):
    batch = line(direction)
    n = 4
    smooth = AEVParameters.aevmod(("C", "H"), beta=0.95)
    kinked = AEVParameters.aevmod(("C", "H"), beta=1.0)
    gradient, tangent = normal(n, 224, seed=1), normal(n, 3, seed=2)

    close(ops.aev(System(*batch), smooth.packed()), reference_aev(batch, smooth))
    expected = reference_derivatives(batch, smooth, gradient, tangent)
    close(ops.aev_vjp(System(*batch), gradient, smooth.packed()), expected["aev_vjp"], 1e-10, 1e-11)
    close(ops.aev_jvp(System(*batch), tangent, smooth.packed()), expected["aev_jvp"], 1e-10, 1e-11)
    close(ops.aev_hvp(System(*batch), gradient, tangent, smooth.packed()), expected["aev_hvp"], 1e-10, 1e-9)

    # beta = 1: the angle is pi only to the square root of the rounding, and so is the vector.
    close(ops.aev(System(*batch), kinked.packed()), reference_aev(batch, kinked), 0, 1e-7)
    for name in DERIVATIVES:
        assert torch.isfinite(getattr(ops, name)(**derivative_arguments(name, batch, kinked))).all()
    jacobian = ops.aev_jacobian(System(*batch), n, kinked.packed())
    assert torch.isfinite(jacobian).all()
    if direction.count(0) == 2:  # the cosine is exactly -1 and the kink's derivative the mean of all directions, 0
        close(jacobian, reference.jacobian(*batch[:2], **keywords(kinked)), 1e-10, 1e-12)
    # The mean of the slopes on either side: displacements across the line change nothing.
    axis = batch[0][2] / batch[0][2].norm()
    across = torch.linalg.cross(axis, torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64))
    moved = torch.zeros(n, 3, dtype=torch.float64)
    moved[2] = across
    assert ops.aev_jvp(System(*batch), moved, kinked.packed()).abs().max() < 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [0.95, 1.0])
def test_coincident_atoms_count_with_the_unit_vector_zero(beta, dtype):
    descriptor = AEVParameters.aevmod(("C", "H"), beta=beta)
    x = torch.tensor([[0.0, 0, 0], [0.0, 0, 0], [1.1, 0.3, 0.2], [1.1, 0.3, 0.2]], dtype=dtype)
    z, o = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 4])
    vectors = ops.aev(System(x, z, o), descriptor.packed())
    # An independent sum for atom 0: neighbours at 0, d, d; cosine 0 where a unit vector is 0, else 1.
    d = float(x[2].norm())

    def cutoff(r, radius):
        return 0.5 * math.cos(math.pi * r / radius) + 0.5

    def radial(r):
        return np.exp(-descriptor.radial_eta * (r - np.array(descriptor.radial_shifts)) ** 2) * cutoff(r, 5.2)

    def angular(r, s, cosine):
        theta = math.acos(beta * cosine)
        sections = (0.5 + 0.5 * np.cos(theta - np.array(descriptor.sections))) ** 8
        shells = np.exp(-descriptor.angular_eta * ((r + s) / 2 - np.array(descriptor.angular_shifts)) ** 2)
        return np.outer(shells, sections).ravel() * cutoff(r, 3.8) * cutoff(s, 3.8)

    expected = np.concatenate(
        [
            radial(d),  # C: atom 2
            radial(0) + radial(d),  # H: atoms 1, 3
            np.zeros(64),  # C, C
            angular(d, 0, 0) + angular(d, d, 1),  # C, H: (2, 1), (2, 3)
            angular(0, d, 0),  # H, H: (1, 3)
        ]
    )
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5
    if beta == 1.0:
        tolerance = max(tolerance, 1e-6 if dtype == torch.float64 else 2e-3)  # as in a line: cosine 1 up to rounding
    np.testing.assert_allclose(vectors[0].double().cpu(), expected, rtol=0, atol=tolerance)
    for name in (*DERIVATIVES, "aev_jacobian"):
        result = getattr(ops, name)(**derivative_arguments(name, (x, z, o), descriptor))
        assert torch.isfinite(result).all(), name
    # Nothing pushes the whole molecule.
    gradient = normal(4, 224, dtype=dtype)
    push = ops.aev_vjp(System(x, z, o), gradient, descriptor.packed()).sum(0).abs().max()
    assert push < (1e-11 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_empty_single_atom_and_missing_species(dtype):
    packed, d = AEVMOD.packed(), AEVMOD.length
    for offsets in ([0], [0, 0], [0, 0, 0]):
        empty = torch.zeros(0, 3, dtype=dtype), torch.zeros(0, dtype=torch.int64), torch.tensor(offsets)
        shapes = {"aev": (0, d), "aev_vjp": (0, 3), "aev_jvp": (0, d), "aev_hvp": (0, 3), "aev_jacobian": (0, d, 0)}
        for name, shape in shapes.items():
            result = getattr(ops, name)(**derivative_arguments(name, empty, AEVMOD))
            assert result.shape == shape
            assert result.dtype == dtype
        x = empty[0].requires_grad_()
        ops.aev(System(x, *empty[1:]), packed).sum().backward()
        assert x.grad.shape == (0, 3)
    for n_structures in (1, 3):
        atoms = torch.zeros(n_structures, 3, dtype=dtype), torch.ones(n_structures, dtype=torch.int64)
        batch = (*atoms, torch.arange(n_structures + 1))
        for name in ("aev", *DERIVATIVES, "aev_jacobian"):  # alone: no neighbours, so all is zero
            assert not getattr(ops, name)(**derivative_arguments(name, batch, AEVMOD)).any()
    # An element of the descriptor that does not occur leaves its blocks zero, and the others as without it.
    x, z, o = ragged([6, 3], 2, 8)
    three = AEVParameters.aevmod(("B", "C", "H"))
    with_b, without = ops.aev(System(x, z + 1, o), three.packed()), ops.aev(System(x, z, o), packed)
    blocks = with_b[:, 48:].reshape(9, 6, 64)  # BB, BC, BH, CC, CH, HH
    assert not with_b[:, :16].any()
    assert not blocks[:, :3].any()
    assert torch.equal(with_b[:, 16:48], without[:, :32])
    assert torch.equal(blocks[:, 3:].reshape(9, -1), without[:, 32:])


# ---- Symmetries ----------------------------------------------------------------------------------


def test_translation_rotation_and_permutation():
    x, z, o = ragged([14], 2, 21)
    packed = AEVMOD.packed()
    vectors = ops.aev(System(x, z, o), packed)
    close(ops.aev(System(x + torch.tensor([3.0, -2.0, 7.0], dtype=x.dtype), z, o), packed), vectors, 0, 1e-12)
    rotation = torch.linalg.qr(normal(3, 3, seed=6))[0]
    close(ops.aev(System(x @ rotation.T, z, o), packed), vectors, 0, 1e-12)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0), device="cpu")
    close(ops.aev(System(x[order], z[order], o), packed), vectors[order], 0, 1e-12)

    gradient, tangent = normal(14, 224, seed=1), normal(14, 3, seed=2)
    force = ops.aev_vjp(System(x, z, o), gradient, packed)
    assert force.sum(0).abs().max() < 1e-11
    assert torch.linalg.cross(x, force).sum(0).abs().max() < 1e-10  # no torque
    close(ops.aev_vjp(System(x @ rotation.T, z, o), gradient, packed), force @ rotation.T, 1e-10, 1e-11)
    close(ops.aev_vjp(System(x[order], z[order], o), gradient[order], packed), force[order], 1e-10, 1e-11)
    pull = ops.aev_hvp(System(x, z, o), gradient, tangent, packed)
    assert pull.sum(0).abs().max() < 1e-9
    close(
        ops.aev_hvp(System(x @ rotation.T, z, o), gradient, tangent @ rotation.T, packed),
        pull @ rotation.T,
        1e-10,
        1e-9,
    )


# ---- Autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aevmod", "zeta 1.5", "radial cutoff below the angular one"])
def test_gradcheck_and_gradgradcheck(name):
    descriptor = SMALL if name == "aevmod" else GENERAL[name]
    x, z, o = ragged([4, 1, 3], 2, 31)
    n = len(z)
    packed = descriptor.packed()
    x.requires_grad_()
    gradient = normal(n, descriptor.length, seed=1).requires_grad_()
    tangent = normal(n, 3, seed=2).requires_grad_()
    check, twice = torch.autograd.gradcheck, torch.autograd.gradgradcheck
    assert check(lambda y: ops.aev(System(y, z, o), packed), x)
    assert twice(lambda y: ops.aev(System(y, z, o), packed), x)
    assert check(lambda y, g: ops.aev_vjp(System(y, z, o), g, packed), (x, gradient))
    assert check(lambda y, v: ops.aev_jvp(System(y, z, o), v, packed), (x, tangent))


def test_each_input_alone_has_its_gradient():
    """Only one of two inputs requires a gradient: the other one's is not computed, and the one's is the same."""
    x, z, o = ragged([5], 2, 32)
    packed = SMALL.packed()
    others = {"aev_vjp": normal(5, SMALL.length, seed=1), "aev_jvp": normal(5, 3, seed=2)}
    for name, other in others.items():
        op = getattr(ops, name)
        y, w = x.clone().requires_grad_(), other.clone().requires_grad_()
        weights = normal(*op(System(x, z, o), other, packed).shape, seed=3)
        both = torch.autograd.grad((weights * op(System(y, z, o), w, packed)).sum(), (y, w))
        only_x = torch.autograd.grad((weights * op(System(y, z, o), other, packed)).sum(), y)[0]
        only_w = torch.autograd.grad((weights * op(System(x, z, o), w, packed)).sum(), w)[0]
        assert torch.equal(both[0], only_x)
        assert torch.equal(both[1], only_w)


def test_third_derivative_is_an_error():
    x, z, o = ragged([4], 2, 33)
    x.requires_grad_()
    vectors = ops.aev(System(x, z, o), SMALL.packed())
    (first,) = torch.autograd.grad((vectors**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice with respect to coordinates, not a third time"):
        torch.autograd.grad(second.sum(), x)
    jacobian = ops.aev_jacobian(System(x, z, o), 4, SMALL.packed())
    with pytest.raises(RuntimeError, match="aev_jacobian has no derivative; differentiate aev_vjp or aev_jvp"):
        jacobian.sum().backward()


def test_derivatives_along_autograd_are_those_of_the_oracle():
    """A loss of vectors and forces, differentiated through both."""
    x, z, o = ragged([5, 3], 2, 34)
    weights = normal(8, SMALL.length, seed=5)
    results = []
    for function in (lambda y: ops.aev(System(y, z, o), SMALL.packed()), lambda y: reference_aev((y, z, o), SMALL)):
        y = x.clone().requires_grad_()
        energy = (weights * function(y) ** 2).sum()
        (force,) = torch.autograd.grad(energy, y, create_graph=True)
        results.append((force.detach(), *torch.autograd.grad((force**2).sum() + energy, y)))
    close(results[0][0], results[1][0], 1e-10, 1e-11)
    close(results[0][1], results[1][1], 1e-10, 1e-9)


# ---- Large molecules -----------------------------------------------------------------------------


def fragments(kind: str) -> Ragged:
    """One structure that needs a cell list."""
    x, z, o = {
        "65 atoms": lambda: ragged([65], 2, 41),
        "512 atoms": lambda: ragged([512], 2, 42),
        "513 atoms": lambda: ragged([513], 2, 43),
        "compact": lambda: ragged([2000], 2, 44, spacing=2.2),
        "dense": lambda: ragged([140], 2, 45, spacing=1.1),
        "elongated": lambda: ragged([900], 2, 46),
        "flat": lambda: ragged([900], 2, 47),
        "far away": lambda: ragged([700], 2, 48),
        "all in one place but one": lambda: ragged([70], 2, 49),
    }[kind]()
    if kind == "elongated":
        x = torch.stack([x[:, 0] * 0.3 + 1.1 * torch.arange(900), x[:, 1] * 0.3, x[:, 2] * 0.3], 1)
    if kind == "flat":
        side = torch.arange(900)
        x = torch.stack([1.4 * (side % 30) + 0.02 * x[:, 0], 1.4 * (side // 30) + 0.02 * x[:, 1], 0 * x[:, 2]], 1)
    if kind == "far away":
        x[300:] += torch.tensor([1e4, -3e3, 50.0], dtype=x.dtype)
        x[690:] += torch.tensor([-2e6, 0, 1e6], dtype=x.dtype)
    if kind == "all in one place but one":
        x[:-1] *= 0.6
        x[-1] = 1e5
    return x, z, o


def surroundings(batch: Ragged, centres: list[int], radius: float) -> tuple[Ragged, torch.Tensor, torch.Tensor]:
    """Each centre with all atoms within the radius, as a batch: the atoms' indices, and the rows of the centres."""
    x, z, _ = batch
    atoms = [torch.nonzero((x - x[i]).norm(dim=1) <= radius)[:, 0] for i in centres]
    sizes = [len(a) for a in atoms]
    index = torch.cat(atoms)
    offsets = torch.tensor([0, *np.cumsum(sizes)])
    rows = torch.stack([torch.nonzero(a == i)[0, 0] for a, i in zip(atoms, centres, strict=True)]) + offsets[:-1]
    return (x[index], z[index], offsets), index, rows


KINDS = [
    "65 atoms",
    "512 atoms",
    "513 atoms",
    "compact",
    "dense",
    "elongated",
    "flat",
    "far away",
    "all in one place but one",
]


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS)
def test_large_molecules_are_the_sum_of_their_surroundings(kind):
    batch = fragments(kind)
    n, descriptor = len(batch[0]), SMALL
    packed = descriptor.packed()
    vectors = ops.aev(System(*batch), packed)
    gradient, tangent = normal(n, descriptor.length, seed=1), normal(n, 3, seed=2)
    near, index, rows = surroundings(batch, list(range(n)), 5.2001)
    close(vectors, ops.aev(System(*near), packed)[rows], 1e-12, 1e-12)
    close(
        ops.aev_jvp(System(*batch), tangent, packed),
        ops.aev_jvp(System(*near), tangent[index], packed)[rows],
        1e-11,
        1e-11,
    )
    at_centres = torch.zeros(len(index), descriptor.length, dtype=torch.float64)
    at_centres[rows] = gradient
    for name, extra, extra_near in [("aev_vjp", [], []), ("aev_hvp", [tangent], [tangent[index]])]:
        op = getattr(ops, name)
        whole = op(System(*batch), gradient, *extra, packed)
        parts = op(System(*near), at_centres, *extra_near, packed)
        close(whole, torch.zeros_like(whole).index_add_(0, index, parts), 1e-10, 1e-9)

    # A few centres by the oracle, which tries all pairs; surroundings of one atom are of ordinary size.
    few = list(range(0, n, max(n // 6, 1)))
    near, _, rows = surroundings(batch, few, 5.2001)
    close(vectors[few], reference_aev(near, descriptor)[rows])


def test_large_and_small_structures_in_one_batch():
    """Large structures are cut into tasks, small ones share a task: neither touches the other's rows."""
    sizes = [3, 600, 1, 0, 20, 70, 550, 2]
    x, z, o = batch = ragged(sizes, 2, 51)
    n, packed = len(z), SMALL.packed()
    gradient, tangent = normal(n, SMALL.length, seed=1), normal(n, 3, seed=2)
    whole = [
        ops.aev(System(*batch), packed),
        ops.aev_vjp(System(*batch), gradient, packed),
        ops.aev_jvp(System(*batch), tangent, packed),
        ops.aev_hvp(System(*batch), gradient, tangent, packed),
    ]
    for a, b in zip(o[:-1].tolist(), o[1:].tolist(), strict=True):
        one = x[a:b], z[a:b], torch.tensor([0, b - a])
        parts = [
            ops.aev(System(*one), packed),
            ops.aev_vjp(System(*one), gradient[a:b], packed),
            ops.aev_jvp(System(*one), tangent[a:b], packed),
            ops.aev_hvp(System(*one), gradient[a:b], tangent[a:b], packed),
        ]
        for all_rows, part in zip(whole, parts, strict=True):
            assert torch.equal(all_rows[a:b], part)


# ---- Types, layouts, errors ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aevmod", *GENERAL])
def test_float32_is_near_float64_and_stays_float32(name):
    descriptor = AEVMOD if name == "aevmod" else GENERAL[name]
    x, z, o = ragged([10, 3, 1, 25, 80], len(descriptor.elements), 61)
    x = x.float().double()  # the same places in both types
    for op in ("aev", *DERIVATIVES, "aev_jacobian"):
        wide = getattr(ops, op)(**derivative_arguments(op, (x, z, o), descriptor))
        narrow = getattr(ops, op)(**derivative_arguments(op, (x.float(), z, o), descriptor))
        assert narrow.dtype == torch.float32
        tolerance = 5e-5 if op == "aev" else 5e-4
        close(narrow.double(), wide, tolerance, tolerance * max(1.0, float(wide.abs().max())))


@pytest.mark.parametrize("name", ["aev", *DERIVATIVES, "aev_jacobian"])
def test_layout_and_mode_do_not_matter(name):
    op = getattr(ops, name)
    arguments = derivative_arguments(name, ragged([6, 0, 9], 2, 71), AEVMOD)
    expected = op(**arguments)
    strided = each_tensor(not_contiguous, arguments)
    assert not any(x.is_contiguous() for x in raw(strided)[0] if x is not None)
    assert torch.equal(op(**strided), expected)
    turned = each_tensor(lambda x: x.T.contiguous().T if x.dim() == 2 else x, arguments)
    assert torch.equal(op(**turned), expected)
    with torch.inference_mode():
        assert torch.equal(op(**arguments), expected)
    with torch.no_grad():
        assert torch.equal(op(**changed(arguments, "coordinates", lambda x: x.clone().requires_grad_())), expected)
    expanded = (
        arguments["system"].coordinates[:1].expand(4, 3),
        torch.zeros(1, dtype=torch.int64).expand(4),
        torch.arange(5),
    )
    assert not ops.aev(System(*expanded), AEVMOD.packed()).any()


@pytest.mark.parametrize("name", ["aev", *DERIVATIVES, "aev_jacobian"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opcheck(name, dtype):
    op = getattr(torch.ops.kinml_fast, name).default
    for sizes in ([4, 1, 0, 3], []):
        x, z, o = ragged(sizes, 2, 81)
        arguments = derivative_arguments(name, (x.to(dtype), z, o), SMALL)
        torch.library.opcheck(op, raw(arguments))
        if name in ("aev", "aev_vjp", "aev_jvp") and sizes:
            leaves = each_tensor(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x, arguments)
            torch.library.opcheck(op, raw(leaves))


@pytest.mark.parametrize("n_atoms", [20, 65, 600])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_coordinates_that_are_not_finite_do_no_harm(n_atoms, value, device, tmp_path):
    """As of a simulation that blew up. In a process of its own, which would die with a broken cell list."""
    script = f"""
import torch
from kinml_fast import ops
from kinml_fast.nn import AEVParameters
from kinml_fast.ops import System
torch.set_default_device("{device}")
descriptor = AEVParameters.aevmod(("C", "H"), n_radial=3, n_angular=2, n_sections=2)
n = {n_atoms}
places = torch.arange(9, dtype=torch.float64)
good = 1.9 * torch.cartesian_prod(places, places, places)[:n]
z, o = torch.zeros(2 * n, dtype=torch.int64), torch.tensor([0, n, 2 * n])
expected = ops.aev(System(good, z[:n], o[:2]), descriptor.packed())
for place in (slice(0, 1), slice(n - 1, n), slice(0, n)):
    bad = good.clone()
    bad[place] = float("{value}")
    vectors = ops.aev(System(torch.cat([bad, good]), z, o), descriptor.packed())
    assert vectors[:n][place].isnan().any() or "{value}" == "inf"
    assert torch.equal(vectors[n:], expected)
    ops.aev_vjp(System(torch.cat([bad, good]), z, o), vectors, descriptor.packed())
"""
    folders = [str(Path(ops.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_module_is_the_op():
    batch = ragged([5, 2], 2, 91)
    module = AEV(AEVMOD)
    assert torch.equal(module(*batch), ops.aev(System(*batch), AEVMOD.packed()))
    assert torch.equal(torch.jit.script(module)(*batch), module(*batch))
    assert module.length == AEVMOD.length == 224


def with_number(packed: list[float], place: int, value: float) -> list[float]:
    return [*packed[:place], value, *packed[place + 1 :]]


@pytest.mark.parametrize("name", ["aev", *DERIVATIVES, "aev_jacobian"])
@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("coordinates", lambda x: x[:, :2], r"coordinates must have shape \[n_atoms, 3\], got \[5, 2\]"),
        ("coordinates", lambda x: x.reshape(-1), r"coordinates must have shape \[n_atoms, 3\], got \[15\]"),
        ("coordinates", lambda x: x.half(), "coordinates must be float64 or float32, got Half"),
        ("coordinates", lambda x: x.long(), "coordinates must be float64 or float32, got Long"),
        ("coordinates", lambda x: x[:4], "coordinates have 4 atoms but species has 5"),
        ("species", lambda z: z.int(), "species must be a one-dimensional int64 tensor, got Int of shape"),
        (
            "species",
            lambda z: z[:, None],
            r"species must be a one-dimensional int64 tensor, got Long of shape \[5, 1\]",
        ),
        ("offsets", lambda o: o.double(), "offsets must be a one-dimensional int64 tensor, got Double"),
        ("offsets", lambda o: o[:0], r"offsets must have n_structures \+ 1 entries, got none"),
        ("coordinates", lambda x: None, "this op needs coordinates, got none|got neither"),
        ("species", lambda z: None, "a system needs species, got none"),
        ("offsets", lambda o: None, "a system needs offsets, got none"),
        (
            "features",
            lambda f: normal(5, SMALL.length),
            r"either coordinates or stored descriptors \(features\), got both",
        ),
        ("jacobian", lambda j: normal(5, SMALL.length, 15), "a stored Jacobian needs the stored descriptors beside it"),
        ("descriptor", lambda d: d[:11], "the descriptor must have at least 12 numbers, got 11"),
        ("descriptor", lambda d: d[:-1], "sections, which needs 19 numbers; it has 18"),
        ("descriptor", lambda d: with_number(d, 5, 0.0), "both cutoffs must be positive, got 0 and 3.8"),
        ("descriptor", lambda d: with_number(d, 10, 0.5), "zeta must be at least 1, got 0.5"),
        ("descriptor", lambda d: with_number(d, 11, 1.5), r"beta must lie in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(name, argument, change, message):
    arguments = changed(derivative_arguments(name, ragged([5], 2, 1), SMALL), argument, change)
    with pytest.raises(RuntimeError, match=f"kinml_fast: .*{message}"):
        getattr(ops, name)(**arguments)


@ON_CPU
@pytest.mark.parametrize("name", ["aev", *DERIVATIVES, "aev_jacobian"])
@pytest.mark.parametrize(
    ("argument", "values", "message"),
    [
        ("species", [0, 1, 2, 0, 0], r"species\[2\] = 2 is not in \[0, 2\)"),
        ("species", [0, 1, 0, -1, 0], r"species\[3\] = -1 is not in \[0, 2\)"),
        ("offsets", [1, 5], "begin with 0 and end with the number of atoms, 5; they begin with 1"),
        ("offsets", [0, 4], "the number of atoms, 5; they begin with 0 and end with 4"),
        ("offsets", [0, 4, 2, 5], r"offsets must not decrease; offsets\[1\] = 4 is followed by 2"),
        ("offsets", [0, 9, 5], "offsets must not decrease"),
    ],
)
def test_wrong_values_say_what_was_expected_and_what_came(name, argument, values, message):
    arguments = changed(derivative_arguments(name, ragged([5], 2, 1), SMALL), argument, lambda _: torch.tensor(values))
    with pytest.raises(RuntimeError, match=f"kinml_fast: .*{message}"):
        getattr(ops, name)(**arguments)


@ON_CPU
def test_a_jacobian_that_is_too_small_is_an_error():
    with pytest.raises(RuntimeError, match="structure 0 has 5 atoms, more than max_atoms = 4"):
        ops.aev_jacobian(System(*ragged([5], 2, 1)), 4, SMALL.packed())


def test_wrong_gradients_and_directions_are_errors():
    x, z, o = ragged([5], 2, 1)
    packed = SMALL.packed()
    gradient, tangent = normal(5, SMALL.length), normal(5, 3)
    with pytest.raises(RuntimeError, match=r"gradient must have shape \[5, 18\], got \[5, 17\]"):
        ops.aev_vjp(System(x, z, o), gradient[:, 1:], packed)
    with pytest.raises(RuntimeError, match="gradient is Float but coordinates is Double; both must have one dtype"):
        ops.aev_vjp(System(x, z, o), gradient.float(), packed)
    with pytest.raises(RuntimeError, match=r"tangent must have shape \[5, 3\], got \[3, 5\]"):
        ops.aev_jvp(System(x, z, o), tangent.T, packed)
    with pytest.raises(RuntimeError, match="tangent is Float but coordinates is Double"):
        ops.aev_hvp(System(x, z, o), gradient, tangent.float(), packed)
    with pytest.raises(RuntimeError, match=r"gradient must have shape \[5, 18\], got \[4, 18\]"):
        ops.aev_hvp(System(x, z, o), gradient[:4], tangent, packed)


def test_descriptor_survives_its_dictionary():
    for descriptor in (AEVMOD, ANI_2X, *GENERAL.values()):
        assert AEVParameters.from_dict(descriptor.to_dict()) == descriptor
    assert dataclasses.replace(AEVMOD, beta=1.0) == AEVParameters.aevmod(("C", "H"), beta=1.0)
