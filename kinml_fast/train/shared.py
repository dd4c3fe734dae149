"""A training step that several processes share, with the bits of one process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.train.epoch_errors import EpochErrors
from kinml_fast.train.ranks import Ranks
from kinml_fast.train.rhythm import Rhythm
from kinml_fast.train.steps import Batches, FusedStep


@dataclass(frozen=True)
class _Share:
    """What a process does of a batch: the parts `first` to `last` of `n_parts`, the structures `begin` to `end`."""

    n_parts: int
    first: int
    last: int
    begin: int
    end: int
    bounds: Tensor


class SharedStep:
    """Gives each process some parts of a batch; then all know all residuals and sum all parts in their order.

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

    def batches(self, order: Tensor, size: int, errors: EpochErrors) -> Batches:
        """See `Step`."""
        found = self._step.batches(order, size, errors)
        arguments = []
        for system, structures, weights, loss, results, model in found.arguments:
            bounds = ops.batch_parts(system.offsets, structures)
            first, last = self._ranks.share(len(bounds) - 1)
            begin, end = bounds[[first, last]].tolist()
            share = _Share(len(bounds) - 1, first, last, begin, end, bounds[first : last + 1] - begin)
            arguments.append((system, structures, weights, loss, results, model, share))
        return Batches(arguments, found.counts)

    def run(
        self,
        system: ops.System,
        structures: Tensor,
        weights: Tensor,
        loss: ops.Loss,
        results: ops.StepResults,
        model: ops.Model,
        share: _Share,
    ) -> None:
        """See `Step`."""
        assert results.force_errors is not None
        levels, count = results.energy_residuals.shape
        ranks, own = self._ranks, slice(share.begin, share.end)
        residuals = torch.zeros(levels, share.end - share.begin, dtype=torch.float64)
        errors = torch.zeros(*residuals.shape, 3, dtype=torch.float64)
        # One row more than some have: all processes send as many.
        gradients = weights.new_zeros(-(-share.n_parts // ranks.size), len(weights))
        parts = gradients[: share.last - share.first]
        ops.force_step_parts(system, structures[own], share.bounds, weights, loss, parts, residuals, errors, model)
        # Residuals, force errors, and whether this process wants to pause or to end: zeros but for its own.
        known = torch.zeros(4 * levels * count + 2, dtype=torch.float64)
        numbers = known[:-2].view(levels, count, 4)
        numbers[:, own, 0], numbers[:, own, 1:] = residuals, errors
        known[-2], known[-1] = self._rhythm.wishes()
        ranks.add(known)
        results.energy_residuals.copy_(numbers[..., 0])
        results.force_errors.copy_(numbers[..., 1:])
        self._rhythm.agree(bool(known[-2]), bool(known[-1]))
        gathered = ranks.gather(gradients).view(ranks.size, -1, len(weights))
        everyone = (Ranks(rank, ranks.size).share(share.n_parts) for rank in range(ranks.size))
        rows = torch.cat([rows[: last - first] for rows, (first, last) in zip(gathered, everyone, strict=True)])
        ops.force_step_join(system, structures, loss, rows, results)

    def predict(self, first: int, last: int, size: int) -> tuple[Tensor, Tensor | None]:
        """See `Step`."""
        return self._step.predict(first, last, size)
