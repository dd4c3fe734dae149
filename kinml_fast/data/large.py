"""Training data that are read from disk while they are needed, and their preparation in little memory.

`prepare` goes through the data files once and writes all structures into a file of blocks, in the order of the files.
What it keeps of each structure in memory are its formula and its energies, by which the data are divided and
single-atom energies fitted. Then it goes through that file as often as it takes to write the structures of each part in
the order of the split, a quarter of a gigabyte at a time.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from kinml_fast.data import blocks, plausible, prepared, sources, splits
from kinml_fast.data import sae as sae_module
from kinml_fast.data import weights as weights_module
from kinml_fast.data.blocks import BlockFile, Piece
from kinml_fast.data.fidelities import complete, difference
from kinml_fast.data.files import replacing
from kinml_fast.data.selection import Selection
from kinml_fast.data.split import PARTS, Split
from kinml_fast.data.splits import Census
from kinml_fast.data.structures import Structures
from kinml_fast.errors import DataError, InputError

_log = logging.getLogger(__name__)

AT_ONCE = 1 << 14
"""Structures that are read together."""

SORTED_BYTES = 1 << 28
"""What is put into its order together takes about so much."""


@dataclass(frozen=True, eq=False)
class LargeData:
    """Structures in a file of blocks, divided and ready to train on: `TrainingData` that may be larger than memory.

    Parameters
    ----------
    file
        The structures of each part.
    sae
        As in `TrainingData`.
    """

    file: BlockFile
    sae: np.ndarray | None

    @property
    def elements(self) -> tuple[str, ...]:
        """In the order of `sae`."""
        return self.file.elements

    @property
    def fidelities(self) -> tuple[int, ...]:
        """The levels of theory, lowest first."""
        return tuple(self.file.about["fidelities"])

    @property
    def baseline(self) -> int | None:
        """The level that was subtracted, see `Prepared`."""
        return self.file.about["baseline"]

    @property
    def tables(self) -> Sequence[str]:
        """Texts that say how the structures are divided."""
        return self.file.about["tables"]


def load(path: str | os.PathLike) -> LargeData:
    """Open what `prepare` wrote.

    Raises
    ------
    InputError
        The file is missing, damaged, or of another kind.
    """
    file = BlockFile(path)
    try:
        sae = np.array(file.about["sae"], dtype=np.float64)
        data = LargeData(file, sae[0] if len(sae) == 1 else sae)
        if len(data.fidelities) != file.levels or sae.shape != (file.levels, len(file.elements)):
            raise ValueError("its single-atom energies do not fit")
        return data
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is damaged ({error}): run kinml-fast prepare again") from error


def prepare(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    selection: Selection = Selection(),
    *,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    split_file: str | os.PathLike | None = None,
    split_seed: int = 0,
    sae: str | Mapping[str, float] | Sequence[str | Mapping[str, float]] = "fit",
    weights: str | os.PathLike | Mapping[str, float] | None = None,
    descriptor: Mapping[str, object] | None = None,
    path: str | os.PathLike,
) -> LargeData:
    """What `prepared.prepare` does, with the same division, in little memory; the result is the file `path`.

    With a split file, or with weights, the labels of all structures are in memory.

    Raises
    ------
    InputError
        As `prepared.prepare`; structures without coordinates.
    """
    path = Path(path)
    paths, _, settings, digest = prepared.recognise(
        files, selection, split, split_file, split_seed, sae, weights, descriptor
    )
    prepared.check_path(path, paths, blocks.is_ours)
    ready = _up_to_date(path, digest)
    if ready is not None:
        return ready
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be made ({error.strerror}): choose another folder") from error
    unordered = path.with_name(f".{path.name}.unordered.part")
    try:
        found = _Survey(selection, bool(split_file or weights))
        form: dict[str, Any] = {"elements": chemical_symbols[1:], "levels": len(selection.fidelities)}
        pieces = (("train", piece) for piece in found.pieces(paths))
        blocks.write(unordered, pieces, **form, forces=True, weights=False, cells=True, stresses=True, about={})
        file, census = BlockFile(unordered), found.census()
        loss_weights = None if weights is None else weights_module.resolve(weights, census.labels)
        chosen = splits.make_split(census, split, split_seed, split_file, found.dropped)
        prepared.check_levels(census.known_energies, chosen, selection.fidelities)
        if loss_weights is not None and not loss_weights[chosen.train].any():
            raise DataError("the weights of all training structures are 0: give some of them a weight")
        elements = selection.elements or found.elements
        for doubt in plausible.untrained_elements(elements, found.present(elements), chosen):
            _log.warning("%s", doubt)
        energies = found.sae(sae, elements, np.concatenate([chosen.train, chosen.validation]))
        tables = [splits.table(census, chosen)]
        if len(selection.fidelities) > 1 or selection.baseline is not None:
            tables.append(splits.level_table(census, chosen, selection.fidelities, selection.baseline))
        about = {
            "hash": digest,
            "fidelities": selection.fidelities,
            "baseline": selection.baseline,
            "descriptor": settings["descriptor"],
            "sae": energies.reshape(len(selection.fidelities), -1).tolist(),
            "tables": tables,
        }
        found_some = {
            "forces": bool(census.known_forces.any()),
            "cells": found.has_crystals,
            "stresses": found.has_stresses,
        }
        blocks.write(
            path,
            _ordered(file, chosen, elements, loss_weights, **found_some),
            elements=elements,
            levels=len(selection.fidelities),
            **found_some,
            weights=loss_weights is not None,
            about=about,
        )
    finally:
        unordered.unlink(missing_ok=True)
    _log.info("%s: %.1f GB", path, path.stat().st_size / 1e9)
    return load(path)


def write_split(path: str | os.PathLike, data: LargeData) -> None:
    """The division as a split file, see `splits`.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as text:
        for part in PARTS:
            for number in data.file.blocks(part)[0]:
                structures = data.file.read([int(number)]).structures
                text.writelines(splits.lines(structures.labels, splits.highest_energies(structures), part))


