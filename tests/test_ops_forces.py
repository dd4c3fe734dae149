"""The fused ops for energies and forces: against double backward by autograd (force_oracle.py), the unfused path and
the definition; special places, layouts, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import force_oracle
import pytest
import torch
from op_helpers import (
    ANI_1X,
    ANI_2X,
    ON_CPU,
    SMALL,
    Ragged,
    changed,
    each_tensor,
    here,
    keywords,
    normal,
    not_contiguous,
    ragged,
    raw,
)
from test_ops_networks import layers_of

from kinml_fast import ops, reference
from kinml_fast.nn import ACTIVATIONS, AEVParameters, EnergyModel, SpeciesNetworks
from kinml_fast.ops import Loss, Model, StepResults, System

pytestmark = pytest.mark.usefixtures("on_device")

OPS = torch.ops.kinml_fast
SIZES = (5, 1, 0, 8, 3, 2)
AEVMOD = AEVParameters.aevmod(("C", "H"))


def molecules() -> Ragged:
    """Molecules of one to eight atoms, one of them without atoms and one without the first element."""
    coordinates, species, offsets = ragged(SIZES, 2, 4)
    species[offsets[4] : offsets[5]] = 1
    return coordinates, species, offsets


class Case:
    """A data set with its descriptors and Jacobians, and networks."""

    def __init__(
        self,
        activation: str = "gaussian",
        dtype: torch.dtype = torch.float64,
        biases: bool = True,
        layers: tuple[int, ...] = (9, 6, 1),
        batch: Ragged | None = None,
        descriptor: AEVParameters = SMALL,
    ) -> None:
        torch.manual_seed(1)
        names = [activation] * (len(layers) - 1) + ["identity"]
        self.descriptor = descriptor
        self.networks = SpeciesNetworks(descriptor.elements, descriptor.length, layers, names, biases, dtype)
        coordinates, self.species, self.offsets = molecules() if batch is None else batch
        self.coordinates = coordinates.to(dtype)
        self.sae = torch.linspace(-10.5, 3.25, len(descriptor.elements), dtype=torch.float64)[None]
        self._stored: System | None = None

    @property
    def n_structures(self) -> int:
        return len(self.offsets) - 1

    @property
    def flat(self) -> torch.Tensor:
        return self.networks.weights.detach()

    def system(self, stored: bool) -> System:
        own = System(self.coordinates, self.species, self.offsets)
        if not stored:
            return own
        if self._stored is None:
            largest = int(self.offsets.diff().max()) if self.n_structures else 0
            features = ops.aev(own, self.descriptor.packed())
            jacobian = ops.aev_jacobian(own, largest + 1, self.descriptor.packed())
            for first, last in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
                jacobian[first:last, :, 3 * (last - first) :] = torch.nan  # padding is never read
            self._stored = System(None, self.species, self.offsets, features, jacobian)
        return self._stored

    def model(self, stored: bool) -> Model:
        return Model([] if stored else self.descriptor.packed(), self.networks.packed)

    def arguments(self, stored: bool, flat: torch.Tensor | None = None) -> dict[str, Any]:
        """Those of energy_forces."""
        return {
            "system": self.system(stored),
            "parameters": self.flat if flat is None else flat,
            "sae": self.sae,
            "model": self.model(stored),
            "first_level": 0,
        }

    def backward_arguments(self, stored: bool) -> dict[str, Any]:
        """Those of energy_forces_backward."""
        of_energies, of_forces = self.gradients()
        own = self.arguments(stored)
        del own["sae"]
        return {"grad_energies": of_energies[None], "grad_forces": of_forces[None], **own}

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Some dL/dE and dL/dF."""
        dtype = self.coordinates.dtype
        return normal(self.n_structures, seed=2), normal(len(self.species), 3, seed=3, dtype=dtype)

    def energies_and_forces(self, module, stored: bool, flat: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Energies [n_structures] and forces [n_atoms, 3] of the one level."""
        energies, forces = module.energy_forces(**self.arguments(stored, flat))
        assert (energies.dtype, forces.dtype) == (torch.float64, self.coordinates.dtype)
        assert (energies.shape, forces.shape) == ((1, self.n_structures), (1, len(self.species), 3))
        return [energies[0], forces[0]]

    def results(self, module, stored: bool) -> list[torch.Tensor]:
        """Energies, forces and the weight gradient of a function of both."""
        flat = self.flat.clone().requires_grad_()
        energies, forces = self.energies_and_forces(module, stored, flat)
        of_energies, of_forces = self.gradients()
        total = (of_energies * energies).sum() + (of_forces * forces).sum().double()
        return [energies.detach(), forces.detach(), torch.autograd.grad(total, flat)[0]]

    def loss(self, structures: torch.Tensor, weights=None) -> Loss:
        """Targets of all structures; those of forces without weight are NaN."""
        m = self.n_structures
        energy_weights, force_weights = weights or (torch.ones(m).double(), torch.ones(m).double())
        forces = normal(len(self.species), 3, seed=6)
        for s in range(m):
            if force_weights[s] == 0:
                forces[self.offsets[s] : self.offsets[s + 1]] = torch.nan  # never read
        of_energies, of_forces = energy_weights[None], force_weights[None]
        counts = ops.count_weights(ops.weighted(of_energies, of_forces), structures, max(1, len(structures)))
        counts = counts[0] if len(structures) else torch.ones(2, 1, dtype=torch.float64)
        scales = torch.tensor([0.3, 0.7], dtype=torch.float64)
        return Loss(normal(m, seed=5)[None], of_energies, forces[None], of_forces, scales, counts)

    def step_arguments(self, stored: bool, structures: list[int], weights=None) -> dict[str, Any]:
        """Those of force_step; the results are full of NaN."""
        n, batch = len(structures), torch.tensor(structures, dtype=torch.int64)
        losses, residuals, errors = (
            torch.full(shape, torch.nan, dtype=torch.float64) for shape in ((2,), (1, n), (1, n, 3))
        )
        return {
            "system": self.system(stored),
            "structures": batch,
            "parameters": self.flat,
            "loss": self.loss(batch, weights),
            "results": StepResults(losses, torch.full_like(self.flat, torch.nan), residuals, errors),
            "model": self.model(stored),
        }

    def step(self, module, stored: bool, structures: list[int], weights=None) -> list[torch.Tensor]:
        """Residuals, force errors, losses and the gradient of a training step."""
        arguments = self.step_arguments(stored, structures, weights)
        module.force_step(**arguments)
        return outputs_of(arguments)


def outputs_of(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Residuals, force errors of the one level, losses and gradient among the arguments of a training step."""
    results = arguments["results"]
    return [results.energy_residuals[0], results.force_errors[0], results.losses, results.gradient]


def close(found: list[torch.Tensor], expected: list[torch.Tensor], rtol: float, atol: float) -> None:
    """Absolute tolerances hold for numbers of size 1 and grow with the largest one."""
    for a, b in zip(found, expected, strict=True):
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol * scale)


