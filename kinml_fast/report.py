"""The report on a run: learning curves, parity plots and a table of errors.

`write_report` makes the folder from metrics.csv and from predictions. Energies are in eV on the way in and in kcal/mol
in everything that is shown, forces in eV/Å and kcal/mol/Å, stresses in eV/Å³ and GPa. Where there are several levels of
theory, lower ones have curves, plots and rows of their own.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from kinml_fast.data.files import replacing
from kinml_fast.errors import InputError
from kinml_fast.metrics import Errors, ErrorSums
from kinml_fast.units import GIGAPASCAL, KCAL_PER_MOL

# matplotlib takes half a second to import, and most of what imports this module draws only at its end.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Comparison = tuple[Sequence[str], np.ndarray, np.ndarray]
"""Labels, reference and predicted values (eV, eV/Å or eV/Å³) of one split, all of one length."""

Lower = Mapping[int, Sequence[Mapping[str, "Comparison | Compared"]]]
"""Comparisons of energies, of forces and, if there are any, of stresses at lower levels of theory, by fidelity."""

COLOURS = {"train": "#0072B2", "validation": "#E69F00", "test": "#009E73"}
_OTHER_COLOUR = "#555555"

_STYLE: dict[Any, Any] = {  # keys are literals for type checkers
    "font.size": 11,
    "axes.labelsize": 12,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "savefig.dpi": 150,
}

_DRAWN = 20_000
"""Points of a parity plot; of more, a random choice and the worst ones are drawn. The errors count all."""
_WORST_DRAWN = 100
KEPT = 1 << 18
"""Values of one quantity in one split that are kept for its plot; of more, a random choice and the worst ones."""
_COLOURED_BY_DENSITY = 500
"""From this number of points on their colour shows how many lie in one place."""


@dataclass(frozen=True)
class Quantity:
    """What is compared, and how it is called in tables and on axes.

    `relative`: only differences have a meaning, so that axes start at the lowest reference. `fidelity` is None for the
    only or highest level of theory. Values of eV, eV/Å or eV/Å³ times `factor` are in `unit`.
    """

    name: str
    unit: str
    relative: bool
    error: str
    value: str
    counted: str
    fidelity: int | None = None
    factor: float = KCAL_PER_MOL

    @property
    def suffix(self) -> str:
        """What stands behind the name in metrics.csv, errors.csv and names of files."""
        return "" if self.fidelity is None else f"_fidelity{self.fidelity}"


ENERGY = Quantity("energy", "kcal/mol", True, "energy error", "relative energy", "structures")
FORCES = Quantity("forces", "kcal/mol/Å", False, "force error", "force component", "components")
STRESS = Quantity("stress", "GPa", False, "stress error", "stress component", "components", factor=GIGAPASCAL)
QUANTITIES = (ENERGY, FORCES, STRESS)


@dataclass(frozen=True)
class ErrorRow:
    """Errors of one quantity in one split: over `count` values, the largest at `worst`."""

    split: str
    quantity: Quantity
    count: int
    errors: Errors
    r2: float
    worst: str


class Compared:
    """Reference and predicted values of one quantity in one split, which come piece by piece.

    All count in the errors; to be drawn at most KEPT of them are kept. A `Comparison` is the same in one piece.
    """

    def __init__(self) -> None:
        self._sums = ErrorSums()
        self._worst, self._largest = "", -1.0
        self._mean = self._spread = 0.0
        self._ranges = np.array([[np.inf, -np.inf]] * 2)  # of finite reference and predicted values
        self._kept: list[np.ndarray] = []
        self._rng = np.random.default_rng(0)

    @classmethod
    def of(cls, comparison: Comparison | Compared) -> Compared:
        """Those of a comparison."""
        if isinstance(comparison, Compared):
            return comparison
        labels, reference, predicted = comparison
        if not len(labels) == len(reference) == len(predicted):
            raise ValueError(f"{len(labels)} labels, {len(reference)} reference and {len(predicted)} predicted values")
        compared = cls()
        compared.add(labels.__getitem__, reference, predicted)
        return compared

    def __len__(self) -> int:
        return self._sums.count

    def add(self, label: Callable[[int], str], reference: np.ndarray, predicted: np.ndarray) -> None:
        """Count more values, eV, eV/Å or eV/Å³; `label` says what the structure of the i-th of them is called."""
        reference, predicted = np.asarray(reference, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
        count = len(reference)
        if not count:
            return
        residual = predicted - reference
        worst = int(np.argmax(np.abs(residual)))
        if not abs(residual[worst]) <= self._largest and not math.isnan(self._largest):
            self._worst, self._largest = label(worst), float(abs(residual[worst]))
        # Sum of squared distances from the mean, of two groups together.
        mean, before = float(reference.mean()), self._sums.count
        spread = float(np.square(reference - mean).sum())
        self._spread += spread + (mean - self._mean) ** 2 * before * count / (before + count)
        self._mean = mean if not before else self._mean + (mean - self._mean) * count / (before + count)
        self._sums.add(residual)
        for place, values in enumerate((reference, predicted)):
            finite = values[np.isfinite(values)]
            self._ranges[place, 0] = min(self._ranges[place, 0], finite.min(initial=np.inf))
            self._ranges[place, 1] = max(self._ranges[place, 1], finite.max(initial=-np.inf))
        self._kept.append(np.stack([reference, predicted, self._rng.random(count)]))
        if sum(part.shape[1] for part in self._kept) > 2 * KEPT:
            self._thin()

    def _thin(self) -> None:
        """Keep those with the lowest of the random numbers, and the worst ones."""
        values = np.concatenate(self._kept, axis=1)
        if values.shape[1] > KEPT + _WORST_DRAWN:
            drawn = np.argpartition(values[2], KEPT)[:KEPT]
            worst = np.argpartition(np.abs(values[1] - values[0]), -_WORST_DRAWN)[-_WORST_DRAWN:]
            values = values[:, np.union1d(drawn, worst)]
        self._kept = [values]

    @property
    def drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Reference and predicted values that are kept."""
        self._thin()
        return self._kept[0][0], self._kept[0][1]

    @property
    def ranges(self) -> np.ndarray | None:
        """Lowest and highest of the finite reference and predicted values, [2, 2]; None where there are none."""
        return self._ranges if (self._ranges[:, 0] <= self._ranges[:, 1]).all() else None

    def row(self, split: str, quantity: Quantity) -> ErrorRow:
        """The errors of all values."""
        r2 = 1 - self._sums.square / self._spread if self._spread > 0 else float("nan")
        return ErrorRow(split, quantity, self._sums.count, self._sums.errors(quantity.factor), r2, self._worst)


