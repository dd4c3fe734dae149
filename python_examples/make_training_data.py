#!/usr/bin/env python3
"""Make training data with tblite: energies and forces of GFN2-xTB (fidelity 1) and GFN1-xTB (fidelity 0).

    pip install tblite
    python make_training_data.py                      # the sets that kinml_fast ships (kinml_fast/datasets)
    python make_training_data.py mixed --kinds modes  # twelve hydrocarbons from C2H2 to C10H16, 4 to 26 atoms (2 min)
    python make_training_data.py C2H4O=300 C3H7=500   # others: FORMULA=NUMBER OF STRUCTURES
    python make_training_data.py --smoke              # a handful, to see that it works

Every formula becomes FORMULA.db in PyKinML's SQLite layout, atoms in the formula's order. For each formula:

1. Isomers. The skeletons of ``ISOMERS``, or random ones where the formula has none there, are laid out in space and
   optimised with GFN2 (ASE's BFGS) until no force exceeds 0.005 eV/Å. A saddle point is pushed off and optimised again.
2. Surroundings of every minimum, in equal shares or by one of ``--kinds``. ``modes``: displacements along the normal
   modes (Hessian by central differences of forces), drawn from the classical harmonic distribution at each of
   ``TEMPERATURES``; modes softer than 100 cm⁻¹ count as 100 cm⁻¹. A draw that lies more than n_modes·kT above the
   minimum (twice the mean) is where the harmonic picture fails, and is drawn again. ``md``: snapshots, 50 fs apart, of
   Langevin dynamics at those temperatures (BAOAB, steps of 0.5 fs, friction 0.02/fs).
3. Labels. Every SCF starts from the same guess, so that no label depends on the structure before. The spin is the
   lowest that the number of electrons allows. Left out: SCF not converged at either level, two atoms closer than
   0.5 Å, a force component above 30 eV/Å at either level, fragments (bonds longer than 1.6 times the sum of covalent
   radii count as broken), structures with the same interatomic distances as another one within 0.001 Å.

Columns: ``name`` is ``isomer:kind`` (kind: minimum, modes, md); ``temp`` is the sampling temperature in K, 0 for a
minimum. An MD run that isomerises keeps the name it started with. Energies are in eV, coordinates in Å, forces (−dE/dx)
in eV/Å.

The same seed gives the same data on the same machine; on another one MD snapshots differ, because last digits grow.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small molecules gain nothing from threads; and sums keep their order

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.data import covalent_radii
from ase.optimize import BFGS
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from tblite.interface import Calculator as XTB

from kinml_fast.data import sqlite
from kinml_fast.data.structures import Structures

log = logging.getLogger("make_training_data")

MIXED = ("C2H2", "C2H4", "C2H6", "C3H6", "C4H6", "C3H8", "C6H6", "C7H8", "C6H12", "C10H8", "C7H16", "C10H16")
SETS = {
    "shipped": {"C5H5": 1100, "C2H2": 60, "C2H3": 80, "C3H2": 80, "C3H3": 100},
    "mixed": dict.fromkeys(MIXED, 170),
}
METHODS = {1: "GFN2-xTB", 0: "GFN1-xTB"}
TEMPERATURES = (300.0, 600.0, 1000.0, 2000.0)
KINDS = ("modes", "md")
VALENCE = {"H": 1, "C": 4, "N": 3, "O": 2, "F": 1, "S": 2, "Cl": 1}
SOFTEST = 0.0368  # eV/(Å² amu): 100 cm⁻¹
CLOSEST, STRONGEST, SAME = 0.5, 30.0, 1e-3  # Å, eV/Å, Å
BONDED, BROKEN = 1.25, 1.6  # times the sum of covalent radii

# formula: {name: (bonds between heavy atoms, number of hydrogens on each heavy atom)}
ISOMERS = {
    "C5H5": {
        "cyclopentadienyl": ("01 12 23 34 40", "11111"),
        "vinylcyclopropenyl": ("01 12 20 03 34", "01112"),
        "1-ethynylallyl": ("01 12 23 34", "10112"),
        "2-ethynylallyl": ("01 02 03 34", "02201"),
        "vinylpropargyl": ("01 12 23 34", "20012"),
        "methylbutatrienyl": ("01 12 23 34", "31001"),
        "pentatrienyl": ("01 12 23 34", "20102"),
        "methylenecyclobutenyl": ("01 12 23 30 04", "01112"),
        "ethynylcyclopropyl": ("01 12 20 03 34", "02201"),
        "bicyclopentenyl": ("01 12 23 30 04 14", "11111"),
    },
    "C2H2": {"acetylene": ("01", "11")},
    "C2H3": {"vinyl": ("01", "12"), "ethylidyne": ("01", "03")},
    "C3H2": {
        "cyclopropenylidene": ("01 12 20", "011"),
        "propargylene": ("01 12", "101"),
        "propadienylidene": ("01 12", "200"),
    },
    "C3H3": {"propargyl": ("01 12", "201"), "cyclopropenyl": ("01 12 20", "111"), "propynyl": ("01 12", "300")},
    "C2H4": {"ethylene": ("01", "22")},
    "C2H6": {"ethane": ("01", "33")},
    "C3H6": {"propene": ("01 12", "213")},
    "C4H6": {"butadiene": ("01 12 23", "2112")},
    "C3H8": {"propane": ("01 12", "323")},
    "C6H6": {"benzene": ("01 12 23 34 45 50", "111111")},
    "C7H8": {"toluene": ("01 12 23 34 45 50 06", "0111113")},
    "C6H12": {"cyclohexane": ("01 12 23 34 45 50", "222222")},
    "C10H8": {"naphthalene": ("01 12 23 34 45 50 46 67 78 89 95", "1111001111")},
    "C7H16": {"heptane": ("01 12 23 34 45 56", "3222223")},
    "C10H16": {"adamantane": ("04 41 05 52 06 63 17 72 18 83 29 93", "1111222222")},
}


def label(atoms: Atoms, method: str) -> tuple[float, np.ndarray]:
    """Return energy (eV) and forces [n_atoms, 3] (eV/Å); RuntimeError when the SCF does not converge."""
    xtb = XTB(method, atoms.numbers, atoms.positions / units.Bohr, charge=0.0, uhf=int(atoms.numbers.sum() % 2))
    xtb.set("verbosity", 0)
    xtb.set("accuracy", 0.01)
    result = xtb.singlepoint()
    return result.get("energy") * units.Hartree, -result.get("gradient") * units.Hartree / units.Bohr


class GFN2(Calculator):
    """GFN2-xTB for ASE's optimiser, without memory of the step before."""

    implemented_properties = ("energy", "forces")

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        """Fill ``results``."""
        super().calculate(atoms, properties, system_changes)
        self.results["energy"], self.results["forces"] = label(self.atoms, METHODS[1])


