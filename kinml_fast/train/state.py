"""Where a run is, and what a checkpoint holds of it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinml_fast.errors import ConfigError, DataError, InputError, ModelError, first_line
from kinml_fast.nn import EnergyModel
from kinml_fast.train import checkpoint
from kinml_fast.train.config import CHANGEABLE, TrainingConfig, flat
from kinml_fast.train.dataset import Dataset
from kinml_fast.train.epoch_errors import EpochErrors
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.judge import Judge, copied_weights
from kinml_fast.train.update import Update

log = logging.getLogger(__name__)


class RunState:
    """All that changes in a run, from which it goes on with the same bits.

    Parameters
    ----------
    model, config, data, update, judge
        Those of the run. What is in them is put into a checkpoint and taken from it.

    Attributes
    ----------
    epoch, batch : int
        So many batches of this epoch (from 0) are done.
    elapsed : float
        Seconds that they took.
    errors : EpochErrors
        Those of the epoch so far.
    metrics_length : int
        Bytes of metrics.csv that are of the run so far.
    """

    def __init__(self, model: EnergyModel, config: TrainingConfig, data: Dataset, update: Update, judge: Judge) -> None:
        self.model, self.config, self.update, self.judge = model, config, update, judge
        self._data = data
        self.epoch = self.batch = self.metrics_length = 0
        self.elapsed = 0.0
        self.errors = EpochErrors(data.levels, config.batch_size, model.sae.device, config.loss.stresses)

    @property
    def is_finite(self) -> bool:
        """Whether all errors of the epoch so far are finite, as far as they are known."""
        return self.errors.is_finite(self.batch)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "model": self.model.to_dict(),
            "training": self.config.model_dump(),
            "data": self._data.fingerprint,
            "weights": copied_weights(self.model),
            **self.update.state_dict(),
            "random": checkpoint.random_states(),
            "epoch": self.epoch,
            "batch": self.batch,
            "elapsed": self.elapsed,
            **self.errors.state_dict(self.batch),
            **self.judge.state_dict(),
            "metrics_length": self.metrics_length,
        }

    def identity(self) -> dict[str, Any]:
        """What must be alike in all processes that train together, by name."""
        settings = flat({"training": self.config.model_dump(exclude={"device", "threads"})})
        weights = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return {
            **{f"model.{key}": value for key, value in self.model.to_dict().items()},
            **settings,
            "data": self._data.fingerprint[:12],
            "weights": weights.hexdigest()[:12],
            "epoch and batch to begin with": (self.epoch, self.batch),
        }

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. If the score is another one than then, the best model is looked for from here on.

        Parameters
        ----------
        path
            Its file, for the messages.
        state
            What it holds.

        Raises
        ------
        InputError
            It is of another model, configuration or data, or not whole.
        """
        self._check_belongs(path, state)
        try:
            self.model.load_state_dict(state["weights"])
            self.update.load_state_dict(state)
            checkpoint.set_random_states(state["random"])
            self.epoch, self.batch, self.elapsed = state["epoch"], state["batch"], state["elapsed"]
            self.errors.load_state_dict(state)
            if not self.judge.load_state_dict(state):
                log.info("the score is another one than before: the best model is looked for from here on")
                self.update.forget_scores()
                with self.update.judged():
                    self.judge.begin_anew()
            self.metrics_length = state["metrics_length"]
            if _shapes(self.judge.best.weights) != _shapes(self.model.state_dict()):
                raise ValueError("the best weights are of another model")
        except (ArithmeticError, LookupError, RuntimeError, ValueError, TypeError) as error:
            raise ModelError(
                f"{path}: does not hold a whole run ({first_line(error)}): put an intact checkpoint there"
            ) from error

    def diverged(self, epoch: int, folder: RunFolder | None) -> InputError:
        """What to say when the loss has become infinite or NaN in an epoch of a run with this folder."""
        kept = "" if folder is None else f"; the weights before that are in {folder.checkpoints}"
        return InputError(
            f"the loss became infinite or NaN in epoch {epoch}: lower training.optimizer.learning_rate "
            f"({self.update.learning_rate:g}) or set training.gradient_clip{kept}"
        )

    def _check_belongs(self, path: Path, state: Mapping[str, Any]) -> None:
        for key, value in self.model.to_dict().items():
            before = state["model"].get(key)
            if before != value:
                raise ModelError(
                    f"{path}: is a checkpoint of another architecture ({key} is {before} there and {value} "
                    "here): resume with the configuration of that run"
                )
        settings = {**flat(TrainingConfig().model_dump(), depth=1), **flat(state["training"], depth=1)}
        for key, value in flat(self.config.model_dump(), depth=1).items():
            changeable = any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)
            if not changeable and settings.get(key) != value:
                raise ConfigError(
                    f"{path}: was written with training.{key} = {settings.get(key)} and cannot go on with {value}: "
                    f"keep it, or start a new run; what can be changed is {', '.join(sorted(CHANGEABLE))}"
                )
        frozen = set(state["frozen"]), set(self.update.frozen)
        if frozen[0] != frozen[1]:
            names = [", ".join(sorted(layers)) or "none" for layers in frozen]
            raise ConfigError(
                f"{path}: was written with other frozen layers ({names[0]}) and cannot go on with {names[1]}: keep "
                "start.freeze, or start a new run from it"
            )
        if state["data"] != self._data.fingerprint:
            raise DataError(
                f"{path}: belongs to other data (structures, energies, forces, weights, split or single-atom energies "
                "have changed): resume with the data of that run, or start a new run"
            )


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}
