"""A training step that several processes share, with the bits of one process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.train.epoch_errors import EpochErrors
from kinml_fast.train.ranks import Ranks
from kinml_fast.train.rhythm import Rhythm
from kinml_fast.train.steps import Batches, FusedStep, Predicted

_NOTES = 2  # numbers at the end of a message
_ALIGNMENT = 64  # bytes, of a message
_STEPS_BETWEEN_WISHES = 64  # on GPUs


@dataclass(frozen=True)
class _Exchange:
    """Messages of one batch: of all processes, and of this one before it is sent."""

    messages: Tensor
    """[n_ranks, bytes]"""
    own: Tensor
    """[bytes]"""
    notes: Tensor
    """[n_ranks + 1, 2], the end of each of them: what the step itself says"""


class SharedStep:
    """Gives each process a part of each batch; then all know all residuals and sum all gradients in one order.

    What is predicted is shared as well.

    A batch is cut as one process cuts it for its threads, which depends on the batch only. So weights and errors have
    the same bits for any number of processes, and each of them moves the weights by itself.

    Parameters
    ----------
    step
        What would train on the whole batch.
    ranks
        The processes.
    rhythm
        Of this process; learns what all processes wish to do between two batches.
    """

    def __init__(self, step: FusedStep, ranks: Ranks, rhythm: Rhythm) -> None:
        self._step, self._ranks, self._rhythm = step, ranks, rhythm
        self._device, self._steps = step.system.species.device, 0
        self._memory = torch.zeros(0, dtype=torch.uint8, device=self._device)

    def batches(self, order: Tensor, size: int, errors: EpochErrors) -> Batches:
        """See `Step`."""
        found = self._step.batches(order, size, errors)
        lengths = [
            ops.message_bytes(system, structures, loss, weights, self._ranks.size)
            for system, structures, weights, loss, *_ in found.arguments
        ]
        needed = (self._ranks.size + 1) * max(lengths, default=0) + _ALIGNMENT
        if needed > len(self._memory):
            self._memory = torch.zeros(needed, dtype=torch.uint8, device=self._device)
        together = zip(found.arguments, map(self._exchange, lengths), strict=True)
        return Batches([(*arguments, exchange) for arguments, exchange in together], found.counts)

    def _exchange(self, length: int) -> _Exchange:
        """Room for messages of so many bytes; all batches use the same."""
        first, size = -self._memory.data_ptr() % _ALIGNMENT, self._ranks.size
        rows = self._memory[first : first + (size + 1) * length].view(size + 1, length)
        return _Exchange(rows[:size], rows[size], rows.view(torch.float64)[:, -_NOTES:])

    def run(
        self,
        system: ops.System,
        structures: Tensor,
        weights: Tensor,
        loss: ops.Loss,
        results: ops.StepResults,
        model: ops.Model,
        exchange: _Exchange,
    ) -> None:
        """See `Step`."""
        ranks, own = self._ranks, exchange.own
        ops.force_step_share(system, structures, weights, loss, own, model, ranks.rank, ranks.size)
        in_message = self._device.type == "cpu"
        if in_message:
            exchange.notes[-1] = torch.tensor(self._rhythm.wishes())
        ranks.gather(own, exchange.messages)
        notes = exchange.notes[:-1] if in_message else self._wishes_now_and_then()
        self._rhythm.agree(*notes.any(dim=0).tolist())
        ops.force_step_join(system, structures, loss, exchange.messages, results)

    def _wishes_now_and_then(self) -> Tensor:
        """[n_ranks, 2] on the CPU: to look into a message would wait for the GPU."""
        self._steps += 1
        wishes = torch.zeros(self._ranks.size, 2, dtype=torch.float64)
        if self._steps % _STEPS_BETWEEN_WISHES == 0:
            self._ranks.gather(torch.tensor(self._rhythm.wishes(), dtype=torch.float64), wishes)
        return wishes

    def predict(self, first: int, last: int, size: int) -> Predicted:
        """See `Step`: each process predicts some of the structures, and all get the predictions of all."""
        ranks = self._ranks
        bounds = [first + (last - first) * rank // ranks.size for rank in range(ranks.size + 1)]
        own = self._step.predict(bounds[ranks.rank], bounds[ranks.rank + 1], size)
        energies, forces, stresses = self._gathered(own.energies, bounds), None, None
        if own.forces is not None:
            forces = self._gathered(own.forces, self._step.system.offsets[bounds].tolist())
        if own.stresses is not None:
            stresses = self._gathered(own.stresses, bounds)
        return Predicted(energies, forces, stresses)

    def _gathered(self, own: Tensor, bounds: Sequence[int]) -> Tensor:
        """[K, n, ...] of all processes, of which each has those [K, ...] between two bounds."""
        counts = [end - begin for begin, end in itertools.pairwise(bounds)]
        sent = own.new_zeros(len(own), max(counts), *own.shape[2:])  # all send as many
        sent[:, : own.shape[1]] = own
        received = sent.new_empty(len(counts), *sent.shape)
        self._ranks.gather(sent, received)
        return torch.cat([of_rank[:, :count] for of_rank, count in zip(received, counts, strict=True)], dim=1)
