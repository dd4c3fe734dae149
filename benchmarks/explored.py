"""Data that a model asks for, against as many random structures: the errors of models that are trained on both.

    python benchmarks/explored.py FOLDER                 # an hour on two cores; goes on where it was
    python benchmarks/explored.py FOLDER --isomer cyclopentadienyl --rounds 8 --numbers 100 200 400

From one geometry of C5H5 `kinml-fast explore` gathers structures with labels of GFN2-xTB (tblite). They are compared
with random ones of the same geometry: harmonic draws of tblite's own normal modes at the temperatures of the
exploration, and displaced atoms. Models are trained anew on the first so many of each, with the recipe of the
exploration and the same number of optimizer steps, and are tested on structures that no way has drawn: snapshots of
Langevin dynamics at 1,000 K by tblite. Then frequencies: the minimum and harmonic frequencies of the explored ensemble
against tblite's own.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.optimize import BFGS
from tblite.ase import TBLite

from kinml_fast import KinMLCalculator
from kinml_fast.data import Selection, read
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import evaluate, model_file
from kinml_fast.explore import config as configuration
from kinml_fast.explore import rounds
from kinml_fast.explore.folder import write_json
from kinml_fast.explore.geometry import Geometry
from kinml_fast.explore.sampling import displaced
from kinml_fast.kinetics import vibrate
from kinml_fast.report import drawn
from kinml_fast.train import config as train_config
from kinml_fast.train import runs

TEST_TEMPERATURE = 1000.0
log = logging.getLogger("explored")


def tblite() -> TBLite:
    return TBLite(method="GFN2-xTB", verbosity=0)


def labelled(atoms: Atoms) -> Atoms:
    """A copy with tblite's energy and forces, which do not depend on what was computed before."""
    found = Atoms(atoms.symbols, atoms.positions, calculator=tblite())
    forces = found.get_forces()
    found.calc = SinglePointCalculator(found, energy=found.get_potential_energy(), forces=forces)
    return found


def snapshots(minimum: Atoms, trajectories: int = 4, count: int = 100) -> list[Atoms]:
    """Of Langevin dynamics, 20 fs apart, after 0.5 ps."""
    found = []
    for seed in range(trajectories):
        rng = np.random.default_rng([7, seed])
        atoms = Atoms(minimum.symbols, minimum.positions, calculator=tblite())
        widths = np.sqrt(atoms.get_masses() * units.kB * TEST_TEMPERATURE)[:, None]
        atoms.set_momenta(rng.normal(size=(len(atoms), 3)) * widths)
        settings = {"temperature_K": TEST_TEMPERATURE, "friction": 0.02 / units.fs, "fixcm": False, "rng": rng}
        dynamics = Langevin(atoms, 0.5 * units.fs, **settings)
        dynamics.run(1000)
        for _ in range(count):
            dynamics.run(40)
            found.append(labelled(atoms))
    return found


def hessian(atoms: Atoms, step: float = 0.005) -> np.ndarray:
    """Central differences of tblite's forces, eV/Å²."""
    rows = []
    for i in range(3 * len(atoms)):
        forces = []
        for sign in (1, -1):
            moved = Atoms(atoms.symbols, atoms.positions, calculator=tblite())
            positions = moved.get_positions().ravel()
            positions[i] += sign * step
            moved.set_positions(positions.reshape(-1, 3))
            forces.append(moved.get_forces().ravel())
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


def harmonic(minimum: Atoms, second: np.ndarray, temperatures: list[float], count: int) -> list[Atoms]:
    """Draws of the classical harmonic distribution."""
    frequencies, moves = modes(minimum, second)
    omegas = np.maximum(frequencies, 100.0) / 521.4708983725064
    rng = np.random.default_rng(11)
    found = []
    for i in range(count):
        widths = np.sqrt(units.kB * temperatures[i % len(temperatures)]) / omegas
        shift = (rng.normal(size=len(widths)) * widths) @ moves
        found.append(labelled(Atoms(minimum.symbols, minimum.positions + shift.reshape(-1, 3))))
    return found


def errors(model: Path, test: Structures) -> dict[str, float]:
    ensemble = model_file.load(model)
    total = evaluate.total(evaluate.parts(test, evaluate.evaluate(ensemble, test), "test"))
    return {"energy": total.energy.rmse, "forces": total.forces.rmse}


def cached(path: Path, make) -> list[Atoms]:
    if not path.exists():
        frames = make()
        ase.io.write(path.with_suffix(".part"), frames, format="extxyz")
        path.with_suffix(".part").replace(path)
    return ase.io.read(path, ":")


