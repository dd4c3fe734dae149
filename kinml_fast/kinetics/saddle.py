"""Saddle points and what they join: Sella (order 1, exact Hessians), nudged elastic bands, reaction paths.

Searches are those of Sella (Hermes, Sargsyan, Najm, Zádor, J. Chem. Theory Comput. 2022, 18, 6974, DOI
10.1021/acs.jctc.2c00395), which are given analytic Hessians instead of building them up from forces (Yuan et al., Nat.
Commun. 2024, 15, 8865, DOI 10.1038/s41467-024-52481-5), and ASE's nudged elastic band with a climbing image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from ase import Atoms
from ase.mep import NEB
from ase.optimize import FIRE

from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.errors import ConfigError, DataError, InputError, first_line
from kinml_fast.kinetics.record import Record
from kinml_fast.kinetics.vibrations import FMAX, STEPS, Vibrations, largest_force, sella, vibrate

log = logging.getLogger(__name__)

_BAND_FMAX = 0.1
"""eV/Å, at which a band's highest image is a guess that a search for a saddle point can begin with."""
_LEG = 10
"""Steps after which a search with exact Hessians begins anew where it is: all that it has come to is a geometry."""


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
    energy_factor
        Of the deviations of these, see `members.factors`.
    """

    frames: list[Atoms]
    saddle: int
    lengths: np.ndarray
    energies: np.ndarray
    member_energies: np.ndarray | None
    energy_factor: float = 1.0

    @property
    def energies_std(self) -> np.ndarray | None:
        """[p], eV, calibrated standard deviations of the energies above that of the first frame (ddof = 1)."""
        if self.member_energies is None:
            return None
        relative = self.member_energies - self.member_energies[:1]
        return relative.std(axis=1, ddof=1) * self.energy_factor


def search(
    guess: Atoms,
    calculator: KinMLCalculator,
    *,
    fmax: float = FMAX,
    steps: int = STEPS,
    exact_every: int = 1,
    record: Record | None = None,
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
    record
        Keeps what the search has come to, and goes on from there.

    Raises
    ------
    ConfigError
        Sella is not installed.
    DataError
        The search ends in something that is no saddle point of first order, or does not end, or what `vibrate` raises.
    """
    if guess.pbc.any():
        raise DataError(f"{guess.symbols} is periodic: saddle points are of molecules, set pbc = False")
    module = sella()
    record, stage = record or Record(), "saddle point"
    at = record.state(stage) or {"positions": guess.positions, "steps": 0, "radius": None, "converged": False}
    atoms = Atoms(guess.symbols, at["positions"], masses=guess.get_masses())
    atoms.calc = calculator
    exact: dict[str, Any] = {}
    if exact_every:
        exact = {"hessian_function": calculator.get_hessian, "diag_every_n": exact_every}
    taken, radius, converged = at["steps"], at["radius"], at["converged"]
    with _lost(f"{guess.symbols}: the search for a saddle point"):
        while not converged and taken < steps:
            leg = min(_LEG, steps - taken) if exact_every else steps
            with module.Sella(
                atoms, order=1, internal=len(atoms) > 3, delta0=radius, logfile=None, **exact
            ) as optimiser:
                for reached in optimiser.irun(fmax=fmax, steps=leg):
                    converged = bool(reached)
                    record.step(stage, taken + optimiser.nsteps, largest_force(atoms))
                taken, radius = taken + optimiser.nsteps, float(optimiser.delta)
            state = {"positions": atoms.positions, "steps": taken, "radius": radius, "converged": converged}
            record.keep(stage, state)
    if not converged:
        raise DataError(f"{guess.symbols} is at no saddle point after {steps} steps: allow more, or a better guess")
    found = vibrate(atoms, calculator, fmax=2 * fmax)
    if found.imaginary != 1:
        what = "a minimum" if found.imaginary == 0 else f"a point with {found.imaginary} imaginary modes"
        raise DataError(f"{guess.symbols}: the search ends in {what}, no saddle point: start nearer to it")
    log.info("%s: at a saddle point after %d steps, %.1fi cm⁻¹", guess.symbols, taken, -found.frequencies[0])
    return found, taken


def between(
    first: Atoms,
    second: Atoms,
    calculator: KinMLCalculator,
    *,
    images: int = 9,
    steps: int = STEPS,
    record: Record | None = None,
) -> Atoms:
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
    record
        As in `search`.

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
    record, stage = record or Record(), "band"
    at = record.state(stage)
    if at is None:
        neb.interpolate("idpp")
    else:
        for image, positions in zip(band, at["positions"], strict=True):
            image.positions = positions
    taken, converged = 0 if at is None else at["steps"], False
    with FIRE(neb, logfile=None) as optimiser:
        if at is not None:
            velocities = at["velocities"] and np.array(at["velocities"])
            optimiser.vel, (optimiser.dt, optimiser.a, optimiser.Nsteps) = velocities, at["pace"]

        def state() -> dict[str, Any]:
            pace = [optimiser.dt, optimiser.a, optimiser.Nsteps]
            positions = [image.positions for image in band]
            return {"positions": positions, "steps": number, "velocities": optimiser.vel, "pace": pace}

        for reached in optimiser.irun(fmax=_BAND_FMAX, steps=steps - taken):
            converged, number = bool(reached), taken + optimiser.nsteps
            record.step(stage, number, float(neb.get_residual()), state)
        record.keep(stage, state())
    log.info("%s: band %s after %d steps", first.symbols, "at rest" if converged else "not at rest", number)
    energies = [image.get_potential_energy() for image in band]
    return band[1 + int(np.argmax(energies[1:-1]))]


