"""What the steps of an epoch say about the structures that they train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinml_fast.metrics import Errors, ErrorSums
from kinml_fast.train.metrics import LevelErrors
from kinml_fast.units import GIGAPASCAL, KCAL_PER_MOL

_UNITS = (KCAL_PER_MOL, GIGAPASCAL)
"""Of what is said of forces and of stresses."""


class EpochErrors:
    """Residuals of the energies and errors of forces and stresses, each before the update from its batch.

    An epoch goes through its structures stretch by stretch. Those of the present one are kept batch by batch; of those
    before it there are sums.

    Parameters
    ----------
    levels
        K, levels of theory.
    size
        Structures in a batch.
    device
        Of the model.
    stresses
        Whether steps on forces write errors of stresses too.

    Attributes
    ----------
    energies, forces : list of Tensor
        For each batch of n structures of the present stretch [K, n] and [K, n, 3], with stresses [K, n, 6], float64:
        the `energy_residuals` and `force_errors` of `ops.force_step`. Steps write into them.
    first : int
        Number of the first batch of the present stretch in the epoch.
    """

    def __init__(self, levels: int, size: int, device: torch.device, stresses: bool = False) -> None:
        self._levels, self._size, self._device = levels, size, device
        self._kinds = 2 if stresses else 1  # of components whose errors a step writes, three numbers each
        self.energies: list[Tensor] = []
        self.forces: list[Tensor] = []
        self._known = np.zeros((levels, 0), dtype=bool)
        self._given: tuple[Tensor, Tensor] | None = None
        self.clear()

    def clear(self) -> None:
        """Begin an epoch: nothing is known."""
        self.first = 0
        self._energy_sums = [ErrorSums() for _ in range(self._levels)]
        # Of forces and of stresses, at each level.
        self._component_sums = [[ErrorSums() for _ in range(self._levels)] for _ in range(self._kinds)]

    def begin(self, first: int, known: np.ndarray, with_forces: bool) -> None:
        """Begin a stretch, or take up the one that a checkpoint was written in.

        Parameters
        ----------
        first
            Number of its first batch in the epoch.
        known
            bool [K, n]: which of its structures, in the order of the epoch, have energies.
        with_forces
            Whether steps write errors of forces; otherwise there are none.
        """
        count = known.shape[1]
        if count != self._known.shape[1]:
            sizes = [min(self._size, count - place) for place in range(0, count, self._size)]
            options: dict[str, Any] = {"dtype": torch.float64, "device": self._device}
            self.energies = [torch.zeros(self._levels, n, **options) for n in sizes]
            self.forces = [torch.zeros(self._levels, n, 3 * self._kinds, **options) for n in sizes]
        self.first, self._known = first, known
        if not with_forces:
            for errors in self.forces:
                errors.zero_()
        if self._given is not None:
            (energies, forces), self._given = self._given, None
            for number in range(-(-energies.shape[1] // self._size)):
                some = slice(number * self._size, (number + 1) * self._size)
                self.energies[number].copy_(energies[:, some])
                self.forces[number].copy_(forces[:, some])

    def end(self) -> None:
        """All batches of the stretch are done: only its sums are kept."""
        energies, forces = (errors.cpu().numpy() for errors in self._joined(len(self.energies)))
        with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges is told so elsewhere
            for level in range(self._levels):
                self._energy_sums[level].add(energies[level, self._known[level]])
                for kind, sums in enumerate(self._component_sums):
                    sums[level].add_groups(forces[level, :, 3 * kind : 3 * kind + 3], 0)
        self.first += len(self.energies)

    def of_levels(
        self, components: Sequence[int], with_forces: bool, stress_components: Sequence[int] = ()
    ) -> list[LevelErrors]:
        """The errors of a whole epoch at each level of theory.

        Parameters
        ----------
        components
            [K]: how many force components were trained on.
        with_forces
            Whether the epoch trained on forces, and on stresses.
        stress_components
            [K]: how many components of stresses were trained on, in a run on them.
        """
        found: list[LevelErrors] = []
        with np.errstate(over="ignore", invalid="ignore"):
            for level, energy in enumerate(self._energy_sums):
                errors: list[Errors | None] = []
                of_kinds = zip(self._component_sums, (components, stress_components), _UNITS, strict=False)
                for sums, counts, unit in of_kinds:
                    sums[level].count = counts[level]
                    errors.append(sums[level].errors(unit) if with_forces and counts[level] else None)
                found.append(LevelErrors(energy.errors() if energy.count else None, *errors))
        return found

    def is_finite(self, batches: int) -> bool:
        """Whether all errors of the first batches of the epoch are finite, as far as they are known."""
        if self._given is not None:
            return True  # as it was when it was saved
        energies, forces = self._joined(batches - self.first)
        known = torch.from_numpy(self._known[:, : energies.shape[1]]).to(energies.device)
        before = all(sums.is_finite for of_kind in (self._energy_sums, *self._component_sums) for sums in of_kind)
        return before and bool(torch.isfinite(energies[known]).all() and torch.isfinite(forces).all())

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Those of the first batches of the epoch as a checkpoint keeps them.

        What is of one level has no dimension of levels.
        """
        energies, forces = self._given or self._joined(batches - self.first)
        if self._levels == 1:
            energies, forces = energies[0], forces[0]
        sums = [[one.numbers() for one in of_kind] for of_kind in (self._energy_sums, *self._component_sums)]
        return {
            "residuals": energies,
            "force_errors": forces,
            "error_sums": torch.tensor(sums, dtype=torch.float64),
            "first_batch": self.first,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; the stretch that it was in begins next, with the batch `first`."""
        self.first = state["first_batch"]
        energies, forces = state["residuals"], state["force_errors"]
        self._given = energies.view(self._levels, -1), forces.view(self._levels, -1, 3 * self._kinds)
        of_kinds = state["error_sums"].view(1 + self._kinds, self._levels, -1).tolist()
        self._energy_sums, *self._component_sums = [[ErrorSums.of_numbers(row) for row in rows] for rows in of_kinds]

    def _joined(self, batches: int) -> tuple[Tensor, Tensor]:
        """Those of the first batches of the stretch in one tensor each: [K, n] and [K, n, 3 or 6]."""
        if batches <= 0:
            empty = torch.zeros(self._levels, 0, dtype=torch.float64, device=self._device)
            return empty, empty.new_zeros(self._levels, 0, 3 * self._kinds)
        return torch.cat(self.energies[:batches], dim=1), torch.cat(self.forces[:batches], dim=1)
