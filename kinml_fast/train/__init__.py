"""Training: configuration, trainer, run folder."""

from kinml_fast.train.config import Config, TrainingConfig, load
from kinml_fast.train.runs import make_model, prepare, resume, start
from kinml_fast.train.trainer import Summary, Trainer, TrainingData

__all__ = [
    "Config",
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
