"""The table of errors that a run keeps: metrics.csv and TensorBoard events."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kinml_fast.errors import InputError
from kinml_fast.metrics import Errors

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
"""Columns of metrics.csv: errors in kcal/mol and kcal/mol/Å, empty where there are none. A run whose loss learns its
weights has more, log_sigma_energy and so on, in the rows of the training set: its state at the end of the epoch."""


@dataclass(frozen=True)
class Row:
    """A row of the table: the errors of one split in one epoch.

    `seconds` is what the pass over the split took, `more` are further columns.
    """

    epoch: int
    split: str
    energy: Errors
    forces: Errors | None
    lr: float
    seconds: float
    structures_per_second: float
    more: Mapping[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, float | int | str]:
        """What stands in each column, without the empty ones."""
        values = {"epoch": self.epoch, "split": self.split}
        for kind, errors in (("energy", self.energy), ("forces", self.forces)):
            if errors is not None:
                values |= {f"{kind}_mae": errors.mae, f"{kind}_rmse": errors.rmse, f"{kind}_max": errors.max}
        return values | {
            "lr": self.lr,
            "seconds": self.seconds,
            "structures_per_second": self.structures_per_second,
            **self.more,
        }


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
        """Write the remaining rows and close the event file."""
        self.flush()
        self._events.close()


class _EventFile:
    """TensorBoard's event file, one record for each row; tags are `energy_rmse/train` and so on.

    Opened at the first row: importing tensorboard takes a third of a second.
    """

    def __init__(self, folder: Path, first_epoch: int) -> None:
        self._folder, self._first_epoch, self._writer = folder, first_epoch, None

    def add(self, moment: float, row: Row) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=f"{column}/{row.split}", simple_value=value)
            for column, value in row.values().items()
            if column not in ("epoch", "split")
        ]
        self._write(wall_time=moment, step=row.epoch, summary=Summary(value=values))

    def _write(self, **fields) -> None:
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
        if self._writer is not None:
            self._writer.close()
