"""From a molecule to MESS inputs: an ensemble that explored C2H5 by itself, and tblite, from which it learned.

    python benchmarks/from_molecule.py FOLDER            # forty minutes on one core; what is there is not done again

1. `kinml-fast explore`: C2H5, guesses of two saddle points, and two pairs of products far apart, labelled by GFN2-xTB;
   then 2,000 geometries around the ensemble's own reaction paths are labelled, and it goes on training ("paths").
2. Minimum, saddle points, frequencies and barriers of the ensemble, and tblite's own from the same guesses by the same
   searches (`kinml_fast.kinetics.saddle`), with second derivatives by central differences of its forces.
3. `kinml-fast kinbot` with the ensemble and with tblite: the same input but for nn_model.
4. 2,000 geometries around those that KinBot's searches with the ensemble went through are labelled too, and 2 and 3 are
   done again with the ensemble that goes on training with them ("searches").

FOLDER/from_molecule.json has the numbers; the tables are printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import CalculationFailed
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from tblite.ase import TBLite

from kinml_fast import KinMLCalculator
from kinml_fast.errors import DataError
from kinml_fast.explore import config as configuration
from kinml_fast.explore import rounds
from kinml_fast.explore.folder import write_json
from kinml_fast.kinetics import Vibrations, saddle, vibrate
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train import config as train_config
from kinml_fast.train import runs
from kinml_fast.units import KCAL_PER_MOL

log = logging.getLogger("from_molecule")

METHOD = "GFN2-xTB"
ETHYL = [
    *([0, 0, 0], [1.485, 0, 0], [-0.40, 1.02, 0], [-0.40, -0.51, 0.883], [-0.40, -0.51, -0.883]),
    *([2.04, 0, 0.925], [2.04, 0, -0.925]),
]
GUESSES = {
    "1,2-shift of H": [
        *([0, 0, 0], [1.39, 0, 0], [0.695, 1.08, 0], [-0.56, -0.12, 0.92], [-0.56, -0.12, -0.92]),
        *([1.95, -0.12, 0.92], [1.95, -0.12, -0.92]),
    ],
    "C2H4 + H, above both C": [
        *([0, 0, 0], [1.34, 0, 0], [-0.30, 1.93, 0], [-0.56, -0.05, 0.93], [-0.56, -0.05, -0.93]),
        *([1.90, 0, 0.93], [1.90, 0, -0.93]),
    ],
}
FURTHER = {
    "C2H4 + H, above one C": [
        *([0, 0, 0], [1.30, 0.22, -0.09], [-1.32, 1.89, -0.88], [-0.47, -0.31, 0.92], [-0.66, 0.14, -0.84]),
        *([1.96, 0.06, 0.74], [1.76, 0.56, -1.01]),
    ],
}
"""A saddle point that KinBot finds with tblite, of which the exploration is not told."""
PRODUCTS = {
    "C2H4 + H": [
        *([0, 0, 0], [1.33, 0, 0], [0.6, 7.0, 0], [-0.56, 0, 0.93], [-0.56, 0, -0.93]),
        *([1.89, 0, 0.93], [1.89, 0, -0.93]),
    ],
    "C2H3 + H2": [
        *([0, 0, 0], [1.3, 0, 0], [0.6, 7.0, 0], [-0.57, 0.93, 0], [-0.57, -0.93, 0]),
        *([0.6, 7.74, 0], [1.98, 0.85, 0]),
    ],
}
KINBOT = {
    "charge": 0,
    "mult": 2,
    "qc": "nn_pes",
    "use_sella": 1,
    "sella_kwargs": {"internal": False, "gamma": 0.0},
    "queuing": "local",
    "families": ["intra_H_migration", "r12_insertion_R", "h2_elim"],
    "barrier_threshold": 80.0,
    "me": 2,
    "epsilon": 100.0,
    "sigma": 4.0,
    "uq": 1,
    "uq_n": 20,
}


class WithHessian(TBLite):
    """tblite with second derivatives: central differences of its forces, each of a calculation of its own."""

    def get_hessian(self, atoms: Atoms, step: float = 0.005) -> np.ndarray:
        rows = []
        for i in range(3 * len(atoms)):
            forces = []
            for sign in (1, -1):
                moved = Atoms(atoms.symbols, atoms.positions, calculator=tblite())
                moved.positions[i // 3, i % 3] += sign * step
                forces.append(moved.get_forces().ravel())
            rows.append((forces[1] - forces[0]) / (2 * step))
        return (np.array(rows) + np.array(rows).T) / 2


def tblite() -> WithHessian:
    return WithHessian(method=METHOD, charge=0, multiplicity=2, verbosity=0)


def reference() -> KinMLCalculator:
    """tblite as a calculator of this package: differences to it that are zero."""
    zero = EnergyModel(AEVParameters.aevmod(("C", "H"), 4, 2, 2), (1,), ("identity",), baseline=0)
    with torch.no_grad():
        zero.networks.weights.zero_()
    return KinMLCalculator(zero, base=tblite())


def ethyl() -> Atoms:
    """C2H5 without symmetry, so that searches do not stop at the top of a rotor's barrier."""
    found = Atoms("C2H5", ETHYL)
    found.rattle(0.05, seed=0)
    return found


