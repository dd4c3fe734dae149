"""What is said about a run at its end: its summary and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kinml_fast import report
from kinml_fast.metrics import Errors
from kinml_fast.train.dataset import Dataset
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.metrics import Residuals


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    `errors` are those of the energies of the best model (lowest score) on each split that is not empty, `forces` those
    of its forces on each split that has any; with several levels of theory, those of the highest. `lower` has the same
    two of each lower level, by fidelity.
    """

    epochs: int
    best_epoch: int
    errors: dict[str, Errors]
    seconds: float
    forces: dict[str, Errors] = field(default_factory=dict)
    lower: dict[int, tuple[dict[str, Errors], dict[str, Errors]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        residuals: Mapping[str, Sequence[Residuals]],
        fidelities: Sequence[int],
        epochs: int,
        best_epoch: int,
        seconds: float,
    ) -> Summary:
        """The summary of a run by the residuals of each part at each of its levels of theory, lowest first."""
        found = []
        for level in range(len(fidelities)):
            errors = {part: of_levels[level].errors() for part, of_levels in residuals.items()}
            energies = {part: energy for part, (energy, _) in errors.items() if energy is not None}
            forces = {part: of_forces for part, (_, of_forces) in errors.items() if of_forces is not None}
            found.append((energies, forces))
        *lower, (energies, forces) = found
        return cls(epochs, best_epoch, energies, seconds, forces, dict(zip(fidelities[:-1], lower, strict=True)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Summary:
        """The summary of what `dataclasses.asdict` has made of it, also when it went through JSON."""

        def of_parts(errors: Mapping[str, Mapping[str, float]]) -> dict[str, Errors]:
            return {part: Errors(**numbers) for part, numbers in errors.items()}

        lower = {int(fidelity): (of_parts(e), of_parts(f)) for fidelity, (e, f) in values["lower"].items()}
        found = {"errors": of_parts(values["errors"]), "forces": of_parts(values["forces"]), "lower": lower}
        return cls(**{**values, **found})


def write_report(
    folder: RunFolder,
    data: Dataset,
    fidelities: Sequence[int],
    residuals: Mapping[str, Sequence[Residuals]],
    best_epoch: int,
) -> str:
    """Draw curves and predictions into the run folder, and write the table of errors.

    Parameters
    ----------
    folder
        Of the run; its metrics.csv is written.
    data
        Says what the structures are called and what the reference values are.
    fidelities
        Names of the levels of theory, lowest first.
    residuals
        Of each part at each level, by the best model.
    best_epoch
        Is marked.

    Returns
    -------
    str
        The table.
    """

    comparisons = []
    for level in range(data.levels):
        energies, forces = {}, {}
        for part, of_levels in residuals.items():
            found = of_levels[level]
            labels, reference = data.known_reference(part, level)
            energies[part] = (labels, reference, reference + found.energies)
            if found.forces is not None and found.forces.size:
                labels, reference = data.known_force_reference(part, level)
                forces[part] = (labels, reference, reference + found.forces.ravel())
        comparisons.append((energies, forces))
    lower = dict(zip(fidelities[:-1], comparisons[:-1], strict=True))
    return report.table(report.write_report(folder.report, folder.metrics, *comparisons[-1], best_epoch, lower))
