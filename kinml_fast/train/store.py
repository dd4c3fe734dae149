"""A run on disk, kept up to date while it goes."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from kinml_fast.deploy import model_file
from kinml_fast.errors import ModelError
from kinml_fast.train import checkpoint
from kinml_fast.train.config import save_yaml
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.judge import copied_weights
from kinml_fast.train.metrics import MetricsTable, Row
from kinml_fast.train.state import RunState

log = logging.getLogger(__name__)


class RunStore:
    """Opens the folder of a new or earlier run; writes its checkpoints, its model file and its table of errors.

    Parameters
    ----------
    folder
        The run folder.
    state
        What is saved; of a run that is resumed it is restored from last.pt.
    columns
        Of the table, besides those that every run has.
    resume
        Whether to go on with the run in the folder, if there is one.
    overwrite
        Whether to replace it.

    Raises
    ------
    InputError
        The folder holds a run already, another one is being trained there, or it cannot be made; its checkpoint is
        missing, damaged, or does not belong to this run.
    """

    def __init__(
        self, folder: RunFolder, state: RunState, columns: Iterable[str], *, resume: bool, overwrite: bool
    ) -> None:
        self._folder, self._state, self._best_on_disk = folder, state, -1
        columns = tuple(columns)
        with contextlib.ExitStack() as stack:
            hold = stack.enter_context(folder.hold())
            if resume and folder.last.exists():
                self._table = self._reopened(columns)
            else:
                self._table = self._opened(columns, resume, overwrite)
            stack.pop_all()
        # Who never trains lets go of the folder when nobody has this object any more.
        self._let_go = weakref.finalize(self, hold.release)

    def _opened(self, columns: tuple[str, ...], resume: bool, overwrite: bool) -> MetricsTable:
        folder = self._folder
        if not resume:
            folder.create(overwrite)
        elif any(folder.checkpoints.glob("*.pt")):
            raise ModelError(f"{folder.last}: is missing: put another checkpoint of this run there, or start a new run")
        folder.make()
        if not folder.config.exists():
            save_yaml(folder.config, {"training": self._state.config.model_dump()})
        return MetricsTable(folder.path, more=columns)

    def _reopened(self, columns: tuple[str, ...]) -> MetricsTable:
        folder, state = self._folder, self._state
        folder.sweep()
        state.restore(folder.last, checkpoint.load(folder.last))
        table = MetricsTable(folder.path, state.metrics_length, state.epoch, columns)
        if state.epoch < state.config.epochs:
            log.info("%s: goes on with epoch %d, batch %d", folder, state.epoch, state.batch)
        else:
            log.info(
                "%s: has %d epochs, training.epochs is %d: nothing to train", folder, state.epoch, state.config.epochs
            )
        return table

    def begin(self) -> None:
        """The first checkpoint of a new run; what was there before it can go."""
        self.save()
        self._folder.accept()

    @property
    def is_new(self) -> bool:
        """Whether nothing was saved yet."""
        return not self._folder.last.exists()

    def save(self) -> None:
        """Write last.pt, and before it the best weights if there are new ones.

        Raises
        ------
        InputError
            The loss became infinite or NaN; a file could not be written.
        """
        best = self._state.judge.best
        if best.epoch != self._best_on_disk:
            model = self._state.model
            checkpoint.save(self._folder.best, {"model": model.to_dict(), **best.to_dict()})
            notes = {"epoch": best.epoch, "score": best.score, "training": self._state.config.model_dump()}
            present = copied_weights(model)
            model.load_state_dict(best.weights)
            model_file.save(self._folder.model, model, notes)
            model.load_state_dict(present)
            self._best_on_disk = best.epoch
        checkpoint.save(self._folder.last, self._checkpoint())

    def keep(self, epoch: int) -> None:
        """Write a checkpoint that stays; the errors are those of `save`."""
        checkpoint.save(self._folder.epoch(epoch), self._checkpoint())

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows to the table, which `flush` and each checkpoint write out."""
        for row in rows:
            self._table.add(row)

    def flush(self) -> None:
        """Write the rows of the table out."""
        self._table.flush()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Nobody else has to do with the folder in this block; at its end what is open is closed.

        Raises
        ------
        InputError
            Someone else trains there.
        """
        with self._folder.hold(training=True):
            try:
                yield
            finally:
                self._table.close()
                self._let_go()

    def _checkpoint(self) -> dict[str, Any]:
        state = self._state
        if not state.is_finite:
            raise state.diverged(state.epoch, self._folder)
        state.metrics_length = self._table.flush(sync=True)
        return state.to_dict()
