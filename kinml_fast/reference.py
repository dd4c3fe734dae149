"""The oracle: the model's definition in plain PyTorch, to check everything else against.

Written to be read next to the formulas, not to be fast. Every function can be differentiated by autograd any number of
times; the type of the coordinates decides the precision. Lengths are in Å, energies in eV, forces in eV/Å.

Parameters of the descriptor: n_species S; radial_shifts [R], radial_eta, radial_cutoff; angular_shifts [A],
angular_eta, zeta, sections [M], angular_cutoff, beta; radial_factor and angular_factor, which multiply the two parts. A
vector has D = S·R + S(S+1)/2·A·M entries: a radial block per neighbour species, then an angular block per species pair
(0,0), (0,1), …, (1,1), …, in which the shift is the slow index and the section the fast one.

aevmod's vectors have both factors 1 (`aevmod_parameters` gives its shifts and widths). TorchANI's ANI-1x and ANI-2x
vectors have radial_factor = 0.25, angular_factor = 2, beta = 0.95 and their published shifts; the order is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Layer = tuple[Tensor, Tensor | None]
"""Weight [out, in] and bias [out] (or None) of one layer."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda x: torch.exp(-x * x),
    "tanh": torch.tanh,
    "relu": torch.relu,
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "celu": lambda x: torch.where(x > 0, x, 0.1 * torch.expm1(torch.clamp(x, max=0) / 0.1)),
    "identity": lambda x: x,
}
"""The activations by name; celu has alpha = 0.1, as in the ANI models."""


def aevmod_parameters(
    n_species: int,
    n_radial: int = 16,
    n_angular: int = 8,
    n_sections: int = 8,
    cutoffs: tuple[float, float] = (5.2, 3.8),
    beta: float = 0.95,
) -> dict:
    """The keyword arguments of `aev` that aevmod and PyKinML mean by their short list of settings."""

    def shifts_and_eta(cutoff: float, count: int) -> tuple[Tensor, float]:
        delta = cutoff / count
        return (torch.arange(count, dtype=torch.float64) + 0.5) * delta, (2 / 3 * delta) ** -2

    radial_shifts, radial_eta = shifts_and_eta(cutoffs[0], n_radial)
    angular_shifts, angular_eta = shifts_and_eta(cutoffs[1], n_angular)
    return {
        "n_species": n_species,
        "radial_shifts": radial_shifts,
        "radial_eta": radial_eta,
        "radial_cutoff": cutoffs[0],
        "angular_shifts": angular_shifts,
        "angular_eta": angular_eta,
        "zeta": 8.0,
        "sections": torch.linspace(0, torch.pi, n_sections, dtype=torch.float64),
        "angular_cutoff": cutoffs[1],
        "beta": beta,
    }


