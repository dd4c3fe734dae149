"""The rounds of an exploration: first models, then sample, choose, label and train, until little is uncertain.

Each step leaves its result on disk as a whole, and depends on nothing but results before it, the configuration and its
seeds. What is there is not done again: an exploration that was killed goes on where it was, and ends with the same
data.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kinml_fast import lock
from kinml_fast.data import Selection, sources, xyz
from kinml_fast.data.files import expand, replacing
from kinml_fast.data.structures import concatenate
from kinml_fast.deploy import calibrate, evaluate, model_file
from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.errors import ConfigError, DataError, InputError
from kinml_fast.explore import config as configuration
from kinml_fast.explore import data, labels, report, selection
from kinml_fast.explore.config import CHANGEABLE, ExploreConfig
from kinml_fast.explore.data import Labelled
from kinml_fast.explore.folder import ExploreFolder, RoundFolder, read_json, write_json
from kinml_fast.explore.geometry import Geometry
from kinml_fast.explore.labels import Label
from kinml_fast.explore.sampling import GUESS, Counts, Sampler, displaced, items
from kinml_fast.nn import Ensemble
from kinml_fast.train import config as training
from kinml_fast.train import runs
from kinml_fast.train.ensembles import EnsembleSummary
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.progress import Progress

log = logging.getLogger(__name__)

_UNITS = {"energy": "kcal/mol", "forces": "kcal/mol/Å"}


def explore(config: ExploreConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Explore, or go on with what was begun in the folder.

    Parameters
    ----------
    config
        The exploration.
    progress
        What shows what is going on; by default log lines.

    Returns
    -------
    list of dict
        The results of the rounds, as in round.json.

    Raises
    ------
    InputError
        What is wrong with the configuration, the geometries, the calculator or the folder.
    """
    folder, progress = ExploreFolder(config.run), progress or Progress()
    logged = RunFolder(folder.path)
    logged.log = folder.log
    starts = [] if folder.start.exists() else _read(config)
    _check(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_leftovers(folder))
        stack.enter_context(lock.hold(folder.path))
        stack.enter_context(logged.logged())
        stack.callback(progress.end)
        starts = _begin(config, folder, starts)
        known: list[Labelled] = []
        results: list[dict[str, Any]] = []
        for number in range(config.rounds.most + 1):
            _announce(config, number, results, progress)
            result = _round(config, folder, number, starts, known, progress)
            enough = number > 0 and result["found"] < config.rounds.fewest
            results.append(result | {"end": enough})
            report.write(folder, config, results)
            if enough:
                break
        with replacing(folder.model) as temporary:
            shutil.copyfile(_last_model(folder, len(results)) / "model.pt", temporary)
    log.info("%s", _ending(config, folder, results))
    return results


def _announce(config: ExploreConfig, number: int, results: Sequence[dict[str, Any]], progress: Progress) -> None:
    """Have a live line say which round it is, how many labels there are, and the errors of the models so far."""
    progress.heading = f"round {number}/{config.rounds.most}"
    if results:
        progress.heading += f", {sum(results[-1]['labels'])} labels"
    for part in ("validation", "test"):
        errors: dict[str, float] = next((one[part] for one in reversed(results) if one[part]), {})
        if errors:
            numbers = (f"{errors[kind]:.2f} {unit}" for kind, unit in _UNITS.items() if kind in errors)
            progress.errors = f"{part} RMSE {', '.join(numbers)}"


def _last_model(folder: ExploreFolder, number: int) -> Path:
    """The run of the ensemble of the last round before this one that has labelled anything."""
    return next(run for i in reversed(range(number)) if (run := folder.round(i).model).exists())


def _check(config: ExploreConfig) -> None:
    """See now what would be missed only after hours."""
    if config.sampling.saddles and importlib.util.find_spec("sella") is None:
        raise ConfigError("sampling.saddles needs Sella, which is not installed: pip install sella")
    for path in expand(config.test) if config.test else ():
        sources.read(path, Selection())


