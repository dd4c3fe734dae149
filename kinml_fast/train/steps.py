"""Where energies and forces come from in training: each kind takes a batch forward and backward, and predicts.

`EnergyStep` keeps the descriptors of all atoms and computes energies only; `LevelEnergyStep` does so for any number of
levels of theory, and on GPUs. `ForceStep` computes energies and forces from coordinates, `StoredForceStep` from
descriptors and Jacobians that it keeps; both give the same numbers, and take any number of levels. A trainer calls
`batches` once an epoch and `run` with each of its entries: what need not be done in each step is done there.
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


class EpochErrors:
    """What the steps of an epoch say about the structures that they train on, batch by batch.

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
        For each batch of n structures [n] and [n, 3] or, of several levels, [K, n] and [K, n, 3], float64: the
        `energy_residuals` and `force_errors` of `ops.force_step`.
    """

    def __init__(self, levels: int, count: int, size: int, device: torch.device) -> None:
        leading = () if levels == 1 else (levels,)
        sizes = [min(size, count - first) for first in range(0, count, size)]
        like = {"dtype": torch.float64, "device": device}
        self.energies = [torch.zeros(*leading, own, **like) for own in sizes]
        self.forces = [torch.zeros(*leading, own, 3, **like) for own in sizes]

    def joined(self, batches: int | None = None) -> tuple[Tensor, Tensor]:
        """Those of the first batches, of all by default, in one tensor each: [n] or [K, n], and [n, 3] or [K, n, 3]."""
        if batches == 0:
            return self.energies[0][..., :0].clone(), self.forces[0][..., :0, :].clone()
        return torch.cat(self.energies[:batches], dim=-1), torch.cat(self.forces[:batches], dim=-2)

    def restore(self, energies: Tensor, forces: Tensor) -> None:
        """Take over what `joined` gave, of the first batches."""
        first = 0
        for own, own_forces in zip(self.energies, self.forces, strict=True):
            end = first + own.shape[-1]
            if end > energies.shape[-1]:
                break
            own.copy_(energies[..., first:end])
            own_forces.copy_(forces[..., first:end, :])
            first = end


class Step(Protocol):
    """What the trainer needs of a source of energies, or of energies and forces."""

    def batches(self, order: Tensor, size: int, errors: EpochErrors) -> Sequence[tuple]:
        """The arguments of `run` for each batch of an epoch.

        Parameters
        ----------
        order
            [n] int64, the training structures in the order of the epoch.
        size
            Structures in a batch.
        errors
            Receives the energy residuals and force errors.
        """

    def run(self, *arguments: Any) -> None:
        """Forward and backward pass of a batch: the gradient and the losses of the task weights are written."""

    def predict(self, first: int, last: int, size: int) -> tuple[Tensor, Tensor | None]:
        """Energies [last − first] without single-atom energies, and forces [n_atoms, 3], of consecutive structures.

        With several levels they are [K, last − first] and [K, n_atoms, 3]. Computed `size` structures at a time, under
        `torch.inference_mode`. Forces are None if there are none.
        """


class EnergyStep:
    """Energies from descriptors that are computed once and kept."""

    def __init__(self, model: EnergyModel, data: Dataset, tasks: TaskWeights) -> None:
        self._networks, self._data, self._tasks = model.networks, data, tasks
        self._n_species = len(model.elements)
        self._features = data.descriptors(model, jacobian=False).features
        self._plans: dict[tuple[int, int, int], list[ops.Batch]] = {}

    def batches(self, order: Tensor, size: int, errors: EpochErrors) -> list[tuple]:
        """See `Step`."""
        data, tasks, weights = self._data, self._tasks, self._networks.weights
        gradient = _gradient(weights)
        scales, losses = tasks.scales[:2], tasks.losses[:2]
        energies, energy_weights = _leveled(data, data.energies), _leveled(data, data.energy_weights)
        counts = ops.count_weights(energy_weights, energy_weights, order, size)
        return [
            (
                self._features,
                batch.order,
                weights.detach(),
                ops.Loss(targets, own_weights, None, None, scales, own_counts),
                ops.StepResults(losses, gradient, residuals.unsqueeze(0)),
                self._networks.packed,
            )
            for batch, targets, own_weights, residuals, own_counts in zip(
                ops.plan_batches(data.species, data.offsets, order, size, self._n_species),
                _parts(energies[:, order], size),
                _parts(energy_weights[:, order], size),
                errors.energies,
                counts,
                strict=True,
            )
        ]

    def run(self, *arguments: Any) -> None:
        """See `Step`."""
        ops.energy_step(*arguments)

    def predict(self, first: int, last: int, size: int) -> tuple[Tensor, None]:
        """See `Step`."""
        data, key = self._data, (first, last, size)
        if key not in self._plans:
            structures = torch.arange(first, last, device=data.offsets.device)
            self._plans[key] = ops.plan_batches(data.species, data.offsets, structures, size, self._n_species)
        with torch.inference_mode():
            energies = [
                ops.networks(
                    self._features,
                    batch.order,
                    self._networks.weights,
                    None,
                    self._networks.packed,
                    len(batch.structures),
                )
                for batch in self._plans[key]
            ]
            return torch.cat(energies) if energies else data.energies[:0], None


class ForceStep:
    """Energies and forces from coordinates, descriptors and their derivatives computed anew in every step."""

    def __init__(self, model: EnergyModel, data: Dataset, tasks: TaskWeights) -> None:
        self._networks, self._data, self._tasks = model.networks, data, tasks
        self._system = self._system_of(model)
        self._model = ops.Model(model.aev.packed, model.networks.packed)

    def _system_of(self, model: EnergyModel) -> ops.System:
        return ops.System(self._data.coordinates, self._data.species, self._data.offsets)

    def batches(self, order: Tensor, size: int, errors: EpochErrors) -> list[tuple]:
        """See `Step`."""
        data, tasks, weights = self._data, self._tasks, self._networks.weights
        gradient = _gradient(weights)
        scales, losses = tasks.scales[:2], tasks.losses[:2]
        targets = [_leveled(data, t) for t in (data.energies, data.energy_weights, data.forces, data.force_weights)]
        parts = zip(
            order.split(size),
            ops.count_weights(targets[1], targets[3], order, size),
            errors.energies,
            errors.forces,
            strict=True,
        )
        return [
            (
                self._system,
                structures,
                weights.detach(),
                ops.Loss(*targets, scales, counts),
                ops.StepResults(losses, gradient, _leveled(data, residuals), _leveled(data, force_errors)),
                self._model,
            )
            for structures, counts, residuals, force_errors in parts
        ]

    def run(self, *arguments: Any) -> None:
        """See `Step`."""
        ops.force_step(*arguments)

    def predict(self, first: int, last: int, size: int) -> tuple[Tensor, Tensor | None]:
        """See `Step`."""
        data, weights, whole = self._data, self._networks.weights, self._system
        offsets = data.offsets[first : last + 1].tolist()
        energies = [_leveled(data, data.energies)[:, :0]]
        forces = [_leveled(data, data.forces)[:, :0].to(weights.dtype)]
        with torch.inference_mode():
            for low in range(0, last - first, size):
                high = min(low + size, last - first)
                atoms = slice(offsets[low], offsets[high])
                some = ops.System(
                    *(
                        None if t is None else t[atoms]
                        for t in (whole.coordinates, whole.species)
                    ),
                    whole.offsets[first + low : first + high + 1] - offsets[low],
                    *(None if t is None else t[atoms] for t in (whole.features, whole.jacobian)),
                )
                energy, force = ops.energy_forces(some, weights, None, self._model)
                energies.append(energy)
                forces.append(force)
            with_forces = whole.coordinates is not None or whole.jacobian is not None
            all_energies, all_forces = torch.cat(energies, dim=-1), torch.cat(forces, dim=-2)
            if data.levels == 1:
                all_energies, all_forces = all_energies[0], all_forces[0]
            return all_energies, all_forces if with_forces else None


class StoredForceStep(ForceStep):
    """Energies and forces from descriptors and Jacobians that are computed or read once and kept."""

    def _system_of(self, model: EnergyModel) -> ops.System:
        found = self._data.descriptors(model, jacobian=True)
        return ops.System(None, self._data.species, self._data.offsets, found.features, found.jacobian)


class LevelEnergyStep(StoredForceStep):
    """Energies of any number of levels from descriptors that are computed once and kept, with one op for a step."""

    def _system_of(self, model: EnergyModel) -> ops.System:
        features = self._data.descriptors(model, jacobian=False).features
        return ops.System(None, self._data.species, self._data.offsets, features)


def _leveled(data: Dataset, values: Tensor) -> Tensor:
    return values.unsqueeze(0) if data.levels == 1 else values


def _parts(values: Tensor, size: int) -> list[Tensor]:
    """The columns of each batch, contiguous."""
    return [part.contiguous() for part in values.split(size, dim=-1)]


def _gradient(weights: Tensor) -> Tensor:
    if weights.grad is None:
        weights.grad = torch.empty_like(weights)
    return weights.grad
