"""What kinml_fast is measured against: the same training in plain PyTorch and with TorchANI."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kinml_fast.data.structures import Structures
from kinml_fast.nn import AEVParameters

LAYERS = (224, 48, 24, 12, 1)


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
        self.targets = targets.to(features.dtype)
        self.networks = networks(features.dtype)
        self.optimizer = torch.optim.Adam(self.networks.parameters(), lr=1e-3, fused=True)
        self.batch_size = batch_size

    def epoch(self) -> None:
        for batch in torch.randperm(self.n).split(self.batch_size):
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


class TorchANI(PlainTorch):
    """TorchANI's AEV of the same shifts, cutoffs and exponents, computed in every step, and the same networks."""

    def __init__(self, structures: Structures, targets: Tensor, dtype: torch.dtype, batch_size: int = 50) -> None:
        import torchani

        p = AEVParameters.aevmod(("C", "H"))
        radial = torchani.aev.ANIRadial(p.radial_eta, p.radial_shifts, p.radial_cutoff)
        angular = torchani.aev.ANIAngular(p.angular_eta, p.zeta, p.angular_shifts, p.sections, p.angular_cutoff)
        self.aev = torchani.AEVComputer(radial, angular, num_species=2).to(dtype)
        self.coordinates = torch.from_numpy(structures.coordinates).to(dtype).view(-1, 10, 3)
        self.species = torch.from_numpy(structures.species).view(-1, 10)
        super().__init__(structures, torch.zeros(len(structures) * 10, 1, dtype=dtype), targets, batch_size)

    def energies(self, batch: Tensor) -> Tensor:
        features = self.aev(self.species[batch], self.coordinates[batch])
        carbon, hydrogen = self.networks
        return carbon(features[:, :5]).sum((1, 2)) + hydrogen(features[:, 5:]).sum((1, 2))
