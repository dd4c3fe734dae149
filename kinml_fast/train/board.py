"""What processes that were started together say to one another beside their tensors: who they are, why they end."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
import weakref
from collections.abc import Sequence

import torch.distributed as dist

from kinml_fast import signals
from kinml_fast.errors import InputError, RankError
from kinml_fast.signals import Stopped

_SECONDS_BETWEEN_LOOKS = 0.02
_SECONDS_BETWEEN_LOOKS_AT_MOST = 0.5
_SECONDS_TO_ANSWER = 10.0
"""For which a process is waited for that may have gone, on a busy computer too."""
_SECONDS_TO_LEAVE = 45.0
"""For which who keeps the board waits for the others to read it, which may take 10 on a busy computer, or more."""


def fresh(store: dist.Store, rank: int, size: int, seconds: float) -> dist.Store:
    """A part of a store in which nothing stands yet, the same for all processes.

    torchrun starts processes again with the store of those that have failed: what these wrote, such as the addresses at
    which they could be reached, would be taken for news. So each process writes a word of its own until the first one
    has answered it with the name of the part.

    Raises
    ------
    RuntimeError
        Not all have come within so many seconds.
    """
    word, answered = uuid.uuid4().hex, dict[int, str]()
    give_up = time.monotonic() + seconds
    if rank > 0:
        store.set(f"word {rank}", word)
    while time.monotonic() < give_up:
        if rank == 0:
            for other in range(1, size):
                if store.check([f"word {other}"]):
                    theirs = store.get(f"word {other}").decode()
                    if answered.get(other) != theirs:
                        store.set(f"answer {other}", f"{theirs} {word}")
                        answered[other] = theirs
            if store.add(f"{word} heard", 0) == size - 1:
                return dist.PrefixStore(word, store)
        elif store.check([f"answer {rank}"]):
            heard, name = store.get(f"answer {rank}").decode().split()
            if heard == word:
                store.add(f"{name} heard", 1)
                return dist.PrefixStore(name, store)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    raise RuntimeError(f"not all {size} came in {seconds:g} s")


class Board:
    """A board that all processes can read, in the store through which they found one another.

    Parameters
    ----------
    rank, size
        This process, and how many there are.
    store
        A part of that store, which nobody else uses.
    here
        Whether this process keeps the store, so that it ends with it.

    Attributes
    ----------
    first : int
        The number among all processes of the first one here.
    whole : Board
        That of all processes, if those here are a part of them; otherwise this one.
    names : list of str
        What a user looks for to find each process, when it is known.
    patience : timedelta
        For how long others are waited for.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, here: bool) -> None:
        self._rank, self._size, self._store, self._here = rank, size, store, here
        self._group: weakref.ref[dist.ProcessGroup] | None = None
        self._turns, self._divisions = 0, 0
        self._speaks: bool | None = None
        self.first, self.whole = 0, self
        self.names = ["?"] * size
        self.patience = dist.default_pg_timeout

    @staticmethod
    def of_group() -> Board:
        """That of torch.distributed's process group; also after its end, until there is another one."""
        global _latest
        group = dist.group.WORLD
        if group is not None and (_latest is None or _latest[0]() is not group):
            of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
            here = dist.get_rank() == 0 and not of_agent
            store = dist.PrefixStore("kinml_fast", group.get_group_store())
            board = Board(dist.get_rank(), dist.get_world_size(), store, here)
            _latest = weakref.ref(group), board  # whoever has the group itself keeps its connections open
        assert _latest is not None, "there has been no process group"
        return _latest[1]

    def divided(self, first: int, size: int, group: dist.ProcessGroup | None) -> tuple[Board, dist.Store]:
        """A board for some processes in a row, and a store for all of them; all divide themselves as often.

        Parameters
        ----------
        first, size
            Which ones, of those here.
        group
            That of torch.distributed for them.
        """
        self._divisions += 1
        store = dist.PrefixStore(f"division {self._divisions}", self._store)
        board = Board(self._rank - first, size, dist.PrefixStore(f"from {first}", store), False)
        board._group = None if group is None else weakref.ref(group)
        board.first, board.whole, board.patience = first, self, self.patience
        return board, store

    @staticmethod
    def first_stopped(store: dist.Store, first: int) -> bool:
        """Whether the first process of a part of them has said why it cannot go on; the store is that of all parts."""
        return dist.PrefixStore(f"from {first}", store).check([_reason(0)])

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group whose board this is, for functions of torch.distributed: None for that of all processes.

        Raises
        ------
        RuntimeError
            It has ended.
        """
        if self._group is None:
            return None
        group = self._group()
        if group is None:
            raise RuntimeError("the process group has ended")
        return group

    def name(self, number: int) -> str:
        """What a user looks for to find the process that has this number among all."""
        return f"process {number} ({self.whole.names[number]})"

    def speaks(self) -> bool:
        """Whether this process is the first one that has to say why all end, and so the only one that does.

        If the board is gone with the process that kept it, the next one speaks.
        """
        whole = self.whole
        if whole._speaks is None:
            try:
                whole._speaks = whole._store.add("speaks", 1) == 1
            except RuntimeError:
                whole._speaks = whole._rank == 1
        return whole._speaks

    def spoken(self) -> bool:
        """Whether a process has said why all end."""
        try:
            return self.whole._store.check(["speaks"])
        except RuntimeError:
            return False

    def ask(self, number: int) -> None:
        """Let all processes end, because of a signal to this one."""
        with contextlib.suppress(RuntimeError):
            self.whole._store.set("signal", str(number))

    def asked(self) -> int:
        """The signal for which all processes are to end; 0 for none, RuntimeError if the board is gone."""
        store = self.whole._store
        return int(store.get("signal")) if store.check(["signal"]) else 0

    def end(self) -> RankError | KeyboardInterrupt | Stopped:
        """What ends this process when another one has said why all end."""
        number = 0
        with contextlib.suppress(RuntimeError):
            number = self.asked()
        return signals.ending(number) if number else RankError("another process could not go on")

    def say(self, text: str) -> None:
        """The first process: let the others hear what they wait for."""
        self._store.set(self._turn(), text)

    def hear(self) -> str | None:
        """Another process: what the first one says, when it does; None if a process has said why all end.

        That may take as long as it likes. RuntimeError if the board is gone.
        """
        turn, pause = self._turn(), _SECONDS_BETWEEN_LOOKS
        while True:
            # Not Store.wait, in which no signal can be handled.
            if self._store.check([turn]):
                return self._store.get(turn).decode()
            if self.spoken():
                return None
            time.sleep(pause)
            pause = min(1.1 * pause, _SECONDS_BETWEEN_LOOKS_AT_MOST)

    def stop(self, why: str) -> None:
        """Say why this process cannot go on with the others, before it lets go of them."""
        with contextlib.suppress(RuntimeError):
            self._store.set(_reason(self._rank), why)

    def silent(self) -> tuple[list[int], list[str]]:
        """Find the processes that do not say anything, when this one has stopped.

        Returns
        -------
        Their numbers among all, none if one has said why all end, and what those that are there gave as their reasons.
        """
        reasons: list[str] = []
        try:
            give_up = time.monotonic() + _SECONDS_TO_ANSWER
            while True:
                there = [rank for rank in range(self._size) if self._store.check([_reason(rank)])]
                reasons = [self._store.get(_reason(rank)).decode() for rank in there]
                if self.spoken():
                    return [], reasons
                if len(there) == self._size or time.monotonic() > give_up:
                    return [self.first + rank for rank in range(self._size) if rank not in there], reasons
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except RuntimeError:  # the board is gone, with the process that kept it
            return [0], reasons

    def missing(self, numbers: Sequence[int], timed_out: bool) -> InputError:
        """What the process raises that speaks when others, which have these numbers among all, are gone or hang."""
        with contextlib.suppress(RuntimeError):
            self.whole._store.add("left", len(numbers))
        what = "did not answer in time (training.rank_timeout_seconds)" if timed_out else "is gone"
        return InputError(
            f"{', '.join(map(self.name, numbers))} {what}: see what it wrote and whether memory was too small, and "
            "continue the run with --resume: its last checkpoint is whole"
        )

    def leave(self) -> None:
        """The last thing to do. Who keeps the board stays a little, for others to read it."""
        with contextlib.suppress(RuntimeError):
            left = self._store.add("left", 1)
            give_up = time.monotonic() + _SECONDS_TO_LEAVE
            while self._here and left < self._size and time.monotonic() < give_up:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                left = self._store.add("left", 0)

    def _turn(self) -> str:
        self._turns += 1
        return f"turn {self._turns}"


def _reason(rank: int) -> str:
    """Under which name a process says why it cannot go on."""
    return f"reason {rank}"


def this_process() -> str:
    """What a user looks for to find this process."""
    return f"process id {os.getpid()} on {socket.gethostname()}"


_latest: tuple[weakref.ref[dist.ProcessGroup], Board] | None = None
