"""Single-atom energies (SAEs): what of an energy each element accounts for, so that networks learn the rest."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
from ase.data import chemical_symbols
from scipy.optimize import lsq_linear

from kinml_fast.errors import ConfigError, DataError

GUESSES = {
    "C": -1035.30436565,
    "H": -16.8356588,
    "O": -2043.89908480,
    "N": -1486.3292980,
    "F": -2715.285898636,
    "S": -10834.4396698,
    "Cl": -12522.6292598,
}
"""Where the fit starts (eV): PyKinML's values, near those of B3LYP; other elements start at 0."""

BOUND = 8.0
"""An SAE with a guess stays within this distance (eV) of it; one without is free."""

_FREE_SCALE = 1e4  # eV, the magnitude of an energy of which nothing is known

_log = logging.getLogger(__name__)


def fit(
    counts: np.ndarray,
    energies: np.ndarray,
    elements: Sequence[str],
    start: np.ndarray | None = None,
    multiplicity: np.ndarray | None = None,
) -> np.ndarray:
    """Least squares of energies on numbers of atoms, within bounds around a guess.

    Where the counts do not settle the answer (in C5H5 only the sum of one C and one H matters), it is the one nearest
    to the guess. That is what a bounded solver started at the guess finds. "Near" is measured in units of 8 eV for
    elements with a guess and of 10⁴ eV for others, so that an unknown element takes up what a known one cannot. The
    SAE of an element that does not occur is its guess.

    The guesses are those of all-electron energies. Where they miss by more than 8 eV a structure what a free fit
    reaches, the energies are of another kind (semiempirical, pseudopotentials, already shifted); then the fit is free
    and starts at 0, and the log says so.

    A second level of theory is often known for few formulas, which settle less. Where the first one's SAEs are nearer
    to its energies than the guesses, the answer is the one nearest to them, without bounds.

    Parameters
    ----------
    counts
        [n_structures, n_elements], atoms of each element.
    energies
        [n_structures], eV.
    elements
        Chemical symbols of the columns.
    start
        Where a free fit may start, float64 [n_elements], eV: SAEs of a lower level, or 0 for differences of levels.
    multiplicity
        [n_structures]: how many structures of these counts have the energy as their mean; None: one each.

    Returns
    -------
    float64 [n_elements]
        eV.

    References
    ----------
    The guesses and bounds: PyKinML; https://doi.org/10.1021/acs.jpca.3c07872
    """
    counts = np.asarray(counts, dtype=np.float64)
    energies = np.asarray(energies, dtype=np.float64)
    if len(counts) == 0:
        raise DataError("no structures to fit single-atom energies to: enlarge the training part")
    # Structures with the same counts only enter through their mean: as many equations as formulas.
    each = np.ones(len(counts)) if multiplicity is None else np.asarray(multiplicity, dtype=np.float64)
    rows, inverse = np.unique(counts, axis=0, return_inverse=True)
    inverse = inverse.ravel()
    multiplicity = np.bincount(inverse, weights=each)

    def misfit(sae: np.ndarray) -> tuple[np.ndarray, float]:
        # What is left of each formula's mean energy, and its root mean square over the structures, eV.
        left = np.bincount(inverse, weights=(energies - counts @ sae) * each) / multiplicity
        return left, float(np.sqrt(np.average(left**2, weights=multiplicity)))

    known = np.array([element in GUESSES for element in elements])
    guess = np.array([GUESSES.get(element, 0.0) for element in elements])
    weights = np.sqrt(multiplicity)[:, None]
    if start is not None and misfit(start)[1] < misfit(guess)[1]:
        free = np.zeros(len(guess), dtype=bool)
        return start + _nearest(rows * weights, misfit(start)[0] * weights[:, 0], free)
    sae = guess + _nearest(rows * weights, misfit(guess)[0] * weights[:, 0], known)
    if np.any(known & (np.abs(sae - guess) > BOUND * (1 - 1e-9))):
        zero = np.zeros(len(guess))
        free = _nearest(rows * weights, misfit(zero)[0] * weights[:, 0], np.zeros(len(guess), dtype=bool))
        if misfit(sae)[1] > misfit(free)[1] + BOUND:
            _log.info("single-atom energies: the all-electron guesses do not fit these energies, fitting freely")
            return free
    return sae


