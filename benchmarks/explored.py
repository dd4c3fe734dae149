"""Data that a model asks for, against as many random structures: the errors of models that are trained on both.

    python benchmarks/explored.py FOLDER       # half an hour on one core, goes on where it was: results/explored.json
    python benchmarks/explored.py --plot-only  # draws docs/explored.png and fills docs/explore.md from it

From one geometry of 1-ethynylallyl (C5H5) `kinml-fast explore` gathers structures with labels of GFN2-xTB (tblite).
They are compared with what people do otherwise, for the same molecule and the same labels: harmonic draws of tblite's
own normal modes at the temperatures of the exploration, displaced atoms, and snapshots of dynamics by a cheaper method,
GFN1-xTB, at 1,000 K. Ensembles are trained anew on the first so many of each, with the recipe of the exploration and
the same number of optimizer steps, and are tested on structures that no way has drawn: snapshots of Langevin dynamics
at 1,000 K by GFN2-xTB. The ensemble of the exploration itself is tested too, and so are its deviations, with and
without their factors. Last, how smooth labels are: energies and forces on short lines of geometries against
polynomials.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ase.io
import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.optimize import BFGS

from kinml_fast import KinMLCalculator
from kinml_fast.data import Selection, read
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import calibrate, evaluate, model_file
from kinml_fast.explore import config as configuration
from kinml_fast.explore import rounds
from kinml_fast.explore.geometry import Geometry
from kinml_fast.explore.sampling import displaced
from kinml_fast.kinetics import vibrate
from kinml_fast.report import drawn
from kinml_fast.train import config as train_config
from kinml_fast.train import runs
from kinml_fast.units import KCAL_PER_MOL

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "explored.json"
PAGE, PLOT = HERE.parent / "docs" / "explore.md", HERE.parent / "docs" / "explored.png"
TEMPERATURE = 1000.0
OWN, EXPLORED, MODES, DISPLACED, DYNAMICS = (
    "the exploration itself",
    "explored",
    "normal modes",
    "displaced atoms",
    "GFN1-xTB dynamics",
)
WAYS = (OWN, EXPLORED, MODES, DISPLACED, DYNAMICS)
SMOOTH = (
    ("cyclopentadienyl", 300.0),
    ("cyclopentadienyl", 1000.0),
    ("cyclopentadienyl", 3000.0),
    ("1-ethynylallyl", 300.0),
    ("CH3CHO", 300.0),
    ("C3H4_C3v", 300.0),
)
"""Molecules and electronic temperatures of labels whose smoothness is measured."""
NAMES = {"CH3CHO": "acetaldehyde", "C3H4_C3v": "propyne"}
log = logging.getLogger("explored")


def tblite(method: str = "GFN2-xTB", temperature: float = 300.0) -> Calculator:
    from tblite.ase import TBLite  # the page can be made without it

    return TBLite(method=method, electronic_temperature=temperature, verbosity=0)


def labelled(atoms: Atoms, temperature: float = 300.0) -> Atoms:
    """A copy with GFN2-xTB's energy and forces, which do not depend on what was computed before."""
    found = Atoms(atoms.symbols, atoms.positions, calculator=tblite(temperature=temperature))
    forces = found.get_forces()
    found.calc = SinglePointCalculator(found, energy=found.get_potential_energy(), forces=forces)
    return found


def geometry(name: str) -> Atoms:
    """A minimum of GFN2-xTB."""
    if "-" in name or name.startswith("cyclo"):
        start = read("shipped:C5H5.db", Selection(temperature=0.0, names=[f"{name}:minimum"]))
        atoms = Atoms("C5H5", start.coordinates)
    else:
        atoms = molecule(name)
    atoms.calc = tblite()
    BFGS(atoms, logfile=None).run(fmax=1e-3, steps=500)
    return Atoms(atoms.symbols, atoms.positions)


