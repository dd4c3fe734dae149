"""The run folder: what a run keeps on disk, and under which names."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from kinml_fast.errors import InputError
from kinml_fast.train import lock

LOGGER = logging.getLogger("kinml_fast")

MEMBER_PATIENCE = 30.0
"""Seconds in which a process that trains a member of an ensemble ends when the one that started it is gone."""


class RunFolder:
    """Names of what a run keeps on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.log = self.path / "train.log"
        self.prepared = self.path / "prepared.h5"
        self.split = self.path / "split.txt"
        self.model = self.path / "model.pt"
        self.report = self.path / "report"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"

    def __str__(self) -> str:
        return str(self.path)

    def log_of(self, rank: int) -> Path:
        """The log of one of several processes; the first one's is `log`."""
        return self.log if rank == 0 else self.log.with_stem(f"{self.log.stem}-{rank}")

    def member(self, number: int) -> RunFolder:
        """The folder of a member of an ensemble, counted from 1."""
        return RunFolder(self.path / f"member-{number}")

    def members(self) -> list[RunFolder]:
        """The folders of members that are there, by number."""
        names = (path.name.removeprefix("member-") for path in self.path.glob("member-*") if path.is_dir())
        return [self.member(number) for number in sorted(int(name) for name in names if name.isdecimal())]

    def epoch(self, epoch: int) -> Path:
        """The checkpoint that is kept after an epoch (counted from 0, as in metrics.csv)."""
        return self.checkpoints / f"epoch-{epoch:04}.pt"

    def create(self, overwrite: bool = False) -> None:
        """Make the folder for a new run.

        Parameters
        ----------
        overwrite
            Remove an earlier run's files (not its prepared data, and no file that no run writes).

        Raises
        ------
        InputError
            An earlier run is there, or the folder cannot be made; a member of an ensemble is being trained there.
        """
        if self.metrics.exists() or self.last.exists() or self.members():
            if not overwrite:
                raise InputError(
                    f"{self}: holds a run already: continue it with `kinml-fast train --resume {self}`, "
                    "choose another folder with run=NAME, or replace it with --overwrite"
                )
            with contextlib.ExitStack() as stack:
                for member in self.members():  # of an ensemble that was killed, a process may be about to end
                    stack.enter_context(member.hold(patience=MEMBER_PATIENCE))
            patterns = ("events.out.tfevents.*", f"{self.log.stem}-*{self.log.suffix}")
            found = (path for pattern in patterns for path in self.path.glob(pattern))
            for path in (self.config, self.metrics, self.log, self.model, *found):
                path.unlink(missing_ok=True)
            for path in (self.checkpoints, self.report, *(member.path for member in self.members())):
                shutil.rmtree(path, ignore_errors=True)
        self.make()

    def hold(self, *, training: bool = False, patience: float = 0.0) -> lock.Hold:
        """Keep other runs out of the folder; see `lock.hold`."""
        return lock.hold(self.path, training=training, patience=patience)

    def make(self) -> None:
        """Make the folder and that of the checkpoints if they are not there.

        Raises
        ------
        InputError
            They cannot be made.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self}: cannot be made a run folder ({error.strerror}): choose another") from error

    def sweep(self) -> None:
        """Remove the temporary files of a writer that was killed."""
        for folder in (self.path, self.checkpoints, self.report):
            for path in folder.glob(".*.part"):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def logged(self, rank: int = 0) -> Iterator[None]:
        """Append what the package logs to train.log, of further processes to train-RANK.log, while the block runs.

        Whatever else shows the log shows as much of it as without.
        """
        handler = logging.FileHandler(self.log_of(rank), encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        level, shown = LOGGER.level, LOGGER.getEffectiveLevel()
        others = [other for logger in (LOGGER, LOGGER.root) for other in logger.handlers]

        def as_before(record: logging.LogRecord) -> bool:
            return record.levelno >= shown or record.name.partition(".")[0] != LOGGER.name

        for other in others:
            other.addFilter(as_before)
        LOGGER.addHandler(handler)
        LOGGER.setLevel(min(shown, logging.INFO))
        try:
            yield
        finally:
            LOGGER.setLevel(level)
            LOGGER.removeHandler(handler)
            handler.close()
            for other in others:
                other.removeFilter(as_before)