@contextlib.contextmanager
def _without_leftovers(folder: ExploreFolder) -> Iterator[None]:
    """Leave no folder where a wrong configuration ended an exploration before anything was labelled."""
    new = not folder.path.exists()
    try:
        yield
    except ConfigError:
        if new and not folder.has_labels():
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _begin(config: ExploreConfig, folder: ExploreFolder, starts: Sequence[Geometry]) -> list[Geometry]:
    """The geometries of the user, once it is clear that the folder is of this exploration."""
    for path in folder.path.rglob(".*.part"):
        if "model" not in path.relative_to(folder.path).parts:  # training clears up for itself
            path.unlink(missing_ok=True)
    if folder.config.exists():
        before = configuration.with_values(training.read_yaml(folder.config, ()), str(folder.config))
        changed = _changed(before, config)
        if changed and not folder.has_labels():  # it begins anew
            for path in folder.path.glob("round-*"):
                shutil.rmtree(path)
            folder.start.unlink(missing_ok=True)
            starts = starts or _read(config)
        elif changed:
            raise InputError(
                f"{folder}: holds an exploration with another {', '.join(changed)}: give the same, or choose another "
                "folder with run=NAME"
            )
    elif folder.model.exists() or any(folder.path.glob("round-*")):
        raise InputError(f"{folder}: holds files that are of no exploration: choose another folder with run=NAME")
    if not folder.start.exists():
        write_json(folder.start, [one.to_dict() for one in starts])
    training.save_yaml(folder.config, config.model_dump())
    return [Geometry(**values) for values in read_json(folder.start)]


def _changed(before: ExploreConfig, now: ExploreConfig) -> list[str]:
    a, b = (training.flat(one.model_dump()) for one in (before, now))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key) and key not in CHANGEABLE)


def _read(config: ExploreConfig) -> list[Geometry]:
    found: list[Geometry] = []
    form = config.geometries.format
    Selection(format=form)  # says if there is no such format
    files = [(path, "start") for path in expand(config.geometries.files)]
    if config.geometries.saddles:
        files += [(path, GUESS) for path in expand(config.geometries.saddles)]
    for path, source in files:
        for number, atoms in enumerate(xyz.frames(path, form), start=1):
            where = f"{path}: frame {number}"
            if atoms.pbc.any():
                raise DataError(f"{where}: is periodic: explorations are of molecules, set pbc = False")
            if len(atoms) < 2:
                raise DataError(f"{where}: has {len(atoms)} atoms: give molecules of at least 2")
            found.append(
                Geometry(tuple(atoms.get_chemical_symbols()), atoms.positions, source, len(found), item=len(found))
            )
    if not found:
        raise DataError(f"{', '.join(config.geometries.files)}: contains no geometries: give at least one")
    return found


def _round(
    config: ExploreConfig,
    folder: ExploreFolder,
    number: int,
    starts: Sequence[Geometry],
    known: list[Labelled],
    progress: Progress,
) -> dict[str, Any]:
    """Do a round, or what is left of it; what it has labelled is added to what is known."""
    here = folder.round(number)
    here.path.mkdir(parents=True, exist_ok=True)
    if not here.chosen.exists():
        write_json(here.chosen, _choose(config, folder, number, starts, known, progress))
    chosen = read_json(here.chosen)
    geometries = [Geometry(**values) for values in chosen["geometries"]]
    new = _label(config, here, number, geometries, progress)
    if number == 0:
        _check_starts(starts, new)
    known += new
    if here.result.exists():
        return read_json(here.result)
    before = _last_model(folder, number) if number else None
    errors: dict[str, float] = {}
    if any(one.known for one in new):
        number_to_train_on = data.write(folder, here, known, config.labels)
        settings = config.of_training(here.model, folder.databases(), here.split, number_to_train_on, before)
        summary = runs.start(settings, restarted=True, progress=progress)
        assert isinstance(summary, EnsembleSummary)
        errors = _of_summary(summary)
    failures = [label for one in new for label in one.labels if label is not None and label.energy is None]
    result = {
        "round": number,
        "found": len(geometries),
        "structures": sum(one.known for one in known),
        "labels": [sum(one.labels[level] is not None for one in known) for level in range(len(config.labels.levels))],
        "failed": len(failures),
        "added": dict(Counter(one.geometry.source for one in new if one.known)),
        "counts": chosen["counts"],
        "duplicates": chosen["duplicates"],
        "left": chosen["left"],
        "surprises": _surprises(before, new, config),
        "validation": errors,
        "test": _test(config, here) if errors else {},
    }
    write_json(here.result, result)
    _say(result)
    return read_json(here.result)