TOLERANCES = [(torch.float64, 1e-11, 1e-11), (torch.float32, 5e-4, 5e-4)]
BOTH = pytest.mark.parametrize("stored", [False, True])
TYPES = pytest.mark.parametrize(("dtype", "rtol", "atol"), TOLERANCES)


# ---- Against double backward ---------------------------------------------------------------------


@TYPES
@BOTH
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_energies_forces_and_gradients_match_the_oracle(activation, stored, dtype, rtol, atol):
    for biases in (True, False):
        case = Case(activation, dtype, biases)
        results = case.results(ops, stored)
        close(results, case.results(force_oracle, stored), rtol, atol)
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                again = case.energies_and_forces(ops, stored, case.networks.weights)
            assert not again[0].requires_grad
            assert torch.equal(again[0], results[0])
            assert torch.equal(again[1], results[1])


ALL, NONE = [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]


@TYPES
@BOTH
@pytest.mark.parametrize(
    ("structures", "energy_weights", "force_weights"),
    [
        ([0, 1, 2, 3, 4, 5], ALL, ALL),
        ([3, 0, 4], [1, 2, 3, 0.5, 0, 1], [2, 1, 1, 0, 0.25, 1]),
        ([5], [1, 1, 1, 1, 1, 2], NONE),  # no forces at all
        ([4, 1], NONE, [0, 1, 0, 0, 3, 0]),  # no energies
        ([0, 3, 1], NONE, NONE),
        ([2], ALL, ALL),  # no atoms
        ([3], ALL, ALL),  # a batch of one
        ([], ALL, ALL),
        ([4, 0, 0, 2, 4, 3, 4, 2], [1, 2, 3, 0.5, 0, 1], [2, 1, 1, 0, 0.25, 1]),  # some of them several times
    ],
)
def test_a_training_step_matches_the_oracle(structures, energy_weights, force_weights, stored, dtype, rtol, atol):
    case = Case(dtype=dtype)
    weights = tuple(torch.tensor(w, dtype=torch.float64) for w in (energy_weights, force_weights))
    results = case.step(ops, stored, structures, weights)
    close(results, case.step(force_oracle, stored, structures, weights), rtol, atol)
    if not structures or energy_weights == force_weights == NONE:
        assert not results[2].any()
        assert not results[3].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("weights", "scale"), [([1.0, 1.0, 1.0], 1.0), ([0.5, 0.0, 2.0], 3.0), ([0.0, 0.0, 0.0], 1.0)])