def bonds(atoms: Atoms, stretch: float) -> np.ndarray:
    """Return the bond matrix [n_atoms, n_atoms], bool: pairs closer than ``stretch`` times their covalent radii."""
    radii = covalent_radii[atoms.numbers]
    close = atoms.get_all_distances() < stretch * (radii[:, None] + radii[None, :])
    np.fill_diagonal(close, False)
    return close


def connected(graph: np.ndarray) -> bool:
    """Whether the bond matrix [n_atoms, n_atoms] is one molecule."""
    return connected_components(graph, directed=False, return_labels=False) == 1


def named_skeleton(symbols: list[str], drawing: tuple[str, str]) -> np.ndarray:
    """Return the bond matrix [n_atoms, n_atoms] of an entry of ``ISOMERS``; heavy atoms and hydrogens in order."""
    graph = np.zeros((len(symbols), len(symbols)), dtype=bool)
    heavy = [i for i, symbol in enumerate(symbols) if symbol != "H"]
    hydrogens = iter(i for i, symbol in enumerate(symbols) if symbol == "H")
    pairs = [(heavy[int(a)], heavy[int(b)]) for a, b in drawing[0].split()]
    pairs += [(i, next(hydrogens)) for i, count in zip(heavy, drawing[1], strict=True) for _ in range(int(count))]
    for i, j in pairs:
        graph[i, j] = graph[j, i] = True
    return graph