def aev(
    coordinates: Tensor,
    species: Tensor,
    offsets: Tensor,
    *,
    n_species: int,
    radial_shifts: Sequence[float] | Tensor,
    radial_eta: float,
    radial_cutoff: float,
    angular_shifts: Sequence[float] | Tensor,
    angular_eta: float,
    zeta: float,
    sections: Sequence[float] | Tensor,
    angular_cutoff: float,
    beta: float,
    radial_factor: float = 1.0,
    angular_factor: float = 1.0,
    cells: Tensor | None = None,
    periodic: Tensor | None = None,
    centres: Tensor | None = None,
) -> Tensor:
    """Atomic environment vectors of every atom of a batch of structures.

    Parameters
    ----------
    coordinates : [n_atoms, 3]
        Positions in Å, structure after structure.
    species : int64 [n_atoms]
        Species of each atom, 0 … n_species − 1.
    offsets : int64 [n_structures + 1]
        Structure s has the atoms offsets[s] … offsets[s + 1] − 1.
    n_species, radial_shifts, …, angular_factor
        Parameters of the descriptor (see the module), shifts and cutoffs in Å, etas in Å⁻², sections in radians.
    cells : [n_structures, 3, 3]
        Rows are lattice vectors in Å; None: molecules.
    periodic : int64 [n_structures, 3]
        1 along the vectors along which a structure repeats, else 0.
    centres : int64 [n_structures]
        So many of the first atoms of a structure have a vector, the others a row of zeros; None: all.

    Returns
    -------
    Tensor [n_atoms, D]
    """
    radial_shifts = torch.as_tensor(radial_shifts, dtype=torch.float64).to(coordinates)
    angular_shifts = torch.as_tensor(angular_shifts, dtype=torch.float64).to(coordinates)
    sections = torch.as_tensor(sections, dtype=torch.float64).to(coordinates)

    longest = max(radial_cutoff, angular_cutoff)
    center, other, r = neighbours(coordinates, offsets, longest, cells, periodic, centres)
    d_ij = r.norm(dim=1)
    near = (d_ij.detach() <= angular_cutoff).nonzero().flatten().tolist()
    groups = itertools.groupby(near, key=center.tolist().__getitem__)
    triples = [pair for _, of_center in groups for pair in itertools.combinations(of_center, 2)]
    terms = torch.exp(-radial_eta * (d_ij[:, None] - radial_shifts) ** 2)  # [pairs, R]
    terms = radial_factor * terms * cutoff_function(d_ij, radial_cutoff)[:, None]
    blocks = coordinates.new_zeros(len(species) * n_species, len(radial_shifts))
    radial = blocks.index_add(0, center * n_species + species[other], terms)

    first, second = torch.tensor(triples, dtype=torch.int64).reshape(-1, 2).unbind(1)
    r_ij, r_ik, center = r[first], r[second], center[first]
    first, second = other[first], other[second]
    d_ij, d_ik = r_ij.norm(dim=1), r_ik.norm(dim=1)
    theta = angle(beta * (r_ij * r_ik).sum(1) / (d_ij * d_ik))
    terms_m = (0.5 + 0.5 * torch.cos(theta[:, None] - sections)) ** zeta  # [triples, M]
    terms_a = torch.exp(-angular_eta * ((d_ij + d_ik)[:, None] / 2 - angular_shifts) ** 2)  # [triples, A]
    cut = angular_factor * cutoff_function(d_ij, angular_cutoff) * cutoff_function(d_ik, angular_cutoff)
    terms = cut[:, None, None] * terms_a[:, :, None] * terms_m[:, None, :]  # [triples, A, M]
    order = [(s, t) for s in range(n_species) for t in range(s, n_species)]
    block_of = torch.tensor([[order.index((min(s, t), max(s, t))) for t in range(n_species)] for s in range(n_species)])
    blocks = coordinates.new_zeros(len(species) * len(order), len(angular_shifts), len(sections))
    angular = blocks.index_add(0, center * len(order) + block_of[species[first], species[second]], terms)

    lengths = n_species * len(radial_shifts), len(order) * len(angular_shifts) * len(sections)
    return torch.cat([radial.reshape(-1, lengths[0]), angular.reshape(-1, lengths[1])], dim=1)


