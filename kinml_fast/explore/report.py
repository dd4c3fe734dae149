"""The report on an exploration: a table of the rounds, and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kinml_fast.data.files import replacing
from kinml_fast.explore.config import ExploreConfig
from kinml_fast.explore.folder import ExploreFolder
from kinml_fast.report import COLOURS, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = ("certain", "uncertain", "lost", "broken")
_UNITS = {"forces": "eV/Å", "energy": "eV"}


def write(folder: ExploreFolder, config: ExploreConfig, results: Sequence[Mapping[str, Any]]) -> None:
    """Write rounds.csv, rounds.png (errors, what was added, what was seen) and surprises.png (deviations and errors).

    Raises
    ------
    InputError
        A file cannot be written.
    """
    with drawn(folder.report / "rounds.png", 9.0, 8.0) as figure:
        axes = figure.subplots(2, 2)
        _draw_errors(axes[0, 0], results, "energy", "energy RMSE, kcal/mol")
        _draw_errors(axes[0, 1], results, "forces", "force RMSE, kcal/mol/Å")
        _draw_stacks(axes[1, 0], results, [one["added"] for one in results], "structures added")
        seen = [_sums(one["counts"]) | {"duplicates": one["duplicates"]} for one in results]
        _draw_stacks(axes[1, 1], results, seen, "geometries looked at")
    if any(one["surprises"] for one in results):
        with drawn(folder.report / "surprises.png", 5.0, 4.5) as figure:
            _draw_surprises(figure.subplots(), config, results)
    _write_table(folder, results)


def _draw_errors(ax: Axes, results: Sequence[Mapping[str, Any]], quantity: str, label: str) -> None:
    labels = [sum(one["labels"]) for one in results]
    for part in ("validation", "test"):
        values = [one[part].get(quantity, np.nan) for one in results]
        if np.isfinite(values).any():
            ax.plot(labels, values, "o-", color=COLOURS[part], label=part)
    if quantity == "energy":
        spreads = [one["test" if one["test"] else "validation"].get("deviation", np.nan) for one in results]
        ax.plot(labels, spreads, "s--", color="#555555", ms=4, label="mean deviation")
    ax.set(xlabel="labels", ylabel=label, ylim=(0, None))
    ax.legend()


def _draw_stacks(
    ax: Axes, results: Sequence[Mapping[str, Any]], stacks: Sequence[Mapping[str, int]], label: str
) -> None:
    below = np.zeros(len(results))
    for name in dict.fromkeys(name for stack in stacks for name in stack):
        heights = np.array([stack.get(name, 0) for stack in stacks])
        if heights.any():
            ax.bar([one["round"] for one in results], heights, bottom=below, label=name)
            below = below + heights
    ax.set(xlabel="round", ylabel=label)
    ax.locator_params(axis="x", integer=True)
    if below.any():
        ax.legend(fontsize=9, frameon=True)


def _draw_surprises(ax: Axes, config: ExploreConfig, results: Sequence[Mapping[str, Any]]) -> None:
    unit = _UNITS[config.selection.deviation]
    shown = [one for one in results if one["surprises"]]
    for i, one in enumerate(shown):
        deviations, errors = np.array(one["surprises"]).T
        shade = str(0.75 - 0.75 * i / max(len(shown) - 1, 1))
        ax.plot(deviations, np.maximum(errors, 1e-6), ".", color=shade, label=f"round {one['round']}")
    ends = np.array([config.selection.lower or 1e-3, config.selection.upper])
    ax.plot(ends, ends, color=COLOURS["test"], lw=1)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel=f"deviation when it was chosen, {unit}",
        ylabel=f"error before it was learned, {unit}",
    )
    ax.legend(fontsize=9)


def _sums(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {kind: sum(of_source[kind] for of_source in counts.values()) for kind in _KINDS}


def _write_table(folder: ExploreFolder, results: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measures = ("energy", "forces", "deviation")
    writer.writerow(
        ["round", "structures", "labels", "added", "failed", "seen", *_KINDS, "duplicates", "left"]
        + [f"{part}_{measure}" for part in ("validation", "test") for measure in measures]
    )
    for one in results:
        counts = _sums(one["counts"])
        seen = sum(of_source["seen"] for of_source in one["counts"].values())
        row = [one["round"], one["structures"], sum(one["labels"]), sum(one["added"].values()), one["failed"], seen]
        row += [*counts.values(), one["duplicates"], one["left"]]
        writer.writerow(row + [one[part].get(measure, "") for part in ("validation", "test") for measure in measures])
    with replacing(folder.report / "rounds.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
