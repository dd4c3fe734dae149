"""Energies and forces by autograd: slow, exact, and in the arguments of the fused ops, to hold these against.

Descriptors and their products come from the ops `aev` and `aev_vjp`, which have tests of their own; networks, the chain
of levels, loss and every derivative with respect to the weights are plain torch, by double backward.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kinml_fast import ops, reference
from kinml_fast.nn import ACTIVATIONS
from kinml_fast.ops import Loss, Model, StepResults, System


def atomic_energies(features: Tensor, species: Tensor, parameters: Tensor, networks: list[int]) -> Tensor:
    """Energies of the atoms [K, n_atoms] by a chain of `networks`, differentiable any number of times."""
    levels, n_species, depth, biases = networks[:4]
    activations, sizes = networks[4 : 4 + depth], networks[4 + depth :]
    start, network, of_levels = 0, 0, []
    for level in range(levels):
        below = of_levels[-1] if level else features.new_zeros(len(features))
        inputs_of_level = torch.cat([features, below[:, None]], dim=1) if level else features
        own = below
        for s in range(n_species):
            widths = sizes[network * (depth + 1) : (network + 1) * (depth + 1)]
            network += 1
            mine = torch.nonzero(species == s)[:, 0]
            x = inputs_of_level[mine]
            for inputs, outputs, code in zip(widths[:-1], widths[1:], activations, strict=True):
                weight = parameters[start : start + inputs * outputs].view(outputs, inputs)
                start += inputs * outputs
                x = x @ weight.T
                if biases:
                    x = x + parameters[start : start + outputs]
                    start += outputs
                x = reference.ACTIVATIONS[ACTIVATIONS[code]](x)
            own = own.index_add(0, mine, x[:, 0])
        of_levels.append(own)
    assert start == len(parameters)
    return torch.stack(of_levels)


def _sums(atomic: Tensor, system: System, sae: Tensor | None) -> Tensor:
    """Energies [R, n_structures] of energies [R, n_atoms] of atoms."""
    atomic = atomic.double()
    if sae is not None:
        atomic = atomic + sae[:, system.species]
    n = len(system.offsets) - 1
    owners = torch.repeat_interleave(torch.arange(n), system.offsets.diff())
    return atomic.new_zeros(len(atomic), n).index_add(1, owners, atomic)


def _forces(system: System, slopes: Tensor, descriptor: list[float]) -> Tensor:
    """Forces [n_atoms, 3] of slopes [n_atoms, D] along the descriptors; [0, 3] without Jacobians."""
    if system.features is None:
        return -ops.aev_vjp(system, slopes, descriptor)
    forces = [slopes.new_zeros(0, 3)]
    if system.jacobian is not None:
        for first, last in zip(system.offsets[:-1].tolist(), system.offsets[1:].tolist(), strict=True):
            true = system.jacobian[first:last, :, : 3 * (last - first)]
            forces.append(-torch.einsum("idc,id->c", true, slopes[first:last]).view(-1, 3))
    return torch.cat(forces)


def energy_forces(
    system: System, parameters: Tensor, sae: Tensor | None, model: Model, first_level: int = 0
) -> tuple[Tensor, Tensor]:
    """What `ops.energy_forces` computes for one model; differentiable with respect to the parameters."""
    with torch.enable_grad():
        known = ops.aev(system, model.descriptor) if system.features is None else system.features
        features = known.detach().requires_grad_()
        atomic = atomic_energies(features, system.species, parameters, model.networks)[first_level:]
        forces = []
        for own in atomic:
            (slopes,) = torch.autograd.grad(own.sum(), features, create_graph=True)
            forces.append(_forces(system, slopes, model.descriptor))
        return _sums(atomic, system, sae), torch.stack(forces)


def batch_of(system: System, loss: Loss, structures: Tensor) -> tuple[System, Loss]:
    """Some structures of a data set as a system of their own, and their loss."""
    ranges = [torch.arange(int(system.offsets[s]), int(system.offsets[s + 1])) for s in structures.tolist()]
    atoms = torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
    offsets = torch.tensor([0, *(len(r) for r in ranges)]).cumsum(0)
    rows = {
        name: None if getattr(system, name) is None else getattr(system, name)[atoms]
        for name in ("coordinates", "species", "features", "jacobian")
    }
    own = replace(
        loss,
        energies=loss.energies[:, structures],
        energy_weights=loss.energy_weights[:, structures],
        forces=None if loss.forces is None else loss.forces[:, atoms],
        force_weights=None if loss.force_weights is None else loss.force_weights[:, structures],
    )
    return System(offsets=offsets, **rows), own


def loss_terms(energies: Tensor, forces: Tensor, offsets: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L_E, L_F, energy residuals [K, n] and force errors [K, n, 3] of a batch, structure by structure."""
    residuals = energies - loss.energies
    counted = torch.where(loss.energy_weights == 0, 0.0, residuals)  # a target without weight may be NaN
    of_energies = ((loss.energy_weights * counted.square()).sum(1) / loss.counts[0].clamp(min=1)).sum()
    of_forces, errors = energies.new_zeros(()), residuals.new_zeros(*residuals.shape, 3)
    if loss.forces is None or not forces.numel():
        return of_energies, of_forces, residuals, errors
    for level, s in torch.nonzero(loss.force_weights).tolist():
        atoms = slice(int(offsets[s]), int(offsets[s + 1]))
        if atoms.start == atoms.stop:
            continue
        difference = forces[level, atoms].double() - loss.forces[level, atoms]
        of_forces = of_forces + loss.force_weights[level, s] * difference.square().mean() / loss.counts[1, level]
        size = difference.detach().abs()
        errors[level, s] = torch.stack([size.sum(), size.square().sum(), size.max()])
    return of_energies, of_forces, residuals, errors


def force_step(
    system: System, structures: Tensor, parameters: Tensor, loss: Loss, results: StepResults, model: Model
) -> None:
    """What `ops.force_step` computes."""
    batch, own = batch_of(system, loss, structures)
    flat = parameters.detach().clone().requires_grad_()
    energies, forces = energy_forces(batch, flat, None, model)
    of_energies, of_forces, residuals, errors = loss_terms(energies, forces, batch.offsets, own)
    (gradient,) = torch.autograd.grad(loss.scales[0] * of_energies + loss.scales[1] * of_forces, flat)
    results.energy_residuals.copy_(residuals.detach())
    results.force_errors.copy_(errors)
    results.losses.copy_(torch.stack([of_energies, of_forces]).detach())
    results.gradient.copy_(gradient)
