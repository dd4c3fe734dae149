"""The compiled ops, with types and units.

A ragged batch of molecules is three tensors: ``coordinates`` [n_atoms, 3] in Å (float64 or float32), ``species``
[n_atoms] int64, the index of each atom's element in the descriptor's list, and ``offsets`` [n_structures + 1] int64:
atoms ``offsets[s]`` to ``offsets[s + 1]`` are those of structure s. ``descriptor`` is ``AEVParameters.packed()``.

All functions accept non-contiguous tensors and structures without atoms, give the same bits for any number of threads,
and raise RuntimeError with what was expected and what came when shapes, types or values do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kinml_fast import _library  # noqa: F401  (loads the ops)

_OPS = torch.ops.kinml_fast


def aev(coordinates: Tensor, species: Tensor, offsets: Tensor, descriptor: list[float]) -> Tensor:
    """Atomic environment vectors [n_atoms, D]; differentiable twice with respect to coordinates.

    Formula: Smith, Isayev, Roitberg, Chem. Sci. 2017, 8, 3192 (DOI 10.1039/C6SC05720A), in aevmod's form.
    Coincident atoms have no direction: they count with the unit vector 0. With beta = 1 and collinear atoms the angle
    has a kink, where its derivative is 0 (the mean over all directions).
    """
    return _OPS.aev(coordinates, species, offsets, descriptor)


def aev_vjp(coordinates: Tensor, species: Tensor, offsets: Tensor, gradient: Tensor, descriptor: list[float]) -> Tensor:
    """Vector-Jacobian product [n_atoms, 3]: sum over atoms i of J_i^T g_i, with ``gradient`` g [n_atoms, D]."""
    return _OPS.aev_vjp(coordinates, species, offsets, gradient, descriptor)


def aev_jvp(coordinates: Tensor, species: Tensor, offsets: Tensor, tangent: Tensor, descriptor: list[float]) -> Tensor:
    """Jacobian-vector product J v [n_atoms, D], with ``tangent`` v [n_atoms, 3]."""
    return _OPS.aev_jvp(coordinates, species, offsets, tangent, descriptor)


def aev_hvp(
    coordinates: Tensor, species: Tensor, offsets: Tensor, gradient: Tensor, tangent: Tensor, descriptor: list[float]
) -> Tensor:
    """Derivative of g . J v with respect to the coordinates, [n_atoms, 3]."""
    return _OPS.aev_hvp(coordinates, species, offsets, gradient, tangent, descriptor)


def aev_jacobian(
    coordinates: Tensor, species: Tensor, offsets: Tensor, max_atoms: int, descriptor: list[float]
) -> Tensor:
    """Dense Jacobian [n_atoms, D, 3 max_atoms] in 1/Å: for storage and checks, not needed to train.

    Column 3 q + d is the derivative with respect to coordinate d of the q-th atom of the same structure; columns of
    atoms that a structure does not have are zero.
    """
    return _OPS.aev_jacobian(coordinates, species, offsets, max_atoms, descriptor)


def species_order(species: Tensor, offsets: Tensor, n_species: int) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms sorted by species: ``rows`` [n_atoms] atom index, ``owners`` [n_atoms] structure, ``starts`` [S + 1]."""
    return _OPS.species_order(species, offsets, n_species)


def networks(
    features: Tensor,
    rows: Tensor,
    owners: Tensor,
    starts: Tensor,
    parameters: Tensor,
    sae: Tensor | None,
    sizes: list[int],
    activations: list[int],
    biases: bool,
    n_structures: int,
) -> Tensor:
    """Energies [n_structures] (float64): sums over atoms of network output and ``sae``; differentiable twice.

    The second derivative is the one that training on forces needs: of the gradient with respect to the features, with
    respect to the features and the parameters. The gradient with respect to the parameters has none.

    ``features`` [*, D] are read through ``rows``, so a batch needs no copy. ``parameters`` is one flat tensor: species
    after species, layer after layer, W [out, in] row-major, then b [out]. ``sizes`` [S * (n_layers + 1)].
    """
    return _OPS.networks(features, rows, owners, starts, parameters, sae, sizes, activations, biases, n_structures)


def energy_forces(
    coordinates: Tensor,
    species: Tensor,
    offsets: Tensor,
    parameters: Tensor,
    sae: Tensor | None,
    descriptor: list[float],
    sizes: list[int],
    activations: list[int],
    biases: bool,
    levels: bool = False,
) -> tuple[Tensor, Tensor]:
    """Energies [n_structures] (float64, eV) and forces [n_atoms, 3] (-dE/dx, eV/Å, of the coordinates' dtype).

    ``parameters``, ``sae``, ``sizes``, ``activations``, ``biases`` as for :func:`networks`. Differentiable once, with
    respect to ``parameters``, through energies and forces; coordinates that require a gradient are refused.

    Several levels of theory, lowest first, have a chain of networks: ``sizes`` [K * S * (n_layers + 1)] and
    ``parameters`` level after level. The networks of level 0 take the descriptor a, those of level k also the atomic
    energy of the level below, as their last number: eps_0 = f_0(a), eps_k = eps_(k-1) + f_k(a, eps_(k-1)). Energies and
    forces are those of the highest level, with its ``sae`` [S]; with ``levels`` they are those of all levels,
    [K, n_structures] and [K, n_atoms, 3], with ``sae`` [K, S].

    ``parameters`` [M, P] are those of an ensemble of M models, whose descriptors are computed once: results and ``sae``
    have one more dimension M before all others, and cannot be differentiated.
    """
    return _OPS.energy_forces(
        coordinates, species, offsets, parameters, sae, descriptor, sizes, activations, biases, levels
    )


