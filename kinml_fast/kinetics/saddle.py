"""Saddle points and what they join: Sella (order 1, exact Hessians), nudged elastic bands, reaction paths.

Searches are those of Sella (Hermes, Sargsyan, Najm, Zádor, J. Chem. Theory Comput. 2022, 18, 6974, DOI
10.1021/acs.jctc.2c00395), which are given analytic Hessians instead of building them up from forces (Yuan et al., Nat.
Commun. 2024, 15, 8865, DOI 10.1038/s41467-024-52481-5), and ASE's nudged elastic band with a climbing image.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import warnings
from typing import Any

import numpy as np
from ase import Atoms
from ase.mep import NEB
from ase.optimize import FIRE

from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.errors import ConfigError, DataError
from kinml_fast.kinetics.vibrations import FMAX, STEPS, Vibrations, vibrate

log = logging.getLogger(__name__)

_BAND_FMAX = 0.1
"""eV/Å, at which a band's highest image is a guess that a search for a saddle point can begin with."""


@dataclasses.dataclass(frozen=True, eq=False)
class ReactionPath:
    """The reaction path through a saddle point.

    Attributes
    ----------
    frames
        Geometries from one end over the saddle point to the other.
    saddle
        The number of the saddle point among them.
    lengths
        [p], √u Å, the way along the path in mass-weighted coordinates, 0 at the saddle point.
    energies
        [p], eV.
    member_energies
        [p, M], eV; None of a single model.
    """

    frames: list[Atoms]
    saddle: int
    lengths: np.ndarray
    energies: np.ndarray
    member_energies: np.ndarray | None


def search(
    guess: Atoms,
    calculator: KinMLCalculator,
    *,
    fmax: float = FMAX,
    steps: int = STEPS,
    exact_every: int = 1,
) -> tuple[Vibrations, int]:
    """The saddle point near a guess, with its vibrations, and the steps that were taken.

    Parameters
    ----------
    guess
        A geometry near it; it is not changed.
    calculator
        Of a model or an ensemble.
    fmax, steps
        As in `vibrate`.
    exact_every
        Every how many steps Sella is given an exact Hessian; 0: never, it builds one up from forces.

    Raises
    ------
    ConfigError
        Sella is not installed.
    DataError
        The search ends in something that is no saddle point of first order, or does not end, or what `vibrate` raises.
    """
    if guess.pbc.any():
        raise DataError(f"{guess.symbols} is periodic: saddle points are of molecules, set pbc = False")
    module = _sella()
    atoms = Atoms(guess.symbols, guess.positions, masses=guess.get_masses())
    atoms.calc = calculator
    exact: dict[str, Any] = {}
    if exact_every:
        exact = {"hessian_function": calculator.get_hessian, "diag_every_n": exact_every}
    with module.Sella(atoms, order=1, internal=len(atoms) > 3, logfile=None, **exact) as optimiser:
        converged = optimiser.run(fmax=fmax, steps=steps)
        taken = optimiser.nsteps
    if not converged:
        raise DataError(f"{guess.symbols} is at no saddle point after {steps} steps: allow more, or a better guess")
    found = vibrate(atoms, calculator, fmax=2 * fmax)
    if found.imaginary != 1:
        what = "a minimum" if found.imaginary == 0 else f"a point with {found.imaginary} imaginary modes"
        raise DataError(f"{guess.symbols}: the search ends in {what}, no saddle point: start nearer to it")
    log.info("%s: at a saddle point after %d steps, %.1fi cm⁻¹", guess.symbols, taken, -found.frequencies[0])
    return found, taken


