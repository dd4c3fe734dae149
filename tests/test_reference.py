"""The oracle against aevmod, TorchANI, finite differences and PyKinML's own numbers."""

from __future__ import annotations

import io
import sqlite3

import numpy as np
import pytest
import torch
from op_helpers import PYKINML, from_aevmod, needs_pykinml_data, random_molecule

from kinml_fast import reference

pytest.importorskip("aevmod")


def c5h5() -> tuple[torch.Tensor, torch.Tensor]:
    """The structures of C5H5.db: coordinates [n_structures, 10, 3] and the species [10] of each."""
    with sqlite3.connect(f"file:{PYKINML / 'C5H5.db'}?mode=ro", uri=True) as database:
        blobs = database.execute("SELECT geom FROM xyz ORDER BY id").fetchall()
    return torch.tensor(np.array([np.load(io.BytesIO(blob)) for (blob,) in blobs])), torch.tensor([0] * 5 + [1] * 5)


@pytest.mark.parametrize("n_species", [1, 2, 3, 4])
def test_vectors_and_jacobians_match_aevmod(n_species):
    rng = np.random.default_rng(n_species)
    parameters = reference.aevmod_parameters(n_species)
    for n_atoms in [1, 2, 3, 5, 8, 12]:
        x, species = random_molecule(rng, n_atoms, n_species)
        ours = reference.aev(x, species, torch.tensor([0, n_atoms]), **parameters)
        np.testing.assert_allclose(ours, from_aevmod(x, species, n_species)[0], rtol=0, atol=5e-13)
        theirs = from_aevmod(x, species, n_species, jacobian="eval_Jac_sac")[0]
        np.testing.assert_allclose(reference.jacobian(x, species, **parameters), theirs, rtol=0, atol=5e-13)


def test_one_batch_of_unlike_structures_matches_aevmod():
    rng = np.random.default_rng(7)
    molecules = [random_molecule(rng, n, 3) for n in (4, 1, 9, 2)]
    x = torch.cat([m[0] for m in molecules])
    species = torch.cat([m[1] for m in molecules])
    offsets = torch.tensor([0, 4, 4, 5, 14, 16])  # the second structure is empty
    ours = reference.aev(x, species, offsets, **reference.aevmod_parameters(3))
    theirs = np.concatenate([from_aevmod(*m, 3)[0] for m in molecules])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-13)
    assert reference.aev(x[:0], species[:0], torch.tensor([0]), **reference.aevmod_parameters(3)).shape == (0, 432)


def test_other_settings_match_aevmod():
    x, species = random_molecule(np.random.default_rng(3), 9, 2)
    parameters = reference.aevmod_parameters(2, 12, 5, 7, (4.1, 3.3), 0.8)
    ours = reference.aev(x, species, torch.tensor([0, 9]), **parameters)
    theirs = from_aevmod(x, species, 2, beta=0.8, settings=(12, 5, 7, [4.1, 3.3]))[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-13)


@needs_pykinml_data
def test_c5h5_structures_match_aevmod():
    structures, species = c5h5()
    x = structures[::8]
    offsets = torch.arange(len(x) + 1) * len(species)
    ours = reference.aev(x.reshape(-1, 3), species.repeat(len(x)), offsets, **reference.aevmod_parameters(2))
    theirs = from_aevmod(x, species, 2).reshape(ours.shape)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-13)
    for molecule in x[::60]:
        ours = reference.jacobian(molecule, species, **reference.aevmod_parameters(2))
        theirs = from_aevmod(molecule, species, 2, jacobian="eval_Jac_sac")[0]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-13)


def test_jacobian_is_the_derivative_of_the_vectors():
    x, species = random_molecule(np.random.default_rng(11), 5, 2)
    parameters = reference.aevmod_parameters(2)
    offsets = torch.tensor([0, 5])

    def central(step: float) -> torch.Tensor:  # [n, D, 3n]
        columns = []
        for direction in torch.eye(15, dtype=torch.float64).reshape(15, 5, 3):
            above = reference.aev(x + step * direction, species, offsets, **parameters)
            below = reference.aev(x - step * direction, species, offsets, **parameters)
            columns.append((above - below) / (2 * step))
        return torch.stack(columns, dim=2)

    numerical = (4 * central(1e-4) - central(2e-4)) / 3
    torch.testing.assert_close(reference.jacobian(x, species, **parameters), numerical, rtol=0, atol=1e-9)


def test_eval_jac_of_aevmod_is_a_derivative_only_for_beta_one():
    """The reason why Jacobians are compared with aevmod's `eval_Jac_sac`."""
    x, species = random_molecule(np.random.default_rng(5), 6, 2)
    for beta, agrees in [(1.0, True), (0.95, False)]:
        ours = reference.jacobian(x, species, **reference.aevmod_parameters(2, beta=beta)).numpy()
        theirs = from_aevmod(x, species, 2, beta=beta, jacobian="eval_Jac")[0]
        assert bool(np.abs(ours - theirs).max() < 5e-13) is agrees


