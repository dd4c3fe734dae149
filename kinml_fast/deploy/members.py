"""What models and ensembles have in common: energies and forces by member and by level, and what is said of members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.nn import EnergyModel, Ensemble

NOT_FINITE = "has an energy that is NaN or infinite: its atoms are too crowded for this model; leave it out"
"""What is said of such a structure, after its name."""


def count(model: EnergyModel | Ensemble) -> int:
    """The number of members, 1 for a model."""
    return model.n_members if isinstance(model, Ensemble) else 1


def energies_and_forces(
    model: EnergyModel | Ensemble,
    coordinates: Tensor,
    species: Tensor,
    offsets: Tensor,
    around: list[Tensor | None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Energies float64 [M, K, n_structures] in eV and forces float64 [M, K, n_atoms, 3] in eV/Å, of a ragged batch.

    M members (1 for a model), K levels, lowest first. Coordinates are those of the model's device and dtype; ``around``
    is what `ops.surroundings` gives.
    """
    with torch.inference_mode():
        if isinstance(model, Ensemble):
            energies, forces = model.member_level_energies_and_forces(coordinates, species, offsets, around)
        else:
            energies, forces = model.level_energies_and_forces(coordinates, species, offsets, around)
            energies, forces = energies.unsqueeze(0), forces.unsqueeze(0)
        return energies.cpu().numpy(), forces.double().cpu().numpy()


@dataclass(frozen=True)
class Results:
    """What M members say at K levels of a batch of structures, float64.

    Attributes
    ----------
    energies, forces
        [M, K, n_structures] in eV and [M, K, n_atoms, 3] in eV/Å.
    virials
        [M, K, n_structures, 3, 3] in eV; see `EnergyModel.energies_forces_virials`.
    atomic_energies, atomic_virials
        [M, K, n_atoms] and [M, K, n_atoms, 3, 3] in eV, the terms of energies and virials.
    """

    energies: np.ndarray
    forces: np.ndarray
    virials: np.ndarray
    atomic_energies: np.ndarray
    atomic_virials: np.ndarray


def results(
    model: EnergyModel | Ensemble,
    coordinates: Tensor,
    species: Tensor,
    offsets: Tensor,
    around: list[Tensor | None] | None = None,
) -> Results:
    """Everything that a model gives; the arguments are those of `EnergyModel.forward`."""
    with torch.inference_mode():
        if isinstance(model, Ensemble):
            found = list(model.member_level_results(coordinates, species, offsets, around))
        else:
            found = [t.unsqueeze(0) for t in model.level_results(coordinates, species, offsets, around)]
        return Results(*(t.double().cpu().numpy() for t in found))


def hessians(
    model: EnergyModel | Ensemble,
    coordinates: Tensor,
    species: Tensor,
    offsets: Tensor,
    around: list[Tensor | None] | None = None,
    *,
    chosen: np.ndarray,
) -> np.ndarray:
    """Second derivatives float64 [M, 3m, 3n] in eV/Å² of the energies of M members at the highest level.

    Rows are of the coordinates of m chosen atoms, all different, of one structure of n atoms.
    """
    atoms = torch.from_numpy(chosen).to(coordinates.device)
    with torch.inference_mode():
        if isinstance(model, Ensemble):
            found = model.member_hessians(coordinates, species, offsets, around, atoms)
        else:
            found = model.hessian(coordinates, species, offsets, around, atoms).unsqueeze(0)
        return found.reshape(len(found), 3 * len(chosen), 3 * len(coordinates)).double().cpu().numpy()


def energies(
    model: EnergyModel | Ensemble,
    coordinates: Tensor,
    species: Tensor,
    offsets: Tensor,
    around: list[Tensor | None] | None = None,
) -> np.ndarray:
    """The energies of `energies_and_forces`, to the last bit, without computing forces."""
    networks, members = model.networks, count(model)
    with torch.inference_mode():
        found, _ = ops.energy_forces(
            ops.System(None, species, offsets, features=model.aev(coordinates, species, offsets, around)),
            networks.weights.detach().reshape(members, -1),
            model.sae.reshape(members, model.levels, -1),
            ops.Model([], networks.packed),
        )
        return model.aev.add_repulsion(found, coordinates, species, offsets, around).cpu().numpy()


def sae(model: EnergyModel | Ensemble) -> np.ndarray:
    """Single-atom energies float64 [K, n_elements] in eV, of an ensemble the means of its members."""
    return mean(model.sae.reshape(count(model), model.levels, -1).cpu().numpy())


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis, summed in order (as `Ensemble` does, and whatever the other axes are)."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total / len(values) if len(values) > 1 else total


def energies_deviation(model: EnergyModel | Ensemble, values: np.ndarray) -> np.ndarray:
    """Of energies [M, K, ...] of members at all levels, [K, ...], with the ensemble's factors if it has them."""
    found = deviation(values)
    calibration = model.calibration if isinstance(model, Ensemble) else None
    if calibration is None:
        return found
    return found * np.array(calibration.energies).reshape(-1, *(1,) * (found.ndim - 1))


def forces_deviation(model: EnergyModel | Ensemble, values: np.ndarray, species: np.ndarray) -> np.ndarray:
    """Of forces [M, K, n_atoms, 3] on atoms of these species [n_atoms], [K, n_atoms, 3], likewise."""
    found = deviation(values)
    calibration = model.calibration if isinstance(model, Ensemble) else None
    return found if calibration is None else found * np.array(calibration.forces)[:, species, None]


def factors(model: EnergyModel | Ensemble, symbols: Sequence[str]) -> tuple[float, np.ndarray]:
    """An ensemble's factors of deviations at the highest level: of energies, and of forces on these n atoms, [n].

    1 of a model, and of an ensemble that is not calibrated.
    """
    calibration = model.calibration if isinstance(model, Ensemble) else None
    if calibration is None:
        return 1.0, np.ones(len(symbols))
    of_elements = dict(zip(model.elements, calibration.forces[-1], strict=True))
    return calibration.energies[-1], np.array([of_elements[symbol] for symbol in symbols])


def deviation(values: np.ndarray) -> np.ndarray:
    """The standard deviation over the first axis as of a sample: the divisor is one less than its length (ddof = 1)."""
    return np.sqrt(mean(np.square(values - mean(values))) * (len(values) / (len(values) - 1)))
