"""The training loop, on energies or on energies and forces."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from kinml_fast import report
from kinml_fast.data.split import PARTS
from kinml_fast.data.training_data import TrainingData
from kinml_fast.deploy import model_file
from kinml_fast.errors import ConfigError, DataError, DeviceError, InputError, ModelError, first_line
from kinml_fast.metrics import Errors
from kinml_fast.nn import EnergyModel
from kinml_fast.train import checkpoint, continued
from kinml_fast.train.captured import MOST_STEPS, CapturedEpoch
from kinml_fast.train.config import TrainingConfig, save_yaml
from kinml_fast.train.dataset import Dataset
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.freezing import FrozenLayers
from kinml_fast.train.loss import ExtraLoss, ExtraLosses, LossBatch, TaskWeights
from kinml_fast.train.metrics import LevelErrors, MetricsTable, Residuals, Row, level_columns, level_values
from kinml_fast.train.optimizers import FusedAdam, WeightAverage, make_optimizer
from kinml_fast.train.progress import Progress
from kinml_fast.train.schedulers import advance, forget_best, make_scheduler
from kinml_fast.train.steps import EnergyStep, EpochErrors, ForceStep, LevelEnergyStep, Step, StoredForceStep

log = logging.getLogger(__name__)

CHANGEABLE = {
    "epochs",
    "validation_batch_size",
    "test_batch_size",
    "device",
    "threads",
    "early_stopping",
    "save_every",
    "test_every",
    "checkpoint_seconds",
    "loss.forces",
    "loss.forces_from",
    "loss.forces_until",
    "loss.force_weight",
    "loss.level_weights",
    "score",
}
"""Keys and sections of the training configuration that may change when a run is resumed; others make it another run.

