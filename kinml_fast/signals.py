"""Signals that ask a process to end: a time limit, preemption, Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kinml_fast.errors import InputError

ENDING = (signal.SIGTERM, signal.SIGUSR1)
"""What batch systems and torchrun send when time is up, or a little before."""

_SECONDS_OF_ONE_REQUEST = 5.0
"""What comes this soon after the first signal is the same request: SLURM and torchrun each tell a process to end."""


class Stopped(SystemExit):
    """The process was asked to end by a signal; if nobody catches this, it does, with exit code 128 + the signal.

    Attributes
    ----------
    number
        The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def name(number: int) -> str:
    """A signal as it is called, like SIGTERM; Ctrl-C for 0, none."""
    return signal.Signals(number).name if number else "Ctrl-C"


def ending(number: int) -> KeyboardInterrupt | Stopped:
    """What ends a process for a signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


def number_of(end: BaseException) -> int:
    """The signal of which something that ends a process comes; Ctrl-C's for whatever comes of none."""
    return end.number if isinstance(end, Stopped) else signal.SIGINT


def ignore() -> None:
    """Let `ENDING` signals do nothing more, in a process that ends anyway."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Let `ENDING` signals end the block as Ctrl-C does, by an exception, so that nothing stays half-written."""

    def end(number: int) -> None:
        if not isinstance(sys.exc_info()[1], InputError):  # with that it ends already, and has to say why
            raise ending(number)

    with taken(ENDING, end):
        yield


@contextlib.contextmanager
def taken(numbers: Sequence[signal.Signals], act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` at the first of some signals, instead of what was called before; the second one ends the block.

    Ctrl-C (SIGINT) counts every time, others not within seconds after the first. Handlers that are not of this package
    stay where they are, except for that of Ctrl-C. Only the main thread can take signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [n for n in numbers if n == signal.SIGINT or before[n] == signal.SIG_DFL or isinstance(before[n], _Taken)]

    def give_back() -> None:
        for number in ours:
            if signal.getsignal(number) is handler:
                signal.signal(number, before[number])

    handler = _Taken(act, give_back)
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        give_back()


class _Taken:
    """Handles signals."""

    def __init__(self, act: Callable[[int], None], give_back: Callable[[], None]) -> None:
        self._act, self._give_back = act, give_back
        self._first: float | None = None

    def __call__(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._act(number)
        elif number == signal.SIGINT or now - self._first > _SECONDS_OF_ONE_REQUEST:
            self._give_back()
            raise ending(number)
