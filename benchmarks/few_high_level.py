"""Few structures at the high level: one level alone, differences (delta learning) and both levels at once.

    python benchmarks/few_high_level.py                 # ten minutes on two cores; writes results/few_high_level.json
    python benchmarks/few_high_level.py --plot-only     # draws docs/few_high_level.png and fills docs/levels.md from it

The shipped C5H5, GFN1-xTB (low) and GFN2-xTB (high): 870 structures for training, 110 for validation, 110 for testing.
A share of the training structures keeps its high level, the others lose it. All ways have the networks, the recipe and
the number of optimizer steps of `forces.yaml`, and are judged by the high-level test errors. Delta learning also needs
the low level of the structures that it predicts; here it has that exactly.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kinml_fast.data import Selection, Split, Structures, make_split, read, sae
from kinml_fast.data.fidelities import difference
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train import Trainer, TrainingData, load

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "few_high_level.json"
PAGE, PLOT = HERE.parent / "docs" / "levels.md", HERE.parent / "docs" / "few_high_level.png"
SHARES = (0.1, 0.2, 0.5, 1.0)
WAYS = {"single": "high level alone", "delta": "delta learning", "levels": "two levels at once"}
SEEDS = (0, 1, 2)
N_TRAIN = 870
log = logging.getLogger("few_high_level")


def run(way: str, share: float, seed: int, steps: int) -> dict[str, float]:
    """Train in one of the ways and return the high-level errors on the test set, kcal/mol and kcal/mol/Å."""
    both = read("shipped:C5H5.db", Selection(fidelity=[0, 1]))
    split = make_split(both, [N_TRAIN, 110, 110], seed=0)
    chosen = np.random.default_rng(seed).permutation(split.train)[: round(share * len(split.train))]
    if way == "levels":
        energies, forces = both.energies.copy(), both.forces.copy()
        without = np.setdiff1d(split.train, chosen)
        energies[1, without] = np.nan
        forces[1, np.isin(both.owners, without)] = np.nan
        structures, train = replace(both, energies=energies, forces=forces), split.train
        known = [split.train, chosen]
        shifts = np.stack([_sae(both.level(level), own) for level, own in enumerate(known)])
    else:
        structures, train = both.level(1) if way == "single" else difference(both), chosen
        shifts = _sae(structures, chosen)
    batches = -(-len(train) // 25)
    config = load("forces", [f"training.epochs={max(1, round(steps / batches))}", f"training.seed={seed}"]).training
    torch.manual_seed(seed)
    model = EnergyModel(
        AEVParameters.aevmod(both.elements),
        biases=False,
        dtype=torch.float32,
        fidelities=(0, 1) if way == "levels" else (1,),
        baseline=0 if way == "delta" else None,
    )
    data = TrainingData(structures, Split(train, split.validation, split.test), shifts)
    summary = Trainer(model, data, config).fit()
    return {"energy": summary.errors["test"].rmse, "forces": summary.forces["test"].rmse}


def _sae(structures: Structures, train: np.ndarray) -> np.ndarray:
    return sae.fit(structures.counts()[train], structures.energies[train], structures.elements)


def measure(steps: int) -> dict:
    """All runs."""
    rows = []
    for share in SHARES:
        for way in WAYS:
            for seed in SEEDS:
                rows.append({"way": way, "share": share, "seed": seed, **run(way, share, seed, steps)})
                log.info("%s", rows[-1])
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "steps": steps, "runs": rows}


def _column(found: dict, way: str, share: float, kind: str) -> np.ndarray:
    return np.array([r[kind] for r in found["runs"] if r["way"] == way and r["share"] == share])


def table(found: dict) -> str:
    """Means over the seeds."""
    head = ["structures with the high level", *(f"{name}: energy, forces" for name in WAYS.values())]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(WAYS)]
    for share in SHARES:
        cells = [f"{share:.0%} ({round(N_TRAIN * share)})"]
        for way in WAYS:
            means = [_column(found, way, share, kind).mean() for kind in ("energy", "forces")]
            cells.append(", ".join(f"{mean:.2f}" for mean in means))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict) -> None:
    """Means, and the seeds as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    units = {"energy": "test energy RMSE, kcal/mol", "forces": "test force RMSE, kcal/mol/Å"}
    for ax, (kind, label) in zip(axes, units.items(), strict=True):
        for way, colour in zip(WAYS, ("#4878a8", "#c88a3d", "#4f9163"), strict=True):
            values = [_column(found, way, share, kind) for share in SHARES]
            x = [round(N_TRAIN * share) for share in SHARES]
            ax.plot(x, [v.mean() for v in values], "o-", color=colour, label=WAYS[way])
            for place, own in zip(x, values, strict=True):
                ax.plot([place] * len(own), own, ".", color=colour, alpha=0.5)
        ax.set(xscale="log", yscale="log", xlabel="training structures with the high level", ylabel=label)
        ax.set_xticks(x, [str(v) for v in x])
        ax.minorticks_off()
        ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(PLOT, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7000, help="optimizer steps of a run")
    parser.add_argument("--plot-only", action="store_true", help="take the numbers of results/few_high_level.json")
    parser.add_argument("--check", action="store_true", help="exit code 1 if docs/levels.md has other numbers")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    if not (options.plot_only or options.check):
        RESULTS.write_text(json.dumps(measure(options.steps), indent=1) + "\n")
    found = json.loads(RESULTS.read_text())
    before, mark, after = PAGE.read_text(encoding="utf-8").partition("<!-- few_high_level -->\n")
    page = f"{before}{mark}{table(found)}\n<!-- /few_high_level -->{after.partition('<!-- /few_high_level -->')[2]}"
    if options.check:
        return int(page != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")
    plot(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
