"""Training ensembles: the members one after the other or in processes of their own, then the file of all of them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinml_fast import devices
from kinml_fast.data import splits
from kinml_fast.data.files import replacing
from kinml_fast.data.prepared import Prepared
from kinml_fast.data.splits import Split
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import evaluate, model_file
from kinml_fast.errors import InputError
from kinml_fast.metrics import Errors
from kinml_fast.nn import Ensemble
from kinml_fast.train import config as configuration
from kinml_fast.train import runs
from kinml_fast.train.config import CHANGEABLE, Config
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.progress import Progress
from kinml_fast.train.results import Summary

log = logging.getLogger(__name__)

_CHANGEABLE = {*(f"training.{key}" for key in CHANGEABLE), "ensemble.members", "ensemble.processes", "run"}


@dataclass(frozen=True)
class EnsembleSummary:
    """How the training of an ensemble ended.

    Parameters
    ----------
    members
        Of each member.
    errors, forces
        Errors of the means, of energies and forces at the highest level, of the parts that no member was trained on.
    spread
        How far the members lie apart there.
    seconds
        What it took.
    """

    members: tuple[Summary, ...]
    errors: dict[str, Errors]
    forces: dict[str, Errors]
    spread: dict[str, evaluate.Spread]
    seconds: float = field(compare=False)


def train(config: Config, data: Prepared, progress: Progress | None = None) -> EnsembleSummary:
    """Train all members that are not at their end, and write the file and the report of the ensemble.

    Parameters
    ----------
    config
        Its run folder is there.
    data
        For all members; where folds vary, its split says what the folds are made of.
    progress
        What shows the progress of members that are trained one after the other; by default log lines.

    Raises
    ------
    InputError
        Fewer structures than folds, and what training raises.
    """
    started = time.monotonic()
    folder = RunFolder(config.run)
    with contextlib.suppress(OSError):
        folder.checkpoints.rmdir()  # the members have their own
    with folder.logged():
        for number in range(1, config.ensemble.members + 1):
            of_member(config, data, number)  # says what is wrong with the folds before anything is trained
        if config.ensemble.processes > 1:
            summaries = _in_processes(config)
        else:
            summaries = []
            for number in range(1, config.ensemble.members + 1):
                log.info("member %d of %d", number, config.ensemble.members)
                summaries.append(train_member(config, data, number, progress))
        return _finish(config, data, summaries, started)


def resume(
    before: Config, config: Config, accepted: Callable[[], None], progress: Progress | None = None
) -> EnsembleSummary:
    """Go on with an ensemble that was interrupted, or that shall have more members or epochs.

    Parameters
    ----------
    before
        The configuration that it was started with.
    config
        That to go on with.
    accepted
        Called when the configuration is found to be allowed.

    Raises
    ------
    InputError
        Something has changed that makes it another ensemble; what training raises.
    """
    _check_changes(before, config)
    folder = RunFolder(config.run)
    for member in folder.members():
        member.sweep()
    with folder.logged():
        begun = any(member.last.exists() for member in folder.members())
        data = runs.prepared_before(config) if begun else runs.prepare(config)
    accepted()
    return train(config, data, progress)


def of_member(config: Config, data: Prepared, number: int) -> tuple[Config, Prepared]:
    """Configuration and data of a member, counted from 1.

    Raises
    ------
    InputError
        There are fewer training and validation structures than folds.
    """
    own = config.model_copy(
        update={
            "run": str(RunFolder(config.run).member(number)),
            "network": config.network.model_copy(update={"seed": config.network.seed + number - 1}),
            "training": config.training.model_copy(update={"seed": config.training.seed + number - 1}),
            "ensemble": configuration.EnsembleConfig(),
        }
    )
    if config.ensemble.vary == "folds":
        split = fold(data.structures, data.split, config.ensemble.members, number - 1, config.data.split_seed)
        data = replace(data, split=split)
    return own, data


def fold(structures: Structures, split: Split, n_folds: int, index: int, seed: int = 0) -> Split:
    """One of the divisions of a cross-validation.

    Parameters
    ----------
    structures, split
        Training and validation structures together are divided; the test set stays.
    n_folds
        Number of parts; each has its share of every formula (and of the structures that lack a level of theory).
    index
        Which part is for validation, from 0.
    seed
        Of the division and of the order of the training structures.

    Raises
    ------
    InputError
        There are fewer structures than parts.
    """
    pool = np.concatenate([split.train, split.validation])
    if len(pool) < n_folds:
        raise InputError(
            f"there are {len(pool)} training and validation structures for {n_folds} folds: set ensemble.members to at "
            "most their number or take more data"
        )
    order = np.random.default_rng([seed, n_folds]).permutation(pool)
    # Dealt out like cards, kind after kind.
    known = structures.known_energies[:, order].T
    kinds = [f"{formula} {own}" for formula, own in zip(np.array(structures.formulas())[order], known, strict=True)]
    dealt = order[np.argsort(kinds, kind="stable")]
    chosen = dealt[index::n_folds]
    return Split(order[~np.isin(order, chosen)], np.sort(chosen), split.test)


def train_member(config: Config, data: Prepared, number: int, progress: Progress | None = None) -> Summary:
    """Train a member, or what is left of it, in its folder.

    Parameters
    ----------
    config, data
        Those of the ensemble.
    number
        The member, counted from 1.
    """
    own, data = of_member(config, data, number)
    folder = RunFolder(own.run)
    if folder.last.exists():
        return runs.go_on(own, data, progress)
    own, origin = runs.begin(own)
    folder.make()
    splits.write_tvtmsk(folder.split, data.structures, data.split)
    return runs.fit(own, data, origin, progress, resume=True)


# Members in processes of their own


def _in_processes(config: Config) -> list[Summary]:
    """Train the members in several processes at a time; Ctrl-C lets each write its checkpoint."""
    running: dict[int, subprocess.Popen] = {}
    interrupted = False
    log.info("%d members in %d processes", config.ensemble.members, config.ensemble.processes)

    def run(number: int) -> Summary | None:
        if interrupted:
            return None
        command = [sys.executable, "-m", __name__, config.run, str(number)]
        # A session of its own: Ctrl-C comes from here only.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        running[number] = process
        out, err = process.communicate()
        del running[number]
        if process.returncode == 2:
            raise InputError(f"member {number}: {err.strip().splitlines()[-1]}")
        if process.returncode != 0 and not interrupted:
            raise RuntimeError(f"member {number} ended with code {process.returncode}:\n{err}")
        if process.returncode != 0:
            return None
        summary = _summary(json.loads(out.splitlines()[-1]))
        rmse = summary.errors["validation"].rmse
        log.info("member %d: best epoch %d, validation RMSE %.4f kcal/mol", number, summary.best_epoch, rmse)
        return summary

    with ThreadPoolExecutor(config.ensemble.processes) as pool:
        jobs = [pool.submit(run, number) for number in range(1, config.ensemble.members + 1)]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
            return [job.result() for job in jobs if job.done()]
        except BaseException:
            interrupted = True
            for process in list(running.values()):
                process.send_signal(signal.SIGINT)
            raise


class _WhileParentLives(Progress):
    """Ends the training when the process that started it is gone."""

    def __init__(self) -> None:
        self.parent = os.getppid()

    def batch(self, epoch: int, fraction: float) -> None:
        if os.getppid() != self.parent:
            raise KeyboardInterrupt("the process that started this one is gone")


def _main(arguments: Sequence[str]) -> int:
    """Train one member of the ensemble in a run folder; the last line of the output is its summary."""
    run, number = arguments
    progress = _WhileParentLives()
    try:
        config = configuration.from_dict(configuration.read_yaml(RunFolder(run).config), run)
        config = config.model_copy(update={"run": run})
        if config.training.threads is None:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.ensemble.processes))
        summary = train_member(config, runs.prepared_before(config), int(number), progress)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(f"{json.dumps(asdict(summary))}\n")
    return 0


def _summary(values: Mapping[str, Any]) -> Summary:
    def of_parts(own: Mapping[str, Mapping[str, float]]) -> dict[str, Errors]:
        return {part: Errors(**errors) for part, errors in own.items()}

    found = {name: of_parts(values[name]) for name in ("errors", "forces")}
    lower = {int(fidelity): tuple(map(of_parts, own)) for fidelity, own in values["lower"].items()}
    return Summary(**{**values, **found, "lower": lower})


# The end


def _finish(config: Config, data: Prepared, summaries: Sequence[Summary], started: float) -> EnsembleSummary:
    folder = RunFolder(config.run)
    files = [folder.member(number).model for number in range(1, config.ensemble.members + 1)]
    ensemble = model_file.load_many(files).to(devices.resolve(config.training.device))
    notes = {
        "ensemble": config.ensemble.model_dump(exclude={"processes"}),
        "members": [model_file.load_training(file) for file in files],
    }
    model_file.save(folder.model, ensemble, notes)
    found = _parts(config, data, ensemble)
    of_parts = {name: evaluate.total([part]) for name, part in found.items()}
    result = EnsembleSummary(
        tuple(summaries),
        {name: group.energy for name, group in of_parts.items()},
        {name: group.forces for name, group in of_parts.items() if group.forces is not None},
        {name: group.spread for name, group in of_parts.items()},
        time.monotonic() - started,
    )
    _write_report(folder, ensemble, result, found)
    log.info("ensemble of %d models, %s:\n%s", len(files), folder.model, table(result))
    return result


def _parts(config: Config, data: Prepared, ensemble: Ensemble) -> dict[str, evaluate.Part]:
    """Predictions of the parts that no member was trained on, at the highest level."""
    names = ["test"] if config.ensemble.vary == "folds" else ["validation", "test"]
    names = [name for name in names if len(getattr(data.split, name))]
    if data.structures.coordinates is None:
        log.info("the data have no coordinates, only stored descriptors: the ensemble's errors are not computed")
        names = []
    found = {}
    for name in names:
        structures = data.structures.select(getattr(data.split, name))
        predictions = evaluate.evaluate(ensemble, structures)
        of_levels = evaluate.parts(structures, predictions, name, data.fidelities, ensemble.fidelities)
        if of_levels and of_levels[-1].fidelity in (None, data.fidelities[-1]):
            found[name] = of_levels[-1]
    return found


def table(result: EnsembleSummary) -> str:
    """Errors of the members and of their means as a text table: RMSE, energies in kcal/mol, forces in kcal/mol/Å."""
    parts = [part for part in splits.PARTS if any(part in member.errors for member in result.members)]
    with_forces = [part for part in parts if any(part in member.forces for member in result.members)]
    cells = [
        ["member", "best epoch", *(f"{part} energies" for part in parts), *(f"{part} forces" for part in with_forces)]
    ]
    rows: list[tuple[str, str, Mapping[str, Errors], Mapping[str, Errors]]] = [
        (str(number), f"{member.best_epoch} of {member.epochs}", member.errors, member.forces)
        for number, member in enumerate(result.members, start=1)
    ]
    rows.append(("ensemble", "", result.errors, result.forces))
    for name, epoch, errors, forces in rows:
        own = [errors.get(part) for part in parts] + [forces.get(part) for part in with_forces]
        cells.append([name, epoch, *("-" if error is None else f"{error.rmse:.3f}" for error in own)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
    lines = ["RMSE (energies in kcal/mol, forces in kcal/mol/Å)" if with_forces else "RMSE (kcal/mol)", *lines]
    for part, spread in result.spread.items():
        lines.append(
            f"{part}: mean standard deviation of the members {spread.energy:.3f} kcal/mol, "
            f"rank correlation with the error {spread.correlation:.2f}"
        )
    return "\n".join(lines)


def _write_report(
    folder: RunFolder, ensemble: Ensemble, result: EnsembleSummary, found: Mapping[str, evaluate.Part]
) -> None:
    from kinml_fast.train import report  # matplotlib takes a second to import

    metrics = {f"member {i}": folder.member(i).metrics for i in range(1, len(result.members) + 1)}
    best = {f"member {i}": member.best_epoch for i, member in enumerate(result.members, start=1)}
    report.write_member_curves(folder.report, metrics, best)
    part = found.get("test") or found.get("validation")
    if part is not None:
        evaluate.draw(folder.report, ensemble, [replace(part, fidelity=None)], part.file)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["member", "best_epoch", "split", "quantity", "unit", "mae", "rmse", "max"])
    rows = [(str(i), member.best_epoch, member.errors, member.forces) for i, member in enumerate(result.members, 1)]
    for name, epoch, energies, forces in [*rows, ("ensemble", "", result.errors, result.forces)]:
        for quantity, errors in ((report.ENERGY, energies), (report.FORCES, forces)):
            for split, own in errors.items():
                numbers = map(repr, (own.mae, own.rmse, own.max))
                writer.writerow([name, epoch, split, quantity.name, quantity.unit, *numbers])
    with replacing(Path(folder.report) / "members.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _check_changes(before: Config, config: Config) -> None:
    old, new = _flat(before.model_dump()), _flat(config.model_dump())
    for key in sorted(old.keys() | new.keys()):
        allowed = any(key == name or key.startswith(f"{name}.") for name in _CHANGEABLE)
        if old.get(key) != new.get(key) and not allowed:
            raise InputError(
                f"{config.run}: was started with {key} = {old.get(key)} and cannot go on with {new.get(key)}: keep it, "
                "or start a new run"
            )
    was, now = before.ensemble.members, config.ensemble.members
    if was == 1:
        raise InputError(
            f"{config.run}: is a run of one model and cannot become an ensemble: start a new run with ensemble.members"
        )
    if now < was or (now > was and config.ensemble.vary == "folds"):
        raise InputError(
            f"{config.run}: was started with ensemble.members = {was} and cannot go on with {now}: members can be "
            "added where seeds vary, otherwise start a new run"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
