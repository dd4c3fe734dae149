"""Vibrations of a molecule in the harmonic approximation, from analytic second derivatives of a model.

Rotations and translations are projected out of the mass-weighted Hessian (Miller, Handy, Adams, J. Chem. Phys. 1980,
72, 99, DOI 10.1063/1.438959), so that 3N - 6 modes are left, of a linear molecule 3N - 5, of an atom none.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import ase.units
import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.optimize import BFGS
from ase.thermochemistry import IdealGasThermo
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist

from kinml_fast.deploy import members, model_file
from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.errors import ConfigError, DataError, InputError, first_line
from kinml_fast.kinetics import symmetry

log = logging.getLogger(__name__)

FMAX = 1e-3
"""eV/Å, the largest force on an atom of what counts as a minimum or saddle point."""
STEPS = 500
Optimiser = Literal["bfgs", "sella"]
"""What goes to a minimum."""
_WAVENUMBER = ase.units._hbar * 1e10 / np.sqrt(ase.units._e * ase.units._amu) / ase.units.invcm
"""cm⁻¹ of the angular frequency √(eV/(Å² u))."""
_MILLIDYNE = ase.units._e * 1e18
"""mdyn/Å in one eV/Å²."""
_BONDED = 1.4
"""Times the sum of covalent radii: farther apart, two atoms are not bonded."""


def lowest_spin(atoms: Atoms) -> float:
    """0 of a molecule whose number of electrons is even without a charge, 0.5 of another."""
    return 0.5 * (int(atoms.numbers.sum()) % 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Vibrations:
    """Harmonic vibrations of a molecule of n atoms, k of them.

    Attributes
    ----------
    atoms
        The geometry that they are of.
    energy
        eV.
    largest_force
        eV/Å, on an atom of this geometry.
    hessian
        [3n, 3n], eV/Å², of an ensemble that of the mean energy.
    frequencies
        [k], cm⁻¹, ascending; an imaginary one is negative.
    modes
        [k, n, 3], displacements of the atoms (not weighted by masses), the largest of each mode 1.
    reduced_masses
        [k], u, of displacements whose squares sum to 1 over all atoms, as quantum-chemistry programs print them.
    members
        [M, k], cm⁻¹, what each of M members gives for these modes; None of a single model.
    member_energies
        [M], eV; None of a single model.
    energy_factor, factors
        Factors of the members' deviations, of the energy and [k] of the modes; 1 of what is not calibrated. The factor
        of a mode is the root of the mean square of the factors of forces (`members.factors`), atoms counting by
        the squares of their displacements: a second derivative along a mode is that of the forces along it.
    geometry, symmetry_number
        monatomic, linear or nonlinear, and the rotational symmetry number.
    """

    atoms: Atoms
    energy: float
    largest_force: float
    hessian: np.ndarray
    frequencies: np.ndarray
    modes: np.ndarray
    reduced_masses: np.ndarray
    members: np.ndarray | None
    member_energies: np.ndarray | None
    energy_factor: float
    factors: np.ndarray
    geometry: symmetry.Shape
    symmetry_number: int

    @property
    def imaginary(self) -> int:
        """How many modes are imaginary: 0 of a minimum, 1 of a saddle point."""
        return int((self.frequencies < 0).sum())

    @property
    def force_constants(self) -> np.ndarray:
        """[k], eV/Å², of the modes with their reduced masses; negative of imaginary ones."""
        return np.sign(self.frequencies) * (self.frequencies / _WAVENUMBER) ** 2 * self.reduced_masses

    @property
    def zero_point_energy(self) -> float:
        """eV, of the modes that are real."""
        return float(_zero_point_energies(self.frequencies))

    @property
    def calibrated_members(self) -> np.ndarray | None:
        """[M, k], cm⁻¹, the members with their differences from the mean multiplied by the factors."""
        return None if self.members is None else _widened(self.members, self.factors)

    @property
    def calibrated_energies(self) -> np.ndarray | None:
        """[M], eV, the energies of the members likewise; differences of two points deviate as these differences do."""
        return None if self.member_energies is None else _widened(self.member_energies, self.energy_factor)

    @property
    def calibrated_zero_point_energies(self) -> np.ndarray | None:
        """[M], eV, of the modes of `calibrated_members` that are real."""
        members = self.calibrated_members
        return None if members is None else _zero_point_energies(members)

    @property
    def zero_point_energy_std(self) -> float | None:
        """eV, the calibrated standard deviation of the members (ddof = 1)."""
        energies = self.calibrated_zero_point_energies
        return None if energies is None else float(energies.std(ddof=1))

    @property
    def frequencies_std(self) -> np.ndarray | None:
        """[k], cm⁻¹, calibrated standard deviations of the members (ddof = 1)."""
        members = self.calibrated_members
        return None if members is None else members.std(axis=0, ddof=1)

    def thermochemistry(
        self, temperature: float = 298.15, pressure: float = 101325.0, spin: float | None = None
    ) -> dict[str, float]:
        """Enthalpy, entropy and free energy as an ideal gas of rigid rotors and harmonic oscillators (ASE's).

        Parameters
        ----------
        temperature
            K.
        pressure
            Pa.
        spin
            Total electron spin: 0 with all electrons paired, 0.5 of a radical; None: `lowest_spin`.

        Returns
        -------
        dict
            ``enthalpy`` and ``free_energy`` in eV with the potential energy in them, ``entropy`` in eV/K. Imaginary
            modes are left out.
        """
        spin = lowest_spin(self.atoms) if spin is None else spin
        real = (self.frequencies[self.frequencies > 0] * ase.units.invcm).tolist()
        gas = IdealGasThermo(
            real, self.geometry, self.energy, self.atoms, self.symmetry_number, spin, vib_selection="all"
        )
        return {
            "enthalpy": float(gas.get_enthalpy(temperature, verbose=False)),
            "entropy": float(gas.get_entropy(temperature, pressure, verbose=False)),
            "free_energy": float(gas.get_gibbs_energy(temperature, pressure, verbose=False)),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the units are those of the attributes."""
        found: dict[str, Any] = {"symbols": self.atoms.get_chemical_symbols(), "positions": self.atoms.positions}
        for field in dataclasses.fields(self):
            if field.name != "atoms":
                found[field.name] = getattr(self, field.name)
        for name in ("force_constants", "imaginary", "zero_point_energy", "zero_point_energy_std", "frequencies_std"):
            found[name] = getattr(self, name)
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in found.items()}

    def to_arc(self) -> dict[str, Any]:
        """What ARC's ASE jobs have in output.yml (github.com/ReactionMechanismGenerator/ARC), plain values.

        Returns
        -------
        dict
            ``freqs`` [k] in cm⁻¹, imaginary ones negative; ``hessian`` [3n, 3n] in eV/Å²; ``modes`` [k, n, 3], each of
            length 1, not weighted by masses; ``force_constants`` [k] in mdyn/Å; ``reduced_masses`` [k] in u; ``sp`` and
            ``zpe``, electronic and zero-point energy in kJ/mol; ``opt_xyz``, the geometry.
        """
        lengths = np.linalg.norm(self.modes, axis=(1, 2))
        return {
            "freqs": self.frequencies.tolist(),
            "hessian": self.hessian.tolist(),
            "modes": (self.modes / lengths[:, None, None]).tolist(),
            "force_constants": (self.force_constants * _MILLIDYNE).tolist(),
            "reduced_masses": self.reduced_masses.tolist(),
            "sp": self.energy * ase.units.mol / ase.units.kJ,
            "zpe": self.zero_point_energy * ase.units.mol / ase.units.kJ,
            "opt_xyz": {
                "symbols": self.atoms.get_chemical_symbols(),
                "isotopes": [None] * len(self.atoms),
                "coords": self.atoms.positions.tolist(),
            },
        }

    def animation(self, mode: int, frames: int = 24, largest: float = 0.3) -> list[Atoms]:
        """One period of a mode, in which the atom that moves most moves by `largest` Å."""
        result = []
        for phase in np.arange(frames) / frames * 2 * np.pi:
            frame = Atoms(self.atoms.symbols, self.atoms.positions + largest * np.sin(phase) * self.modes[mode])
            frame.info["frequency"] = float(self.frequencies[mode])
            result.append(frame)
        return result


