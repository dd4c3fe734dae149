"""What both of PyKinML's trainers do: a native training run that reports and keeps checkpoints as PyKinML does."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from kinml_fast.data import prepared, splits
from kinml_fast.data.prepared import Prepared
from kinml_fast.data.split import PARTS, Split
from kinml_fast.data.structures import Structures, concatenate
from kinml_fast.errors import ConfigError, DataError
from kinml_fast.metrics import Errors
from kinml_fast.pykinml import nnpes, state
from kinml_fast.pykinml.arguments import FORCES, KEPT_ORDER, device_of, note, show_log
from kinml_fast.pykinml.data import PesDataset
from kinml_fast.train import Trainer
from kinml_fast.train import config as configurations
from kinml_fast.train.config import Config
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.metrics import Row
from kinml_fast.train.progress import Progress
from kinml_fast.train.ranks import present

log = logging.getLogger(__name__)

_SIZES = {"train": "batch_size", "validation": "validation_batch_size", "test": "test_batch_size"}


class Loop:
    """Trains a PyKinML module, in place, on data sets that `prepper` has loaded.

    The folder then holds `model-0000.pt` … with PyKinML's keys, and what a native run leaves; `fname` is PyKinML's log.
    Processes that have joined (`init_process_group`) train together: the first one writes the folder, each its own
    `fname`, and all modules have the same weights afterwards.

    Parameters
    ----------
    model
        From `prepper.load_train_objs`, or DistributedDataParallel of that.
    loaders
        For training, validation and test. A `DistributedSampler` says that the batch size is that of each process.
    optimizer, scheduler
        Say how to train; the optimizer's state is gone on with.
    save_every
        Epochs between two checkpoints; the last epoch has one in any case.
    fname
        The log.
    svpath
        The folder.
    device
        Where to train, see `arguments.device_of`; the model is moved there.
    force_train
        Whether forces are trained on.
    """

    suffixes: tuple[str, ...] = ("",)
    """What stands behind the names of errors in the log, for each level of theory, lowest first."""
    opening = "\ndevice  {device}  epoch:  {epoch}"
    closing = "device Number  {device} is DONE!!!"
    notes: tuple[str, ...] = ()
    """What is different from PyKinML and said once."""
    sae_energies: Any
    """Single-atom energies, [n_elements], eV."""

    def __init__(
        self,
        model: nnpes.Composite,
        loaders: Sequence[DataLoader],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        save_every: int,
        fname: str,
        svpath: str,
        device: Any,
        force_train: bool,
    ) -> None:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        model.to(device_of(device))
        self.model, self.optimizer, self.lr_scheduler = model, optimizer, scheduler
        self.loaders = dict(zip(PARTS, loaders, strict=True))
        self.save_every, self.fname, self.svpath = save_every, fname, svpath
        self.device, self.force_train = device, force_train

    def train(self, max_epochs: int) -> None:
        """Train for so many epochs. Afterwards the model has the weights of the last one; model.pt has the best ones.

        Raises
        ------
        InputError
            As the native trainer.
        """
        show_log()
        for sentence in (KEPT_ORDER, *([FORCES] if self.force_train else []), *self.notes):
            note(sentence)
        started = time.time()
        config, data = self._config(max_epochs), self._prepared()
        folder, ranks = RunFolder(self.svpath), present()
        shape = dataset(self.loaders["train"]).descriptor
        model = nnpes.energy_model(self.model, shape, fidelities=data.fidelities, baseline=data.baseline)
        report = _Report(self, model, ranks.is_first)
        # The checkpoints to keep are PyKinML's, which the report writes.
        training = config.training.model_copy(update={"save_every": None})
        trainer = Trainer(model, data, training, folder.path, overwrite=True, progress=report, ranks=ranks)
        if ranks.is_first:
            configurations.save(config, folder.config)
            prepared.save(folder.prepared, data)
            splits.write_tvtmsk(folder.split, data.structures, data.split)
        state.give(trainer.optimizer, self.optimizer, self.model)
        with Path(self.fname).open("w", encoding="utf-8") as file:
            file.write(f"Initial parameters for device: {self.device}\n")
            self._write_parameters(file)
            report.begin_run(trainer, file, max_epochs)
            trainer.fit()
            if report.last is not None:
                self.model.load_state_dict(report.last)
            file.write(f"Final parameters for device: {self.device}\n")
            self._write_parameters(file)
            file.write(f"Training time: {time.time() - started}")
        log.info("%s", self.closing.format(device=self.device))

    def errors(self, row: Row, fidelities: Sequence[int]) -> list[tuple[Errors | None, Errors | None]]:
        """The errors of energies and forces of each level, lowest first."""

        def of_level(kind: str, fidelity: int) -> Errors | None:
            names = [f"{kind}_{name}_fidelity{fidelity}" for name in ("mae", "rmse", "max")]
            return Errors(*(row.more[name] for name in names)) if names[0] in row.more else None

        lower = [(of_level("energy", fidelity), of_level("forces", fidelity)) for fidelity in fidelities[:-1]]
        return [*lower, (row.energy, row.forces)]

    def _structures(self, part: str) -> Structures:
        return dataset(self.loaders[part]).structures

    def _prepared(self) -> Prepared:
        parts = [self._structures(part) for part in PARTS]
        sampler = self.loaders["train"].sampler
        if isinstance(sampler, DistributedSampler):
            parts[0] = parts[0].select(joint_order(sampler))
        elements = parts[0].elements
        ends = np.cumsum([len(part) for part in parts])
        structures = concatenate([part for part in parts if len(part)], elements)
        train, config = dataset(self.loaders["train"]), config_of(self.loaders["train"])
        return Prepared(
            structures,
            Split(*np.split(np.arange(ends[-1]), ends[:-1])),
            self._sae(structures, int(ends[1])),
            source=train.source,
            descriptor=config.descriptor.model_dump(),
            fidelities=config.data.selection.fidelities,
            baseline=config.data.baseline,
        )

    def _sae(self, structures: Structures, n_fitted: int) -> np.ndarray:
        """Single-atom energies; the first `n_fitted` structures are those for training and validation."""
        return np.asarray(self.sae_energies, dtype=np.float64)

    def _config(self, epochs: int) -> Config:
        """The native configuration of this run: how to train is what model, optimizer and schedule say."""
        values = config_of(self.loaders["train"]).model_dump()
        values["run"] = str(self.svpath)
        values["data"] |= {"split_file": str(RunFolder(self.svpath).split), "prepared": None}
        layers = [block for level, species, _, block in self.model.blocks() if (level, species) == (0, 0)]
        values["network"] |= {
            "layers": [block.linear.out_features for block in layers],
            "activations": [nnpes.name_of(block.activation) for block in layers],
            "biases": self.model.biases,
        }
        loss: dict[str, Any] = {"forces": self.force_train}
        if self.force_train and hasattr(self.model, "mtl"):
            given = self.model.mtl.traditional
            loss |= {"force_weight": float(self.model.log_sigma[0])} if given else {"weighting": "learned"}
        values["training"] |= {
            "epochs": epochs,
            "shuffle": isinstance(self.loaders["train"].sampler, RandomSampler),
            "dtype": str(layers[0].linear.weight.dtype).removeprefix("torch."),
            "device": str(layers[0].linear.weight.device),
            "loss": values["training"]["loss"] | loss,
            "score": {"forces": 0.0},
            "optimizer": optimizer_settings(self.optimizer),
            "scheduler": scheduler_settings(self.lr_scheduler),
            "save_every": self.save_every,
            "test_every": 1,
            **{_SIZES[part]: loader.batch_size or 1 for part, loader in self.loaders.items()},
            "per_rank": ["batch_size"] if isinstance(self.loaders["train"].sampler, DistributedSampler) else [],
        }
        config = configurations.from_dict(values, "args")
        return config.model_copy(update={"training": config.training.for_ranks(present().size)})

    def _write_parameters(self, file: TextIO) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                file.write(f"{name}: {parameter.data}\n")


class _Report(Progress):
    """Says each epoch's errors in PyKinML's words, and writes its checkpoints."""

    def __init__(self, loop: Loop, model: Any, writes: bool) -> None:
        self._loop, self._model, self._writes = loop, model, writes
        self.last: dict[str, torch.Tensor] | None = None

    def begin_run(self, trainer: Trainer, file: TextIO, epochs: int) -> None:
        """The trainer that is reported on, and PyKinML's log."""
        self._trainer, self._file, self._epochs = trainer, file, epochs

    def epoch(self, train: Row, validation: Row, test: Row | None = None) -> None:
        """An epoch is done."""
        loop, number = self._loop, train.epoch
        state.take(self._trainer.optimizer, loop.optimizer, loop.model)
        if loop.lr_scheduler is not None and self._trainer.scheduler is not None:
            loop.lr_scheduler.load_state_dict(self._trainer.scheduler.state_dict())
        lines = [loop.opening.format(device=loop.device, epoch=number)]
        self._file.write(f"\nepoch: {number}\n")
        for name, row in (("train", train), ("valid", validation), ("test", test)):
            if row is not None:
                lines += self._say(name, row)
        log.info("%s", "\n".join(lines))
        self._file.flush()
        last = number + 1 == self._epochs
        if last:
            self.last = {key: value.clone() for key, value in loop.model.state_dict().items()}
        if self._writes and (last or number % loop.save_every == 0):
            path = Path(loop.svpath) / f"model-{number:04}.pt"
            state.write(path, loop.model, self._model, loop.optimizer, loop.lr_scheduler, number)

    def _say(self, part: str, row: Row) -> list[str]:
        lines = []
        by_level = self._loop.errors(row, self._model.fidelities)
        for kind in (0, 1):
            for suffix, at_level in zip(self._loop.suffixes, by_level, strict=True):
                errors = at_level[kind]
                if errors is None:
                    continue
                short, long = (("", ""), ("F", "f"))[kind]
                for name, norm, value in (
                    ("MAE", "L1", errors.mae),
                    ("RMSE", "L2", errors.rmse),
                    ("Linf", "Linf", errors.max),
                ):
                    self._file.write(f"{part} {long}{norm}{suffix} loss: {value}\n")
                    lines.append(f"device  {self._loop.device}   {part} {short}{name}{suffix}:  {value}")
        if self._loop.force_train and hasattr(self._loop.model, "log_sigma"):
            self._file.write("log_sigma: " + " ".join(map(str, self._loop.model.log_sigma.tolist())) + " ")
        self._file.write("\n")
        return lines


