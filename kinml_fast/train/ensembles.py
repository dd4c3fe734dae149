"""Training ensembles: the members one after the other or side by side, then the file of all of them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kinml_fast import devices, report, signals
from kinml_fast.data.files import replacing
from kinml_fast.data.large import LargeData
from kinml_fast.data.prepared import Prepared
from kinml_fast.data.split import PARTS
from kinml_fast.deploy import calibrate, evaluate, model_file
from kinml_fast.errors import ConfigError, InputError
from kinml_fast.metrics import Errors
from kinml_fast.nn import Ensemble
from kinml_fast.train import single
from kinml_fast.train.board import this_process
from kinml_fast.train.config import CHANGEABLE, Config, flat
from kinml_fast.train.folder import MEMBER_PATIENCE, RunFolder
from kinml_fast.train.members import of_member, train_member
from kinml_fast.train.progress import Progress
from kinml_fast.train.ranks import ALONE, Ranks
from kinml_fast.train.results import Summary

log = logging.getLogger(__name__)

_CHANGEABLE = {*(f"training.{key}" for key in CHANGEABLE), "ensemble.members", "ensemble.processes", "run"}
_MEMBER_PROGRAM = "kinml_fast.train.member_program"


@dataclass(frozen=True)
class EnsembleSummary:
    """How the training of an ensemble ended.

    Parameters
    ----------
    members
        Of each member.
    errors, forces, stresses
        Errors of the means, of energies, forces and, if the members were trained on them, stresses at the highest
        level, of the parts that no member was trained on.
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
    stresses: dict[str, Errors] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EnsembleSummary:
        """The summary of what `dataclasses.asdict` has made of it, also when it went through JSON."""

        def of_parts(errors: Mapping[str, Mapping[str, float]]) -> dict[str, Errors]:
            return {part: Errors(**numbers) for part, numbers in errors.items()}

        return cls(
            tuple(map(Summary.from_dict, values["members"])),
            of_parts(values["errors"]),
            of_parts(values["forces"]),
            {part: evaluate.Spread(**numbers) for part, numbers in values["spread"].items()},
            values["seconds"],
            of_parts(values["stresses"]),
        )


def train(config: Config, data: Prepared, progress: Progress | None = None, ranks: Ranks = ALONE) -> EnsembleSummary:
    """Train all members that are not at their end, and write the file and the report of the ensemble.

    Parameters
    ----------
    config
        Its run folder is there.
    data
        For all members; where folds vary, its split says what the folds are made of.
    progress
        What shows the progress of members that are trained one after the other; by default log lines.
    ranks
        The processes that train the members, side by side; each of them calls this.

    Raises
    ------
    InputError
        Fewer structures than folds, and what training raises.
    """
    started = time.monotonic()
    folder = RunFolder(config.run)
    if ranks.is_first:
        with contextlib.suppress(OSError):
            folder.checkpoints.rmdir()  # the members have their own
    with folder.logged(ranks.rank):
        for number in range(1, config.ensemble.members + 1):
            of_member(config, data, number)  # says what is wrong with the folds before anything is trained
        if ranks.is_first:
            folder.accept()
        if not ranks.alone:
            return _side_by_side(config, data, progress, ranks, started)
        if config.ensemble.processes > 1:
            summaries = _in_processes(config)
        else:
            summaries = []
            for number in range(1, config.ensemble.members + 1):
                log.info("member %d of %d", number, config.ensemble.members)
                summaries.append(train_member(config, data, number, progress))
        return _finish(config, data, summaries, started)