def dynamics(minimum: Atoms, method: str, seed: int, count: int, every: int) -> list[Atoms]:
    """Snapshots of Langevin dynamics, so many fs apart, after 0.3 ps."""
    rng = np.random.default_rng([7, seed])
    atoms = Atoms(minimum.symbols, minimum.positions, calculator=tblite(method))
    widths = np.sqrt(atoms.get_masses() * units.kB * TEMPERATURE)[:, None]
    atoms.set_momenta(rng.normal(size=(len(atoms), 3)) * widths)
    settings = {"temperature_K": TEMPERATURE, "friction": 0.02 / units.fs, "fixcm": False, "rng": rng}
    run = Langevin(atoms, 1.0 * units.fs, **settings)
    run.run(300)
    found = []
    for _ in range(count):
        run.run(every)
        found.append(Atoms(atoms.symbols, atoms.positions))
    return found


def hessian(atoms: Atoms, step: float = 0.005) -> np.ndarray:
    """Central differences of tblite's forces, eV/Å²."""
    rows = []
    for i in range(3 * len(atoms)):
        forces = []
        for sign in (1, -1):
            positions = atoms.get_positions().ravel()
            positions[i] += sign * step
            forces.append(labelled(Atoms(atoms.symbols, positions.reshape(-1, 3))).get_forces().ravel())
        rows.append((forces[1] - forces[0]) / (2 * step))
    return (np.array(rows) + np.array(rows).T) / 2


