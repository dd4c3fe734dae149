"""A process that keeps a model and answers on a unix socket, for programs that start a script for each energy.

A connection is one line of JSON and one line of answer. The request has ``elements`` (symbols or atomic numbers),
``positions`` [n][3], their unit ``length`` (angstrom or bohr) and ``derivatives`` (0, 1 or 2); the answer has ``atoms``
(their number), ``energy`` in Hartree and, as far as derivatives are asked for, ``gradient`` [3n] in Hartree/Bohr and
``hessian`` [3n][3n] in Hartree/Bohr²; or ``error``, a sentence.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import socketserver
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ase import Atoms

from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.errors import ConfigError, DataError, InputError, first_line
from kinml_fast.units import BOHR, HARTREE

log = logging.getLogger(__name__)

_LONGEST_PATH = 107
"""Bytes that Linux allows for the path of a socket (unix(7))."""

_PATIENCE = 30.0
"""Seconds that a client may take to send its request: others wait meanwhile."""


def answer(calculator: KinMLCalculator, line: bytes) -> dict[str, Any]:
    """The answer to a request, also to one that cannot be computed."""
    try:
        return _computed(calculator, line)
    except InputError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever goes wrong with one request, others shall be answered
        log.exception("a request failed")
        return {"error": f"the server failed ({type(error).__name__}: {first_line(error)}): see what it has said"}


def serve(calculator: KinMLCalculator, path: str | os.PathLike) -> None:
    """Answer requests at a socket until the process is ended by a signal.

    Parameters
    ----------
    calculator
        What computes.
    path
        The socket to make, which only the user may use; one that a killed server left behind is replaced.

    Raises
    ------
    ConfigError
        The path is too long, in use by another server, taken by a file, or cannot be made.
    """
    with listening(calculator, path) as server:
        log.info("%s: waiting for requests", path)
        server.serve_forever()


@contextmanager
def listening(calculator: KinMLCalculator, path: str | os.PathLike) -> Iterator[socketserver.BaseServer]:
    """The server of `serve`, which listens, and whose socket is removed in the end."""
    path = Path(path)
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(f"{path}: is longer than the {_LONGEST_PATH} bytes of a socket's path: name a shorter one")
    _free(path)

    class Handler(socketserver.StreamRequestHandler):
        timeout = _PATIENCE

        def handle(self) -> None:
            try:
                line = self.rfile.readline()
                if line:
                    self.wfile.write(json.dumps(answer(calculator, line)).encode() + b"\n")
            except OSError as error:  # the client has gone or is silent
                log.warning("a client was left: %s", error)

    class Server(socketserver.UnixStreamServer):
        request_queue_size = 128

    before = os.umask(0o177)
    try:
        server = Server(os.fspath(path), Handler)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be made ({error.strerror}): name a socket in a folder of yours") from error
    finally:
        os.umask(before)
    try:
        with server:
            yield server
    finally:
        path.unlink(missing_ok=True)


def _free(path: Path) -> None:
    """Remove a socket that nobody listens at."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ConfigError(f"{path}: is a file: name another path for the socket")
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise ConfigError(f"{path}: another server answers there: end it or name another path")


def _computed(calculator: KinMLCalculator, line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
        elements, positions = request["elements"], request["positions"]
        unit = {"angstrom": 1.0, "bohr": BOHR}[request["length"]]
        derivatives = request["derivatives"]
        symbols = [int(element) if str(element).isdigit() else element for element in elements]
        atoms = Atoms(symbols, [[float(x) * unit for x in position] for position in positions])
        if derivatives not in (0, 1, 2) or not len(atoms):
            raise ValueError("no atoms, or derivatives that are not 0, 1 or 2")
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(
            f"a request cannot be used ({type(error).__name__}: {first_line(error)}): send elements, positions, length "
            "and derivatives"
        ) from error
    result: dict[str, Any] = {
        "atoms": len(atoms),
        "energy": calculator.get_property("energy", atoms) / HARTREE,
    }
    if derivatives > 0:
        gradient = -calculator.get_property("forces", atoms) * (BOHR / HARTREE)
        result["gradient"] = gradient.reshape(-1).tolist()
    if derivatives > 1:
        result["hessian"] = (calculator.get_hessian(atoms) * (BOHR**2 / HARTREE)).tolist()
    return result