def neighbours(
    coordinates: Tensor,
    offsets: Tensor,
    cutoff: float,
    cells: Tensor | None = None,
    periodic: Tensor | None = None,
    centres: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs within a cutoff, center after center: int64 [pairs] atoms, their neighbours, and displacements [pairs, 3].

    Other arguments are those of `aev`.
    """
    pairs: list[tuple[int, int, int]] = []
    shifts: list[tuple[int, ...]] = []
    for s, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        x = coordinates[start:stop].detach()
        counts = [0, 0, 0]
        cell = torch.zeros(3, 3, dtype=x.dtype)
        if cells is not None and periodic is not None:
            cell = cells[s].detach().to(x) * (periodic[s] != 0)[:, None]
            counts = images(x, cell, cutoff)
        all_shifts = list(itertools.product(*(range(-n, n + 1) for n in counts)))
        for i in range(stop - start if centres is None else int(centres[s])):
            for shift in all_shifts:
                distance = (x + torch.tensor(shift, dtype=x.dtype) @ cell - x[i]).norm(dim=1).tolist()
                for j in range(stop - start):
                    if (j == i and shift == (0, 0, 0)) or distance[j] > cutoff:
                        continue
                    pairs.append((start + i, start + j, s))
                    shifts.append(shift)
    center, other, structure = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 3).unbind(1)
    r = coordinates[other] - coordinates[center]
    if cells is not None:
        translation = torch.tensor(shifts, dtype=cells.dtype).reshape(-1, 1, 3) @ cells[structure]
        r = r + translation[:, 0].to(r)
    return center, other, r


def repulsion(
    coordinates: Tensor,
    species: Tensor,
    offsets: Tensor,
    *,
    charges: Sequence[float],
    radii: Sequence[float],
    inner: float,
    outer: float,
    cells: Tensor | None = None,
    periodic: Tensor | None = None,
    centres: Tensor | None = None,
) -> Tensor:
    """Each atom's half of the screened repulsion of nuclei (ZBL), [n_atoms] in eV; 0 for ghosts.

    ``charges`` and ``radii`` (Å) are of the species, ``inner`` and ``outer`` fractions of the sum of two radii between
    which the repulsion fades. Other arguments are those of `aev`.

    Source: Ziegler, Biersack, Littmark, The Stopping and Range of Ions in Matter, Pergamon, New York 1985.
    """
    center, other, r = neighbours(coordinates, offsets, 2 * outer * max(radii), cells, periodic, centres)
    z, radius = (torch.as_tensor(values, dtype=torch.float64).to(r)[species] for values in (charges, radii))
    d, sizes = r.norm(dim=1), radius[center] + radius[other]
    x = d * (z[center] ** 0.23 + z[other] ** 0.23) / 0.4685
    screening = sum(
        c * torch.exp(-k * x)
        for c, k in ((0.02817, 0.20162), (0.28022, 0.40290), (0.50986, 0.94229), (0.18175, 3.19980))
    )
    t = ((d / sizes - inner) / (outer - inner)).clamp(0, 1)
    energies = 14.399645478 * z[center] * z[other] / d * screening * (1 - 10 * t**3 + 15 * t**4 - 6 * t**5)
    return coordinates.new_zeros(len(species)).index_add(0, center, energies / 2)


def images(x: Tensor, cell: Tensor, cutoff: float) -> list[int]:
    """How many cells away along each vector [3, 3] atoms at x can have neighbours; 0 along a vector of zeros."""
    inverse = torch.linalg.pinv(cell)  # [3, 3] columns: the rows of reciprocal vectors
    fractions = x @ inverse
    spread = fractions.max(0).values - fractions.min(0).values if len(x) else torch.zeros(3)
    reach = cutoff * inverse.norm(dim=0) + spread
    return [int(n) for n in torch.where(cell.abs().sum(1) > 0, reach.ceil(), 0)]


def cutoff_function(distance: Tensor, cutoff: float) -> Tensor:
    """½cos(πR/Rc) + ½ up to the cutoff, 0 beyond it."""
    inside = 0.5 * torch.cos(torch.pi * distance / cutoff) + 0.5
    return torch.where(distance <= cutoff, inside, torch.zeros_like(inside))


def angle(cosine: Tensor) -> Tensor:
    """arccos(clip(cosine, −1, 1)), whose derivative counts as zero where it does not exist (at and beyond ±1).

    Only beta = 1 with collinear atoms gets there. The vector has the tip of a cone in that place: its slope is opposite
    for opposite displacements, and zero is their mean.
    """
    inside = cosine.abs() < 1
    at_end = torch.where(cosine > 0, torch.zeros_like(cosine), torch.full_like(cosine, torch.pi))
    return torch.where(inside, torch.arccos(torch.where(inside, cosine, torch.zeros_like(cosine))), at_end)


def networks(
    features: Tensor, species: Tensor, weights: Sequence[Sequence[Layer]], activations: Sequence[str]
) -> Tensor:
    """Output of each atom's network.

    Parameters
    ----------
    features : [n_atoms, D]
    species : int64 [n_atoms]
    weights : one list of layers per species
    activations : one name per layer, of ACTIVATIONS

    Returns
    -------
    Tensor [n_atoms]
        Atomic energies without single-atom energies, in eV.
    """
    outputs = []
    for x, kind in zip(features, species.tolist(), strict=True):
        for (weight, bias), name in zip(weights[kind], activations, strict=True):
            x = weight @ x if bias is None else weight @ x + bias
            x = ACTIVATIONS[name](x)
        outputs.append(x.squeeze(0))
    return torch.stack(outputs) if outputs else features.new_zeros(0)


def energies(
    coordinates: Tensor,
    species: Tensor,
    offsets: Tensor,
    parameters: dict,
    weights: Sequence[Sequence[Layer]],
    activations: Sequence[str],
    sae: Sequence[float] | Tensor,
) -> Tensor:
    """Energies of the structures: float64 [n_structures], in eV, single-atom energies `sae` [n_species] (eV) included.

    `parameters` are the keyword arguments of `aev`, the other arguments those of `aev` and `networks`.
    """
    return level_energies(coordinates, species, offsets, parameters, [weights], activations, [sae])[0]


def level_energies(
    coordinates: Tensor,
    species: Tensor,
    offsets: Tensor,
    parameters: dict,
    weights: Sequence[Sequence[Sequence[Layer]]],
    activations: Sequence[str],
    sae: Sequence[Sequence[float] | Tensor],
) -> Tensor:
    """Energies at several levels of theory: float64 [n_levels, n_structures], in eV, lowest level first.

    The networks of a level k > 0 take the vector and, behind it, the atom's energy at the level below without
    single-atom energy. The atom's energy is ε₀ = f₀(a), ε_k = ε_(k−1) + f_k(a, ε_(k−1)).

    `weights` and `sae` have an entry for each level; otherwise as `energies`.
    """
    vectors = aev(coordinates, species, offsets, **parameters)
    ranges = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    atomic, by_level = vectors.new_zeros(len(species)), []
    for level, (of_level, shifts) in enumerate(zip(weights, sae, strict=True)):
        features = vectors if level == 0 else torch.cat([vectors, atomic[:, None]], dim=1)
        atomic = atomic + networks(features, species, of_level, activations)
        shifted = atomic.double() + torch.as_tensor(shifts, dtype=torch.float64)[species]
        sums = [shifted[start:stop].sum() for start, stop in ranges]
        by_level.append(torch.stack(sums) if sums else shifted.new_zeros(0))
    return torch.stack(by_level)


def forces(coordinates: Tensor, *arguments: Any, create_graph: bool = False) -> Tensor:
    """−dE/dx: [n_atoms, 3] in eV/Å. The arguments are those of `energies`.

    With `create_graph` the forces can be differentiated again; the coordinates must then require gradients already.
    """
    x = coordinates if create_graph else coordinates.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(energies(x, *arguments).sum(), x, create_graph=create_graph)
    return -gradient


def jacobian(coordinates: Tensor, species: Tensor, **parameters: Any) -> Tensor:
    """Jacobian of the vectors of one structure with n atoms: [n, D, 3n] in 1/Å, column 3j + c for ∂/∂x_jc.

    The parameters are the keyword arguments of `aev`. aevmod 1.1.0 gives the same by its `eval_Jac_sac`. Its `eval_Jac`
    puts beta·cos∠ where dθ/dx has cos∠, so that it is not the derivative of aevmod's own vectors unless beta = 1: at
    beta = 0.95 entries are off by some 0.05 1/Å, and PyKinML's forces by some 0.01 eV/Å with them.
    """
    offsets = torch.tensor([0, len(species)])
    columns = []
    with forward_ad.dual_level():
        for direction in torch.eye(coordinates.numel(), dtype=coordinates.dtype):
            x = forward_ad.make_dual(coordinates.detach(), direction.reshape(coordinates.shape))
            vectors, derivative = forward_ad.unpack_dual(aev(x, species, offsets, **parameters))
            columns.append(torch.zeros_like(vectors) if derivative is None else derivative)
    return torch.stack(columns, dim=2)
