"""Deviations of an ensemble against its errors: factors that make them believable, and how far they can be believed.

The mean of M members whose results scatter around the truth like draws of a normal distribution has an error that,
divided by their standard deviation s (ddof = 1) and a constant c, follows Student's t with M - 1 degrees of freedom.
The constant is the one of the largest likelihood of the errors; the factor of a deviation is c times the half width
of the interval that has 68.27 % of that distribution, so that factor times s is what is commonly meant by one standard
deviation, also of few members.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats
from scipy.optimize import minimize_scalar

from kinml_fast import report
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import members
from kinml_fast.deploy.evaluate import Part
from kinml_fast.nn import Calibration, Ensemble
from kinml_fast.units import KCAL_PER_MOL

FEWEST = 20
"""Numbers that a factor is found from at least."""
_WITHIN_ONE, _WITHIN_TWO = 0.6827, 0.95


@dataclass(frozen=True)
class Reliability:
    """How well deviations tell errors.

    Parameters
    ----------
    number
        Of errors.
    likelihood
        Mean logarithm of the probability density of the errors (in kcal/mol, kcal/mol/Å), of Student's t.
    within_one, within_two
        Share of the errors within the deviation, and within as many of them as have 95 %; 0.683 and 0.95 are right.
    """

    number: int
    likelihood: float
    within_one: float
    within_two: float

    @classmethod
    def of(cls, errors: np.ndarray, deviations: np.ndarray, n_members: int) -> Reliability:
        """Of errors and deviations [n] in one unit of energy or force in eV."""
        errors, deviations = _known(errors, deviations)
        one, two = _half_widths(n_members)
        ratio = np.abs(errors) / deviations
        densities = stats.t.logpdf(errors / (deviations / one), n_members - 1) - np.log(deviations / one * KCAL_PER_MOL)
        if not len(errors):
            return cls(0, float("nan"), float("nan"), float("nan"))
        within = float((ratio <= 1).mean()), float((ratio <= two / one).mean())
        return cls(len(errors), float(densities.mean()), *within)


def factor(errors: np.ndarray, deviations: np.ndarray, n_members: int) -> float | None:
    """What the deviations [n] of M members are to be multiplied with for these errors; None of fewer than FEWEST."""
    errors, deviations = _known(errors, deviations)
    ratio = np.abs(errors) / deviations
    if len(ratio) < FEWEST or not ratio.any():
        return None
    freedom = n_members - 1
    middle = float(np.log(np.median(ratio[ratio > 0])))
    best = minimize_scalar(
        lambda log_c: log_c - stats.t.logpdf(ratio / np.exp(log_c), freedom).mean(),
        bounds=(middle - 7, middle + 7),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(best.x)) * _half_widths(n_members)[0]


def fit(ensemble: Ensemble, found: Sequence[Part]) -> Calibration | None:
    """The factors of an ensemble from its predictions without factors at its levels; None where there is too little.

    Elements without enough forces have the factor of the forces on all elements, forces of a level without enough of
    them that of its energies, energies of a level without enough of them that of its forces; a level without enough of
    either has the factors of the nearest one.
    """
    of_fidelities = [[part for part in found if part.fidelity in (None, f)] for f in ensemble.fidelities]
    return _calibration(
        [_factors(_energies(parts), _forces(parts, ensemble.elements), ensemble) for parts in of_fidelities]
    )


def fit_steps(ensemble: Ensemble, structures: Structures) -> Calibration | None:
    """As `fit`, but of what each level adds to the one below: its differences, their errors and deviations.

    Parameters
    ----------
    ensemble
        Of K levels of theory.
    structures
        Molecules with energies, and perhaps forces, of these levels; those count that have both of two levels.
    """
    structures = structures.with_elements(ensemble.elements)
    assert structures.coordinates is not None
    assert structures.energies is not None
    device = ensemble.sae.device
    energies, forces = members.energies_and_forces(
        ensemble,
        structures.coordinates_in(ensemble.dtype).to(device),
        torch.from_numpy(structures.species).to(device),
        torch.from_numpy(structures.offsets).to(device),
    )
    reference = structures.forces
    if reference is None:
        reference = np.full(forces.shape[2:], np.nan)
    energies, forces, energies_true, forces_true = (
        np.diff(values, axis=-axes, prepend=0.0)
        for values, axes in (
            (energies, 2),
            (forces, 3),
            (structures.energies.reshape(ensemble.levels, -1), 2),
            (np.broadcast_to(reference, forces.shape[1:]), 3),
        )
    )
    elements = np.repeat(structures.species, 3)
    found = []
    for level in range(ensemble.levels):
        of_energies, of_forces = energies[:, level], forces[:, level].reshape(ensemble.n_members, -1)
        errors = members.mean(of_energies) - energies_true[level], members.mean(of_forces) - forces_true[level].ravel()
        found.append(
            _factors(
                (errors[0], members.deviation(of_energies)),
                (errors[1], members.deviation(of_forces), elements),
                ensemble,
            )
        )
    return _calibration(found)


def _factors(
    energies: tuple[np.ndarray, np.ndarray], forces: tuple[np.ndarray, np.ndarray, np.ndarray], ensemble: Ensemble
) -> tuple[float | None, list[float | None]]:
    """Of a level: of energies and of forces on each element; errors, deviations and, of forces, places of elements."""
    of_energies = factor(*energies, ensemble.n_members)
    errors, deviations, elements = forces
    of_all = factor(errors, deviations, ensemble.n_members) or of_energies
    of_elements = [
        factor(errors[elements == s], deviations[elements == s], ensemble.n_members) or of_all
        for s in range(len(ensemble.elements))
    ]
    return of_energies or of_all, of_elements


def _calibration(of_levels: Sequence[tuple[float | None, list[float | None]]]) -> Calibration | None:
    known = np.array([k for k, (of_energies, _) in enumerate(of_levels) if of_energies is not None])
    if not len(known):
        return None
    nearest = [of_levels[known[np.abs(known - level).argmin()]] for level in range(len(of_levels))]
    return Calibration(
        tuple(of_energies or 1.0 for of_energies, _ in nearest),
        tuple(tuple(value or 1.0 for value in of_elements) for _, of_elements in nearest),
    )


def applied(part: Part, ensemble: Ensemble) -> Part:
    """A part that was predicted without factors, with those of the ensemble."""
    calibration, predictions = ensemble.calibration, part.predictions
    if calibration is None or predictions.energy_std is None:
        return part
    level = -1 if part.fidelity is None else ensemble.fidelities.index(part.fidelity)
    forces_std = predictions.forces_std
    if forces_std is not None:
        order = [ensemble.elements.index(name) for name in part.structures.elements]
        factors = np.array(calibration.forces[level])[order][part.structures.species]
        forces_std = forces_std * factors[:, None]
    energy_std = predictions.energy_std * calibration.energies[level]
    return replace(part, predictions=replace(predictions, energy_std=energy_std, forces_std=forces_std))


def reliabilities(found: Sequence[Part], n_members: int) -> dict[str, Reliability]:
    """Of energies, and of forces if there are any, of parts of one level."""
    result = {"energies": Reliability.of(*_energies(found), n_members)}
    errors, deviations, _ = _forces(found, ())
    if len(errors):
        result["forces"] = Reliability.of(errors, deviations, n_members)
    return result


def table(name: str, before: Sequence[Part], after: Sequence[Part], n_members: int) -> str:
    """How reliable deviations are without and with factors, of the parts NAME of all levels, as text."""
    rows = [f"{name}: errors within the deviation (68.3 % are right), within 95 %, mean logarithm of the likelihood"]
    found = {what: reliabilities(parts, n_members) for what, parts in (("before", before), ("calibrated", after))}
    for kind in found["calibrated"]:
        for what, of_kinds in found.items():
            one = of_kinds[kind]
            shares = f"{100 * one.within_one:5.1f} %  {100 * one.within_two:5.1f} %"
            rows.append(f"{f'{kind} {what}':<20}  {shares}  {one.likelihood:8.3f}")
    return "\n".join(rows)


def draw(folder: str | os.PathLike, before: Sequence[Part], after: Sequence[Part]) -> None:
    """Write reliability.png: errors against deviations of the same parts without and with factors."""
    panels: dict[str, Mapping[str, tuple[np.ndarray, np.ndarray]]] = {
        "energies": {name: _energies(parts) for name, parts in (("before", before), ("calibrated", after))}
    }
    forces = {name: _forces(parts, ())[:2] for name, parts in (("before", before), ("calibrated", after))}
    if len(forces["before"][0]):
        panels["forces"] = forces
    report.write_reliability(folder, panels, _WITHIN_ONE)


def _half_widths(n_members: int) -> tuple[float, float]:
    """Of the intervals of Student's t that have 68.27 % and 95 %."""
    one, two = (stats.t.ppf(0.5 + within / 2, n_members - 1) for within in (_WITHIN_ONE, _WITHIN_TWO))
    return float(one), float(two)


def _known(errors: np.ndarray, deviations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(errors) & (deviations > 0)
    return errors[known], deviations[known]


def _energies(found: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    errors, deviations = [np.empty(0)], [np.empty(0)]
    for part in found:
        if part.predictions.energy_std is not None:
            errors.append(part.energy_residuals)
            deviations.append(part.predictions.energy_std)
    return np.concatenate(errors), np.concatenate(deviations)


def _forces(found: Sequence[Part], elements: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors and deviations of components, and the place of each one's element."""
    errors, deviations, places = [np.empty(0)], [np.empty(0)], [np.empty(0, dtype=np.int64)]
    for part in found:
        residuals, stds = part.force_residuals, part.predictions.forces_std
        if residuals is None or stds is None:
            continue
        known = ~np.isnan(residuals[:, 0])
        errors.append(residuals[known].ravel())
        deviations.append(stds[known].ravel())
        names = part.structures.elements
        place = np.array([elements.index(name) if name in elements else -1 for name in names], dtype=np.int64)
        places.append(np.repeat(place[part.structures.species[known]], 3))
    return np.concatenate(errors), np.concatenate(deviations), np.concatenate(places)
