"""The compiled ops, with types and units: the only place in Python that knows their arguments' positions.

What always goes together is one object. A :class:`System` is a ragged batch of molecules, a :class:`Model` describes
descriptor and networks, an :class:`Order` sorts atoms by species, a :class:`Loss` has targets and weights,
:class:`StepResults` what a training step writes. The ops themselves (csrc/torch/schema.cpp) take lists: code that
TorchScript compiles calls them with those of :func:`system_tensors` and :func:`pack_networks`.

All functions accept non-contiguous tensors and structures without atoms, give the same bits for any number of threads,
and raise RuntimeError with what was expected and what came when shapes, types or values do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import List, Optional, Tuple  # noqa: UP035  (TorchScript reads the hints of its functions)

import torch
from torch import Tensor

from kinml_fast import _library  # noqa: F401  (loads the ops)

_OPS = torch.ops.kinml_fast


# ---- arguments ---------------------------------------------------------------------------------


def system_tensors(
    coordinates: Optional[Tensor],  # noqa: UP045
    species: Tensor,
    offsets: Tensor,
    features: Optional[Tensor] = None,  # noqa: UP045
    jacobian: Optional[Tensor] = None,  # noqa: UP045
    cells: Optional[Tensor] = None,  # noqa: UP045
    periodic: Optional[Tensor] = None,  # noqa: UP045
    centres: Optional[Tensor] = None,  # noqa: UP045
    pair_starts: Optional[Tensor] = None,  # noqa: UP045
    neighbours: Optional[Tensor] = None,  # noqa: UP045
    shifts: Optional[Tensor] = None,  # noqa: UP045
) -> List[Optional[Tensor]]:  # noqa: UP006, UP045
    """The list that the ops take for a system; see :class:`System`. TorchScript compiles it."""
    system: List[Optional[Tensor]] = [coordinates, species, offsets, features, jacobian]  # noqa: UP006, UP045
    system.extend(surroundings(cells, periodic, centres, pair_starts, neighbours, shifts))
    while len(system) > 5 and system[-1] is None:  # what is beyond the end is missing, and costs no time in each call
        system.pop()
    return system


def surroundings(
    cells: Optional[Tensor] = None,  # noqa: UP045
    periodic: Optional[Tensor] = None,  # noqa: UP045
    centres: Optional[Tensor] = None,  # noqa: UP045
    pair_starts: Optional[Tensor] = None,  # noqa: UP045
    neighbours: Optional[Tensor] = None,  # noqa: UP045
    shifts: Optional[Tensor] = None,  # noqa: UP045
) -> List[Optional[Tensor]]:  # noqa: UP006, UP045
    """What models take for crystals, ghosts and given pairs: these attributes of :class:`System`, as one list."""
    return [cells, periodic, centres, pair_starts, neighbours, shifts]


def surrounded(
    coordinates: Tensor,
    species: Tensor,
    offsets: Tensor,
    around: Optional[List[Optional[Tensor]]],  # noqa: UP006, UP045
) -> List[Optional[Tensor]]:  # noqa: UP006, UP045
    """`system_tensors` of coordinates in what :func:`surroundings` gave; None: molecules. TorchScript compiles it."""
    system: List[Optional[Tensor]] = [coordinates, species, offsets, None, None]  # noqa: UP006, UP045
    if around is not None:
        system.extend(around)
    return system


def centre_sums(
    offsets: Tensor,
    around: Optional[List[Optional[Tensor]]],  # noqa: UP006, UP045
) -> Tuple[Tensor, int]:  # noqa: UP006
    """Offsets by which sums over centres stand apart from those over ghosts, and every how many-th sum is of centres.

    TorchScript compiles it.
    """
    if around is None or len(around) < 3:
        return offsets, 1
    centres = around[2]
    if centres is None:
        return offsets, 1
    ends = torch.stack([offsets[:-1], offsets[:-1] + centres], dim=1).flatten()
    return torch.cat([ends, offsets[-1:]]), 2


@dataclass(frozen=True)
class System:
    """A ragged batch of molecules and crystals, N atoms in M structures; either coordinates or stored descriptors.

    Neighbours are looked for, with the images of atoms if a structure is periodic, or given: then all within the
    descriptor's cutoffs must be among them, and what is beyond does no harm.

    Attributes
    ----------
    coordinates
        [N, 3] in Å, float64 or float32; None with stored descriptors.
    species
        [N] int64, the index of each atom's element in the descriptor's list.
    offsets
        [M + 1] int64: atoms ``offsets[s]`` to ``offsets[s + 1]`` are those of structure s.
    features
        Stored descriptors [N, D], or None.
    jacobian
        Stored Jacobians [N, D, C] as `aev_jacobian` gives them, or None. C is at least three times the atoms of the
        largest structure; columns beyond those of a structure's atoms are padding, which no sum reads. With stored
        descriptors and without Jacobians there are energies but no forces.
    cells
        [M, 3, 3] float64, rows are lattice vectors in Å, right-handed; None: all structures are molecules. Atoms may be
        anywhere, in the cell or not.
    periodic
        [M, 3] int64, 1 along the vectors that a structure is periodic along, else 0; others are not read. A structure
        with 0 0 0 is a molecule.
    centres
        [M] int64: so many of the first atoms of each structure have energies; the others, ghosts, are only their
        neighbours. Forces come out for all. None: all atoms.
    pair_starts
        [N + 1] int64, where the given pairs of each atom begin; ghosts have none. None: neighbours are looked for.
    neighbours
        [P] int64, the atom at the other end of each pair, a row of ``coordinates``. Each pair i, j stands for a
        neighbour of i only: it is given for j as well. Each image of an atom is a pair of its own.
    shifts
        [P, 3] int64: the displacement of a pair is x_j + shift · cell - x_i. None: zero, as with ghosts.
    """

    coordinates: Tensor | None
    species: Tensor
    offsets: Tensor
    features: Tensor | None = None
    jacobian: Tensor | None = None
    cells: Tensor | None = None
    periodic: Tensor | None = None
    centres: Tensor | None = None
    pair_starts: Tensor | None = None
    neighbours: Tensor | None = None
    shifts: Tensor | None = None

    @cached_property
    def tensors(self) -> list[Tensor | None]:
        """What the ops take."""
        return system_tensors(
            self.coordinates,
            self.species,
            self.offsets,
            self.features,
            self.jacobian,
            self.cells,
            self.periodic,
            self.centres,
            self.pair_starts,
            self.neighbours,
            self.shifts,
        )

    @property
    def has_forces(self) -> bool:
        """Whether there is what forces come from."""
        return self.features is None or self.jacobian is not None

    def between(self, first: int, last: int) -> System:
        """Structures ``first`` to ``last`` alone, as views of this system's atoms."""
        offsets = self.offsets[first : last + 1]
        atoms = slice(int(offsets[0]), int(offsets[-1]))
        of_atoms = self.coordinates, self.species, self.features, self.jacobian
        coordinates, species, features, jacobian = [None if tensor is None else tensor[atoms] for tensor in of_atoms]
        assert species is not None
        of_structures = self.cells, self.periodic, self.centres
        cells, periodic, centres = [None if tensor is None else tensor[first:last] for tensor in of_structures]
        assert self.neighbours is None  # data sets have no given pairs
        return System(coordinates, species, offsets - offsets[0], features, jacobian, cells, periodic, centres)


