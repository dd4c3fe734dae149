"""The steps of an epoch as one CUDA graph, which the GPU runs without waiting for Python."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from kinml_fast.errors import first_line
from kinml_fast.train.epoch_errors import EpochErrors
from kinml_fast.train.steps import Step
from kinml_fast.train.update import Update

log = logging.getLogger(__name__)

MOST_STEPS = 4096
"""Of a graph; a longer epoch, whose batches are large or whose data are, is run step by step."""


class CapturedEpoch:
    """Forward and backward pass and update of every batch of an epoch, recorded once and replayed for each order.

    What the steps read and write stays where it is: weights, gradient, the optimizer's state and count of steps, the
    residuals. The optimizer's numbers, such as the learning rate, are those at the time of the recording.

    Parameters
    ----------
    step
        What trains a batch. It must have run once, so that nothing is set up while it is recorded.
    optimizer
        The same.
    errors
        Receives the residuals, as in the trainer.
    count
        Structures in an epoch.
    size
        Structures in a batch.
    device
        Of the model; a GPU.
    """

    def __init__(
        self,
        step: Step,
        optimizer: torch.optim.Optimizer,
        errors: EpochErrors,
        count: int,
        size: int,
        device: torch.device,
    ) -> None:
        self._order = torch.zeros(count, dtype=torch.int64, device=device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self._graph):
            # Recorded too: what the batches consist of may be computed from the order. The graph holds addresses, so
            # that it must live as long.
            self._batches = step.batches(self._order, size, errors)
            for arguments in self._batches.arguments:
                step.run(*arguments)
                optimizer.step()

    def run(self, order: Tensor) -> None:
        """Train on the structures in this order ([count] int64)."""
        self._order.copy_(order)
        self._graph.replay()


class EpochRecorder:
    """Records an epoch on a GPU when it comes a second time with the same step, weights and numbers of the optimizer.

    Parameters
    ----------
    update
        Moves the weights; see `possible`.
    errors
        Receives the residuals.
    count
        Structures in an epoch.
    size
        Structures in a batch.
    device
        Of the model.
    """

    def __init__(self, update: Update, errors: EpochErrors, count: int, size: int, device: torch.device) -> None:
        self._update, self._errors = update, errors
        self._count, self._size, self._device = count, size, device
        self._last: tuple | None = None
        self._epoch: CapturedEpoch | None = None
        self._state: tuple[int, ...] = ()  # where that of the optimizer was when the epoch was recorded
        self._failed = False

    @property
    def possible(self) -> bool:
        """Whether epochs can be recorded at all."""
        return self._device.type == "cuda" and self._update.is_one_op and self._count <= MOST_STEPS * self._size

    def recorded(self, step: Step) -> CapturedEpoch | None:
        """An epoch of this step, if it is as the last one was; None if it has to be run step by step."""
        if not self.possible:
            return None
        now = (step, self._update.numbers(), self._update.places())
        if now != self._last:
            self._last, self._epoch, self._failed = now, None, False
            return None
        state = self._update.places_of_state()
        if state != self._state:
            self._state, self._epoch = state, None
        if self._epoch is None and not self._failed:
            try:
                self._epoch = CapturedEpoch(
                    step, self._update.optimizer, self._errors, self._count, self._size, self._device
                )
            except RuntimeError as error:
                log.warning("the steps of an epoch cannot be recorded and are run one by one: %s", first_line(error))
                self._failed = True
        return self._epoch