def random_skeleton(symbols: list[str], rng: np.random.Generator) -> np.ndarray:
    """Return a random connected bond matrix [n_atoms, n_atoms]: a tree, some rings, no atom above its valence."""
    valence = np.array([VALENCE[symbol] for symbol in symbols])
    order = sorted(rng.permutation(len(symbols)), key=lambda i: -min(valence[i], 2))  # monovalent atoms last
    while True:
        graph = np.zeros((len(symbols), len(symbols)), dtype=bool)
        for n, i in enumerate(order[1:], start=1):
            free = [j for j in order[:n] if graph[j].sum() < valence[j]]
            if not free:
                break
            j = rng.choice(free)
            graph[i, j] = graph[j, i] = True
        else:
            for _ in range(rng.integers(3)):
                i, j = rng.choice(len(symbols), 2, replace=False)
                if graph[i].sum() < valence[i] and graph[j].sum() < valence[j]:
                    graph[i, j] = graph[j, i] = True
            return graph


def embed(symbols: list[str], graph: np.ndarray, rng: np.random.Generator) -> Atoms:
    """Lay out a bond matrix in space: bonds at the sum of covalent radii, all else apart."""
    atoms = Atoms(symbols, rng.normal(scale=1.5, size=(len(symbols), 3)))
    radii = covalent_radii[atoms.numbers]
    rest = radii[:, None] + radii[None, :]
    second = (graph.astype(int) @ graph > 0) & ~graph
    apart = np.where(second, 1.65, 2.2) * rest
    upper = np.triu_indices(len(symbols), 1)

    def strain(flat: np.ndarray) -> float:
        x = flat.reshape(-1, 3)
        d = np.sqrt(np.sum((x[upper[0]] - x[upper[1]]) ** 2, axis=1) + 1e-12)
        off = np.where(graph[upper], d - rest[upper], np.maximum(apart[upper] - d, 0.0) * 0.5)
        return float(np.sum(off**2))

    atoms.positions = minimize(strain, atoms.positions.ravel(), method="L-BFGS-B").x.reshape(-1, 3)
    return atoms


