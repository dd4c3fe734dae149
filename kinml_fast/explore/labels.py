"""Labelling: energies and forces of structures, by processes of `worker`, in any number and order."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kinml_fast.errors import ConfigError, DataError, InputError
from kinml_fast.explore.config import LabelsConfig
from kinml_fast.explore.folder import read_json, write_json
from kinml_fast.explore.geometry import Geometry
from kinml_fast.train.progress import SHOWN_LIVE, Progress

log = logging.getLogger(__name__)

ATTEMPTS = 2
_SECONDS_TO_START = 600.0
_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True, eq=False)
class Label:
    """What a calculator said of a structure.

    Attributes
    ----------
    energy
        eV; None if it failed.
    forces
        [n, 3], eV/Å; None if it failed.
    failures
        What went wrong, in the order of the attempts.
    """

    energy: float | None
    forces: np.ndarray | None
    failures: tuple[str, ...]

    @classmethod
    def load(cls, path: Path) -> Label:
        """That of a file."""
        values = read_json(path)
        forces = values["forces"]
        return cls(values["energy"], None if forces is None else np.array(forces), tuple(values["failures"]))


def label(
    geometries: Sequence[Geometry],
    calculator: str,
    options: dict[str, Any],
    settings: LabelsConfig,
    folder: Path,
    progress: Progress | None = None,
) -> list[Label]:
    """Label structures, but for those that have their label in the folder from an earlier time.

    Parameters
    ----------
    geometries
        What to label.
    calculator, options
        By what.
    settings
        By how many processes, in what time.
    folder
        Gets a file for each as soon as it is labelled, 00017.json, and, while that is done, a folder 00017 in which the
        calculator writes; of structures that failed it stays.
    progress
        What shows how many are labelled.

    Raises
    ------
    InputError
        The calculator cannot be made; a file cannot be written. What was labelled stays.
    DataError
        No structure could be labelled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:05}.json" for number in range(len(geometries))]
    todo: queue.Queue[int] = queue.Queue()
    for number, file in enumerate(files):
        if not file.exists():
            todo.put(number)
    if not todo.empty():
        asked = {"calculator": calculator, "options": options}
        _in_processes(geometries, asked, settings, files, todo, progress or Progress())
    found = [Label.load(file) for file in files]
    failed = [one for one in found if one.energy is None]
    if failed:
        log.warning("%d of %d structures could not be labelled: %s", len(failed), len(found), failed[0].failures[-1])
    if geometries and len(failed) == len(found):
        raise DataError(
            f"{folder}: {calculator} could label none of {len(found)} structures ({failed[0].failures[-1]}): "
            "correct its name and options, and remove this folder"
        )
    return found


def _in_processes(
    geometries: Sequence[Geometry],
    asked: dict[str, Any],
    settings: LabelsConfig,
    files: Sequence[Path],
    todo: queue.Queue[int],
    progress: Progress,
) -> None:
    total, stop, errors = todo.qsize(), threading.Event(), []
    workers = [_Worker(asked, settings.seconds) for _ in range(min(settings.workers, total))]

    def work(worker: _Worker) -> None:
        try:
            while not stop.is_set():
                try:
                    number = todo.get_nowait()
                except queue.Empty:
                    return
                _label_one(worker, geometries[number], files[number], stop)
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        said = time.monotonic()
        # A signal is seen by this thread, which must not sleep long.
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(0.2)
            done = sum(file.exists() for file in files)
            progress.count("labelling", done, len(files))
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                log.info("labelled %d of %d structures", done, len(files), extra=SHOWN_LIVE)
    finally:
        stop.set()
        for worker in workers:
            worker.end()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def _label_one(worker: _Worker, geometry: Geometry, file: Path, stop: threading.Event) -> None:
    failures: list[str] = []
    scratch = file.with_suffix("")
    energy = forces = None
    while len(failures) < ATTEMPTS:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(exist_ok=True)
        answer = worker.ask(
            {"symbols": geometry.symbols, "positions": geometry.positions.tolist(), "scratch": str(scratch.resolve())}
        )
        if stop.is_set():  # it may have been ended from here
            return
        if "failure" not in answer:
            energy, forces = answer["energy"], answer["forces"]
            break
        failures.append(answer["failure"])
    write_json(file, {"energy": energy, "forces": forces, "failures": failures})
    if energy is not None:
        shutil.rmtree(scratch, ignore_errors=True)


class _Worker:
    """A process that labels; another one takes its place when it ends or is ended."""

    def __init__(self, asked: dict[str, Any], seconds: float) -> None:
        self._asked, self._seconds = asked, seconds
        self._process: subprocess.Popen | None = None
        self._ended = False
        self._guard = threading.Lock()

    def ask(self, structure: dict[str, Any]) -> dict[str, Any]:
        """The answer about a structure; that the process has ended, or took too long, is an answer too."""
        if self._process is None:
            self._begin()
        return self._answer(structure, self._seconds)

    def end(self) -> None:
        """End the process, and all that it has started, and begin no other."""
        with self._guard:
            self._ended = True
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _begin(self) -> None:
        with self._guard:
            if self._ended:
                return
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kinml_fast.explore.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                # Each process has a core; of more threads, sums in another order would make other digits.
                env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | dict(os.environ),
            )
        answer = self._answer(self._asked, _SECONDS_TO_START)
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        if "failure" in answer and not self._ended:
            raise InputError(f"a process that labels cannot be started ({answer['failure']}): try a worker less")

    def _answer(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        if process is None:
            return {"failure": "ended"}
        assert process.stdin is not None
        assert process.stdout is not None
        until = time.monotonic() + seconds
        text = b""
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            while not text.endswith(b"\n"):
                left = until - time.monotonic()
                if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                    self._reap()
                    return {"failure": f"took more than {seconds:g} s"}
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise BrokenPipeError
                text += piece
        except BrokenPipeError:
            code = self._reap()
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            return {"failure": f"the process of the calculator ended {how}"}
        return json.loads(text)

    def _reap(self) -> int:
        """End what is left of the process; how it ended."""
        process, self._process = self._process, None
        assert process is not None
        code = process.poll()
        if code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(0.2)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return process.returncode if code is None else code
