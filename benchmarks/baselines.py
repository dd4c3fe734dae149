"""What kinml_fast is measured against: the same training in plain PyTorch and with TorchANI.

On energies: `PlainTorch`, `TorchANI`. On energies and forces, for structures of any size: `PlainTorchForces`,
`TorchANIForces`; `check` holds these against kinml_fast's ops, so that all forms do the same work.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.data.structures import Structures
from kinml_fast.nn import AEVParameters
from kinml_fast.ops import System

DESCRIPTOR = AEVParameters.aevmod(("C", "H"))
LAYERS = (224, 48, 24, 12, 1)
FORCE_WEIGHT = 0.5


class Gaussian(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-x * x)


def networks(dtype: torch.dtype) -> torch.nn.ModuleList:
    """One stack of Linear layers for carbon and one for hydrogen."""
    stacks = []
    for _ in range(2):
        layers = []
        for inputs, outputs in itertools.pairwise(LAYERS):
            layers += [torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype), Gaussian()]
        stacks.append(torch.nn.Sequential(*layers[:-1]))
    return torch.nn.ModuleList(stacks)


class PlainTorch:
    """Cached AEVs and torch.nn: the strongest form of what one writes by hand for structures of one formula."""

    def __init__(self, structures: Structures, features: Tensor, targets: Tensor, batch_size: int = 50) -> None:
        self.n = len(structures)
        self.features = features.view(self.n, 10, -1)  # five C, then five H
        self.targets = targets.to(features)
        self.networks = networks(features.dtype).to(features.device)
        self.optimizer = torch.optim.Adam(self.networks.parameters(), lr=1e-3, fused=True)
        self.batch_size = batch_size

    def epoch(self) -> None:
        for batch in torch.randperm(self.n, device=self.features.device).split(self.batch_size):
            self.step(batch)

    def energies(self, batch: Tensor) -> Tensor:
        features = self.features[batch]
        carbon, hydrogen = self.networks
        return carbon(features[:, :5]).sum((1, 2)) + hydrogen(features[:, 5:]).sum((1, 2))

    def step(self, batch: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(self.energies(batch), self.targets[batch])
        loss.backward()
        self.optimizer.step()


def torchani_aev(dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.nn.Module:
    """TorchANI's AEV of the same shifts, cutoffs and exponents; radial terms count 1/4 there, angular ones 2.

    On a GPU it is cuAEV.
    """
    import torchani

    p = DESCRIPTOR
    radial = torchani.aev.ANIRadial(p.radial_eta, p.radial_shifts, p.radial_cutoff)
    angular = torchani.aev.ANIAngular(p.angular_eta, p.zeta, p.angular_shifts, p.sections, p.angular_cutoff)
    strategy = {} if torch.device(device).type == "cpu" else {"strategy": "cuaev"}
    return torchani.AEVComputer(radial, angular, num_species=2, **strategy).to(device, dtype)


class TorchANI(PlainTorch):
    """TorchANI's AEV, computed in every step, and the same networks."""

    def __init__(self, structures: Structures, targets: Tensor, dtype: torch.dtype, batch_size: int = 50) -> None:
        self.aev = torchani_aev(dtype)
        self.coordinates = torch.from_numpy(structures.coordinates).to(dtype).view(-1, 10, 3)
        self.species = torch.from_numpy(structures.species).view(-1, 10)
        super().__init__(structures, torch.zeros(len(structures) * 10, 1, dtype=dtype), targets, batch_size)

    def energies(self, batch: Tensor) -> Tensor:
        features = self.aev(self.species[batch], self.coordinates[batch])
        carbon, hydrogen = self.networks
        return carbon(features[:, :5]).sum((1, 2)) + hydrogen(features[:, 5:]).sum((1, 2))