def modes(atoms: Atoms, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (cm⁻¹) and mass-weighted displacements [k, 3n] of the 3n - 6 modes that are stiffest."""
    root = np.repeat(np.sqrt(atoms.get_masses()), 3)
    squares, vectors = np.linalg.eigh(second / root[:, None] / root)
    chosen = np.argsort(abs(squares))[6:]
    chosen = chosen[np.argsort(squares[chosen])]
    frequencies = np.sign(squares) * np.sqrt(abs(squares)) * 521.4708983725064
    return frequencies[chosen], (vectors / root[:, None]).T[chosen]


def harmonic(minimum: Atoms, second: np.ndarray, temperatures: list[float], count: int, seed: int) -> list[Atoms]:
    """Draws of the classical harmonic distribution."""
    frequencies, moves = modes(minimum, second)
    omegas = np.maximum(frequencies, 100.0) / 521.4708983725064
    rng = np.random.default_rng([11, seed])
    found = []
    for i in range(count):
        widths = np.sqrt(units.kB * temperatures[i % len(temperatures)]) / omegas
        shift = (rng.normal(size=len(widths)) * widths) @ moves
        found.append(Atoms(minimum.symbols, minimum.positions + shift.reshape(-1, 3)))
    return found


def test_errors(model: Path, test: Structures) -> dict[str, float]:
    ensemble = model_file.load(model)
    total = evaluate.total(evaluate.parts(test, evaluate.evaluate(ensemble, test), "test"))
    return {"energy": total.energy.rmse, "forces": total.forces.rmse}


def believed(model: Path, test: Structures) -> dict[str, dict[str, dict[str, float]]]:
    """How well the deviations of an ensemble tell its errors on the test structures, without and with its factors."""
    ensemble = model_file.load(model)
    factors, ensemble.calibration = ensemble.calibration, None
    raw = evaluate.parts(test, evaluate.evaluate(ensemble, test), "test")
    ensemble.calibration = factors
    calibrated = [calibrate.applied(part, ensemble) for part in raw]
    return {
        name: {kind: vars(one) for kind, one in calibrate.reliabilities(parts, ensemble.n_members).items()}
        for name, parts in (("before", raw), ("calibrated", calibrated))
    }


def cached(path: Path, make, label: bool = True) -> list[Atoms]:
    if not path.exists():
        frames = [labelled(one) for one in make()] if label else make()
        path.parent.mkdir(parents=True, exist_ok=True)
        ase.io.write(path.with_suffix(".part"), frames, format="extxyz")
        path.with_suffix(".part").replace(path)
    return ase.io.read(path, ":")


def trained(folder: Path, frames: list[Atoms], settings: configuration.ExploreConfig, steps: int) -> Path:
    """An ensemble by the exploration's recipe, trained anew on these structures."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data.xyz").exists():
        ase.io.write(folder / "data.xyz", frames, format="extxyz")
    values = settings.model_dump(include={"descriptor", "network", "training", "ensemble"})
    share = settings.labels.validation
    values["training"]["epochs"] = round(steps * values["training"]["batch_size"] / (len(frames) * (1 - share)))
    values |= {
        "run": str(folder / "model"),
        "data": {"files": [str(folder / "data.xyz")], "split": [1 - share, share, 0], "on_disk": False},
    }
    runs.start(train_config.from_dict(values), restarted=True)
    return folder / "model" / "model.pt"


def compared(folder: Path, minimum: Atoms, test: Structures, seed: int, options: argparse.Namespace) -> dict:
    """All ways with a seed."""
    here = folder / f"seed-{seed}"
    values = {
        "run": str(here / "explored"),
        "seed": seed,
        "geometries": {"files": [str(folder / "start.xyz")]},
        "test": [str(folder / "test.xyz")],
        "network": {"seed": 100 * seed},
        "training": {"seed": 100 * seed},
    }
    settings = train_config.changed(configuration.ExploreConfig, values, options.keys, "explored.py")
    found = rounds.explore(settings)
    rows = [{"way": OWN, "labels": sum(one["labels"]), **one["test"]} for one in found if one["test"]]
    second = hessian(minimum)
    most, temperatures = max(options.numbers), list(settings.sampling.temperatures)
    as_many = settings.geometries.model_copy(update={"count": most})
    start = [Geometry(tuple(minimum.symbols), minimum.positions, "start")]

    def cheap() -> list[Atoms]:
        frames = dynamics(minimum, "GFN1-xTB", 100 + seed, most, 10)
        return [frames[i] for i in np.random.default_rng(seed).permutation(most)]

    ways = {
        EXPLORED: ase.io.read(here / "explored" / "data" / "explored.xyz", ":"),
        MODES: cached(here / "modes.xyz", lambda: harmonic(minimum, second, temperatures, most, seed)),
        DISPLACED: cached(here / "displaced.xyz", lambda: [one.atoms for one in displaced(start, as_many, 13 + seed)]),
        DYNAMICS: cached(here / "dynamics.xyz", cheap),
    }
    for number in options.numbers:
        for way, frames in ways.items():
            if len(frames) >= number:
                place = here / f"{way.replace(' ', '-')}-{number}"
                model = trained(place, frames[:number], settings, options.steps)
                rows.append({"way": way, "labels": number, **test_errors(model, test)})
                log.info("%-18s %5d labels  %.3f kcal/mol  %.3f kcal/mol/Å", *list(rows[-1].values())[:4])
    own = modes(minimum, second)[0]
    ours = vibrate(Atoms(minimum.symbols, minimum.positions), KinMLCalculator(here / "explored"), optimise=True)
    apart = abs(ours.frequencies - own)
    return {
        "seed": seed,
        "rows": rows,
        "believed": believed(here / "explored" / "model.pt", test),
        "frequencies": {"mean": float(apart.mean()), "largest": float(apart.max())},
    }


def roughness(name: str, temperature: float, lines: int = 12, points: int = 11, width: float = 0.1) -> dict:
    """Residuals (RMSE, kcal/mol and kcal/mol/Å) of labels on lines of geometries against polynomials of degree 4.

    Each line goes through a structure displaced as in dynamics, `width` Å to both sides for the atom that moves most.
    """
    rng = np.random.default_rng(5)
    minimum = geometry(name)
    residuals: dict[str, list[np.ndarray]] = {"energy": [], "forces": []}
    places = np.linspace(-1.0, 1.0, points)
    for _ in range(lines):
        middle = minimum.positions + rng.normal(0.0, 0.05, minimum.positions.shape)
        way = rng.normal(size=middle.shape)
        way *= width / np.linalg.norm(way, axis=1).max()
        frames = [labelled(Atoms(minimum.symbols, middle + t * way), temperature) for t in places]
        energies = np.array([one.get_potential_energy() for one in frames])[:, None]
        forces = np.array([one.get_forces().ravel() for one in frames])
        for kind, values in (("energy", energies - energies.mean()), ("forces", forces)):
            fit = np.polynomial.polynomial.polyfit(places, values, 4)
            residuals[kind].append(values - np.polynomial.polynomial.polyval(places, fit).T)
    scale = KCAL_PER_MOL * np.sqrt(points / (points - 5))
    return {
        "molecule": name,
        "temperature": temperature,
        **{kind: float(scale * np.sqrt(np.square(np.array(all)).mean())) for kind, all in residuals.items()},
        "worst": float(KCAL_PER_MOL * np.abs(np.array(residuals["forces"])).max()),
    }


def learned(folder: Path, temperature: float, options: argparse.Namespace) -> dict:
    """Errors of an ensemble for cyclopentadienyl with labels of an electronic temperature.

    It is trained on 240 snapshots of dynamics and tested on 160 others, the same for all temperatures.
    """
    here = folder / "cyclopentadienyl"
    minimum = geometry("cyclopentadienyl")
    trajectories = (dynamics(minimum, "GFN2-xTB", seed, 100, 20) for seed in range(4))
    frames = cached(here / "dynamics.xyz", lambda: [one for some in trajectories for one in some], label=False)
    order = np.random.default_rng(0).permutation(len(frames))
    name = f"labels-{temperature:.0f}"
    frames = cached(here / f"{name}.xyz", lambda: [labelled(frames[i], temperature) for i in order], label=False)
    ase.io.write(here / f"test-{temperature:.0f}.xyz", frames[240:])
    values = {"run": "none", "geometries": {"files": ["none"]}}
    settings = train_config.changed(configuration.ExploreConfig, values, options.keys, "explored.py")
    model = trained(here / name, frames[:240], settings, options.steps)
    return {"temperature": temperature, **test_errors(model, read(here / f"test-{temperature:.0f}.xyz"))}


def measure(options: argparse.Namespace) -> dict:
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "start.xyz").exists():
        ase.io.write(folder / "start.xyz", geometry("1-ethynylallyl"))
    minimum = ase.io.read(folder / "start.xyz")

    def trajectories() -> list[Atoms]:
        return [one for seed in range(4) for one in dynamics(minimum, "GFN2-xTB", seed, 60, 25)]

    cached(folder / "test.xyz", trajectories)
    test = read(folder / "test.xyz")
    seeds = [compared(folder, minimum, test, seed, options) for seed in options.seeds]
    return {
        "steps": options.steps,
        "keys": options.keys,
        "test": len(test),
        "seeds": seeds,
        "smooth": [roughness(*one) for one in SMOOTH],
        "learned": [
            learned(folder, temperature, options) for name, temperature in SMOOTH if name == "cyclopentadienyl"
        ],
    }