def energy_forces_stored(
    features: Tensor,
    jacobian: Tensor | None,
    species: Tensor,
    offsets: Tensor,
    parameters: Tensor,
    sae: Tensor | None,
    sizes: list[int],
    activations: list[int],
    biases: bool,
    levels: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same from ``features`` [n_atoms, D] and stored Jacobians [n_atoms, D, C] as `aev_jacobian` gives them.

    C is at least three times the atoms of the largest structure; columns beyond those of a structure's own atoms are
    padding, which no sum reads. Without Jacobians only energies are computed, and the forces are empty: [..., 0, 3].
    """
    return _OPS.energy_forces_stored(
        features, jacobian, species, offsets, parameters, sae, sizes, activations, biases, levels
    )


def force_step(
    coordinates: Tensor,
    species: Tensor,
    offsets: Tensor,
    structures: Tensor,
    parameters: Tensor,
    energy_targets: Tensor,
    force_targets: Tensor,
    energy_weights: Tensor,
    force_weights: Tensor,
    scales: Tensor,
    energy_residuals: Tensor,
    force_errors: Tensor,
    losses: Tensor,
    gradient: Tensor,
    descriptor: list[float],
    sizes: list[int],
    activations: list[int],
    biases: bool,
) -> None:
    """Forward and backward pass of a training batch on energies and forces, in one call and without autograd.

    Parameters
    ----------
    coordinates, species, offsets
        The whole data set, N atoms in M structures.
    structures
        [n] int64, the batch.
    energy_targets, force_targets
        [M] without single-atom energies, eV, and [N, 3], eV/Å; float64. Forces of structures whose force weight is 0
        are not read.
    energy_weights, force_weights
        [M] float64: w and u below.
    scales
        [2] float64: factors of both terms in the loss.
    energy_residuals
        [n] float64, receives predicted - target in the order of the batch.
    force_errors
        [n, 3] float64, receives the sum, the sum of squares and the largest of the absolute errors of each structure's
        force components; zeros where its force weight is 0.
    losses
        [2] float64, receives L_E = sum_s w_s dE_s^2 / n_E and L_F = sum_s u_s mean_c(dF_sc^2) / n_F: sums over the
        batch's structures, mean over the 3 n_s components of a structure, n_E and n_F the numbers of structures whose
        weight is not 0. A term without such structures is 0.
    gradient
        Like ``parameters``, receives d(scales[0] L_E + scales[1] L_F)/dparameters.

    Notes
    -----
    With several levels of theory (see `energy_forces`) targets, weights, residuals and errors have one more dimension K
    before all others, and L_E and L_F are the sums of those of the levels. A target may be NaN where its weight is 0;
    an energy residual is NaN then. What a level shall count is a factor of its weights.
    """
    _OPS.force_step(
        coordinates,
        species,
        offsets,
        structures,
        parameters,
        energy_targets,
        force_targets,
        energy_weights,
        force_weights,
        scales,
        energy_residuals,
        force_errors,
        losses,
        gradient,
        descriptor,
        sizes,
        activations,
        biases,
    )


def force_step_stored(
    features: Tensor,
    jacobian: Tensor | None,
    species: Tensor,
    offsets: Tensor,
    structures: Tensor,
    parameters: Tensor,
    energy_targets: Tensor,
    force_targets: Tensor,
    energy_weights: Tensor,
    force_weights: Tensor,
    scales: Tensor,
    energy_residuals: Tensor,
    force_errors: Tensor,
    losses: Tensor,
    gradient: Tensor,
    sizes: list[int],
    activations: list[int],
    biases: bool,
) -> None:
    """:func:`force_step` from ``features`` [N, D] and stored Jacobians [N, D, C], see `energy_forces_stored`.

    Without Jacobians training is on energies only: force targets and weights are not looked at.
    """
    _OPS.force_step_stored(
        features,
        jacobian,
        species,
        offsets,
        structures,
        parameters,
        energy_targets,
        force_targets,
        energy_weights,
        force_weights,
        scales,
        energy_residuals,
        force_errors,
        losses,
        gradient,
        sizes,
        activations,
        biases,
    )


def adam_step(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    largest: Tensor | None,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: Tensor,
) -> None:
    """One step of Adam (Kingma, Ba, arXiv 1412.6980) or, if ``decoupled``, AdamW (arXiv 1711.05101), in place.

    ``parameter``, ``mean``, ``square`` and, with AMSGrad, ``largest`` have one shape and are contiguous. ``step``,
    one float32 number, says how many steps were done before; it is one more afterwards. Under ``torch.no_grad``.
    """
    _OPS.adam_step(
        parameter, gradient, mean, square, largest, learning_rate, beta1, beta2, eps, weight_decay, decoupled, step
    )


@dataclass(frozen=True)
class Batch:
    """Some structures, their atoms sorted by species."""

    structures: Tensor
    """[n] indices into the data set"""
    rows: Tensor
    """[n_atoms] atom indices into the data set, sorted by species"""
    owners: Tensor
    """[n_atoms] position of the atom's structure within the batch"""
    starts: Tensor
    """[n_species + 1] where each species begins in rows"""


def plan_batches(species: Tensor, offsets: Tensor, structures: Tensor, batch_size: int, n_species: int) -> list[Batch]:
    """Cut ``structures`` (indices, in the order of an epoch) into batches with their atoms sorted by species."""
    rows, owners, starts, firsts = _OPS.plan_batches(species, offsets, structures, batch_size, n_species)
    lengths = firsts.diff().tolist()
    return (
        [
            Batch(*parts)
            for parts in zip(
                structures.split(batch_size), rows.split(lengths), owners.split(lengths), starts.unbind(0), strict=True
            )
        ]
        if lengths
        else []
    )
