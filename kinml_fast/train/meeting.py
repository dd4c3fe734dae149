"""Who this process is among those that were started together, and where they meet: variables of torchrun and SLURM."""

from __future__ import annotations

import itertools
import math
import os
import re
import socket
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kinml_fast.errors import ConfigError, RankError

SECONDS = "KINML_RENDEZVOUS_SECONDS"
"""The variable that says how long processes wait for one another at the start."""

_USUAL_SECONDS = 300
_PAUSE = 0.2  # seconds between two attempts
_PORTS = range(12000, 32000)  # below those that the system gives to whoever asks


@dataclass(frozen=True)
class Meeting:
    """A process and the place where it finds the others.

    Parameters
    ----------
    rank, size, local
        See `ranks.Ranks`.
    address, port
        Of a computer that all reach: that of the first process, or of torchrun's agent.
    seconds
        How long to wait there.
    agent
        Whether an agent is there already; otherwise the first process opens the port.
    """

    rank: int
    size: int
    local: int
    address: str
    port: int
    seconds: float = _USUAL_SECONDS
    agent: bool = False

    @property
    def opens(self) -> bool:
        """Whether this process opens the port."""
        return self.rank == 0 and not self.agent

    def wait(self) -> None:
        """Go on when the port is open, or the computer known that this process is to open it on.

        Raises
        ------
        OSError
            What was in the way when the time was over.
        """
        end = time.monotonic() + self.seconds
        while True:
            try:
                if self.opens:
                    socket.getaddrinfo(self.address, self.port)
                else:
                    socket.create_connection((self.address, self.port), max(end - time.monotonic(), 0.1)).close()
                return
            except OSError:
                if time.monotonic() + _PAUSE > end:
                    raise
            time.sleep(_PAUSE)


def found(environment: Mapping[str, str]) -> Meeting | None:
    """What the variables say that torchrun sets, or else those of a step of SLURM (srun); None for a single process.

    MASTER_ADDR and MASTER_PORT count in both; in a step of SLURM the place is its first node, and a port that follows
    from job and step. WORLD_SIZE=1 keeps the tasks of a step apart.

    Raises
    ------
    ConfigError
        Only a part of the variables is there, or one is no number.
    RankError
        The first is so, and the first process says it.
    """
    if "WORLD_SIZE" in environment:
        return _of_torchrun(environment)
    return _of_slurm(environment)


