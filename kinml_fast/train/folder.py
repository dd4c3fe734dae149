"""The run folder: what a run keeps on disk, and under which names."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from kinml_fast import lock
from kinml_fast.errors import InputError
from kinml_fast.train.config import written_by_run

LOGGER = logging.getLogger("kinml_fast")

MEMBER_PATIENCE = 30.0
"""Seconds in which a process that trains a member of an ensemble ends when the one that started it is gone."""


_PREVIOUS, _COMPLETE = ".previous", "complete"

_WRITTEN = (
    "config.yaml",
    "metrics.csv",
    "train.log",
    "train-*.log",
    "split.txt",
    "hessians.xyz",
    "prepared.h5",
    "prepared.blocks",
    "model.pt",
    "events.out.tfevents.*",
    "checkpoints/*.pt",
    "report/errors.csv",
    "report/learning_curves.png",
    "report/parity_*.png",
)


class RunFolder:
    """Names of what a run keeps on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.log = self.path / "train.log"
        self.prepared = self.path / "prepared.h5"
        self.split = self.path / "split.txt"
        self.hessians = self.path / "hessians.xyz"
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
        if self.holds_run():
            if not overwrite:
                raise InputError(
                    f"{self}: holds a run already: continue it with `kinml-fast train --resume {self}`, "
                    "choose another folder with run=NAME, or replace it with --overwrite"
                )
            with contextlib.ExitStack() as stack:
                for member in self.members():  # of an ensemble that was killed, a process may be about to end
                    stack.enter_context(member.hold(patience=MEMBER_PATIENCE))
                try:
                    self._set_aside()
                except OSError as error:
                    raise InputError(
                        f"{self}: the run there cannot be replaced ({error.strerror}): choose another folder with "
                        "run=NAME"
                    ) from error
            _remove_empty(self.path)
        else:
            self._check_foreign()
        self.make()

    def check_prepared(self) -> None:
        """Refuse to prepare data where a run has begun, which would lose its own.

        Raises
        ------
        InputError
            One has.
        """
        if self.holds_run():
            raise InputError(
                f"{self}: holds a run, which keeps its data: choose another folder with run=NAME, or prepare and train "
                "anew in one step with kinml-fast train --overwrite"
            )
        self._check_foreign()

    def holds_run(self) -> bool:
        """Whether a run has begun here."""
        return self.metrics.exists() or self.last.exists() or bool(self.members())

    def accept(self) -> None:
        """The new run has begun: what `create` has set aside can go."""
        for path in _written(self._previous):
            path.unlink(missing_ok=True)
        (self._previous / _COMPLETE).unlink(missing_ok=True)
        _remove_empty(self._previous)

    def restore(self) -> None:
        """Bring back what `create` has set aside for a run that has not begun, be it that its process was killed."""
        if not self._previous.is_dir():
            return
        complete = self._previous / _COMPLETE
        if complete.exists():
            if self.last.exists() or any(member.last.exists() for member in self.members()):
                self.accept()  # as the process was about to
                return
            for path in _written(self.path):  # by the new run
                if path not in self._data or self._aside(path).exists():
                    path.unlink(missing_ok=True)
            _remove_empty(self.path)
            complete.unlink()
        for path in _written(self._previous):
            target = self.path / path.relative_to(self._previous)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            path.unlink(missing_ok=True)  # another name of the same file
        _remove_empty(self._previous)

    @property
    def _previous(self) -> Path:
        """Where a run that is replaced waits until the new one has begun."""
        return self.path / _PREVIOUS

    @property
    def _data(self) -> tuple[Path, ...]:
        return self.prepared, self.prepared.with_suffix(".blocks"), self.split

    def _aside(self, path: Path) -> Path:
        return self._previous / path.relative_to(self.path)

    def _set_aside(self) -> None:
        for path in _written(self.path):
            target = self._aside(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in self._data:  # which may serve the new run as well
                _link(path, target)
            else:
                path.replace(target)
        (self._previous / _COMPLETE).touch()

    def _check_foreign(self) -> None:
        """Refuse a folder in which a run would write over files that no run has written."""
        if self.config.exists() and not written_by_run(self.config):
            raise InputError(
                f"{self.config}: was not written by a run, and one in this folder would write over it: choose another "
                "folder with run=NAME"
            )
        for path in (self.model, self.best, self.report / "errors.csv"):
            if path.exists() and not self.config.exists():
                raise InputError(
                    f"{path}: belongs to no run, and a run in this folder would write over it: choose another folder "
                    "with run=NAME"
                )

    def hold(self, *, training: bool = False, patience: float = 0.0) -> lock.Hold:
        """Keep other runs out of the folder; see `lock.hold`."""
        held = lock.hold(self.path, training=training, patience=patience)
        if held.first:  # no process is about to begin a new run here
            self.restore()
        return held

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


def _written(place: Path) -> Iterator[Path]:
    """What runs write, of that which is in a folder."""
    for folder in (place, *place.glob("member-*")):
        for pattern in _WRITTEN:
            yield from folder.glob(pattern)


def _remove_empty(place: Path) -> None:
    """Remove the folders within a run folder in which nothing is left, and that of a run that was set aside."""
    for folder in (*place.glob("member-*"), place):
        made = [folder / "checkpoints", folder / "report"]
        if folder != place or place.name == _PREVIOUS:
            made.append(folder)
        for path in made:
            with contextlib.suppress(OSError):  # not there, or not empty
                path.rmdir()


def _link(path: Path, target: Path) -> None:
    """Another name for a file that is only ever replaced as a whole; a copy where a file has but one."""
    try:
        target.hardlink_to(path)
    except OSError:
        shutil.copy2(path, target)