def vibrate(
    atoms: Atoms,
    calculator: KinMLCalculator,
    *,
    optimise: bool | Optimiser = False,
    fmax: float = FMAX,
    steps: int = STEPS,
    symmetry_number: int | None = None,
    tell: Callable[[int, float], None] | None = None,
) -> Vibrations:
    """The vibrations of a molecule.

    Parameters
    ----------
    atoms
        The molecule; it is not changed.
    calculator
        Of a model or an ensemble.
    optimise
        Whether to go to the nearest minimum first, and how: bfgs (ASE's), which True means too, or sella, in internal
        coordinates and from an exact Hessian.
    fmax
        eV/Å, largest force on an atom at the end of that.
    steps
        At most so many.
    symmetry_number
        None: found from the geometry, see `symmetry.rotations`.
    tell
        Is called at each step of the optimisation with its number and the largest force in eV/Å.

    Raises
    ------
    ConfigError
        Sella is not installed.
    DataError
        A crystal; a molecule that falls apart, or is not at a minimum after all steps; what the calculator refuses.
    """
    if atoms.pbc.any():
        raise DataError(f"{atoms.symbols} is periodic: vibrations are of molecules, set pbc = False")
    if not len(atoms):
        raise DataError("there are no atoms: give a molecule")
    if symmetry_number is not None and symmetry_number < 1:
        raise ConfigError(f"a symmetry number of {symmetry_number}: give a whole number of at least 1")
    atoms = Atoms(atoms.symbols, atoms.positions, masses=atoms.get_masses())
    atoms.calc = calculator
    if optimise:
        _optimise(atoms, "bfgs" if optimise is True else optimise, fmax, steps, tell)
    energy, largest = atoms.get_potential_energy(), largest_force(atoms)
    if largest > fmax:
        log.warning(
            "%s: the largest force is %.3g eV/Å, so this is no minimum or saddle point and its frequencies mean little",
            atoms.symbols,
            largest,
        )
    member_energies = calculator.results.get("all_energies")
    hessians = calculator.get_hessians(atoms)
    hessian = hessians.mean(axis=0)
    squares, modes = _normal_modes(atoms, hessian)
    of_members = None
    if len(hessians) > 1:  # to first order, for the modes of the mean: none is mistaken for another
        of_members = _frequencies(np.einsum("ki,mij,kj->mk", modes, hessians, modes))
    lengths = np.square(modes).sum(axis=1)
    shown = modes.reshape(len(modes), len(atoms), 3)
    energy_factor, force_factors = members.factors(calculator.model, atoms.get_chemical_symbols())
    shares = np.square(shown).sum(axis=2) / lengths[:, None]
    return Vibrations(
        atoms=Atoms(atoms.symbols, atoms.positions, masses=atoms.get_masses()),
        energy=float(energy),
        largest_force=largest,
        hessian=hessian,
        frequencies=_frequencies(squares),
        modes=shown / np.linalg.norm(shown, axis=2).max(axis=1)[:, None, None],
        reduced_masses=1 / lengths,
        members=of_members,
        member_energies=None if member_energies is None else np.array(member_energies),
        energy_factor=energy_factor,
        factors=np.sqrt(shares @ np.square(force_factors)),
        geometry=symmetry.shape(atoms),
        symmetry_number=symmetry.rotations(atoms) if symmetry_number is None else symmetry_number,
    )


