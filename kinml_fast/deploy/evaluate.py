"""Predictions for structures, and their errors against the reference."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kinml_fast.data import sources
from kinml_fast.data.files import expand, replacing
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import model_file
from kinml_fast.errors import InputError
from kinml_fast.metrics import Errors
from kinml_fast.nn import EnergyModel
from kinml_fast.units import KCAL_PER_MOL

log = logging.getLogger(__name__)

BATCH_SIZE = 256


@dataclass(frozen=True)
class Predictions:
    """What a model says of structures.

    Parameters
    ----------
    energies
        float64 [n_structures], eV.
    forces
        float64 [n_atoms, 3], eV/Å, −dE/dx; None if they were not asked for.
    """

    energies: np.ndarray
    forces: np.ndarray | None


@dataclass(frozen=True)
class Group:
    """Errors of the structures of one formula in one file ("all" for sums over several).

    `forces` counts only structures that have forces, and is None if none has.
    """

    file: str
    formula: str
    n_structures: int
    energy: Errors
    forces: Errors | None


def evaluate(
    model: EnergyModel, structures: Structures, batch_size: int = BATCH_SIZE, forces: bool | None = None
) -> Predictions:
    """Energies, and forces if there are any to compare them with.

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

    Raises
    ------
    InputError
        An element that the model does not know, or no coordinates.
    """
    structures = structures.with_elements(model.elements)
    if structures.coordinates is None:
        raise InputError(f"{structures.labels[0]} has no coordinates, only stored descriptors: take files with both")
    with_forces = structures.forces is not None if forces is None else forces
    device = model.networks.weights.device
    if structures.coordinates is None:
        raise InputError(
            f"the data have no coordinates, only stored descriptors (first structure: {structures.labels[0]}), and a "
            "model needs them: take files that have both"
        )
    species = torch.from_numpy(structures.species).to(device)
    coordinates = torch.from_numpy(structures.coordinates).to(device, model.dtype)
    energies: list[np.ndarray] = [np.empty(0)]
    computed: list[np.ndarray] = [np.empty((0, 3))]
    with torch.inference_mode():
        for first in range(0, len(structures), batch_size):
            offsets = structures.offsets[first : first + batch_size + 1]
            atoms = slice(int(offsets[0]), int(offsets[-1]))
            batch = (coordinates[atoms], species[atoms], torch.from_numpy(offsets - offsets[0]).to(device))
            if with_forces:
                energy, force = model.energies_and_forces(*batch)
                computed.append(force.double().cpu().numpy())
            else:
                energy = model(*batch)
            energies.append(energy.cpu().numpy())
    return Predictions(np.concatenate(energies), np.concatenate(computed) if with_forces else None)


def groups(structures: Structures, predictions: Predictions, file: str) -> list[Group]:
    """Errors by formula, in the order in which the formulas occur."""
    formulas = np.array(structures.formulas())
    return [
        _group(structures, predictions, np.flatnonzero(formulas == formula), file, formula)
        for formula in dict.fromkeys(formulas.tolist())
    ]


def run_evaluate(
    model_path: str | os.PathLike,
    files: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    fidelity: int = 1,
    temperature: float | None = None,
    names: Sequence[str] | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    batch_size: int = BATCH_SIZE,
    csv_path: str | os.PathLike | None = None,
    plots: str | os.PathLike | None = None,
) -> list[Group]:
    """Compare a model with data, log a table of its errors, and write each structure's and draw all on request.

    Parameters
    ----------
    model_path
        A model file.
    files
        Databases and files that ASE reads: paths, patterns, `shipped:NAME`.
    fidelity, temperature, names, energy_key, forces_key
        Selections, see `kinml_fast.data.read`.
    batch_size
        Structures at a time.
    csv_path
        File to write with a row for each structure: energies in eV; errors in kcal/mol and kcal/mol/Å (forces: root
        mean square and largest over the structure's components).
    plots
        Folder for a parity plot of all structures, parity_evaluated.png, and errors.csv; made if it is not there.

    Returns
    -------
    list of Group
        By file and formula; with more than one, the last is for all together.

    Raises
    ------
    InputError
        A file that cannot be read or written, or an element that the model does not know.
    """
    model = model_file.load(model_path)
    rows: list[Group] = []
    parts: list[tuple[Structures, Predictions]] = []
    for path in expand(files):
        structures = sources.read(
            [path],
            fidelity=fidelity,
            temperature=temperature,
            names=names,
            energy_key=energy_key,
            forces_key=forces_key,
        )
        try:
            predictions = evaluate(model, structures, batch_size)
        except InputError as error:
            raise InputError(f"{model_path} cannot evaluate {path}: {error}") from error
        rows += groups(structures, predictions, str(path))
        parts.append((structures, predictions))
    if len(rows) > 1:
        rows.append(_total(parts))
    log.info("%s", table(rows))
    if csv_path is not None:
        _write_csv(Path(csv_path), parts)
        log.info("wrote the errors of every structure to %s", csv_path)
    if plots is not None:
        _draw(Path(plots), model, parts)
        log.info("wrote parity plots to %s", plots)
    return rows


def table(rows: Sequence[Group]) -> str:
    """The errors as a text table: energies in kcal/mol, forces in kcal/mol/Å."""
    with_forces = any(row.forces is not None for row in rows)
    cells = [["file", "formula", "structures", "energy MAE", "RMSE", "max"]]
    if with_forces:
        cells[0] += ["forces MAE", "RMSE", "max"]
    for row in rows:
        errors = [row.energy, row.forces] if with_forces else [row.energy]
        numbers = [("-",) * 3 if e is None else (f"{e.mae:.3f}", f"{e.rmse:.3f}", f"{e.max:.3f}") for e in errors]
        cells.append([row.file, row.formula, f"{row.n_structures:,}", *(text for three in numbers for text in three)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.ljust] * 2 + [str.rjust] * (len(widths) - 2)
    lines = ["  ".join(side(text, w) for side, text, w in zip(sides, line, widths, strict=True)) for line in cells]
    units = "energies in kcal/mol" + (", forces in kcal/mol/Å" if with_forces else "")
    return "\n".join([f"errors ({units})", *lines])


def _group(structures: Structures, predictions: Predictions, members: np.ndarray, file: str, formula: str) -> Group:
    residuals = _force_residuals(structures, predictions)
    forces = None
    if residuals is not None:
        chosen = residuals[np.isin(structures.owners, members)]
        chosen = chosen[~np.isnan(chosen)]
        forces = Errors.of(chosen) if chosen.size else None
    energy = Errors.of(predictions.energies[members] - structures.energies[members])
    return Group(file, formula, len(members), energy, forces)


def _force_residuals(structures: Structures, predictions: Predictions) -> np.ndarray | None:
    """[n_atoms, 3] in eV/Å, NaN for structures without forces."""
    if structures.forces is None or predictions.forces is None:
        return None
    return predictions.forces - structures.forces


def _total(parts: Sequence[tuple[Structures, Predictions]]) -> Group:
    energy = np.concatenate([predictions.energies - structures.energies for structures, predictions in parts])
    residuals = [r.ravel() for r in (_force_residuals(*part) for part in parts) if r is not None]
    forces = np.concatenate([np.empty(0), *residuals])
    forces = forces[~np.isnan(forces)]
    return Group("all", "all", len(energy), Errors.of(energy), Errors.of(forces) if forces.size else None)


def _draw(folder: Path, model: EnergyModel, parts: Sequence[tuple[Structures, Predictions]]) -> None:
    from kinml_fast.train import report  # matplotlib takes a second to import

    labels: list[str] = []
    of_forces: list[str] = []
    energies = [np.empty((2, 0))]
    forces = [np.empty((2, 0))]
    sae = dict(zip(model.elements, model.sae.tolist(), strict=True))
    for structures, predictions in parts:
        labels += structures.labels
        both = np.stack([structures.energies, predictions.energies])
        energies.append(both - structures.counts() @ [sae[element] for element in structures.elements])
        if structures.forces is not None and predictions.forces is not None:
            known = ~np.isnan(structures.forces[:, 0])
            forces.append(np.stack([structures.forces[known].ravel(), predictions.forces[known].ravel()]))
            of_forces += [structures.labels[i] for i in np.repeat(structures.owners[known], 3)]
    split = "evaluated"
    report.write_parity(
        folder,
        {split: (labels, *np.concatenate(energies, axis=1))},
        {split: (of_forces, *np.concatenate(forces, axis=1))},
    )


def _write_csv(path: Path, parts: Sequence[tuple[Structures, Predictions]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["structure", "formula", "energy_reference", "energy_predicted", "energy_error", "forces_rmse", "forces_max"]
    )
    for structures, predictions in parts:
        residuals = _force_residuals(structures, predictions)
        for i, (label, formula) in enumerate(zip(structures.labels, structures.formulas(), strict=True)):
            reference, predicted = float(structures.energies[i]), float(predictions.energies[i])
            row = [label, formula, repr(reference), repr(predicted), repr((predicted - reference) * KCAL_PER_MOL)]
            own = None if residuals is None else residuals[structures.offsets[i] : structures.offsets[i + 1]]
            if own is None or np.isnan(own).any():
                writer.writerow([*row, "", ""])
            else:
                errors = Errors.of(own)
                writer.writerow([*row, repr(errors.rmse), repr(errors.max)])
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