def write_report(
    folder: str | os.PathLike,
    metrics_csv: str | os.PathLike,
    energies: Mapping[str, Comparison | Compared],
    forces: Mapping[str, Comparison | Compared] | None = None,
    best: int | None = None,
    lower: Lower | None = None,
    stresses: Mapping[str, Comparison | Compared] | None = None,
) -> list[ErrorRow]:
    """Write learning_curves.png, parity_SPLIT.png for each split, and errors.csv.

    Lower levels of theory have their own parity_SPLIT_fidelity0.png.

    Parameters
    ----------
    folder
        Made if it is not there; what is in it is replaced.
    metrics_csv
        The table that the run has kept.
    energies
        For each split its labels, reference and predicted energies in eV. Where formulas differ, give both without
        single-atom energies, or the axes span the differences between formulas.
    forces
        The same for force components in eV/Å, labels repeated; they get a panel of their own.
    best
        The epoch to mark in the learning curves; None: that of the lowest validation RMSE of energies.
    lower
        The same at lower levels of theory.
    stresses
        The same for components of stresses in eV/Å³.

    Returns
    -------
    list of ErrorRow
        What errors.csv holds; `table` makes text of it. Splits without structures are left out.

    Raises
    ------
    InputError
        metrics.csv is missing or damaged, or the folder cannot be written.
    """
    curves = read_metrics(metrics_csv)
    rows = write_parity(folder, energies, forces, lower, stresses)
    with _style():
        _save(draw_learning_curves(curves, best), Path(folder) / "learning_curves.png")
    return rows


