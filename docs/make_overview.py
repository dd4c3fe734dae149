"""Draws docs/overview.png: how a molecule becomes an energy, and the test set of a run (by default the example's).

python docs/make_overview.py runs/example
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from kinml_fast.data import prepared
from kinml_fast.deploy import model_file
from kinml_fast.deploy.evaluate import evaluate
from kinml_fast.metrics import Errors
from kinml_fast.units import KCAL_PER_MOL

INK, BLUE, GREY = "#1f2933", "#1f6fb2", "#dfe7ee"


def box(axes: plt.Axes, x: float, y: float, text: str, width: float, colour: str = GREY) -> None:
    axes.add_patch(FancyBboxPatch((x, y - 0.55), width, 1.1, boxstyle="round,pad=0.08", fc=colour, ec="none"))
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes: plt.Axes, x0: float, y0: float, x1: float, y1: float, text: str = "") -> None:
    axes.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.1})
    if text:
        axes.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.16, text, ha="center", va="bottom", fontsize=7.5, color=INK)


def flow(axes: plt.Axes) -> None:
    axes.set(xlim=(0, 10.6), ylim=(-2.4, 2.4))
    axes.axis("off")
    box(axes, 0.1, 0, "molecules\ncoordinates, elements", 2.1)
    box(axes, 3.1, 0, "AEV of each atom\nradial + angular", 1.9, "#cfe3f5")
    for y, element in ((1.5, "C"), (0, "H"), (-1.5, "…")):
        box(axes, 5.9, y, f"network of {element}" if element != "…" else "…", 1.6, "#cfe3f5")
        arrow(axes, 5.1, 0, 5.8, y)
        arrow(axes, 7.6, y, 8.3, 0)
    box(axes, 8.4, 0, "energy = Σ atoms\nforces = -dE/dx", 1.9)
    arrow(axes, 2.3, 0, 3.0, 0)
    axes.text(
        5.3, -2.35, "blue: fused C++ ops, differentiable, no stored Jacobians", ha="center", fontsize=8, color=BLUE
    )


def parity(axes: plt.Axes, run: Path) -> None:
    data = prepared.load(run / "prepared.h5")
    test = data.structures.select(data.split.test)
    predicted = evaluate(model_file.load(run / "model.pt"), test, forces=False).energies
    low = test.energies.min()
    x, y = ((e - low) * KCAL_PER_MOL for e in (test.energies, predicted))
    errors = Errors.of(predicted - test.energies)
    axes.plot([0, x.max()], [0, x.max()], color=INK, lw=0.8)
    axes.scatter(x, y, s=9, color=BLUE, alpha=0.7, linewidths=0)
    axes.set(
        xlabel="GFN2-xTB energy (kcal/mol)",
        ylabel="model (kcal/mol)",
        title=f"C5H5, {len(test)} test structures: RMSE {errors.rmse:.2f} kcal/mol",
        aspect="equal",
    )
    axes.title.set_size(9)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[2.1, 1], layout="constrained")
    flow(left)
    parity(right, run)
    figure.savefig(Path(__file__).with_name("overview.png"), dpi=130)


if __name__ == "__main__":
    main()
