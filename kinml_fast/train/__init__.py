"""Training: from a configuration to a model file.

`runs` starts and resumes what a configuration describes: one model (`single`) or an ensemble (`ensembles`, `members`,
`member_program`), in a `folder` that a `lock` keeps for it; `ranks` are the processes that do so together, `meeting`
where they find one another, `board` what they say beside their tensors, `parts` groups of them that train different
members. `trainer` goes through the epochs with objects
that have one subject each: `dataset` the structures, `window` those of them that are in memory as tensors, `steps` a
batch forward and backward, `shared` the same in several processes, `update` how the weights move, `judge` which ones
are the best, `state` where the run is, `store` the run on disk, `rhythm` what is due by the clock, `captured` epochs as
graphs on a GPU, `results` what is said at the end.

Inside, energies, forces, weights and errors have a leading dimension of K levels of theory, also for K = 1; files and
what a user gets have none where there is one level.
"""

from kinml_fast.data.training_data import TrainingData
from kinml_fast.train.config import Config, TrainingConfig, load
from kinml_fast.train.loss import LossBatch
from kinml_fast.train.ranks import Ranks, joined
from kinml_fast.train.results import Summary
from kinml_fast.train.runs import resume, start
from kinml_fast.train.single import make_model, prepare
from kinml_fast.train.trainer import Trainer

__all__ = [
    "Config",
    "LossBatch",
    "Ranks",
    "Summary",
    "Trainer",
    "TrainingConfig",
    "TrainingData",
    "joined",
    "load",
    "make_model",
    "prepare",
    "resume",
    "start",
]