def write_member_curves(
    folder: str | os.PathLike, metrics_csv: Mapping[str, str | os.PathLike], best: Mapping[str, int]
) -> None:
    """Write learning_curves.png of several runs: the validation RMSE of each, and its best epoch.

    Parameters
    ----------
    folder
        Made if it is not there.
    metrics_csv
        The table of each run, by name.
    best
        The best epoch of each run, by name.

    Raises
    ------
    InputError
        As `write_report`.
    """
    matplotlib = _matplotlib()
    folder = _made(folder)
    curves = {name: read_metrics(path)["validation"] for name, path in metrics_csv.items()}
    quantities = _shown(curves)
    with _style():
        figure = _figure(8.0, 0.6 + 3.4 * len(quantities))
        axes = figure.subplots(len(quantities), 1, sharex=True, squeeze=False)[:, 0]
        shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, len(curves)))
        for ax, quantity in zip(axes, quantities, strict=True):
            for (name, columns), shade in zip(curves.items(), shades, strict=True):
                shown = _positive(columns, f"{quantity.name}_rmse")
                if not shown.any():
                    continue
                y = columns[f"{quantity.name}_rmse"]
                ax.plot(columns["epoch"][shown], y[shown], color=shade, lw=1.2, label=name)
                at = shown & (columns["epoch"] == best[name])
                ax.plot(columns["epoch"][at], y[at], "o", ms=6, mfc="none", mec=shade, mew=1.4)
            ax.set_ylabel(f"validation RMSE, {quantity.unit}")
            if ax.lines:
                _make_logarithmic(ax)
        axes[0].legend(ncols=4, fontsize=9, loc="upper right")
        axes[-1].set_xlabel("epoch")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        _save(figure, folder / "learning_curves.png")


def write_parity(
    folder: str | os.PathLike,
    energies: Mapping[str, Comparison | Compared],
    forces: Mapping[str, Comparison | Compared] | None = None,
    lower: Lower | None = None,
    stresses: Mapping[str, Comparison | Compared] | None = None,
) -> list[ErrorRow]:
    """Write parity plots and errors.csv: what `write_report` does without learning curves."""
    folder = _made(folder)
    rows = []
    highest = (None, (energies, forces or {}, stresses or {}))
    for fidelity, of_kinds in [highest, *(lower or {}).items()]:
        quantities = {
            quantity if fidelity is None else replace(quantity, fidelity=fidelity): {
                split: Compared.of(comparison) for split, comparison in comparisons.items()
            }
            for quantity, comparisons in zip(QUANTITIES, of_kinds, strict=False)
        }
        rows += _write_parity_of_level(folder, quantities)
    order = list(dict.fromkeys(row.split for row in rows))
    rows.sort(key=lambda row: order.index(row.split))
    _write_errors(folder / "errors.csv", rows)
    return rows


def _write_parity_of_level(folder: Path, quantities: Mapping[Quantity, Mapping[str, Compared]]) -> list[ErrorRow]:
    energies = next(iter(quantities.values()))
    splits = [split for split in energies if len(energies[split])]
    rows = [
        comparisons[split].row(split, quantity)
        for split in splits
        for quantity, comparisons in quantities.items()
        if split in comparisons and len(comparisons[split])
    ]
    with _style():
        limits = {quantity: _limits(quantity, comparisons) for quantity, comparisons in quantities.items()}
        for split in splits:
            of_split = [row for row in rows if row.split == split]
            panels = [(row, *quantities[row.quantity][split].drawn, limits[row.quantity]) for row in of_split]
            _save(draw_parity(split, panels), folder / f"parity_{split}{of_split[0].quantity.suffix}.png")
    return rows


