"""What the steps of an epoch say about the structures that they train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinml_fast.metrics import Errors
from kinml_fast.train.metrics import LevelErrors, Residuals


class EpochErrors:
    """Residuals of the energies and errors of the forces, each before the update from its batch, batch by batch.

    Parameters
    ----------
    levels
        K, levels of theory.
    count
        Structures in an epoch.
    size
        Structures in a batch.
    device
        Of the model.

    Attributes
    ----------
    energies, forces : list of Tensor
        For each batch of n structures [K, n] and [K, n, 3], float64: the `energy_residuals` and `force_errors` of
        `ops.force_step`. Steps write into them.
    """

    def __init__(self, levels: int, count: int, size: int, device: torch.device) -> None:
        self._levels = levels
        sizes = [min(size, count - first) for first in range(0, count, size)]
        self.energies = [torch.zeros(levels, n, dtype=torch.float64, device=device) for n in sizes]
        self.forces = [torch.zeros(levels, n, 3, dtype=torch.float64, device=device) for n in sizes]

    def clear_forces(self) -> None:
        """Forget the errors of forces, for an epoch that has none."""
        for errors in self.forces:
            errors.zero_()

    def joined(self, batches: int | None = None) -> tuple[Tensor, Tensor]:
        """Those of the first batches, of all by default, in one tensor each: [K, n] and [K, n, 3]."""
        if batches == 0:
            return self.energies[0][:, :0].clone(), self.forces[0][:, :0].clone()
        return torch.cat(self.energies[:batches], dim=1), torch.cat(self.forces[:batches], dim=1)

    def of_levels(self, known: np.ndarray, components: Sequence[int], with_forces: bool) -> list[LevelErrors]:
        """The errors of a whole epoch at each level of theory.

        Parameters
        ----------
        known
            bool [K, n]: which structures, in the order of the epoch, have energies.
        components
            [K]: how many force components were trained on.
        with_forces
            Whether the epoch trained on forces.
        """
        found: list[LevelErrors] = []
        energies, forces = (errors.cpu().numpy() for errors in self.joined())
        for residuals, sums, has_energy, count in zip(energies, forces, known, components, strict=True):
            energy, _ = Residuals(residuals[has_energy], None).errors()
            with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges is told so elsewhere
                found.append((energy, Errors.of_sums(sums, count) if with_forces and count else None))
        return found

    def state_dict(self, batches: int) -> dict[str, Tensor]:
        """Those of the first batches as a checkpoint keeps them: of one level without the dimension of levels."""
        energies, forces = self.joined(batches)
        if self._levels == 1:
            energies, forces = energies[0], forces[0]
        return {"residuals": energies, "force_errors": forces}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        energies, forces = state["residuals"], state["force_errors"]
        energies, forces = energies.view(self._levels, -1), forces.view(self._levels, -1, 3)
        first = 0
        for batch_energies, batch_forces in zip(self.energies, self.forces, strict=True):
            end = first + batch_energies.shape[1]
            if end > energies.shape[1]:
                break
            batch_energies.copy_(energies[:, first:end])
            batch_forces.copy_(forces[:, first:end])
            first = end
