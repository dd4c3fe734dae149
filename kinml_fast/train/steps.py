"""What trains on a batch and predicts: forward and backward pass in one call, without autograd.

`FusedStep` is one op for a batch: for any number of levels of theory, on CPUs and GPUs, for energies and forces or for
energies alone, from any `Source`. `PlannedStep` is for energies of one level on a CPU: there a plan of the batches,
made once an epoch, pays. `make_step` chooses. A trainer calls `batches` once an epoch and `run` with the arguments of
each batch: what need not be done in each step is done there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.nn import EnergyModel
from kinml_fast.train.config import TrainingConfig
from kinml_fast.train.dataset import Dataset
from kinml_fast.train.epoch_errors import EpochErrors
from kinml_fast.train.loss import TaskWeights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batches:
    """The batches of an epoch.

    `arguments` are those of `Step.run` for each; `counts` [n_batches, 2, K] float64 says how many of its structures
    have a weight in L_E and in L_F.
    """

    arguments: Sequence[tuple]
    counts: Tensor


class Step(Protocol):
    """What the trainer needs to train on batches and to predict."""

    @property
    def run(self) -> Callable[..., None]:
        """Forward and backward pass of a batch: the gradient and the losses of the task weights are written."""

    def batches(self, order: Tensor, size: int, errors: EpochErrors) -> Batches:
        """Everything of an epoch that does not depend on the weights.

        Parameters
        ----------
        order
            [n] int64, the training structures in the order of the epoch.
        size
            Structures in a batch.
        errors
            Receives the energy residuals and force errors.
        """

    def predict(self, first: int, last: int, size: int) -> tuple[Tensor, Tensor | None]:
        """Energies [K, last − first] without single-atom energies, and forces [K, n_atoms, 3], of some structures.

        They are consecutive, from `first` on. Computed `size` structures at a time, under `torch.inference_mode`.
        Forces are None if there are none.
        """


def make_step(model: EnergyModel, data: Dataset, tasks: TaskWeights, config: TrainingConfig, with_forces: bool) -> Step:
    """What trains and evaluates a model on energies, or on energies and forces.

    Descriptors that it keeps are computed or read here.
    """
    started = time.monotonic()
    if with_forces and not (config.loss.forces and config.jacobian == "stored"):
        return FusedStep(Source.coordinates(model, data), model, data, tasks)
    # A plan of batches makes a GPU wait.
    planned = not with_forces and data.levels == 1 and data.origin.device.type == "cpu"
    step = (
        PlannedStep(model, data, tasks)
        if planned
        else FusedStep(Source.descriptors(model, data, with_forces), model, data, tasks)
    )
    kept = "descriptors and Jacobians" if with_forces else "descriptors"
    log.info("%s of %d atoms in %.2f s", kept, data.n_atoms, time.monotonic() - started)
    return step


class PlannedStep:
    """Energies of one level of theory from descriptors that are kept, the atoms of each batch sorted by species."""

    def __init__(self, model: EnergyModel, data: Dataset, tasks: TaskWeights) -> None:
        self._networks, self._data, self._tasks = model.networks, data, tasks
        self._n_species = len(model.elements)
        self._features = data.descriptors(model, jacobian=False).features
        self._plans: dict[tuple[int, int, int], list[ops.Batch]] = {}

    def batches(self, order: Tensor, size: int, errors: EpochErrors) -> Batches:
        """See `Step`."""
        data = self._data
        planned = ops.plan_batches(data.species, data.offsets, order, size, self._n_species)
        targets, weights = data.energies[0][order].split(size), data.energy_weights[0][order].split(size)
        arguments = zip(planned, targets, weights, errors.lowest_energies, strict=True)
        return Batches(list(arguments), data.counts(order, size))

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
            count = torch.count_nonzero(weights).clamp_(min=1)
            tasks.losses[0] = (weights * residuals.square()).sum() / count

    def predict(self, first: int, last: int, size: int) -> tuple[Tensor, None]:
        """See `Step`."""
        data, key = self._data, (first, last, size)
        if key not in self._plans:
            structures = torch.arange(first, last, device=data.offsets.device)
            self._plans[key] = ops.plan_batches(data.species, data.offsets, structures, size, self._n_species)
        energies = [data.energies[0, :0]]
        with torch.inference_mode():
            for batch in self._plans[key]:
                sorted_atoms = batch.rows, batch.owners, batch.starts
                energies.append(self._networks.energies(self._features, *sorted_atoms, len(batch.structures)))
            return torch.cat(energies)[None], None


@dataclass(frozen=True)
class Source:
    """What energies and forces are computed from, and the ops that do it.

    Parameters
    ----------
    step, evaluate
        The ops for a batch and for predictions; both begin with `of_atoms`, species and offsets.
    of_atoms
        Tensors of all N atoms, [N, ...].
    descriptor
        What the ops take between the other arguments and the networks' sizes.
    with_forces
        Whether there are forces.
    """

    step: Callable[..., None]
    evaluate: Callable[..., tuple[Tensor, Tensor]]
    of_atoms: tuple[Tensor | None, ...]
    descriptor: tuple[Any, ...]
    with_forces: bool

    @classmethod
    def coordinates(cls, model: EnergyModel, data: Dataset) -> Source:
        """Descriptors and their derivatives are computed anew in every step."""
        return cls(ops.force_step, ops.energy_forces, (data.coordinates,), (model.aev.packed,), True)

    @classmethod
    def descriptors(cls, model: EnergyModel, data: Dataset, jacobian: bool) -> Source:
        """Descriptors are computed or read once and kept, and their Jacobians if there shall be forces."""
        found = data.descriptors(model, jacobian)
        of_atoms = found.features, found.jacobian
        return cls(ops.force_step_stored, ops.energy_forces_stored, of_atoms, (), jacobian)


class FusedStep:
    """Energies, and forces if the source gives them, of any number of levels of theory, with one op for a batch."""

    def __init__(self, source: Source, model: EnergyModel, data: Dataset, tasks: TaskWeights) -> None:
        networks = model.networks
        self._source, self._weights, self._data, self._tasks = source, networks.weights, data, tasks
        self._settings = (*source.descriptor, networks.sizes, networks.activation_codes, networks.biases)
        self.run = source.step

    def batches(self, order: Tensor, size: int, errors: EpochErrors) -> Batches:
        """See `Step`."""
        data, tasks, weights = self._data, self._tasks, self._weights
        if weights.grad is None:
            weights.grad = torch.empty_like(weights)
        before = (*self._source.of_atoms, data.species, data.offsets)
        targets = _for_ops(data.energies, data.forces, data.energy_weights, data.force_weights)
        middle = (weights.detach(), *targets, tasks.scales[:2])
        after = (tasks.losses[:2], weights.grad, *self._settings)
        parts = zip(order.split(size), _for_ops(*errors.energies), _for_ops(*errors.forces), strict=True)
        arguments = [(*before, structures, *middle, *outputs, *after) for structures, *outputs in parts]
        return Batches(arguments, data.counts(order, size))

    def predict(self, first: int, last: int, size: int) -> tuple[Tensor, Tensor | None]:
        """See `Step`."""
        data, weights, source = self._data, self._weights, self._source
        starts = data.offsets[first : last + 1].tolist()
        energies, forces = [data.energies[:, :0]], [data.forces[:, :0].to(weights.dtype)]
        with torch.inference_mode():
            for low in range(0, last - first, size):
                high = min(low + size, last - first)
                atoms = slice(starts[low], starts[high])
                offsets = data.offsets[first + low : first + high + 1] - starts[low]
                of_atoms = [tensor if tensor is None else tensor[atoms] for tensor in source.of_atoms]
                inputs = (*of_atoms, data.species[atoms], offsets, weights, None, *self._settings)
                energy, force = source.evaluate(*inputs, data.levels > 1)
                energies.append(energy.view(data.levels, -1))
                forces.append(force.view(data.levels, -1, 3))
            return torch.cat(energies, dim=1), torch.cat(forces, dim=1) if source.with_forces else None


def _for_ops(*tensors: Tensor) -> list[Tensor]:
    """Tensors [K, ...] as the ops take them: without the dimension of levels where there is one level."""
    return [tensor.squeeze(0) if len(tensor) == 1 else tensor for tensor in tensors]
