"""What is taken of data files: one description for the readers, for the preparation of data and for evaluation."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from ase.io.formats import ioformats

from kinml_fast.errors import ConfigError

INCOMPLETE = ("error", "drop", "keep")
"""What can happen to structures that lack a level of theory."""


@dataclass(frozen=True)
class Selection:
    """What is taken of data files, as a user writes it.

    Parameters
    ----------
    fidelity
        Level of theory, or several, lowest first, which the structures then have. For databases these are the
        fidelities to take; of files that ASE reads one level is one key, see below; HDF5 files have one level.
    baseline
        Level that is subtracted (delta learning): energies, forces and stresses are E(fidelity) - E(baseline).
    incomplete
        What becomes of structures that lack a level, one of `INCOMPLETE`; with "keep", unknown energies and forces are
        NaN. None: "error" with a baseline, else "keep".
    temperature
        Databases: only geometries sampled at exactly this temperature (K); None: those above 0.
    names
        Databases: SQL LIKE patterns (`%` any text, `_` any character); a geometry is taken if its name fits any.
    ids
        For each database, by its file name without `.db`, the only ids to take; databases that are not named are left
        out. Other files have no such marks and are taken whole.
    energy_key, forces_key
        Files that ASE reads: names of the energy (eV) and of the forces (eV/Å), see `xyz.read`; what has "grad" in its
        name is a gradient. Of several fidelities lists with one for each, with a baseline its name and that of the
        fidelity.
    stress_key
        Likewise of the stress (eV/Å³, ASE's sign), or of the virial (eV) if "virial" is part of the name.
    format
        Of the files that ASE reads, by its name for it ("extxyz", "vasp-out"; `ase info --formats` has all); None: what
        the suffix of each says, or its contents.
    elements
        Order of `Structures.species`; None: those that occur, alphabetically.

    Raises
    ------
    InputError
        A combination that has no meaning.
    """

    fidelity: int | Sequence[int] = 1
    baseline: int | None = None
    incomplete: str | None = None
    temperature: float | None = None
    names: Sequence[str] | None = None
    ids: Mapping[str, Collection[int]] | None = None
    energy_key: str | Sequence[str] | None = None
    forces_key: str | Sequence[str] | None = None
    stress_key: str | Sequence[str] | None = None
    format: str | None = None
    elements: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray | Sequence) and not isinstance(value, str):
                object.__setattr__(self, field.name, tuple(value))
        if not self.fidelities or len(set(self.fidelities)) < len(self.fidelities):
            raise ConfigError(
                f"the fidelities are {list(self.fidelities)}: name at least one, lowest first, and each once"
            )
        if self.if_incomplete not in INCOMPLETE:
            raise ConfigError(
                f"incomplete is {self.incomplete!r}: take {', '.join(INCOMPLETE[:-1])} or {INCOMPLETE[-1]}"
            )
        if self.format is not None and self.format not in ioformats:
            close = difflib.get_close_matches(self.format, ioformats, 1)
            raise ConfigError(
                f"the format {self.format!r} is none of ASE's{f' (did you mean {close[0]}?)' if close else ''}: "
                "`ase info --formats` shows its names"
            )
        if self.baseline is not None:
            self._check_difference()

    def _check_difference(self) -> None:
        if len(self.fidelities) > 1:
            raise ConfigError(
                f"a baseline goes with one fidelity, and {len(self.fidelities)} are given: leave the baseline out for "
                "training on several levels, or name one fidelity for delta learning"
            )
        if self.baseline in self.fidelities:
            raise ConfigError(f"fidelity and baseline are both {self.baseline}: their difference would be 0")
        if self.if_incomplete == "keep":
            raise ConfigError("a difference needs both levels: take error or drop for incomplete, not keep")

    @property
    def fidelities(self) -> tuple[int, ...]:
        """The levels of theory that the structures have in the end, lowest first."""
        several = (self.fidelity,) if isinstance(self.fidelity, int | np.integer) else self.fidelity
        return tuple(map(int, several))

    @property
    def fidelities_read(self) -> tuple[int, ...]:
        """The levels of theory to read, lowest first: those of the result, or the baseline and the fidelity."""
        return self.fidelities if self.baseline is None else (self.baseline, *self.fidelities)

    @property
    def if_incomplete(self) -> str:
        """What becomes of structures that lack a level, one of `INCOMPLETE`."""
        return self.incomplete or ("keep" if self.baseline is None else "error")

    def settings(self) -> dict[str, object]:
        """All but the ids, as plain values: what decides whether data that were prepared are the same."""
        later = "stress_key", "format"  # which were not there yet when some data were prepared
        without = {"ids"} | {name for name in later if getattr(self, name) is None}
        written = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in without}
        return written | {
            "fidelity": self.fidelities,
            "incomplete": self.if_incomplete,
            "temperature": None if self.temperature is None else float(self.temperature),
        }
