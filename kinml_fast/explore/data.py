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
from kinml_fast.explore.folder import ExploreFolder, RoundFolder
from kinml_fast.explore.geometry import Geometry
from kinml_fast.explore.labels import Label

FIDELITY = 1


@dataclass(frozen=True, eq=False)
class Labelled:
    """A geometry with its label, and the round that it was labelled in."""

    geometry: Geometry
    label: Label
    round: int


def write(
    folder: ExploreFolder, of_round: RoundFolder, found: Sequence[Labelled], calc: str, validation: float
) -> None:
    """Write all that was labelled: a database for each formula in atom order, an extended XYZ file, the division.

    Parameters
    ----------
    folder
        Of the exploration; its files are replaced.
    of_round
        Gets the division into training and validation, in which a structure has the same part in every round.
    found
        In the order in which it was labelled; what failed is left out.
    calc
        The name of the calculator.
    validation
        Share of the structures of each formula.
    """
    found = [one for one in found if one.label.energy is not None]
    folder.data.mkdir(parents=True, exist_ok=True)
    by_formula: dict[tuple[str, ...], list[Labelled]] = {}
    for one in found:
        by_formula.setdefault(one.geometry.symbols, []).append(one)
    for symbols, of_formula in by_formula.items():
        structures = Structures.of_one_formula(
            symbols,
            np.array([one.geometry.positions for one in of_formula]),
            np.array([one.label.energy for one in of_formula]),
            np.array([one.label.forces for one in of_formula]),
        )
        sqlite.write(
            folder.data / f"{formula_in_order(symbols)}.db",
            {FIDELITY: structures},
            # Readers take those above 0 only.
            temperatures=[one.geometry.temperature or 1.0 for one in of_formula],
            names=[f"round-{one.round:03}/{one.geometry.source}" for one in of_formula],
            calc=calc,
            geometry_calc="explore",
        )
    _write_xyz(folder, found)
    _write_split(folder, of_round, validation)


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
        if np.isfinite(one.geometry.deviation):
            frame.info["deviation"] = one.geometry.deviation
        frame.calc = SinglePointCalculator(frame, energy=one.label.energy, forces=one.label.forces)
        frames.append(frame)
    with replacing(folder.xyz) as temporary:
        ase.io.write(temporary, frames, format="extxyz")


def _write_split(folder: ExploreFolder, of_round: RoundFolder, validation: float) -> None:
    structures = sqlite.read(folder.databases(), Selection(fidelity=FIDELITY))
    every = round(1 / validation)
    numbers = np.array([int(label.rsplit("/", 1)[1]) for label in structures.labels])
    chosen = numbers % every == 0
    of_all = np.arange(len(structures))
    split = Split(of_all[~chosen], of_all[chosen], of_all[:0])
    splits.write_tvtmsk(of_round.split, structures, split)
