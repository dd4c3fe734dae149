"""Whole runs from a configuration: what the command line does, for Python too."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

from kinml_fast import devices
from kinml_fast.data import prepared, splits, weights
from kinml_fast.data.prepared import Prepared
from kinml_fast.errors import InputError
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train import config as configuration
from kinml_fast.train import continued
from kinml_fast.train.config import Config
from kinml_fast.train.continued import Origin
from kinml_fast.train.dataset import TrainingData
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.progress import Progress
from kinml_fast.train.results import Summary
from kinml_fast.train.trainer import Trainer

if TYPE_CHECKING:
    from kinml_fast.train import ensembles

log = logging.getLogger(__name__)


def start(
    config: Config, *, overwrite: bool = False, progress: Progress | None = None
) -> Summary | ensembles.EnsembleSummary:
    """Prepare the data, initialise the model or take the one to start from, and train it, in a new run folder.

    Parameters
    ----------
    config
        The run; with ensemble.members > 1 that of as many models.
    overwrite
        Replace an earlier run in the folder.
    progress
        What shows the progress; by default log lines.

    Raises
    ------
    InputError
        Whatever is wrong with the folder, the data or the configuration.
    """
    folder = RunFolder(config.run)
    devices.resolve(config.training.device)  # says now what is wrong with it
    config, origin = begin(config)
    folder.create(overwrite)
    configuration.save(config, folder.config)
    with folder.logged():
        for sentence in config.ignored():
            log.warning("%s", sentence)
        data = prepare(config)
    if config.ensemble.members > 1:
        return _ensembles().train(config, data, progress)
    return fit(config, data, origin, progress)


def resume(
    path: str | Path, overrides: Sequence[str] = (), *, progress: Progress | None = None
) -> Summary | ensembles.EnsembleSummary:
    """Continue a run from its last checkpoint, or an ensemble with the members that are not at their end.

    Parameters
    ----------
    path
        The run folder.
    overrides
        `key=value`; see `trainer.CHANGEABLE` for what may change.

    Raises
    ------
    InputError
        No run is there, or its checkpoint is damaged or does not fit its configuration and data.
    """
    folder = RunFolder(path)
    if not folder.config.exists():
        raise InputError(f"{folder}: holds no run ({folder.config.name} is missing): start one with a configuration")
    values = configuration.read_yaml(folder.config)
    if "data" not in values:
        parent = RunFolder(folder.path.resolve().parent)
        if folder.path.resolve() in [member.path for member in parent.members()] and parent.config.exists():
            raise InputError(f"{folder}: is a member of an ensemble: resume {parent}")
        raise InputError(f"{folder}: was started from Python: resume it there, with Trainer(…, resume=True)")
    before = configuration.from_dict(values, str(folder.config))
    config = configuration.with_overrides(values, overrides, str(folder.config))
    if config.start != before.start:
        raise InputError(f"{folder}: has begun already, so that start.… cannot change: start a new run for that")
    devices.resolve(config.training.device)
    here = config.model_copy(update={"run": str(folder)})  # it may have moved
    folder.sweep()
    if max(before.ensemble.members, config.ensemble.members) > 1:
        return _ensembles().resume(before, here, lambda: configuration.save(config, folder.config), progress)
    folder.make()
    if not folder.last.exists():
        here, origin = begin(here)
        with folder.logged():
            data = prepare(here)
        return fit(here, data, origin, progress, resume=True)
    with folder.logged():
        data = prepared_before(here)
    return go_on(here, data, progress, lambda: configuration.save(config, folder.config))


def prepared_before(config: Config) -> Prepared:
    """The data of a run that has begun: its own copy, so that it goes on from any working folder."""
    copy = _prepared_path(config, RunFolder(config.run))
    return prepared.load(copy) if copy.exists() else prepare(config)


def go_on(
    config: Config, data: Prepared, progress: Progress | None = None, accepted: Callable[[], None] | None = None
) -> Summary:
    """Train on from the last checkpoint in the configuration's folder.

    `accepted` is called when the checkpoint has turned out to fit data and configuration.
    """
    folder = RunFolder(config.run)
    with folder.logged():
        if config.start.model is None:
            model = make_model(config, data.structures.elements, data.fidelities, data.baseline)
        else:
            # The start model may be gone; elements that were added to it are in the checkpoint, too.
            origin = continued.load(folder.last)
            config, model = continued.resolved(config, origin), origin.model
            data = _without_sae(data) if config.start.sae == "keep" else data
        _move(model, config)
    _seed_others(config)
    trainer = Trainer(
        model, data, config.training, folder.path, resume=True, progress=progress, freeze=config.start.freeze
    )
    if accepted is not None:
        accepted()
    return trainer.fit()


def begin(config: Config) -> tuple[Config, Origin | None]:
    """What start.model names, if anything, and the configuration with that model's architecture.

    Raises
    ------
    InputError
        The file is no model and no checkpoint, is in the run folder, or contradicts the configuration.
    """
    start = config.start
    if start.model is None:
        return config, None
    origin = continued.load(start.model, averaged=start.optimizer == "reset")
    if origin.path.resolve().is_relative_to(Path(config.run).resolve()):
        raise InputError(
            f"start.model {origin.path} is in the run folder {config.run} itself: choose another with run="
        )
    return continued.resolved(config, origin), origin


def fit(
    config: Config, data: Prepared, origin: Origin | None, progress: Progress | None = None, resume: bool = False
) -> Summary:
    """Train from the beginning, in a folder that is there."""
    folder = RunFolder(config.run)
    with folder.logged():
        if origin is None:
            model = make_model(config, data.structures.elements, data.fidelities, data.baseline)
        else:
            elements, dtype = config.data.elements or data.structures.elements, getattr(torch, config.training.dtype)
            model = continued.model_for(origin, data, elements, dtype, config.network.seed)
            if config.start.sae == "keep":
                continued.keep_sae(model, origin, config.data.sae, data)
                data = _without_sae(data)
        log.info("%s", model)
        _move(model, config)
        _seed_others(config)
        trainer = Trainer(
            model,
            data,
            config.training,
            folder.path,
            resume=resume,
            progress=progress,
            freeze=config.start.freeze,
            origin=origin if config.start.optimizer == "keep" else None,
        )
        if origin is not None:
            residuals = trainer.evaluate("validation", config.training.loss.forces)
            continued.say_first_errors(model, residuals, config.start.sae == "keep")
    return trainer.fit()


def prepare(config: Config) -> Prepared:
    """The prepared data of a configuration: read, checked, divided and saved, or taken from the last time.

    The division is also written to split.txt in the run folder, which `data.split_file` of another run can name.
    """
    folder = RunFolder(config.run)
    settings = config.data.model_dump()
    path = _prepared_path(config, folder)
    settings.pop("prepared")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be made ({error.strerror}): choose another folder") from error
    data = prepared.prepare(**settings, descriptor=config.descriptor.model_dump(), path=path)
    log.info("%s", splits.table(data.structures, data.split))
    folder.path.mkdir(parents=True, exist_ok=True)
    splits.write_tvtmsk(folder.split, data.structures, data.split)
    several = len(data.fidelities) > 1
    if several or data.baseline is not None:
        log.info("%s", splits.level_table(data.structures, data.split, data.fidelities, data.baseline))
    for fidelity, sae in zip(data.fidelities, data.sae.reshape(len(data.fidelities), -1), strict=True):
        energies = ", ".join(f"{e} {v:.6f}" for e, v in zip(data.structures.elements, sae, strict=True))
        log.info("single-atom energies%s, eV: %s", f" of fidelity {fidelity}" if several else "", energies)
    if data.weights is not None:
        log.info("weights in the loss: %s", weights.table(data.weights))
    return data


def make_model(
    config: Config, elements: Sequence[str], fidelities: Sequence[int] = (1,), baseline: int | None = None
) -> EnergyModel:
    """The model of a configuration with its initial weights, which the seed decides.

    Parameters
    ----------
    config
        Descriptor, layers and precision.
    elements, fidelities, baseline
        Those of the prepared data.
    """
    network = config.network
    torch.manual_seed(network.seed)
    return EnergyModel(
        AEVParameters.aevmod(tuple(elements), **config.descriptor.model_dump(exclude={"backend"})),
        layers=network.layers,
        activations=network.layer_activations,
        biases=network.biases,
        dtype=getattr(torch, config.training.dtype),
        fidelities=fidelities,
        baseline=baseline,
    )


def _without_sae(data: Prepared) -> TrainingData:
    """The data for a model that keeps its own single-atom energies."""
    return TrainingData(data.structures, data.split, None, data.weights, data.source)


def _move(model: EnergyModel, config: Config) -> None:
    """Bring a model to where it is trained."""
    device = devices.resolve(config.training.device)
    if device.type == "cuda":
        log.info("trains on %s, %s", device, torch.cuda.get_device_name(device))
    model.to(device)


def _ensembles() -> ModuleType:
    from kinml_fast.train import ensembles  # which imports this module

    return ensembles


def _seed_others(config: Config) -> None:
    """Seed the generators that training does not use but whose states it keeps, so that equal runs are wholly equal."""
    random.seed(config.training.seed)
    np.random.seed(config.training.seed % 2**32)  # noqa: NPY002


def _prepared_path(config: Config, folder: RunFolder) -> Path:
    return folder.prepared if config.data.prepared is None else Path(config.data.prepared)