def test_steps_from_descriptors_alone_equal_autograd(weights, scale, dtype):
    case = Case("tanh", dtype)
    stored = System(None, case.system(True).species, case.system(True).offsets, case.system(True).features)
    structures, weights = torch.tensor([2, 0, 1]), torch.tensor(weights, dtype=torch.float64)
    n = len(stored.offsets) - 1
    of_all, targets = torch.zeros(1, n, dtype=torch.float64), normal(1, n, seed=4)
    of_all[0, structures] = weights
    targets[of_all == 0] = torch.nan
    (counts,) = ops.count_weights(ops.weighted(of_all, of_all), structures, 3)
    scales = torch.tensor([scale, torch.nan], dtype=torch.float64)  # there are no forces to scale
    arguments = case.step_arguments(True, structures.tolist())
    arguments |= {"system": stored, "loss": Loss(targets, of_all, None, None, scales, counts)}
    for _ in range(2):  # what was there is overwritten, not added to
        ops.force_step(**arguments)
    flat = case.flat.clone().requires_grad_()
    order = ops.species_order(stored.species, stored.offsets, len(case.networks.elements))
    energies = ops.networks(stored.features, order, flat, None, case.networks.packed, n)
    residuals, counted = (energies - targets[0])[structures], weights != 0
    loss = (weights[counted] * residuals[counted].square()).sum() / max(int(counted.sum()), 1)
    (expected,) = torch.autograd.grad(scale * loss, flat)
    assert expected.any() or not counted.any()
    found = arguments["results"]
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.energy_residuals[0], residuals.detach(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.gradient, expected, rtol=tight, atol=tight)
    assert found.losses[1] == 0
    assert not found.force_errors.any()
    torch.testing.assert_close(found.losses[0], loss.detach(), rtol=1e-13, atol=1e-13)


@BOTH
@pytest.mark.parametrize("seed", range(8))
def test_random_batches_match_the_oracle(seed, stored):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, n: int) -> list[int]:
        return torch.randint(low, high + 1, (n,), generator=generator, device="cpu").tolist()

    n = draw(1, 30, 1)[0]
    widths = tuple(draw(1, 40, draw(0, 3, 1)[0]))
    activation = ACTIVATIONS[draw(1, 6, 1)[0]]
    batch = ragged(draw(0, 14, n), 2, seed)
    case = Case(activation, layers=(*widths, 1), biases=seed % 2 == 0, batch=batch)
    close(case.results(ops, stored), case.results(force_oracle, stored), 1e-11, 1e-11)
    weights = tuple(torch.tensor(draw(0, 2, n), dtype=torch.float64) for _ in range(2))
    structures = draw(0, n - 1, draw(1, 40, 1)[0])
    close(
        case.step(ops, stored, structures, weights), case.step(force_oracle, stored, structures, weights), 1e-11, 1e-11
    )


@TYPES
def test_molecules_of_one_to_sixty_atoms_match_the_oracle(dtype, rtol, atol):
    sizes = [1 + 7 * i % 60 for i in range(60)]
    assert sorted(sizes) == list(range(1, 61))
    case = Case(dtype=dtype, batch=ragged(sizes, 2, 5))
    close(case.results(ops, False), case.results(force_oracle, False), rtol, atol)
    structures = list(range(0, 60, 2))
    close(case.step(ops, False, structures), case.step(force_oracle, False, structures), rtol, atol)
    # Padding for sixty atoms beside molecules of few.
    small = Case(dtype=dtype, batch=ragged([60, 1, 3, 20], 2, 6))
    close(small.results(ops, True), small.results(force_oracle, True), rtol, atol)
    close(small.results(ops, True), small.results(ops, False), rtol, atol)


@pytest.mark.sample(1)
@TYPES
@pytest.mark.parametrize("sizes", [(600,), (3, 600, 0, 70, 1), (2000,)])
def test_large_molecules_match_the_oracle(sizes, dtype, rtol, atol):
    """With more than 512 atoms all threads work on one structure to evaluate it."""
    case = Case(dtype=dtype, batch=ragged(sizes, 2, 7))
    close(case.results(ops, False), case.results(force_oracle, False), rtol, atol)
    structures = [0, *range(len(sizes))]
    close(case.step(ops, False, structures), case.step(force_oracle, False, structures), rtol, 10 * atol)


@TYPES
@pytest.mark.parametrize("descriptor", [AEVMOD, ANI_1X, ANI_2X])
def test_usual_descriptors_match_the_oracle(descriptor, dtype, rtol, atol):
    case = Case(dtype=dtype, batch=ragged((10, 4, 1, 17), len(descriptor.elements), 8), descriptor=descriptor)
    for stored in (False, True):
        close(case.results(ops, stored), case.results(force_oracle, stored), rtol, atol)


# ---- Against the definition ----------------------------------------------------------------------


@pytest.mark.sample(2)
@BOTH
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, biases, stored):
    case = Case(activation, biases=biases, layers=(4, 3, 1), batch=ragged((3, 1, 0, 4), 2, 9))
    flat = case.flat.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: ops.energy_forces(**case.arguments(stored, w)), flat)