def write_reliability(
    folder: str | os.PathLike,
    quantities: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    within: float,
) -> None:
    """Write reliability.png: how large errors are where an ensemble calls them so large.

    Parameters
    ----------
    folder
        Made if it is not there.
    quantities
        For "energies" and "forces" the names of curves and their errors and deviations, [n] each, in eV and eV/Å.
    within
        The share of errors that shall be within a deviation: each point is the bound of that share of the errors, of
        a twelfth of the numbers, in order of their deviations; right ones lie on the diagonal.
    """
    units = {"energies": "kcal/mol", "forces": "kcal/mol/Å"}
    with _style():
        figure = _figure(4.6 * len(quantities), 4.6)
        all_axes = figure.subplots(1, len(quantities), squeeze=False)[0]
        for ax, (name, curves) in zip(all_axes, quantities.items(), strict=True):
            ends: list[float] = []
            for (label, (errors, deviations)), colour in zip(
                curves.items(), [_OTHER_COLOUR] * (len(curves) - 1) + [_colour("validation")], strict=True
            ):
                known = np.isfinite(errors) & (deviations > 0)
                errors, deviations = np.abs(errors[known]) * KCAL_PER_MOL, deviations[known] * KCAL_PER_MOL
                groups = [g for g in np.array_split(np.argsort(deviations, kind="stable"), 12) if len(g)]
                if not groups:
                    continue
                x = [deviations[g].mean() for g in groups]
                y = [max(np.quantile(errors[g], within), 1e-12) for g in groups]
                ax.plot(x, y, marker="o", color=colour, label=label)
                ends += [*x, *y]
            if ends:
                line = [min(ends) / 1.3, max(ends) * 1.3]
                ax.plot(line, line, color=_OTHER_COLOUR, lw=1.0, ls="--")
                ax.set(xscale="log", yscale="log", xlim=line, ylim=line)
            ax.set_xlabel(f"deviation of {name}, {units[name]}")
            ax.set_ylabel(f"{within:.0%} of the errors are below, {units[name]}")
            ax.legend()
        _save(figure, _made(folder) / "reliability.png")