def normal_modes(atoms: Atoms, step: float = 0.005) -> tuple[np.ndarray, np.ndarray]:
    """Return the normal modes of GFN2, softest first.

    Force constants [n_modes] in eV/(Å² amu), displacements [n_modes, n_atoms, 3] per unit of mass-weighted coordinate
    (Å √amu). Translations and rotations (two of a linear molecule) are projected out.
    """
    hessian = np.empty((3 * len(atoms), 3 * len(atoms)))
    for i in range(3 * len(atoms)):
        forces = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[i // 3, i % 3] += sign * step
            forces.append(label(moved, METHODS[1])[1].ravel())
        hessian[i] = (forces[1] - forces[0]) / (2 * step)
    root = np.sqrt(atoms.get_masses())
    weights = np.repeat(root, 3)
    hessian = (hessian + hessian.T) / 2 / np.outer(weights, weights)
    x = atoms.positions - atoms.get_center_of_mass()
    rigid = [np.tile(axis, (len(x), 1)) for axis in np.eye(3)] + [np.cross(axis, x) for axis in np.eye(3)]
    _, size, rows = np.linalg.svd(np.array([(r * root[:, None]).ravel() for r in rigid]))
    inner = rows[np.sum(size > 1e-2 * size[0]) :]
    constants, vectors = np.linalg.eigh(inner @ hessian @ inner.T)
    return constants, (vectors.T @ inner).reshape(len(constants), -1, 3) / root[:, None]


def optimise(atoms: Atoms) -> tuple[Atoms, np.ndarray, np.ndarray] | None:
    """Return the minimum downhill of ``atoms`` with its normal modes; None where there is none to be found."""
    atoms = atoms.copy()
    for _ in range(4):
        atoms.calc = GFN2()
        try:
            if not BFGS(atoms, logfile=None).run(fmax=0.005, steps=500):
                return None
            constants, displacements = normal_modes(atoms)
        except RuntimeError:
            return None
        if constants[0] > 0:
            return atoms, constants, displacements
        atoms = Atoms(atoms.symbols, atoms.positions + 0.2 * displacements[0])
    return None


def find_isomers(formula: str, symbols: list[str], count: int, rng: np.random.Generator) -> dict[str, tuple]:
    """Return {name: (atoms, force constants, displacements)}: those of ``ISOMERS``, else ``count`` random ones."""
    found: dict[str, tuple] = {}
    for name, drawing in ISOMERS.get(formula, {}).items():
        graph = named_skeleton(symbols, drawing)
        for _ in range(10):
            minimum = optimise(embed(symbols, graph, rng))
            if minimum and np.array_equal(bonds(minimum[0], BONDED), graph):
                found[name] = minimum
                break
        else:
            log.warning("%s: %s is no minimum of GFN2-xTB, left out", formula, name)
    for _ in range(0 if found else 10 * count):
        minimum = optimise(embed(symbols, random_skeleton(symbols, rng), rng))
        if minimum and connected(bonds(minimum[0], BONDED)):
            energies = np.array([atoms.get_potential_energy() for atoms, _, _ in found.values()])
            known = np.abs(energies - minimum[0].get_potential_energy()) < 1e-3  # eV
            if not known.any():
                found[f"isomer{len(found) + 1}"] = minimum
        if len(found) == count:
            break
    return found


def thermal(minimum: tuple, temperature: float, rng: np.random.Generator) -> tuple[Atoms, float]:
    """Return a draw from the classical harmonic distribution at ``temperature`` (K), and how high it may lie (eV)."""
    atoms, constants, displacements = minimum
    spread = np.sqrt(units.kB * temperature / np.maximum(constants, SOFTEST))
    moved = np.tensordot(rng.normal(size=len(spread)) * spread, displacements, axes=1)
    ceiling = atoms.get_potential_energy() + len(constants) * units.kB * temperature
    return Atoms(atoms.symbols, atoms.positions + moved), ceiling


def dynamics(minimum: tuple, temperature: float, rng: np.random.Generator, every: int = 100):
    """Yield a snapshot of Langevin dynamics at ``temperature`` (K) every so many steps, without end.

    It starts again from ``minimum`` when the molecule has fallen apart or the SCF fails.
    """
    dt = 0.5 * units.fs
    mass = minimum[0].get_masses()[:, None]
    thermal_momentum = np.sqrt(units.kB * temperature * mass)
    keep = np.exp(-0.02 / units.fs * dt)
    while True:
        atoms = Atoms(minimum[0].symbols, minimum[0].positions)
        p = rng.normal(size=atoms.positions.shape) * thermal_momentum
        try:
            forces = label(atoms, METHODS[1])[1]
            while connected(bonds(atoms, BROKEN)):
                for _ in range(every):
                    p += 0.5 * dt * forces
                    atoms.positions += 0.5 * dt * p / mass
                    p = keep * p + np.sqrt(1 - keep**2) * thermal_momentum * rng.normal(size=p.shape)
                    atoms.positions += 0.5 * dt * p / mass
                    forces = label(atoms, METHODS[1])[1]
                    p += 0.5 * dt * forces
                yield atoms.copy()
        except RuntimeError:
            log.info("dynamics at %g K: SCF failed, started again", temperature)


class Collection:
    """The structures kept so far, with their labels, and why others were not."""

    def __init__(self):
        self.kept: list[tuple[Atoms, dict[int, tuple[float, np.ndarray]], float, str]] = []
        self.rejected: Counter[str] = Counter()
        self._distances = np.empty((0, 0))

    def offer(self, atoms: Atoms, temperature: float, name: str, ceiling: float = np.inf) -> bool:
        """Label a structure and keep it if nothing is wrong with it; return whether it was kept.

        ``ceiling`` is the highest GFN2 energy (eV) that is taken.
        """
        atoms = atoms.copy()
        atoms.positions -= atoms.get_center_of_mass()
        upper = np.triu_indices(len(atoms), 1)
        distances = atoms.get_all_distances()[upper]
        known = self._distances.reshape(-1, len(distances))
        if distances.min() < CLOSEST:
            return self._reject("atoms too close")
        if not connected(bonds(atoms, BROKEN)):
            return self._reject("fragments")
        if np.any(np.all(np.abs(known - distances) < SAME, axis=1)):
            return self._reject("duplicate")
        try:
            labels = {fidelity: label(atoms, method) for fidelity, method in METHODS.items()}
        except RuntimeError:
            return self._reject("SCF not converged")
        if max(np.abs(forces).max() for _, forces in labels.values()) > STRONGEST:
            return self._reject("strong force")
        if labels[1][0] > ceiling:
            return self._reject("above the thermal range")
        self._distances = np.vstack([known, distances])
        self.kept.append((atoms, labels, temperature, name))
        return True

    def _reject(self, why: str) -> bool:
        self.rejected[why] += 1
        return False


def make(
    formula: str,
    count: int,
    folder: Path,
    seed: int,
    isomers: int,
    created_at: str | None,
    kinds: Sequence[str] = KINDS,
) -> Path:
    """Make ``count`` structures of ``formula`` and write them to ``folder/formula.db``; return that path."""
    symbols = [s for s, n in re.findall(r"([A-Z][a-z]?)(\d*)", formula) for _ in range(int(n or 1))]
    rng = np.random.default_rng([seed, *formula.encode()])
    found = find_isomers(formula, symbols, isomers, rng)
    if not found:
        raise SystemExit(f"{formula}: no minimum found")
    collection = Collection()
    for n, (isomer, minimum) in enumerate(found.items()):
        collection.offer(minimum[0], 0.0, f"{isomer}:minimum")
        share = count // len(found) + (n < count % len(found)) - 1
        sources = [(kind, temperature) for temperature in TEMPERATURES for kind in kinds]
        for m, (kind, temperature) in enumerate(sources):
            wanted = share // len(sources) + (m < share % len(sources))
            snapshots = dynamics(minimum, temperature, rng)
            for _ in range(20 * wanted):
                if wanted == 0:
                    break
                if kind == "modes":
                    atoms, ceiling = thermal(minimum, temperature, rng)
                else:
                    atoms, ceiling = next(snapshots), np.inf
                wanted -= collection.offer(atoms, temperature, f"{isomer}:{kind}", ceiling)
        energies = [labels[1][0] for _, labels, _, name in collection.kept if name.startswith(f"{isomer}:")]
        log.info("%s %s: %d structures, %.3f to %.3f eV", formula, isomer, len(energies), min(energies), max(energies))
    rejected = ", ".join(f"{why} {times}" for why, times in sorted(collection.rejected.items())) or "none"
    log.info("%s: %d structures kept; rejected: %s", formula, len(collection.kept), rejected)
    path = folder / f"{formula}.db"
    kept, labels, temperatures, names = zip(*collection.kept, strict=True)
    coordinates = np.array([atoms.positions for atoms in kept])
    levels = {
        fidelity: Structures.of_one_formula(
            symbols, coordinates, np.array([x[fidelity][0] for x in labels]), np.array([x[fidelity][1] for x in labels])
        )
        for fidelity in METHODS
    }
    sqlite.write(path, levels, temperatures=temperatures, names=names, calc=METHODS, created_at=created_at)
    return path


def main() -> None:
    """Read the command line and make every set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sets", nargs="*", metavar="SET", help=f"FORMULA=NUMBER, or {' or '.join(SETS)} (default: shipped)"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="how to sample (default: both ways)")
    parser.add_argument("-o", "--output", type=Path, default=Path(), help="folder for the databases (default: here)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--isomers", type=int, default=8, help="random isomers of a formula without named ones (default: 8)"
    )
    parser.add_argument("--created-at", help="time stamp of the rows (default: now); a fixed one makes equal files")
    parser.add_argument("--smoke", action="store_true", help="a handful of structures in a temporary folder")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    wanted: dict[str, int] = {}
    for text in arguments.sets or ["shipped"]:
        if text in SETS:
            wanted |= SETS[text]
        elif re.fullmatch(r"([A-Z][a-z]?\d*)+=\d+", text):
            formula, number = text.split("=")
            wanted[formula] = int(number)
        else:
            parser.error(f"expected FORMULA=NUMBER, as in C2H4O=300, or {' or '.join(SETS)}, got {text}")
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            for formula in ("C2H3", "CH2O"):
                log.info(
                    "%s: %d bytes", formula, make(formula, 10, Path(folder), arguments.seed, 1, None).stat().st_size
                )
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    for formula, count in wanted.items():
        path = make(
            formula,
            count,
            arguments.output,
            arguments.seed,
            arguments.isomers,
            arguments.created_at,
            arguments.kinds,
        )
        log.info("wrote %s", path)


if __name__ == "__main__":
    main()
