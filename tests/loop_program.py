"""A program for torchrun: a loop of a user's own, with torch's DistributedDataParallel around this package's model.

The processes share the batches of one; the first one prints the largest difference of its weights from those of one
process that trains on the whole batches.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training_helpers import SAE, model, structures

from kinml_fast.train import joined

STEPS, BATCH = 20, 12


class Terms(torch.nn.Module):
    """The loss of some structures: mean squared errors of energies and of forces."""

    def __init__(self, energy: torch.nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor, species: Tensor, offsets: Tensor, energies: Tensor, forces: Tensor) -> Tensor:
        x = x.requires_grad_()
        found = self.energy(x, species, offsets)
        (slopes,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        return ((found - energies) ** 2).mean() + ((slopes + forces) ** 2).mean()


def batch(step: int, rank: int, size: int) -> list[Tensor]:
    """What a process takes of a batch. All structures have as many atoms, so that means of shares have one mean."""
    data = structures(3 * BATCH, "all", ("CCHH",))
    first = step * BATCH % len(data)
    taken = data.select(range(first + rank, first + BATCH, size))
    return [
        torch.from_numpy(taken.coordinates),
        torch.from_numpy(taken.species),
        torch.from_numpy(taken.offsets),
        torch.from_numpy(taken.energies - taken.counts() @ SAE),
        torch.from_numpy(taken.forces),
    ]


def trained(rank: int, size: int) -> Tensor:
    """The weights after some steps."""
    energy = model()
    terms: torch.nn.Module = Terms(energy)
    if size > 1:
        terms = DistributedDataParallel(terms)
    optimizer = torch.optim.Adam(terms.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        terms(*batch(step, rank, size)).backward()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in energy.parameters()])


if __name__ == "__main__":
    with joined() as ranks:
        both = trained(ranks.rank, ranks.size)
        if ranks.is_first:
            alone = trained(0, 1)
            moved = (alone - torch.cat([p.detach().reshape(-1) for p in model().parameters()])).abs().max()
            sys.stdout.write(f"{(both - alone).abs().max().item()} {moved.item()}")