def explored(folder: Path, keys: list[str]) -> Path:
    """Explore, or go on; the ensemble's file."""
    ase.io.write(folder / "start.xyz", [Atoms("C2H5", x) for x in (ETHYL, *PRODUCTS.values())], format="extxyz")
    ase.io.write(folder / "guesses.xyz", [Atoms("C2H5", x) for x in GUESSES.values()], format="extxyz")
    values = {
        "run": str(folder / "explored"),
        "geometries": {
            "files": [str(folder / "start.xyz")],
            "saddles": [str(folder / "guesses.xyz")],
            "count": 400,
            "temperatures": [300.0, 600.0, 1500.0],
        },
        "labels": {"calculator": f"tblite:{METHOD}", "options": {"charge": 0, "multiplicity": 2}},
        "sampling": {"temperatures": [300.0, 600.0, 1000.0, 2000.0], "steps": 1000, "saddles": True},
        "selection": {"most": 300},
        "rounds": {"most": 4},
        "ensemble": {"members": 3},
    }
    rounds.explore(train_config.changed(configuration.ExploreConfig, values, keys, "from_molecule.py"))
    return folder / "explored" / "model.pt"


def of_paths(model: Path) -> list[Atoms]:
    """Geometries on the model's own reaction paths, of which an exploration takes few; a guess without a path."""
    calculator = KinMLCalculator(model)
    frames: list[Atoms] = []
    for name, positions in (GUESSES | FURTHER).items():
        try:
            found, _ = saddle.search(Atoms("C2H5", positions), calculator)
            frames += saddle.follow(found, calculator).frames[::2]
        except DataError as error:
            log.info("%s: %s", name, error)
            frames.append(Atoms("C2H5", positions))
    return frames


def of_searches(folder: Path) -> list[Atoms]:
    """Geometries that KinBot's searches went through."""
    frames = [one for path in sorted(folder.glob("*.traj")) for one in ase.io.read(path, ":")]
    return [Atoms(one.symbols, one.positions) for one in frames if str(one.symbols.get_chemical_formula()) == "C2H5"]


