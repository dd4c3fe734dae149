"""The steps of an epoch as one CUDA graph, which the GPU runs without waiting for Python."""

from __future__ import annotations

import torch
from torch import Tensor

from kinml_fast.train.steps import EpochErrors, Step

MOST_STEPS = 4096
"""Of a graph; a longer epoch, whose batches are large or whose data are, is run step by step."""


class CapturedEpoch:
    """Forward and backward pass and update of every batch of an epoch, recorded once and replayed for each order.

    What the steps read and write stays where it is: weights, gradient, the optimizer's state and count of steps, the
    residuals. The learning rate is the one at the time of the recording.

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
        # The graph holds addresses: what the batches consist of must live as long.
        self._batches = step.batches(self._order, size, errors)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self._graph):
            for batch in self._batches:
                step.run(*batch)
                optimizer.step()

    def run(self, order: Tensor) -> None:
        """Train on the structures in this order ([count] int64)."""
        self._order.copy_(order)
        self._graph.replay()