def joint_order(sampler: DistributedSampler) -> list[int]:
    """The items of all processes in the order in which these take them, each once."""
    alone: DistributedSampler = DistributedSampler(sampler.dataset, 1, 0, shuffle=sampler.shuffle, seed=sampler.seed)
    alone.set_epoch(sampler.epoch)
    return list(alone)


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """training.optimizer of an optimizer of torch.

    Raises
    ------
    InputError
        It is of a kind that the native trainer does not have.
    """
    group = optimizer.param_groups[0]
    values = {"learning_rate": float(group["lr"]), "weight_decay": float(group["weight_decay"])}
    if isinstance(optimizer, torch.optim.Adam):
        return values | {
            "name": "adamw" if group.get("decoupled_weight_decay") else "adam",
            "betas": [float(beta) for beta in group["betas"]],
            "eps": float(group["eps"]),
            "amsgrad": group["amsgrad"],
        }
    if isinstance(optimizer, torch.optim.SGD):
        numbers = {"momentum": float(group["momentum"]), "dampening": float(group["dampening"])}
        return values | {"name": "sgd", **numbers, "nesterov": group["nesterov"]}
    raise ConfigError(f"the optimizer is {type(optimizer).__name__}: take Adam, AdamW or SGD")


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """training.scheduler of a schedule of torch; the errors are those of `optimizer_settings`."""
    if scheduler is None:
        return {"name": "none"}
    if isinstance(scheduler, schedules.ReduceLROnPlateau):
        names = ("factor", "patience", "threshold", "threshold_mode", "cooldown")
        return {"name": "rop", **{name: getattr(scheduler, name) for name in names}, "min_lr": scheduler.min_lrs[0]}
    if isinstance(scheduler, schedules.ExponentialLR):
        return {"name": "exp", "gamma": scheduler.gamma}
    if isinstance(scheduler, schedules.StepLR):
        return {"name": "step", "gamma": scheduler.gamma, "step_size": scheduler.step_size}
    raise ConfigError(f"the schedule is {type(scheduler).__name__}: take ReduceLROnPlateau, ExponentialLR or StepLR")


def dataset(loader: DataLoader) -> PesDataset:
    """The data set of a loader.

    Raises
    ------
    InputError
        It is none of `prepper`'s.
    """
    found = getattr(loader, "dataset", None)
    if not isinstance(found, PesDataset):
        raise DataError(_FOREIGN)
    return found


def config_of(loader: DataLoader) -> Config:
    """The native configuration that the data set of a loader was made by; errors as of `dataset`."""
    config = dataset(loader).config
    if config is None:
        raise DataError(_FOREIGN)
    return config


_FOREIGN = "the data sets are none that load_train_objs or load_train_data has made: take those"