def refined(folder: Path, name: str, frames: Callable[[], list[Atoms]], start: Path, most: float, epochs: int) -> Path:
    """Go on training, from the models of a run, with 2,000 labels around geometries, displaced by up to `most` Å."""
    path = folder / f"{name}.xyz"
    if not path.exists():
        around = frames()
        rng = np.random.default_rng(0)
        moved = [around[i] for i in rng.permutation(np.arange(2000) % len(around))]
        labels = [
            labelled(Atoms(one.symbols, one.positions + rng.normal(0, rng.uniform(0.01, most), (7, 3))))
            for one in moved
        ]
        ase.io.write(path.with_suffix(".part"), [one for one in labels if one is not None], format="extxyz")
        path.with_suffix(".part").replace(path)
    settings = configuration.with_values(train_config.read_yaml(folder / "explored" / "explore.yaml", ()), "explored")
    values = settings.model_dump(include={"descriptor", "network", "training", "ensemble"})
    values["training"] |= {"epochs": epochs, "batch_size": 10}
    values["training"]["optimizer"]["learning_rate"] = 3e-3
    data = [folder / "explored" / "data" / "explored.xyz", *(folder / f"{one}.xyz" for one in ("paths", "searches"))]
    values |= {
        "run": str(folder / f"refined-{name}"),
        "start": {"model": str(start)},
        "data": {"files": [str(one) for one in data if one.exists()], "split": [0.95, 0.05, 0], "on_disk": False},
    }
    if not (folder / f"refined-{name}" / "model.pt").exists():
        runs.start(train_config.from_dict(values), restarted=True)
    return folder / f"refined-{name}"


def labelled(atoms: Atoms) -> Atoms | None:
    """With tblite's energy and forces; None where it gives none."""
    atoms.calc = tblite()
    try:
        forces = atoms.get_forces()
    except CalculationFailed:
        return None
    atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy(), forces=forces)
    return atoms


def points(calculator: KinMLCalculator, starts: dict[str, Atoms]) -> dict[str, Vibrations]:
    """The minimum and the saddle points that are found from geometries."""
    found = {}
    for name, start in starts.items():
        try:
            if name == "C2H5":
                found[name] = vibrate(start, calculator, optimise=True)
            else:
                found[name], _ = saddle.search(start, calculator)
        except DataError as error:
            log.info("%s: %s", name, error)
    return found


def told(one: Vibrations, well: Vibrations) -> dict[str, Any]:
    """Energies above the minimum (kcal/mol, with zero-point energies too), frequencies (cm⁻¹)."""
    energy = one.energy - well.energy
    values: dict[str, Any] = {
        "electronic": energy * KCAL_PER_MOL,
        "energy": (energy + one.zero_point_energy - well.zero_point_energy) * KCAL_PER_MOL,
        "frequencies": one.frequencies.tolist(),
    }
    if one.calibrated_energies is not None:
        above = [x.calibrated_energies + x.calibrated_zero_point_energies for x in (one, well)]
        values["energy_std"] = float((above[0] - above[1]).std(ddof=1)) * KCAL_PER_MOL
        values["frequencies_std"] = one.frequencies_std.tolist()
    return values


