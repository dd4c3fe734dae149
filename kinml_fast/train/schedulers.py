"""Learning-rate schedules, stepped once an epoch."""

from __future__ import annotations

import math
import warnings

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LRScheduler, ReduceLROnPlateau, StepLR

from kinml_fast.train.config import SchedulerConfig


def make_scheduler(optimizer: Optimizer, config: SchedulerConfig, epochs: int = 1) -> LRScheduler | None:
    """The schedule that the configuration names, for a training of so many epochs; None for none."""
    if config.name == "rop":
        return ReduceLROnPlateau(
            optimizer,
            mode="min",
            factor=config.factor,
            patience=config.patience,
            threshold=config.threshold,
            threshold_mode=config.threshold_mode,
            cooldown=config.cooldown,
            min_lr=config.min_lr,
        )
    if config.name == "exp":
        return ExponentialLR(optimizer, gamma=0.99 if config.gamma is None else config.gamma)
    if config.name == "step":
        return StepLR(optimizer, config.step_size, gamma=0.5 if config.gamma is None else config.gamma)
    if config.name == "cosine":
        length = max(config.length or epochs, 1)
        lowest = config.min_lr / optimizer.defaults["lr"]

        def factor(epoch: int) -> float:
            return lowest + (1 - lowest) * (1 + math.cos(math.pi * min(epoch / length, 1))) / 2

        return LambdaLR(optimizer, factor)
    return None


def advance(scheduler: LRScheduler | None, score: float) -> None:
    """Take the step at the end of an epoch.

    Parameters
    ----------
    scheduler
        From `make_scheduler`.
    score
        What a plateau is judged by (`train.config.ScoreConfig`).
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(score)
    elif scheduler is not None:
        with warnings.catch_warnings():
            # torch warns when the optimizer has made no step before this, which is so if a run resumes at the very end
            # of its first epoch.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            scheduler.step()


def forget_best(scheduler: LRScheduler | None) -> None:
    """Start a plateau anew, because the score is another one than before."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.best, scheduler.num_bad_epochs, scheduler.cooldown_counter = math.inf, 0, 0