Forces can thus be taken up by a run on energies, and given up."""

_SECONDS_BETWEEN_DRAWINGS = 0.25
_SECONDS_BETWEEN_FLUSHES = 1.0


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    `errors` are those of the energies of the best model (lowest score) on each split that is not empty, `forces` those
    of its forces on each split that has any; with several levels of theory, those of the highest. `lower` has the same
    two of each lower level, by fidelity.
    """

    epochs: int
    best_epoch: int
    errors: dict[str, Errors]
    seconds: float
    forces: dict[str, Errors] = field(default_factory=dict)
    lower: dict[int, tuple[dict[str, Errors], dict[str, Errors]]] = field(default_factory=dict)


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
        the run goes on with; see `continued.keep_state`. A resumed run has its own.

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
    ) -> None:
        self.model = model
        self.config = config or TrainingConfig()
        self.folder = None if folder is None else RunFolder(folder)
        self.progress = progress or Progress()
        self._data = Dataset(model, data, self.config)
        self._steps: dict[bool, Step] = {}

        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._tasks = TaskWeights(self.config.loss, list(extra_losses or {}), model.sae.device)
        self._extra = ExtraLosses(extra_losses, model, self._tasks) if extra_losses else None
        trained = self._parameters + ([] if self._tasks.log_sigma is None else [self._tasks.log_sigma])
        self._optimizer = make_optimizer(trained, self.config.optimizer)
        self._scheduler = make_scheduler(self._optimizer, self.config.scheduler, self.config.epochs)
        decay = self.config.ema_decay
        self._average = None if decay is None else WeightAverage(self._parameters, decay)
        resuming = resume and self.folder is not None and self.folder.last.exists()
        if origin is not None and not resuming:
            continued.keep_state(origin, model, self.config, self._optimizer, self._tasks, self._average)
        self._frozen = FrozenLayers(model, freeze) if freeze else None

        # Where the run is: `_batch` batches of epoch `_epoch` are done, in `_elapsed` seconds.
        self._epoch = self._batch = 0
        self._elapsed = 0.0
        count = self._data.sizes["train"]
        self._errors = EpochErrors(self._data.levels, count, self.config.batch_size, model.sae.device)
        self._capture: CapturedEpoch | None = None
        self._capture_key: tuple | None = None
        self._best = {"epoch": -1, "score": math.inf, "weights": self._weights()}
        self._best_on_disk = -1
        self._stopping = {"score": math.inf, "waited": 0}

        self._table: MetricsTable | None = None
        self._interrupted = False
        self._next_tick = math.inf
        if self.folder is not None:
            self._open(resume, overwrite)
        self._freeze()

    def fit(self) -> Summary:
        """Train to the end.

        Afterwards the model has the weights of the best epoch, those of model.pt.

        Raises
        ------
        InputError
            The loss became infinite or NaN, a file could not be written, or the memory of the GPU is too small.
        KeyboardInterrupt
            On Ctrl-C, after last.pt was written; a second Ctrl-C does not wait for that.
        """
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_threads(self.config.threads))
            stack.enter_context(_memory_explained(self.config))
            if self.folder is not None:
                stack.enter_context(self.folder.logged())
            if self._table is not None:
                stack.callback(self._table.close)
            self.prepare()
            if self._table is not None and not self.folder.last.exists():
                self._save()
            self._train()
            if self._table is not None:
                self._save()
            return self._finish(started)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What moves the weights; its parameters are the model's, and the learned factors of the loss if there are."""
        return self._optimizer

    @property
    def scheduler(self) -> LRScheduler | None:
        """The schedule of the learning rate; None for none."""
        return self._scheduler

    # Data

    def prepare(self) -> None:
        """Compute what the first epoch needs and keeps in memory, such as descriptors; `fit` begins with this."""
        numbers = ", ".join(f"{size} {name}" for name, size in self._data.sizes.items())
        log.info("structures: %s", numbers)
        fidelities = self.model.fidelities
        several = len(fidelities) > 1
        for fidelity, energies, forces in zip(
            fidelities, self._data.known_energies, self._data.known_forces, strict=True
        ):
            if several:
                log.info("energies of fidelity %d: %s", fidelity, self._counts(energies))
            if self.config.loss.forces:
                log.info("forces%s: %s", f" of fidelity {fidelity}" if several else "", self._counts(forces))
        if not self.config.loss.forces and self._data.known_forces.any():
            log.info("the data have forces, which training.loss.forces=true would train on")
        self._step(self.config.loss.has_forces(self._epoch))

    def _counts(self, known: np.ndarray) -> str:
        """How many of the structures of each part are among those that are known, in words."""
        own = {name: int(known[self._data.range(name)].sum()) for name in PARTS}
        return ", ".join(f"{own[name]} of {self._data.sizes[name]} {name}" for name in PARTS)

    def _step(self, with_forces: bool) -> Step:
        """What trains an epoch on energies, or on energies and forces."""
        if with_forces not in self._steps:
            started = time.monotonic()
            if not with_forces:
                # On a GPU, which waits for nothing within an epoch: one op for a step, and no plan of batches.
                plain = self._data.levels == 1 and self.model.sae.device.type == "cpu"
                kind = EnergyStep if plain else LevelEnergyStep
            elif self.config.loss.forces and self.config.jacobian == "stored":
                kind = StoredForceStep
            else:
                kind = ForceStep
            self._steps[with_forces] = kind(self.model, self._data, self._tasks)
            if kind is not ForceStep:
                kept = "descriptors and Jacobians" if kind is StoredForceStep else "descriptors"
                log.info("%s of %d atoms in %.2f s", kept, self._data.n_atoms, time.monotonic() - started)
        return self._steps[with_forces]

    def _freeze(self) -> None:
        """Hold the weights of frozen layers as they are now."""
        if self._frozen is None:
            return
        self._frozen.hold()
        if self._average is not None:
            for average, weights in zip(self._average.averages, self._average.parameters, strict=True):
                if weights.data_ptr() == self.model.networks.weights.data_ptr():
                    torch._foreach_copy_(self._frozen.parts(average), self._frozen.parts(weights))
        numbers = self._frozen.count, self.model.networks.weights.numel()
        log.info("frozen: %s (%d of %d weights)", ", ".join(self._frozen.names), *numbers)

    def _order(self, epoch: int) -> Tensor:
        """The training structures in the order of an epoch, which depends on the seed and the epoch only."""
        if not self.config.shuffle:
            order = np.arange(self._data.sizes["train"])
        else:
            order = np.random.default_rng([self.config.seed, epoch]).permutation(self._data.sizes["train"])
        return torch.from_numpy(order).to(self._data.origin.device)

    # The loop

    @property
    def _finished(self) -> bool:
        patience = self.config.early_stopping.patience
        stopped = patience is not None and self._stopping["waited"] >= patience
        return stopped or self._epoch >= self.config.epochs

    def _train(self) -> None:
        now = time.monotonic()
        self._next_drawing, self._next_flush = now, now + _SECONDS_BETWEEN_FLUSHES
        self._next_save = now + self.config.checkpoint_seconds
        self._next_tick = min(self._next_drawing, self._next_save)
        self.progress.begin(self.config.epochs, self._epoch)
        try:
            with self._interruptible():
                while not self._finished:
                    self._end_epoch(self.train_epoch())
                if self._interrupted:
                    self._tick(1)
        finally:
            self.progress.end()

    def train_epoch(self) -> Row:
        """Go through the training structures once, or through what is left of a resumed epoch.

        Returns
        -------
        Row
            The errors of each structure before the update from its batch.
        """
        epoch, lr = self._epoch, self._optimizer.param_groups[0]["lr"]
        with_forces, size = self.config.loss.has_forces(epoch), self.config.batch_size
        started = time.perf_counter() - self._elapsed
        if with_forces:
            self._steps.pop(False, None)  # what an energy-only phase kept takes memory
        else:
            for errors in self._errors.forces:
                errors.zero_()
        step, tasks, extra, clip = self._step(with_forces), self._tasks, self._extra, self.config.gradient_clip
        frozen = self._frozen
        order = self._order(epoch)
        batches = step.batches(order, size, self._errors)
        tasks.begin(with_forces)
        learning = tasks.learning
        if learning:
            weights = self._data.energy_weights[..., order], self._data.force_weights[..., order]
            counted = tasks.counted(weights, size)
        captured = None if extra is not None or learning or frozen is not None else self._captured(step, lr)
        if captured is not None:
            captured.run(order)
            self._batch = len(batches)
            if time.monotonic() >= self._next_tick:
                self._elapsed = time.perf_counter() - started
                self._tick(len(batches))
        for number in range(self._batch, len(batches)):
            step.run(*batches[number])
            if extra is not None:
                structures = order[number * size : (number + 1) * size]
                extra.add(LossBatch(self._data.origin[structures], *self._data.gather(structures)))
            if learning:
                tasks.differentiate(counted[number])
            if frozen is not None:
                frozen.clear_gradient()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(self._parameters, clip)
            self._optimizer.step()
            if frozen is not None:
                frozen.restore()
            if learning:
                tasks.refresh()
            if self._average is not None:
                self._average.update()
            self._batch += 1
            if time.monotonic() >= self._next_tick:
                self._elapsed = time.perf_counter() - started
                self._tick(len(batches))
        self._epoch, self._batch, self._elapsed = epoch + 1, 0, 0.0
        errors = self._training_errors(order, with_forces)
        return self._row("train", epoch, lr, errors, time.perf_counter() - started, tasks.row())

    def _captured(self, step: Step, lr: float) -> CapturedEpoch | None:
        """On a GPU, a whole epoch as one graph, from the second epoch with this step and learning rate on."""
        device, size = self.model.sae.device, self.config.batch_size
        count = self._data.sizes["train"]
        simple = self.config.gradient_clip is None and self._average is None
        if device.type != "cuda" or not simple or not isinstance(self._optimizer, FusedAdam):
            return None
        gradients = tuple(parameter.grad.data_ptr() for parameter in self._parameters if parameter.grad is not None)
        key = (step, lr, gradients)
        if self._batch or count > MOST_STEPS * size or self._capture_key != key:
            self._capture_key, self._capture = key, None
            return None
        if self._capture is None:
            try:
                self._capture = CapturedEpoch(step, self._optimizer, self._errors, count, size, device)
            except RuntimeError as error:
                log.warning("the steps of an epoch cannot be recorded and are run one by one: %s", first_line(error))
                self._capture_key = (*key, "failed")
        return self._capture

    def _training_errors(self, order: Tensor, with_forces: bool) -> list[LevelErrors]:
        """The errors of an epoch at each level, each structure's before the update from its batch."""
        data, found = self._data, []
        energies, forces = (x.cpu().numpy() for x in self._errors.joined())
        known = data.known_energies[:, order.cpu().numpy()]
        per_level = energies.reshape(data.levels, -1), forces.reshape(data.levels, -1, 3)
        for own, own_forces, there, components in zip(*per_level, known, data.trained_components, strict=True):
            energy, _ = Residuals(own[there], None).errors()
            with np.errstate(over="ignore", invalid="ignore"):
                found.append((energy, Errors.of_sums(own_forces, components) if with_forces and components else None))
        return found

    def _end_epoch(self, train: Row) -> None:
        epoch, lr = train.epoch, train.lr
        with self._evaluated():
            validation, errors = self._evaluated_row("validation", epoch, lr)
            score = self._score(errors)
            numbers = (x for x in train.values().values() if not isinstance(x, str))
            if not math.isfinite(score) or not all(map(math.isfinite, numbers)):
                raise self._diverged(epoch)
            self._judge(epoch, score)
            advance(self._scheduler, score)
            rows = [train, validation]
            kept = _every(self.config.save_every, epoch + 1)
            if self._data.sizes["test"] and (kept or _every(self.config.test_every, epoch + 1) or self._finished):
                rows.append(self._evaluated_row("test", epoch, lr)[0])
        self.progress.epoch(*rows)
        if self._table is None:
            return
        for row in rows:
            self._table.add(row)
        if kept:
            checkpoint.save(self.folder.epoch(epoch), self._state())
        elif time.monotonic() >= self._next_flush:
            self._table.flush()
            self._next_flush = time.monotonic() + _SECONDS_BETWEEN_FLUSHES

    def _evaluated_row(self, part: str, epoch: int, lr: float) -> tuple[Row, list[LevelErrors]]:
        """The row of a part of the data with the present weights, and the errors of each level."""
        started = time.perf_counter()
        errors = [residuals.errors() for residuals in self.evaluate(part, self.config.loss.forces)]
        return self._row(part, epoch, lr, errors, time.perf_counter() - started), errors

    def _row(
        self,
        part: str,
        epoch: int,
        lr: float,
        errors: Sequence[LevelErrors],
        seconds: float,
        more: Mapping[str, float] | None = None,
    ) -> Row:
        rate = self._data.sizes[part] / max(seconds, 1e-9)
        further = {**level_values(self.model.fidelities, errors), **(more or {})}
        return Row(epoch, part, *errors[-1], lr, seconds, rate, further)

    def evaluate(self, part: str, with_forces: bool = False) -> list[Residuals]:
        """Residuals of a part with the present weights at each level of theory, lowest first."""
        data = self._data
        where = data.range(part)
        size = self.config.validation_batch_size if part == "validation" else self.config.test_batch_size
        energies, forces = self._step(with_forces).predict(where.start, where.stop, size)
        residuals = (energies - data.energies[..., where]).reshape(data.levels, -1).cpu().numpy()
        found = [
            Residuals(own[known], None) for own, known in zip(residuals, data.known_energies[:, where], strict=True)
        ]
        if forces is None:
            return found
        atoms, known = data.atoms(part)
        of_forces = (forces.double() - data.forces[..., atoms, :]).reshape(data.levels, -1, 3).cpu().numpy()
        return [own._replace(forces=f[there]) for own, f, there in zip(found, of_forces, known, strict=True)]

    def _score(self, validation: Sequence[LevelErrors]) -> float:
        """What the model is judged by; see `ScoreConfig`."""
        score, total = self._score_factors(), 0.0
        for factor, (energy, forces) in zip(score["levels"], validation, strict=True):
            if factor:
                of_forces = 0.0 if forces is None else forces.rmse
                total += factor * (score["energy"] * energy.rmse + score["forces"] * of_forces)
        return total

    def _score_factors(self) -> dict[str, Any]:
        score = self.config.score
        return {
            "energy": score.energy,
            "forces": score.forces if self.config.loss.forces else 0.0,
            "levels": score.level_factors(self._data.levels),
        }

    def _evaluated(self) -> contextlib.AbstractContextManager[None]:
        """Lets the model have the weights that are judged and saved: their average, if there is one."""
        return contextlib.nullcontext() if self._average is None else self._average.applied()

    def _judge(self, epoch: int, score: float) -> None:
        """Remember the best weights, and count the epochs since the score became better."""
        if score < self._best["score"]:
            self._best = {"epoch": epoch, "score": score, "weights": self._weights()}
        if score < self._stopping["score"] - self.config.early_stopping.min_delta:
            self._stopping = {"score": score, "waited": 0}
        else:
            self._stopping["waited"] += 1

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def _diverged(self, epoch: int) -> InputError:
        kept = "" if self.folder is None else f"; the weights before that are in {self.folder.checkpoints}"
        return InputError(
            f"the loss became infinite or NaN in epoch {epoch}: lower training.optimizer.learning_rate "
            f"({self._optimizer.param_groups[0]['lr']:g}) or set training.gradient_clip{kept}"
        )

    # What happens by the clock, between two batches

    def _tick(self, n_batches: int) -> None:
        now = time.monotonic()
        if now >= self._next_drawing:
            self.progress.batch(self._epoch, self._batch / n_batches)
            self._next_drawing = now + _SECONDS_BETWEEN_DRAWINGS
        if self._table is not None and (self._interrupted or now >= self._next_save):
            self._save()
            self._next_save = time.monotonic() + self.config.checkpoint_seconds
        if self._interrupted:
            raise KeyboardInterrupt
        self._next_tick = min(self._next_drawing, self._next_save)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C takes effect between two batches; pressed twice, at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def interrupt(number: int, frame: object) -> None:
            signal.signal(signal.SIGINT, before)
            self._interrupted, self._next_tick = True, 0.0

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # Checkpoints

    def _open(self, resume: bool, overwrite: bool) -> None:
        folder = self.folder
        if resume and folder.last.exists():
            folder.sweep()
            self._restore(checkpoint.load(folder.last))
            log.info("%s: goes on with epoch %d, batch %d", folder, self._epoch, self._batch)
            return
        if not resume:
            folder.create(overwrite)
        elif any(folder.checkpoints.glob("*.pt")):
            raise ModelError(f"{folder.last}: is missing: put another checkpoint of this run there, or start a new run")
        folder.make()
        if not folder.config.exists():
            save_yaml(folder.config, {"training": self.config.model_dump()})
        self._table = MetricsTable(folder.path, more=self._further_columns())

    def _save(self) -> None:
        """Write last.pt, and before it the best weights if there are new ones."""
        if self._best["epoch"] != self._best_on_disk:
            checkpoint.save(self.folder.best, {"model": self.model.to_dict(), **self._best})
            notes = {name: self._best[name] for name in ("epoch", "score")} | {"training": self.config.model_dump()}
            present = self._weights()
            self.model.load_state_dict(self._best["weights"])
            model_file.save(self.folder.model, self.model, notes)
            self.model.load_state_dict(present)
            self._best_on_disk = self._best["epoch"]
        checkpoint.save(self.folder.last, self._state())

    def _state(self) -> dict[str, Any]:
        residuals, force_errors = self._errors.joined(self._batch)
        order = self._order(self._epoch)[: residuals.shape[-1]].cpu().numpy()
        known = torch.from_numpy(self._data.known_energies[:, order]).to(residuals.device)
        finite = torch.isfinite(residuals.view_as(known)[known]).all() and torch.isfinite(force_errors).all()
        if not finite:
            raise self._diverged(self._epoch)
        return {
            "model": self.model.to_dict(),
            "training": self.config.model_dump(),
            "data": self._data.fingerprint,
            "weights": self._weights(),
            "tasks": self._tasks.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "frozen": [] if self._frozen is None else list(self._frozen.names),
            "random": checkpoint.random_states(),
            "epoch": self._epoch,
            "batch": self._batch,
            "elapsed": self._elapsed,
            "residuals": residuals,
            "force_errors": force_errors,
            "score": self._score_factors(),
            "best": self._best,
            "stopping": self._stopping,
            "metrics_length": self._table.flush(sync=True),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        path = self.folder.last
        self._check_belongs(state)
        try:
            self.model.load_state_dict(state["weights"])
            self._tasks.load_state_dict(state["tasks"])
            self._optimizer.load_state_dict(state["optimizer"])
            if self._scheduler is not None:
                self._scheduler.load_state_dict(state["scheduler"])
            if self._average is not None:
                self._average.load_state_dict(state["average"])
            checkpoint.set_random_states(state["random"])
            self._epoch, self._batch, self._elapsed = state["epoch"], state["batch"], state["elapsed"]
            self._errors.restore(state["residuals"], state["force_errors"])
            if state["score"] == self._score_factors():
                self._best, self._stopping = state["best"], state["stopping"]
            else:
                log.info("the score is another one than before: the best model is looked for from here on")
                forget_best(self._scheduler)
                with self._evaluated():
                    self._best["weights"] = self._weights()
            length = state["metrics_length"]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise ModelError(
                f"{path}: does not hold a whole run ({first_line(error)}): put an intact checkpoint there"
            ) from error
        self._table = MetricsTable(self.folder.path, length, self._epoch, self._further_columns())

    def _further_columns(self) -> list[str]:
        return level_columns(self.model.fidelities) + self._tasks.columns()

    def _check_belongs(self, state: dict[str, Any]) -> None:
        path = self.folder.last
        for key, value in self.model.to_dict().items():
            there = state["model"].get(key)
            if there != value:
                raise ModelError(
                    f"{path}: is a checkpoint of another architecture ({key} is {there} there and {value} "
                    "here): resume with the configuration of that run"
                )
        before = _flat(state["training"])
        for key, value in _flat(self.config.model_dump()).items():
            changeable = any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)
            if not changeable and before.get(key) != value:
                raise ConfigError(
                    f"{path}: was written with training.{key} = {before.get(key)} and cannot go on with {value}: keep "
                    f"it, or start a new run; what can be changed is {', '.join(sorted(CHANGEABLE))}"
                )
        frozen = set() if self._frozen is None else set(self._frozen.names)
        if set(state["frozen"]) != frozen:
            names = [", ".join(sorted(names)) or "none" for names in (state["frozen"], frozen)]
            raise ConfigError(
                f"{path}: was written with other frozen layers ({names[0]}) and cannot go on with {names[1]}: keep "
                "start.freeze, or start a new run from it"
            )
        if state["data"] != self._data.fingerprint:
            raise DataError(
                f"{path}: belongs to other data (structures, energies, forces, weights, split or single-atom energies "
                "have changed): resume with the data of that run, or start a new run"
            )

    # The end

    def _finish(self, started: float) -> Summary:
        self.model.load_state_dict(self._best["weights"])
        parts = [part for part in PARTS if self._data.sizes[part]]
        residuals = {part: self.evaluate(part, self.config.loss.forces) for part in parts}
        if not self.config.loss.forces and self._data.known_forces.any() and self._data.coordinates is not None:
            # Forces that were not trained on are reported all the same.
            for part in parts:
                with_forces = self.evaluate(part, True)
                both = zip(residuals[part], with_forces, strict=True)
                residuals[part] = [own._replace(forces=other.forces) for own, other in both]
        if self._table is not None and self._epoch > 0:
            self._report(residuals)
        of_levels = []
        for level in range(self._data.levels):
            errors = {part: own[level].errors() for part, own in residuals.items()}
            of_levels.append(
                tuple({part: own[kind] for part, own in errors.items() if own[kind] is not None} for kind in (0, 1))
            )
        lower = dict(zip(self.model.fidelities[:-1], of_levels[:-1], strict=True))
        energies, forces = of_levels[-1]
        return Summary(self._epoch, self._best["epoch"], energies, time.monotonic() - started, forces, lower)

    def _report(self, residuals: Mapping[str, Sequence[Residuals]]) -> None:
        data, of_levels = self._data, []
        for level in range(data.levels):
            energies, forces = {}, {}
            for part, own in residuals.items():
                labels, reference = data.known_reference(part, level)
                energies[part] = (labels, reference, reference + own[level].energies)
                if own[level].forces is not None and own[level].forces.size:
                    labels, reference = data.known_force_reference(part, level)
                    forces[part] = (labels, reference, reference + own[level].forces.ravel())
            of_levels.append((energies, forces))
        lower = dict(zip(self.model.fidelities[:-1], of_levels[:-1], strict=True))
        best = self._best["epoch"]
        rows = report.write_report(self.folder.report, self.folder.metrics, *of_levels[-1], best, lower)
        log.info("best epoch %d of %d, %s:\n%s", best, self._epoch, self.folder, report.table(rows))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a section and of the sections within it, by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


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