class _Survey:
    """What is known of the structures after they were read once.

    Parameters
    ----------
    selection
        What to take of the files.
    labelled
        Whether labels are needed.

    Attributes
    ----------
    dropped : list of str
        Labels of structures that were left out because they lack a level.
    has_crystals, has_stresses : bool
        Whether any structure is periodic, or has a stress.
    """

    def __init__(self, selection: Selection, labelled: bool) -> None:
        self._selection, self._labelled = selection, labelled
        self._formulas: dict[str, int] = {}
        self._counts: list[Counter[str]] = []
        self._formula: list[np.ndarray] = []
        self._energies: list[np.ndarray] = []
        self._known_forces: list[np.ndarray] = []
        self._labels: list[str] = []
        self.dropped: list[str] = []
        self.has_crystals = self.has_stresses = False

    def pieces(self, paths: Sequence[Path]) -> Iterator[Piece]:
        """The structures of files, their species by atomic number."""
        selection, count = self._selection, 0
        known = np.zeros(len(selection.fidelities_read), dtype=bool)
        for structures in sources.pieces(paths, selection, AT_ONCE):
            known |= structures.known_energies.any(axis=1)
            lacking = ~structures.known_energies.all(axis=0)
            if selection.if_incomplete == "drop" and lacking.any():
                self.dropped += [structures.labels[i] for i in np.flatnonzero(lacking)]
                if lacking.all():
                    continue
                structures = structures.select(np.flatnonzero(~lacking))
            structures, _ = complete(structures, selection)
            if selection.baseline is not None:
                structures = difference(structures)
            if structures.coordinates is None:
                raise DataError(
                    f"{structures.labels[0]} has no coordinates, only stored descriptors: set data.on_disk=false and "
                    "training.jacobian=stored"
                )
            if count == 0:
                for doubt in plausible.of_structures(structures, selection.baseline is not None):
                    _log.warning("of the first %d structures: %s", len(structures), doubt)
            numbered = structures.with_elements(chemical_symbols[1:])
            yield Piece(self._counted(numbered), np.arange(count, count + len(structures)), None)
            count += len(structures)
        sources.absent(selection, known.tolist(), paths)
        if not count:
            raise DataError("no structure has energies of all the fidelities that are asked for: take other files")
        if self.dropped:
            _log.info("left out %d of %d structures that lack a level", len(self.dropped), count + len(self.dropped))

    def _counted(self, structures: Structures) -> Structures:
        assert structures.energies is not None
        names, firsts, inverse = np.unique(
            np.array(structures.formulas(), dtype=str), return_index=True, return_inverse=True
        )
        for name, first in zip(names.tolist(), firsts.tolist(), strict=True):
            if name not in self._formulas:
                self._formulas[name] = len(self._formulas)
                self._counts.append(Counter(structures.symbols(first)))
        numbers = np.array([self._formulas[name] for name in names.tolist()], dtype=np.int32)
        self._formula.append(numbers[inverse.ravel()])
        self._energies.append(structures.energies.reshape(structures.levels, -1))
        self._known_forces.append(structures.known_forces)
        self.has_crystals |= bool(structures.are_crystals.any())
        self.has_stresses |= bool(structures.known_stresses.any())
        if self._labelled:
            self._labels += structures.labels
        return structures

    @property
    def elements(self) -> tuple[str, ...]:
        """Those that occur, alphabetically."""
        return tuple(sorted({symbol for counts in self._counts for symbol in counts}))

    def present(self, elements: Sequence[str]) -> np.ndarray:
        """Which elements occur in each structure, bool [n_structures, n_elements]."""
        of_formulas = np.array([[element in counts for element in elements] for counts in self._counts])
        return of_formulas[np.concatenate(self._formula)]

    def census(self) -> Census:
        """What the division goes by."""
        names = sorted(self._formulas)
        place = np.empty(len(names), dtype=np.int32)
        for i, name in enumerate(names):
            place[self._formulas[name]] = i
        known = ~np.isnan(np.concatenate(self._energies, axis=1))
        known_forces = np.concatenate(self._known_forces, axis=1)
        return Census(tuple(names), place[np.concatenate(self._formula)], known, known_forces, tuple(self._labels))

    def sae(
        self,
        setting: str | Mapping[str, float] | Sequence[str | Mapping[str, float]],
        elements: Sequence[str],
        fitted: np.ndarray,
    ) -> np.ndarray:
        """Single-atom energies, fitted to some of the structures; see `sae.resolve_levels`."""
        formula, energies = np.concatenate(self._formula)[fitted], np.concatenate(self._energies, axis=1)[:, fitted]
        n_formulas = len(self._counts)
        counts = np.array([[of_one[element] for element in elements] for of_one in self._counts])
        means, numbers = np.full((len(energies), n_formulas), np.nan), np.zeros((len(energies), n_formulas))
        for k, at_level in enumerate(energies):
            known = ~np.isnan(at_level)
            numbers[k] = np.bincount(formula[known], minlength=n_formulas)
            sums = np.bincount(formula[known], weights=at_level[known], minlength=n_formulas)
            means[k] = np.where(numbers[k] > 0, sums / np.maximum(numbers[k], 1), np.nan)
        # Differences of levels do not contain the energies of single atoms: those start at 0.
        start = None if self._selection.baseline is None else np.zeros(len(elements))
        if len(means) == 1:
            means, numbers = means[0], numbers[0]
        return sae_module.resolve_levels(setting, counts, means, elements, start, numbers)


