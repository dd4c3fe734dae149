"""The training loop, on energies or on energies and forces."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from kinml_fast import signals
from kinml_fast.data.split import PARTS
from kinml_fast.data.training_data import TrainingData
from kinml_fast.errors import ConfigError, DeviceError, first_line
from kinml_fast.nn import EnergyModel
from kinml_fast.train import checkpoint, continued, results
from kinml_fast.train.captured import EpochRecorder
from kinml_fast.train.config import TrainingConfig
from kinml_fast.train.dataset import Dataset
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.judge import Judge
from kinml_fast.train.loss import ExtraLoss, ExtraLosses, LossBatch, TaskWeights
from kinml_fast.train.metrics import LevelErrors, Residuals, Row, level_columns, level_values
from kinml_fast.train.progress import Progress
from kinml_fast.train.ranks import ALONE, Ranks
from kinml_fast.train.results import Summary
from kinml_fast.train.rhythm import SYSTEM_CLOCK, Clock, Rhythm
from kinml_fast.train.shared import SharedStep
from kinml_fast.train.state import RunState
from kinml_fast.train.steps import FusedStep, Step, make_step
from kinml_fast.train.store import RunStore
from kinml_fast.train.update import Update

log = logging.getLogger(__name__)


class Trainer:
    """Trains a model on energies, or on energies and forces.

    Targets are the structures' energies without single-atom energies, and their forces; `LossConfig` says what the loss
    is. A model of several levels of theory is trained on all of them at once; a structure counts at those that it has.

    Parameters
    ----------
    model
        Initialised; trained in place.
    data
        Structures, split, and single-atom energies for the model.
    config
        How to train.
    folder
        The run folder, or None to keep nothing on disk.
    resume
        Continue from the folder's last checkpoint, if there is one.
    overwrite
        Replace an earlier run in the folder.
    progress
        What shows the progress; by default log lines.
    extra_losses
        Further terms of the loss by name: functions of the model and a `LossBatch` that return a scalar tensor, whose
        gradient autograd adds. Their factors are training.loss.extra_weights, or learned like those of the others.
    freeze
        Layers whose weights stay as they are, by name or pattern; see `FrozenLayers`.
    origin
        The checkpoint that the model comes from (`continued.load` with averaged=False), whose state of the optimizer
        the run goes on with; see `continued.keep_state`. A resumed run has a state already.
    clock
        Tells the time in seconds, by which the progress is shown and checkpoints are written.
    ranks
        The processes that train this model together, on CPUs (`ranks.joined`); the first of them writes the folder.

    Attributes
    ----------
    model : EnergyModel
    config : TrainingConfig
    folder : RunFolder or None
    progress : Progress
    data : Dataset
        The structures as the steps read them.

    Raises
    ------
    InputError
        Elements that the model does not have; an empty training or validation set; no forces where they are asked
        for; a folder that holds a run already; a checkpoint that does not belong to this model, data or configuration;
        names that no layer has; an origin without a state of this optimizer.
    """

    def __init__(
        self,
        model: EnergyModel,
        data: TrainingData,
        config: TrainingConfig | None = None,
        folder: str | Path | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        progress: Progress | None = None,
        extra_losses: Mapping[str, ExtraLoss] | None = None,
        freeze: Sequence[str] = (),
        origin: continued.Origin | None = None,
        clock: Clock = SYSTEM_CLOCK,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.config = config or TrainingConfig()
        place = None if folder is None else RunFolder(folder)
        self.folder = place if ranks.is_first else None
        self.progress = progress or Progress()
        self.data = Dataset(model, data, self.config)
        self._steps: dict[bool, Step] = {}
        self._clock, self._rhythm, self._ranks = clock, Rhythm(clock, self.config.checkpoint_seconds), ranks
        if not ranks.alone and (extra_losses or model.sae.device.type != "cpu"):
            what = "extra_losses" if extra_losses else "training.device other than cpu"
            raise ConfigError(f"{what} and several processes do not go together yet: use one process")

        tasks = TaskWeights(self.config.loss, list(extra_losses or {}), model.sae.device)
        self._extra = ExtraLosses(extra_losses, model, tasks) if extra_losses else None
        self._update = Update(model, self.config, tasks, freeze)
        resuming = resume and place is not None and place.last.exists()
        if origin is not None and not resuming:
            continued.keep_state(origin, model, self.config, self._update)
        self._judge = Judge(self.config, self.data.levels, model)
        self._state = RunState(model, self.config, self.data, self._update, self._judge)
        self._recorder = EpochRecorder(
            self._update, self._state.errors, self.data.sizes["train"], self.config.batch_size, model.sae.device
        )
        self._store: RunStore | None = None
        if self.folder is not None:
            columns = level_columns(model.fidelities) + tasks.columns()
            self._store = RunStore(self.folder, self._state, columns, resume=resume, overwrite=overwrite)
        elif resuming and place is not None:
            self._state.restore(place.last, checkpoint.load(place.last))
        self._update.hold()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What moves the weights; its parameters are the model's, and the learned factors of the loss if there are."""
        return self._update.optimizer

    @property
    def scheduler(self) -> LRScheduler | None:
        """The schedule of the learning rate; None for none."""
        return self._update.scheduler

    def fit(self) -> Summary:
        """Train to the end.

        Afterwards the model has the weights of the best epoch, those of model.pt.

        Raises
        ------
        InputError
            The loss became infinite or NaN, a file could not be written, or the memory of the GPU is too small.
        KeyboardInterrupt, Stopped
            On Ctrl-C, or another signal that asks for an end (`signals.ENDING`), after last.pt was written; the second
            signal does not wait for that.
        """
        started = self._clock()
        with contextlib.ExitStack() as stack:
            if self._store is not None:
                stack.enter_context(self._store.training())
            if not self._ranks.alone:
                self._ranks.set_timeout(self.config.rank_timeout_seconds)
                self._ranks.same(self._state.identity(), "give all of them the same files and arguments")
            stack.enter_context(_threads(self.config.threads))
            stack.enter_context(_memory_explained(self.config))
            if self.folder is not None:
                stack.enter_context(self.folder.logged())
            self.prepare()
            if self._store is not None and self._store.is_new:
                self._store.save()
            self._train()
            if self._store is not None:
                self._store.save()
            return self._finish(started)

    def prepare(self) -> None:
        """Compute what the first epoch needs and keeps in memory, such as descriptors; `fit` begins with this."""
        for sentence in self.data.numbers(self.config.loss.forces):
            log.info("%s", sentence)
        self.step(self.config.loss.has_forces(self._state.epoch))

    def step(self, with_forces: bool) -> Step:
        """What trains an epoch on energies, or on energies and forces, and evaluates."""
        if with_forces not in self._steps:
            given = self.model, self.data, self._update.tasks, self.config, with_forces
            step = make_step(*given, planned=self._ranks.alone)
            if not self._ranks.alone:
                assert isinstance(step, FusedStep)
                self._steps[with_forces] = SharedStep(step, self._ranks, self._rhythm)
            else:
                self._steps[with_forces] = step
        return self._steps[with_forces]

    def train_epoch(self) -> Row:
        """Go through the training structures once, or through what is left of a resumed epoch.

        Returns
        -------
        Row
            The errors of each structure before the update from its batch.
        """
        state, tasks = self._state, self._update.tasks
        epoch, lr = state.epoch, self._update.learning_rate
        with_forces = self.config.loss.has_forces(epoch)
        started = self._clock() - state.elapsed
        if with_forces:
            self._steps.pop(False, None)  # what an energy-only phase kept takes memory
        else:
            state.errors.clear_forces()
        order = self.data.order(epoch)
        tasks.begin(with_forces)
        self._run_batches(self.step(with_forces), order, started)
        state.epoch, state.batch, state.elapsed = epoch + 1, 0, 0.0
        known = self.data.known_energies[:, order.cpu().numpy()]
        errors = state.errors.of_levels(known, self.data.trained_components, with_forces)
        return self._row("train", epoch, lr, errors, self._clock() - started, tasks.row())

    def _run_batches(self, step: Step, order: Tensor, started: float) -> None:
        """Train on the batches of an epoch that are not done; its first one was begun at `started`."""
        state, update, extra, rhythm = self._state, self._update, self._extra, self._rhythm
        size, learning = self.config.batch_size, update.tasks.learning
        if extra is None and not learning and state.batch == 0:
            recorded = self._recorder.recorded(step)
            if recorded is not None:
                recorded.run(order)
                state.batch = -(-len(order) // size)
                if rhythm.due():
                    self._tick(state.batch, started)
                return
        batches = step.batches(order, size, state.errors)
        n_batches = len(batches.arguments)
        terms = update.tasks.terms(batches.counts) if learning else [None] * n_batches
        for number in range(state.batch, n_batches):
            step.run(*batches.arguments[number])
            if extra is not None:
                structures = order[number * size : (number + 1) * size]
                extra.add(LossBatch(self.data.origin[structures], *self.data.gather(structures)))
            update.step(terms[number])
            state.batch += 1
            if rhythm.due():
                self._tick(n_batches, started)

    def _tick(self, n_batches: int, started: float) -> None:
        """Do what is due between two batches of an epoch that was begun at `started`."""
        state, rhythm = self._state, self._rhythm
        state.elapsed = self._clock() - started
        save = None if self._store is None else self._store.save
        if rhythm.interrupted and not self._ranks.alone:
            rhythm.signal = self._ranks.largest(rhythm.signal)
            save = functools.partial(self._ranks.in_turn, save or _nothing, _nothing)
        try:
            rhythm.tick(lambda: self.progress.batch(state.epoch, state.batch / n_batches), save)
        except (KeyboardInterrupt, signals.Stopped):
            log.info("%s: ends after batch %d of epoch %d", signals.name(rhythm.signal), state.batch, state.epoch)
            raise

    @property
    def _finished(self) -> bool:
        return self._judge.out_of_patience or self._state.epoch >= self.config.epochs

    def _train(self) -> None:
        self._rhythm.begin()
        self.progress.begin(self.config.epochs, self._state.epoch)
        try:
            with self._rhythm.interruptible():
                while not self._finished:
                    self._end_epoch(self.train_epoch())
                if not self._ranks.alone:
                    self._rhythm.agree(False, self._ranks.largest(self._rhythm.signal) != 0)
                if self._rhythm.interrupted:
                    self._tick(1, self._clock())
        finally:
            self.progress.end()

    def _end_epoch(self, train: Row) -> None:
        epoch, lr = train.epoch, train.lr
        with self._update.judged():
            validation, errors = self._evaluated_row("validation", epoch, lr)
            score = self._judge.score(errors)
            numbers = (x for x in train.values().values() if not isinstance(x, str))
            if not math.isfinite(score) or not all(map(math.isfinite, numbers)):
                raise self._state.diverged(epoch, self.folder)
            self._judge.judge(epoch, score)
            self._update.end_epoch(score)
            rows = [train, validation]
            kept = _every(self.config.save_every, epoch + 1)
            if self.data.sizes["test"] and (kept or _every(self.config.test_every, epoch + 1) or self._finished):
                rows.append(self._evaluated_row("test", epoch, lr)[0])
        self.progress.epoch(*rows)
        if self._store is None:
            return
        self._store.add(rows)
        if kept:
            self._store.keep(epoch)
        elif self._rhythm.flushing.passed():
            self._store.flush()
            self._rhythm.flushing.restart()

    def evaluate(self, part: str, with_forces: bool = False) -> list[Residuals]:
        """Residuals of a part with the present weights at each level of theory, lowest first."""
        data, where = self.data, self.data.range(part)
        size = self.config.validation_batch_size if part == "validation" else self.config.test_batch_size
        energies, forces = self.step(with_forces).predict(where.start, where.stop, size)
        of_energies = (energies - data.energies[:, where]).cpu().numpy()
        found = [
            Residuals(residuals[known], None)
            for residuals, known in zip(of_energies, data.known_energies[:, where], strict=True)
        ]
        if forces is None:
            return found
        atoms, known_atoms = data.atoms(part)
        of_forces = (forces.double() - data.forces[:, atoms]).cpu().numpy()
        return [
            of_level._replace(forces=residuals[known])
            for of_level, residuals, known in zip(found, of_forces, known_atoms, strict=True)
        ]

    def _evaluated_row(self, part: str, epoch: int, lr: float) -> tuple[Row, list[LevelErrors]]:
        """The row of a part of the data with the present weights, and the errors of each level."""
        started = self._clock()
        errors = [residuals.errors() for residuals in self.evaluate(part, self.config.loss.forces)]
        return self._row(part, epoch, lr, errors, self._clock() - started), errors

    def _row(
        self,
        part: str,
        epoch: int,
        lr: float,
        errors: Sequence[LevelErrors],
        seconds: float,
        more: Mapping[str, float] | None = None,
    ) -> Row:
        rate = self.data.sizes[part] / max(seconds, 1e-9)
        further = {**level_values(self.model.fidelities, errors), **(more or {})}
        return Row(epoch, part, *errors[-1], lr, seconds, rate, further)

    def _finish(self, started: float) -> Summary:
        self.model.load_state_dict(self._judge.best.weights)
        parts = [part for part in PARTS if self.data.sizes[part]]
        residuals = {part: self.evaluate(part, self.config.loss.forces) for part in parts}
        if not self.config.loss.forces and self.data.known_forces.any() and self.data.coordinates is not None:
            # Forces that were not trained on are reported all the same.
            for part in parts:
                both = zip(residuals[part], self.evaluate(part, True), strict=True)
                residuals[part] = [energies._replace(forces=found.forces) for energies, found in both]
        if self.folder is not None and self._state.epoch > 0:
            self._report(self.folder, residuals)
        seconds = self._clock() - started
        return Summary.of(residuals, self.model.fidelities, self._state.epoch, self._judge.best.epoch, seconds)

    def _report(self, folder: RunFolder, residuals: Mapping[str, Sequence[Residuals]]) -> None:
        best = self._judge.best.epoch
        table = results.write_report(folder, self.data, self.model.fidelities, residuals, best)
        log.info("best epoch %d of %d, %s:\n%s", best, self._state.epoch, folder, table)


def _nothing() -> None:
    pass


def _every(interval: int | None, epochs: int) -> bool:
    return interval is not None and epochs % interval == 0


@contextlib.contextmanager
def _memory_explained(config: TrainingConfig) -> Iterator[None]:
    """Say what to do when the memory of a GPU is too small."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        names = ("batch_size", "validation_batch_size", "test_batch_size")
        sizes = " ".join(f"training.{name}={max(getattr(config, name) // 2, 1)}" for name in names)
        stored = "training.jacobian=recompute, " if config.jacobian == "stored" else ""
        raise DeviceError(
            f"the GPU is out of memory ({first_line(error)}): try {stored}batches half as large ({sizes}), or "
            "training.device=cpu"
        ) from error


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