def _nearest(matrix: np.ndarray, target: np.ndarray, bounded: np.ndarray) -> np.ndarray:
    # Least squares for a change of the SAEs (eV): the smallest of the best ones, bounded elements within ±BOUND.
    scale = np.where(bounded, BOUND, _FREE_SCALE)
    limit = np.where(bounded, 1.0, np.inf)
    scaled = matrix * scale
    change = np.linalg.lstsq(scaled, target, rcond=None)[0]
    if np.any(np.abs(change) > limit):
        # A slight pull to 0 (1e-6 of the largest singular value) makes the bounded optimum unique as well.
        pull = 1e-6 * np.linalg.norm(scaled, 2)
        change = lsq_linear(
            np.vstack([scaled, pull * np.eye(len(scale))]),
            np.concatenate([target, np.zeros(len(scale))]),
            bounds=(-limit, limit),
            method="bvls",
        ).x
    return scale * change


def resolve(
    setting: str | Mapping[str, float],
    counts: np.ndarray,
    energies: np.ndarray,
    elements: Sequence[str],
    start: np.ndarray | None = None,
    multiplicity: np.ndarray | None = None,
) -> np.ndarray:
    """SAEs by a setting: "fit", "none" (all 0), or energies by element (eV).

    Parameters
    ----------
    counts, energies, elements, start, multiplicity
        As for `fit`; used by "fit" only.

    Returns
    -------
    float64 [n_elements]
        eV.

    Raises
    ------
    InputError
        Another word, an element of the data without an energy, something that is no element or no number.
    """
    if setting == "fit":
        return fit(counts, energies, elements, start, multiplicity)
    if setting == "none":
        return np.zeros(len(elements))
    if not isinstance(setting, Mapping):
        raise ConfigError(f"single-atom energies are {setting!r}: expected fit, none or an energy for each element")
    for element, value in setting.items():
        if element not in chemical_symbols[1:]:
            raise ConfigError(f"single-atom energies name {element!r}, which is no element: correct it")
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ConfigError(f"the single-atom energy of {element} is {value!r}, not a number in eV: correct it")
    missing = [element for element in elements if element not in setting]
    if missing:
        raise ConfigError(f"single-atom energies lack {', '.join(missing)}: add them or write fit")
    return np.array([float(setting[element]) for element in elements])


def resolve_levels(
    settings: str | Mapping[str, float] | Sequence[str | Mapping[str, float]],
    counts: np.ndarray,
    energies: np.ndarray,
    elements: Sequence[str],
    start: np.ndarray | None = None,
    multiplicity: np.ndarray | None = None,
) -> np.ndarray:
    """SAEs of one or several levels of theory, each fitted to the structures that have it.

    Parameters
    ----------
    settings
        One for all levels, or a list with one for each, see `resolve`.
    counts
        [n_structures, n_elements], atoms of each element.
    energies
        [n_structures] or [K, n_structures], eV, NaN where a level is unknown.
    elements
        Chemical symbols of the columns.
    start
        Of the lowest level, see `fit`; a higher one may start at the SAEs of the one below.
    multiplicity
        Like `energies`, see `fit`.

    Returns
    -------
    float64 [n_elements] or [K, n_elements]
        eV.

    Raises
    ------
    InputError
        A list of another length, and as `resolve`.
    """
    by_level = energies[None] if energies.ndim == 1 else energies
    levels = len(by_level)
    several = [settings] * levels if isinstance(settings, str | Mapping) else list(settings)
    if len(several) != levels:
        raise ConfigError(
            f"{len(several)} settings of single-atom energies are given for {levels} levels of theory: give one "
            "for each, lowest first, or one for all"
        )
    found = [] if start is None else [start]
    each = np.ones_like(by_level) if multiplicity is None else multiplicity.reshape(by_level.shape)
    for setting, at_level, of_level in zip(several, by_level, each, strict=True):
        known = ~np.isnan(at_level)
        given = counts[known], at_level[known], elements, found[-1] if found else None, of_level[known]
        found.append(resolve(setting, *given))
    return found[-1] if energies.ndim == 1 else np.stack(found[-levels:])
