"""The training loop, on energies or on energies and forces, of crystals also on stresses."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LRScheduler

from kinml_fast import signals
from kinml_fast.data.large import LargeData
from kinml_fast.data.split import PARTS
from kinml_fast.data.training_data import TrainingData
from kinml_fast.errors import ConfigError, DeviceError, InputError, first_line
from kinml_fast.nn import EnergyModel
from kinml_fast.train import checkpoint, continued
from kinml_fast.train.board import this_process
from kinml_fast.train.captured import EpochRecorder
from kinml_fast.train.config import TrainingConfig
from kinml_fast.train.dataset import Stretch, make_dataset
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.judge import Judge
from kinml_fast.train.loss import ExtraLoss, ExtraLosses, LossBatch, TaskWeights
from kinml_fast.train.metrics import LevelErrors, Residuals, ResidualSums, Row, level_columns, level_values
from kinml_fast.train.progress import Progress
from kinml_fast.train.ranks import ALONE, Ranks
from kinml_fast.train.results import Comparisons, Summary
from kinml_fast.train.rhythm import SYSTEM_CLOCK, Clock, Rhythm
from kinml_fast.train.shared import SharedStep
from kinml_fast.train.state import RunState
from kinml_fast.train.steps import Step, make_step
from kinml_fast.train.store import RunStore
from kinml_fast.train.update import Update
from kinml_fast.train.window import Window

log = logging.getLogger(__name__)


class Trainer:
    """Trains a model on energies, or on energies and forces, also on stresses.

    Targets are the structures' energies without single-atom energies, their forces and stresses; `LossConfig` says what
    the loss is. A model of several levels of theory is trained on all of them at once; a structure counts at those that
    it has.

    Parameters
    ----------
    model
        Initialised; trained in place.
    data
        Structures, split, and single-atom energies for the model; in memory, or in a file that they are read from while
        the run goes (docs/large_data.md).
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
        Each of several processes calls them with the whole batch, and all go on with what the first one gets.
    freeze
        Layers whose weights stay as they are, by name or pattern; see `FrozenLayers`.
    origin
        The checkpoint that the model comes from (`continued.load` with averaged=False), whose state of the optimizer
        the run goes on with; see `continued.keep_state`. A resumed run has a state already.
    clock
        Tells the time in seconds, by which the progress is shown and checkpoints are written.
    ranks
        The processes that train this model together (`ranks.joined`); the first of them writes the folder.

    Attributes
    ----------
    model : EnergyModel
    config : TrainingConfig
    folder : RunFolder or None
    progress : Progress
    data : Dataset
        The structures, in windows that the steps read.

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
        data: TrainingData | LargeData,
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
        self.config = (config or TrainingConfig()).for_ranks(ranks.size)
        place = None if folder is None else RunFolder(folder)
        self.folder, self._place = place if ranks.is_first else None, place
        self.progress = progress or Progress()
        self.data = make_dataset(model, data, self.config)
        self._steps: dict[bool, Step] = {}
        self._clock, self._rhythm, self._ranks = clock, Rhythm(clock, self.config.checkpoint_seconds), ranks
        batch = min(self.config.batch_size, self.data.sizes["train"])
        if ranks.size > batch:
            raise ConfigError(
                f"{ranks.size} processes cannot share a batch of {batch}: start fewer, or set training.batch_size to "
                f"{ranks.size} or more"
            )

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
            columns = level_columns(model.fidelities, self.config.loss.stresses) + tasks.columns()
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
            if self._place is not None:
                stack.enter_context(self._place.logged(self._ranks.rank))
            self.prepare()
            if self._store is not None and self._store.is_new:
                self._store.begin()
            self._train()
            if self._store is not None:
                self._store.save()
            return self._finish(started)

    def prepare(self) -> None:
        """Compute what the first epoch needs and keeps in memory, such as descriptors; `fit` begins with this."""
        if not self._ranks.alone:
            log.info("process %d of %d, %s", self._ranks.rank, self._ranks.size, this_process())
        for sentence in self.data.numbers(self.config.loss.forces, self.config.loss.stresses):
            log.info("%s", sentence)
        if self.data.whole is not None:
            self.step(self.config.loss.has_forces(self._state.epoch), self.data.whole)

    def step(self, with_forces: bool, window: Window) -> Step:
        """What trains on energies, or on energies and forces, of the structures of a window, and evaluates."""
        if window.lasting and with_forces in self._steps:
            return self._steps[with_forces]
        fused = make_step(self.model, window, self._update.tasks, self.config, with_forces)
        step = fused if self._ranks.alone else SharedStep(fused, self._ranks, self._rhythm)
        if window.lasting:
            self._steps[with_forces] = step
        return step

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
        tasks.begin(with_forces)
        for stretch in self.data.epoch(epoch, self.config.batch_size, state.errors.first):
            known = stretch.window.known_energies[:, stretch.order.cpu().numpy()]
            state.errors.begin(stretch.first, known, with_forces)
            self._run_batches(self.step(with_forces, stretch.window), stretch, started)
            state.errors.end()
        state.epoch, state.batch, state.elapsed = epoch + 1, 0, 0.0
        components = self.data.trained_components, with_forces, self.data.trained_stress_components
        errors = state.errors.of_levels(*components)
        state.errors.clear()
        return self._row("train", epoch, lr, errors, self._clock() - started, tasks.row())

    def _run_batches(self, step: Step, stretch: Stretch, started: float) -> None:
        """Train on the batches of a stretch that are not done; the epoch's first one was begun at `started`."""
        state, update, extra, rhythm = self._state, self._update, self._extra, self._rhythm
        size, learning, order = self.config.batch_size, update.tasks.learning, stretch.order
        n_batches = self.data.batches(size)
        if extra is None and not learning and state.batch == 0 and stretch.window.lasting and self._ranks.alone:
            recorded = self._recorder.recorded(step)
            if recorded is not None:
                recorded.run(order)
                state.batch = n_batches
                if rhythm.due():
                    self._tick(n_batches, started)
                return
        batches = step.batches(order, size, state.errors)
        terms = update.tasks.terms(batches.counts) if learning else [None] * len(batches.arguments)
        for number in range(state.batch - stretch.first, len(batches.arguments)):
            step.run(*batches.arguments[number])
            if extra is not None:
                structures = order[number * size : (number + 1) * size]
                extra.add(LossBatch(stretch.window.origin[structures], *stretch.window.gather(structures)))
                for tensor in extra.results():
                    self._ranks.take_first(tensor)
            update.step(terms[number])
            state.batch += 1
            if rhythm.due():
                self._tick(n_batches, started)

    def _tick(self, n_batches: int, started: float) -> None:
        """Do what is due between two batches of an epoch that was begun at `started`."""
        state, rhythm = self._state, self._rhythm
        state.elapsed = self._clock() - started
        save = None if self._store is None else self._store.save
        if self._ranks.is_first and not rhythm.interrupted:
            self._look()
        if rhythm.interrupted and not self._ranks.alone:
            rhythm.signal = self._ranks.largest(rhythm.signal)
            save = functools.partial(self._ranks.in_turn, save or _nothing, _nothing)
        try:
            rhythm.tick(lambda: self.progress.batch(state.epoch, state.batch / n_batches), save)
        except (KeyboardInterrupt, signals.Stopped):
            log.info("%s: ends after batch %d of epoch %d", signals.name(rhythm.signal), state.batch, state.epoch)
            raise

    def _look(self) -> None:
        """Heed what processes say that train other models beside this one."""
        try:
            number = self._ranks.look()
        except InputError:
            if self._store is not None:
                self._store.save()
            raise
        if number:
            self._rhythm.ask(number)

    @property
    def _finished(self) -> bool:
        return self._judge.out_of_patience or self._state.epoch >= self.config.epochs

    def _train(self) -> None:
        self._rhythm.begin()
        self.progress.processes = self._ranks.size
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

    def evaluate(self, part: str, with_forces: bool = False) -> list[ResidualSums]:
        """Sums of the residuals of a part with the present weights at each level of theory, lowest first."""
        sums = [ResidualSums() for _ in range(self.data.levels)]
        for _, _, residuals in self._residuals(part, with_forces):
            for of_level, found in zip(sums, residuals, strict=True):
                of_level.add(found)
        return sums

    def _residuals(
        self, part: str, with_forces: bool, forces_too: bool = False
    ) -> Iterator[tuple[Window, slice, list[Residuals]]]:
        """The residuals of a part at each level, window by window, and which structures of the window they are of.

        With `forces_too` forces are those of a step that trains on them, and energies those of one that does not.
        """
        size = self.config.validation_batch_size if part == "validation" else self.config.test_batch_size
        for window, where in self.data.windows(part):
            energies, forces, stresses = self.step(with_forces, window).predict(where.start, where.stop, size)
            if forces_too:
                forces = self.step(True, window).predict(where.start, where.stop, size).forces
            of_energies = (energies - window.energies[:, where]).cpu().numpy()
            known = zip(of_energies, window.known_energies[:, where], strict=True)
            found = [Residuals(residuals[is_known]) for residuals, is_known in known]
            if forces is not None:
                of_forces = (forces.double() - window.forces[:, window.atoms(where)]).cpu().numpy()
                of_levels = zip(found, of_forces, window.known_components(where), strict=True)
                found = [of_level._replace(forces=residuals[is_known]) for of_level, residuals, is_known in of_levels]
            if stresses is not None and window.stresses is not None:
                of_stresses = (stresses - window.stresses[:, where]).cpu().numpy()
                of_levels = zip(found, of_stresses, window.known_stresses[:, where], strict=True)
                found = [of_level._replace(stresses=residuals[is_known]) for of_level, residuals, is_known in of_levels]
            yield window, where, found

    def _evaluated_row(self, part: str, epoch: int, lr: float) -> tuple[Row, list[LevelErrors]]:
        """The row of a part of the data with the present weights, and the errors of each level."""
        started = self._clock()
        errors = [sums.errors() for sums in self.evaluate(part, self.config.loss.forces)]
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
        energy, forces, stress = errors[-1]
        return Row(epoch, part, energy, forces, lr, seconds, rate, further, stress)

    def _finish(self, started: float) -> Summary:
        self.model.load_state_dict(self._judge.best.weights)
        parts = [part for part in PARTS if self.data.sizes[part]]
        with_forces, reported = self.config.loss.forces, self.folder is not None and self._state.epoch > 0
        # Forces that were not trained on are reported all the same.
        forces_too = not with_forces and self.data.has_forces and self._has_coordinates
        comparisons = Comparisons(self.data.levels)
        sums = {part: [ResidualSums() for _ in range(self.data.levels)] for part in parts}
        for part in parts:
            for window, where, residuals in self._residuals(part, with_forces, forces_too):
                for of_level, found in zip(sums[part], residuals, strict=True):
                    of_level.add(found)
                if reported:
                    comparisons.add(part, window, where, residuals)
        if self.folder is not None and reported:
            self._report(self.folder, comparisons)
        seconds = self._clock() - started
        return Summary.of(sums, self.model.fidelities, self._state.epoch, self._judge.best.epoch, seconds)

    @property
    def _has_coordinates(self) -> bool:
        return self.data.whole is None or self.data.whole.coordinates is not None

    def _report(self, folder: RunFolder, comparisons: Comparisons) -> None:
        best = self._judge.best.epoch
        table = comparisons.write(folder, self.model.fidelities, best)
        log.info("best epoch %d of %d, %s:\n%s", best, self._state.epoch, folder, table)


def _nothing() -> None:
    pass


def _every(interval: int | None, epochs: int) -> bool:
    return interval is not None and epochs % interval == 0


@contextlib.contextmanager
def _memory_explained(config: TrainingConfig) -> Iterator[None]:
    """Say what to do when the memory is too small."""
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
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        needed = re.search(r"allocate (\d+) bytes", str(error))
        amount = f", {int(needed[1]) / 1e9:.1f} GB more" if needed else ""
        raise DeviceError(
            f"the memory of this computer is too small for the descriptors and what is computed of them{amount}: set "
            f"data.on_disk=true, fewer shifts in descriptor.…, or training.batch_size={config.batch_size // 2 or 1}"
        ) from error


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
