"""Energies and forces by PySCF, whose own calculator for ASE takes no names of methods."""

from __future__ import annotations

from typing import Any

import ase.units
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes

from kinml_fast.errors import ConfigError

_CORRELATED = ("MP2", "CCSD")


class PySCF(Calculator):
    """Molecules by Hartree-Fock, MP2, CCSD or a density functional (Sun et al., J. Chem. Phys. 2020, 153, 024109, DOI
    10.1063/5.0006074), unrestricted where electrons are unpaired.

    Parameters
    ----------
    level
        METHOD/BASIS: HF, MP2, CCSD or a functional of PySCF's; a basis set that PySCF has, such as B3LYP/def2-SVP.
    charge
        Of the molecule, in elementary charges.
    mult
        Its multiplicity, 2S + 1; None: 1, or 2 with an odd number of electrons.

    Raises
    ------
    ConfigError
        PySCF is not installed, or the level has another form.
    CalculationFailed
        From a calculation: a number of electrons that the multiplicity does not fit, or no convergence.
    """

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (as ASE has it)

    def __init__(self, level: str, charge: int = 0, mult: int | None = None) -> None:
        super().__init__()
        method, slash, basis = level.partition("/")
        if not (method and slash and basis):
            raise ConfigError(f"pyscf:{level}: is not of the form pyscf:METHOD/BASIS, such as pyscf:B3LYP/def2-SVP")
        try:
            import pyscf  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"pyscf:{level}: needs the package pyscf ({error}): pip install pyscf") from error
        self._method, self._basis, self._charge, self._mult = method, basis, charge, mult

    def calculate(
        self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes
    ) -> None:
        """See ASE's Calculator."""
        import pyscf

        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        electrons = int(self.atoms.numbers.sum()) - self._charge
        unpaired = electrons % 2 if self._mult is None else self._mult - 1
        if (electrons - unpaired) % 2 or not 0 <= unpaired <= electrons:
            raise CalculationFailed(
                f"{self.atoms.symbols} with the charge {self._charge} has {electrons} electrons, which the "
                f"multiplicity {unpaired + 1} does not fit"
            )
        places = list(zip(self.atoms.get_chemical_symbols(), self.atoms.positions, strict=True))
        molecule = pyscf.M(
            atom=places, basis=self._basis, charge=self._charge, spin=unpaired, unit="Angstrom", verbose=0
        )
        correlated = self._method.upper() in _CORRELATED
        if correlated or self._method.upper() == "HF":
            field = molecule.RHF() if unpaired == 0 else molecule.UHF()
        else:
            field = molecule.RKS() if unpaired == 0 else molecule.UKS()
            field.xc = self._method
        solved = [field.run(conv_tol=1e-10)]
        if correlated:
            solved.append(getattr(field, self._method.upper())().run())
        for step in solved:
            if not getattr(step, "converged", True):
                raise CalculationFailed(f"{type(step).__name__} of {self.atoms.symbols} did not converge")
        gradient = solved[-1].Gradients().kernel()
        self.results = {
            "energy": float(solved[-1].e_tot) * ase.units.Hartree,
            "forces": -gradient * (ase.units.Hartree / ase.units.Bohr),
        }
