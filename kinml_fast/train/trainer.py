"""The training loop: energies of structures whose descriptors are computed once and kept."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.data.splits import PARTS, Split
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import model_file
from kinml_fast.errors import InputError
from kinml_fast.metrics import Errors
from kinml_fast.nn import EnergyModel
from kinml_fast.train import checkpoint
from kinml_fast.train.config import TrainingConfig, save_yaml
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.metrics import MetricsTable, Row
from kinml_fast.train.optimizers import WeightAverage, make_optimizer
from kinml_fast.train.progress import Progress
from kinml_fast.train.schedulers import advance, make_scheduler

log = logging.getLogger(__name__)

CHANGEABLE = {
    "epochs",
    "validation_batch_size",
    "test_batch_size",
    "threads",
    "early_stopping",
    "save_every",
    "test_every",
    "checkpoint_seconds",
}
"""Keys of the training configuration that may change when a run is resumed; any other makes it another run."""

_SECONDS_BETWEEN_DRAWINGS = 0.25
_SECONDS_BETWEEN_FLUSHES = 1.0


class Data(Protocol):
    """What a trainer needs of a data set: `TrainingData`, or a prepared data set."""

    structures: Structures
    split: Split
    sae: np.ndarray | None


@dataclass(frozen=True)
class TrainingData:
    """Structures and their division.

    Parameters
    ----------
    structures
        With energies.
    split
        Indices of the structures for training, validation and test. Training without reshuffling keeps their order.
    sae
        Single-atom energies, float64 [n_elements] in the order of `structures.elements`, eV, which the model is given;
        None: those that the model has.
    """

    structures: Structures
    split: Split
    sae: np.ndarray | None = None


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    `errors` are those of the best model (lowest validation RMSE) on each split that is not empty.
    """

    epochs: int
    best_epoch: int
    errors: dict[str, Errors]
    seconds: float


