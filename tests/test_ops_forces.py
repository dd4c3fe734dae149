"""The fused ops for energies and forces against double backward by autograd (force_oracle.py)."""

from __future__ import annotations

import force_oracle
import pytest
import torch
from op_helpers import SMALL, normal, not_contiguous, ragged

from kinml_fast import ops
from kinml_fast.nn import ACTIVATIONS, SpeciesNetworks

SIZES = (5, 1, 0, 8, 3, 2)
SAE = torch.tensor([-10.5, 3.25], dtype=torch.float64)


class Case:
    """A data set of molecules of one to eight atoms, one of them without atoms, and networks."""

    def __init__(self, activation: str = "gaussian", dtype: torch.dtype = torch.float64, biases: bool = True) -> None:
        torch.manual_seed(1)
        names = [activation, activation, "identity"]
        self.networks = SpeciesNetworks(("C", "H"), SMALL.length, (9, 6, 1), names, biases, dtype)
        coordinates, self.species, self.offsets = ragged(SIZES, 2, 4)
        self.coordinates = coordinates.to(dtype)
        self.species[self.offsets[4] : self.offsets[5]] = 1  # a molecule without the first element
        self.largest = max(SIZES)
        batch = (self.coordinates, self.species, self.offsets)
        self.features = ops.aev(*batch, SMALL.packed())
        jacobian = ops.aev_jacobian(*batch, self.largest + 1, SMALL.packed())
        for first, last in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            jacobian[first:last, :, 3 * (last - first) :] = torch.nan  # padding is never read
        self.jacobian = jacobian

    def sources(self, stored: bool) -> tuple[torch.Tensor, ...]:
        return (self.features, self.jacobian) if stored else (self.coordinates,)

    def settings(self, stored: bool) -> tuple:
        networks = self.networks
        settings = (networks.sizes, networks.activation_codes, networks.biases)
        return settings if stored else (SMALL.packed(), *settings)


TOLERANCES = [(torch.float64, 1e-11, 1e-11), (torch.float32, 5e-4, 5e-4)]


@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_energies_forces_and_gradients_match_the_oracle(activation, stored, dtype, rtol, atol):
    for biases in (True, False):
        case = Case(activation, dtype, biases)
        of_energies, of_forces = normal(len(SIZES), seed=2), normal(len(case.species), 3, seed=3, dtype=dtype)
        results = []
        for module in (ops, force_oracle):
            function = module.energy_forces_stored if stored else module.energy_forces
            flat = case.networks.weights.detach().clone().requires_grad_()
            batch = (*case.sources(stored), case.species, case.offsets)
            energies, forces = function(*batch, flat, SAE, *case.settings(stored))
            assert (energies.dtype, forces.dtype) == (torch.float64, dtype)
            total = (of_energies * energies).sum() + (of_forces * forces).sum().double()
            results.append((energies.detach(), forces.detach(), torch.autograd.grad(total, flat)[0]))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)
        with torch.inference_mode():
            function = ops.energy_forces_stored if stored else ops.energy_forces
            again = function(*batch, case.networks.weights, SAE, *case.settings(stored))
        assert torch.equal(again[0], results[0][0])
        assert torch.equal(again[1], results[0][1])


@pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    ("structures", "energy_weights", "force_weights"),
    [
        ([0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
        ([3, 0, 4], [1, 2, 3, 0.5, 0, 1], [2, 1, 1, 0, 0.25, 1]),
        ([5], [1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]),  # no forces at all
        ([4, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 3, 0]),  # no energies
        ([2], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),  # no atoms
    ],
)
def test_a_training_step_matches_the_oracle(structures, energy_weights, force_weights, stored, dtype, rtol, atol):
    case = Case(dtype=dtype)
    weights = [torch.tensor(w, dtype=torch.float64) for w in (energy_weights, force_weights)]
    targets = normal(len(SIZES), seed=5), normal(len(case.species), 3, seed=6)
    for s in range(len(SIZES)):
        if weights[1][s] == 0:
            targets[1][case.offsets[s] : case.offsets[s + 1]] = torch.nan  # never read
    scales = torch.tensor([0.3, 0.7], dtype=torch.float64)
    results = []
    for module in (ops, force_oracle):
        step = module.force_step_stored if stored else module.force_step
        n = len(structures)
        outputs = [torch.full(shape, torch.nan, dtype=torch.float64) for shape in ((n,), (n, 3), (2,))]
        gradient = torch.full_like(case.networks.weights.detach(), torch.nan)
        batch = (*case.sources(stored), case.species, case.offsets, torch.tensor(structures))
        flat = case.networks.weights.detach()
        step(*batch, flat, *targets, *weights, scales, *outputs, gradient, *case.settings(stored))
        results.append((*outputs, gradient))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


def test_inputs_need_not_be_contiguous():
    case = Case()
    batch = (case.coordinates, case.species, case.offsets, case.networks.weights.detach())
    expected = ops.energy_forces(*batch, SAE, *case.settings(False))
    found = ops.energy_forces(*map(not_contiguous, batch), SAE, *case.settings(False))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_coordinates_that_require_a_gradient_are_refused():
    case = Case()
    batch = (case.coordinates.requires_grad_(), case.species, case.offsets, case.networks.weights)
    with pytest.raises(RuntimeError, match="coordinates"):
        ops.energy_forces(*batch, None, *case.settings(False))
