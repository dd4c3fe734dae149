"""Learning-rate schedules, stepped once an epoch."""

from __future__ import annotations

import warnings

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, ReduceLROnPlateau, StepLR

from kinml_fast.train.config import SchedulerConfig


def make_scheduler(optimizer: Optimizer, config: SchedulerConfig) -> LRScheduler | None:
    """The schedule that the configuration names; None for none."""
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
    return None


def advance(scheduler: LRScheduler | None, validation_rmse: float) -> None:
    """Take the step at the end of an epoch.

    Parameters
    ----------
    scheduler
        From `make_scheduler`.
    validation_rmse
        kcal/mol; what a plateau is judged by.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(validation_rmse)
    elif scheduler is not None:
        with warnings.catch_warnings():
            # torch warns when the optimizer has made no step before this, which is so if a run resumes at the very end
            # of its first epoch.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            scheduler.step()