def _of_torchrun(environment: Mapping[str, str]) -> Meeting | None:
    size = _number("WORLD_SIZE", environment["WORLD_SIZE"])
    if size == 1:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise _incomplete(
            environment.get("RANK"),
            f"WORLD_SIZE is set but {', '.join(missing)} not: start the processes with torchrun, or unset WORLD_SIZE",
        )
    rank = environment["RANK"]
    return Meeting(
        _number("RANK", rank),
        size,
        _number("LOCAL_RANK", environment.get("LOCAL_RANK", rank)),
        environment["MASTER_ADDR"],
        _port(environment["MASTER_PORT"]),
        seconds(environment),
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _of_slurm(environment: Mapping[str, str]) -> Meeting | None:
    def first(*names: str) -> str | None:
        return next((environment[name] for name in names if name in environment), None)

    values = {
        "SLURM_STEP_ID": first("SLURM_STEP_ID", "SLURM_STEPID"),
        "SLURM_NTASKS": first("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
        "SLURM_PROCID": first("SLURM_PROCID"),
        "SLURM_LOCALID": first("SLURM_LOCALID"),
    }
    # A batch script has the tasks of its job in its environment and number 0, but is no step.
    is_script = values["SLURM_STEP_ID"] is None and values["SLURM_PROCID"] in (None, "0")
    if is_script or values["SLURM_NTASKS"] == "1":
        return None
    if "MASTER_ADDR" not in environment:
        values["SLURM_NODELIST"] = first("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    if "MASTER_PORT" not in environment:
        values["SLURM_JOB_ID"] = first("SLURM_JOB_ID", "SLURM_JOBID")
    known = {name: value for name, value in values.items() if value is not None}
    if missing := [name for name in values if name not in known]:
        # Without a number of the step the first task takes itself for a script, so that the others have to say it.
        raise _incomplete(
            known.get("SLURM_PROCID") if "SLURM_STEP_ID" in known else None,
            f"this is a task of SLURM, but {', '.join(missing)} is not set: start the processes with srun, or set "
            "WORLD_SIZE=1 to train in each of them alone",
        )
    nodes = known.pop("SLURM_NODELIST", None)
    numbers = {name: _number(name, value) for name, value in known.items()}
    if "SLURM_JOB_ID" in numbers:
        port = port_of(16 * numbers["SLURM_JOB_ID"] + numbers["SLURM_STEP_ID"])
    else:
        port = _port(environment["MASTER_PORT"])
    return Meeting(
        numbers["SLURM_PROCID"],
        numbers["SLURM_NTASKS"],
        numbers["SLURM_LOCALID"],
        environment["MASTER_ADDR"] if nodes is None else hosts(nodes)[0],
        port,
        seconds(environment),
    )


def _incomplete(rank: str | None, sentence: str) -> ConfigError | RankError:
    """What a process of this rank raises where variables lack, as they do for all: the first one says it."""
    return ConfigError(sentence) if rank in (None, "0") else RankError(sentence)


def of_children(rank: int, size: int, environment: Mapping[str, str]) -> Meeting:
    """What processes are told that one program has started on this computer: MASTER_ADDR and MASTER_PORT need not be.

    The port then follows from that program, so that those of another one meet elsewhere.
    """
    if "MASTER_PORT" in environment:
        port = _port(environment["MASTER_PORT"])
    else:
        parent = os.getppid()
        try:
            began = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        except OSError:
            began = ""
        port = port_of(zlib.crc32(f"{socket.gethostname()} {parent} {began}".encode()))
    address = environment.get("MASTER_ADDR", "localhost")
    return Meeting(rank, size, rank, address, port, seconds(environment))


def port_of(number: int) -> int:
    """A port for whatever has this number: the same for the same one, others for most others."""
    return _PORTS[number % len(_PORTS)]


def seconds(environment: Mapping[str, str]) -> float:
    """How long to wait for one another at the start."""
    text = environment.get(SECONDS, str(_USUAL_SECONDS))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ConfigError(f"{SECONDS} is {text!r}: give a number of seconds, or unset it for {_USUAL_SECONDS}")
    return value


def hosts(text: str) -> list[str]:
    """The names in a host list of SLURM, like node[01-03,07],other or r[0-1]n[1-2], in its order.

    Raises
    ------
    ConfigError
        It is no such list.
    """
    names: list[str] = []
    for host in re.finditer(_HOST, text if re.fullmatch(f"{_HOST}(?:,{_HOST})*", text) else ""):
        parts = re.findall(r"\[(.*?)\]|([^\[]+)", host[0])
        names += map("".join, itertools.product(*(_numbers(ranges) if ranges else [plain] for ranges, plain in parts)))
    if not names:
        raise ConfigError(f"{text!r} is no host list of SLURM, like node[01-03,07]: set MASTER_ADDR to the first node")
    return names


_RANGE = r"\d+(?:-\d+)?"
_HOST = rf"(?:[\w.-]|\[{_RANGE}(?:,{_RANGE})*\])+"


def _numbers(ranges: str) -> list[str]:
    """The numbers of 01-03,07, each as wide as the first one of its range."""
    found: list[str] = []
    for one in ranges.split(","):
        first, _, last = one.partition("-")
        found += (f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1))
    return found


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r}, which is no number: start the processes with torchrun or srun")
    return int(text)


def _port(text: str) -> int:
    port = _number("MASTER_PORT", text)
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT is {port}: give a free port from 1024 to 65535")
    return port
