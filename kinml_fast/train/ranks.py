"""The processes that train one model together, each called a rank, as torch.distributed counts them."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import itertools
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kinml_fast import devices, signals
from kinml_fast._library import identity
from kinml_fast.errors import ConfigError, DeviceError, InputError, RankError, first_line
from kinml_fast.train import meeting
from kinml_fast.train.board import Board, fresh, this_process
from kinml_fast.train.meeting import Meeting
from kinml_fast.train.parts import Part

_Result = TypeVar("_Result")

_SECONDS_BETWEEN_LOOKS = 0.1
_MIXED = "start the same installation in all of them, with KINML_CPU_ISA=avx2 where processors differ"


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes
    ----------
    rank
        Its number, from 0. The first one writes the files.
    size
        How many there are.
    local
        Its number among those on the same computer, from 0.
    part
        Which part these are of more processes, that train other models; None if there are no more.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    part: Part | None = field(default=None, compare=False, repr=False)

    @property
    def alone(self) -> bool:
        """Whether there is one process only, or none that trains the same model."""
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Where this process computes: of several that use GPUs each has one of its own, that of its local number.

        Parameters
        ----------
        name
            As for `devices.resolve`, but several processes take no GPU with an index.

        Raises
        ------
        DeviceError
            As `devices.resolve`, or there are fewer GPUs than processes on this computer.
        """
        if (self.alone and self.part is None) or name == "cpu":
            return devices.resolve(name)
        if name not in ("auto", "cuda"):
            raise DeviceError(
                f"training.device is {name}, but several processes take a GPU each: give cuda, and choose GPUs with "
                "CUDA_VISIBLE_DEVICES"
            )
        if devices.resolve(name).type == "cpu":
            return torch.device("cpu")
        if self.local >= torch.cuda.device_count():
            raise DeviceError(
                f"process {self.local} on this computer needs cuda:{self.local}, but the last GPU is "
                f"cuda:{torch.cuda.device_count() - 1}: start as many processes as there are GPUs, or set "
                "training.device=cpu"
            )
        if not dist.is_nccl_available():
            raise DeviceError(
                f"this torch ({torch.__version__}) has no NCCL, by which processes on GPUs talk: install one that has, "
                "or set training.device=cpu"
            )
        return torch.device("cuda", self.local)

    # What follows is called by all processes, in the same order. It raises RankError when another one has said why it
    # cannot go on, and in one process InputError when another one has gone without a word.

    def gather(self, own: Tensor, of_all: Tensor) -> None:
        """Write the tensors of all processes, which have one shape [...], to one [size, ...]."""
        if self.alone:
            of_all[0] = own
            return
        with self._together():
            group = self._board.group
            if own.device.type != "cpu":
                dist.all_gather(list(of_all.unbind(0)), own, group)
                return
            # Gloo's collectives go through a queue of threads, which takes three times as long as to send.
            of_all[self.rank] = own
            others = [rank for rank in range(self.size) if rank != self.rank]
            work = [dist.irecv(of_all[rank], group=group, group_src=rank) for rank in others]
            work += [dist.isend(own, group=group, group_dst=rank) for rank in others]
            one = None
            try:
                for one in work:
                    if one is not None:
                        one.wait(self._board.patience)
            except RuntimeError:
                # What is under way keeps connections open, by whose end the others notice.
                del one, group
                work.clear()
                raise

    def take_first(self, tensor: Tensor) -> None:
        """Write the first process's tensor, of a shape that all have, to those of the others."""
        if not self.alone:
            with self._together():
                dist.broadcast(tensor, group=self._board.group, group_src=0)

    def largest(self, number: int) -> int:
        """The largest number of any process."""
        if self.alone:
            return number
        tensor = torch.tensor([number])
        with self._together():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, self._board.group)
        return int(tensor)

    def in_turn(self, first: Callable[[], _Result], others: Callable[[], _Result] | None = None) -> _Result:
        """Call a function in the first process, and when it is done the same or another one elsewhere.

        The others wait as long as it takes.

        Raises
        ------
        RankError
            The first process could not go on; it says why.
        """
        if self.alone:
            return first()
        self.wait()  # all have seen the files as they were
        if self.is_first:
            result = first()
            self._board.say("")
            return result
        self._hear()
        return (others or first)()

    def told(self, first: Callable[[], str]) -> str:
        """What a function returns in the first process; the errors are those of `in_turn`."""
        if self.alone:
            return first()
        if not self.is_first:
            return self._hear()
        text = first()
        self._board.say(text)
        return text

    def wait(self) -> None:
        """Go on when all processes are here."""
        if not self.alone:
            with self._together():
                dist.barrier(self._board.group)

    def same(self, values: Mapping[str, object], remedy: str) -> None:
        """Go on when all processes are here and have the same values.

        Parameters
        ----------
        values
            By the name that a user knows.
        remedy
            For a user in whose processes they differ.

        Raises
        ------
        InputError
            Something differs; the sentence names the processes. RankError where another one says it.
        """
        if self.alone:
            return
        own = {name: str(value) for name, value in values.items()}
        found: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(found, (this_process(), own), self._board.group)
        board = self._board
        board.whole.names[board.first : board.first + self.size] = [who for who, _ in found]
        of_first: dict[str, str] = found[0][1]
        for rank, (_, of_rank) in enumerate(found):
            names = [name for name in of_first | of_rank if of_first.get(name) != of_rank.get(name)]
            if names:
                others = sum(of_other != of_first for _, of_other in found[rank + 1 :])
                more = f" (and {others} more)" if others else ""
                what = ", ".join(f"{name} ({of_rank.get(name)} instead of {of_first.get(name)})" for name in names[:3])
                what += f" … ({len(names)} in all)" if len(names) > 3 else ""
                differs, first = board.name(board.first + rank), board.name(board.first)
                raise InputError(f"{differs}{more} has another {what} than {first}: {remedy}")

    def set_timeout(self, seconds: float) -> None:
        """For how long the others are waited for from now on."""
        if not self.alone:
            # The public ways are torch.distributed.init_process_group, before a configuration is read, and new groups.
            self._board.patience = datetime.timedelta(seconds=seconds)
            dist.distributed_c10d._set_pg_timeout(self._board.patience, self._board.group)

    def divided(self, parts: int) -> Ranks:
        """This process among those of its part, when all are divided into parts that train models of their own.

        Processes with consecutive numbers, as those of one computer have them, are in one part; the sizes of the parts
        differ by at most one.

        Parameters
        ----------
        parts
            How many, of at least one process.
        """
        bounds = [self.size * part // parts for part in range(parts + 1)]
        number = next(part for part, end in enumerate(bounds[1:]) if self.rank < end)
        first, size = bounds[number], bounds[number + 1] - bounds[number]
        with self._together():
            ranges = [range(*ends) for ends in itertools.pairwise(bounds)]
            groups = [dist.new_group(ranks, self._board.patience) if len(ranks) > 1 else None for ranks in ranges]
        board, store = self._board.divided(first, size, groups[number])
        watched = bounds[(number - 1) % parts] if self.rank == first else None
        return Ranks(self.rank - first, size, self.local, Part(number, parts, board, store, watched))

    def speaks(self) -> bool:
        """Whether this process is the one that says why all end: the first to ask."""
        return (self.alone and self.part is None) or self._board.speaks()

    # What follows is for processes of several parts.

    def look(self) -> int:
        """By which signal a process of another part was asked to end, 0 if none was; see `Part.look`."""
        if self.part is None:
            return 0
        with self._together():
            return self.part.look()

    def ask(self, number: int) -> None:
        """Let the processes of all parts end, because of a signal to this one."""
        if self.part is not None or not self.alone:
            self._board.ask(number)

    def read(self, name: str) -> str:
        """What a process of any part has posted under a name, or will; until then this one waits.

        Raises
        ------
        InputError
            As `look`.
        KeyboardInterrupt, Stopped
            A process of another part was asked to end.
        """
        assert self.part is not None
        while True:
            with self._together():
                text = self.part.posted(name)
            if text is not None:
                return text
            if number := self.look():
                raise signals.ending(number)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    @property
    def _board(self) -> Board:
        return Board.of_group() if self.part is None else self.part.board

    def _hear(self) -> str:
        with self._together():
            text = self._board.hear()
        if text is None:
            raise self._board.end()
        return text

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Say in one sentence, and in one process, what has become of another one."""
        try:
            yield
        except RuntimeError as error:
            traceback.clear_frames(error.__traceback__)  # they may keep connections open
            # The sentence comes before any signal: torchrun ends all when one is gone.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.ENDING)
            try:
                raise self._lost("time-out" if "Timed out" in str(error) else "lost") from error
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _lost(self, why: str) -> BaseException:
        board = self._board
        board.stop(why)
        if dist.is_initialized():
            dist.destroy_process_group()  # others that wait notice it, too
        silent, reasons = board.silent()
        if board.spoken() or not board.speaks():
            return board.end()
        if silent:
            return board.missing(silent, "time-out" in [*reasons, why])
        return InputError(
            "the connection between the processes was lost, though all are there: look for trouble with the network, "
            "and continue the run with --resume"
        )


ALONE = Ranks()


def present() -> Ranks:
    """This process among those that a program has joined by itself, with torch.distributed; alone without any.

    Raises
    ------
    ConfigError
        They can exchange nothing that is in the memory of the CPU.
    """
    if not dist.is_initialized():
        return ALONE
    if "cpu:" not in dist.get_backend_config():
        raise ConfigError(
            f"init_process_group was called with the backend {dist.get_backend()}, which has nothing for the CPU: give "
            "it gloo, or cpu:gloo,cuda:nccl"
        )
    rank = dist.get_rank()
    return Ranks(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))


def restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun (`--max-restarts`) or SLURM (`--requeue`) has started this process again after an end."""
    counts = (environment.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count not in ("", "0") for count in counts)


@contextlib.contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the processes that were started together, as their environment says; alone without one (`meeting.found`).

    When the block ends with an error, one process raises it; where others have the same, or cannot go on because of it,
    they raise RankError.

    Raises
    ------
    InputError
        Only a part of the environment is there, or the processes do not find one another, or are not of one
        installation.
    """
    place = meeting.found(environment)
    if place is None:
        yield ALONE
        return
    join(place)
    with together(Ranks(place.rank, place.size, place.local)) as ranks:
        yield ranks


def join(place: Meeting) -> None:
    """Make the process group of torch.distributed: gloo for tensors on the CPU, NCCL for those on GPUs if there are.

    Raises
    ------
    InputError
        The processes do not find one another in time.
    RankError
        The same, and another process on this computer says it.
    """
    # Torch imports this sooner or later, and with the group as a default argument in it, which keeps connections open.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "cpu:gloo,cuda:nccl" if devices.why_no_gpu() is None and dist.is_nccl_available() else "gloo"
    try:
        place.wait()  # torch would say more, and worse, of what is in the way
        timeout = datetime.timedelta(seconds=place.seconds)
        store: dist.Store
        store = dist.TCPStore(place.address, place.port, place.size, place.opens, timeout, multi_tenant=True)
        if place.agent:
            store = fresh(store, place.rank, place.size, place.seconds)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size)
    except (RuntimeError, ValueError, OSError) as error:
        reason = first_line(error).rstrip(".")
        sentence = (
            f"the {place.size} processes have not found one another at {place.address}:{place.port} within "
            f"{place.seconds:g} s ({reason}): see that all were started, and set MASTER_ADDR and MASTER_PORT to a "
            f"computer and a free port that all reach, or {meeting.SECONDS} to a longer time"
        )
        raise (InputError if place.local == 0 else RankError)(sentence) from error


@contextlib.contextmanager
def together(ranks: Ranks) -> Iterator[Ranks]:
    """The processes of torch.distributed's group, which ends with the block; see `joined`."""
    try:
        ranks.same(identity(), _MIXED)
        yield ranks
    except RankError:
        raise
    except (InputError, OSError) as error:
        if not ranks.speaks():
            raise RankError("another process could not go on") from error
        raise
    except BaseException:
        ranks.speaks()
        raise
    finally:
        board = Board.of_group()
        if dist.is_initialized():
            dist.destroy_process_group()
        board.leave()