@pytest.mark.parametrize("beta", [0.95, 1.0])
def test_gradients_of_first_and_second_order(beta):
    x, species = random_molecule(np.random.default_rng(2), 4, 2)
    parameters = reference.aevmod_parameters(2, 3, 2, 2, beta=beta)
    weights, activations = small_networks(2, 18)
    arguments = (species, torch.tensor([0, 4]), parameters, weights, activations, [1.0, 2.0])
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda y: reference.energies(y, *arguments), x)
    assert torch.autograd.gradgradcheck(lambda y: reference.energies(y, *arguments), x)
    direct = reference.forces(x, *arguments)
    again = reference.forces(x, *arguments, create_graph=True)
    torch.testing.assert_close(direct, again, rtol=0, atol=0)
    assert again.requires_grad
    assert not direct.requires_grad


def small_networks(n_species: int, length: int) -> tuple[list, list[str]]:
    """Random networks length-4-1 with a bias in the first layer only."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [[(random(4, length), random(4)), (random(1, 4), None)] for _ in range(n_species)], ["gaussian", "identity"]


def test_collinear_atoms_with_beta_one_have_a_finite_derivative():
    x = torch.tensor([[-1.1, 0, 0], [0, 0, 0], [1.2, 0, 0], [2.3, 0, 0]], dtype=torch.float64)
    species = torch.tensor([0, 1, 0, 1])
    jacobian = reference.jacobian(x, species, **reference.aevmod_parameters(2, beta=1.0))
    assert torch.isfinite(jacobian).all()
    # Off the axis the vectors' slopes cancel; along it they do not.
    assert jacobian.reshape(4, 224, 4, 3)[..., 1:].abs().max() < 1e-12
    assert jacobian.reshape(4, 224, 4, 3)[..., 0].abs().max() > 0.1


@pytest.mark.parametrize("name", sorted(reference.ACTIVATIONS))
def test_activations(name):
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)
    expected = {
        "gaussian": lambda t: torch.exp(-(t**2)),
        "identity": lambda t: t,
        "celu": lambda t: torch.nn.functional.celu(t, alpha=0.1),
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
        "relu": torch.relu,
        "tanh": torch.tanh,
    }[name](x)
    torch.testing.assert_close(reference.ACTIVATIONS[name](x), expected, rtol=1e-14, atol=1e-15)


def test_networks_match_modules_of_torch():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    species = torch.tensor([1, 0, 1, 1, 0, 1])
    modules = [torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)) for _ in range(2)]
    weights = [[(m[0].weight, m[0].bias), (m[2].weight, m[2].bias)] for m in (module.double() for module in modules)]
    expected = torch.stack([modules[s](x)[0] for x, s in zip(features, species.tolist(), strict=True)])
    torch.testing.assert_close(reference.networks(features, species, weights, ["tanh", "identity"]), expected)


@needs_pykinml_data
def test_pykinml_checkpoint_gives_its_energy_and_through_the_jacobian_of_aevmod_its_force():
    # Trusted here; the converter reads it without unpickling foreign classes.
    checkpoint = torch.load(PYKINML / "single_fid_epoch9.pt", weights_only=False)
    state = checkpoint["model_state_dict"]
    weights = [[(state[f"NNs.{s}.{i}.linear.weight"], None) for i in range(4)] for s in range(2)]
    activations = ["gaussian"] * 3 + ["identity"]
    structures, species = c5h5()
    x, offsets, parameters = structures[0], torch.tensor([0, 10]), reference.aevmod_parameters(2)
    arguments = (species, offsets, parameters, weights, activations, torch.tensor(checkpoint["sae_energies"]))
    assert reference.energies(x, *arguments).item() == pytest.approx(-5261.334742955, rel=0, abs=1e-9)

    vectors = reference.aev(x, species, offsets, **parameters).requires_grad_()
    (slope,) = torch.autograd.grad(reference.networks(vectors, species, weights, activations).sum(), vectors)
    for name, row in [
        ("eval_Jac", [-0.5163497494, 0.0531174466, -0.1883366843]),  # what PyKinML prints
        ("eval_Jac_sac", reference.forces(x, *arguments)[0].tolist()),  # -dE/dx
    ]:
        jacobian = torch.tensor(from_aevmod(x, species, 2, jacobian=name)[0])
        forces = -torch.einsum("id,idk->k", slope, jacobian).reshape(-1, 3)
        np.testing.assert_allclose(forces[0], row, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["like_1x", "like_2x"])
def test_ani_parameters_match_torchani(name):
    torchani_aev = pytest.importorskip("torchani.aev")
    computer = getattr(torchani_aev.AEVComputer, name)().double()
    n_species = computer.num_species
    x, species = random_molecule(np.random.default_rng(9), 12, n_species)
    theirs = computer(species[None], x[None])
    theirs = theirs[0] if theirs.dim() == 3 else theirs
    ours = reference.aev(
        x,
        species,
        torch.tensor([0, 12]),
        n_species=n_species,
        radial_shifts=computer.radial.shifts,
        radial_eta=computer.radial.eta.item(),
        radial_cutoff=computer.radial.cutoff,
        angular_shifts=computer.angular.shifts,
        angular_eta=computer.angular.eta.item(),
        zeta=computer.angular.zeta.item(),
        sections=computer.angular.sections,
        angular_cutoff=computer.angular.cutoff,
        beta=0.95,
        radial_factor=0.25,
        angular_factor=2.0,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