def between(first: Atoms, second: Atoms, calculator: KinMLCalculator, *, images: int = 9, steps: int = STEPS) -> Atoms:
    """A guess of the saddle point between two minima: the climbing image of a nudged elastic band.

    Parameters
    ----------
    first, second
        The minima, with the same atoms in the same order.
    calculator
        Of a model or an ensemble.
    images
        Geometries between them.
    steps
        At most so many; what is reached then is taken.

    Raises
    ------
    DataError
        Other atoms, or another order of them.
    """
    if first.get_chemical_symbols() != second.get_chemical_symbols():
        raise DataError(
            f"{first.symbols} and {second.symbols} have not the same atoms in the same order: write the second in the "
            "order of the first"
        )
    if images < 1:
        raise ConfigError(f"a band of {images} images: give at least 1")
    band = [first.copy(), *(first.copy() for _ in range(images)), second.copy()]
    for image in band:
        image.calc = calculator
    neb = NEB(band, climb=True, allow_shared_calculator=True, method="improvedtangent")
    band[-1].positions = _placed(second, first)
    neb.interpolate("idpp")
    with FIRE(neb, logfile=None) as optimiser:
        converged = optimiser.run(fmax=_BAND_FMAX, steps=steps)
    log.info("%s: band %s after %d steps", first.symbols, "at rest" if converged else "not at rest", optimiser.nsteps)
    energies = [image.get_potential_energy() for image in band]
    return band[1 + int(np.argmax(energies[1:-1]))]


def follow(found: Vibrations, calculator: KinMLCalculator, *, fmax: float = 0.01, steps: int = STEPS) -> ReactionPath:
    """The intrinsic reaction coordinate down from a saddle point to both sides.

    Raises
    ------
    ConfigError
        Sella is not installed.
    DataError
        The path is lost.
    """
    module = _sella()
    sides = []
    for direction in ("reverse", "forward"):
        atoms = found.atoms.copy()
        atoms.calc = calculator
        side: list[Atoms] = []
        exact = {"hessian_function": calculator.get_hessian, "gamma": 0}
        try:
            with (
                warnings.catch_warnings(record=True) as said,
                module.IRC(atoms, logfile=None, keep_going=True, **exact) as path,
            ):
                for _ in path.irun(fmax=fmax, steps=steps, direction=direction):
                    side.append(Atoms(atoms.symbols, atoms.positions, masses=atoms.get_masses()))
        except DataError as error:
            raise DataError(f"{atoms.symbols}: the path down from the saddle point is lost ({error})") from error
        if any("inner loop failed" in str(one.message) for one in said):
            log.warning("%s: the path (%s) has a kink, which is not to be trusted", atoms.symbols, direction)
        sides.append(side[1:] if len(side) > 1 else side)
    frames = [*reversed(sides[0]), found.atoms.copy(), *sides[1]]
    energies, members = [], []
    for frame in frames:
        energies.append(calculator.get_property("energy", frame))
        members.append(calculator.results.get("all_energies"))
    root = np.sqrt(found.atoms.get_masses())[:, None]
    arcs = [np.linalg.norm((b.positions - a.positions) * root) for a, b in itertools.pairwise(frames)]
    lengths = np.concatenate([[0.0], np.cumsum(arcs)])
    saddle = len(sides[0])
    return ReactionPath(
        frames,
        saddle,
        lengths - lengths[saddle],
        np.array(energies),
        None if members[0] is None else np.array(members),
    )


def minima(
    path: ReactionPath, calculator: KinMLCalculator, *, fmax: float = FMAX, steps: int = STEPS
) -> list[Vibrations]:
    """The minima that a path ends in, of its two ends; of fragments that have parted too."""
    ends = []
    for frame in (path.frames[0], path.frames[-1]):
        try:
            ends.append(vibrate(frame, calculator, optimise=True, fmax=fmax, steps=steps))
        except DataError as error:
            raise DataError(f"an end of the path: {error}") from error
    return ends


def _placed(atoms: Atoms, onto: Atoms) -> np.ndarray:
    """Positions after the rotation and translation by which they come nearest to others (Kabsch)."""
    x, y = atoms.positions - atoms.positions.mean(axis=0), onto.positions - onto.positions.mean(axis=0)
    u, _, v = np.linalg.svd(x.T @ y)
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ v))])
    return x @ (u @ flip @ v) + onto.positions.mean(axis=0)


def _sella() -> Any:
    try:
        import sella
    except ImportError as error:
        raise ConfigError(f"saddle points need Sella, which cannot be imported ({error}): pip install sella") from error
    return sella
