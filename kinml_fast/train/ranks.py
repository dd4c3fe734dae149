"""The processes that train one model together, each called a rank, as torch.distributed counts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kinml_fast.errors import ConfigError, InputError, RankError

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
    """

    rank: int = 0
    size: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

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


@contextlib.contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the processes that were started together (torchrun), as their environment says; alone without one.

    Raises
    ------
    InputError
        Only a part of the environment is there, or the processes do not find one another.
    """
    if "WORLD_SIZE" not in environment:
        yield ALONE
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is set but {', '.join(missing)} not: start the processes with torchrun, or unset WORLD_SIZE"
        )
    try:
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        raise InputError(f"the processes do not find one another at {address} ({error}): check the address") from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
