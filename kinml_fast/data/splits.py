"""Dividing structures into parts: by counts, fractions or a file; never overlapping.

A split file has one line per structure, words separated by white space:

    C5H5/17 2 -5261.429334316677 train

the label, 2 (training or validation) or -1 (test), the energy in eV (a note only; of several levels of theory the
highest that is known), and the part. PyKinML writes and
reads the first two words; `write_tvtmsk` writes all four, and then the split and its order are restored exactly. One of
PyKinML's HDF5 files is a split file too: its tvtmsk says the part of each of its structures.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kinml_fast.data import pykinml_hdf5
from kinml_fast.data.files import first_few, is_hdf5, replacing
from kinml_fast.data.split import PARTS, Split
from kinml_fast.data.structures import Structures
from kinml_fast.errors import ConfigError, DataError

_MASKS = {"train": 2, "validation": 2, "test": -1}


@dataclass(frozen=True)
class SplitFile:
    """The lines of a split file, in order: labels, masks (2 or −1), and parts if the file has them."""

    path: Path
    labels: tuple[str, ...]
    masks: np.ndarray
    parts: tuple[str, ...] | None

    def ids(self) -> dict[str, set[int]]:
        """For each database or file named, the ids listed."""
        result: dict[str, set[int]] = {}
        for label in self.labels:
            stem, number = label.rsplit("/", 1)
            result.setdefault(stem, set()).add(int(number))
        return result

    def without(self, labels: Collection[str]) -> SplitFile:
        """The file without some of its lines."""
        kept = [i for i, label in enumerate(self.labels) if label not in labels]
        parts = None if self.parts is None else tuple(self.parts[i] for i in kept)
        return SplitFile(self.path, tuple(self.labels[i] for i in kept), self.masks[kept], parts)


@dataclass(frozen=True, eq=False)
class Census:
    """What a division of structures goes by.

    `names` are the formulas, ascending, and `formula` [n] says which of them each structure has; `known_energies` and
    `known_forces` are bool [K, n]; `labels` are empty where they are not needed.
    """

    names: tuple[str, ...]
    formula: np.ndarray
    known_energies: np.ndarray
    known_forces: np.ndarray
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.formula)

    @classmethod
    def of(cls, structures: Structures | Census) -> Census:
        """That of structures."""
        if isinstance(structures, Census):
            return structures
        names, formula = np.unique(np.array(structures.formulas(), dtype=str), return_inverse=True)
        known = structures.known_energies, structures.known_forces
        return cls(tuple(names.tolist()), formula.ravel(), *known, structures.labels)


def make_split(
    structures: Structures | Census,
    amounts: Sequence[float],
    seed: int = 0,
    split_file: str | os.PathLike | None = None,
    dropped: Collection[str] = (),
) -> Split:
    """Choose training, validation and test structures.

    Parameters
    ----------
    structures
        What to choose from.
    amounts
        Training, validation, test. Three whole numbers with a sum above 1 are counts. Otherwise they are fractions
        of all structures with a sum of at most 1. Either is spread over the formulas in proportion to what there is
        of each (largest remainders, ties by lot), so the totals are exact. Of several levels of theory, structures
        that have other levels are divided apart from each other, so that each part has its share of every level.
    seed
        Of the choice and of the order of the training part.
    split_file
        Its test structures are the test part (`amounts[2]` has to be 0 or their number if the amounts are counts).
        Training and validation are chosen among the others: by counts, or all of them in the ratio of the first two
        fractions. A file that says the part of each structure is followed exactly, and `amounts` is not used.
    dropped
        Labels that the split file may name although the structures were left out.

    Raises
    ------
    InputError
        More is asked for than there is, a part comes out empty (test may be 0 if that is what `amounts` say), a
        malformed line, a label that is not among the structures.
    """
    structures = Census.of(structures)
    amounts = _checked_amounts(amounts)
    rng = np.random.default_rng(seed)
    if split_file is None:
        totals = _totals(amounts, len(structures), "the data")
        split = Split(*_stratified(structures, np.arange(len(structures)), totals, rng))
        return _without_empty(split, f"the split {list(amounts)} of {len(structures)} structures", amounts[2] > 0)
    file = read_tvtmsk(split_file)
    if dropped:
        file = file.without(frozenset(dropped))
    indices = _indices(structures, file)
    if file.parts is not None:
        parts = np.array(file.parts)
        split = Split(*(indices[parts == part] for part in PARTS))
        return _without_empty(split, str(file.path), False)
    test = indices[file.masks == -1]
    rest = np.sort(indices[file.masks == 2])
    if _are_counts(amounts):
        if amounts[2] not in (0, len(test)):
            raise ConfigError(
                f"{file.path}: has {len(test)} test structures, but the split asks for {amounts[2]}: write 0 there"
            )
        wanted: tuple[float, float, float] = (amounts[0], amounts[1], 0)
    else:
        share = amounts[0] + amounts[1]
        wanted = (amounts[0] / share, amounts[1] / share, 0.0) if share > 0 else (0.0, 0.0, 0.0)
    totals = _totals(wanted, len(rest), f"the training and validation lines of {file.path}")
    train, validation, _ = _stratified(structures, rest, totals, rng)
    return _without_empty(Split(train, validation, test), str(file.path), False)


def read_tvtmsk(path: str | os.PathLike) -> SplitFile:
    """Read a split file (see the head of this module); empty lines and lines that begin with # are skipped.

    In an HDF5 file tvtmsk is 1 for training, 0 for validation and −1 for test.

    Raises
    ------
    InputError
        The file cannot be read, has no lines, a malformed line, or a label twice.
    """
    path = Path(path)
    if path.is_file() and is_hdf5(path):
        labels, mask = pykinml_hdf5.read_split(path)
        names = tuple({1: "train", 0: "validation", -1: "test"}[value] for value in mask.tolist())
        return SplitFile(path, labels, np.array([_MASKS[name] for name in names]), names)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise DataError(f"{path}: cannot be read as a split file ({reason}): correct the path") from error
    seen: dict[str, int] = {}
    masks: list[int] = []
    parts: list[str | None] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        _check_line(f"{path}:{number}", words)
        if words[0] in seen:
            raise DataError(f"{path}:{number}: {words[0]} is already in line {seen[words[0]]}: keep one of the two")
        seen[words[0]] = number
        masks.append(int(words[1]))
        parts.append(words[3] if len(words) == 4 else None)
        if (parts[-1] is None) != (parts[0] is None):
            raise DataError(
                f"{path}:{number}: some lines say train, validation or test and some do not: write it in all or none"
            )
    if not seen:
        raise DataError(f"{path}: names no structures: it needs lines like 'C5H5/17 2'")
    return SplitFile(path, tuple(seen), np.array(masks), tuple(filter(None, parts)) or None)


def write_tvtmsk(path: str | os.PathLike, structures: Structures, split: Split) -> None:
    """Save a split, its order included, so that `make_split` restores it exactly and PyKinML can read it.

    Raises
    ------
    InputError
        Two structures have the same label, or the file cannot be written.
    """
    _index_of_labels(structures)
    energies = highest_energies(structures)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as text:
        for part in PARTS:
            indices = getattr(split, part)
            text.writelines(lines((structures.labels[i] for i in indices.tolist()), energies[indices], part))


def lines(labels: Iterable[str], energies: np.ndarray, part: str) -> Iterator[str]:
    """The lines of a split file for structures of one part with these energies, those of the highest known level."""
    for label, energy in zip(labels, energies.tolist(), strict=True):
        yield f"{label} {_MASKS[part]} {energy!r} {part}\n"


def table(structures: Structures | Census, split: Split, limit: int = 20) -> str:
    """How many structures of each formula are in each part, as lines of text with a total; at most `limit` formulas."""
    census = Census.of(structures)
    formulas, group = census.names, census.formula
    columns = [np.bincount(group[getattr(split, part)], minlength=len(formulas)) for part in PARTS]
    columns.append(np.bincount(group, minlength=len(formulas)) - sum(columns))
    rows = [(str(name), *(int(column[i]) for column in columns)) for i, name in enumerate(formulas)]
    shown = rows[:limit]
    if len(rows) > limit:
        rest = np.array([row[1:] for row in rows[limit:]]).sum(axis=0).tolist()
        shown.append((f"{len(rows) - limit} more", *rest))
    shown.append(("all", *(int(column.sum()) for column in columns)))
    header = ("formula", *PARTS, "unused")
    widths = [max(len(str(row[i])) for row in [header, *shown]) for i in range(len(header))]
    return "\n".join(
        "  ".join([f"{row[0]:<{widths[0]}}"] + [f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True)])
        for row in [header, *shown]
    )


def level_table(
    structures: Structures | Census, split: Split, fidelities: Sequence[int], baseline: int | None = None
) -> str:
    """How many structures of each part have which level, and how many have forces there, as lines of text."""
    names = [f"fidelity {fidelity}" for fidelity in fidelities]
    if baseline is not None:
        names = [f"fidelity {fidelities[0]} minus {baseline}"]
    energies, forces = structures.known_energies, structures.known_forces
    rows = list(zip(names, energies, forces, strict=True))
    if len(rows) > 1:
        rows.append(("all of them", energies.all(axis=0), forces.all(axis=0)))
    cells = [["level", *PARTS, "with forces"]]
    for name, with_energy, with_forces in rows:
        numbers = [int(with_energy[getattr(split, part)].sum()) for part in PARTS]
        cells.append([name, *map(str, numbers), str(int(with_forces[split.used].sum()))])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([f"{line[0]:<{widths[0]}}"] + [f"{cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True)])
        for line in cells
    )


def _checked_amounts(amounts: Sequence[float]) -> tuple[float, float, float]:
    if len(amounts) != 3 or any(not math.isfinite(a) or a < 0 for a in amounts):
        raise ConfigError(f"the split is {list(amounts)}: give three numbers for training, validation and test")
    train, validation, test = amounts
    if not _are_counts((train, validation, test)):
        return train, validation, test
    if any(a != int(a) for a in amounts):
        raise ConfigError(
            f"the split {list(amounts)} is neither three counts nor three fractions with a sum of at most 1: correct it"
        )
    return int(train), int(validation), int(test)


def _are_counts(amounts: tuple[float, float, float]) -> bool:
    # Fractions like 0.7, 0.2, 0.1 may add up to a little more than 1.
    return sum(amounts) > 1 + 1e-9


def _totals(amounts: tuple[float, float, float], available: int, source: str) -> tuple[int, int, int]:
    total = sum(amounts)
    if _are_counts(amounts):
        if total > available:
            raise ConfigError(
                f"the split {list(amounts)} asks for {total} structures, but there are only {available} in {source}: "
                "ask for fewer"
            )
        train, validation, test = map(int, amounts)
    else:
        quotas = np.array([*amounts, max(0.0, 1 - total)]) * available
        train, validation, test, _ = _largest_remainder(quotas, available, np.arange(4)).tolist()
    return train, validation, test


def _stratified(
    structures: Census, candidates: np.ndarray, totals: tuple[int, int, int], rng: np.random.Generator
) -> list[np.ndarray]:
    # Part after part takes its share of what is left of each stratum; so none can give more than it has. Strata are
    # the sets of levels that structures have, and within each the formulas.
    kinds = np.zeros(len(structures), dtype=np.int64)
    if len(structures.known_energies) > 1:
        kinds = np.unique(structures.known_energies, axis=1, return_inverse=True)[1].ravel()
    strata = []
    for kind in np.unique(kinds[candidates]):
        members = candidates[kinds[candidates] == kind]
        _, formula = np.unique(structures.formula[members], return_inverse=True)
        strata.append([rng.permutation(members[formula == i]) for i in range(formula.max() + 1)])
    chosen = []
    for total in totals:
        totals_of_strata = _shares([sum(map(len, pools)) for pools in strata], total, rng)
        taken = [candidates[:0]]
        for pools, wanted in zip(strata, totals_of_strata, strict=True):
            shares = _shares([len(pool) for pool in pools], wanted, rng)
            taken += [pool[:n] for pool, n in zip(pools, shares, strict=True)]
            pools[:] = [pool[n:] for pool, n in zip(pools, shares, strict=True)]
        chosen.append(np.concatenate(taken))
    train, validation, test = chosen
    return [rng.permutation(train), np.sort(validation), np.sort(test)]


def _shares(left: Sequence[int], total: int, rng: np.random.Generator) -> np.ndarray:
    """How many of the `total` each pool gives, in proportion to how many are left in it."""
    if len(left) < 2:
        return np.full(len(left), total)
    available = np.array(left, dtype=np.float64)
    return _largest_remainder(available * (total / max(available.sum(), 1)), total, rng.permutation(len(left)))


def _largest_remainder(quotas: np.ndarray, total: int, order: np.ndarray) -> np.ndarray:
    # Whole numbers next to the quotas with the sum `total`; `order` decides between equal remainders. The rounding
    # keeps 0.1 * 30 = 3.0000000000000004 from counting as a remainder.
    quotas = np.round(quotas, 9)
    shares = np.floor(quotas).astype(np.int64)
    ranking = np.lexsort((order, -(quotas - shares)))
    shares[ranking[: total - shares.sum()]] += 1
    return shares


def _without_empty(split: Split, source: str, test_wanted: bool) -> Split:
    for part in PARTS:
        if len(getattr(split, part)) == 0 and (part != "test" or test_wanted):
            raise DataError(f"{source} leaves no {part} structures: enlarge its {part} part or take more data")
    return split


def highest_energies(structures: Structures) -> np.ndarray:
    """Of each structure the energy of the highest level that is known, float64 [n_structures], eV; NaN without any."""
    if structures.energies is None:
        return np.full(len(structures), np.nan)
    energies = np.full(len(structures), np.nan)
    by_level = structures.energies.reshape(structures.levels, -1)
    for at_level, known in zip(by_level, structures.known_energies, strict=True):
        energies[known] = at_level[known]
    return energies


def _index_of_labels(structures: Structures | Census) -> dict[str, int]:
    index = {label: i for i, label in enumerate(structures.labels)}
    if len(index) < len(structures):
        twice = next(label for i, label in enumerate(structures.labels) if index[label] != i)
        raise DataError(f"two structures have the label {twice}: a split file needs different ones, rename a file")
    return index


def _indices(structures: Census, file: SplitFile) -> np.ndarray:
    index = _index_of_labels(structures)
    unknown = [label for label in file.labels if label not in index]
    if unknown:
        raise DataError(
            f"{file.path}: names structures that are not in the data: {first_few(unknown)}: "
            "add their files or remove the lines"
        )
    return np.array([index[label] for label in file.labels], dtype=np.int64)


def _check_line(where: str, words: list[str]) -> None:
    stem, _, number = words[0].rpartition("/")
    good = stem and number.isdecimal() and len(words) in (2, 3, 4) and words[1] in ("2", "-1")
    if good and len(words) > 2:
        try:
            float(words[2])
        except ValueError:
            good = False
    if good and len(words) == 4:
        good = words[3] in PARTS and str(_MASKS[words[3]]) == words[1]
    if not good:
        raise DataError(
            f"{where}: '{' '.join(words)[:60]}' is not a line of a split file: expected a label, 2 or -1, and at most "
            "an energy and train, validation (with 2) or test (with -1)"
        )