def _label(
    config: ExploreConfig, here: RoundFolder, number: int, geometries: Sequence[Geometry], progress: Progress
) -> list[Labelled]:
    """The labels of a round: of all geometries at the lowest level, of some of them at the upper one."""
    levels = config.labels.levels
    if geometries:
        log.info("round %d: %d structures to label", number, len(geometries))
    found: list[list[Label | None]] = []
    wanted = list(range(len(geometries)))
    for level, (name, options) in enumerate(levels):
        if level:
            below = found[-1]
            wanted = [i for i in wanted if (label := below[i]) is not None and label.energy is not None]
            wanted = [i for i in wanted if _asks(config, number, i, geometries[i], level)]
            log.info("round %d: %d of them at the upper level", number, len(wanted))
        of_level: list[Label | None] = [None] * len(geometries)
        some = [geometries[i] for i in wanted]
        of_some = labels.label(some, name, options, config.labels, here.labels(level), progress)
        for i, label in zip(wanted, of_some, strict=True):
            of_level[i] = label
        found.append(of_level)
    return [Labelled(one, tuple(of_one), number) for one, *of_one in zip(geometries, *found, strict=True)]


def _asks(config: ExploreConfig, number: int, place: int, geometry: Geometry, level: int) -> bool:
    """Whether a geometry is to have a label at a level above the lowest."""
    if number == 0:  # of all that came before, one more than its share would have been
        share = config.labels.upper.first
        return int((place + 1) * share) > int(place * share) or place == 0
    return geometry.deviations[level] >= config.selection.lower


def _choose(
    config: ExploreConfig,
    folder: ExploreFolder,
    number: int,
    starts: Sequence[Geometry],
    known: Sequence[Labelled],
    progress: Progress,
) -> dict[str, Any]:
    """What to label in a round: geometries and counts as plain values."""
    if number == 0:
        geometries = displaced(starts, config.geometries, config.seed)
        return {"geometries": [one.to_dict() for one in geometries], "counts": {}, "duplicates": 0, "left": 0}
    ensemble = model_file.load(_last_model(folder, number) / "model.pt")
    assert isinstance(ensemble, Ensemble)
    if ensemble.levels > 1:  # deviations are of what each level adds, and so must be their factors
        ensemble.calibration = calibrate.fit_steps(ensemble, data.validation(folder, config.labels))
    found, counts = _sample(config, folder.round(number), number, starts, KinMLCalculator(ensemble), progress)
    candidates = [one for one in found if max(one.deviations) <= config.selection.upper]
    if len(candidates) < config.rounds.fewest:  # to be lost is not to be certain
        lost = sorted((one for one in found if one not in candidates), key=lambda one: max(one.deviations))
        candidates += lost[: config.selection.most]
    total = Counts()
    for one in counts.values():
        total += one
    rows = selection.fingerprints(candidates, ensemble)
    others = selection.fingerprints([one.geometry for one in known], ensemble)
    taken, left = selection.farthest(rows, others, config.selection.most, config.selection.distinct)
    return {
        "geometries": [candidates[i].to_dict() for i in taken],
        "counts": {source: asdict(one) for source, one in counts.items()},
        "duplicates": len(candidates) - len(taken) - left,
        "left": left,
    }