def table(rows: Sequence[ErrorRow]) -> str:
    """The errors as a text table."""
    cells = [["split", "", "number", "MAE", "RMSE", "max", "R²", "unit", "worst"]]
    for row in rows:
        errors = [f"{value:.3f}" for value in (row.errors.mae, row.errors.rmse, row.errors.max)]
        number = f"{row.count:,}"
        name = row.quantity.name + row.quantity.suffix.replace("_fidelity", ", fidelity ")
        cells.append([row.split, name, number, *errors, f"{row.r2:.5f}", row.quantity.unit, row.worst])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.ljust] * 2 + [str.rjust] * 5 + [str.ljust] * 2
    lines = ["  ".join(side(text, w) for side, text, w in zip(sides, line, widths, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def read_metrics(path: str | os.PathLike) -> dict[str, dict[str, np.ndarray]]:
    """metrics.csv as arrays: for each split, each column, NaN where it is empty.

    Raises
    ------
    InputError
        The file is missing, has no rows, or a row that is no row of this table.
    """
    try:
        text = Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}): give the metrics.csv of a run") from error
    reader = csv.DictReader(io.StringIO(text))
    if reader.fieldnames is None or not {"epoch", "split", "energy_rmse"} <= set(reader.fieldnames):
        raise InputError(f"{path}: has no columns epoch, split, energy_rmse: give the metrics.csv of a run")
    columns = [name for name in reader.fieldnames if name != "split"]
    collected: dict[str, list[list[float]]] = {}
    for number, row in enumerate(reader, start=2):
        try:
            if None in row or None in row.values():
                raise ValueError("it has too many or too few values")
            values = [float(row[name] or "nan") for name in columns]
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: row {number} is damaged ({error}): remove it") from error
        collected.setdefault(row["split"], []).append(values)
    if not collected:
        raise InputError(f"{path}: has no rows yet: train at least one epoch")
    return {
        split: dict(zip(columns, np.array(rows, dtype=np.float64).T, strict=True)) for split, rows in collected.items()
    }


def draw_learning_curves(metrics: Mapping[str, Mapping[str, np.ndarray]], best: int | None = None) -> Figure:
    """RMSE and MAE of every split against the epoch, the best one marked, and the learning rate below."""
    fidelities = _fidelities(metrics)
    kinds = _shown(metrics, fidelities)
    figure = _figure(8.0 * len(fidelities), 1.8 + 3.4 * len(kinds))
    heights = [3.4] * len(kinds) + [1.1]
    # All rows share the epochs; a column for each level, the highest first.
    all_axes = figure.subplots(len(heights), len(fidelities), sharex=True, squeeze=False, height_ratios=heights)
    for axes, fidelity in zip(all_axes.T, fidelities, strict=True):
        quantities = [replace(quantity, fidelity=fidelity) for quantity in kinds]
        for ax, quantity in zip(axes, quantities, strict=False):
            _draw_curves(ax, quantity, metrics)
        _mark_best(axes, quantities, metrics, best)
        rates = metrics.get("train", next(iter(metrics.values())))
        shown = _positive(rates, "lr")
        if shown.any():
            axes[-1].step(rates["epoch"][shown], rates["lr"][shown], where="post", color=_OTHER_COLOUR, lw=1.4)
            _make_logarithmic(axes[-1])
        axes[-1].set_ylabel("learning rate")
        axes[-1].set_xlabel("epoch")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _shown(
    metrics: Mapping[str, Mapping[str, np.ndarray]], fidelities: Sequence[int | None] = (None,)
) -> list[Quantity]:
    """The quantities that a table of metrics has errors of: energies in any case."""

    def has(quantity: Quantity) -> bool:
        names = [f"{quantity.name}_rmse{replace(quantity, fidelity=fidelity).suffix}" for fidelity in fidelities]
        return any(_positive(columns, name).any() for columns in metrics.values() for name in names)

    return [quantity for quantity in QUANTITIES if quantity is ENERGY or has(quantity)]


def _fidelities(metrics: Mapping[str, Mapping[str, np.ndarray]]) -> list[int | None]:
    """The levels of theory that a table of metrics has: None for the highest, then the lower ones by fidelity."""
    names = [name.partition("_fidelity")[2] for columns in metrics.values() for name in columns if "_fidelity" in name]
    return [None, *(int(name) for name in reversed(dict.fromkeys(names)))]


def _draw_curves(ax: Axes, quantity: Quantity, metrics: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    styles: dict[str, dict[str, Any]] = {"rmse": {"lw": 1.8, "zorder": 3}, "mae": {"lw": 1.0, "alpha": 0.5}}
    for kind, style in styles.items():
        for split, columns in metrics.items():
            name = f"{quantity.name}_{kind}{quantity.suffix}"
            shown = _positive(columns, name)
            if shown.any():
                few: dict[str, Any] = {"marker": "o", "ms": 3.5} if shown.sum() <= 25 else {}
                label = f"{split} {kind.upper()}"
                x, y = columns["epoch"][shown], columns[name][shown]
                ax.plot(x, y, color=_colour(split), label=label, **style, **few)
    ax.set_ylabel(f"{quantity.error}, {quantity.unit}")
    if ax.lines:
        _make_logarithmic(ax)
        ax.legend(ncols=2, fontsize=10, loc="upper right")


def draw_parity(
    split: str, panels: Sequence[tuple[ErrorRow, np.ndarray, np.ndarray, tuple[float, float, float]]]
) -> Figure:
    """Predicted against reference values and the residuals below, a column for each quantity.

    Parameters
    ----------
    split
        For the title.
    panels
        For each quantity its errors, reference and predicted values in eV, eV/Å or eV/Å³, and the axis in the unit that
        is shown: which reference value is its zero, first and last value.
    """
    figure = _figure(6.2 * len(panels), 7.6)
    axes = figure.subplots(2, len(panels), sharex="col", squeeze=False, height_ratios=[3, 1.1])
    fidelity = panels[0][0].quantity.fidelity
    figure.suptitle(f"{split} set" + ("" if fidelity is None else f", fidelity {fidelity}"), fontsize=13)
    for (upper, lower), panel in zip(axes.T, panels, strict=True):
        _draw_panel(upper, lower, split, *panel)
    return figure


def _draw_panel(
    upper: Axes,
    lower: Axes,
    split: str,
    row: ErrorRow,
    reference: np.ndarray,
    predicted: np.ndarray,
    limits: tuple[float, float, float],
) -> None:
    quantity, (zero, first, last) = row.quantity, limits
    x = np.asarray(reference, dtype=np.float64) * quantity.factor - zero
    residual = (np.asarray(predicted, dtype=np.float64) - np.asarray(reference, dtype=np.float64)) * quantity.factor
    shown = np.isfinite(x) & np.isfinite(residual)
    x, residual = _thinned(x[shown], residual[shown])
    style: dict = {"s": 10, "linewidths": 0, "rasterized": True}
    if len(x) >= _COLOURED_BY_DENSITY:
        density = _density(x, residual)
        order = np.argsort(density, kind="stable")
        x, residual = x[order], residual[order]
        style |= {"c": density[order], "cmap": _colour_map(split), "vmin": 0.0, "vmax": 1.0}
    else:
        style |= {"color": _colour(split), "alpha": 0.6, "s": 16}
    upper.plot([first, last], [first, last], color=_OTHER_COLOUR, lw=0.9, zorder=1)
    upper.scatter(x, x + residual, zorder=2, **style)
    upper.set_xlim(first, last)
    upper.set_ylim(first, last)
    upper.set_ylabel(f"predicted {quantity.value}, {quantity.unit}")
    errors = {"MAE": row.errors.mae, "RMSE": row.errors.rmse, "max": row.errors.max}
    lines = [f"{name:<5} {_three_digits(value)} {quantity.unit}" for name, value in errors.items()]
    text = "\n".join([f"{row.count:,} {quantity.counted}", *lines, f"R²    {row.r2:.5f}"])
    box = {"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": "#cccccc", "alpha": 0.9}
    upper.text(0.03, 0.97, text, transform=upper.transAxes, va="top", family="monospace", fontsize=10, bbox=box)

    lower.axhline(0, color=_OTHER_COLOUR, lw=0.9, zorder=1)
    lower.scatter(x, residual, zorder=2, **style)
    if residual.size:
        reach = 1.08 * max(np.abs(residual).max(), 1e-12)
        lower.set_ylim(-reach, reach)
    lower.set_ylabel(f"error, {quantity.unit}")
    lower.set_xlabel(f"reference {quantity.value}, {quantity.unit}")


def _thinned(x: np.ndarray, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= _DRAWN:
        return x, residual
    worst = np.argsort(np.abs(residual))[-_WORST_DRAWN:]
    drawn = np.random.default_rng(0).choice(len(x), _DRAWN - _WORST_DRAWN, replace=False)
    chosen = np.union1d(worst, drawn)
    return x[chosen], residual[chosen]


def _density(x: np.ndarray, residual: np.ndarray, bins: int = 64) -> np.ndarray:
    """How many points lie about each, between 0 and 1 (the square root of the share of the fullest place)."""

    def place(values: np.ndarray) -> np.ndarray:
        # Few outliers must not make the bins too wide for the many.
        low, high = np.quantile(values, [0.005, 0.995])
        return np.clip((values - low) / max(high - low, 1e-300), 0, 1) * (bins - 1)

    places = place(x), place(residual)
    counts = np.histogram2d(places[0], places[1], bins=bins, range=[(-0.5, bins - 0.5)] * 2)[0]
    smooth = ndimage.gaussian_filter(counts, sigma=1.5, mode="constant")
    density = ndimage.map_coordinates(smooth, places, order=1, mode="nearest")
    return np.sqrt(density / density.max())


def _limits(quantity: Quantity, comparisons: Mapping[str, Compared]) -> tuple[float, float, float]:
    """The zero of the axis and its ends, the same for all splits, so that their plots can be laid side by side."""
    ranges = [comparison.ranges for comparison in comparisons.values() if len(comparison)]
    known = np.array([x for x in ranges if x is not None]) * quantity.factor
    if not len(known) or len(known) < len(ranges):
        return 0.0, -1.0, 1.0
    zero = float(known[:, 0, 0].min()) if quantity.relative else 0.0
    lowest, highest = float(known[..., 0].min()) - zero, float(known[..., 1].max()) - zero
    margin = 0.04 * max(highest - lowest, 1e-6)
    return zero, lowest - margin, highest + margin


def _mark_best(
    axes: Sequence[Axes],
    quantities: Sequence[Quantity],
    metrics: Mapping[str, Mapping[str, np.ndarray]],
    best: int | None,
) -> None:
    columns = metrics.get("validation")
    if columns is None or not _positive(columns, "energy_rmse").any():
        return
    if best is None:
        best = int(columns["epoch"][np.nanargmin(columns["energy_rmse"])])
    (place,) = np.flatnonzero(columns["epoch"] == best)[:1] if best in columns["epoch"] else (None,)
    if place is None:
        return
    values, fidelity = [], quantities[0].fidelity
    for ax, quantity in zip(axes, quantities, strict=False):
        name = f"{quantity.name}_rmse{quantity.suffix}"
        if _positive(columns, name)[place]:
            value = columns[name][place]
            ax.plot([best], [value], "o", ms=8, mfc="none", mec="black", mew=1.4, zorder=4)
            values.append(f"{_three_digits(value)} {quantity.unit}")
    which = "best" if fidelity is None else f"fidelity {fidelity}:"
    axes[0].set_title(f"{which} validation RMSE {', '.join(values)} (epoch {best})", loc="left")


def _make_logarithmic(ax: Axes) -> None:
    """A logarithmic axis labelled with plain numbers, enough of them when it spans less than a decade or two."""
    from matplotlib import ticker

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = math.log10(high / low)
    if decades < 2.5:
        subs = (1, 2, 5) if decades > 0.7 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _colour(split: str) -> str:
    return COLOURS.get(split, _OTHER_COLOUR)


def _colour_map(split: str) -> Colormap:
    """From the split's colour, lightened, where points are rare, to a dark shade of it where they are many."""
    from matplotlib import colors

    rgb = np.array(colors.to_rgb(_colour(split)))
    return colors.LinearSegmentedColormap.from_list(split, [0.45 * rgb + 0.55, rgb, 0.35 * rgb])


def _positive(columns: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Where the column has numbers that a logarithmic axis can show; nowhere if there is no such column."""
    values = columns.get(name, np.zeros(len(columns["epoch"])))
    return np.isfinite(values) & (values > 0)


def _made(folder: str | os.PathLike) -> Path:
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}): choose another folder") from error
    return folder


def _style() -> AbstractContextManager[None]:
    """What figures look like that are made and drawn within this."""
    return _matplotlib().rc_context(_STYLE)


def _matplotlib() -> ModuleType:
    """The package, also where MPLBACKEND names a backend that is not there, as notebooks do: none is needed here."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def _figure(width: float, height: float) -> Figure:
    """A figure of so many inches; none of matplotlib's global state is touched, so that programs keep theirs."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _write_errors(path: Path, rows: Sequence[ErrorRow]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["split", "quantity", "unit", "count", "mae", "rmse", "max", "r2", "worst"])
    for row in rows:
        e, q = row.errors, row.quantity
        writer.writerow(
            [
                row.split,
                q.name + q.suffix,
                q.unit,
                row.count,
                repr(e.mae),
                repr(e.rmse),
                repr(e.max),
                repr(row.r2),
                row.worst,
            ]
        )
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


@contextlib.contextmanager
def drawn(path: str | os.PathLike, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches that looks like those of a report; it is written when the block ends well.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    path = Path(path)
    _made(path.parent)
    with _style():
        figure = _figure(width, height)
        yield figure
        _save(figure, path)