def warn_without_forces(model: model_file.Source | Sequence[model_file.Source]) -> None:
    """Log a warning on files of models that no forces were trained on."""
    for path in model_file.without_forces(model):
        log.warning(
            "%s: was trained on energies alone, so that minima, saddle points and frequencies may be far off: train "
            "with training.loss.forces=true",
            path,
        )


def fragments(atoms: Atoms) -> int:
    """How many molecules the atoms make up, by covalent radii."""
    radii = covalent_radii[atoms.numbers]
    bonded = cdist(atoms.positions, atoms.positions) < _BONDED * (radii[:, None] + radii)
    return int(connected_components(bonded, directed=False)[0])


def largest_force(atoms: Atoms) -> float:
    """eV/Å, on an atom."""
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())


def sella() -> Any:
    """The module Sella, if it is installed."""
    try:
        import sella
    except ImportError as error:
        raise ConfigError(f"this needs Sella, which cannot be imported ({error}): pip install sella") from error
    return sella


def _optimise(atoms: Atoms, how: Optimiser, fmax: float, steps: int, tell: Callable[[int, float], None] | None) -> None:
    before, converged = fragments(atoms), False
    with _optimiser(atoms, how) as optimiser:
        try:
            for reached in optimiser.irun(fmax=fmax, steps=steps):
                converged = bool(reached)
                if tell is not None:
                    tell(optimiser.nsteps, largest_force(atoms))
                if fragments(atoms) > before:
                    raise DataError(
                        f"{atoms.symbols} falls apart while it is optimised (step {optimiser.nsteps}, "
                        f"{fragments(atoms)} fragments instead of {before}): start from another geometry, or the model "
                        "does not know this molecule"
                    )
        except InputError:
            raise
        except Exception as error:  # far from all data Sella runs into whatever its matrices do
            raise DataError(
                f"{atoms.symbols} cannot be optimised ({first_line(error)}): start from another geometry, or take bfgs"
            ) from error
    if not converged:
        raise DataError(
            f"{atoms.symbols} is at no minimum after {steps} steps (largest force {largest_force(atoms):.3g} eV/Å): "
            "allow more steps or a larger fmax"
        )
    log.info("%s: at a minimum after %d steps", atoms.symbols, optimiser.nsteps)


