"""What a user sees of a run while it goes: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from kinml_fast.train.metrics import Row

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)

SHOWN_LIVE = {"live": True}
"""`extra` of a log line that says what a live line shows: a terminal that has one does without."""

_SECONDS_BETWEEN_COUNTS = 0.2
SECONDS_BETWEEN_LINES = 1.0
"""Plain lines come at least this far apart; short epochs in between have none (metrics.csv has them all)."""


class Progress:
    """Reports by log lines.

    The trainer calls `begin`, then `batch` a few times a second and `epoch` after each epoch, then `end`.

    Attributes
    ----------
    processes : int
        How many train together; rates are those of all.
    console : Console or None
        The terminal, if there is one.
    heading : str
        What the training is a part of; the live line begins with it.
    member : str
        Which model of an ensemble is trained.
    errors : str
        What the live line says of a model when none is trained.
    """

    processes = 1
    console: Console | None = None
    heading = member = errors = ""

    def count(self, what: str, done: float, total: int) -> None:
        """Something else than training is going on, and this much of it is done."""

    def begin(self, epochs: int, first: int) -> None:
        """A run from epoch `first` to `epochs` starts."""
        self.epochs, self.first = epochs, first
        self.started = time.monotonic()
        self.next_line = 0.0

    def batch(self, epoch: int, fraction: float) -> None:
        """The given fraction of an epoch's batches is done."""

    def epoch(self, train: Row, validation: Row, test: Row | None = None) -> None:
        """An epoch is done, and the test set was evaluated if there is a row of it."""
        now = time.monotonic()
        if now >= self.next_line or train.epoch + 1 == self.epochs:
            self.next_line = now + SECONDS_BETWEEN_LINES
            log.info("%s", self.line(train, validation), extra=SHOWN_LIVE)

    def end(self) -> None:
        """The run has ended, for whatever reason."""

    def seconds_left(self, done: float) -> float:
        """Expected seconds until the last epoch, when `done` epochs are done."""
        passed = time.monotonic() - self.started
        return passed / max(done - self.first, 1e-9) * (self.epochs - done)

    def rate(self, train: Row) -> str:
        """How fast an epoch was, in words."""
        by = f" by {self.processes} processes" if self.processes > 1 else ""
        return f"{train.structures_per_second:,.0f} structures/s{by}"

    def line(self, train: Row, validation: Row) -> str:
        """An epoch in words."""
        return (
            f"epoch {train.epoch}/{self.epochs - 1}: {_errors(train, validation)}, lr {train.lr:.3g}, "
            f"{self.rate(train)}, {_clock(self.seconds_left(train.epoch + 1))} left"
        )


class LiveProgress(Progress):
    """Reports by a line that changes in place, and by log lines for files."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        self.console = console
        # Where the terminal is narrow, the text takes several lines.
        text = TextColumn("{task.description}", table_column=Column(no_wrap=False))
        columns = (TextColumn("{task.fields[place]}"), BarColumn(20), text)
        # The trainer's own rhythm draws it: no thread that takes the interpreter away from short batches.
        self.bar = Bar(*columns, console=console, auto_refresh=False, transient=True)
        self.line_shown = self.bar.add_task("", place="")
        self.text = "waiting for the first epoch"
        self.next_count = 0.0

    def begin(self, epochs: int, first: int) -> None:
        """A run from epoch `first` to `epochs` starts."""
        super().begin(epochs, first)
        self._show(self._place(first), first, epochs, self.text)

    def batch(self, epoch: int, fraction: float) -> None:
        """The given fraction of an epoch's batches is done."""
        done = epoch + fraction
        left = f"{_clock(self.seconds_left(done))} left"
        self._show(self._place(epoch), done, self.epochs, f"{self.text}  {left}")

    def epoch(self, train: Row, validation: Row, test: Row | None = None) -> None:
        """An epoch is done."""
        super().epoch(train, validation, test)
        self.text = f"{_errors(train, validation)}  {self.rate(train)}"

    def count(self, what: str, done: float, total: int) -> None:
        """Something else than training is going on; it is drawn a few times a second, and when it begins and ends."""
        now = time.monotonic()
        if now >= self.next_count or done in (0, total):
            self.next_count = now + _SECONDS_BETWEEN_COUNTS
            self._show(what, done, total, ", ".join(filter(None, (f"{int(done)} of {total}", self.errors))))

    def end(self) -> None:
        """The run has ended, for whatever reason."""
        self.bar.stop()

    def _place(self, epoch: int) -> str:
        return ", ".join(filter(None, (self.member, f"epoch {epoch}/{self.epochs - 1}")))

    def _show(self, what: str, done: float, total: int, text: str) -> None:
        place = ": ".join(filter(None, (self.heading, what)))
        self.bar.start()
        self.bar.update(self.line_shown, completed=done, total=total, description=text, place=place, refresh=True)


def _errors(train: Row, validation: Row) -> str:
    units = {"energy_rmse": "kcal/mol", "forces_rmse": "kcal/mol/Å", "stress_rmse": "GPa"}
    values = validation.values()
    found = [unit for name, unit in units.items() if any(column.startswith(name) for column in values)]
    unit = " and ".join(found or ["kcal/mol"])
    return f"train RMSE {train.rmse()}, validation RMSE {validation.rmse()} {unit}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
