"""One process at a time in the folder of a run, of an exploration or of a search."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kinml_fast.errors import InputError

log = logging.getLogger(__name__)

NAME = ".lock"
"""The file that is locked in the folder. It says who holds it, and goes when that ends."""

_SECONDS_BETWEEN_LOOKS = 0.1
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@dataclass
class _Held:
    """A lock of this process: its file, None where there are no locks; how many hold it; whether a fit is going on."""

    descriptor: int | None
    holders: int = 0
    busy: bool = False


_held: dict[Path, _Held] = {}
_guard = threading.RLock()


class Hold:
    """A hold on a folder; as a context manager it ends with the block."""

    def __init__(self, release: Callable[[], None], first: bool) -> None:
        self._release: Callable[[], None] | None = release
        self.first = first
        """Whether nothing else in this process had the folder."""

    def release(self) -> None:
        """Let go; once is enough."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def hold(folder: Path, *, training: bool = False, patience: float = 0.0) -> Hold:
    """Keep other processes out of a folder, which is made if it is not there.

    The lock is one of the operating system (flock): it ends with the process, however that ends. Within a process any
    number of objects can hold a folder, until one of them is training.

    Parameters
    ----------
    folder
        The folder.
    training
        Whether the holder trains: then nothing else in this process gets hold of the folder.
    patience
        Seconds to wait for another process that is about to end.

    Raises
    ------
    InputError
        Another process works there, or this one trains there; the folder cannot be made or written.
    """
    place, give_up = folder.resolve(), time.monotonic() + patience
    while True:
        with _guard:
            found = _held.get(place)
            if found is not None and found.busy:
                holder = "this process trains"
            else:
                opened = found or _opened(folder)
                if isinstance(opened, _Held):
                    return _hold(place, opened, training)
                holder = opened
        if time.monotonic() >= give_up:
            raise InputError(
                f"{folder}: {holder} there: wait for its end, or choose another folder (run=NAME of a run); nothing "
                "was changed"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _hold(place: Path, held: _Held, training: bool) -> Hold:
    _held[place] = held
    held.holders += 1
    held.busy = training

    def release() -> None:
        with _guard:
            if _held.get(place) is not held:  # of the process that this one was forked from
                return
            held.holders -= 1
            held.busy = held.busy and not training
            if held.holders == 0:
                del _held[place]
                _close(place, held)

    return Hold(release, held.holders == 1)


def _opened(folder: Path) -> _Held | str:
    """A lock on the folder, or who has it."""
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(path, descriptor):
                    break  # otherwise its holder has just removed it
            except BlockingIOError:
                holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
                os.close(descriptor)
                return f"{holder or 'another process'} works"
            except OSError as error:
                os.close(descriptor)
                if error.errno not in _NO_LOCKS:
                    raise
                log.warning("%s: cannot be locked (%s): see to it that no two runs use it", folder, error.strerror)
                return _Held(None)
            os.close(descriptor)
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):  # on a full disk the lock says no name
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {now},\n".encode(), 0)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made, or written ({error.strerror}): choose another") from error
    return _Held(descriptor)


def _close(folder: Path, held: _Held) -> None:
    if held.descriptor is None:
        return
    path = folder / NAME
    with contextlib.suppress(OSError):
        if _is_at(path, held.descriptor):
            path.unlink()
    os.close(held.descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _forget() -> None:
    """A forked process holds nothing, and its open files must not keep the lock when its parent is killed."""
    for held in _held.values():
        if held.descriptor is not None:
            os.close(held.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
