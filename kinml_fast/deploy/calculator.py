"""An ASE calculator for trained models and their ensembles."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import (
    BaseCalculator,
    Calculator,
    CalculatorSetupError,
    PropertyNotImplementedError,
    all_changes,
    all_properties,
)
from ase.outputs import Properties, all_outputs
from scipy.spatial import cKDTree

from kinml_fast import ops
from kinml_fast.data.structures import CLOSEST_ALLOWED
from kinml_fast.deploy import dispersion, low_level, members, model_file
from kinml_fast.errors import ConfigError, DataError
from kinml_fast.nn import EnergyModel, Ensemble

_FEW_ATOMS = 50
"""Molecules of fewer atoms are computed on one thread: starting a second one takes longer than what it would save."""


class CalculatorInputError(DataError, CalculatorSetupError):
    """Atoms or arguments that `KinMLCalculator` cannot use: one sentence. Programs for ASE catch it as ASE's error."""


class NoStressError(CalculatorInputError, PropertyNotImplementedError):
    """The stress of a molecule. Programs for ASE that can do without catch it as ASE's error."""


class _Results(dict):
    """Results of a calculation; as keyword arguments, or in `dict(results)`, those that ASE has names for.

    So `SinglePointCalculator(atoms, **calculator.results)` keeps what ASE, and files of ASE's, can keep. `items`,
    `copy`, deep copies and pickles have all.
    """

    def __iter__(self) -> Iterator[str]:  # without one of its own, ** would not look at keys()
        return super().__iter__()

    def keys(self) -> list[str]:  # type: ignore[override]
        return [name for name in self if name in all_properties]

    def copy(self) -> _Results:
        return _Results(self.items())


