"""A model as a force of OpenMM (`openmm.PythonForce`, OpenMM 8.4 and later)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ase.units
import numpy as np
from ase import Atoms

from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.errors import ConfigError

KJ_PER_MOL = ase.units.kJ / ase.units.mol
"""One kJ/mol in eV."""


class OpenMMForce:
    """What OpenMM calls for energy and forces; it can be pickled, and so saved with `openmm.XmlSerializer`.

    Parameters
    ----------
    calculator
        What computes.
    symbols
        Elements of the atoms, in OpenMM's order.
    periodic
        Whether the atoms are in OpenMM's periodic box.
    """

    def __init__(self, calculator: KinMLCalculator, symbols: Sequence[str], periodic: bool = False) -> None:
        self.calculator = calculator
        self.atoms = Atoms(symbols, pbc=periodic)

    def __call__(self, state: Any) -> tuple[float, np.ndarray]:
        """Energy in kJ/mol and forces [n, 3] in kJ/mol/nm of an `openmm.State`.

        Raises
        ------
        CalculatorInputError
            As `KinMLCalculator`; OpenMM makes it an `OpenMMException` with the same sentence.
        """
        self.atoms.positions = np.asarray(state.getPositions(asNumpy=True)._value) * 10
        if self.atoms.pbc.any():
            self.atoms.cell = np.asarray(state.getPeriodicBoxVectors(asNumpy=True)._value) * 10
        energy = self.calculator.get_property("energy", self.atoms)
        forces = self.calculator.get_property("forces", self.atoms)
        return energy / KJ_PER_MOL, forces * (10 / KJ_PER_MOL)


def make(calculator: KinMLCalculator, symbols: Sequence[str], periodic: bool = False) -> Any:
    """The force of a molecule or a periodic box, for `openmm.System.addForce`.

    Parameters
    ----------
    calculator
        What computes.
    symbols
        Elements of the atoms, in OpenMM's order. For a part of a system call `setParticles` of what is returned.
    periodic
        Whether they are in OpenMM's periodic box, all three vectors of it.

    Returns
    -------
    openmm.PythonForce

    Raises
    ------
    ConfigError
        OpenMM is not installed, or is older than 8.4.
    """
    try:
        from openmm import PythonForce
    except ImportError as error:
        raise ConfigError(f"OpenMM 8.4 or later is needed ({error}): pip install 'openmm>=8.4'") from error
    force = PythonForce(OpenMMForce(calculator, symbols, periodic))
    force.setUsesPeriodicBoundaryConditions(periodic)
    return force