def _optimiser(atoms: Atoms, how: Optimiser) -> Any:
    if how == "bfgs":
        return BFGS(atoms, logfile=None)
    if how != "sella":
        raise ConfigError(f"there is no optimiser {how}: give bfgs or sella")
    exact = {"eig": True, "hessian_function": atoms.calc.get_hessian}
    return sella().Sella(atoms, order=0, internal=len(atoms) > 3, logfile=None, **exact)


def _normal_modes(atoms: Atoms, hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squares of angular frequencies [k] in eV/(Å² u), ascending; displacements [k, 3n] of mass-weighted length 1."""
    root = np.sqrt(np.repeat(atoms.get_masses(), 3))
    inside = _inside(atoms)
    squares, vectors = np.linalg.eigh(inside.T @ (hessian / root[:, None] / root) @ inside)
    return squares, (inside @ vectors / root[:, None]).T


def _inside(atoms: Atoms) -> np.ndarray:
    """Orthonormal vectors [3n, k] in mass-weighted coordinates, across all translations and rotations."""
    x = atoms.positions - atoms.get_center_of_mass()
    root = np.sqrt(atoms.get_masses())[:, None]
    outer = [np.tile(axis, (len(x), 1)) * root for axis in np.eye(3)]
    outer += [np.cross(axis, x) * root for axis in np.eye(3)]
    vectors = np.linalg.svd(np.array(outer).reshape(6, -1).T, full_matrices=True)[0]
    return vectors[:, {"monatomic": 3, "linear": 5, "nonlinear": 6}[symmetry.shape(atoms)] :]


def _frequencies(squares: np.ndarray) -> np.ndarray:
    """cm⁻¹ of squares of angular frequencies in eV/(Å² u), negative of negative ones."""
    return np.sign(squares) * np.sqrt(np.abs(squares)) * _WAVENUMBER


def _widened(values: np.ndarray, factors: np.ndarray | float) -> np.ndarray:
    """Values [M, ...] of members with their differences from the mean multiplied."""
    mean = values.mean(axis=0)
    return mean + (values - mean) * factors


def _zero_point_energies(frequencies: np.ndarray) -> np.ndarray:
    """eV, of the frequencies [..., k] that are real."""
    return 0.5 * np.where(frequencies > 0, frequencies, 0.0).sum(axis=-1) * ase.units.invcm