class KinMLCalculator(Calculator):
    """Energies, forces and stress of molecules and crystals, for everything that ASE does with a calculator.

    Parameters
    ----------
    model
        A trained model or ensemble; a model file or a run folder; or a list of these, which becomes an ensemble.
    base
        The calculator of the low level for a delta model, whose energies and forces are added: any ASE calculator, or
        what `low_level.make` takes, such as "tblite:GFN1-xTB".
    threads
        CPU threads of a calculation; None: one for molecules of fewer than 50 atoms, else PyTorch's number. The results
        do not depend on it.
    device
        Where to compute: auto, cpu, cuda or cuda:N. None: where the model is, for files the CPU.
    stop_above
        Of an ensemble: where the deviation of the force on an atom, the length of its row of ``forces_std``, is larger
        (eV/Å), calculating raises CalculatorInputError, which ends dynamics and optimisations; None: nowhere.

    Notes
    -----
    ``energy`` and ``free_energy`` (the same, eV) and ``forces`` [n, 3] (−dE/dx, eV/Å) are those of the highest level,
    as are ``energies`` [n] (of atoms, eV, if asked for) and, of periodic atoms, ``stress`` [6] and ``stresses`` [n, 6]
    (eV/Å³, ASE's sign and order, by the volume of `atoms.cell`). There are images along the vectors that `atoms.pbc`
    says. Where the model has a dispersion (docs/repulsion.md), it is in all of these but `energies` and `stresses`,
    which then are missing.

    An ensemble of M models gives their means, and: ``all_energies`` [M], ``all_forces`` [M, n, 3], ``energy_std`` and
    ``forces_std`` [n, 3], the standard deviations of a sample (the divisor is M − 1, ddof = 1), times the factors of
    the ensemble if it is calibrated (docs/running.md). A model of K > 1 levels
    gives ``level_energies`` [K] and ``level_forces`` [K, n, 3], lowest level first. All are in `results` and can be
    asked for with `get_property`; as keyword arguments (``SinglePointCalculator(atoms, **calculator.results)``) those
    are given that ASE has names for.

    Geometries are compared by positions, elements, periodicity and, if periodic, cell; without a base, charges and
    magnetic moments change nothing. Deep copies and pickles carry the weights; calculators made from one model share
    them, unless `device` is another one than the model's.

    Raises
    ------
    InputError
        A model that cannot be read; models that do not fit together; a delta model without a base, or another with one.
    CalculatorInputError
        When calculating: an element that the model does not know, positions that are NaN or infinite, two atoms closer
        than 0.1 Å, a cell without volume or left-handed, the stress of a molecule, an energy that is NaN or infinite.
        It is both a `DataError` and ASE's `CalculatorSetupError`.
    """

    implemented_properties = ["energy", "free_energy", "forces", "energies", "stress", "stresses"]  # noqa: RUF012 (ASE's)

    def __init__(
        self,
        model: EnergyModel | Ensemble | str | os.PathLike | Sequence[EnergyModel | Ensemble | str | os.PathLike],
        *,
        base: BaseCalculator | str | None = None,
        threads: int | None = None,
        device: str | None = None,
        stop_above: float | None = None,
    ) -> None:
        super().__init__()
        if stop_above is not None and not stop_above > 0:
            raise ConfigError(f"stop_above is {stop_above}: give a force of more than 0 eV/Å")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}: give a number of at least 1")
        self.model = model_file.resolve(model, device)
        self.base = low_level.checked(self.model, base, KinMLCalculator)
        self._added: list[Any] = [one for one in (self.base, dispersion.make(self.model.dispersion)) if one is not None]
        self.threads = threads
        self.n_members = members.count(self.model)
        self.stop_above = stop_above
        if stop_above is not None and self.n_members < 2:
            raise ConfigError("stop_above is for an ensemble, whose members differ: give several models")
        properties = list(type(self).implemented_properties)
        if self._added:  # which tell nothing of atoms
            properties = [name for name in properties if name not in ("energies", "stresses")]
        if self.n_members > 1:
            properties += ["energy_std", "forces_std", "all_energies", "all_forces"]
        if len(self.model.fidelities) > 1:
            properties += ["level_energies", "level_forces"]
        self.implemented_properties = properties
        # What the last molecule needs again: its elements as bytes, their codes, and where it begins and ends.
        self._numbers: bytes | None = None
        self._species = self._offsets = torch.empty(0)

    def _get_name(self) -> str:
        return "kinml_fast"

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last calculation (ASE's general comparison takes as long as the calculation)."""
        if self.base is not None or self.atoms is None:
            return super().check_state(atoms, tol)
        before = self.atoms
        # Bytes compare faster than arrays, and NaN equal to NaN does no harm: there are no results for it.
        same = {
            "positions": before.positions.tobytes() == atoms.positions.tobytes(),
            "numbers": before.numbers.tobytes() == atoms.numbers.tobytes(),
            "pbc": before.pbc.tobytes() == atoms.pbc.tobytes(),
            "cell": not atoms.pbc.any() or before.cell.array.tobytes() == atoms.cell.array.tobytes(),
        }
        return [name for name, equal in same.items() if not equal]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill `results` with everything that the model gives, whatever is asked for."""
        if atoms is not None:
            self.atoms = atoms.copy()
        if self.atoms is None:
            raise CalculatorInputError("there are no atoms to calculate: give atoms")
        self.results = {}
        places = self._check(self.atoms)
        periodic = self.atoms.pbc.any()
        if not periodic and (asked := {"stress", "stresses"} & set(properties)):
            raise NoStressError(
                f"{self.atoms.symbols} is a molecule (pbc is False), which has no {min(asked)}: ask for "
                "energy and forces"
            )
        further = None
        if periodic or "energies" in properties:
            further = self._evaluate(members.results, self.atoms, places)
            energies, forces = further.energies[..., 0], further.forces
        else:
            found = self._evaluate(members.energies_and_forces, self.atoms, places)
            energies, forces = found[0][..., 0], found[1]
        if not np.isfinite(energies).all():
            raise CalculatorInputError(f"{self.atoms.symbols} {members.NOT_FINITE}")
        for added in self._added:
            # Some compute energies with forces, and none forces with energies.
            forces = forces + added.get_property("forces", self.atoms)
            energies = energies + added.get_property("energy", self.atoms)
        results: dict[str, float | np.ndarray] = _Results()
        if self.n_members > 1:
            results["all_energies"], results["all_forces"] = energies[:, -1], forces[:, -1]
            results["energy_std"] = float(members.energies_deviation(self.model, energies)[-1])
            species = self._species.cpu().numpy()
            results["forces_std"] = forces_std = members.forces_deviation(self.model, forces, species)[-1]
            self._judge(forces_std)
        energies, forces = members.mean(energies), members.mean(forces)
        if len(energies) > 1:
            results["level_energies"], results["level_forces"] = energies, forces
        results["energy"] = results["free_energy"] = float(energies[-1])
        results["forces"] = forces[-1]
        if further is not None:
            results.update(self._of_cell_and_atoms(self.atoms, further))
        self.results = results

    def get_hessian(self, atoms: Atoms, indices: Sequence[int] | None = None) -> np.ndarray:
        """Second derivatives of the energy, of an ensemble those of the mean energy, by differentiation of the model.

        Parameters
        ----------
        atoms
            The molecule or crystal, whose images move with its atoms; `results` are not changed.
        indices
            Rows for these atoms only, in this order; None: all of them.

        Returns
        -------
        ndarray
            [3n, 3n] in eV/Å², or [3m, 3n] for m indices: d²E/dx dx', rows and columns x, y, z of atom after atom. The
            rows are averaged with their columns where both are there, so that a square matrix is symmetric to the last
            bit.

        Raises
        ------
        CalculatorInputError
            As when calculating, an index that is no atom, or an energy that is NaN or infinite.
        ConfigError
            The calculator has a base that has no `get_hessian`.
        """
        return members.mean(self.get_hessians(atoms, indices))

    def get_hessians(self, atoms: Atoms, indices: Sequence[int] | None = None) -> np.ndarray:
        """What :meth:`get_hessian` gives of each of the M members of an ensemble (1 of a model), [M, 3m, 3n]."""
        places = self._check(atoms)
        chosen = np.arange(len(atoms)) if indices is None else np.asarray(indices, dtype=np.int64).reshape(-1)
        wrong = chosen[(chosen < -len(atoms)) | (chosen >= len(atoms))]
        if len(wrong):
            raise CalculatorInputError(
                f"{atoms.symbols} has no atom {wrong[0]}: give indices from 0 to {len(atoms) - 1}"
            )
        chosen %= max(len(atoms), 1)
        for added in self._added:
            if not hasattr(added, "get_hessian"):
                raise ConfigError(
                    f"the base {type(added).__name__} has no get_hessian: take finite differences of forces "
                    "(ase.vibrations.Vibrations)"
                )
        different, order = np.unique(chosen, return_inverse=True)
        found = self._evaluate(functools.partial(members.hessians, chosen=different), atoms, places)
        hessians = found.reshape(len(found), -1, 3, 3 * len(atoms))[:, order].reshape(len(found), -1, 3 * len(atoms))
        if not np.isfinite(hessians).all():
            raise CalculatorInputError(f"{atoms.symbols} {members.NOT_FINITE}")
        coordinates = (3 * chosen[:, None] + np.arange(3)).reshape(-1)
        for added in self._added:
            hessians = hessians + added.get_hessian(atoms)[coordinates]
        both = hessians[:, :, coordinates]
        hessians[:, :, coordinates] = (both + both.transpose(0, 2, 1)) / 2
        return hessians

    def export_properties(self) -> Properties:
        """The results that ASE has names for."""
        return Properties({name: self.results[name] for name in self.results if name in all_outputs})

    def _judge(self, forces_std: np.ndarray) -> None:
        if self.stop_above is None or not len(forces_std):
            return
        assert self.atoms is not None
        deviations = np.linalg.norm(forces_std, axis=1)
        atom = int(deviations.argmax())
        if deviations[atom] > self.stop_above:
            raise CalculatorInputError(
                f"the force on atom {atom} ({self.atoms.symbols[atom]}) of {self.atoms.symbols} is uncertain by "
                f"{deviations[atom]:.3g} eV/Å, more than stop_above = {self.stop_above:g}: the ensemble does not know "
                "this geometry, which is one to compute and to train on"
            )

    def _of_cell_and_atoms(self, atoms: Atoms, found: members.Results) -> dict[str, np.ndarray]:
        """What is asked for of atoms, and the stress of periodic ones."""
        results = {}
        if not self._added:
            results["energies"] = members.mean(found.atomic_energies)[-1]
        volume = atoms.cell.volume
        if not atoms.pbc.any() or volume == 0:  # nothing of a wire or layer without a cell around it
            return results
        stress = _voigt(members.mean(found.virials)[-1, 0]) / volume
        if not self._added:
            results["stresses"] = _voigt(members.mean(found.atomic_virials)[-1]) / volume
        for added in self._added:
            if "stress" not in added.implemented_properties:
                return results
            stress = stress + added.get_property("stress", atoms)
        results["stress"] = stress
        return results

    def _check(self, atoms: Atoms) -> np.ndarray:
        """The places [n, 3] of the atoms, those of a crystal within its cell."""
        finite = np.isfinite(atoms.positions)
        if not finite.all():
            atom = int(np.argmin(finite.all(axis=1)))
            raise CalculatorInputError(
                f"atom {atom} ({atoms.symbols[atom]}) of {atoms.symbols} is at {atoms.positions[atom].tolist()}, "
                "NaN or infinite: go back to numbers, before a step that was too long"
            )
        numbers = atoms.numbers.tobytes()
        if numbers != self._numbers:
            self._learn(atoms)
            self._numbers = numbers
        places = images = atoms.positions
        owners = None
        if atoms.pbc.any():
            _check_cell(atoms)
            places = atoms.get_positions(wrap=True)
            images, owners = _near_faces(atoms, places)
        close = cKDTree(images).query_pairs(CLOSEST_ALLOWED) if len(atoms) else ()
        if close:
            a, b = min(sorted(i if owners is None else int(owners[i]) for i in pair) for pair in close)
            raise CalculatorInputError(
                f"atoms {a} ({atoms.symbols[a]}) and {b} ({atoms.symbols[b]}) of {atoms.symbols} are only "
                f"{atoms.get_distance(a, b, mic=bool(atoms.pbc.any())):.3g} Å apart (less than {CLOSEST_ALLOWED} Å): "
                "move them apart"
            )
        return places

    def _learn(self, atoms: Atoms) -> None:
        """Keep the codes of the elements, until others come."""
        elements = self.model.elements
        symbols = atoms.get_chemical_symbols()
        unknown = sorted(set(symbols) - set(elements))
        if unknown:
            raise CalculatorInputError(
                f"{atoms.symbols} contains {' '.join(unknown)}, but the model knows only {' '.join(elements)}: take "
                "another molecule or train a model with this element"
            )
        device = self.model.sae.device
        codes = [elements.index(symbol) for symbol in symbols]
        self._species = torch.tensor(codes, dtype=torch.int64, device=device)
        self._offsets = torch.tensor([0, len(symbols)], device=device)

    def _evaluate(self, function: Callable, atoms: Atoms, places: np.ndarray) -> Any:
        """A function of `members`, of the atoms at these places."""
        before = torch.get_num_threads()
        wanted = self.threads or (1 if len(places) < _FEW_ATOMS else before)
        if wanted != before:
            torch.set_num_threads(wanted)
        device = self.model.sae.device
        around = None
        if atoms.pbc.any():
            cells = torch.tensor(atoms.cell.array[None], dtype=torch.float64, device=device)
            periodic = torch.tensor(atoms.pbc[None], dtype=torch.int64, device=device)
            around = ops.surroundings(cells, periodic)
        try:
            if self.model.dtype == torch.float32:  # which has too few digits far from the origin
                places = places - places[:1]
            coordinates = torch.from_numpy(places).to(device, self.model.dtype)
            return function(self.model, coordinates, self._species, self._offsets, around)
        finally:
            if wanted != before:
                torch.set_num_threads(before)


def _voigt(tensors: np.ndarray) -> np.ndarray:
    """xx, yy, zz, yz, xz, xy of symmetric tensors [..., 3, 3]."""
    symmetric = (tensors + np.swapaxes(tensors, -1, -2)) / 2
    return symmetric.reshape(*symmetric.shape[:-2], 9)[..., [0, 4, 8, 5, 2, 1]]


def _check_cell(atoms: Atoms) -> None:
    cell, pbc = atoms.cell.array, atoms.pbc
    what = f"the cell of {atoms.symbols}"
    if not np.isfinite(cell[pbc]).all():
        raise CalculatorInputError(f"{what} has a number that is NaN or infinite: {cell.tolist()}")
    spanned = np.linalg.svd(cell[pbc], compute_uv=False)
    if spanned[-1] < CLOSEST_ALLOWED:
        raise CalculatorInputError(
            f"{what} has no volume along its periodic vectors, or hardly any: {cell[pbc].tolist()}; set atoms.cell, or "
            "atoms.pbc = False for a molecule"
        )
    if pbc.all() and np.linalg.det(cell) < 0:
        raise CalculatorInputError(f"{what} is left-handed, {cell.tolist()}: swap two of its vectors")


def _near_faces(atoms: Atoms, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in the cell and the images of those that are close to its faces on the other side; the atom of each."""
    complete = atoms.cell.complete().array
    owners = np.arange(len(places))
    inverse = np.linalg.inv(complete)
    margins = 1.01 * CLOSEST_ALLOWED * np.linalg.norm(inverse, axis=0)
    for k in np.flatnonzero(atoms.pbc):
        near = places @ inverse[:, k] < margins[k]
        places = np.concatenate([places, places[near] + complete[k]])
        owners = np.concatenate([owners, owners[near]])
    return places, owners
