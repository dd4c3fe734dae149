"""The fused ops for energies and forces: against double backward by autograd (force_oracle.py), the unfused path and
the definition; special places, layouts, errors."""

from __future__ import annotations

import math

import force_oracle
import pytest
import torch
from op_helpers import ANI_1X, ANI_2X, ON_CPU, SMALL, Ragged, here, keywords, normal, not_contiguous, ragged
from test_ops_networks import layers_of

from kinml_fast import ops, reference
from kinml_fast.nn import ACTIVATIONS, AEVParameters, EnergyModel, SpeciesNetworks

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
        self.sae = torch.linspace(-10.5, 3.25, len(descriptor.elements), dtype=torch.float64)
        self._stored: tuple[torch.Tensor, ...] = ()

    @property
    def n_structures(self) -> int:
        return len(self.offsets) - 1

    @property
    def flat(self) -> torch.Tensor:
        return self.networks.weights.detach()

    def sources(self, stored: bool) -> tuple[torch.Tensor, ...]:
        if not stored:
            return (self.coordinates,)
        if not self._stored:
            batch = (self.coordinates, self.species, self.offsets)
            largest = int(self.offsets.diff().max()) if self.n_structures else 0
            features = ops.aev(*batch, self.descriptor.packed())
            jacobian = ops.aev_jacobian(*batch, largest + 1, self.descriptor.packed())
            for first, last in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
                jacobian[first:last, :, 3 * (last - first) :] = torch.nan  # padding is never read
            self._stored = features, jacobian
        return self._stored

    def settings(self, stored: bool) -> tuple:
        networks = self.networks
        settings = (networks.sizes, networks.activation_codes, networks.biases)
        return settings if stored else (self.descriptor.packed(), *settings)

    def arguments(self, stored: bool, flat: torch.Tensor | None = None) -> list:
        """Those of energy_forces or energy_forces_stored."""
        flat = self.flat if flat is None else flat
        return [*self.sources(stored), self.species, self.offsets, flat, self.sae, *self.settings(stored)]

    def backward_arguments(self, stored: bool) -> list:
        of_energies, of_forces = self.gradients()
        batch = (*self.sources(stored), self.species, self.offsets, self.flat)
        return [of_energies, of_forces, *batch, *self.settings(stored)]

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Some dL/dE and dL/dF."""
        dtype = self.coordinates.dtype
        return normal(self.n_structures, seed=2), normal(len(self.species), 3, seed=3, dtype=dtype)

    def results(self, module, stored: bool) -> list[torch.Tensor]:
        """Energies, forces and the weight gradient of a function of both."""
        flat = self.flat.clone().requires_grad_()
        function = module.energy_forces_stored if stored else module.energy_forces
        energies, forces = function(*self.arguments(stored, flat))
        assert (energies.dtype, forces.dtype) == (torch.float64, self.coordinates.dtype)
        of_energies, of_forces = self.gradients()
        total = (of_energies * energies).sum() + (of_forces * forces).sum().double()
        return [energies.detach(), forces.detach(), torch.autograd.grad(total, flat)[0]]

    def step_arguments(self, stored: bool, structures: list[int], weights=None) -> list:
        """Those of force_step or force_step_stored; the outputs, full of NaN, stand at [-7:-3] or [-8:-4]."""
        n, m = len(structures), self.n_structures
        energy_weights, force_weights = weights or (torch.ones(m).double(), torch.ones(m).double())
        targets = normal(m, seed=5), normal(len(self.species), 3, seed=6)
        for s in range(m):
            if force_weights[s] == 0:
                targets[1][self.offsets[s] : self.offsets[s + 1]] = torch.nan  # never read
        scales = torch.tensor([0.3, 0.7], dtype=torch.float64)
        outputs = [torch.full(shape, torch.nan, dtype=torch.float64) for shape in ((n,), (n, 3), (2,))]
        batch = (*self.sources(stored), self.species, self.offsets, torch.tensor(structures, dtype=torch.int64))
        return [
            *batch,
            self.flat,
            *targets,
            energy_weights,
            force_weights,
            scales,
            *outputs,
            torch.full_like(self.flat, torch.nan),
            *self.settings(stored),
        ]

    def step(self, module, stored: bool, structures: list[int], weights=None) -> list[torch.Tensor]:
        """Residuals, force errors, losses and the gradient of a training step."""
        arguments = self.step_arguments(stored, structures, weights)
        (module.force_step_stored if stored else module.force_step)(*arguments)
        return outputs_of(arguments, stored)


def outputs_of(arguments: list, stored: bool) -> list[torch.Tensor]:
    """The four outputs among the arguments of a training step."""
    return arguments[-7:-3] if stored else arguments[-8:-4]


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
                function = ops.energy_forces_stored if stored else ops.energy_forces
                again = function(*case.arguments(stored, case.networks.weights))
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
    function = ops.energy_forces_stored if stored else ops.energy_forces
    flat = case.flat.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: function(*case.arguments(stored, w)), flat)


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
    energies, forces = ops.energy_forces(*case.arguments(False))
    for s in range(0, case.n_structures, 9):
        a, b = case.offsets[s : s + 2].tolist()
        alone = Case(batch=(case.coordinates[a:b], case.species[a:b], torch.tensor([0, b - a])))
        own = ops.energy_forces(*alone.arguments(False))
        close(list(own), [energies[s : s + 1], forces[a:b]], 1e-13, 1e-13)


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

    def strided(arguments: list, count: int) -> list:
        return [not_contiguous(a) if isinstance(a, torch.Tensor) and i < count else a for i, a in enumerate(arguments)]

    for name, arguments in [("", case.arguments(stored)), ("_backward", case.backward_arguments(stored))]:
        op = getattr(OPS, f"energy_forces_stored{name}" if stored else f"energy_forces{name}")
        expected, found = op(*arguments), op(*strided(arguments, len(arguments)))
        expected, found = ((x,) if isinstance(x, torch.Tensor) else x for x in (expected, found))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # A step takes targets, weights and outputs as they are (its next argument is energy_targets).
    expected = case.step(ops, stored, [3, 0, 1])
    arguments = strided(case.step_arguments(stored, [3, 0, 1]), 6 if stored else 5)
    (ops.force_step_stored if stored else ops.force_step)(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(arguments, stored), expected, strict=True))


@BOTH
def test_a_step_works_in_every_mode(stored):
    case = Case()
    expected = case.step(ops, stored, [3, 0, 1])
    step = ops.force_step_stored if stored else ops.force_step
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            arguments = case.step_arguments(stored, [3, 0, 1])
            arguments[5 if stored else 4] = case.networks.weights  # requires a gradient
            step(*arguments)
            assert all(torch.equal(a, b) for a, b in zip(outputs_of(arguments, stored), expected, strict=True))


@pytest.mark.sample(1)
@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opcheck(dtype, stored):
    suffix = "_stored" if stored else ""
    for batch in (None, ragged((), 2, 1)) if dtype == torch.float64 else (None,):
        case = Case(dtype=dtype, batch=batch)
        arguments = {
            f"energy_forces{suffix}": case.arguments(stored),
            f"energy_forces{suffix}_backward": case.backward_arguments(stored),
            f"force_step{suffix}": case.step_arguments(stored, [3, 0, 1] if batch is None else []),
        }
        for name, values in arguments.items():
            torch.library.opcheck(getattr(OPS, name).default, tuple(values))
        values = case.arguments(stored, case.flat.requires_grad_())
        torch.library.opcheck(getattr(OPS, f"energy_forces{suffix}").default, tuple(values))


@BOTH
def test_one_output_alone_has_its_gradient(stored):
    """A loss of energies only, or of forces only, sees zeros for the gradient of the other."""
    case = Case()
    function = ops.energy_forces_stored if stored else ops.energy_forces
    flat = case.flat.requires_grad_()
    energies, forces = function(*case.arguments(stored, flat))
    slopes = case.gradients()
    (of_energies,) = torch.autograd.grad((slopes[0] * energies).sum(), flat, retain_graph=True)
    (of_forces,) = torch.autograd.grad((slopes[1] * forces).sum(), flat)
    close([of_energies + of_forces], [case.results(ops, stored)[2]], 1e-12, 1e-12)


@BOTH
def test_what_cannot_be_differentiated_is_refused(stored):
    case = Case()
    function = ops.energy_forces_stored if stored else ops.energy_forces
    flat = case.flat.requires_grad_()
    for place in range(len(case.sources(stored))):
        arguments = case.arguments(stored, flat)
        arguments[place] = arguments[place].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=r"differentiated with respect to the weights only.*EnergyModel.forward"):
            function(*arguments)
        with torch.no_grad():
            function(*arguments)
    arguments = case.arguments(stored, flat)
    arguments[5 if stored else 4] = case.sae.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="sae has no gradient"):
        function(*arguments)
    energies, forces = function(*case.arguments(stored, flat))
    loss = energies.sum() + forces.square().sum().double()
    (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of energy_forces has no derivative"):
        gradient.square().sum().backward()


# ---- Errors --------------------------------------------------------------------------------------

WRONG_BATCHES = [
    ("species", lambda z: z.int(), "species must be a one-dimensional int64 tensor, got Int"),
    ("species", lambda z: z[1:], "there are 19 atoms but species has 18"),
    ("offsets", lambda o: o.double(), "offsets must be a one-dimensional int64 tensor, got Double"),
    ("offsets", lambda o: o[:0], r"offsets must have n_structures \+ 1 entries, got none"),
    ("parameters", lambda w: w.half(), r"parameters is Half but (coordinates|features) is Double; both must have one"),
    ("parameters", lambda w: w[1:], "the networks have 476 parameters, got 475"),
    ("parameters", lambda w: w[None, None], r"parameters must be one flat tensor, or .* got shape \[1, 1, 476\]"),
    ("sizes", lambda s: s[:-1], "3 layers need 4 sizes for each network, got 7 in all"),
    ("sizes", lambda s: [17, *s[1:]], "the network of species 0 takes 17 inputs, the features have 18"),
    ("sizes", lambda s: [*s[:-1], 2], "the last layer must have one output, that of species 1 has 2"),
    ("activations", lambda a: [9, *a[1:]], "unknown activation code 9"),
]
WRONG_SOURCES = [
    ("coordinates", lambda x: x[:, :2], r"coordinates must have shape \[n_atoms, 3\], got \[19, 2\]"),
    ("coordinates", lambda x: x.half(), "coordinates must be float64 or float32, got Half"),
    ("coordinates", lambda x: x.float(), "parameters is Double but coordinates is Float; both must have one dtype"),
    ("descriptor", lambda d: d[:-1], "sections, which needs 19 numbers; it has 18"),
]
WRONG_STORED = [
    ("features", lambda a: a[:, 0], r"features must have shape \[n_atoms, D\], got \[19\]"),
    ("features", lambda a: a.half(), "features must be float64 or float32, got Half"),
    ("jacobian", lambda j: j.float(), "jacobian is Float but features is Double; both must have one dtype"),
    ("jacobian", lambda j: j[:, 1:], r"jacobian must have shape \[19, 18, columns\], got \[19, 17, 27\]"),
]
WRONG_STEPS = [
    ("structures", lambda s: s.int(), "structures must be a one-dimensional int64 tensor, got Int"),
    ("energy_targets", lambda t: t[:3], r"energy_targets must be a contiguous float64 tensor of shape \[6\], got"),
    ("energy_targets", lambda t: t.float(), r"energy_targets must be .*, got Float of shape \[6\]"),
    ("energy_targets", not_contiguous, "energy_targets must be a contiguous float64 tensor"),
    ("force_targets", lambda t: t[1:], r"force_targets must be .* of shape \[19, 3\], got Double of shape \[18, 3\]"),
    ("energy_weights", lambda w: w[1:], r"energy_weights must be .* of shape \[6\], got Double of shape \[5\]"),
    ("force_weights", lambda w: w.float(), r"force_weights must be .* of shape \[6\], got Float of shape \[6\]"),
    ("scales", lambda s: s[:1], r"scales must be .* of shape \[2\], got Double of shape \[1\]"),
    ("energy_residuals", lambda r: r[:2], r"energy_residuals must be .* of shape \[3\], got Double of shape \[2\]"),
    ("force_errors", lambda e: e.T, r"force_errors must be .* of shape \[3, 3\], got Double of shape \[3, 3\]"),
    ("losses", lambda x: x.float(), r"losses must be .* of shape \[2\], got Float of shape \[2\]"),
    ("gradient", lambda g: g.float(), "gradient is Float but parameters is Double; both must have one dtype"),
    (
        "gradient",
        lambda g: g[1:],
        r"gradient must be contiguous and have the shape of parameters, \[476\], got \[475\]",
    ),
]
WRONG_GRADIENTS = [
    ("grad_energies", lambda e: e.float(), r"grad_energies must be .* float64 tensor of shape \[6\], got Float"),
    ("grad_energies", lambda e: e[1:], r"grad_energies must be .* of shape \[6\], got Double of shape \[5\]"),
    ("grad_forces", lambda f: f.float(), "grad_forces is Float but parameters is Double; both must have one dtype"),
    ("grad_forces", lambda f: f[:, :2], r"grad_forces must have shape \[19, 3\], got \[19, 2\]"),
]
OF_SAE = [
    ("sae", lambda e: e[:1], r"sae must be a contiguous float64 tensor of shape \[2\], got Double of shape \[1\]"),
    ("sae", lambda e: e.float(), r"sae must be a contiguous float64 tensor of shape \[2\], got Float of shape \[2\]"),
]
WRONG = [
    *[(op, False, *w) for op in ("energy_forces", "backward", "step") for w in WRONG_BATCHES + WRONG_SOURCES],
    *[(op, True, *w) for op in ("energy_forces", "backward", "step") for w in WRONG_BATCHES + WRONG_STORED],
    *[("step", stored, *w) for stored in (False, True) for w in WRONG_STEPS],
    *[("backward", stored, *w) for stored in (False, True) for w in WRONG_GRADIENTS],
    *[("energy_forces", stored, *w) for stored in (False, True) for w in OF_SAE],
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


def refused(wrong: list[tuple]) -> None:
    case = Case()
    for kind, stored, argument, change, message in wrong:
        suffix = "_stored" if stored else ""
        name, arguments = {
            "energy_forces": (f"energy_forces{suffix}", case.arguments),
            "backward": (f"energy_forces{suffix}_backward", case.backward_arguments),
            "step": (f"force_step{suffix}", lambda stored: case.step_arguments(stored, [5, 1, 3])),
        }[kind]
        op = getattr(OPS, name).default
        values = arguments(stored)
        place = [a.name for a in op._schema.arguments].index(argument)
        values[place] = change(values[place])
        with pytest.raises(RuntimeError, match=f"^kinml_fast: .*{message}"):
            op(*values)
