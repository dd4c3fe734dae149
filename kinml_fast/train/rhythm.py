"""What happens by the clock while a run goes, between two of its batches."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator

from kinml_fast import signals

Clock = Callable[[], float]
"""Seconds since any moment, never fewer than before."""

SYSTEM_CLOCK: Clock = time.perf_counter

_SECONDS_BETWEEN_DRAWINGS = 0.25
_SECONDS_BETWEEN_FLUSHES = 1.0


class Deadline:
    """A moment that comes again and again; it never comes before `restart`."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds
        self.moment = math.inf

    def restart(self, seconds: float | None = None) -> None:
        """Come in so many seconds from now, by default in those that always lie between two."""
        self.moment = self._clock() + (self._seconds if seconds is None else seconds)

    def passed(self) -> bool:
        """Whether the moment has come."""
        return self._clock() >= self.moment


class Rhythm:
    """Says when progress is drawn, when the run is saved and when its table is written out, and ends it on a signal.

    Parameters
    ----------
    clock
        Tells the time.
    checkpoint_seconds
        Between two savings.

    Attributes
    ----------
    flushing : Deadline
        When the rows of the table are to be written out.
    interrupted : bool
        Whether the run was asked to end; with several processes, any of them before the last batch.
    signal : int
        By which signal this process was asked, 0 if it was not: Ctrl-C (SIGINT), or one of `signals.ENDING`.
    """

    def __init__(self, clock: Clock, checkpoint_seconds: float) -> None:
        self._clock = clock
        self._drawing = Deadline(clock, _SECONDS_BETWEEN_DRAWINGS)
        self._saving = Deadline(clock, checkpoint_seconds)
        self.flushing = Deadline(clock, _SECONDS_BETWEEN_FLUSHES)
        self._next = math.inf  # of drawing and saving: all that is looked at after each batch
        self.interrupted, self.signal = False, 0
        self._agreed: bool | None = None

    def begin(self) -> None:
        """The run starts: it is drawn at once."""
        self._drawing.restart(0.0)
        self._saving.restart()
        self.flushing.restart()
        self._next = min(self._drawing.moment, self._saving.moment)

    def due(self) -> bool:
        """Whether there is something to do between two batches, for `tick`: what several processes agreed on."""
        return self._clock() >= self._next if self._agreed is None else self._agreed

    def wishes(self) -> tuple[bool, bool]:
        """Whether this process itself has something to do, and whether it was asked to end."""
        return self._clock() >= self._next, self.signal != 0

    def agree(self, due: bool, end: bool) -> None:
        """Go by what any of several processes wishes, so that all of them pause, or end, after the same batch."""
        self._agreed, self.interrupted = due or end, end

    def tick(self, draw: Callable[[], None], save: Callable[[], None] | None) -> None:
        """Do what is due.

        Parameters
        ----------
        draw
            Shows the progress.
        save
            Writes a checkpoint; None where nothing is kept on disk.

        Raises
        ------
        KeyboardInterrupt, Stopped
            The run was asked to end, by Ctrl-C or another signal; it was saved.
        """
        if self._drawing.passed():
            draw()
            self._drawing.restart()
        if save is not None and (self.interrupted or self._saving.passed()):
            save()
            self._saving.restart()
        if self.interrupted:
            raise signals.ending(self.signal or signal.SIGINT)
        self._next = min(self._drawing.moment, self._saving.moment)

    def ask(self, number: int) -> None:
        """Let the run end, because of a signal to this process or to one that trains another model beside it."""
        self.signal, self._next = number, -math.inf
        self.interrupted = self.interrupted or self._agreed is None

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C and other signals that ask for an end take effect between two batches; the second one at once."""
        with signals.taken((signal.SIGINT, *signals.ENDING), self.ask):
            yield