@pytest.mark.parametrize("descriptor", [SMALL, AEVMOD, ANI_2X])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_path_is_the_unfused_one_and_the_definition(descriptor, dtype):
    torch.manual_seed(3)
    model = EnergyModel(descriptor, (12, 7, 1), ("gaussian", "tanh", "identity"), dtype=dtype)
    model.sae.copy_(normal(len(descriptor.elements), seed=1))
    coordinates, species, offsets = ragged((7, 1, 0, 12, 2), len(descriptor.elements), 10)
    coordinates = coordinates.to(dtype)
    layers = [
        [(w.detach().double(), b.detach().double()) for w, b in of_species] for of_species in layers_of(model.networks)
    ]
    leaves = [tensor.requires_grad_() for of_species in layers for layer in of_species for tensor in layer]
    of_energies, of_forces = normal(5, seed=2), normal(len(species), 3, seed=3)

    def gradient(energies, forces, inputs) -> torch.Tensor:
        total = (of_energies * energies).sum() + (of_forces * forces.double()).sum()
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, inputs)])

    energies, forces = model.energies_and_forces(coordinates, species, offsets)
    fused = [energies, forces, gradient(energies, forces, [model.networks.weights])]

    x = coordinates.clone().requires_grad_()
    energies = model(x, species, offsets)
    forces = -torch.autograd.grad(energies.sum(), x, create_graph=True)[0]
    unfused = [energies, forces, gradient(energies, forces, [model.networks.weights])]

    x = coordinates.double().requires_grad_()
    arguments = (species, offsets, keywords(descriptor), layers, list(model.networks.activations), model.sae)
    energies = reference.energies(x, *arguments)
    forces = reference.forces(x, *arguments, create_graph=True)
    definition = [energies, forces, gradient(energies, forces, leaves)]

    values, gradients = (1e-12, 1e-10) if dtype == torch.float64 else (5e-5, 5e-4)
    for expected in (unfused, definition):
        scales = [max(1.0, float(tensor.detach().abs().max())) for tensor in expected]
        for a, b, rtol, scale in zip(fused, expected, (values, gradients, gradients), scales, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol * scale)


# ---- Special places ------------------------------------------------------------------------------

LINE = torch.tensor([[-1.1, 0, 0], [0, 0, 0], [1.2, 0, 0], [2.3, 0, 0]], dtype=torch.float64)
SLANT = torch.tensor([1.0, 2.0, -0.7], dtype=torch.float64) / math.sqrt(5.49)
PLACES = {
    "in a line": LINE,
    "in a slanted line": LINE[:, :1] * SLANT,
    "coincident": torch.cat([LINE[1:3], LINE[1:3], LINE[2:3], SLANT[None]]),
    "beyond every cutoff": 6 * LINE,
    "within one cutoff only": 3.9 * LINE,
    "at the angular cutoff": torch.tensor([[0, 0, 0], [3.8, 0, 0], [0, 1.1, 0], [0, -3.8, 0]], dtype=torch.float64),
    "at the radial cutoff": torch.tensor([[0, 0, 0], [5.2, 0, 0], [0, 1.1, 0]], dtype=torch.float64),
}


@BOTH
@TYPES
@pytest.mark.parametrize("beta", [0.95, 1.0])
@pytest.mark.parametrize("name", PLACES)
def test_special_places(name, beta, dtype, rtol, atol, stored):
    """Where a distance, a sine or a cutoff function vanishes all is finite, and as the oracle has it."""
    places = here(torch.cat([PLACES[name], LINE[:2]]))
    n = len(places) - 2
    batch = places, torch.tensor([i % 2 for i in range(n + 2)]), torch.tensor([0, n, n + 2])
    case = Case(dtype=dtype, batch=batch, descriptor=AEVParameters.aevmod(("C", "H"), 4, 3, 4, beta=beta))
    results = case.results(ops, stored)
    assert all(tensor.isfinite().all() for tensor in results)
    close(results, case.results(force_oracle, stored), rtol, atol)
    assert results[1][:n].sum(0).abs().max() < 1e3 * torch.finfo(dtype).eps
    if name == "beyond every cutoff":
        assert not results[1][:n].any()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batches_of_nothing_and_of_single_atoms(dtype, stored):
    for offsets in ([0], [0, 0], [0, 0, 0]):
        empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.tensor(offsets)
        case = Case(dtype=dtype, batch=empty)
        energies, forces, gradient = case.results(ops, stored)
        assert not energies.any()
        assert energies.shape == (len(offsets) - 1,)
        assert forces.shape == (0, 3)
        assert not gradient.any()
        residuals, errors, _, gradient = case.step(ops, stored, list(range(case.n_structures)))
        assert torch.equal(residuals, -normal(case.n_structures, seed=5))
        assert not errors.any()
        assert not gradient.any()
    atoms = torch.zeros(3, 3), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2, 3])
    case = Case(dtype=dtype, batch=atoms)
    energies, forces, _ = case.results(ops, stored)
    assert energies[0] == energies[2]  # of one element
    assert energies[0] != energies[1]
    assert not forces.any()


