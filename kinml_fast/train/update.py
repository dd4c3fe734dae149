"""How the weights move after each batch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kinml_fast.nn import EnergyModel
from kinml_fast.train.config import TrainingConfig
from kinml_fast.train.freezing import FrozenLayers
from kinml_fast.train.loss import TaskWeights
from kinml_fast.train.optimizers import FusedAdam, WeightAverage, make_optimizer
from kinml_fast.train.schedulers import advance, forget_best, make_scheduler

log = logging.getLogger(__name__)


class Update:
    """Clips the gradient, lets the optimizer step, puts frozen layers back, and averages the weights.

    Parameters
    ----------
    model
        Its parameters are moved.
    config
        Optimizer, schedule, longest gradient, decay of the average.
    tasks
        The factors of the loss, which the optimizer moves too if they are learned.
    freeze
        Layers that stay as they are; see `FrozenLayers`.

    Attributes
    ----------
    tasks : TaskWeights
    optimizer : torch.optim.Optimizer
    scheduler : LRScheduler or None
    average : WeightAverage or None

    Raises
    ------
    InputError
        Names that no layer has.
    """

    def __init__(
        self, model: EnergyModel, config: TrainingConfig, tasks: TaskWeights, freeze: Sequence[str] = ()
    ) -> None:
        self.tasks = tasks
        self._model, self._clip = model, config.gradient_clip
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        learned = [] if tasks.log_sigma is None else [tasks.log_sigma]
        self.optimizer = make_optimizer([*self._parameters, *learned], config.optimizer)
        self.scheduler = make_scheduler(self.optimizer, config.scheduler, config.epochs)
        self.average = None if config.ema_decay is None else WeightAverage(self._parameters, config.ema_decay)
        self._frozen = FrozenLayers(model, freeze) if freeze else None

    @property
    def learning_rate(self) -> float:
        """The present one."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the frozen layers."""
        return () if self._frozen is None else self._frozen.names

    @property
    def is_one_op(self) -> bool:
        """Whether a step is one op on the weights, and nothing in it is decided by Python."""
        alone = self._clip is None and self._frozen is None and self.average is None
        return alone and isinstance(self.optimizer, FusedAdam)

    def numbers(self) -> tuple:
        """The optimizer's numbers: learning rate, betas, weight decay and whatever else its groups have."""
        groups = self.optimizer.param_groups
        return tuple(tuple((name, value) for name, value in group.items() if name != "params") for group in groups)

    def places(self) -> tuple[int, ...]:
        """Where weights and gradients lie in memory."""
        tensors = [t for parameter in self._parameters for t in (parameter, parameter.grad) if t is not None]
        return tuple(tensor.data_ptr() for tensor in tensors)

    def places_of_state(self) -> tuple[int, ...]:
        """The same of what the optimizer keeps, which it makes in its first step."""
        states = [self.optimizer.state.get(parameter, {}) for parameter in self._parameters]
        return tuple(t.data_ptr() for state in states for t in state.values() if isinstance(t, Tensor))

    def hold(self) -> None:
        """Let frozen layers, and their part of the average, be the weights that the model has now."""
        if self._frozen is None:
            return
        self._frozen.hold()
        if self.average is not None:
            for average, weights in zip(self.average.averages, self.average.parameters, strict=True):
                if weights.data_ptr() == self._model.networks.weights.data_ptr():
                    torch._foreach_copy_(self._frozen.parts(average), self._frozen.parts(weights))
        numbers = self._frozen.count, self._model.networks.weights.numel()
        log.info("frozen: %s (%d of %d weights)", ", ".join(self._frozen.names), *numbers)

    def step(self, terms: Tensor | None) -> None:
        """Move the weights after the forward and backward pass of a batch.

        Parameters
        ----------
        terms
            Which terms of the loss the batch has, [T] (`TaskWeights.terms`), if their factors are learned; else None.
        """
        if terms is not None:
            self.tasks.differentiate(terms)
        if self._frozen is not None:
            self._frozen.clear_gradient()
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self.optimizer.step()
        if self._frozen is not None:
            self._frozen.restore()
        if terms is not None:
            self.tasks.refresh()
        if self.average is not None:
            self.average.update()

    def end_epoch(self, score: float) -> None:
        """Let the schedule change the learning rate; a plateau is judged by the score."""
        advance(self.scheduler, score)

    def forget_scores(self) -> None:
        """Start a plateau anew, because the score is another one than before."""
        forget_best(self.scheduler)

    def judged(self) -> contextlib.AbstractContextManager[None]:
        """Let the model have the weights that are judged and saved: their average, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "tasks": self.tasks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "frozen": list(self.frozen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; what is frozen is not changed.

        Raises
        ------
        KeyError, RuntimeError, ValueError, TypeError
            It is not whole, or of another kind of training.
        """
        self.tasks.load_state_dict(state["tasks"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