def curve(found: dict, way: str, kind: str) -> list[tuple[int, list[float]]]:
    """Errors of all seeds by number of labels."""
    by_number: dict[int, list[float]] = {}
    for one in found["seeds"]:
        for row in one["rows"]:
            if row["way"] == way:
                by_number.setdefault(row["labels"], []).append(row[kind])
    return sorted(by_number.items())


def errors_table(found: dict) -> str:
    """Means over the seeds, energies and forces, of models that were trained anew."""
    ways = WAYS[1:]
    lines = ["| labels | " + " | ".join(ways) + " |", "|---:" * (len(ways) + 1) + "|"]
    numbers = sorted({number for way in ways for number, _ in curve(found, way, "energy")})
    for number in numbers:
        cells = []
        for way in ways:
            means = [dict(curve(found, way, kind)).get(number) for kind in ("energy", "forces")]
            cells.append(", ".join(f"{np.mean(m):.2f}" for m in means if m))
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def own_table(found: dict) -> str:
    """The ensembles of the explorations themselves, by round."""
    lines = ["| seed | labels: energy, forces |", "|---:|---|"]
    for one in found["seeds"]:
        cells = [f"{r['labels']}: {r['energy']:.2f}, {r['forces']:.2f}" for r in one["rows"] if r["way"] == OWN]
        lines.append(f"| {one['seed']} | " + "; ".join(cells) + " |")
    return "\n".join(lines)


