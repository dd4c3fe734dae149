"""Several levels of theory in one data set: reading them together, structures that lack one, differences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kinml_fast.data.files import first_few
from kinml_fast.data.splits import PARTS, Split
from kinml_fast.data.sqlite import level_tuple
from kinml_fast.data.structures import Structures
from kinml_fast.errors import InputError

log = logging.getLogger(__name__)

INCOMPLETE = ("error", "drop", "keep")
"""What can happen to structures that lack a level."""

_SHOWN = 10  # structures that a message names


@dataclass(frozen=True)
class Levels:
    """Which levels of theory a data set is made of.

    Parameters
    ----------
    fidelities
        Those of the result, lowest first.
    baseline
        The fidelity whose energies and forces are subtracted (delta learning); None: none.
    incomplete
        One of `INCOMPLETE`.

    Raises
    ------
    InputError
        A combination that has no meaning.
    """

    fidelities: tuple[int, ...]
    baseline: int | None
    incomplete: str

    @classmethod
    def of(cls, fidelity: int | Sequence[int], baseline: int | None = None, incomplete: str | None = None) -> Levels:
        """Of settings as a user writes them; without a word about `incomplete`, only differences need all levels."""
        return cls(level_tuple(fidelity), baseline, incomplete or ("keep" if baseline is None else "error"))

    def __post_init__(self) -> None:
        if self.incomplete not in INCOMPLETE:
            raise InputError(
                f"incomplete is {self.incomplete!r}: take {', '.join(INCOMPLETE[:-1])} or {INCOMPLETE[-1]}"
            )
        if self.baseline is None:
            return
        if len(self.fidelities) > 1:
            raise InputError(
                f"a baseline goes with one fidelity, and {len(self.fidelities)} are given: leave the baseline out for "
                "training on several levels, or name one fidelity for delta learning"
            )
        if self.baseline in self.fidelities:
            raise InputError(f"fidelity and baseline are both {self.baseline}: their difference would be 0")
        if self.incomplete == "keep":
            raise InputError("a difference needs both levels: take error or drop for incomplete, not keep")

    @property
    def read(self) -> tuple[int, ...]:
        """The fidelities to read, lowest first: those of the result, or the baseline and the fidelity."""
        return self.fidelities if self.baseline is None else (self.baseline, *self.fidelities)

    def apply(self, structures: Structures) -> tuple[Structures, tuple[str, ...]]:
        """What becomes of the structures that were read, and the labels of those that were dropped.

        Parameters
        ----------
        structures
            With the levels `read`.

        Raises
        ------
        InputError
            A structure lacks a level and must not, or all were dropped.
        """
        structures, dropped = self._complete(structures)
        return (structures if self.baseline is None else difference(structures)), dropped

    def _complete(self, structures: Structures) -> tuple[Structures, tuple[str, ...]]:
        known = structures.known_energies
        lacking = ~known.all(axis=0)
        if self.incomplete == "keep" or not lacking.any():
            return structures, ()
        labels = tuple(structures.labels[i] for i in np.flatnonzero(lacking))
        without = ", ".join(
            f"fidelity {fidelity}: {int(count)}"
            for fidelity, count in zip(self.read, (~known).sum(axis=1), strict=True)
            if count
        )
        if self.incomplete == "error":
            also = "" if self.baseline is not None else ", or keep to train each level on what there is"
            raise InputError(
                f"energies are missing ({without}) of {first_few(labels, _SHOWN)}: set data.incomplete=drop to leave "
                f"these structures out{also}"
            )
        if lacking.all():
            raise InputError(
                f"no structure has energies of all the fidelities {', '.join(map(str, self.read))}: take other files"
            )
        log.info("left out %d of %d structures that lack a level (%s)", len(labels), len(structures), without)
        return structures.select(np.flatnonzero(~lacking)), labels


def difference(structures: Structures) -> Structures:
    """Energies and forces of the highest level minus those of the lowest; forces where both are known, else NaN."""
    forces = None if structures.forces is None else structures.forces[-1] - structures.forces[0]
    if forces is not None and np.isnan(forces).all():
        forces = None
    return replace(structures, energies=structures.energies[-1] - structures.energies[0], forces=forces)


def table(structures: Structures, split: Split, fidelities: Sequence[int], baseline: int | None = None) -> str:
    """How many structures of each part have which level, and how many have forces there, as lines of text."""
    names = [f"fidelity {fidelity}" for fidelity in fidelities]
    if baseline is not None:
        names = [f"fidelity {fidelities[0]} minus {baseline}"]
    energies, forces = structures.known_energies, structures.known_forces
    rows = list(zip(names, energies, forces, strict=True))
    if len(rows) > 1:
        rows.append(("all of them", energies.all(axis=0), forces.all(axis=0)))
    cells = [["level", *PARTS, "with forces"]]
    for name, own, own_forces in rows:
        numbers = [int(own[getattr(split, part)].sum()) for part in PARTS]
        cells.append([name, *map(str, numbers), str(int(own_forces[split.used].sum()))])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([f"{line[0]:<{widths[0]}}"] + [f"{cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True)])
        for line in cells
    )
