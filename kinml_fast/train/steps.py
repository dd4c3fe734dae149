"""Where energies and forces come from in training: each kind takes a batch forward and backward, and predicts.

`EnergyStep` keeps the descriptors of all atoms and computes energies only. `ForceStep` computes energies and forces
from coordinates, `StoredForceStep` from descriptors and Jacobians that it keeps; both give the same numbers. A trainer
calls `batches` once an epoch and `run` with each of its entries: what need not be done in each step is done there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.nn import EnergyModel
from kinml_fast.train.dataset import Dataset
from kinml_fast.train.loss import TaskWeights


class Step(Protocol):
    """What the trainer needs of a source of energies, or of energies and forces."""

    def batches(self, order: Tensor, size: int, residuals: Tensor, errors: Tensor) -> Sequence[tuple]:
        """The arguments of `run` for each batch of an epoch.

        Parameters
        ----------
        order
            [n] int64, the training structures in the order of the epoch.
        size
            Structures in a batch.
        residuals, errors
            [n] and [n, 3], float64, receive the energy residuals and force errors (see `ops.force_step`).
        """

    def run(self, *arguments: Any) -> None:
        """Forward and backward pass of a batch: the gradient and the losses of the task weights are written."""

    def predict(self, first: int, last: int, size: int) -> tuple[Tensor, Tensor | None]:
        """Energies [last − first] without single-atom energies, and forces [n_atoms, 3], of consecutive structures.

        Computed `size` structures at a time, under `torch.inference_mode`. Forces are None if there are none.
        """


class EnergyStep:
    """Energies from descriptors that are computed once and kept."""

    def __init__(self, model: EnergyModel, data: Dataset, tasks: TaskWeights) -> None:
        self._networks, self._data, self._tasks = model.networks, data, tasks
        self._n_species = len(model.elements)
        self._features = data.descriptors(model, jacobian=False).features
        self._plans: dict[tuple[int, int, int], list[ops.Batch]] = {}

    def batches(self, order: Tensor, size: int, residuals: Tensor, errors: Tensor) -> list[tuple]:
        """See `Step`."""
        data = self._data
        planned = ops.plan_batches(data.species, data.offsets, order, size, self._n_species)
        parts = (data.energies[order], data.energy_weights[order], residuals)
        return list(zip(planned, *(part.split(size) for part in parts), strict=True))

    def run(self, batch: ops.Batch, targets: Tensor, weights: Tensor, residuals: Tensor) -> None:
        """See `Step`."""
        tasks = self._tasks
        self._networks.energy_step(
            self._features,
            batch.rows,
            batch.owners,
            batch.starts,
            targets,
            weights,
            residuals,
            float(tasks.scales[0]),
        )
        if tasks.learning:
            number = torch.count_nonzero(weights).clamp_(min=1)
            tasks.losses[0] = (weights * residuals.square()).sum() / number

    def predict(self, first: int, last: int, size: int) -> tuple[Tensor, None]:
        """See `Step`."""
        data, key = self._data, (first, last, size)
        if key not in self._plans:
            structures = torch.arange(first, last, device=data.offsets.device)
            self._plans[key] = ops.plan_batches(data.species, data.offsets, structures, size, self._n_species)
        with torch.inference_mode():
            energies = [
                self._networks.energies(self._features, batch.rows, batch.owners, batch.starts, len(batch.structures))
                for batch in self._plans[key]
            ]
            return torch.cat(energies) if energies else data.energies[:0], None


class ForceStep:
    """Energies and forces from coordinates, descriptors and their derivatives computed anew in every step."""

    def __init__(self, model: EnergyModel, data: Dataset, tasks: TaskWeights) -> None:
        networks = model.networks
        self._networks, self._data, self._tasks = networks, data, tasks
        self._sources = self._sources_of(model)
        self._settings: tuple = (model.aev.packed, networks.sizes, networks.activation_codes, networks.biases)
        self.run, self._predict = ops.force_step, ops.energy_forces

    def _sources_of(self, model: EnergyModel) -> tuple[Tensor, ...]:
        return (self._data.coordinates,)

    def batches(self, order: Tensor, size: int, residuals: Tensor, errors: Tensor) -> list[tuple]:
        """See `Step`."""
        data, tasks, weights = self._data, self._tasks, self._networks.weights
        if weights.grad is None:
            weights.grad = torch.empty_like(weights)
        before = (*self._sources, data.species, data.offsets)
        middle = (
            weights.detach(),
            data.energies,
            data.forces,
            data.energy_weights,
            data.force_weights,
            tasks.scales[:2],
        )
        after = (tasks.losses[:2], weights.grad, *self._settings)
        parts = zip(order.split(size), residuals.split(size), errors.split(size), strict=True)
        return [(*before, structures, *middle, *outputs, *after) for structures, *outputs in parts]

    def predict(self, first: int, last: int, size: int) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        data, weights = self._data, self._networks.weights
        offsets = data.offsets[first : last + 1].tolist()
        energies, forces = [data.energies[:0]], [weights.detach().new_empty(0, 3)]
        with torch.inference_mode():
            for low in range(0, last - first, size):
                high = min(low + size, last - first)
                atoms = slice(offsets[low], offsets[high])
                own = data.offsets[first + low : first + high + 1] - offsets[low]
                sources = (source[atoms] for source in self._sources)
                energy, force = self._predict(*sources, data.species[atoms], own, weights, None, *self._settings)
                energies.append(energy)
                forces.append(force)
            return torch.cat(energies), torch.cat(forces)


class StoredForceStep(ForceStep):
    """Energies and forces from descriptors and Jacobians that are computed or read once and kept."""

    def __init__(self, model: EnergyModel, data: Dataset, tasks: TaskWeights) -> None:
        super().__init__(model, data, tasks)
        self._settings = self._settings[1:]  # without the descriptor
        self.run, self._predict = ops.force_step_stored, ops.energy_forces_stored

    def _sources_of(self, model: EnergyModel) -> tuple[Tensor, ...]:
        found = self._data.descriptors(model, jacobian=True)
        return found.features, found.jacobian
