"""The data of an exploration: what was labelled, in the files that training reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ase.io
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator

from kinml_fast.data import Selection, splits, sqlite
from kinml_fast.data.files import replacing
from kinml_fast.data.split import Split
from kinml_fast.data.structures import Structures, formula_in_order
from kinml_fast.explore.config import LabelsConfig
from kinml_fast.explore.folder import ExploreFolder, RoundFolder
from kinml_fast.explore.geometry import Geometry
from kinml_fast.explore.labels import Label


@dataclass(frozen=True, eq=False)
class Labelled:
    """A geometry with its labels by level, lowest first, None where it has none, and the round that it had them in."""

    geometry: Geometry
    labels: tuple[Label | None, ...]
    round: int

    @property
    def known(self) -> bool:
        """Whether it has the energy of a level."""
        return any(label is not None and label.energy is not None for label in self.labels)


def write(folder: ExploreFolder, of_round: RoundFolder, found: Sequence[Labelled], settings: LabelsConfig) -> int:
    """Write all that was labelled: a database for each formula in atom order, an extended XYZ file, the division.

    Returns how many structures are for training.

    Parameters
    ----------
    folder
        Of the exploration; its files are replaced.
    of_round
        Gets the division into training and validation, in which a structure has the same part in every round.
    found
        In the order in which it was labelled; what failed is left out.
    settings
        The calculators, and the share for validation.
    """
    found = [one for one in found if one.known]
    folder.data.mkdir(parents=True, exist_ok=True)
    by_formula: dict[tuple[str, ...], list[Labelled]] = {}
    for one in found:
        by_formula.setdefault(one.geometry.symbols, []).append(one)
    for symbols, of_formula in by_formula.items():
        of_levels = [_structures(symbols, of_formula, level) for level in range(len(settings.levels))]
        sqlite.write(
            folder.data / f"{formula_in_order(symbols)}.db",
            {f: one for f, one in zip(settings.fidelities, of_levels, strict=True) if one is not None},
            # Readers take those above 0 only.
            temperatures=[one.geometry.temperature or 1.0 for one in of_formula],
            names=[f"round-{one.round:03}/{one.geometry.source}" for one in of_formula],
            calc={f: name for f, (name, _) in zip(settings.fidelities, settings.levels, strict=True)},
            geometry_calc="explore",
        )
    _write_xyz(folder, found)
    return _write_split(folder, of_round, settings)


def _structures(symbols: Sequence[str], found: Sequence[Labelled], level: int) -> Structures | None:
    """Those that have a level, by the ids that all of them have together."""
    rows = [
        (f"{formula_in_order(symbols)}/{number}", one.geometry.positions, label.energy, label.forces)
        for number, one in enumerate(found, start=1)
        if (label := one.labels[level]) is not None and label.energy is not None
    ]
    if not rows:
        return None
    names, positions, energies, forces = zip(*rows, strict=True)
    return Structures.of_one_formula(symbols, np.array(positions), np.array(energies), np.array(forces), names)


def _write_xyz(folder: ExploreFolder, found: Sequence[Labelled]) -> None:
    frames = []
    for one in found:
        frame = one.geometry.atoms
        frame.info = {
            "round": one.round,
            "source": one.geometry.source,
            "temperature": one.geometry.temperature,
            "step": one.geometry.step,
            "item": one.geometry.item,
        }
        if one.geometry.deviations:
            frame.info["deviation"] = max(one.geometry.deviations)
        for level, label in enumerate(one.labels):
            if label is None or label.energy is None or label.forces is None:
                continue
            if level == len(one.labels) - 1:
                frame.calc = SinglePointCalculator(frame, energy=label.energy, forces=label.forces)
            else:
                frame.info["low_energy"] = label.energy
                frame.arrays["low_forces"] = label.forces
        frames.append(frame)
    with replacing(folder.xyz) as temporary:
        ase.io.write(temporary, frames, format="extxyz")


def validation(folder: ExploreFolder, settings: LabelsConfig) -> Structures:
    """The structures in the databases that the models are validated on."""
    structures, chosen = _divided(folder, settings)
    return structures.select(np.flatnonzero(chosen))


def _divided(folder: ExploreFolder, settings: LabelsConfig) -> tuple[Structures, np.ndarray]:
    """All structures in the databases, and which of them are for validation."""
    structures = sqlite.read(folder.databases(), Selection(fidelity=settings.fidelities))
    every = round(1 / settings.validation)
    return structures, np.array([int(label.rsplit("/", 1)[1]) % every == 0 for label in structures.labels])


def _write_split(folder: ExploreFolder, of_round: RoundFolder, settings: LabelsConfig) -> int:
    structures, chosen = _divided(folder, settings)
    of_all = np.arange(len(structures))
    split = Split(of_all[~chosen], of_all[chosen], of_all[:0])
    splits.write_tvtmsk(of_round.split, structures, split)
    return len(split.train)
