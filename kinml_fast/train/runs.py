"""Whole runs from a configuration, of one model or of an ensemble: what the command line does, for Python too."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kinml_fast.data.large import LargeData
from kinml_fast.data.prepared import Prepared
from kinml_fast.errors import ConfigError, InputError
from kinml_fast.train import config as configuration
from kinml_fast.train import ensembles
from kinml_fast.train.config import Config, flat
from kinml_fast.train.continued import Origin
from kinml_fast.train.ensembles import EnsembleSummary
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.progress import Progress
from kinml_fast.train.ranks import ALONE, Ranks
from kinml_fast.train.results import Summary
from kinml_fast.train.single import begin, fit, go_on, prepare, prepared_before, settled

log = logging.getLogger(__name__)


_UNEQUAL = "give all of them the same files and arguments"
_RESTART_PATIENCE = 120.0
"""Seconds in which the locks of a computer that has failed are given up by others that see the same folder."""


def start(
    config: Config,
    *,
    overwrite: bool = False,
    restarted: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Summary | EnsembleSummary:
    """Prepare the data, initialise the model or take the one to start from, and train it, in a new run folder.

    Parameters
    ----------
    config
        The run; with ensemble.members > 1 that of as many models.
    overwrite
        Replace an earlier run in the folder.
    restarted
        Something has started this again (`ranks.restarted`): go on with a run in the folder if it has this very
        configuration.
    progress
        What shows the progress; by default log lines.
    ranks
        The processes that train together; each of them calls this.

    Raises
    ------
    InputError
        Whatever is wrong with the folder, the data or the configuration.
    """
    folder = RunFolder(config.run)

    def opened() -> tuple[Config, Origin | None]:
        ranks.device(config.training.device)  # says now what is wrong with it
        return begin(config)

    given = config.training.per_rank
    if given and config.ensemble.members > 1 and not ranks.alone:
        raise ConfigError(
            "training.per_rank does not go together with ensemble.members > 1, because different numbers of processes "
            "may train the members: leave it out, and let training.batch_size be that of all processes of a member"
        )
    config = config.model_copy(update={"training": config.training.for_ranks(ranks.size)})
    config, origin = ranks.in_turn(opened)
    ranks.same(_shared(config), _UNEQUAL)
    if restarted and ranks.told(lambda: "begun" if _has_begun(config, folder) else ""):
        return resume(folder.path, restarted=True, progress=progress, ranks=ranks)
    with contextlib.ExitStack() as stack:

        def begun() -> Prepared | LargeData:
            stack.enter_context(folder.hold(patience=_RESTART_PATIENCE if restarted else 0.0))
            stack.callback(folder.restore)  # the run before, if this one does not get as far as to begin
            folder.create(overwrite)
            with folder.logged():
                known = settled(config, ranks.size)
                configuration.save(known, folder.config)
                for sentence in config.ignored():
                    log.warning("%s", sentence)
                if given:
                    size, rate = config.training.batch_size, config.training.optimizer.learning_rate
                    log.info("%d processes: batches of %d structures, learning rate %g", ranks.size, size, rate)
                return prepare(known)

        # What was settled is in the file.
        data = ranks.in_turn(begun, lambda: prepared_before(configuration.load(folder.config)))
        if config.ensemble.members > 1:
            assert isinstance(data, Prepared)
            return ensembles.train(config, data, progress, ranks)
        return fit(config, data, origin, progress, ranks=ranks)


def resume(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    restarted: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Summary | EnsembleSummary:
    """Continue a run from its last checkpoint, or an ensemble with the members that are not at their end.

    Parameters
    ----------
    path
        The run folder.
    overrides
        `key=value`; see `config.CHANGEABLE` for what may change.
    restarted
        Something has started this again (`ranks.restarted`), so that another process may be about to end there.
    progress, ranks
        As for `start`; the run may have been started by another number of processes.

    Raises
    ------
    InputError
        No run is there, or another process trains it; its checkpoint is damaged or does not fit its configuration and
        data.
    """
    folder = RunFolder(path)
    with contextlib.ExitStack() as stack:

        def held() -> tuple[Config, Config]:
            if folder.path.is_dir():
                stack.enter_context(folder.hold(patience=_RESTART_PATIENCE if restarted else 0.0))
            return _reopened(folder, overrides, ranks)

        before, config = ranks.in_turn(held, lambda: _reopened(folder, overrides, ranks))
        here = config.model_copy(update={"run": str(folder)})  # it may have moved
        ranks.same(_shared(here), _UNEQUAL)
        if max(before.ensemble.members, config.ensemble.members) > 1:
            return ensembles.resume(before, here, lambda: configuration.save(config, folder.config), progress, ranks)
        if not folder.last.exists():
            here, origin = begin(here)
            data = ranks.in_turn(lambda: _again(here, folder, prepare), lambda: prepared_before(here))
            return fit(here, data, origin, progress, resume=True, ranks=ranks)
        data = ranks.in_turn(lambda: _again(here, folder, prepared_before), lambda: prepared_before(here))
        return go_on(here, data, progress, lambda: configuration.save(config, folder.config), ranks)


def _has_begun(config: Config, folder: RunFolder) -> bool:
    """Whether a folder holds a run of this configuration."""
    try:
        found = configuration.from_dict(configuration.read_yaml(folder.config), str(folder.config))
    except InputError:
        return False
    if config.data.on_disk == "auto":  # what the run has decided
        config = config.model_copy(update={"data": config.data.model_copy(update={"on_disk": found.data.on_disk})})
    return found == config


def _reopened(folder: RunFolder, overrides: Sequence[str], ranks: Ranks) -> tuple[Config, Config]:
    """The configuration of the run in a folder, as it was and as it goes on."""
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
        raise ConfigError(f"{folder}: has begun already, so that start.… cannot change: start a new run for that")
    if config.training.per_rank != before.training.per_rank:
        raise ConfigError(
            f"{folder}: has begun already, with training.batch_size={before.training.batch_size} for all processes "
            "together, so that training.per_rank cannot change: start a new run for that"
        )
    ranks.device(config.training.device)
    return before, config


def _again(config: Config, folder: RunFolder, read: Callable[[Config], Prepared | LargeData]) -> Prepared | LargeData:
    """Clear up in the folder of a run that was cut off, and read its data."""
    folder.sweep()
    folder.make()
    with folder.logged():
        return read(config)


def _shared(config: Config) -> dict[str, Any]:
    """What must be alike in all processes."""
    return flat(config.model_dump(exclude={"training": {"device", "threads"}}))
