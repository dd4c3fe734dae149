"""The table of errors that a run keeps: metrics.csv and TensorBoard events."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kinml_fast.errors import InputError
from kinml_fast.metrics import Errors, ErrorSums
from kinml_fast.units import GIGAPASCAL, KCAL_PER_MOL

COLUMNS = (
    "epoch",
    "split",
    "energy_mae",
    "energy_rmse",
    "energy_max",
    "forces_mae",
    "forces_rmse",
    "forces_max",
    "lr",
    "seconds",
    "structures_per_second",
)
"""Columns of metrics.csv: errors in kcal/mol and kcal/mol/Å, empty where there are none. With several levels of theory
they are those of the highest level, and there are more columns for each lower one: energy_mae_fidelity0 and so on. A
run on stresses also has stress_mae, stress_rmse and stress_max, in GPa. A run whose loss learns its weights also has
log_sigma_energy and so on, in the rows of the training set: its state at the end of the epoch."""

_KINDS = ("energy", "forces", "stress")
_NUMBERS = ("mae", "rmse", "max")


class LevelErrors(NamedTuple):
    """Errors of energies, forces and stresses at one level of theory, None where nothing is known."""

    energy: Errors | None = None
    forces: Errors | None = None
    stress: Errors | None = None


class Residuals(NamedTuple):
    """Predicted minus reference, where the latter is known, of some structures at one level of theory.

    `energies` [n] in eV, `forces` [n_atoms, 3] in eV/Å and `stresses` [n, 3, 3] in eV/Å³ or None if not asked for;
    float64.
    """

    energies: np.ndarray
    forces: np.ndarray | None = None
    stresses: np.ndarray | None = None


@dataclass
class ResidualSums:
    """Sums of the residuals of a part of the data at one level of theory; None of what is not asked for."""

    energies: ErrorSums = field(default_factory=ErrorSums)
    forces: ErrorSums | None = None
    stresses: ErrorSums | None = None

    def add(self, residuals: Residuals) -> None:
        """Count the residuals of some more structures."""
        with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges is told so elsewhere
            self.energies.add(residuals.energies)
            if residuals.forces is not None:
                self.forces = self.forces or ErrorSums()
                self.forces.add(residuals.forces)
            if residuals.stresses is not None:
                self.stresses = self.stresses or ErrorSums()
                self.stresses.add(residuals.stresses)

    def errors(self) -> LevelErrors:
        """In kcal/mol, kcal/mol/Å and GPa; None where nothing is known."""
        of_kinds = (self.energies, KCAL_PER_MOL), (self.forces, KCAL_PER_MOL), (self.stresses, GIGAPASCAL)
        with np.errstate(over="ignore", invalid="ignore"):
            return LevelErrors(*(x.errors(unit) if x is not None and x.count else None for x, unit in of_kinds))


def level_columns(fidelities: Sequence[int], stresses: bool = False) -> list[str]:
    """The further columns of errors: those of stresses, and of the lower ones of several levels, given lowest first."""
    of_stress = [f"stress_{number}" for number in _NUMBERS] if stresses else []
    lower = [column + _suffix(fidelity) for fidelity in fidelities[:-1] for column in (*COLUMNS[2:8], *of_stress)]
    return of_stress + lower


def level_values(fidelities: Sequence[int], errors: Sequence[LevelErrors]) -> dict[str, float]:
    """What stands in these columns."""
    lower = zip(fidelities[:-1], errors[:-1], strict=True)
    return {
        column + _suffix(fidelity): value
        for fidelity, of_level in lower
        for column, value in _values(*of_level).items()
    }


def _suffix(fidelity: int) -> str:
    return f"_fidelity{fidelity}"


def _values(*of_kinds: Errors | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, errors in zip(_KINDS, of_kinds, strict=True):
        if errors is not None:
            found |= {f"{kind}_{number}": getattr(errors, number) for number in _NUMBERS}
    return found


@dataclass(frozen=True)
class Row:
    """A row of the table: the errors of one split in one epoch.

    `energy`, `forces` and `stress` are those of the highest level of theory, None where nothing is known. `seconds` is
    what the pass over the split took, `more` are further columns.
    """

    epoch: int
    split: str
    energy: Errors | None
    forces: Errors | None
    lr: float
    seconds: float
    structures_per_second: float
    more: Mapping[str, float] = field(default_factory=dict)
    stress: Errors | None = None

    def values(self) -> dict[str, float | int | str]:
        """What stands in each column, without the empty ones."""
        return {
            "epoch": self.epoch,
            "split": self.split,
            **_values(self.energy, self.forces, self.stress),
            "lr": self.lr,
            "seconds": self.seconds,
            "structures_per_second": self.structures_per_second,
            **self.more,
        }

    def rmse(self) -> str:
        """The root mean square errors in words, those of lower levels in brackets: `0.5 and 1.2 (fidelity 0: 0.4)`."""
        own = (self.energy, self.forces, self.stress)
        text = _together(*(None if errors is None else errors.rmse for errors in own))
        of_lower = []
        for level in dict.fromkeys(name.partition("_fidelity")[2] for name in self.more if "_fidelity" in name):
            of_kinds = (self.more.get(f"{kind}_rmse_fidelity{level}") for kind in _KINDS)
            of_lower.append(f"fidelity {level}: {_together(*of_kinds)}")
        return f"{text} ({', '.join(of_lower)})" if of_lower else text


def _together(energy: float | None, *others: float | None) -> str:
    return " and ".join(["-" if energy is None else f"{energy:.4f}", *(f"{x:.4f}" for x in others if x is not None)])


class MetricsTable:
    """Writes rows to `metrics.csv` and to a TensorBoard event file beside it.

    Rows are collected and written by `flush`, so that an epoch of milliseconds does not wait for files.

    Parameters
    ----------
    folder
        The run folder.
    resume_at
        Length of metrics.csv in bytes that a checkpoint belongs to; what follows is cut off. None: a new table.
    epoch
        First epoch that rows will come for; TensorBoard forgets what an earlier event file says about it.
    more
        Columns besides COLUMNS.
    """

    def __init__(self, folder: Path, resume_at: int | None = None, epoch: int = 0, more: Sequence[str] = ()) -> None:
        self._columns = (*COLUMNS, *more)
        self._path = folder / "metrics.csv"
        self._events = _EventFile(folder, epoch)
        self._rows: list[tuple[float, Row]] = []
        if resume_at is None:
            self._path.write_text(",".join(self._columns) + "\n", encoding="ascii")
        else:
            length = self._path.stat().st_size if self._path.exists() else 0
            if length < resume_at:
                raise InputError(
                    f"{self._path}: is shorter ({length} bytes) than the checkpoint expects ({resume_at}): "
                    "put back the file of this run, or start a new run"
                )
            os.truncate(self._path, resume_at)

    def add(self, row: Row) -> None:
        """Append a row."""
        self._rows.append((time.time(), row))

    def flush(self, sync: bool = False) -> int:
        """Write the rows out and return the length of metrics.csv in bytes.

        With `sync` the file is on the disk when this returns.
        """
        with self._path.open("ab") as file:
            for moment, row in self._rows:
                values = row.values()
                file.write((",".join(str(values.get(column, "")) for column in self._columns) + "\n").encode("ascii"))
                self._events.add(moment, row)
            self._rows.clear()
            file.flush()
            if sync:
                os.fsync(file.fileno())
            self._events.flush()
            return file.tell()

    def close(self) -> None:
        """Close the event file; a further row opens another one. Rows that were not flushed are not written."""
        # Behind a flush nothing is left to write; without one, another error is on its way.
        with contextlib.suppress(OSError):
            self._events.close()


class _EventFile:
    """TensorBoard's event file, one record for each row; tags are `energy_rmse/train` and so on.

    Opened at the first row: importing tensorboard takes a third of a second.
    """

    def __init__(self, folder: Path, first_epoch: int) -> None:
        self._folder, self._first_epoch = folder, first_epoch
        self._writer: Any = None  # of a library without type hints

    def add(self, moment: float, row: Row) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=f"{column}/{row.split}", simple_value=value)
            for column, value in row.values().items()
            if column not in ("epoch", "split")
        ]
        self._write(wall_time=moment, step=row.epoch, summary=Summary(value=values))

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._writer is None:
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self._writer = RecordWriter((self._folder / name).open("wb"))
            self._write(wall_time=time.time(), file_version="brain.Event:2")
            start = SessionLog(status=SessionLog.SessionStatus.START)
            self._write(wall_time=time.time(), step=self._first_epoch, session_log=start)
        self._writer.write(Event(**fields).SerializeToString())

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