def trained(folder: Path, frames: list[Atoms], settings: configuration.ExploreConfig, steps: int, members: int) -> Path:
    """Models by the exploration's recipe, trained anew on these structures."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data.xyz").exists():
        ase.io.write(folder / "data.xyz", frames, format="extxyz")
    values = settings.model_dump(include={"descriptor", "network", "training"})
    share = settings.labels.validation
    values["training"]["epochs"] = round(steps * values["training"]["batch_size"] / (len(frames) * (1 - share)))
    values |= {
        "run": str(folder / "model"),
        "data": {"files": [str(folder / "data.xyz")], "split": [1 - share, share, 0], "on_disk": False},
        "ensemble": {"members": members},
    }
    runs.start(train_config.from_dict(values), restarted=True)
    return folder / "model" / "model.pt"


def draw(path: Path, rows: list[dict]) -> None:
    """Errors by number of labels, energies and forces."""
    with drawn(path, 9.0, 3.8) as figure:
        for ax, kind, unit in zip(figure.subplots(1, 2), ("energy", "forces"), ("kcal/mol", "kcal/mol/Å"), strict=True):
            for way in dict.fromkeys(row["way"] for row in rows):
                own = sorted((row["labels"], row[kind]) for row in rows if row["way"] == way)
                ax.plot(*zip(*own, strict=True), "o-", label=way)
            ax.set(xlabel="labels", ylabel=f"RMSE of {kind}, {unit}", ylim=(0, None))
        figure.axes[0].legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--isomer", default="1-ethynylallyl")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--numbers", type=int, nargs="+", default=[100, 200, 300, 600], help="of structures")
    parser.add_argument("--steps", type=int, default=15000, help="of the optimizer, for each model")
    parser.add_argument("--members", type=int, default=4, help="models that are trained on each set of structures")
    parser.add_argument("--keys", nargs="*", default=[], metavar="key=value", help="of the exploration")
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("kinml_fast.explore").setLevel(logging.INFO)
    log.setLevel(logging.INFO)
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    start = read("shipped:C5H5.db", Selection(temperature=0.0, names=[f"{options.isomer}:minimum"]))
    minimum = Atoms("C5H5", start.coordinates, calculator=tblite())
    BFGS(minimum, logfile=None).run(fmax=1e-3, steps=500)
    ase.io.write(folder / "start.xyz", Atoms("C5H5", start.coordinates))
    cached(folder / "test.xyz", lambda: snapshots(minimum))
    test = read(folder / "test.xyz")
    values = {
        "run": str(folder / "explored"),
        "geometries": {"files": [str(folder / "start.xyz")]},
        "rounds": {"most": options.rounds},
        "test": [str(folder / "test.xyz")],
    }
    settings = train_config.changed(configuration.ExploreConfig, values, options.keys, "explored.py")
    rounds.explore(settings)
    second = hessian(minimum)
    most, temperatures = max(options.numbers), list(settings.sampling.temperatures)
    as_many = settings.geometries.model_copy(update={"count": most})
    start = [Geometry(tuple(minimum.symbols), minimum.positions, "start")]
    ways = {
        "explored": ase.io.read(folder / "explored" / "data" / "explored.xyz", ":"),
        "normal modes": cached(folder / "modes.xyz", lambda: harmonic(minimum, second, temperatures, most)),
        "displaced": cached(
            folder / "displaced.xyz", lambda: [labelled(one.atoms) for one in displaced(start, as_many, 13)]
        ),
    }
    rows = []
    for number in options.numbers:
        for way, frames in ways.items():
            if len(frames) >= number:
                place = folder / f"{way.replace(' ', '-')}-{number}"
                model = trained(place, frames[:number], settings, options.steps, options.members)
                rows.append({"way": way, "labels": number, **errors(model, test)})
                log.info("%-14s %5d labels  %.3f kcal/mol  %.3f kcal/mol/Å", *rows[-1].values())
    own = modes(minimum, second)[0]
    ours = vibrate(Atoms(minimum.symbols, minimum.positions), KinMLCalculator(folder / "explored"), optimise=True)
    apart = abs(ours.frequencies - own)
    result = {
        "isomer": options.isomer,
        "rows": rows,
        "frequencies": {"tblite": own.tolist(), "model": ours.frequencies.tolist()},
        "mean": float(apart.mean()),
        "largest": float(apart.max()),
    }
    write_json(folder / "explored.json", result)
    draw(folder / "explored.png", rows)
    log.info("frequencies against tblite: mean %.1f, largest %.1f cm⁻¹", apart.mean(), apart.max())


if __name__ == "__main__":
    main()
