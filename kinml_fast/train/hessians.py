"""Second derivatives as a term of the loss, by products with random directions.

In each step some molecules are taken, and for each a direction v of length 1. The products H v of the model are
differences of its forces, (F(x - h v) - F(x + h v)) / 2h, whose derivative by the weights the fused op has; of the
reference they are exact. The expectation of |Δ(H v)|² / 3n over directions is the mean square error of the entries of a
Hessian of n atoms, so that

    L_H = mean over molecules of |Δ(H v)|² / 3n   in eV²/Å⁴

costs as much as twice as many structures with forces, however large the molecules (arXiv 2503.07839).
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kinml_fast.data.hessians import MoleculeHessian
from kinml_fast.errors import DataError
from kinml_fast.nn import EnergyModel
from kinml_fast.train.loss import LossBatch

log = logging.getLogger(__name__)

_STEP = {torch.float64: 0.01, torch.float32: 0.03}
"""h, Å."""


class HessianTerm:
    """The term of the loss, as `Trainer` takes it among its ``extra_losses``.

    Parameters
    ----------
    hessians
        Of the level of theory that the model's highest one is.
    model
        What is trained: its elements, device and precision.
    count
        Molecules in a step; all of them if there are fewer.

    Raises
    ------
    DataError
        A molecule with an element that the model does not know.
    """

    def __init__(self, hessians: Sequence[MoleculeHessian], model: EnergyModel, count: int) -> None:
        for one in hessians:
            if unknown := sorted(set(one.symbols) - set(model.elements)):
                raise DataError(
                    f"{one.label}: has a Hessian and contains {' '.join(unknown)}, the model knows only "
                    f"{' '.join(model.elements)}: leave it out of training.loss.hessians, or add such structures"
                )
        self._hessians = list(hessians)
        self._species = [torch.tensor([model.elements.index(s) for s in one.symbols]) for one in hessians]
        self._count = min(count, len(self._hessians))

    def __call__(self, model: EnergyModel, batch: LossBatch) -> Tensor:
        """L_H for a step; molecules and directions depend on the structures of its batch alone."""
        draws = np.random.default_rng(zlib.crc32(batch.structures.cpu().numpy().tobytes()))
        chosen = sorted(draws.choice(len(self._hessians), self._count, replace=False).tolist())
        h, device = _STEP[model.dtype], model.sae.device
        places, wanted, sizes = [], [], []
        for i in chosen:
            one = self._hessians[i]
            direction = draws.standard_normal(one.positions.shape)
            direction /= np.linalg.norm(direction)
            here = one.positions - one.positions[:1]  # float32 has few digits far from the origin
            places += [here - h * direction, here + h * direction]
            wanted.append((one.values @ direction.ravel()).reshape(-1, 3))
            sizes += [len(one.symbols)] * 2
        coordinates = torch.from_numpy(np.concatenate(places)).to(device, model.dtype)
        species = torch.cat([self._species[i] for i in chosen for _ in range(2)]).to(device)
        offsets = torch.tensor([0, *np.cumsum(sizes).tolist()], device=device)
        _, forces = model.energies_and_forces(coordinates, species, offsets)
        total = forces.new_zeros((), dtype=torch.float64)
        for below, above, product in zip(*[iter(forces.double().split(sizes))] * 2, wanted, strict=True):
            error = (below - above) / (2 * h) - torch.from_numpy(product).to(device)
            total = total + error.square().mean()
        return total / self._count

    def error(self, model: EnergyModel) -> float:
        """Root mean square error of all entries of the Hessians, eV/Å²."""
        squares, numbers = 0.0, 0
        for one, species in zip(self._hessians, self._species, strict=True):
            here = torch.from_numpy(one.positions - one.positions[:1]).to(model.sae.device, model.dtype)
            ends = torch.tensor([0, len(species)], device=model.sae.device)
            with torch.no_grad():
                found = model.hessian(here, species.to(model.sae.device), ends).double().cpu().numpy()
            squares += float(np.square(found.reshape(one.values.shape) - one.values).sum())
            numbers += one.values.size
        return float(np.sqrt(squares / numbers))