def believed_table(found: dict) -> str:
    """Deviations before and after calibration on the test structures, by seed."""
    lines = ["| seed | | within 68.3 % | within 95 % | mean log likelihood |", "|---:|---|---:|---:|---:|"]
    for one in found["seeds"]:
        for kind in ("energies", "forces"):
            both = [one["believed"][name][kind] for name in ("before", "calibrated")]
            cells = [" → ".join(f"{100 * r[key]:.1f}" for r in both) + " %" for key in ("within_one", "within_two")]
            cells.append(" → ".join(f"{r['likelihood']:.2f}" for r in both))
            lines.append(f"| {one['seed']} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def smooth_table(found: dict) -> str:
    """How far labels are from polynomials, and what a model makes of them."""
    lines = ["| molecule, electronic temperature | energies | forces | largest of forces | model |"]
    lines.append("|---|---:|---:|---:|---:|")
    models = {("cyclopentadienyl", one["temperature"]): one for one in found["learned"]}
    for one in found["smooth"]:
        numbers = " | ".join(f"{one[key]:.3f}" for key in ("energy", "forces", "worst"))
        model = models.get((one["molecule"], one["temperature"]))
        errors = f"{model['energy']:.2f}, {model['forces']:.2f}" if model else ""
        name = NAMES.get(one["molecule"], one["molecule"])
        lines.append(f"| {name}, {one['temperature']:.0f} K | {numbers} | {errors} |")
    return "\n".join(lines)


TABLES = {"errors": errors_table, "own": own_table, "believed": believed_table, "smooth": smooth_table}


def filled(page: str, found: dict) -> str:
    """The page with all tables."""
    for name, table in TABLES.items():
        before, mark, after = page.partition(f"<!-- explored {name} -->\n")
        end = f"<!-- /explored {name} -->"
        page = f"{before}{mark}{table(found)}\n{end}{after.partition(end)[2]}"
    return page


def draw(found: dict) -> None:
    """Errors by number of labels: means of the seeds, and the seeds as points."""
    with drawn(PLOT, 9.0, 3.8) as figure:
        units = {"energy": "kcal/mol", "forces": "kcal/mol/Å"}
        for ax, (kind, unit) in zip(figure.subplots(1, 2), units.items(), strict=True):
            for way, colour in zip(WAYS, ("#b03030", "#c88a3d", "#4878a8", "#888888", "#4f9163"), strict=True):
                points = curve(found, way, kind)
                if way != OWN:
                    ax.plot(*zip(*((n, np.mean(v)) for n, v in points), strict=True), "o-", color=colour, label=way)
                for one in found["seeds"]:
                    own = sorted((row["labels"], row[kind]) for row in one["rows"] if row["way"] == way)
                    label = way if way == OWN and one is found["seeds"][0] else None
                    ax.plot(*zip(*own, strict=True), ".--" if way == OWN else ".", color=colour, alpha=0.6, label=label)
            ax.set(xscale="log", yscale="log", xlabel="labels", ylabel=f"RMSE of {kind}, {unit}")
            ax.minorticks_off()
            ax.set_xticks(ticks := [20, 50, 100, 200, 400], [str(n) for n in ticks])
            ticks = [n for n in (0.7, 1, 1.5, 2, 3, 4, 6, 8) if ax.get_ylim()[0] < n < ax.get_ylim()[1]]
            ax.set_yticks(ticks, [f"{n:g}" for n in ticks])
        figure.axes[0].legend(fontsize=8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--numbers", type=int, nargs="+", default=[50, 100, 200, 400], help="of structures")
    parser.add_argument("--steps", type=int, default=8000, help="of the optimizer, for each model")
    parser.add_argument(
        "--keys",
        nargs="*",
        default=["ensemble.members=3", "rounds.most=5"],
        metavar="key=value",
        help="of the exploration",
    )
    parser.add_argument("--plot-only", action="store_true", help="take the numbers of results/explored.json")
    parser.add_argument("--check", action="store_true", help="exit code 1 if docs/explore.md has other numbers")
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(message)s")
    logging.getLogger("kinml_fast.explore").setLevel(logging.INFO)
    log.setLevel(logging.INFO)
    if not (options.plot_only or options.check):
        if options.folder is None:
            parser.error("give a folder")
        RESULTS.write_text(json.dumps(measure(options), indent=1) + "\n", encoding="utf-8")
    found = json.loads(RESULTS.read_text())
    page = PAGE.read_text(encoding="utf-8")
    if options.check:
        return int(filled(page, found) != page)
    PAGE.write_text(filled(page, found), encoding="utf-8")
    draw(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