def _sample(
    config: ExploreConfig,
    here: RoundFolder,
    number: int,
    starts: Sequence[Geometry],
    calculator: KinMLCalculator,
    progress: Progress,
) -> tuple[list[Geometry], dict[str, Counts]]:
    """The geometries of all items of a round in the window or above it, and counts by source."""
    sampler = Sampler(calculator, config.sampling, config.selection)
    todo = items(starts, config.sampling)
    found: list[Geometry] = []
    counts: dict[str, Counts] = {}
    for item in todo:
        what = f"driving, {item.source}" + (f" at {item.temperature:g} K" if item.temperature else "")
        progress.count(what, item.number, len(todo))
        file = here.samples(item.number)
        if not file.exists():
            seen = partial(progress.count, what, total=len(todo))
            geometries, of_item = sampler.run(item, [config.seed, number], seen)
            write_json(file, {"geometries": [one.to_dict() for one in geometries], "counts": asdict(of_item)})
            log.info(
                "round %d: %s at %g K (%d of %d): %d of %d geometries are uncertain",
                number,
                item.source,
                item.temperature,
                item.number + 1,
                len(todo),
                of_item.uncertain,
                of_item.seen,
            )
        values = read_json(file)
        found += [Geometry(**one) for one in values["geometries"]]
        counts[item.source] = counts.get(item.source, Counts()) + Counts(**values["counts"])
    return found, counts


def _check_starts(starts: Sequence[Geometry], first: Sequence[Labelled]) -> None:
    for start, one in zip(starts, first, strict=False):
        for label in one.labels:
            if label is not None and label.energy is None:
                raise DataError(
                    f"geometry {start.molecule + 1} ({start.atoms.symbols}) cannot be labelled ({label.failures[-1]}): "
                    "correct it, or the calculator and its options, and choose another folder with run=NAME"
                )


def _surprises(model: Path | None, new: Sequence[Labelled], config: ExploreConfig) -> list[list[float]]:
    """Deviation and error, in its unit, of each structure that was labelled, by the ensemble that did not know it."""
    known = [one for one in new if one.labels[-1] is not None and one.labels[-1].energy is not None]
    if model is None or not known:
        return []
    calculator = KinMLCalculator(model_file.load(model / "model.pt"))
    found = []
    for one in known:
        atoms, label = one.geometry.atoms, one.labels[-1]
        assert label is not None
        assert label.energy is not None
        if config.selection.deviation == "energy":
            error = abs(calculator.get_property("energy", atoms) - label.energy) / np.sqrt(len(atoms))
        else:
            error = np.linalg.norm(calculator.get_property("forces", atoms) - label.forces, axis=1).max()
        found.append([max(one.geometry.deviations), float(error)])
    return found


def _of_summary(summary: EnsembleSummary) -> dict[str, float]:
    found = {"energy": summary.errors["validation"].rmse}
    if "validation" in summary.forces:
        found["forces"] = summary.forces["validation"].rmse
    if "validation" in summary.spread:
        found["deviation"] = summary.spread["validation"].energy
    return found


def _test(config: ExploreConfig, here: RoundFolder) -> dict[str, float]:
    """RMSE on the data to test on, kcal/mol and kcal/mol/Å."""
    if not config.test:
        return {}
    ensemble = model_file.load(here.model / "model.pt")
    structures = concatenate([sources.read(path, Selection()) for path in expand(config.test)])
    highest, predicted = ensemble.fidelities[-1:], evaluate.evaluate(ensemble, structures)
    total = evaluate.total(evaluate.parts(structures, predicted, "test", highest, ensemble.fidelities))
    found = {"energy": total.energy.rmse}
    if total.forces is not None:
        found["forces"] = total.forces.rmse
    if total.spread is not None:
        found["deviation"] = total.spread.energy
    return found


def _say(result: dict[str, Any]) -> None:
    parts = [f"round {result['round']}: {result['structures']} structures"]
    parts.append("added " + (", ".join(f"{n} of {source}" for source, n in result["added"].items()) or "none"))
    for part in ("validation", "test"):
        errors = result[part]
        if errors:
            parts.append(
                f"{part} RMSE {errors['energy']:.3f} kcal/mol"
                + (f", {errors['forces']:.3f} kcal/mol/Å" if "forces" in errors else "")
            )
    log.info("%s", "; ".join(parts))


def _ending(config: ExploreConfig, folder: ExploreFolder, results: Sequence[dict[str, Any]]) -> str:
    last = results[-1]
    why = (
        f"fewer than {config.rounds.fewest} structures are uncertain"
        if last["end"]
        else f"all {config.rounds.most} rounds are used up"
    )
    return (
        f"{folder}: {why}; {last['structures']} structures in {folder.data}, the ensemble is {folder.model} "
        f"(rounds: {len(results) - 1})"
    )