class PlainTorchForces:
    """AEVs and padded Jacobians kept in memory, forces by one bmm for a batch, the loss differentiated by autograd.

    The strongest form of what one writes by hand: Jacobians are gathered into a buffer that is there already, which
    takes a third less time than indexing.
    """

    descriptor = DESCRIPTOR
    agreement: ClassVar = {torch.float64: 1e-10, torch.float32: 1e-3}
    """With kinml_fast's ops, of the largest value."""

    def __init__(
        self,
        structures: Structures,
        targets: Tensor,
        dtype: torch.dtype,
        batch_size: int = 50,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch_size, self.device = batch_size, device
        self.species = torch.from_numpy(structures.species).to(device)
        self.offsets = torch.from_numpy(structures.offsets).to(device)
        self.sizes = self.offsets.diff()
        self.largest = int(self.sizes.max())
        self.energy_targets = targets.to(device, dtype)
        self.force_targets = self.padded(torch.from_numpy(structures.forces).to(device, dtype)).flatten(1)
        self.networks = networks(dtype).to(device)
        self.optimizer = torch.optim.Adam(self.networks.parameters(), lr=1e-3, fused=True)
        self.prepare(torch.from_numpy(structures.coordinates).to(device, dtype))

    def padded(self, values: Tensor) -> Tensor:
        """[n_atoms, ...] as [n_structures, largest, ...] with zeros."""
        result = values.new_zeros(len(self.sizes), self.largest, *values.shape[1:])
        result[torch.arange(self.largest, device=self.device) < self.sizes[:, None]] = values
        return result

    def prepare(self, coordinates: Tensor) -> None:
        arguments = coordinates, self.species, self.offsets
        packed = self.descriptor.packed()
        self.features = ops.aev(System(*arguments), packed)
        self.jacobian = ops.aev_jacobian(System(*arguments), self.largest, packed)  # [n_atoms, D, 3 largest]
        most = int(self.sizes.sort(descending=True).values[: self.batch_size].sum())
        self.buffer = torch.empty_like(self.jacobian[:most])

    def epoch(self) -> None:
        for batch in torch.randperm(len(self.sizes), device=self.device).split(self.batch_size):
            self.step(batch)

    def step(self, batch: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        self.optimizer.step()

    def loss(self, batch: Tensor) -> Tensor:
        energies, forces = self.predict(batch)
        of_energies = (energies - self.energy_targets[batch]).square().mean()
        of_forces = ((forces - self.force_targets[batch]).square().sum(1) / (3 * self.sizes[batch])).mean()
        return (1 - FORCE_WEIGHT) * of_energies + FORCE_WEIGHT * of_forces

    def predict(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Energies [n] and forces [n, 3 largest], zero at padding, as functions of the weights."""
        sizes = self.sizes[batch]
        owners = torch.repeat_interleave(sizes)
        atoms = torch.arange(len(owners), device=self.device) + (self.offsets[batch] - sizes.cumsum(0) + sizes)[owners]
        jacobian = torch.index_select(self.jacobian, 0, atoms, out=self.buffer[: len(atoms)])
        return self.contract(self.features[atoms], jacobian, self.species[atoms], owners, len(batch), True)

    def evaluate(self) -> tuple[Tensor, Tensor]:
        """Energies and forces of all structures at once."""
        owners = torch.repeat_interleave(self.sizes)
        return self.contract(self.features, self.jacobian, self.species, owners, len(self.sizes), False)

    def contract(
        self, features: Tensor, jacobian: Tensor, species: Tensor, owners: Tensor, count: int, training: bool
    ) -> tuple[Tensor, Tensor]:
        features = features.detach().requires_grad_()
        energies = self.atomic_energies(features, species)
        energies = energies.new_zeros(count).index_add(0, owners, energies)
        (gradient,) = torch.autograd.grad(energies.sum(), features, create_graph=training)
        columns = torch.bmm(gradient[:, None], jacobian)[:, 0]
        return energies, -columns.new_zeros(count, columns.shape[1]).index_add(0, owners, columns)

    def atomic_energies(self, features: Tensor, species: Tensor) -> Tensor:
        """[n_atoms], zero where the species is -1."""
        energies = features.new_zeros(len(features))
        for s, network in enumerate(self.networks):
            chosen = (species == s).nonzero()[:, 0]
            energies = energies.index_add(0, chosen, network(features[chosen])[:, 0])
        return energies


class TorchANIForces(PlainTorchForces):
    """TorchANI's AEV, computed in every step, and the same networks; structures padded with species -1."""

    descriptor = replace(DESCRIPTOR, radial_factor=0.25, angular_factor=2.0)
    agreement: ClassVar = {torch.float64: 1e-6, torch.float32: 1e-3}  # it rounds the shifts and exponents to float32

    def prepare(self, coordinates: Tensor) -> None:
        self.aev = torchani_aev(coordinates.dtype, self.device)
        self.coordinates = self.padded(coordinates)
        self.padded_species = self.padded(self.species + 1) - 1

    def predict(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.recompute(self.padded_species[batch], self.coordinates[batch], True)

    def evaluate(self) -> tuple[Tensor, Tensor]:
        return self.recompute(self.padded_species, self.coordinates, False)

    def recompute(self, species: Tensor, coordinates: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        coordinates = coordinates.detach().requires_grad_()
        features = self.aev(species, coordinates)
        energies = self.atomic_energies(features.flatten(0, 1), species.flatten()).view(species.shape).sum(1)
        (gradient,) = torch.autograd.grad(energies.sum(), coordinates, create_graph=training)
        return energies, -gradient.flatten(1)


def check(training: PlainTorchForces, structures: Structures) -> None:
    """Energies, forces and the loss's gradient of the first structures agree with autograd through kinml_fast's AEV.

    Raises
    ------
    AssertionError
        They do not: the forms would not be doing the same work.
    """
    count = min(len(structures), training.batch_size)
    chosen = structures.select(range(count))
    x = torch.from_numpy(chosen.coordinates).requires_grad_()
    species, offsets = torch.from_numpy(chosen.species), torch.from_numpy(chosen.offsets)
    copy = PlainTorchForces.__new__(PlainTorchForces)
    copy.networks = networks(torch.float64)
    copy.networks.load_state_dict(training.networks.state_dict())
    atomic = copy.atomic_energies(ops.aev(System(x, species, offsets), training.descriptor.packed()), species)
    owners = torch.from_numpy(chosen.owners)
    energies = atomic.new_zeros(count).index_add(0, owners, atomic)
    (gradient,) = torch.autograd.grad(energies.sum(), x, create_graph=True)
    of_energies = (energies - training.energy_targets[:count].cpu()).square().mean()
    squares = (-gradient - torch.from_numpy(chosen.forces)).square().sum(1)
    of_forces = (atomic.new_zeros(count).index_add(0, owners, squares) / (3 * offsets.diff())).mean()
    ((1 - FORCE_WEIGHT) * of_energies + FORCE_WEIGHT * of_forces).backward()

    batch = torch.arange(count, device=training.device)
    ours = training.predict(batch)
    training.optimizer.zero_grad()
    training.loss(batch).backward()
    inside = torch.arange(training.largest, device=training.device) < training.sizes[:count, None]
    pairs = [
        (ours[0], energies),
        (ours[1].view(count, -1, 3)[inside], -gradient),
        *(
            (mine.grad, other.grad)
            for mine, other in zip(training.networks.parameters(), copy.networks.parameters(), strict=True)
        ),
    ]
    for mine, other in pairs:
        tolerance = training.agreement[mine.dtype] * float(other.detach().abs().max())
        torch.testing.assert_close(mine.double().cpu(), other, rtol=0, atol=tolerance)
