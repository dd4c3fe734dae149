"""Which weights of a run are the best ones, and when it has waited long enough for better ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kinml_fast.metrics import Errors
from kinml_fast.nn import EnergyModel
from kinml_fast.train.config import TrainingConfig
from kinml_fast.train.metrics import LevelErrors


@dataclass(frozen=True)
class Best:
    """The weights with the lowest score so far: the epoch that they are of (−1: the initial ones), and a copy."""

    epoch: int
    score: float
    weights: dict[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """What files say about it."""
        return {"epoch": self.epoch, "score": self.score, "weights": self.weights}


class Judge:
    """Judges a model after each epoch by its errors on the validation set; see `ScoreConfig`.

    Parameters
    ----------
    config
        Says what counts, and when to stop early.
    levels
        Levels of theory.
    model
        What is judged, with its initial weights.

    Attributes
    ----------
    best : Best
        The weights with the lowest score.
    """

    def __init__(self, config: TrainingConfig, levels: int, model: EnergyModel) -> None:
        self._stopping, self._model = config.early_stopping, model
        self._factors: dict[str, Any] = {
            "energy": config.score.energy,
            "forces": config.score.forces if config.loss.forces else 0.0,
            "levels": config.score.level_factors(levels),
        }
        if config.loss.stresses:
            self._factors["stresses"] = config.score.stresses
        self.best = Best(-1, math.inf, copied_weights(model))
        self._lowest, self._waited = math.inf, 0  # the score that early stopping compares with, and epochs since

    def score(self, validation: Sequence[LevelErrors]) -> float:
        """The sum, kcal/mol, of the errors of each level times their factors; infinite or NaN if one that counts is."""
        total, factors = 0.0, self._factors
        for factor, errors in zip(factors["levels"], validation, strict=True):
            if factor:
                of_level = factors["energy"] * _rmse(errors.energy) + factors["forces"] * _rmse(errors.forces)
                if "stresses" in factors:
                    of_level += factors["stresses"] * _rmse(errors.stress)
                total += factor * of_level
        return total

    def judge(self, epoch: int, score: float) -> None:
        """Remember the model's present weights if they are the best, and count the epochs without a better score."""
        if score < self.best.score:
            self.best = Best(epoch, score, copied_weights(self._model))
        if score < self._lowest - self._stopping.min_delta:
            self._lowest, self._waited = score, 0
        else:
            self._waited += 1

    def begin_anew(self) -> None:
        """Take the model's present weights for the best ones until a score is known."""
        self.best = Best(-1, math.inf, copied_weights(self._model))

    @property
    def out_of_patience(self) -> bool:
        """Whether to stop early."""
        patience = self._stopping.patience
        return patience is not None and self._waited >= patience

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: what the score is, the best weights, and how long the wait has been."""
        stopping = {"score": self._lowest, "waited": self._waited}
        return {"score": self._factors, "best": self.best.to_dict(), "stopping": stopping}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Take over what `state_dict` gave, unless the score was another one then; whether it was taken over."""
        if state["score"] != self._factors:
            return False
        self.best = Best(**state["best"])
        self._lowest, self._waited = state["stopping"]["score"], state["stopping"]["waited"]
        return True


def _rmse(errors: Errors | None) -> float:
    """What nothing is known of counts nothing; `Dataset` has seen to it that this is meant."""
    return 0.0 if errors is None else errors.rmse


def copied_weights(model: EnergyModel) -> dict[str, Tensor]:
    """A copy of the weights of a model and of its single-atom energies, as they are now."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