def pack_networks(
    n_species: int, sizes: Sequence[int], activations: Sequence[int], biases: bool, levels: int = 1
) -> list[int]:
    """The description of a chain of networks that the ops take.

    Parameters
    ----------
    n_species
        S.
    sizes
        Widths [K, S, L + 1] as one list, level after level: inputs, then the outputs of each of the L layers.
    activations
        [L] codes, places in `kinml_fast.nn.networks.ACTIVATIONS`.
    biases
        Whether the layers have biases.
    levels
        K, levels of theory.
    """
    return [levels, n_species, len(activations), int(biases), *activations, *sizes]


@dataclass(frozen=True)
class Model:
    """What energies are made of, but for the numbers that are learned.

    Attributes
    ----------
    descriptor
        ``AEVParameters.packed()``; not looked at, and may be empty, for stored descriptors.
    networks
        `pack_networks`, of K levels of theory in a chain, lowest first: the networks of level 0 take the descriptor a,
        those of level k also the atomic energy of the level below, as their last number: eps_0 = f_0(a),
        eps_k = eps_(k-1) + f_k(a, eps_(k-1)). Their parameters are one flat tensor: level after level, species after
        species, layer after layer, W [out, in] row-major, then b [out].
    """

    descriptor: list[float]
    networks: list[int]