def follow(
    found: Vibrations,
    calculator: KinMLCalculator,
    *,
    fmax: float = 0.01,
    steps: int = STEPS,
    record: Record | None = None,
) -> ReactionPath:
    """The intrinsic reaction coordinate down from a saddle point to both sides.

    Raises
    ------
    ConfigError
        Sella is not installed.
    DataError
        The path is lost.
    """
    record = record or Record()
    sides = []
    for direction in ("reverse", "forward"):
        with _lost(f"{found.atoms.symbols}: the path down from the saddle point"):
            sides.append(_side(found.atoms, calculator, direction, fmax, steps, record))
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
        found.energy_factor,
    )


def _side(
    top: Atoms, calculator: KinMLCalculator, direction: str, fmax: float, steps: int, record: Record
) -> list[Atoms]:
    """The frames of one side of a path, from the saddle point on, which is left out."""
    module, stage = sella(), f"path {direction}"
    at = record.state(stage) or {"positions": [], "hessian": None, "kink": False}
    side, kink = [np.array(one) for one in at["positions"]], at["kink"]
    atoms = top.copy()
    atoms.calc = calculator

    def state() -> dict[str, Any]:
        return {"positions": side, "hessian": path.pes.get_H().asarray(), "kink": kink}

    exact = {"hessian_function": calculator.get_hessian, "gamma": 0}
    with (
        warnings.catch_warnings(record=True) as said,
        module.IRC(atoms, logfile=None, keep_going=True, **exact) as path,
    ):
        warnings.simplefilter("always")
        before = len(side)
        walk = path.irun(fmax=fmax, steps=steps - before, direction=direction)
        if side:  # between two steps Sella knows no more than where it is and the Hessian that it has built up
            path.pes.set_x(side[-1].ravel())
            path.pes.set_H(np.array(at["hessian"]), initialized=True)
            path.d1[:], path.first = 0.0, False
        for _ in walk:
            if path.nsteps:
                side.append(atoms.positions.copy())
            kink = kink or any("inner loop failed" in str(one.message) for one in said)
            record.step(stage, len(side), largest_force(atoms), state if path.nsteps else None)
        if len(side) > before:
            record.keep(stage, state())
    if kink:
        log.warning("%s: the path (%s) has a kink, which is not to be trusted", atoms.symbols, direction)
    return [Atoms(top.symbols, positions, masses=top.get_masses()) for positions in side]


def minima(
    path: ReactionPath,
    calculator: KinMLCalculator,
    *,
    fmax: float = FMAX,
    steps: int = STEPS,
    record: Record | None = None,
) -> list[Vibrations]:
    """The minima that a path ends in, of its two ends; of fragments that have parted too."""
    ends = []
    for frame, name in ((path.frames[0], "one end"), (path.frames[-1], "other end")):
        try:
            ends.append(minimum(frame, calculator, name, fmax=fmax, steps=steps, record=record))
        except DataError as error:
            raise DataError(f"an end of the path: {error}") from error
    return ends


def minimum(
    atoms: Atoms,
    calculator: KinMLCalculator,
    stage: str,
    *,
    fmax: float = FMAX,
    steps: int = STEPS,
    record: Record | None = None,
) -> Vibrations:
    """The minimum near a geometry, which is a stage of a search: as `vibrate` finds it, or as it was found before."""
    record = record or Record()
    at = record.state(stage)
    if at is None:
        tell = functools.partial(record.step, stage)
        found = vibrate(atoms, calculator, optimise=True, fmax=fmax, steps=steps, tell=tell)
        record.keep(stage, {"positions": found.atoms.positions})
        return found
    return vibrate(Atoms(atoms.symbols, at["positions"], masses=atoms.get_masses()), calculator, fmax=fmax)


def _placed(atoms: Atoms, onto: Atoms) -> np.ndarray:
    """Positions after the rotation and translation by which they come nearest to others (Kabsch)."""
    x, y = atoms.positions - atoms.positions.mean(axis=0), onto.positions - onto.positions.mean(axis=0)
    u, _, v = np.linalg.svd(x.T @ y)
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ v))])
    return x @ (u @ flip @ v) + onto.positions.mean(axis=0)


@contextlib.contextmanager
def _lost(what: str) -> Iterator[None]:
    """Say in a sentence what Sella raises, which far from all data runs into whatever its matrices do."""
    try:
        yield
    except ConfigError:
        raise
    except DataError as error:
        raise DataError(f"{what} is lost ({error})") from error
    except InputError:
        raise
    except Exception as error:
        raise DataError(f"{what} is lost ({first_line(error)}): start from another geometry") from error
