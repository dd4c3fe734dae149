"""Trains one member of an ensemble in a process of its own: `python -m kinml_fast.train.member_program RUN NUMBER`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from kinml_fast import signals
from kinml_fast.data.prepared import Prepared
from kinml_fast.errors import InputError
from kinml_fast.train import config as configuration
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.members import train_member
from kinml_fast.train.progress import Progress
from kinml_fast.train.single import prepared_before


class _WhileParentLives(Progress):
    """Ends the training when the process that started it is gone."""

    def __init__(self) -> None:
        self.parent = os.getppid()

    def batch(self, epoch: int, fraction: float) -> None:
        if os.getppid() != self.parent:
            raise KeyboardInterrupt("the process that started this one is gone")


def main(arguments: Sequence[str]) -> int:
    """Train one member of the ensemble in a run folder; the last line of the output is its summary."""
    run, number = arguments
    progress = _WhileParentLives()
    try:
        config = configuration.from_dict(configuration.read_yaml(RunFolder(run).config), run)
        config = config.model_copy(update={"run": run})
        if config.training.threads is None:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.ensemble.processes))
        data = prepared_before(config)
        assert isinstance(data, Prepared)
        with signals.at_once():
            summary = train_member(config, data, int(number), progress)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    sys.stdout.write(f"{json.dumps(asdict(summary))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
