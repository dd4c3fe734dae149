"""What tests of several processes share: torchrun, or processes of which each has an environment of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


class Aborted(Exception):
    """A process ended with `terminate called without an active exception`.

    That happened once in some sixty starts of three processes on a busy computer, and its cause is not known yet.
    """


def again(test: Callable[[Path], None], folder: Path) -> None:
    """Run what starts processes in a folder of its own, up to three times if one of them aborts."""
    for attempt in range(3):
        own = folder / str(attempt)
        own.mkdir()
        try:
            return test(own)
        except Aborted:
            if attempt == 2:
                raise


def start(size: int, *arguments: str) -> subprocess.CompletedProcess:
    """So many processes with torchrun, on a free port; one alone without it."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
    (done,) = together([launch + list(arguments)])
    return done


def digests(size: int) -> dict[str, list[str]]:
    """What `rank_program` finds in so many processes: of each kind of training a digest of every process."""
    done = start(size, str(Path(__file__).parent / "rank_program.py"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def together(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]] = ({},), folder: Path | None = None
) -> list[subprocess.CompletedProcess]:
    """Python with these arguments at the same time, each with these variables beside those that are there."""
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, **environment},
            cwd=folder,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        said = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    done = [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(running, said, strict=True)
    ]
    if any("terminate called without an active exception" in one.stderr for one in done):
        raise Aborted(done)
    return done


def sentences(*done: subprocess.CompletedProcess) -> list[str]:
    """What the command line has said of mistakes."""
    lines = [line for one in done for line in one.stderr.splitlines()]
    return [line.removeprefix("kinml-fast: ") for line in lines if line.startswith("kinml-fast: ")]


def free_port() -> str:
    """A port that nobody uses now."""
    with socket.socket() as open_socket:
        open_socket.bind(("localhost", 0))
        return str(open_socket.getsockname()[1])
