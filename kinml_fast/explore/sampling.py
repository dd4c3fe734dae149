"""Geometries: displaced ones for the first models, and what an ensemble visits in a round.

Each item of a round (a trajectory, the normal modes of a minimum at a temperature) draws from a generator of its own,
seeded by exploration, round and item, so that it gives the same whenever it is done.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import ase.units
import numpy as np
import torch
from ase import Atoms
from ase.data import covalent_radii
from ase.md.langevin import Langevin

from kinml_fast.deploy import members
from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.errors import ConfigError, DataError, first_line
from kinml_fast.explore.config import GeometriesConfig, SamplingConfig, SelectionConfig
from kinml_fast.explore.geometry import Geometry, broken
from kinml_fast.kinetics import saddle
from kinml_fast.kinetics.vibrations import Vibrations, fragments, vibrate

log = logging.getLogger(__name__)

GUESS = "guess"
"""The source of geometries of the user that are near saddle points."""
_STIFFEST, _SOFTEST_SPRING = 43.7, 3.0
"""eV/Å², of the springs that hold displaced atoms together."""
_TRIES = 100
_SOFTEST = 100.0
"""cm⁻¹: softer and imaginary modes are displaced as if they were of this frequency."""
_FMAX, _STEPS = 0.01, 300
"""Of the optimisation of a minimum: it need not be a good one."""


@dataclass(frozen=True)
class Counts:
    """How many geometries an item has looked at, and what became of them."""

    seen: int = 0
    certain: int = 0
    uncertain: int = 0
    lost: int = 0
    broken: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def displaced(starts: Sequence[Geometry], settings: GeometriesConfig, seed: int) -> list[Geometry]:
    """The geometries to begin with and displaced ones, `settings.count` together.

    Raises
    ------
    DataError
        Nearly all displaced geometries of a molecule are broken.
    """
    found = list(starts)
    pieces = [fragments(start.atoms) for start in starts]
    item = 0
    while len(found) < settings.count:
        start = starts[item % len(starts)]
        temperature = settings.temperatures[item // len(starts) % len(settings.temperatures)]
        rng = np.random.default_rng([seed, 0, item])
        constants, modes = np.linalg.eigh(springs(start))
        widths = np.sqrt(ase.units.kB * temperature / constants)
        for _ in range(_TRIES):
            moves = modes @ (rng.normal(size=len(widths)) * widths)
            positions = start.positions + moves.reshape(-1, 3)
            if not broken(Atoms(start.symbols, positions), pieces[item % len(starts)]):
                break
        else:
            raise DataError(
                f"{start.atoms.symbols}: falls apart whenever its atoms are displaced as at {temperature:g} K: lower "
                "geometries.temperatures"
            )
        found.append(
            replace(start, positions=positions, source="displaced", temperature=temperature, item=item, step=0)
        )
        item += 1
    return found


def springs(geometry: Geometry) -> np.ndarray:
    """Second derivatives [3n, 3n] in eV/Å² of springs between all atoms, at rest: what is known before any label.

    The constant of a pair at distance r falls as exp(r₀² - r²), in Å, from 43.7 eV/Å² at the sum r₀ of covalent radii,
    after the stretches of Lindh's model Hessian (doi:10.1016/0009-2614(95)00646-L). 3 eV/Å² hold each atom in its
    place, for what the pairs leave free.
    """
    atoms = geometry.atoms
    radii, n = covalent_radii[atoms.numbers], len(atoms)
    vectors = atoms.positions[:, None] - atoms.positions
    distances = np.linalg.norm(vectors, axis=2) + np.eye(n)
    constants = _STIFFEST * np.exp(np.square(radii[:, None] + radii) - distances**2) * (1 - np.eye(n))
    units = vectors / distances[:, :, None]
    blocks = -constants[:, :, None, None] * units[:, :, :, None] * units[:, :, None, :]
    blocks[np.arange(n), np.arange(n)] = -blocks.sum(axis=1)
    return blocks.transpose(0, 2, 1, 3).reshape(3 * n, 3 * n) + _SOFTEST_SPRING * np.eye(3 * n)


@dataclass(frozen=True)
class Item:
    """A piece of the sampling of a round: what is done, from where, at which temperature (K).

    A saddle point is looked for between `start` and `other`, or, without an `other`, near `start`.
    """

    source: str
    start: Geometry
    temperature: float
    number: int
    other: Geometry | None = None


def items(starts: Sequence[Geometry], settings: SamplingConfig) -> list[Item]:
    """What is done in a round."""
    found: list[Item] = []
    wells = [start for start in starts if start.source != GUESS]
    for start in wells:
        for temperature in settings.temperatures:
            sources = ["dynamics"] * settings.trajectories + ["modes"] * bool(settings.modes)
            found += [Item(source, start, temperature, len(found) + i) for i, source in enumerate(sources)]
    if settings.saddles:
        pairs: list[tuple[Geometry, Geometry | None]] = [(one, None) for one in starts if one.source == GUESS]
        pairs += [(a, b) for a, b in itertools.combinations(wells, 2) if a.symbols == b.symbols]
        found += [Item("saddle", a, 0.0, len(found) + i, b) for i, (a, b) in enumerate(pairs)]
    return found


class Sampler:
    """Samples with an ensemble.

    Parameters
    ----------
    calculator
        Of the ensemble.
    sampling, selection
        How, and what counts as uncertain.
    """

    def __init__(self, calculator: KinMLCalculator, sampling: SamplingConfig, selection: SelectionConfig) -> None:
        self._calculator, self._sampling, self._selection = calculator, sampling, selection
        self._minima: dict[int, Vibrations | None] = {}

    def run(
        self, item: Item, seed: Sequence[int], seen: Callable[[float], object] = lambda done: None
    ) -> tuple[list[Geometry], Counts]:
        """The geometries that an item finds in the window or above it, and the counts of all.

        What `seen` is called with is the number of the item and the share of it that is done.
        """
        rng = np.random.default_rng([*seed, item.number])
        ways: dict[str, Callable[[Item, np.random.Generator], Iterator[Geometry]]] = {
            "dynamics": self._dynamics,
            "modes": self._modes,
            "saddle": self._saddle,
        }
        of_all = {"dynamics": self._sampling.steps // self._sampling.every, "modes": self._sampling.modes}
        pieces = fragments(item.start.atoms)
        found: list[Geometry] = []
        counts = Counts()
        for geometry in ways[item.source](item, rng):
            kind = "broken"
            if not broken(geometry.atoms, pieces):
                geometry = replace(geometry, deviations=self._deviations(geometry.atoms))
                largest = max(geometry.deviations)
                kind = "lost" if not largest <= self._selection.upper else "uncertain"
                kind = "certain" if largest < self._selection.lower else kind
            if kind == "uncertain" or (kind == "lost" and np.isfinite(geometry.deviations).all()):
                found.append(geometry)
            counts += Counts(seen=1, **{kind: 1})
            seen(item.number + min(counts.seen / of_all.get(item.source, np.inf), 1.0))
            if item.source == "dynamics" and kind in ("broken", "lost"):
                break
        return found, counts

    def minimum(self, start: Geometry) -> Vibrations | None:
        """The minimum near a geometry on the ensemble's surface; None, and the log says why, if there is none."""
        if start.molecule not in self._minima:
            found = None
            try:
                found = vibrate(start.atoms, self._calculator, optimise=True, fmax=_FMAX, steps=_STEPS)
                if broken(found.atoms, fragments(start.atoms)):
                    log.info("%s: its minimum is broken, so that samples begin at the start", start.atoms.symbols)
                    found = None
            except DataError as error:
                log.info("%s: samples begin at the start, as there is no minimum (%s)", start.atoms.symbols, error)
            self._minima[start.molecule] = found
        return self._minima[start.molecule]

    def _deviations(self, atoms: Atoms) -> tuple[float, ...]:
        """Those of the ensemble, see `Geometry`; NaN where it gives no number."""
        model = self._calculator.model
        species = torch.tensor([model.elements.index(symbol) for symbol in atoms.symbols], device=model.sae.device)
        energies, forces = members.energies_and_forces(
            model,
            torch.from_numpy(atoms.positions).to(model.sae.device, model.dtype),
            species,
            torch.tensor([0, len(atoms)], device=model.sae.device),
        )
        # What each level adds to the one below.
        energies = np.diff(energies, axis=1, prepend=0.0)
        forces = np.diff(forces, axis=1, prepend=0.0)
        if self._selection.deviation == "energy":
            found = members.energies_deviation(model, energies)[:, 0] / np.sqrt(len(atoms))
        else:
            of_atoms = np.linalg.norm(members.forces_deviation(model, forces, species.cpu().numpy()), axis=2)
            found = of_atoms.max(axis=1)
        return tuple(value if np.isfinite(value) else float("nan") for value in found.tolist())

    def _dynamics(self, item: Item, rng: np.random.Generator) -> Iterator[Geometry]:
        minimum = self.minimum(item.start)
        atoms = item.start.atoms if minimum is None else minimum.atoms.copy()
        atoms.calc = self._calculator
        atoms.set_momenta(
            rng.normal(size=(len(atoms), 3)) * np.sqrt(atoms.get_masses() * ase.units.kB * item.temperature)[:, None]
        )
        dynamics = Langevin(
            atoms,
            self._sampling.timestep * ase.units.fs,
            temperature_K=item.temperature,
            friction=self._sampling.friction / ase.units.fs,
            fixcm=False,
            rng=rng,
        )
        for step in range(self._sampling.every, self._sampling.steps + 1, self._sampling.every):
            try:
                dynamics.run(self._sampling.every)
            except DataError:  # atoms on top of each other, an energy that is no number
                yield _of(item, np.zeros_like(atoms.positions), step)
                return
            yield _of(item, atoms.positions.copy(), step)

    def _modes(self, item: Item, rng: np.random.Generator) -> Iterator[Geometry]:
        minimum = self.minimum(item.start)
        if minimum is None:
            return
        # Classical: the mean of m ω² q² of each mode is kT. What is soft or imaginary is flat, not harmonic.
        frequencies = np.maximum(abs(minimum.frequencies), _SOFTEST)
        constants = abs(minimum.force_constants) * np.square(frequencies / np.maximum(abs(minimum.frequencies), 1e-3))
        widths = np.sqrt(ase.units.kB * item.temperature / constants)
        unit = minimum.modes / np.linalg.norm(minimum.modes, axis=(1, 2))[:, None, None]
        for sample in range(self._sampling.modes):
            moves = (rng.normal(size=len(widths)) * widths)[:, None, None] * unit
            yield _of(item, minimum.atoms.positions + moves.sum(axis=0), sample)

    def _saddle(self, item: Item, rng: np.random.Generator) -> Iterator[Geometry]:
        """A band's climbing image, a saddle point, and the path through it, as far as they are found."""
        frames: list[Atoms] = []
        try:
            guess = item.start.atoms
            if item.other is not None:
                ends = [self.minimum(one) for one in (item.start, item.other)]
                if ends[0] is None or ends[1] is None:
                    return
                guess = saddle.between(ends[0].atoms, ends[1].atoms, self._calculator, steps=_STEPS)
                frames.append(guess)
            found, _ = saddle.search(guess, self._calculator, fmax=_FMAX, steps=_STEPS)
            frames += saddle.follow(found, self._calculator, steps=_STEPS).frames
        except ConfigError:
            raise
        except Exception as error:  # far from data Sella runs into whatever its matrices do
            why = first_line(error)
            log.info("%s: the search for a saddle point ends early (%s)", item.start.atoms.symbols, why)
        for step, frame in enumerate(frames):
            yield _of(item, frame.positions.copy(), step)


def _of(item: Item, positions: np.ndarray, step: int) -> Geometry:
    return replace(
        item.start,
        positions=positions,
        source=item.source,
        temperature=item.temperature,
        step=step,
        item=item.number,
    )
