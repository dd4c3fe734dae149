"""Calculators that label in the tests: molecules of springs, and ones that fail in all ways that there are."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from scipy.spatial.distance import pdist


class Springs(Calculator):
    """Morse potentials between all pairs of atoms, at rest in ASE's geometry of the molecule; eV, Å.

    Parameters
    ----------
    depth
        Of each, eV.
    fault
        What happens instead for one structure in `every`: raise, nan, crash, hang; "" for nothing.
    once
        A folder of marks: the fault happens to a structure only once.
    pause
        Seconds that a structure takes.
    """

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (ASE's)

    def __init__(self, depth=3.0, fault="", every=3, once=None, pause=0.0):
        super().__init__()
        self.depth, self.fault, self.every, self.once, self.pause = depth, fault, every, once, pause

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        if set(atoms.symbols) - {"C", "H", "O"}:
            raise ValueError(f"no springs for {atoms.symbols}\nand a second line")
        time.sleep(self.pause)
        a, b = np.triu_indices(len(atoms), 1)
        distances = pdist(atoms.positions)
        stretch = np.exp(-2.0 * (distances - pdist(reference(atoms).positions)))
        energies = self.depth * (1 - stretch) ** 2
        slopes = 4.0 * self.depth * (1 - stretch) * stretch
        pulls = (slopes / distances)[:, None] * (atoms.positions[a] - atoms.positions[b])
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, a, -pulls)
        np.add.at(forces, b, pulls)
        self.results = {"energy": energies.sum() - 10.0 * len(atoms), "forces": forces}
        if self.fault and sum(atoms.positions.tobytes()) % self.every == 0 and not self._marked(atoms):
            self._fail()

    def _marked(self, atoms: Atoms) -> bool:
        if self.once is None:
            return False
        mark = Path(self.once) / f"{sum(atoms.positions.tobytes())}"
        known = mark.exists()
        mark.touch()
        return known

    def _fail(self):
        if self.fault == "raise":
            raise RuntimeError("did not converge")
        if self.fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.fault == "hang":
            time.sleep(1000)
        self.results["forces"][0, 0] = np.nan


class Deeper(Springs):
    """Another level of theory."""

    def __init__(self, **options):
        super().__init__(depth=3.3, **options)


class WithoutForces(Calculator):
    implemented_properties = ["energy"]  # noqa: RUF012 (ASE's)

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        self.results = {"energy": 0.0}


def reference(atoms: Atoms) -> Atoms:
    """ASE's geometry of the molecule."""
    return molecule(str(atoms.symbols.formula.format("hill")).replace("CH4O", "CH3OH"))