def compared(model: dict[str, dict[str, Any]], own: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Differences of what both have."""
    apart, energies = [], []
    for name in own:
        if name in model:
            apart += np.abs(np.subtract(model[name]["frequencies"], own[name]["frequencies"])).tolist()
            if name != "C2H5":
                energies.append(abs(model[name]["energy"] - own[name]["energy"]))
    return {
        "frequencies_mean": float(np.mean(apart)),
        "frequencies_largest": float(np.max(apart)),
        "barriers_mean": float(np.mean(energies)) if energies else None,
        "barriers_largest": float(np.max(energies)) if energies else None,
    }


def searched(folder: Path, nn_model: list[str]) -> dict[str, Any]:
    """Run KinBot, or read what it has found."""
    structure = ethyl()
    folder.mkdir(exist_ok=True)
    if not (folder / "seconds.json").exists():
        listed = [
            x for symbol, at in zip(structure.symbols, structure.positions.tolist(), strict=True) for x in (symbol, *at)
        ]
        write_json(folder / "in.json", KINBOT | {"structure": listed, "nn_model": nn_model})
        begun = time.perf_counter()
        command = [sys.executable, "-m", "kinml_fast.cli", "kinbot", "in.json"]
        with (folder / "out.txt").open("a") as out:
            subprocess.run(command, cwd=folder, stdout=out, stderr=out, check=True)
        write_json(folder / "seconds.json", time.perf_counter() - begun)
    (summary,) = folder.glob("summary_*.out")
    said = (folder / "kinbot.log").read_text()
    barriers = re.findall(r"Rxn barrier (?:is|too high) \(?(\S+) kcal/mol\)?(?: at L1)? for \S+?_(\D\S+)", said)
    rows = dict[str, dict[str, Any]]()
    database = connect(folder / "kinbot.db")
    for status, name, products in re.findall(r"(SUCCESS|FAILED)\s+(?:\S+\s+)?\d+_(\D\S+)(.*)", summary.read_text()):
        kept = [
            row.data["frequencies"]
            for row in database.select()
            if row.name.endswith(name) and "frequencies" in row.data
        ]
        rows[name] = {
            "barrier": next((float(energy) for energy, of in reversed(barriers) if of == name), None),
            "reaction": status == "SUCCESS",
            "products": [word for word in products.split() if word.isdigit()],
            "frequencies": list(kept[-1]) if kept else [],
        }
    found: dict[str, Any] = {
        "seconds": json.loads((folder / "seconds.json").read_text()),
        "searches": rows,
        "mess_inputs": len(list((folder / "me").glob("mess_*.inp"))),
        "calculations": len({row.name for row in database.select()}),
    }
    if (folder / "uncertainties.json").exists():
        told = json.loads((folder / "uncertainties.json").read_text())
        found["measured"] = told["measured"]
        for one in told["points"]:
            name = one["name"].partition("_")[2]
            if name in rows:
                rows[name]["barrier_std"] = one["energy_std"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keys", nargs="*", default=[], metavar="key=value", help="of the exploration")
    parser.add_argument("--until", choices=("explore", "points", "kinbot"), default="kinbot", help="the last part")
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("kinml_fast.explore").setLevel(logging.INFO)
    log.setLevel(logging.INFO)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = explored(folder, options.keys)
    if options.until == "explore":
        return
    last = sorted((folder / "explored").glob("round-*/model"))[-1]
    once = refined(folder, "paths", lambda: of_paths(model), last, 0.12, 600)
    result: dict[str, Any] = {"method": METHOD, "labels": {}}
    starts = {"C2H5": ethyl()} | {name: Atoms("C2H5", x) for name, x in (GUESSES | FURTHER).items()}
    found = points(reference(), starts)
    own = {name: told(one, found["C2H5"]) for name, one in found.items()}
    for one in found.values():
        one.atoms.rattle(0.02, seed=0)  # a search keeps the symmetry that it begins with
    near = {name: one.atoms for name, one in found.items()}
    searches = {"tblite": searched(folder / "kinbot-tblite", [f"tblite:{METHOD}"])} if options.until == "kinbot" else {}
    result |= {"points": {"tblite": {"points": own}}, "kinbot": searches}
    for name, run in (("paths", once), ("searches", None)):
        if run is None:
            if options.until != "kinbot":
                break
            run = refined(folder, name, lambda: of_searches(folder / "kinbot-paths"), once, 0.05, 120)
        file = run / "model.pt"
        found = points(KinMLCalculator(file), near)
        of_model = {name: told(one, found["C2H5"]) for name, one in found.items()}
        result["points"][name] = {"points": of_model, "differences": compared(of_model, own)}
        result["labels"][name] = len(ase.io.read(folder / f"{name}.xyz", ":"))
        if options.until == "kinbot":
            searches[name] = searched(folder / f"kinbot-{name}", [str(file)])
    result["labels"]["explored"] = len(ase.io.read(folder / "explored" / "data" / "explored.xyz", ":"))
    for kind, of_kind in result["points"].items():
        log.info("%s: %s", kind, of_kind.get("differences", ""))
        for name, one in of_kind["points"].items():
            spread = f" ± {one['energy_std']:.2f}" if "energy_std" in one else ""
            log.info("  %-24s %7.2f%s (%.0f cm⁻¹)", name, one["energy"], spread, one["frequencies"][0])
    for kind, of_kind in searches.items():
        log.info("%s: %.0f s, %d calculations", kind, of_kind["seconds"], of_kind["calculations"])
        for name, row in of_kind["searches"].items():
            log.info("  %-24s %s", name, {key: row[key] for key in row if key != "frequencies"})
    write_json(folder / "from_molecule.json", result)


if __name__ == "__main__":
    main()