@pytest.mark.parametrize("n_atoms", [1, 20, 65, 600])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_coordinates_that_are_not_numbers_spoil_their_structure_only(n_atoms, dtype):
    sizes = [4, n_atoms, 9]
    coordinates, species, offsets = ragged(sizes, 2, 11)
    # Spread along a diagonal: corners of the box are empty.
    coordinates[4 : 4 + n_atoms] += torch.arange(n_atoms)[:, None] * torch.tensor([0.4, -0.4, 0.4])
    good = Case(dtype=dtype, batch=(coordinates, species, offsets))
    expected = good.results(ops, False)
    for bad in ([0], [n_atoms - 1], [n_atoms // 2], list(range(n_atoms))):
        broken = coordinates.clone()
        broken[torch.tensor(bad) + 4, 1] = torch.nan
        case = Case(dtype=dtype, batch=(broken, species, offsets))
        energies, forces, gradient = case.results(ops, False)
        alone = n_atoms == 1  # without neighbours an atom's place does not matter
        assert energies.isnan().tolist() == [False, not alone, False]
        assert torch.equal(energies[::2], expected[0][::2])
        assert forces[4 : 4 + n_atoms].isnan().any() == (not alone)
        assert torch.equal(forces[:4], expected[1][:4])
        assert torch.equal(forces[4 + n_atoms :], expected[1][4 + n_atoms :])
        assert gradient.isnan().any() == (not alone)
        residuals, errors, losses, gradient = case.step(ops, False, [2, 1, 0])
        others = good.step(ops, False, [2, 1, 0])
        assert residuals.isnan().tolist() == [False, not alone, False]
        assert torch.equal(residuals[::2], others[0][::2])
        assert errors[1].isnan().all() == (not alone)
        assert torch.equal(errors[::2], others[1][::2])
        assert losses.isnan().all() == (not alone)


def test_a_structure_does_not_depend_on_its_company():
    case = Case(batch=ragged([3, 20, 1, 0, 11, 60, 5] * 20, 2, 12))
    energies, forces = case.energies_and_forces(ops, False)
    for s in range(0, case.n_structures, 9):
        a, b = case.offsets[s : s + 2].tolist()
        alone = Case(batch=(case.coordinates[a:b], case.species[a:b], torch.tensor([0, b - a])))
        close(alone.energies_and_forces(ops, False), [energies[s : s + 1], forces[a:b]], 1e-13, 1e-13)


# ---- Threads -------------------------------------------------------------------------------------


@ON_CPU
@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [1, 7, 50, 2000])
def test_same_bits_for_any_number_of_threads(count, dtype, stored, any_threads):
    sizes = [1 + 5 * i % 9 for i in range(count)]
    case = Case(dtype=dtype, batch=ragged(sizes, 2, 13))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    found = []
    for threads in (1, 2, 3, 7, 16, 1):
        torch.set_num_threads(threads)
        found.append([*case.results(ops, stored), *case.step(ops, stored, order)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


# ---- Layouts, modes, registration ----------------------------------------------------------------


@BOTH
def test_inputs_need_not_be_contiguous(stored):
    case = Case()
    for name, arguments in [
        ("energy_forces", case.arguments(stored)),
        ("energy_forces_backward", case.backward_arguments(stored)),
    ]:
        expected, found = (getattr(OPS, name)(*raw(a)) for a in (arguments, each_tensor(not_contiguous, arguments)))
        expected, found = ((x,) if isinstance(x, torch.Tensor) else x for x in (expected, found))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # A step takes loss and results as they are.
    expected = case.step(ops, stored, [3, 0, 1])
    arguments = case.step_arguments(stored, [3, 0, 1])
    for name in ("system", "structures", "parameters"):
        arguments[name] = each_tensor(not_contiguous, arguments[name])
    ops.force_step(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(arguments), expected, strict=True))


@BOTH
def test_a_step_works_in_every_mode(stored):
    case = Case()
    expected = case.step(ops, stored, [3, 0, 1])
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            arguments = case.step_arguments(stored, [3, 0, 1])
            arguments["parameters"] = case.networks.weights  # requires a gradient
            ops.force_step(**arguments)
            assert all(torch.equal(a, b) for a, b in zip(outputs_of(arguments), expected, strict=True))


@pytest.mark.sample(1)
@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opcheck(dtype, stored):
    for batch in (None, ragged((), 2, 1)) if dtype == torch.float64 else (None,):
        case = Case(dtype=dtype, batch=batch)
        arguments = {
            "energy_forces": case.arguments(stored),
            "energy_forces_backward": case.backward_arguments(stored),
            "force_step": case.step_arguments(stored, [3, 0, 1] if batch is None else []),
        }
        for name, values in arguments.items():
            torch.library.opcheck(getattr(OPS, name).default, raw(values))
        values = case.arguments(stored, case.flat.requires_grad_())
        torch.library.opcheck(OPS.energy_forces.default, raw(values))


@BOTH
def test_one_output_alone_has_its_gradient(stored):
    """A loss of energies only, or of forces only, sees zeros for the gradient of the other."""
    case = Case()
    flat = case.flat.requires_grad_()
    energies, forces = case.energies_and_forces(ops, stored, flat)
    slopes = case.gradients()
    (of_energies,) = torch.autograd.grad((slopes[0] * energies).sum(), flat, retain_graph=True)
    (of_forces,) = torch.autograd.grad((slopes[1] * forces).sum(), flat)
    close([of_energies + of_forces], [case.results(ops, stored)[2]], 1e-12, 1e-12)


@BOTH
def test_what_cannot_be_differentiated_is_refused(stored):
    case = Case()
    flat = case.flat.requires_grad_()
    for name in ("features", "jacobian") if stored else ("coordinates",):
        arguments = changed(case.arguments(stored, flat), name, lambda x: x.clone().requires_grad_())
        with pytest.raises(RuntimeError, match=r"differentiated with respect to the weights only.*EnergyModel.forward"):
            ops.energy_forces(**arguments)
        with torch.no_grad():
            ops.energy_forces(**arguments)
    with pytest.raises(RuntimeError, match="sae has no gradient"):
        ops.energy_forces(**changed(case.arguments(stored, flat), "sae", lambda e: e.clone().requires_grad_()))
    energies, forces = ops.energy_forces(**case.arguments(stored, flat))
    loss = energies.sum() + forces.square().sum().double()
    (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of energy_forces has no derivative"):
        gradient.square().sum().backward()


# ---- What is left out ----------------------------------------------------------------------------


def test_without_jacobians_there_are_energies_and_no_forces():
    case = Case()
    arguments = changed(case.arguments(True), "jacobian", lambda _: None)
    energies, forces = ops.energy_forces(**arguments)
    assert torch.equal(energies, ops.energy_forces(**case.arguments(True))[0])
    assert forces.shape == (1, 0, 3)


@pytest.mark.parametrize("kind", ["coordinates", "descriptors", "descriptors and Jacobians"])
@TYPES
def test_a_step_on_energies_alone(kind, dtype, rtol, atol):
    """Without forces in the loss, or without Jacobians for them: the same numbers from every source."""
    case = Case(dtype=dtype)
    weights = torch.tensor([1, 2, 0, 0.5, 3, 1], dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    arguments = case.step_arguments(kind != "coordinates", [3, 0, 4, 2], weights)
    if kind == "descriptors":
        arguments = changed(arguments, "jacobian", lambda _: None)  # forces stay in the loss, and are not looked at
    else:
        arguments = changed(changed(arguments, "forces", lambda _: None), "force_weights", lambda _: None)
    found, expected = outputs_of(arguments), outputs_of(each_tensor(torch.clone, arguments))
    ops.force_step(**arguments)
    reference_arguments = each_tensor(torch.clone, arguments)
    force_oracle.force_step(**reference_arguments)
    expected = outputs_of(reference_arguments)
    close(found, expected, rtol, atol)
    assert found[3].any()
    assert found[2][1] == 0
    assert not found[1].any()


def test_counts_are_what_the_loss_says():
    """Who computes a part of a batch gives the counts of the whole: parts add up to it."""
    case = Case()
    structures, parts = [3, 0, 1, 4, 5], ([3, 0], [1, 4, 5])
    whole = case.step_arguments(False, structures)
    ops.force_step(**whole)
    losses, gradient = torch.zeros(2, dtype=torch.float64), torch.zeros_like(case.flat)
    for part in parts:
        arguments = changed(case.step_arguments(False, part), "counts", lambda _: whole["loss"].counts)
        ops.force_step(**arguments)
        losses += arguments["results"].losses
        gradient += arguments["results"].gradient
    close([losses, gradient], outputs_of(whole)[2:], 1e-13, 1e-13)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("levels", [1, 2])
def test_weights_are_counted_for_each_batch(levels, size):
    """Also in a last batch that is not full, and where all weights are 0."""
    weights = torch.tensor([[1, 0, 2, 0, 0.5, 1], [0, 0, 0, 3, 0, 0]], dtype=torch.float64)
    energy_weights, force_weights = weights[:levels], weights.flip(1)[:levels]
    order = torch.tensor([1, 3, 5, 0, 4])
    found = ops.count_weights(ops.weighted(energy_weights, force_weights), order, size)
    expected = [
        [[int(sum(own[s] != 0 for s in batch)) for own in of_kind] for of_kind in (energy_weights, force_weights)]
        for batch in order.split(size)
    ]
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float64))
    assert all(counts.is_contiguous() for counts in found)  # as the ops take them


def test_an_epoch_of_nothing_has_no_counts():
    weights, nothing = torch.ones(2, 6, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    assert ops.count_weights(ops.weighted(weights, weights), nothing, 4).shape == (0, 2, 2)


# ---- Errors --------------------------------------------------------------------------------------

WRONG_BATCHES = [
    ("species", lambda z: z.int(), "species must be a one-dimensional int64 tensor, got Int"),
    ("species", lambda z: z[1:], "(coordinates|features) have 19 atoms but species has 18"),
    ("offsets", lambda o: o.double(), "offsets must be a one-dimensional int64 tensor, got Double"),
    ("species", lambda z: None, "a system needs species, got none"),
    ("offsets", lambda o: None, "a system needs offsets, got none"),
    ("offsets", lambda o: o[:0], r"offsets must have n_structures \+ 1 entries, got none"),
    ("parameters", lambda w: w.half(), r"parameters is Half but (coordinates|features) is Double; both must have one"),
    ("parameters", lambda w: w[1:], "the networks have 476 parameters, got 475"),
    ("parameters", lambda w: w[None, None], r"parameters must be one flat tensor, or .* got shape \[1, 1, 476\]"),
    ("networks", lambda n: n[:3], "the description of the networks must have at least 4 numbers, got 3"),
    ("networks", lambda n: n[:-1], "1 levels, 2 species and 3 layers, which needs 15 numbers; it has 14"),
    ("networks", lambda n: [*n, 1], "1 levels, 2 species and 3 layers, which needs 15 numbers; it has 16"),
    ("networks", lambda n: [2, *n[1:]], "says 2 levels, 2 species and 3 layers, which needs 23 numbers; it has 15"),
    ("networks", lambda n: [1, 3, *n[2:]], "says 1 levels, 3 species and 3 layers, which needs 19 numbers; it has 15"),
    ("networks", lambda n: [1, 2, 4, *n[3:]], "says 1 levels, 2 species and 4 layers, which needs 18 numbers"),
    ("networks", lambda n: [0, *n[1:7]], "says 0 levels, 2 species and 3 layers"),
    ("networks", lambda n: [*n[:7], 17, *n[8:]], "the network of species 0 takes 17 inputs, the features have 18"),
    ("networks", lambda n: [*n[:-1], 2], "the last layer must have one output, that of species 1 has 2"),
    ("networks", lambda n: [*n[:8], 0, *n[9:]], "every layer must have at least one output, one of species 0 has 0"),
    ("networks", lambda n: [*n[:4], 9, *n[5:]], "unknown activation code 9"),
]
WRONG_SOURCES = [
    ("coordinates", lambda x: x[:, :2], r"coordinates must have shape \[n_atoms, 3\], got \[19, 2\]"),
    ("coordinates", lambda x: x.half(), "coordinates must be float64 or float32, got Half"),
    ("coordinates", lambda x: x.float(), "parameters is Double but coordinates is Float; both must have one dtype"),
    ("coordinates", lambda x: None, r"either coordinates or stored descriptors \(features\), got neither"),
    ("features", lambda a: normal(19, 18), r"either coordinates or stored descriptors \(features\), got both"),
    ("jacobian", lambda j: normal(19, 18, 27), "a stored Jacobian needs the stored descriptors beside it"),
    ("descriptor", lambda d: d[:-1], "sections, which needs 19 numbers; it has 18"),
    ("descriptor", lambda d: [], "the descriptor must have at least 12 numbers, got 0"),
]
WRONG_STORED = [
    ("features", lambda a: None, r"either coordinates or stored descriptors \(features\), got neither"),
    ("coordinates", lambda x: normal(19, 3), r"either coordinates or stored descriptors \(features\), got both"),
    ("features", lambda a: a[:, 0], r"features must have shape \[n_atoms, D\], got \[19\]"),
    ("features", lambda a: a.half(), "features must be float64 or float32, got Half"),
    ("jacobian", lambda j: j.float(), "jacobian is Float but features is Double; both must have one dtype"),
    ("jacobian", lambda j: j[:, 1:], r"jacobian must have shape \[19, 18, columns\], got \[19, 17, 27\]"),
]
WRONG_STEPS = [
    ("structures", lambda s: s.int(), "structures must be a one-dimensional int64 tensor, got Int"),
    ("energies", lambda t: None, "a loss needs energy_targets, got none"),
    ("energies", lambda t: t[:, :3], r"energy_targets must be a contiguous float64 tensor of shape \[1, 6\], got"),
    ("energies", lambda t: t[0], r"energy_targets must be .* of shape \[1, 6\], got Double of shape \[6\]"),
    ("energies", lambda t: t.float(), r"energy_targets must be .*, got Float of shape \[1, 6\]"),
    ("energies", not_contiguous, "energy_targets must be a contiguous float64 tensor"),
    ("forces", lambda t: t[:, 1:], r"force_targets must be .* of shape \[1, 19, 3\], got Double of shape \[1, 18, 3\]"),
    ("energy_weights", lambda w: None, "a loss needs energy_weights, got none"),
    (
        "energy_weights",
        lambda w: w[:, 1:],
        r"energy_weights must be .* of shape \[1, 6\], got Double of shape \[1, 5\]",
    ),
    ("force_weights", lambda w: None, "a loss needs force_weights, got none"),
    ("force_weights", lambda w: w.float(), r"force_weights must be .* of shape \[1, 6\], got Float of shape \[1, 6\]"),
    ("scales", lambda s: None, "a loss needs scales, got none"),
    ("scales", lambda s: s[:1], r"scales must be .* of shape \[2\], got Double of shape \[1\]"),
    ("counts", lambda c: None, "a loss needs counts, got none"),
    ("counts", lambda c: c[:, 0], r"counts must be .* of shape \[2, 1\], got Double of shape \[2\]"),
    ("counts", lambda c: c.long(), r"counts must be .* of shape \[2, 1\], got Long of shape \[2, 1\]"),
    ("energy_residuals", lambda r: r[:, :2], r"energy_residuals must be .* of shape \[1, 3\], got Double of shape"),
    ("force_errors", lambda e: e.mT, r"force_errors must be .* of shape \[1, 3, 3\], got Double of shape \[1, 3, 3\]"),
    ("losses", lambda x: x.float(), r"losses must be .* of shape \[2\], got Float of shape \[2\]"),
    ("gradient", lambda g: g.float(), "gradient is Float but parameters is Double; both must have one dtype"),
    (
        "gradient",
        lambda g: g[1:],
        r"gradient must be contiguous and have the shape of parameters, \[476\], got \[475\]",
    ),
    ("parameters", lambda w: w[None], r"an ensemble are trained one at a time: give .* of shape \[n\], got \[1, 476\]"),
]
WRONG_GRADIENTS = [
    ("grad_energies", lambda e: e.float(), r"grad_energies must be .* float64 tensor of shape \[1, 6\], got Float"),
    ("grad_energies", lambda e: e[:, 1:], r"grad_energies must be .* of shape \[1, 6\], got Double of shape \[1, 5\]"),
    ("grad_forces", lambda f: f.float(), "grad_forces is Float but parameters is Double; both must have one dtype"),
    ("grad_forces", lambda f: f[..., :2], r"grad_forces must have shape \[1, 19, 3\], got \[1, 19, 2\]"),
]
FIRST_LEVELS = [
    ("first_level", lambda _: 1, r"first_level = 1 is not in \[0, 1\)"),
    ("first_level", lambda _: -1, r"first_level = -1 is not in \[0, 1\)"),
]
OF_SAE = [
    (
        "sae",
        lambda e: e[:, :1],
        r"sae must be a contiguous float64 tensor of shape \[1, 2\], got Double of shape \[1, 1\]",
    ),
    ("sae", lambda e: e[0, :1], r"sae must be a contiguous float64 tensor of shape \[2\], got Double of shape \[1\]"),
    ("sae", lambda e: e.float(), r"sae must be a contiguous float64 tensor of shape \[1, 2\], got Float of shape"),
]
WRONG = [
    *[(op, False, *w) for op in ("energy_forces", "backward", "step") for w in WRONG_BATCHES + WRONG_SOURCES],
    *[(op, True, *w) for op in ("energy_forces", "backward", "step") for w in WRONG_BATCHES + WRONG_STORED],
    *[("step", stored, *w) for stored in (False, True) for w in WRONG_STEPS],
    *[("backward", stored, *w) for stored in (False, True) for w in WRONG_GRADIENTS],
    *[("energy_forces", stored, *w) for stored in (False, True) for w in OF_SAE + FIRST_LEVELS],
    *[("backward", stored, *w) for stored in (False, True) for w in FIRST_LEVELS],
]
WRONG_VALUES = [
    ("species", lambda z: z.clone().fill_(2), r"species\[\d+\] = 2 is not in \[0, 2\)"),
    ("species", lambda z: z.clone().fill_(-1), r"species\[\d+\] = -1 is not in \[0, 2\)"),
    ("offsets", lambda o: torch.tensor([0, 9, 5, 7, 8, 9, 19]), "must (not decrease|increase and lie within)"),
    ("offsets", lambda o: torch.tensor([0, 1, 2, 3, 4, 5, 20]), "the (number of|19) atoms"),
]
WRONG_STRUCTURES = [
    ("structures", lambda s: torch.tensor([0, 6, 1]), r"structures\[1\] = 6 is not in \[0, 6\)"),
    ("structures", lambda s: torch.tensor([0, 1, -1]), r"structures\[2\] = -1 is not in \[0, 6\)"),
]
TOO_FEW_COLUMNS = ("jacobian", lambda j: j[..., :20], "structure 3 has 8 atoms, but the Jacobian has columns for 6")
OPS_OF = ("energy_forces", "backward", "step")


def test_wrong_arguments_say_what_was_expected_and_what_came():
    refused(WRONG)


@ON_CPU
def test_wrong_values_say_what_was_expected_and_what_came():
    refused([(op, stored, *w) for op in OPS_OF for stored in (False, True) for w in WRONG_VALUES])
    refused([("step", stored, *w) for stored in (False, True) for w in WRONG_STRUCTURES])
    refused([(op, True, *TOO_FEW_COLUMNS) for op in OPS_OF])


def refused(wrong: list[tuple[str, bool, str, Callable, str]]) -> None:
    case = Case()
    kinds = {
        "energy_forces": (OPS.energy_forces, case.arguments),
        "backward": (OPS.energy_forces_backward, case.backward_arguments),
        "step": (OPS.force_step, lambda stored: case.step_arguments(stored, [5, 1, 3])),
    }
    for kind, stored, argument, change, message in wrong:
        op, arguments = kinds[kind]
        values = raw(changed(arguments(stored), argument, change))
        with pytest.raises(RuntimeError, match=f"^kinml_fast: .*{message}"):
            op(*values)


def test_lists_of_another_length_are_refused():
    """`ops` makes lists of the right length; a TorchScript or C++ program may not."""
    case = Case()
    system, *rest = raw(case.arguments(False))
    with pytest.raises(RuntimeError, match="kinml_fast: a system has at most 11 tensors, got 12"):
        OPS.energy_forces([*system, *[None] * 7], *rest)
    with pytest.raises(RuntimeError, match="kinml_fast: a system needs offsets, got none"):
        OPS.energy_forces(system[:2], *rest)
    # What may be missing may also be left out.
    found, expected = OPS.energy_forces(system[:3], *rest), OPS.energy_forces(system, *rest)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    before, loss, results, after = (lambda v: (v[:3], v[3], v[4], v[5:]))(raw(case.step_arguments(False, [0, 1])))
    with pytest.raises(RuntimeError, match="kinml_fast: a loss has 6 to 8 tensors, got 5"):
        OPS.force_step(*before, loss[:5], results, *after)
    with pytest.raises(RuntimeError, match="kinml_fast: this step has 4 results, got 5"):
        OPS.force_step(*before, loss, [*results, results[0]], *after)
