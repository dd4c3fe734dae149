"""One model from a configuration: its data, its first weights, its training; a member of an ensemble is one, too."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from kinml_fast.data import hessians, large, prepared, splits, stored, weights
from kinml_fast.data.files import expand
from kinml_fast.data.large import LargeData
from kinml_fast.data.prepared import Prepared
from kinml_fast.data.training_data import TrainingData
from kinml_fast.deploy import model_file
from kinml_fast.errors import ConfigError, InputError
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train import continued
from kinml_fast.train.config import Config
from kinml_fast.train.continued import Origin
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.hessians import HessianTerm
from kinml_fast.train.loss import HESSIAN
from kinml_fast.train.progress import Progress
from kinml_fast.train.ranks import ALONE, Ranks
from kinml_fast.train.results import Summary
from kinml_fast.train.trainer import Trainer

log = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 0.25  # that data files may take: reading and preparing them takes several times as much


def prepared_before(config: Config) -> Prepared | LargeData:
    """The data of a run that has begun: its own copy, so that it goes on from any working folder."""
    copy = _prepared_path(config, RunFolder(config.run))
    if config.data.on_disk is True and _blocks(copy).exists():
        return large.load(_blocks(copy))
    return prepared.load(copy) if copy.exists() else prepare(config)


def go_on(
    config: Config,
    data: Prepared | LargeData,
    progress: Progress | None = None,
    accepted: Callable[[], None] | None = None,
    ranks: Ranks = ALONE,
) -> Summary:
    """Train on from the last checkpoint in the configuration's folder.

    `accepted` is called, in the first of several processes, when the checkpoint has turned out to fit data and
    configuration.
    """
    folder, given = RunFolder(config.run), _given(config, data)
    with folder.logged(ranks.rank):
        if config.start.model is None:
            model = make_model(config, data.elements, data.fidelities, data.baseline)
        else:
            # The start model may be gone; elements that were added to it are in the checkpoint, too.
            origin = continued.load(folder.last)
            config, model = continued.resolved(config, origin), origin.model
        _move(model, config, ranks)
        term = _hessian_term(config, model, folder, ranks)
    _seed_others(config)
    trainer = Trainer(
        model,
        given,
        config.training,
        folder.path,
        resume=True,
        progress=progress,
        extra_losses=None if term is None else {HESSIAN: term},
        freeze=config.start.freeze,
        ranks=ranks,
    )
    if accepted is not None and ranks.is_first:
        accepted()
    return _trained(trainer, folder, term, ranks)


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
    model = start.model
    if config.ensemble.members > 1:  # each begins with its own later
        model = continued.start_of_member(start, 1).model or model
    origin = continued.load(model, averaged=start.optimizer == "reset")
    if origin.path.resolve().is_relative_to(Path(config.run).resolve()):
        raise ConfigError(
            f"start.model {origin.path} is in the run folder {config.run} itself: choose another with run="
        )
    return continued.resolved(config, origin), origin


def fit(
    config: Config,
    data: Prepared | LargeData,
    origin: Origin | None,
    progress: Progress | None = None,
    resume: bool = False,
    ranks: Ranks = ALONE,
) -> Summary:
    """Train from the beginning, in a folder that is there."""
    folder = RunFolder(config.run)
    with folder.logged(ranks.rank):
        if origin is None:
            model = make_model(config, data.elements, data.fidelities, data.baseline)
        else:
            elements, dtype = config.data.elements or data.elements, getattr(torch, config.training.dtype)
            model = continued.model_for(origin, data, elements, dtype, config.network.seed)
            if config.start.sae == "keep":
                continued.keep_sae(model, origin, config.data.sae, data)
        log.info("%s", model)
        _move(model, config, ranks)
        term = _hessian_term(config, model, folder, ranks)
        _seed_others(config)
        trainer = Trainer(
            model,
            _given(config, data),
            config.training,
            folder.path,
            resume=resume,
            progress=progress,
            extra_losses=None if term is None else {HESSIAN: term},
            freeze=config.start.freeze,
            origin=origin if config.start.optimizer == "keep" else None,
            ranks=ranks,
        )
        if origin is not None:
            sums = trainer.evaluate("validation", config.training.loss.forces)
            continued.say_first_errors(model, sums, config.start.sae == "keep")
    return _trained(trainer, folder, term, ranks)


def prepare(config: Config) -> Prepared | LargeData:
    """The prepared data of a configuration: read, checked, divided and saved, or taken from the last time.

    The division is also written to split.txt in the run folder, which `data.split_file` of another run can name.
    """
    config, folder = settled(config), RunFolder(config.run)
    path = _prepared_path(config, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be made ({error.strerror}): choose another folder") from error
    settings = config.data.model_dump(include={"split", "split_file", "split_seed", "sae", "weights"})
    settings["descriptor"] = config.descriptor.model_dump()
    files, selection = config.data.files, config.data.selection
    data: Prepared | LargeData
    if not config.data.on_disk:
        data = prepared.prepare(files, selection, **settings, path=path)
        tables = [splits.table(data.structures, data.split)]
        if len(data.fidelities) > 1 or data.baseline is not None:
            tables.append(splits.level_table(data.structures, data.split, data.fidelities, data.baseline))
    else:
        data = large.prepare(files, selection, **settings, path=_blocks(path))
        tables = list(data.tables)
    folder.path.mkdir(parents=True, exist_ok=True)
    if isinstance(data, LargeData):
        large.write_split(folder.split, data)
    else:
        splits.write_tvtmsk(folder.split, data.structures, data.split)
    for table in tables:
        log.info("%s", table)
    several = len(data.fidelities) > 1
    assert data.sae is not None
    for fidelity, sae in zip(data.fidelities, data.sae.reshape(len(data.fidelities), -1), strict=True):
        energies = ", ".join(f"{e} {v:.6f}" for e, v in zip(data.elements, sae, strict=True))
        log.info("single-atom energies%s, eV: %s", f" of fidelity {fidelity}" if several else "", energies)
    if isinstance(data, Prepared) and data.weights is not None:
        log.info("weights in the loss: %s", weights.table(data.weights))
    return data


def settled(config: Config, processes: int = 1) -> Config:
    """The configuration with data.on_disk decided.

    Parameters
    ----------
    config
        The run.
    processes
        How many on this computer are to have the data.

    Raises
    ------
    InputError
        They are to be read from disk, but the configuration asks for what needs all of them in memory.
    """
    why = ""
    if config.ensemble.members > 1:
        why = "ensemble.members > 1"
    elif config.training.jacobian == "stored":
        why = "training.jacobian = stored"
    if config.data.on_disk is True and why:
        raise ConfigError(f"data.on_disk does not go together with {why} yet: leave one of them out")
    if config.data.on_disk != "auto":
        return config
    on_disk = False
    available = stored.available_memory()
    if not why and available is not None:
        size = sum(path.stat().st_size for path in expand(config.data.files))
        on_disk = size * processes > _SHARE_OF_MEMORY * available
    if on_disk:
        log.info("the data files take %.1f GB: the structures are read from disk while training", size / 1e9)
    return config.model_copy(update={"data": config.data.model_copy(update={"on_disk": on_disk})})


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
        repulsion=network.repulsion.made(elements),
        dispersion=network.dispersion.made(),
    )


def _hessian_term(config: Config, model: EnergyModel, folder: RunFolder, ranks: Ranks) -> HessianTerm | None:
    """The term of second derivatives, if the loss has one; the run keeps a copy of them."""
    loss = config.training.loss
    if not loss.hessians:
        return None
    if model.baseline is not None:
        raise ConfigError("training.loss.hessians: are of whole energies, not of the differences that are trained on")

    def read_and_kept() -> list[hessians.MoleculeHessian]:
        if not folder.hessians.exists():
            hessians.write(folder.hessians, hessians.read(loss.hessians, model.fidelities[-1]))
        return hessians.read(folder.hessians)

    term = HessianTerm(ranks.in_turn(read_and_kept), model, loss.hessian_structures)
    log.info("second derivatives are trained on: RMSE at first %.3f eV/Å²", term.error(model))
    return term


def _trained(trainer: Trainer, folder: RunFolder, term: HessianTerm | None, ranks: Ranks) -> Summary:
    summary = trainer.fit()
    if term is not None and ranks.is_first:
        with folder.logged(ranks.rank):
            model = model_file.load(folder.model)
            assert isinstance(model, EnergyModel)
            log.info("second derivatives: RMSE %.3f eV/Å²", term.error(model.to(trainer.model.sae.device)))
    return summary


def _given(config: Config, data: Prepared | LargeData) -> TrainingData | LargeData:
    """The data for a trainer, without single-atom energies where the model keeps those of the one it starts from."""
    if config.start.model is None or config.start.sae != "keep":
        return data
    if isinstance(data, LargeData):
        return LargeData(data.file, None)
    return TrainingData(data.structures, data.split, None, data.weights, data.source)


def _move(model: EnergyModel, config: Config, ranks: Ranks) -> None:
    """Bring a model to where it is trained."""
    device = ranks.device(config.training.device)
    if device.type == "cuda":
        log.info("trains on %s, %s", device, torch.cuda.get_device_name(device))
    model.to(device)


def _seed_others(config: Config) -> None:
    """Seed the generators that training does not use but whose states it keeps, so that equal runs are wholly equal."""
    random.seed(config.training.seed)
    np.random.seed(config.training.seed % 2**32)  # noqa: NPY002


def _blocks(path: Path) -> Path:
    """Where data that are read from disk are, instead of a file of prepared data."""
    return path.with_suffix(".blocks")


def _prepared_path(config: Config, folder: RunFolder) -> Path:
    return folder.prepared if config.data.prepared is None else Path(config.data.prepared)