@dataclass(frozen=True)
class Order:
    """Some atoms, sorted by species.

    Attributes
    ----------
    rows
        [n] int64, row of each in the features.
    owners
        [n] int64, the structure of each.
    starts
        [S + 1] int64, where each species begins in rows.
    """

    rows: Tensor
    owners: Tensor
    starts: Tensor

    @cached_property
    def tensors(self) -> list[Tensor]:
        """What the ops take."""
        return [self.rows, self.owners, self.starts]


@dataclass(frozen=True)
class Loss:
    """Targets and weights of M structures and N atoms at K levels: scales[0] L_E + scales[1] L_F; all float64.

    L_E = sum_ks w_ks dE_ks^2 / n_E,k and L_F = sum_ks u_ks mean_c(dF_ksc^2) / n_F,k: sums over the structures of a
    batch, mean over the 3 n_s force components of a structure. With stresses scales[2] L_S is added, where
    L_S = sum_ks t_ks mean_c(dS_ksc^2) / n_S,k, mean over the nine components of the stress, virial by volume of cell.

    Attributes
    ----------
    energies
        [K, M] without single-atom energies, eV. May be NaN where the weight is 0.
    energy_weights
        [K, M], w.
    forces
        [K, N, 3] in eV/Å; not read where the structure's weight is 0. None: training is on energies.
    force_weights
        [K, M], u; None without forces.
    scales
        [2] or, with stresses, [3], factors of the terms.
    counts
        [2, K] or, with stresses, [3, K], n_E,k, n_F,k, n_S,k: structures of the batch whose weight at level k is not 0
        (`count_weights`).
    stresses
        [K, M, 3, 3] in eV/Å³, ASE's sign; not read where the structure's weight is 0. None: no stresses.
    stress_weights
        [K, M], t; 0 for structures that are not periodic. None without stresses.
    """

    energies: Tensor
    energy_weights: Tensor
    forces: Tensor | None
    force_weights: Tensor | None
    scales: Tensor
    counts: Tensor
    stresses: Tensor | None = None
    stress_weights: Tensor | None = None

    @cached_property
    def tensors(self) -> list[Tensor | None]:
        """What the ops take."""
        terms = self.energies, self.energy_weights, self.forces, self.force_weights
        return [*terms, self.scales, self.counts, self.stresses, self.stress_weights]


def weighted(*weights_of_terms: Tensor) -> Tensor:
    """1 where a weight [K, M] of a data set is not 0, [M + 1, T, K] float64; the last row, of no structure, is 0.

    The weights of energies, forces and, if they are in the loss, stresses: T is 2 or 3.
    """
    weights = torch.stack([weights.T for weights in weights_of_terms], dim=1)
    return torch.nn.functional.pad(weights, (0, 0, 0, 0, 0, 1)).ne_(0)


def count_weights(weighted: Tensor, order: Tensor, size: int) -> Tensor:
    """The ``counts`` [T, K] of `Loss` for each batch of an epoch: float64 [n_batches, T, K].

    Parameters
    ----------
    weighted
        What :func:`weighted` gave for the data set.
    order
        [n] int64, its structures in the order of the epoch.
    size
        Structures in a batch.
    """
    filled = torch.nn.functional.pad(order, (0, -len(order) % size), value=len(weighted) - 1)
    return weighted.index_select(0, filled).unflatten(0, (-1, size)).sum(1)


