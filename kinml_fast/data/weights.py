"""Weights of single structures in the loss."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kinml_fast.data.files import first_few
from kinml_fast.errors import DataError


def resolve(weights: str | os.PathLike | Mapping[str, float], labels: Sequence[str]) -> np.ndarray:
    """The weight of each structure.

    Parameters
    ----------
    weights
        Weights by label ("C5H5/17") or SQL LIKE pattern of labels (`%` any text, `_` any character, upper and lower
        case are different), or a text file with such a label or pattern and a weight in each line; empty lines and
        lines that begin with # are skipped. Of several that fit a structure the last counts; one that none fits has
        the weight 1. A weight of 0 leaves a structure out of the loss.
    labels
        Those of the structures.

    Returns
    -------
    ndarray
        float64 [n_structures].

    Raises
    ------
    InputError
        The file cannot be read or has a malformed line, a weight is negative or not finite, or a label or pattern fits
        no structure.
    """
    if isinstance(weights, Mapping):
        source, entries = "data.weights", list(weights.items())
    else:
        source, entries = str(weights), _read(Path(weights))
    found = np.ones(len(labels))
    places = {label: i for i, label in enumerate(labels)}
    unknown = []
    for entry, weight in entries:
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"{source}: {entry} has the weight {weight}: give a number that is not negative")
        if entry in places:
            found[places[entry]] = weight
            continue
        members = _like(entry, labels) if "%" in entry or "_" in entry else []
        found[members] = weight
        if not len(members):
            unknown.append(entry)
    if unknown:
        raise DataError(
            f"{source}: no structure of the data is called {first_few(unknown)} (the first is {labels[0]}): "
            "correct the label or pattern, or leave it out"
        )
    return found


def table(weights: np.ndarray) -> str:
    """How many structures have which weight, as text: "1 (1800 structures), 2.5 (200)"."""
    values, counts = np.unique(weights, return_counts=True)
    if len(values) > 8:
        return f"{len(values)} different ones from {values[0]:g} to {values[-1]:g}, mean {weights.mean():.4g}"
    first, *others = (f"{value:g} ({count}" for value, count in zip(values, counts, strict=True))
    return ", ".join([f"{first} structures)", *(f"{other})" for other in others)])


def _like(pattern: str, labels: Iterable[str]) -> list[int]:
    wildcards = {"%": ".*", "_": "."}
    fits = re.compile("".join(wildcards.get(c, re.escape(c)) for c in pattern), re.DOTALL).fullmatch
    return [i for i, label in enumerate(labels) if fits(label)]


def _read(path: Path) -> list[tuple[str, float]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise DataError(f"{path}: cannot be read as a file of weights ({reason}): correct the path") from error
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            label, weight = words
            entries.append((label, float(weight)))
        except ValueError:
            raise DataError(
                f"{path}:{number}: expected a label and a weight like 'C5H5/17 2.5', found {line.strip()!r}"
            ) from None
    return entries
