"""Energies and forces by autograd: slow, exact, and in the arguments of the fused ops, to hold these against.

Descriptors and their products come from the ops `aev`, `aev_vjp` and `aev_jvp`, which have tests of their own;
networks, loss and every derivative with respect to the weights are plain torch, by double backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kinml_fast import ops, reference
from kinml_fast.nn import ACTIVATIONS


def atomic_energies(
    features: Tensor, species: Tensor, parameters: Tensor, sizes: list[int], activations: list[int], biases: bool
) -> Tensor:
    """Outputs of the networks [n_atoms], differentiable any number of times."""
    depth = len(activations)
    result = features.new_zeros(len(features))
    start = 0
    for s in range(len(sizes) // (depth + 1)):
        widths = sizes[s * (depth + 1) : (s + 1) * (depth + 1)]
        mine = torch.nonzero(species == s)[:, 0]
        x = features[mine]
        for inputs, outputs, code in zip(widths[:-1], widths[1:], activations, strict=True):
            weight = parameters[start : start + inputs * outputs].view(outputs, inputs)
            start += inputs * outputs
            x = x @ weight.T
            if biases:
                x = x + parameters[start : start + outputs]
                start += outputs
            x = reference.ACTIVATIONS[ACTIVATIONS[code]](x)
        result = result.index_add(0, mine, x[:, 0])
    assert start == len(parameters)
    return result


def _sums(atomic: Tensor, species: Tensor, offsets: Tensor, sae: Tensor | None) -> Tensor:
    atomic = atomic.double()
    if sae is not None:
        atomic = atomic + sae[species]
    owners = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    return atomic.new_zeros(len(offsets) - 1).index_add(0, owners, atomic)


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
) -> tuple[Tensor, Tensor]:
    """What `ops.energy_forces` computes; differentiable with respect to the parameters."""
    with torch.enable_grad():
        features = ops.aev(coordinates, species, offsets, descriptor).requires_grad_()
        atomic = atomic_energies(features, species, parameters, sizes, activations, biases)
        (slopes,) = torch.autograd.grad(atomic.sum(), features, create_graph=True)
        forces = -ops.aev_vjp(coordinates, species, offsets, slopes, descriptor)
        return _sums(atomic, species, offsets, sae), forces


def energy_forces_stored(
    features: Tensor,
    jacobian: Tensor,
    species: Tensor,
    offsets: Tensor,
    parameters: Tensor,
    sae: Tensor | None,
    sizes: list[int],
    activations: list[int],
    biases: bool,
) -> tuple[Tensor, Tensor]:
    """What `ops.energy_forces_stored` computes; differentiable with respect to the parameters."""
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        atomic = atomic_energies(features, species, parameters, sizes, activations, biases)
        (slopes,) = torch.autograd.grad(atomic.sum(), features, create_graph=True)
        forces = [features.new_zeros(0, 3)]
        for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            true = jacobian[first:last, :, : 3 * (last - first)]
            forces.append(-torch.einsum("idc,id->c", true, slopes[first:last]).view(-1, 3))
        return _sums(atomic, species, offsets, sae), torch.cat(forces)


def loss_terms(
    energies: Tensor,
    forces: Tensor,
    offsets: Tensor,
    energy_targets: Tensor,
    force_targets: Tensor,
    energy_weights: Tensor,
    force_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L_E, L_F, energy residuals [n] and force errors [n, 3] of a batch, structure by structure."""
    residuals = energies - energy_targets
    terms, errors = [], residuals.new_zeros(len(residuals), 3)
    for s, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if force_weights[s] == 0 or first == last:
            continue
        difference = forces[first:last].double() - force_targets[first:last]
        terms.append(force_weights[s] * difference.square().mean())
        magnitude = difference.detach().abs()
        errors[s] = torch.stack([magnitude.sum(), magnitude.square().sum(), magnitude.max()])
    n_energies, n_forces = (int((weights != 0).sum()) for weights in (energy_weights, force_weights))
    of_energy = (energy_weights * residuals.square()).sum() / max(n_energies, 1)
    of_forces = torch.stack(terms).sum() / n_forces if terms else of_energy.new_zeros(())
    return of_energy, of_forces, residuals, errors


def gather(structures: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Atoms of some structures of a data set, and their offsets as a batch."""
    ranges = [torch.arange(int(offsets[s]), int(offsets[s + 1])) for s in structures.tolist()]
    own = torch.tensor([0, *(len(r) for r in ranges)]).cumsum(0)
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64), own


def _step(predict, species, offsets, structures, parameters, targets, weights, scales, outputs) -> None:
    residuals_out, errors_out, losses_out, gradient_out = outputs
    atoms, own = gather(structures, offsets)
    flat = parameters.detach().clone().requires_grad_()
    energies, forces = predict(atoms, species[atoms], own, flat)
    of_energy, of_forces, residuals, errors = loss_terms(
        energies, forces, own, targets[0][structures], targets[1][atoms], *(w[structures] for w in weights)
    )
    total = scales[0] * of_energy + scales[1] * of_forces
    (gradient,) = torch.autograd.grad(total, flat)
    residuals_out.copy_(residuals.detach())
    errors_out.copy_(errors)
    losses_out.copy_(torch.stack([of_energy, of_forces]).detach())
    gradient_out.copy_(gradient)


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
    """What `ops.force_step` computes."""

    def predict(atoms, kinds, own, flat):
        return energy_forces(coordinates[atoms], kinds, own, flat, None, descriptor, sizes, activations, biases)

    targets, weights = (energy_targets, force_targets), (energy_weights, force_weights)
    outputs = energy_residuals, force_errors, losses, gradient
    _step(predict, species, offsets, structures, parameters, targets, weights, scales, outputs)


def force_step_stored(
    features: Tensor,
    jacobian: Tensor,
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
    """What `ops.force_step_stored` computes."""

    def predict(atoms, kinds, own, flat):
        rows = features[atoms], jacobian[atoms]
        return energy_forces_stored(*rows, kinds, own, flat, None, sizes, activations, biases)

    targets, weights = (energy_targets, force_targets), (energy_weights, force_weights)
    outputs = energy_residuals, force_errors, losses, gradient
    _step(predict, species, offsets, structures, parameters, targets, weights, scales, outputs)