def _ordered(
    file: BlockFile,
    split: Split,
    elements: Sequence[str],
    weights: np.ndarray | None,
    *,
    forces: bool,
    cells: bool,
    stresses: bool,
) -> Iterator[tuple[str, Piece]]:
    """The structures of an unordered file in the order of a split, a part of the file at a time."""
    used = np.sort(split.used)
    # From atomic numbers without the 0 of a dummy atom.
    species = np.zeros(len(chemical_symbols) - 1, dtype=np.int64)
    species[[chemical_symbols.index(element) - 1 for element in elements]] = np.arange(len(elements))
    numbers, _, lengths = file.blocks("train")
    at_once = max(1, int(SORTED_BYTES * sum(file.sizes.values()) // max(1, lengths.sum())))
    for part in PARTS:
        wanted = getattr(split, part)
        for first in range(0, len(wanted), at_once):
            some = wanted[first : first + at_once]
            piece = _taken(file, numbers, some)
            s = piece.structures
            structures = Structures.trusted(
                elements=tuple(elements),
                species=species[s.species],
                coordinates=s.coordinates,
                offsets=s.offsets,
                energies=s.energies,
                forces=s.forces if forces else None,
                labels=s.labels,
                cells=s.cells if cells else None,
                periodic=s.periodic if cells else None,
                stresses=s.stresses if stresses else None,
            )
            yield part, Piece(structures, np.searchsorted(used, some), None if weights is None else weights[some])


def _taken(file: BlockFile, numbers: np.ndarray, wanted: np.ndarray) -> Piece:
    """Structures of an unordered file, which are numbered by their origin, in the order of `wanted`."""
    ascending, found = np.sort(wanted), []
    for number in numbers.tolist():
        piece = file.read([number])
        first = int(piece.origin[0])
        inside = ascending[np.searchsorted(ascending, first) : np.searchsorted(ascending, first + len(piece))]
        if len(inside):
            found.append(piece.select(inside - first))
    return blocks.join(found).select(np.searchsorted(ascending, wanted))


def _up_to_date(path: Path, digest: str) -> LargeData | None:
    if not path.exists():
        return None
    try:
        ready = load(path)
    except InputError as error:
        _log.warning("%s; preparing the data anew", error)
        return None
    if ready.file.about.get("hash") != digest:
        _log.info("%s: data or settings have changed; preparing the data anew", path)
        return None
    _log.info("%s: up to date, %d structures", path, sum(ready.file.sizes.values()))
    return ready
