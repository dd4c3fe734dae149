"""The processes that train one model together, each called a rank, as torch.distributed counts them."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kinml_fast import devices
from kinml_fast.errors import ConfigError, DeviceError, InputError, RankError, first_line
from kinml_fast.train import meeting
from kinml_fast.train.meeting import Meeting

_Result = TypeVar("_Result")


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
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
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
        if self.alone or name == "cpu":
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

    def share(self, count: int) -> tuple[int, int]:
        """From which to which of so many things in a row are this process's; they differ by one at most."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def gather(self, own: Tensor, of_all: Tensor) -> None:
        """Write the tensors of all processes, which have one shape [...], to one [size, ...]."""
        if self.alone:
            of_all[0] = own
        else:
            dist.all_gather(list(of_all.unbind(0)), own)

    def in_turn(self, first: Callable[[], _Result], others: Callable[[], _Result] | None = None) -> _Result:
        """Call a function in the first process, and when it is done the same or another one elsewhere.

        Raises
        ------
        RankError
            The first process could not go on; it says why.
        """
        if self.alone:
            return first()
        dist.barrier()  # all have seen the files as they were
        failed = torch.ones(1)
        try:
            if self.is_first:
                result = first()
                failed.zero_()
        finally:
            dist.broadcast(failed, 0)
        if not self.is_first:
            if failed.item():
                raise RankError("the first process could not go on")
            result = (others or first)()
        return result

    def wait(self) -> None:
        """Go on when all processes are here."""
        if not self.alone:
            dist.barrier()


ALONE = Ranks()

_SAID, _SAID_SECONDS = "kinml_fast said", 10
"""Where a process notes that it says why all end, and how long others wait for that."""


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


@contextlib.contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the processes that were started together, as their environment says; alone without one (`meeting.found`).

    A mistake that is the same in all of them (an `InputError`) leaves the block in one process as it is, and in the
    others as a `RankError`, which says nothing.

    Raises
    ------
    InputError
        Only a part of the environment is there, or the processes do not find one another.
    """
    place = meeting.found(environment)
    if place is None:
        yield ALONE
        return
    store = join(place)
    try:
        yield Ranks(place.rank, place.size, place.local)
    except (InputError, RuntimeError) as error:
        if _is_said_here(error, store):
            raise
        raise RankError("another process says why this one cannot go on") from error
    finally:
        dist.destroy_process_group()


def join(place: Meeting) -> dist.Store:
    """Make the process group of torch.distributed: gloo for tensors on the CPU, NCCL for those on GPUs if there are.

    Returns
    -------
    What all processes can write into and read from.

    Raises
    ------
    InputError
        They do not find one another in time.
    RankError
        The same, and another process on this computer says it.
    """
    backend = "cpu:gloo,cuda:nccl" if devices.why_no_gpu() is None and dist.is_nccl_available() else "gloo"
    try:
        place.wait()  # torch would say more, and worse, of what is in the way
        timeout = timedelta(seconds=place.seconds)
        store: dist.Store
        store = dist.TCPStore(place.address, place.port, place.size, place.opens, timeout, multi_tenant=True)
        if place.agent:
            store = _of_this_attempt(store, place)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size)
    except (RuntimeError, ValueError, OSError) as error:
        reason = first_line(error).rstrip(".")
        sentence = (
            f"the {place.size} processes have not found one another at {place.address}:{place.port} within "
            f"{place.seconds:g} s ({reason}): see that all were started, and set MASTER_ADDR and MASTER_PORT to a "
            f"computer and a free port that all reach, or {meeting.SECONDS} to a longer time"
        )
        raise (InputError if place.local == 0 else RankError)(sentence) from error
    return store


def _of_this_attempt(store: dist.Store, place: Meeting) -> dist.Store:
    """A part of the store of torchrun's agent without what earlier attempts have left there, such as old addresses.

    The first process numbers the attempt. Each of the others asks it with a word of its own, which no old answer fits:
    agents count restarts, but not all of them count the same.
    """
    if place.rank > 0:
        word = uuid.uuid4().hex
        store.set(f"kinml_fast asks {place.rank}", word)
        number = store.get(f"kinml_fast answer {word}").decode()  # waits
        store.add(f"kinml_fast joined {number}", 1)
        return dist.PrefixStore(f"kinml_fast {number}", store)
    number = str(store.add("kinml_fast attempts", 1))
    end = time.monotonic() + place.seconds
    while (joined := store.add(f"kinml_fast joined {number}", 0)) < place.size - 1:
        for asks in (f"kinml_fast asks {rank}" for rank in range(1, place.size)):
            if store.check([asks]):
                store.set(f"kinml_fast answer {store.get(asks).decode()}", number)
        if time.monotonic() > end:
            raise RuntimeError(f"{joined + 1} of them came")
        time.sleep(0.02)
    return dist.PrefixStore(f"kinml_fast {number}", store)


def _is_said_here(error: Exception, store: dist.Store) -> bool:
    """Whether this process is the one to say an error; if not, a sentence has been said by now, or soon will be."""
    try:
        if not isinstance(error, InputError):  # that another one has gone, if it has said why
            return not store.check([_SAID])
        if not isinstance(error, RankError) and store.add(f"{_SAID} {error}", 1) == 1:
            store.set(_SAID, "")
            return True
        store.wait([_SAID], timedelta(seconds=_SAID_SECONDS))
    except RuntimeError:  # the process that kept the store has gone
        return not isinstance(error, RankError)
    return False