@dataclass(frozen=True)
class StepResults:
    """Where a training step on n structures at K levels writes.

    Attributes
    ----------
    losses
        [2] or, with stresses, [3] float64, receives L_E, L_F and L_S of `Loss`; a term without structures is 0.
    gradient
        Like the parameters, receives the gradient of the loss.
    energy_residuals
        [K, n] float64, receives predicted - target in the order of the batch; NaN where a target is NaN.
    force_errors
        [K, n, 3] float64, receives the sum, the sum of squares and the largest of the absolute errors of each
        structure's force components; zeros where its force weight is 0. With stresses [K, n, 6]: behind them the same
        of the nine components of the stress.
    """

    losses: Tensor
    gradient: Tensor
    energy_residuals: Tensor
    force_errors: Tensor

    @cached_property
    def tensors(self) -> list[Tensor]:
        """What the ops take."""
        return [self.losses, self.gradient, self.energy_residuals, self.force_errors]


# ---- atomic environment vectors ----------------------------------------------------------------


def aev(system: System, descriptor: list[float]) -> Tensor:
    """Atomic environment vectors [n_atoms, D]; differentiable twice with respect to coordinates, once to cells.

    Rows of ghosts are zero.

    Formula: Smith, Isayev, Roitberg, Chem. Sci. 2017, 8, 3192 (DOI 10.1039/C6SC05720A), in aevmod's form.
    Coincident atoms have no direction: they count with the unit vector 0. With beta = 1 and collinear atoms the angle
    has a kink, where its derivative is 0 (the mean over all directions).
    """
    return _OPS.aev(system.tensors, descriptor)


def aev_vjp(system: System, gradient: Tensor, descriptor: list[float]) -> Tensor:
    """Vector-Jacobian product [n_atoms, 3]: sum over atoms i of J_i^T g_i, with ``gradient`` g [n_atoms, D]."""
    return _OPS.aev_vjp(system.tensors, gradient, descriptor)


def aev_virials(system: System, gradient: Tensor, descriptor: list[float]) -> Tensor:
    """Virials [M, 3, 3] (float64) of s = Σ_i g_i · a_i, with ``gradient`` g [n_atoms, D], of each structure.

    The sum over pairs of ds/dd ⊗ d, with the displacement d of the pair; row by derivative. That is the derivative of s
    by a strain ε that takes all places and lattice vectors x to x + ε x. No derivative.
    """
    return _OPS.aev_virials(system.tensors, gradient, descriptor)


def aev_jvp(system: System, tangent: Tensor, descriptor: list[float]) -> Tensor:
    """Jacobian-vector product J v [n_atoms, D], with ``tangent`` v [n_atoms, 3]."""
    return _OPS.aev_jvp(system.tensors, tangent, descriptor)


def aev_hvp(system: System, gradient: Tensor, tangent: Tensor, descriptor: list[float]) -> Tensor:
    """Derivative of g . J v with respect to the coordinates, [n_atoms, 3]."""
    return _OPS.aev_hvp(system.tensors, gradient, tangent, descriptor)


def aev_jacobian(system: System, max_atoms: int, descriptor: list[float]) -> Tensor:
    """Dense Jacobian [n_atoms, D, 3 max_atoms] in 1/Å: for storage and checks, not needed to train.

    Column 3 q + d is the derivative with respect to coordinate d of the q-th atom of the same structure; columns of
    atoms that a structure does not have are zero.
    """
    return _OPS.aev_jacobian(system.tensors, max_atoms, descriptor)


# ---- networks on features that are there -------------------------------------------------------


def species_order(species: Tensor, offsets: Tensor, n_species: int) -> Order:
    """The atoms of a system, sorted by species."""
    return Order(*_OPS.species_order(species, offsets, n_species))


