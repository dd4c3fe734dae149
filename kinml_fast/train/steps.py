"""What trains on a batch and predicts: forward and backward pass in one call, without autograd.

`FusedStep` is one op for a batch: for any number of levels of theory, on CPUs and GPUs, for energies and forces or for
energies alone, from coordinates or stored descriptors. A trainer calls `batches` once for each stretch of an epoch,
which mostly is all of it, and `run` with the arguments of each batch: what need not be done in each step is done there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.nn import EnergyModel
from kinml_fast.train.config import TrainingConfig
from kinml_fast.train.epoch_errors import EpochErrors
from kinml_fast.train.loss import TaskWeights
from kinml_fast.train.window import Window

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batches:
    """The batches of a stretch of an epoch.

    `arguments` are those of `Step.run` for each; `counts` [n_batches, 2, K] float64 says how many of its structures
    have a weight in L_E and in L_F; of a step with stresses [n_batches, 3, K], in L_S too.
    """

    arguments: Sequence[tuple]
    counts: Tensor


class Predicted(NamedTuple):
    """What a step predicts of n structures.

    `energies` [K, n] are without single-atom energies, eV; `forces` [K, n_atoms, 3], eV/Å, and `stresses` [K, n, 3, 3]
    float64, eV/Å³, of molecules NaN, are None of a step without.
    """

    energies: Tensor
    forces: Tensor | None = None
    stresses: Tensor | None = None


class Step(Protocol):
    """What the trainer needs to train on batches and to predict."""

    @property
    def run(self) -> Callable[..., None]:
        """Forward and backward pass of a batch: the gradient and the losses of the task weights are written."""

    def batches(self, order: Tensor, size: int, errors: EpochErrors) -> Batches:
        """Everything of some consecutive batches that does not depend on the weights.

        Parameters
        ----------
        order
            [n] int64, the training structures in the order of the epoch: places in the window of the step.
        size
            Structures in a batch.
        errors
            Receives the energy residuals and force errors: those of a stretch of as many structures.
        """

    def predict(self, first: int, last: int, size: int) -> Predicted:
        """Energies, forces and stresses of some structures, consecutive from `first` on.

        Computed `size` structures at a time, under `torch.inference_mode`.
        """


def make_step(
    model: EnergyModel,
    data: Window,
    tasks: TaskWeights,
    config: TrainingConfig,
    with_forces: bool,
) -> FusedStep:
    """What trains and evaluates a model on energies, or on energies, forces and stresses, of a window's structures.

    Descriptors that it keeps are computed or read here; of a window that does not last none are kept.
    """
    started = time.monotonic()
    if not data.lasting or (with_forces and not (config.loss.forces and config.jacobian == "stored")):
        system = ops.System(data.coordinates, data.species, data.offsets, cells=data.cells, periodic=data.periodic)
        return FusedStep(system, model, data, tasks, with_forces)
    found = data.descriptors(model, jacobian=with_forces)
    system = ops.System(None, data.species, data.offsets, found.features, found.jacobian)
    step = FusedStep(system, model, data, tasks, with_forces)
    kept = "descriptors and Jacobians" if with_forces else "descriptors"
    log.info("%s of %d atoms in %.2f s", kept, data.n_atoms, time.monotonic() - started)
    return step


class FusedStep:
    """Energies, or energies and forces, also stresses, of any number of levels of theory, with one op for a batch.

    Attributes
    ----------
    system : ops.System
        The structures.
    """

    run = staticmethod(ops.force_step)

    def __init__(
        self, system: ops.System, model: EnergyModel, data: Window, tasks: TaskWeights, with_forces: bool
    ) -> None:
        self._with_forces, self._with_stresses = with_forces, with_forces and data.stresses is not None
        self.system, self._weights, self._data, self._tasks = system, model.networks.weights, data, tasks
        self._model = ops.Model(model.aev.packed, model.networks.packed)
        weights = [data.energy_weights, data.force_weights]
        if self._with_stresses and data.stress_weights is not None:
            weights.append(data.stress_weights)
        self._weighted = ops.weighted(*weights)

    def batches(self, order: Tensor, size: int, errors: EpochErrors) -> Batches:
        """See `Step`."""
        data = self._data
        weights, gradient = _training(self._weights)
        terms = 3 if self._with_stresses else 2
        scales, losses = self._tasks.scales[:terms], self._tasks.losses[:terms]
        counts = ops.count_weights(self._weighted, order, size)
        forces, force_weights = (data.forces, data.force_weights) if self._with_forces else (None, None)
        targets = data.energies, data.energy_weights, forces, force_weights
        stresses, stress_weights = (data.stresses, data.stress_weights) if self._with_stresses else (None, None)
        parts = zip(order.split(size), counts.unbind(0), errors.energies, errors.forces, strict=True)
        arguments = []
        for structures, own_counts, residuals, force_errors in parts:
            loss = ops.Loss(*targets, scales, own_counts, stresses, stress_weights)
            if force_errors.shape[2] > 3 and not self._with_stresses:  # an epoch on energies of a run on stresses
                force_errors = force_errors.new_zeros(*force_errors.shape[:2], 3)
            results = ops.StepResults(losses, gradient, residuals, force_errors)
            arguments.append((self.system, structures, weights, loss, results, self._model))
        return Batches(arguments, counts)

    def predict(self, first: int, last: int, size: int) -> Predicted:
        """See `Step`."""
        data, weights = self._data, self._weights
        energies, forces = [data.energies[:, :0]], [data.forces[:, :0].to(weights.dtype)]
        stresses = [data.energies.new_zeros(len(data.energies), 0, 3, 3)]
        with torch.inference_mode():
            for low in range(first, last, size):
                some = self.system.between(low, min(low + size, last))
                if not self._with_forces and some.features is None:
                    features = ops.aev(some, self._model.descriptor)  # forces would take more than the rest
                    some = ops.System(None, some.species, some.offsets, features)
                if self._with_stresses and some.cells is not None and some.periodic is not None:
                    energy, force, virials, *_ = ops.energy_forces_virials(some, weights, None, self._model)
                    volumes = torch.where(some.periodic.any(dim=1), torch.linalg.det(some.cells).abs(), torch.nan)
                    stresses.append(virials / volumes[:, None, None])
                else:
                    energy, force = ops.energy_forces(some, weights, None, self._model)
                energies.append(energy)
                forces.append(force)
            return Predicted(
                torch.cat(energies, dim=1),
                torch.cat(forces, dim=1) if self._with_forces else None,
                torch.cat(stresses, dim=1) if self._with_stresses else None,
            )


def _training(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weights, without autograd, and where a step writes their gradient."""
    if weights.grad is None:
        weights.grad = torch.empty_like(weights)
    return weights.detach(), weights.grad