def resume(
    before: Config,
    config: Config,
    accepted: Callable[[], None],
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> EnsembleSummary:
    """Go on with an ensemble that was interrupted, or that shall have more members or epochs.

    Parameters
    ----------
    before
        The configuration that it was started with.
    config
        That to go on with.
    accepted
        Called, in the first of several processes, when the configuration is found to be allowed.
    progress, ranks
        As for `train`; the ensemble may have been started by another number of processes.

    Raises
    ------
    InputError
        Something has changed that makes it another ensemble; what training raises.
    """
    _check_changes(before, config)
    folder = RunFolder(config.run)

    def reopened() -> Prepared | LargeData:
        folder.sweep()
        for member in folder.members():
            with member.hold(patience=MEMBER_PATIENCE):
                member.sweep()
        with folder.logged():
            begun = any(member.last.exists() for member in folder.members())
            data = single.prepared_before(config) if begun else single.prepare(config)
        accepted()
        return data

    data = ranks.in_turn(reopened, lambda: single.prepared_before(config))
    assert isinstance(data, Prepared)
    return train(config, data, progress, ranks)


# Members side by side


def _side_by_side(
    config: Config, data: Prepared, progress: Progress | None, ranks: Ranks, started: float
) -> EnsembleSummary:
    """Train the members in parts of the processes; the first process writes what is of all of them."""
    members = config.ensemble.members
    groups = min(members, ranks.size)
    ranks.set_timeout(config.training.rank_timeout_seconds)
    own = ranks.divided(groups)
    assert own.part is not None
    numbers = range(own.part.number + 1, members + 1, groups)
    if config.ensemble.processes > 1:
        log.warning("ensemble.processes has no effect where several processes were started: all of them train members")
    place = ranks.rank, ranks.size, own.part.number + 1, groups, this_process()
    log.info("process %d of %d, in group %d of %d, %s", *place)
    try:
        for number in numbers:
            log.info("member %d of %d", number, members)
            summary = train_member(config, data, number, progress, own)
            if own.is_first:
                own.part.post(str(number), json.dumps(asdict(summary)))
        summaries = [Summary.from_dict(json.loads(own.read(str(number)))) for number in range(1, members + 1)]
        for number in set(range(1, members + 1)) - set(numbers):
            _say(number, summaries[number - 1])

        def finished() -> str:
            return json.dumps(asdict(_finish(config, data, summaries, started)))

        ranks.wait()  # none looks for another any more
        return EnsembleSummary.from_dict(json.loads(ranks.told(finished)))
    except (KeyboardInterrupt, signals.Stopped) as end:
        ranks.ask(signals.number_of(end))
        raise


def _say(number: int, summary: Summary) -> None:
    rmse = summary.errors["validation"].rmse
    log.info("member %d: best epoch %d, validation RMSE %.4f kcal/mol", number, summary.best_epoch, rmse)


def _in_processes(config: Config) -> list[Summary]:
    """Train the members in several processes at a time; Ctrl-C, or another signal, lets each write its checkpoint."""
    running: dict[int, subprocess.Popen] = {}
    ended = False
    log.info("%d members in %d processes", config.ensemble.members, config.ensemble.processes)

    def run(number: int) -> Summary | None:
        if ended:
            return None
        command = [sys.executable, "-m", _MEMBER_PROGRAM, config.run, str(number)]
        # A session of its own: Ctrl-C comes from here only. Other signals may reach it from elsewhere, too.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        running[number] = process
        out, err = process.communicate()
        del running[number]
        if process.returncode == 2:
            raise InputError(f"member {number}: {err.strip().splitlines()[-1]}")
        if process.returncode != 0 and not ended:
            number = process.returncode - 128
            if number in (signal.SIGINT, *signals.ENDING):
                raise signals.ending(number)
            raise RuntimeError(f"member {number} ended with code {process.returncode}:\n{err}")
        if process.returncode != 0:
            return None
        summary = Summary.from_dict(json.loads(out.splitlines()[-1]))
        _say(number, summary)
        return summary

    with ThreadPoolExecutor(config.ensemble.processes) as pool:
        jobs = [pool.submit(run, number) for number in range(1, config.ensemble.members + 1)]
        try:
            waiting = True
            while waiting:  # not for ever: a signal may reach another thread than this one, which acts on it
                done, left = wait(jobs, timeout=1.0, return_when=FIRST_EXCEPTION)
                waiting = bool(left) and all(job.exception() is None for job in done)
            return [summary for job in jobs if job.done() and (summary := job.result()) is not None]
        except BaseException as error:
            ended = True
            for process in list(running.values()):
                process.send_signal(signals.number_of(error))
            raise


# The end


def _finish(config: Config, data: Prepared, summaries: Sequence[Summary], started: float) -> EnsembleSummary:
    folder = RunFolder(config.run)
    files = [folder.member(number).model for number in range(1, config.ensemble.members + 1)]
    ensemble = model_file.load_many(files).to(devices.resolve(config.training.device))
    notes = {
        "ensemble": config.ensemble.model_dump(exclude={"processes"}),
        "members": [model_file.load_training(file) for file in files],
    }
    untrained = ("test",) if config.ensemble.vary == "folds" else ("validation", "test")
    of_levels = {name: _levels(config, data, ensemble, name) for name in untrained}
    _calibrate(config, ensemble, of_levels, folder)
    model_file.save(folder.model, ensemble, notes)
    found = _parts(data, ensemble, of_levels)
    of_parts = {name: evaluate.total([part]) for name, part in found.items()}
    result = EnsembleSummary(
        tuple(summaries),
        {name: group.energy for name, group in of_parts.items()},
        {name: group.forces for name, group in of_parts.items() if group.forces is not None},
        {name: group.spread for name, group in of_parts.items() if group.spread is not None},
        time.monotonic() - started,
        {name: group.stress for name, group in of_parts.items() if group.stress is not None},
    )
    _write_report(folder, ensemble, result, found)
    log.info("ensemble of %d models, %s:\n%s", len(files), folder.model, table(result))
    return result


def _parts(
    data: Prepared, ensemble: Ensemble, of_levels: Mapping[str, Sequence[evaluate.Part]]
) -> dict[str, evaluate.Part]:
    """Of the parts that no member was trained on, those at the highest level, with the ensemble's factors."""
    if data.structures.coordinates is None:
        log.info("the data have no coordinates, only stored descriptors: the ensemble's errors are not computed")
    return {
        name: calibrate.applied(parts[-1], ensemble)
        for name, parts in of_levels.items()
        if parts and parts[-1].fidelity in (None, data.fidelities[-1])
    }


def _levels(config: Config, data: Prepared, ensemble: Ensemble, name: str) -> list[evaluate.Part]:
    """Predictions of a part of the split at all levels; none where it is empty or has descriptors only."""
    if not len(getattr(data.split, name)) or data.structures.coordinates is None:
        return []
    structures = data.structures.select(getattr(data.split, name))
    predictions = evaluate.evaluate(ensemble, structures, stresses=config.training.loss.stresses)
    return evaluate.parts(structures, predictions, name, data.fidelities, ensemble.fidelities)


def _calibrate(
    config: Config, ensemble: Ensemble, of_levels: Mapping[str, Sequence[evaluate.Part]], folder: RunFolder
) -> None:
    """Factors of the deviations, from the validation part that all members have in common."""
    if config.ensemble.vary == "folds":
        log.info("deviations of the members are not calibrated: with folds each structure has trained some of them")
        return
    ensemble.calibration = calibrate.fit(ensemble, of_levels["validation"])
    if ensemble.calibration is None:
        log.info(
            "deviations of the members are not calibrated: fewer than %d validation energies and forces",
            calibrate.FEWEST,
        )
        return
    after = {name: [calibrate.applied(part, ensemble) for part in parts] for name, parts in of_levels.items()}
    calibrate.draw(folder.report, of_levels["validation"], after["validation"])
    shown = ", ".join(f"{factor:.2f}" for factor in ensemble.calibration.energies)
    log.info("deviations of the members are calibrated on the validation part: energies times %s", shown)
    name = "test" if of_levels["test"] else "validation"
    log.info("%s", calibrate.table(name, of_levels[name], after[name], ensemble.n_members))


def table(result: EnsembleSummary) -> str:
    """Errors of the members and of their means as a text table: RMSE in kcal/mol, kcal/mol/Å and GPa."""
    parts = [part for part in PARTS if any(part in member.errors for member in result.members)]
    kinds = {"energies": "errors", "forces": "forces", "stresses": "stresses"}
    columns = [
        (kind, part)
        for kind, name in kinds.items()
        for part in parts
        if any(part in getattr(member, name) for member in result.members)
    ]
    cells = [["member", "best epoch", *(f"{part} {kind}" for kind, part in columns)]]
    rows: list[tuple[str, str, Summary | EnsembleSummary]] = [
        (str(number), f"{member.best_epoch} of {member.epochs}", member)
        for number, member in enumerate(result.members, start=1)
    ]
    rows.append(("ensemble", "", result))
    for name, epoch, found in rows:
        numbers = [getattr(found, kinds[kind]).get(part) for kind, part in columns]
        cells.append([name, epoch, *("-" if error is None else f"{error.rmse:.3f}" for error in numbers)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
    units = {"energies": "kcal/mol", "forces": "kcal/mol/Å", "stresses": "GPa"}
    shown = [f"{kind} in {units[kind]}" for kind in dict.fromkeys(kind for kind, _ in columns)]
    lines = [f"RMSE ({', '.join(shown)})" if len(shown) > 1 else "RMSE (kcal/mol)", *lines]
    for part, spread in result.spread.items():
        lines.append(
            f"{part}: mean standard deviation of the members {spread.energy:.3f} kcal/mol, "
            f"rank correlation with the error {spread.correlation:.2f}"
        )
    return "\n".join(lines)


def _write_report(
    folder: RunFolder, ensemble: Ensemble, result: EnsembleSummary, found: Mapping[str, evaluate.Part]
) -> None:

    metrics = {f"member {i}": folder.member(i).metrics for i in range(1, len(result.members) + 1)}
    best = {f"member {i}": member.best_epoch for i, member in enumerate(result.members, start=1)}
    report.write_member_curves(folder.report, metrics, best)
    part = found.get("test") or found.get("validation")
    if part is not None:
        evaluate.draw(folder.report, ensemble, [replace(part, fidelity=None)], part.file)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["member", "best_epoch", "split", "quantity", "unit", "mae", "rmse", "max"])
    rows: list[tuple[str, object, Summary | EnsembleSummary]] = [
        (str(i), member.best_epoch, member) for i, member in enumerate(result.members, 1)
    ]
    for name, epoch, summary in [*rows, ("ensemble", "", result)]:
        for quantity, errors in zip(report.QUANTITIES, (summary.errors, summary.forces, summary.stresses), strict=True):
            for split, of_split in errors.items():
                numbers = map(repr, (of_split.mae, of_split.rmse, of_split.max))
                writer.writerow([name, epoch, split, quantity.name, quantity.unit, *numbers])
    with replacing(Path(folder.report) / "members.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _check_changes(before: Config, config: Config) -> None:
    old, new = flat(before.model_dump()), flat(config.model_dump())
    for key in sorted(old.keys() | new.keys()):
        allowed = any(key == name or key.startswith(f"{name}.") for name in _CHANGEABLE)
        if old.get(key) != new.get(key) and not allowed:
            raise ConfigError(
                f"{config.run}: was started with {key} = {old.get(key)} and cannot go on with {new.get(key)}: keep it, "
                "or start a new run"
            )
    was, now = before.ensemble.members, config.ensemble.members
    if was == 1:
        raise ConfigError(
            f"{config.run}: is a run of one model and cannot become an ensemble: start a new run with ensemble.members"
        )
    if now < was or (now > was and config.ensemble.vary == "folds"):
        raise ConfigError(
            f"{config.run}: was started with ensemble.members = {was} and cannot go on with {now}: members can be "
            "added where seeds vary, otherwise start a new run"
        )
