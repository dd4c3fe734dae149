"""Parts of the processes that were started together: each trains models of its own, and hears of the others."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from kinml_fast.errors import RankError
from kinml_fast.train.board import Board

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_DOUBT = 1.0
"""After which a process that gives no sign of life may have gone."""
_TIMEOUTS = 2
"""Of a process, after which another part takes it for hanging: those of its own part have noticed before."""
_TAG = 12  # of messages that nobody sends


class Part:
    """A part of the processes, seen by one of them.

    Each process gives signs of life while it trains or waits. The first one of a part watches the first one of the part
    before, and so on in a circle; those of one part notice by their exchange when one of them is gone.

    Parameters
    ----------
    number, count
        Which part, from 0, of how many.
    board
        Of the processes of this part.
    store
        For all parts.
    watched
        The process that this one watches, by its number among all; None for none.
    """

    def __init__(self, number: int, count: int, board: Board, store: dist.Store, watched: int | None) -> None:
        self.number, self.count, self.board = number, count, board
        self._store, self._watched = store, watched
        self._beats, self._heard = -1, 0.0
        self._next = 0.0

    def look(self) -> int:
        """Give a sign of life, and look at the others, if it is time to.

        Returns
        -------
        By which signal a process of any part was asked to end, 0 if none was.

        Raises
        ------
        InputError
            One has gone, or hangs. RankError where another process has said why all end.
        RuntimeError
            The board is gone.
        """
        now = time.monotonic()
        if now < self._next:
            return 0
        self._next = now + _SECONDS_BETWEEN_LOOKS
        if number := self._end():
            return number
        if self._watched is None:
            return 0
        self._store.add(f"life {self.board.first}", 1)
        beats = self._store.add(f"life {self._watched}", 0)
        if beats != self._beats:
            self._beats, self._heard = beats, now
            return 0
        silent = now - self._heard
        hangs = silent > _TIMEOUTS * self.board.patience.total_seconds()
        if not hangs and (silent < _SECONDS_TO_DOUBT or _is_connected(self._watched)):
            return 0
        # Who ends has said so before, or lacks one of its own part, which it is about to say.
        if (number := self._end()) or Board.first_stopped(self._store, self._watched):
            return number
        if not self.board.speaks():
            raise RankError("another process could not go on")
        raise self.board.missing([self._watched], hangs)

    def post(self, name: str, text: str) -> None:
        """Let all parts read something."""
        self._store.set(name, text)

    def posted(self, name: str) -> str | None:
        """What a process has posted; None if none has yet."""
        return self._store.get(name).decode() if self._store.check([name]) else None

    def _end(self) -> int:
        """See `look`."""
        number = self.board.asked()
        if not number and self.board.spoken():
            raise RankError("another process could not go on")
        return number


def _is_connected(number: int) -> bool:
    """Whether a process, by its number among all, still has its connection to this one."""
    try:
        dist.irecv(torch.empty(1), number, tag=_TAG)  # nothing will come; where the connection has ended, it says so
    except RuntimeError:
        return False
    return True
