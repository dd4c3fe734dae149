"""Predictions for structures, and their errors against the reference."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kinml_fast import ops, report
from kinml_fast.data import sources
from kinml_fast.data.files import check_output, expand, replacing
from kinml_fast.data.selection import Selection
from kinml_fast.data.structures import Structures, atoms_of
from kinml_fast.deploy import members, model_file
from kinml_fast.errors import ConfigError, DataError
from kinml_fast.metrics import Errors
from kinml_fast.nn import EnergyModel, Ensemble
from kinml_fast.units import GIGAPASCAL, KCAL_PER_MOL

log = logging.getLogger(__name__)

BATCH_SIZE = 256


@dataclass(frozen=True)
class Predictions:
    """What a model says of structures; of an ensemble the means over its members.

    Parameters
    ----------
    energies
        float64 [n_structures], eV; of K > 1 levels of theory, lowest first, [K, n_structures].
    forces
        float64 [n_atoms, 3] or [K, n_atoms, 3], eV/Å, −dE/dx; None if they were not asked for.
    energy_std, forces_std
        Standard deviations of the members of an ensemble (ddof = 1), times its factors if it has a calibration, shaped
        as energies and forces; None of one model.
    stresses, stresses_std
        float64 [n_structures, 3, 3] or [K, n_structures, 3, 3], eV/Å³, in ASE's sign; NaN for molecules and for cells
        without volume; None if they were not asked for.
    """

    energies: np.ndarray
    forces: np.ndarray | None
    energy_std: np.ndarray | None = None
    forces_std: np.ndarray | None = None
    stresses: np.ndarray | None = None
    stresses_std: np.ndarray | None = None


@dataclass(frozen=True)
class Spread:
    """How far the members of an ensemble lie apart.

    Parameters
    ----------
    energy, forces
        Mean standard deviation of the members' energies (kcal/mol), and of their force components (kcal/mol/Å) if there
        are forces to compare with.
    correlation
        Spearman's rank correlation, over the structures, of the standard deviation of the energy with the error of the
        mean: 1 if a larger spread always means a larger error; NaN of fewer than three structures.
    stress
        Mean standard deviation of the components of the members' stresses (GPa), likewise.
    """

    energy: float
    forces: float | None
    correlation: float
    stress: float | None = None


@dataclass(frozen=True)
class Group:
    """Errors of the structures of one formula in one file at one level of theory ("all" for sums over several).

    `forces` and `stress` count only structures that have them, and are None if none has. `fidelity` is None of a model
    of one level, `spread` is None of a single model.
    """

    file: str
    formula: str
    n_structures: int
    energy: Errors
    forces: Errors | None
    fidelity: int | None = None
    spread: Spread | None = None
    stress: Errors | None = None


@dataclass(frozen=True)
class Part:
    """The structures of a file that are known at one level, and what the model says of them at this level."""

    structures: Structures
    predictions: Predictions
    file: str
    fidelity: int | None = None

    @property
    def reference(self) -> np.ndarray:
        """Energies of the structures, float64 [n_structures], eV."""
        assert self.structures.energies is not None
        return self.structures.energies

    @property
    def energy_residuals(self) -> np.ndarray:
        """Predicted minus reference energies, float64 [n_structures], eV."""
        return self.predictions.energies - self.reference

    @property
    def force_residuals(self) -> np.ndarray | None:
        """Predicted minus reference forces, [n_atoms, 3] in eV/Å, NaN for structures without forces."""
        if self.structures.forces is None or self.predictions.forces is None:
            return None
        return self.predictions.forces - self.structures.forces

    @property
    def stress_residuals(self) -> np.ndarray | None:
        """Predicted minus reference stresses, [n_structures, 3, 3] in eV/Å³, NaN for structures without a stress."""
        if self.structures.stresses is None or self.predictions.stresses is None:
            return None
        return self.predictions.stresses - self.structures.stresses


def evaluate(
    model: EnergyModel | Ensemble,
    structures: Structures,
    batch_size: int = BATCH_SIZE,
    forces: bool | None = None,
    stresses: bool | None = None,
) -> Predictions:
    """Energies, and forces and stresses if there are any to compare them with, at all levels of the model.

    Parameters
    ----------
    model
        Computes on its own device and in its own precision.
    structures
        Their elements may be counted in any order, and the model may know more.
    batch_size
        Structures at a time.
    forces
        Whether to compute forces; None: if the structures have them.
    stresses
        Whether to compute stresses, and then forces too; None: if the structures have them. Of molecules alone there
        are none in any case.

    Raises
    ------
    InputError
        An element that the model does not know, no coordinates, or an energy that is not a finite number.
    """
    structures = structures.with_elements(model.elements)
    if structures.coordinates is None:
        raise DataError(f"{structures.labels[0]} has no coordinates, only stored descriptors: take files with both")
    with_stresses = structures.stresses is not None if stresses is None else stresses
    with_stresses &= bool(structures.are_crystals.any())
    with_forces = with_stresses or (structures.forces is not None if forces is None else forces)
    device = model.sae.device
    species = torch.from_numpy(structures.species).to(device)
    coordinates = structures.coordinates_in(model.dtype).to(device)
    leading = members.count(model), model.levels
    energies: list[np.ndarray] = [np.empty((*leading, 0))]
    computed: list[np.ndarray] = [np.empty((*leading, 0, 3))]
    virials: list[np.ndarray] = [np.empty((*leading, 0, 3, 3))]
    cells, periodic = (
        None if x is None else torch.from_numpy(x).to(device) for x in (structures.cells, structures.periodic)
    )
    for first in range(0, len(structures), batch_size):
        offsets = structures.offsets[first : first + batch_size + 1]
        atoms = slice(int(offsets[0]), int(offsets[-1]))
        around = None
        if cells is not None and periodic is not None:
            some = slice(first, first + batch_size)
            around = ops.surroundings(cells[some], periodic[some])
        batch = (coordinates[atoms], species[atoms], torch.from_numpy(offsets - offsets[0]).to(device), around)
        if with_stresses:
            found = members.results(model, *batch)
            energy = found.energies
            computed.append(found.forces)
            virials.append(found.virials)
        elif with_forces:
            energy, force = members.energies_and_forces(model, *batch)
            computed.append(force)
        else:
            energy = members.energies(model, *batch)
        known = np.isfinite(energy).all(axis=(0, 1))
        if not known.all():
            raise DataError(f"{structures.labels[first + int(np.argmin(known))]} {members.NOT_FINITE}")
        energies.append(energy)
    all_energies, all_forces = np.concatenate(energies, axis=2), np.concatenate(computed, axis=2)
    volumes = np.where(structures.volumes > 0, structures.volumes, np.nan)
    all_stresses = np.concatenate(virials, axis=2)
    if with_stresses:
        all_stresses = all_stresses / volumes[:, None, None]
    energy_std = forces_std = stresses_std = None
    if members.count(model) > 1:
        energy_std = members.energies_deviation(model, all_energies)
        forces_std = members.forces_deviation(model, all_forces, structures.species) if with_forces else None
        stresses_std = members.deviation(all_stresses) if with_stresses else None
    if model.levels == 1:  # then there is no dimension of the levels
        all_energies, all_forces, all_stresses = all_energies[:, 0], all_forces[:, 0], all_stresses[:, 0]
        energy_std, forces_std, stresses_std = (
            None if x is None else x[0] for x in (energy_std, forces_std, stresses_std)
        )
    return Predictions(
        members.mean(all_energies),
        members.mean(all_forces) if with_forces else None,
        energy_std,
        forces_std,
        members.mean(all_stresses) if with_stresses else None,
        stresses_std,
    )


def parts(
    structures: Structures,
    predictions: Predictions,
    file: str = "",
    fidelities: Sequence[int] = (1,),
    predicted: Sequence[int] = (1,),
) -> list[Part]:
    """Structures and predictions level by level; structures that lack a level are left out there.

    Parameters
    ----------
    structures
        With as many levels as there are fidelities.
    predictions
        With as many levels as are predicted.
    file
        What the results call the place where the structures come from.
    fidelities
        The levels to compare, those of the structures.
    predicted
        The levels of the predictions; with one, it is compared with whatever one the structures have.
    """
    if len(predicted) == 1:
        return [Part(structures, predictions, file)]
    found = []
    for level, fidelity in enumerate(fidelities):
        known = np.flatnonzero(structures.known_energies[level])
        atoms, _ = atoms_of(structures.offsets, known)
        k = list(predicted).index(fidelity)
        of_level = Predictions(
            predictions.energies[k][known],
            None if predictions.forces is None else predictions.forces[k][atoms],
            None if predictions.energy_std is None else predictions.energy_std[k][known],
            None if predictions.forces_std is None else predictions.forces_std[k][atoms],
            None if predictions.stresses is None else predictions.stresses[k][known],
            None if predictions.stresses_std is None else predictions.stresses_std[k][known],
        )
        found.append(Part(structures.level(level), of_level, file, fidelity))
    return [part for part in found if len(part.structures)]


def groups(part: Part) -> list[Group]:
    """Errors by formula, in the order in which the formulas occur."""
    formulas = np.array(part.structures.formulas())
    return [_group(part, np.flatnonzero(formulas == formula), formula) for formula in dict.fromkeys(formulas.tolist())]


def run_evaluate(
    model_path: str | os.PathLike | Sequence[str | os.PathLike],
    files: str | os.PathLike | Sequence[str | os.PathLike],
    selection: Selection = Selection(),
    *,
    fidelity: int | Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    csv_path: str | os.PathLike | None = None,
    plots: str | os.PathLike | None = None,
    device: str | None = None,
) -> list[Group]:
    """Compare a model with data, log a table of its errors, and write each structure's and draw all on request.

    A model of differences to a baseline is compared with the differences of the data.

    Parameters
    ----------
    model_path
        What `model_file.resolve` takes: a model file, a run folder, a pattern, or several, which make an ensemble.
    files
        Databases and files that ASE reads: paths, patterns, `shipped:NAME`.
    selection
        What to take of them; but the fidelity is that of the next argument, and the baseline is the model's.
    fidelity
        Level to compare with, of a model of several levels one or more of these; None: the model's.
    batch_size
        Structures at a time.
    csv_path
        File to write with a row for each structure and level: energies in eV; errors and standard deviations in
        kcal/mol and kcal/mol/Å (forces: root mean square and largest over the structure's components), of stresses,
        if there are any, likewise in GPa.
    plots
        Folder for a parity plot of all structures, parity_evaluated.png (of several levels one for each,
        parity_evaluated_fidelity0.png), and errors.csv; made if it is not there.
    device
        Where to compute, see `model_file.resolve`.

    Returns
    -------
    list of Group
        By file, level and formula; with more than one of a level, the last are for all together.

    Raises
    ------
    InputError
        A file that cannot be read or written, an element or a level that the model does not know, a device that cannot
        be used.
    """
    model = model_file.resolve(model_path, device)
    fidelities = _fidelities(model, fidelity, model_path)
    if model.baseline is not None:
        log.info("energies and forces are differences of fidelity %d to fidelity %d", fidelities[0], model.baseline)
    if model.dispersion is not None:
        log.info("energies and forces are those without %s, as the model was trained", model.dispersion)
    selection = replace(selection, fidelity=fidelities, baseline=model.baseline)
    rows: list[Group] = []
    found: list[Part] = []
    paths = expand(files)
    if csv_path is not None:
        check_output(csv_path, [*paths, *model_file.files(model_path)], (".csv",))
    for path in paths:
        structures = sources.read(path, selection)
        try:
            predictions = evaluate(model, structures, batch_size)
        except DataError as error:
            raise DataError(f"{model_file.name(model_path)} cannot evaluate {path}: {error}") from error
        of_file = parts(structures, predictions, str(path), fidelities, model.fidelities)
        for part in of_file:
            rows += groups(part)
        found += of_file
    compared = list(dict.fromkeys(part.fidelity for part in found))
    if len(rows) > len(compared):
        rows += [total([part for part in found if part.fidelity == fidelity]) for fidelity in compared]
    log.info("%s", table(rows))
    if csv_path is not None:
        _write_csv(Path(csv_path), found)
        log.info("wrote the errors of every structure to %s", csv_path)
    if plots is not None:
        draw(Path(plots), model, found)
        log.info("wrote parity plots to %s", plots)
    return rows


def table(rows: Sequence[Group]) -> str:
    """The errors as a text table: energies in kcal/mol, forces in kcal/mol/Å, stresses in GPa."""
    with_forces = any(row.forces is not None for row in rows)
    with_stresses = any(row.stress is not None for row in rows)
    with_levels = any(row.fidelity is not None for row in rows)
    with_spread = any(row.spread is not None for row in rows)
    spread = ["std"] if with_spread else []
    cells = [["file", "formula", *(["fidelity"] if with_levels else []), "structures"]]
    shown = {"energy": True, "forces": with_forces, "stress": with_stresses}
    kinds = [kind for kind, is_shown in shown.items() if is_shown]
    for kind in kinds:
        cells[0] += [f"{kind} MAE", "RMSE", "max", *spread]
    for row in rows:
        line = [row.file, row.formula, *([f"{row.fidelity}"] if with_levels else []), f"{row.n_structures:,}"]
        for kind in kinds:
            error: Errors | None = getattr(row, kind)
            deviation = None if row.spread is None else getattr(row.spread, kind)
            numbers = (None,) * 3 if error is None else (error.mae, error.rmse, error.max)
            line += ["-" if x is None else f"{x:.3f}" for x in (*numbers, *([deviation] if with_spread else []))]
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.ljust] * 2 + [str.rjust] * (len(widths) - 2)
    lines = ["  ".join(side(text, w) for side, text, w in zip(sides, line, widths, strict=True)) for line in cells]
    units = "energies in kcal/mol" + (", forces in kcal/mol/Å" if with_forces else "")
    units += ", stresses in GPa" if with_stresses else ""
    lines = [f"errors ({units})", *lines]
    if with_spread:
        lines.append("std: mean standard deviation of the members; " + _correlations(rows))
    return "\n".join(lines)


def _correlations(rows: Sequence[Group]) -> str:
    last = {row.fidelity: row.spread.correlation for row in rows if row.spread is not None}  # the row of all structures
    values = [f"{value:.2f}" + ("" if level is None else f" at fidelity {level}") for level, value in last.items()]
    return f"its rank correlation with the energy error is {', '.join(values)}"


def _fidelities(
    model: EnergyModel | Ensemble, wanted: int | Sequence[int] | None, path: str | os.PathLike | Sequence
) -> tuple[int, ...]:
    """The levels to compare."""
    if wanted is None:
        return model.fidelities
    fidelities = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    if model.levels == 1 and len(fidelities) == 1:
        return fidelities  # whatever it is called: another level's data are a comparison too
    unknown = [fidelity for fidelity in fidelities if fidelity not in model.fidelities]
    if unknown or not fidelities or len(fidelities) > model.levels:
        raise ConfigError(
            f"{model_file.name(path)}: has the fidelity {' and '.join(map(str, model.fidelities))}, but "
            f"{' and '.join(map(str, fidelities)) or 'none'} is asked for: name levels that the model has"
        )
    return fidelities


def _group(part: Part, chosen: np.ndarray, formula: str) -> Group:
    atoms, _ = atoms_of(part.structures.offsets, chosen)
    residuals = part.energy_residuals[chosen]
    forces = np.empty((0, 3)) if part.force_residuals is None else part.force_residuals[atoms]
    known = ~np.isnan(forces)
    stresses = np.empty((0, 3, 3)) if part.stress_residuals is None else part.stress_residuals[chosen]
    known_stresses = ~np.isnan(stresses)
    spread = None
    if part.predictions.energy_std is not None:
        forces_std, stresses_std = part.predictions.forces_std, part.predictions.stresses_std
        of_forces = None if forces_std is None or not known.any() else forces_std[atoms][known]
        of_stresses = None if stresses_std is None or not known_stresses.any() else stresses_std[chosen][known_stresses]
        spread = _spread(residuals, part.predictions.energy_std[chosen], of_forces, of_stresses)
    errors = Errors.of(forces[known]) if known.any() else None
    stress = Errors.of(stresses[known_stresses], GIGAPASCAL) if known_stresses.any() else None
    return Group(part.file, formula, len(chosen), Errors.of(residuals), errors, part.fidelity, spread, stress)


def total(found: Sequence[Part]) -> Group:
    """The errors of all structures of parts that are of one level."""
    residuals = np.concatenate([part.energy_residuals for part in found])
    of_forces, deviations, forces_std = np.empty(0), [], np.empty(0)
    of_stresses, stresses_std = np.empty(0), np.empty(0)
    for part in found:
        predictions = part.predictions
        if predictions.energy_std is not None:
            deviations.append(predictions.energy_std)
        if part.force_residuals is not None:
            known = ~np.isnan(part.force_residuals)
            of_forces = np.append(of_forces, part.force_residuals[known])
            if predictions.forces_std is not None:
                forces_std = np.append(forces_std, predictions.forces_std[known])
        if part.stress_residuals is not None:
            known = ~np.isnan(part.stress_residuals)
            of_stresses = np.append(of_stresses, part.stress_residuals[known])
            if predictions.stresses_std is not None:
                stresses_std = np.append(stresses_std, predictions.stresses_std[known])
    spread = _spread(residuals, np.concatenate(deviations), forces_std, stresses_std) if deviations else None
    errors = Errors.of(of_forces) if of_forces.size else None
    stress = Errors.of(of_stresses, GIGAPASCAL) if of_stresses.size else None
    return Group("all", "all", len(residuals), Errors.of(residuals), errors, found[0].fidelity, spread, stress)


def _spread(
    residuals: np.ndarray, energy_std: np.ndarray, forces_std: np.ndarray | None, stresses_std: np.ndarray | None
) -> Spread:
    ranks = [np.argsort(np.argsort(x, kind="stable"), kind="stable") for x in (energy_std, np.abs(residuals))]
    correlation = float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if len(residuals) > 2 else float("nan")
    forces = None if forces_std is None or not forces_std.size else float(forces_std.mean()) * KCAL_PER_MOL
    stress = None if stresses_std is None or not stresses_std.size else float(stresses_std.mean()) * GIGAPASCAL
    return Spread(float(energy_std.mean()) * KCAL_PER_MOL, forces, correlation, stress)


def draw(folder: Path, model: EnergyModel | Ensemble, found: Sequence[Part], split: str = "evaluated") -> None:
    """Write a parity plot for each level, parity_SPLIT.png or parity_SPLIT_fidelity0.png, and errors.csv."""
    energies: dict[str, tuple] = {}
    forces: dict[str, tuple] = {}
    stresses: dict[str, tuple] = {}
    for fidelity in dict.fromkeys(part.fidelity for part in found):
        of_fidelity = [part for part in found if part.fidelity == fidelity]
        level = -1 if fidelity is None else model.fidelities.index(fidelity)
        name = split if fidelity is None else f"{split}_fidelity{fidelity}"
        sae = dict(zip(model.elements, members.sae(model)[level].tolist(), strict=True))
        labels: list[str] = []
        shifted = [np.empty((2, 0))]
        for part in of_fidelity:
            labels += part.structures.labels
            both = np.stack([part.reference, part.predictions.energies])
            shifted.append(both - part.structures.counts() @ [sae[element] for element in part.structures.elements])
        energies[name] = (labels, *np.concatenate(shifted, axis=1))
        of_forces: list[str] = []
        both_forces = [np.empty((2, 0))]
        for part in of_fidelity:
            structures, predicted = part.structures, part.predictions.forces
            if structures.forces is None or predicted is None:
                continue
            known = ~np.isnan(structures.forces[:, 0])
            both_forces.append(np.stack([structures.forces[known].ravel(), predicted[known].ravel()]))
            of_forces += [structures.labels[i] for i in np.repeat(structures.owners[known], 3)]
        forces[name] = (of_forces, *np.concatenate(both_forces, axis=1))
        of_stresses: list[str] = []
        both_stresses = [np.empty((2, 0))]
        for part in of_fidelity:
            structures, predicted = part.structures, part.predictions.stresses
            if structures.stresses is None or predicted is None:
                continue
            known = structures.known_stresses[0]
            both_stresses.append(np.stack([structures.stresses[known].ravel(), predicted[known].ravel()]))
            of_stresses += [structures.labels[i] for i in np.repeat(np.flatnonzero(known), 9)]
        stresses[name] = (of_stresses, *np.concatenate(both_stresses, axis=1))
    report.write_parity(folder, energies, forces, stresses=stresses)


def _write_csv(path: Path, found: Sequence[Part]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    with_levels = any(part.fidelity is not None for part in found)
    with_spread = any(part.predictions.energy_std is not None for part in found)
    with_stresses = any(part.stress_residuals is not None for part in found)
    writer.writerow(
        ["structure", "formula", *(["fidelity"] if with_levels else [])]
        + ["energy_reference", "energy_predicted", "energy_error", "forces_rmse", "forces_max"]
        + (["energy_std", "forces_std"] if with_spread else [])
        + (["stress_rmse", "stress_max"] if with_stresses else [])
        + (["stress_std"] if with_stresses and with_spread else [])
    )
    for part in found:
        structures, predictions, residuals = part.structures, part.predictions, part.force_residuals
        for i, (label, formula) in enumerate(zip(structures.labels, structures.formulas(), strict=True)):
            reference, predicted = float(part.reference[i]), float(predictions.energies[i])
            atoms = slice(structures.offsets[i], structures.offsets[i + 1])
            row: list[object] = [label, formula, *([part.fidelity] if with_levels else [])]
            row += [repr(reference), repr(predicted), repr((predicted - reference) * KCAL_PER_MOL)]
            if residuals is None or np.isnan(residuals[atoms]).any():
                row += ["", ""]
            else:
                errors = Errors.of(residuals[atoms])
                row += [repr(errors.rmse), repr(errors.max)]
            if predictions.energy_std is not None:
                forces_std = predictions.forces_std
                row.append(repr(float(predictions.energy_std[i]) * KCAL_PER_MOL))
                row.append("" if forces_std is None else repr(Errors.of(forces_std[atoms]).rmse))
            if with_stresses:
                of_stress = np.full(1, np.nan) if part.stress_residuals is None else part.stress_residuals[i]
                of_stress_errors = Errors.of(of_stress, GIGAPASCAL)
                numbers = [of_stress_errors.rmse, of_stress_errors.max]
                if with_spread:
                    deviations = predictions.stresses_std
                    numbers.append(math.nan if deviations is None else Errors.of(deviations[i], GIGAPASCAL).rmse)
                row += ["" if math.isnan(number) else repr(number) for number in numbers]
            writer.writerow(row)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
