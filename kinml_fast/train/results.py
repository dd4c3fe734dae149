"""What is said about a run at its end: its summary and its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kinml_fast import report
from kinml_fast.metrics import Errors
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.metrics import Residuals, ResidualSums
from kinml_fast.train.window import Window


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    `errors` are those of the energies of the best model (lowest score) on each split that is not empty, `forces` those
    of its forces on each split that has any, `stresses` those of stresses that were trained on; with several levels of
    theory, those of the highest. `lower` has the same three of each lower level, by fidelity.
    """

    epochs: int
    best_epoch: int
    errors: dict[str, Errors]
    seconds: float
    forces: dict[str, Errors] = field(default_factory=dict)
    lower: dict[int, tuple[dict[str, Errors], ...]] = field(default_factory=dict)
    stresses: dict[str, Errors] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        sums: Mapping[str, Sequence[ResidualSums]],
        fidelities: Sequence[int],
        epochs: int,
        best_epoch: int,
        seconds: float,
    ) -> Summary:
        """The summary of a run by the sums of residuals of each part at each of its levels of theory, lowest first."""
        found = []
        for level in range(len(fidelities)):
            errors = {part: of_levels[level].errors() for part, of_levels in sums.items()}
            of_kinds = [{part: of_part[kind] for part, of_part in errors.items()} for kind in range(3)]
            found.append(tuple({p: e for p, e in of_kind.items() if e is not None} for of_kind in of_kinds))
        *lower, (energies, forces, stresses) = found
        of_lower = dict(zip(fidelities[:-1], lower, strict=True))
        return cls(epochs, best_epoch, energies, seconds, forces, of_lower, stresses)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Summary:
        """The summary of what `dataclasses.asdict` has made of it, also when it went through JSON."""

        def of_parts(errors: Mapping[str, Mapping[str, float]]) -> dict[str, Errors]:
            return {part: Errors(**numbers) for part, numbers in errors.items()}

        lower = {int(fidelity): tuple(map(of_parts, of_kinds)) for fidelity, of_kinds in values["lower"].items()}
        found = {name: of_parts(values[name]) for name in ("errors", "forces", "stresses")} | {"lower": lower}
        return cls(**{**values, **found})


class Comparisons:
    """The best model's predictions of each part at each of so many levels of theory, for the report of a run."""

    def __init__(self, levels: int) -> None:
        self._energies: list[dict[str, report.Compared]] = [{} for _ in range(levels)]
        self._forces: list[dict[str, report.Compared]] = [{} for _ in range(levels)]
        self._stresses: list[dict[str, report.Compared]] = [{} for _ in range(levels)]

    def add(self, part: str, window: Window, where: slice, residuals: Sequence[Residuals]) -> None:
        """Count the residuals at each level of some structures of a part."""
        for level, found in enumerate(residuals):
            labels, reference = window.known_reference(where, level)
            of_energies = self._energies[level].setdefault(part, report.Compared())
            of_energies.add(labels.__getitem__, reference, reference + found.energies)
            if found.forces is not None and found.forces.size:
                places, reference = window.known_force_reference(where, level)
                of_forces = self._forces[level].setdefault(part, report.Compared())
                name = _names(window.labels, places)
                of_forces.add(name, reference, reference + found.forces.ravel())
            if found.stresses is not None and found.stresses.size:
                places, reference = window.known_stress_reference(where, level)
                of_stresses = self._stresses[level].setdefault(part, report.Compared())
                of_stresses.add(_names(window.labels, places), reference, reference + found.stresses.ravel())

    def write(self, folder: RunFolder, fidelities: Sequence[int], best_epoch: int) -> str:
        """Draw curves and predictions into the run folder, write the table of errors there, and return it.

        Parameters
        ----------
        folder
            Of the run; its metrics.csv is written.
        fidelities
            Names of the levels of theory, lowest first.
        best_epoch
            Is marked.
        """
        *of_lower, (energies, forces, stresses) = zip(self._energies, self._forces, self._stresses, strict=True)
        lower = dict(zip(fidelities[:-1], of_lower, strict=True))
        compared = energies, forces, best_epoch, lower, stresses
        return report.table(report.write_report(folder.report, folder.metrics, *compared))


def _names(labels: Sequence[str], places: np.ndarray) -> Callable[[int], str]:
    return lambda i: labels[int(places[i])]
