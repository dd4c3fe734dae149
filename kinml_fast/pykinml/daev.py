"""Derivatives of energies by coordinates, from the Jacobians of descriptors in PyKinML's form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cal_dEdxyz_ddp(aevs: Sequence[Tensor], E: Tensor, daev: Sequence[Tensor], inds: Sequence[Tensor]) -> list[Tensor]:
    """dE/dx of molecules: Σ over atoms of dE/d(descriptor) · d(descriptor)/dx.

    Parameters
    ----------
    aevs
        For each species, [n_atoms, D], from which E was computed; they require gradients.
    E
        [n_molecules, 1], eV. With −E the result is forces.
    daev
        For each species, [n_atoms, D, C], 1/Å; columns beyond 3 n of a molecule are zero.
    inds
        For each species, [n_atoms] int64, the molecule of each atom.

    Returns
    -------
    For each molecule [C], eV/Å; it can be differentiated with respect to the weights.
    """
    slopes = torch.autograd.grad(E.sum(), list(aevs), create_graph=True, allow_unused=True)
    total = E.new_zeros(E.shape[0], daev[0].shape[-1])
    for slope, jacobian, molecules in zip(slopes, daev, inds, strict=True):
        if slope is not None and len(molecules):
            total = total.index_add(0, molecules, torch.einsum("ad,adc->ac", slope, jacobian))
    return list(total)
