"""Units: inside the package energies are eV, lengths Å, forces eV/Å, stresses eV/Å³; reports are in
kcal/mol, kcal/mol/Å and GPa."""

from ase import units as _ase

KCAL_PER_MOL = _ase.mol / _ase.kcal
"""kcal/mol in one eV (23.060548012069493, ASE's CODATA 2014 value)."""

GIGAPASCAL = 1 / _ase.GPa
"""GPa in one eV/Å³ (160.21766208, ASE's CODATA 2014 value)."""

HARTREE = _ase.Hartree
"""One Hartree in eV (27.211386024367243, the same value as TorchANI's)."""

BOHR = _ase.Bohr
"""One Bohr in Å."""