def networks(
    features: Tensor, order: Order, parameters: Tensor, sae: Tensor | None, networks: list[int], n_structures: int
) -> Tensor:
    """Energies [n_structures] (float64): sums over atoms of network output and ``sae``; differentiable twice.

    The second derivative is the one that training on forces needs: of the gradient with respect to the features, with
    respect to the features and the parameters. The gradient with respect to the parameters has none.

    ``features`` [*, D] are read through the order's rows, so a batch needs no copy. ``networks`` is of one level,
    ``parameters`` as in :class:`Model`.
    """
    return _OPS.networks(features, order.tensors, parameters, sae, networks, n_structures)


# ---- energies and forces in one pass over the molecules ----------------------------------------


def prepare_weights(parameters: Tensor, model: Model) -> Tensor:
    """Parameters [P] or [M, P] in the order in which this processor reads them, for many evaluations.

    Returns
    -------
    Tensor
        Opaque bytes [B], uint8, for :func:`energy_forces` and :func:`energy_forces_virials`. They are of one
        instruction set and dtype: a file has no use for them. As long as the parameters are the same, so is the tensor,
        which is not to be written to. On a GPU, which has no use for them, [0].
    """
    return _OPS.prepare_weights(parameters, model.networks)


def energy_forces(
    system: System,
    parameters: Tensor,
    sae: Tensor | None,
    model: Model,
    first_level: int = 0,
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Energies and forces of the R = K - first_level levels of theory from ``first_level`` on.

    Returns
    -------
    energies : Tensor
        [R, n_structures] in eV, float64; with ``sae`` [R, S], for R = 1 also [S], added for each atom.
    forces : Tensor
        [R, n_atoms, 3], -dE/dx in eV/Å, of the parameters' dtype; [R, 0, 3] from stored descriptors without Jacobians.

    Notes
    -----
    Differentiable once, with respect to ``parameters``, through energies and forces; a system that requires a gradient
    is refused. ``parameters`` [M, P] are those of an ensemble of M models, whose descriptors are computed once: results
    and ``sae`` have one more dimension M before all others, and cannot be differentiated.

    ``prepared`` is what :func:`prepare_weights` gave for ``parameters``: it saves much of the time of a small molecule
    and changes no bit. What was prepared for others, for another dtype or another processor is refused; on a GPU it is
    not looked at.
    """
    return _OPS.energy_forces(system.tensors, parameters, sae, model.descriptor, model.networks, first_level, prepared)


def energy_forces_virials(
    system: System,
    parameters: Tensor,
    sae: Tensor | None,
    model: Model,
    first_level: int = 0,
    atomic: bool = False,
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `energy_forces` gives, with virials and, if ``atomic``, what each atom has; from coordinates.

    Returns
    -------
    energies, forces : Tensor
        As of `energy_forces`.
    virials : Tensor
        [R, n_structures, 3, 3] in eV, float64: the derivative of the energy by a strain ε that takes all places and
        lattice vectors x to x + ε x; the sum over pairs of dE/dd ⊗ d. The stress, in ASE's sign, is the virial by
        volume.
    atomic_energies : Tensor
        [R, n_atoms] in eV, float64, with ``sae``: the terms of the energies; zero for ghosts. Unless ``atomic``
        [R, 0].
    atomic_virials : Tensor
        [R, n_atoms, 3, 3] in eV, of the parameters' dtype: the virials of the atomic energies, whose sums are
        ``virials``. Unless ``atomic`` [R, 0, 3, 3].

    Notes
    -----
    Differentiable once with respect to ``parameters`` through energies, forces and virials.
    """
    return _OPS.energy_forces_virials(
        system.tensors, parameters, sae, model.descriptor, model.networks, first_level, atomic, prepared
    )


def energy_hessians(
    system: System,
    parameters: Tensor,
    model: Model,
    first_level: int = 0,
    max_atoms: int | None = None,
    atoms: Tensor | None = None,
) -> Tensor:
    """Second derivatives of the energies by the coordinates of each structure, analytic.

    Parameters
    ----------
    system, parameters, model, first_level
        As of `energy_forces`, from coordinates.
    max_atoms
        The atoms of the largest structure at least; None: those of the largest one.
    atoms
        [n] int64, different atoms, whose rows are wanted; None: all, in order.

    Returns
    -------
    Tensor
        [R, n, 3, 3 max_atoms] in eV/Å², of the parameters' dtype; of an ensemble [M, R, n, 3, 3 max_atoms].
        Entry 3 q + d of the row of a coordinate is the derivative with respect to coordinate d of the q-th atom of the
        same structure; those of atoms that it does not have are zero. No derivative. On a GPU the processor computes
        them.
    """
    if max_atoms is None:
        sizes = system.offsets.diff()
        max_atoms = int(sizes.max()) if len(sizes) else 0
    return _OPS.energy_hessians(
        system.tensors, parameters, model.descriptor, model.networks, first_level, max_atoms, atoms
    )


def hessian_products(
    system: System,
    parameters: Tensor,
    v: Tensor,
    model: Model,
    first_level: int = 0,
    prepared: Tensor | None = None,
) -> Tensor:
    """Products of the Hessians with a vector, without the Hessians: the derivatives along it of the gradients.

    Parameters
    ----------
    system, parameters, model, first_level, prepared
        As of `energy_forces`, from coordinates.
    v
        [n_atoms, 3], of the parameters' dtype.

    Returns
    -------
    Tensor
        [R, n_atoms, 3], of an ensemble [M, R, n_atoms, 3], in eV/Å² times the unit of v. No derivative. On a GPU the
        processor computes them.
    """
    return _OPS.hessian_products(system.tensors, parameters, v, model.descriptor, model.networks, first_level, prepared)


def force_step(
    system: System, structures: Tensor, parameters: Tensor, loss: Loss, results: StepResults, model: Model
) -> None:
    """Forward and backward pass of a training batch on energies and forces, in one call and without autograd.

    ``system`` and ``loss`` are of the whole data set, ``structures`` [n] int64 are the batch. Without Jacobians for
    stored descriptors, or without forces in the loss, training is on energies.
    """
    _OPS.force_step(
        system.tensors, structures, parameters, loss.tensors, results.tensors, model.descriptor, model.networks
    )


def message_bytes(system: System, structures: Tensor, loss: Loss, parameters: Tensor, n_ranks: int) -> int:
    """How many bytes a process says of its share of a batch, `force_step_share`; all processes as many.

    Several processes that share a batch each compute a share, send it to all others, and join what all have sent: the
    bits of `force_step` for any number of them.
    """
    return _OPS.message_bytes(system.tensors, structures, loss.tensors, parameters, n_ranks)


def force_step_share(
    system: System,
    structures: Tensor,
    parameters: Tensor,
    loss: Loss,
    message: Tensor,
    model: Model,
    rank: int,
    n_ranks: int,
) -> None:
    """The share of process ``rank`` of a batch; arguments are of the whole batch, as of `force_step`.

    ``message`` [`message_bytes`] uint8 is written, but for its last 16 bytes: two float64 numbers of the caller's.
    """
    _OPS.force_step_share(
        system.tensors,
        structures,
        parameters,
        loss.tensors,
        message,
        model.descriptor,
        model.networks,
        rank,
        n_ranks,
    )


def force_step_join(system: System, structures: Tensor, loss: Loss, messages: Tensor, results: StepResults) -> None:
    """The results of `force_step` from the ``messages`` [n_ranks, `message_bytes`] of all processes."""
    _OPS.force_step_join(system.tensors, structures, loss.tensors, messages, results.tensors)


# ---- optimizer ---------------------------------------------------------------------------------


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
    one float64 number (float32 stays at 2^24), says how many steps were done before; it is one more afterwards.
    Under ``torch.no_grad``.
    """
    _OPS.adam_step(
        parameter, gradient, mean, square, largest, learning_rate, beta1, beta2, eps, weight_decay, decoupled, step
    )
