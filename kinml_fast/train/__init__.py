"""Training: configuration, trainer, run folder."""

from kinml_fast.train.config import Config, TrainingConfig, load
from kinml_fast.train.dataset import TrainingData
from kinml_fast.train.loss import LossBatch
from kinml_fast.train.results import Summary
from kinml_fast.train.runs import resume, start
from kinml_fast.train.single import make_model, prepare
from kinml_fast.train.trainer import Trainer

__all__ = [
    "Config",
    "LossBatch",
    "Summary",
    "Trainer",
    "TrainingConfig",
    "TrainingData",
    "load",
    "make_model",
    "prepare",
    "resume",
    "start",
]