class Trainer:
    """Trains a model on energies.

    The loss is the mean over a batch's structures of (network energy − target)², in eV², where the target is the
    structure's energy without single-atom energies.

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

    Raises
    ------
    InputError
        Elements that the model does not have; an empty training or validation set; a folder that holds a run already; a
        checkpoint that does not belong to this model, data or configuration.
    """

    def __init__(
        self,
        model: EnergyModel,
        data: Data,
        config: TrainingConfig | None = None,
        folder: str | Path | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.config = config or TrainingConfig()
        self.folder = None if folder is None else RunFolder(folder)
        self.progress = progress or Progress()
        self._set_data(data)

        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = make_optimizer(self._parameters, self.config.optimizer)
        self._scheduler = make_scheduler(self._optimizer, self.config.scheduler)
        decay = self.config.ema_decay
        self._average = None if decay is None else WeightAverage(self._parameters, decay)

        # Where the run is: `_batch` batches of epoch `_epoch` are done, in `_elapsed` seconds.
        self._epoch = self._batch = 0
        self._elapsed = 0.0
        self._residuals = torch.zeros(self._sizes["train"], dtype=torch.float64, device=self._targets.device)
        self._best = {"epoch": -1, "rmse": math.inf, "weights": self._weights()}
        self._best_on_disk = -1
        self._stopping = {"rmse": math.inf, "waited": 0}

        self._table: MetricsTable | None = None
        self._interrupted = False
        self._next_tick = math.inf
        if self.folder is not None:
            self._open(resume, overwrite)

    def fit(self) -> Summary:
        """Train to the end.

        Afterwards the model has the weights of the best epoch, those of model.pt.

        Raises
        ------
        InputError
            The loss became infinite or NaN, or a file could not be written.
        KeyboardInterrupt
            On Ctrl-C, after last.pt was written; a second Ctrl-C does not wait for that.
        """
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_threads(self.config.threads))
            if self.folder is not None:
                stack.enter_context(self.folder.logged())
            self.prepare()
            if self._table is not None and not self.folder.last.exists():
                self._save()
            self._train()
            if self._table is not None:
                self._save()
            return self._finish(started)

    # Data

    def _set_data(self, data: Data) -> None:
        split = {name: np.asarray(getattr(data.split, name), dtype=np.int64) for name in PARTS}
        for name in ("train", "validation"):
            if split[name].size == 0:
                raise InputError(f"the {name} set is empty: give it at least one structure")
        self._sizes = {name: len(indices) for name, indices in split.items()}
        # Only what is used, split by split: a pass in the order of the split then goes through memory in order.
        elements = self.model.descriptor.elements
        structures = data.structures.with_elements(elements).select(np.concatenate(list(split.values())))
        if structures.energies is None:
            raise InputError("the structures have no energies: training needs them")
        if data.sae is not None:
            given = dict(zip(data.structures.elements, data.sae, strict=True))
            values = torch.tensor([given.get(element, 0.0) for element in elements], dtype=torch.float64)
            self.model.sae.copy_(values)
        sae = self.model.sae.cpu().numpy()
        targets = structures.energies - (structures.counts() * sae).sum(axis=1)

        device = self.model.sae.device
        self._coordinates = torch.from_numpy(structures.coordinates).to(device)
        self._species = torch.from_numpy(structures.species).to(device)
        self._offsets = torch.from_numpy(structures.offsets).to(device)
        self._targets = torch.from_numpy(targets).to(device)
        self._labels = structures.labels
        digest = hashlib.sha256(" ".join(structures.elements).encode())
        for array in (structures.species, structures.coordinates, structures.offsets, targets):
            digest.update(array.tobytes())
        digest.update(repr(self._sizes).encode())
        self._fingerprint = digest.hexdigest()

    def prepare(self) -> None:
        """Compute the descriptors of all atoms, which stay in memory; `fit` begins with this."""
        started = time.monotonic()
        with torch.no_grad():
            self._features = self.model.aev(
                self._coordinates.to(self._parameters[0].dtype), self._species, self._offsets
            )
        self._ordered_batches = {name: self._plan(name, self._range(name)) for name in PARTS}
        log.info(
            "descriptors of %d atoms in %.2f s; structures: %s",
            len(self._species),
            time.monotonic() - started,
            ", ".join(f"{size} {name}" for name, size in self._sizes.items()),
        )

    def _range(self, part: str) -> Tensor:
        """The indices of a part's structures."""
        first = sum(self._sizes[name] for name in PARTS[: PARTS.index(part)])
        return torch.arange(first, first + self._sizes[part], device=self._targets.device)

    def _plan(self, part: str, structures: Tensor) -> list[ops.Batch]:
        sizes = {
            "train": self.config.batch_size,
            "validation": self.config.validation_batch_size,
            "test": self.config.test_batch_size,
        }
        n_species = len(self.model.descriptor.elements)
        return ops.plan_batches(self._species, self._offsets, structures, sizes[part], n_species)

    def _order(self, epoch: int) -> tuple[Tensor, list[ops.Batch]]:
        """The training structures in the order of an epoch, which depends on the seed and the epoch only."""
        if not self.config.shuffle:
            return self._range("train"), self._ordered_batches["train"]
        generator = np.random.default_rng([self.config.seed, epoch])
        order = torch.from_numpy(generator.permutation(self._sizes["train"])).to(self._targets.device)
        return order, self._plan("train", order)

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
        started = time.perf_counter() - self._elapsed
        order, batches = self._order(epoch)
        targets = self._targets[order]
        weights = torch.ones_like(targets)
        step = self.model.networks.energy_step
        clip = self.config.gradient_clip
        parts = zip(
            batches, *(x.split(self.config.batch_size) for x in (targets, weights, self._residuals)), strict=True
        )
        for batch, wanted, weight, residuals in itertools.islice(parts, self._batch, None):
            step(self._features, batch.rows, batch.owners, batch.starts, wanted, weight, residuals)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(self._parameters, clip)
            self._optimizer.step()
            if self._average is not None:
                self._average.update()
            self._batch += 1
            if time.monotonic() >= self._next_tick:
                self._elapsed = time.perf_counter() - started
                self._tick(len(batches))
        self._epoch, self._batch, self._elapsed = epoch + 1, 0, 0.0
        return self._row("train", epoch, lr, self._residuals, time.perf_counter() - started)

    def _end_epoch(self, train: Row) -> None:
        epoch, lr = train.epoch, train.lr
        with self._evaluated():
            validation = self._row("validation", epoch, lr, *self._evaluate("validation"))
            if not math.isfinite(train.energy.rmse + validation.energy.rmse):
                raise self._diverged(epoch)
            self._judge(epoch, validation.energy.rmse)
            advance(self._scheduler, validation.energy.rmse)
            rows = [train, validation]
            kept = _every(self.config.save_every, epoch + 1)
            if self._sizes["test"] and (kept or _every(self.config.test_every, epoch + 1) or self._finished):
                rows.append(self._row("test", epoch, lr, *self._evaluate("test")))
        self.progress.epoch(train, validation)
        if self._table is None:
            return
        for row in rows:
            self._table.add(row)
        if kept:
            checkpoint.save(self.folder.epoch(epoch), self._state())
        elif time.monotonic() >= self._next_flush:
            self._table.flush()
            self._next_flush = time.monotonic() + _SECONDS_BETWEEN_FLUSHES

    def _row(self, part: str, epoch: int, lr: float, residuals: Tensor, seconds: float) -> Row:
        rate = len(residuals) / max(seconds, 1e-9)
        with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges is told so elsewhere
            errors = Errors.of(residuals.cpu().numpy())
        return Row(epoch, part, errors, None, lr, seconds, rate)

    def _evaluate(self, part: str) -> tuple[Tensor, float]:
        """Residuals (eV) of a part with the present weights, and the seconds that took."""
        started = time.perf_counter()
        with torch.inference_mode():
            energies = [
                self.model.networks.energies(
                    self._features, batch.rows, batch.owners, batch.starts, len(batch.structures)
                )
                for batch in self._ordered_batches[part]
            ]
            residuals = torch.cat(energies) - self._targets[self._range(part)]
        return residuals, time.perf_counter() - started

    def _evaluated(self) -> contextlib.AbstractContextManager[None]:
        """Lets the model have the weights that are judged and saved: their average, if there is one."""
        return contextlib.nullcontext() if self._average is None else self._average.applied()

    def _judge(self, epoch: int, rmse: float) -> None:
        """Remember the best weights, and count the epochs since the validation RMSE (kcal/mol) became better."""
        if rmse < self._best["rmse"]:
            self._best = {"epoch": epoch, "rmse": rmse, "weights": self._weights()}
        if rmse < self._stopping["rmse"] - self.config.early_stopping.min_delta:
            self._stopping = {"rmse": rmse, "waited": 0}
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
            raise InputError(f"{folder.last}: is missing: put another checkpoint of this run there, or start a new run")
        folder.make()
        if not folder.config.exists():
            save_yaml(folder.config, {"training": self.config.model_dump()})
        self._table = MetricsTable(folder.path)

    def _save(self) -> None:
        """Write last.pt, and before it the best weights if there are new ones."""
        if self._best["epoch"] != self._best_on_disk:
            checkpoint.save(self.folder.best, {"model": self.model.to_dict(), **self._best})
            notes = {name: self._best[name] for name in ("epoch", "rmse")} | {"training": self.config.model_dump()}
            present = self._weights()
            self.model.load_state_dict(self._best["weights"])
            model_file.save(self.folder.model, self.model, notes)
            self.model.load_state_dict(present)
            self._best_on_disk = self._best["epoch"]
        checkpoint.save(self.folder.last, self._state())

    def _state(self) -> dict[str, Any]:
        done = self._residuals[: self._batch * self.config.batch_size]
        if not torch.isfinite(done).all():
            raise self._diverged(self._epoch)
        return {
            "model": self.model.to_dict(),
            "training": self.config.model_dump(),
            "data": self._fingerprint,
            "weights": self._weights(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "random": checkpoint.random_states(),
            "epoch": self._epoch,
            "batch": self._batch,
            "elapsed": self._elapsed,
            "residuals": done.clone(),
            "best": self._best,
            "stopping": self._stopping,
            "metrics_length": self._table.flush(sync=True),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        path = self.folder.last
        self._check_belongs(state)
        try:
            self.model.load_state_dict(state["weights"])
            self._optimizer.load_state_dict(state["optimizer"])
            if self._scheduler is not None:
                self._scheduler.load_state_dict(state["scheduler"])
            if self._average is not None:
                self._average.load_state_dict(state["average"])
            checkpoint.set_random_states(state["random"])
            self._epoch, self._batch, self._elapsed = state["epoch"], state["batch"], state["elapsed"]
            self._residuals[: len(state["residuals"])] = state["residuals"]
            self._best, self._stopping = state["best"], state["stopping"]
            length = state["metrics_length"]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"{path}: does not hold a whole run ({error}): put an intact checkpoint there") from error
        self._table = MetricsTable(self.folder.path, length, self._epoch)

    def _check_belongs(self, state: dict[str, Any]) -> None:
        path = self.folder.last
        for key, value in self.model.to_dict().items():
            if state["model"].get(key) != value:
                raise InputError(
                    f"{path}: is a checkpoint of another architecture ({key} is {state['model'].get(key)} there and "
                    f"{value} here): resume with the configuration of that run"
                )
        for key, value in self.config.model_dump().items():
            if key not in CHANGEABLE and state["training"].get(key) != value:
                raise InputError(
                    f"{path}: was written with training.{key} = {state['training'].get(key)} and cannot go on with "
                    f"{value}: keep it, or start a new run; what can be changed is {', '.join(sorted(CHANGEABLE))}"
                )
        if state["data"] != self._fingerprint:
            raise InputError(
                f"{path}: belongs to other data (structures, energies, split or single-atom energies have changed): "
                "resume with the data of that run, or start a new run"
            )

    # The end

    def _finish(self, started: float) -> Summary:
        self.model.load_state_dict(self._best["weights"])
        residuals = {part: self._evaluate(part)[0].cpu().numpy() for part in PARTS if self._sizes[part]}
        if self._table is not None and self._epoch > 0:
            self._report(residuals)
        errors = {part: Errors.of(values) for part, values in residuals.items()}
        return Summary(self._epoch, self._best["epoch"], errors, time.monotonic() - started)

    def _report(self, residuals: dict[str, np.ndarray]) -> None:
        from kinml_fast.train import report  # matplotlib takes a second to import

        comparisons = {}
        for part, values in residuals.items():
            indices = self._range(part)
            targets = self._targets[indices].cpu().numpy()
            comparisons[part] = ([self._labels[i] for i in indices.tolist()], targets, targets + values)
        rows = report.write_report(self.folder.report, self.folder.metrics, comparisons)
        log.info("best epoch %d of %d, %s:\n%s", self._best["epoch"], self._epoch, self.folder, report.table(rows))


def _every(interval: int | None, epochs: int) -> bool:
    return interval is not None and epochs % interval == 0


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
