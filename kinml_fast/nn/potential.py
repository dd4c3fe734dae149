"""The energy model: descriptor, networks, single-atom energies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kinml_fast.errors import InputError
from kinml_fast.nn.aev import AEV, AEVParameters
from kinml_fast.nn.networks import SpeciesNetworks


class EnergyModel(torch.nn.Module):
    """Energies of molecules: E = Σ over atoms (network of the atom's element (AEV) + single-atom energy).

    Parameters
    ----------
    descriptor
        Parameters of the AEV; their elements are the elements that the model knows, in order.
    layers, activations, biases, dtype
        See :class:`~kinml_fast.nn.networks.SpeciesNetworks`.

    Attributes
    ----------
    sae : Tensor
        Single-atom energies [n_elements] in eV, float64, zero at first.
    """

    __jit_unused_properties__ = ("elements", "dtype")

    def __init__(
        self,
        descriptor: AEVParameters,
        layers: Sequence[int] | Sequence[Sequence[int]] = (48, 24, 12, 1),
        activations: Sequence[str] = ("gaussian", "gaussian", "gaussian", "identity"),
        biases: bool = True,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.aev = AEV(descriptor)
        self.networks = SpeciesNetworks(descriptor.elements, descriptor.length, layers, activations, biases, dtype)
        self.register_buffer("sae", torch.zeros(len(descriptor.elements), dtype=torch.float64))

    @property
    def elements(self) -> tuple[str, ...]:
        """The elements that the model knows; their place in this list is the species code."""
        return self.descriptor.elements

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights, coordinates and features."""
        return self.networks.weights.dtype

    def forward(self, coordinates: Tensor, species: Tensor, offsets: Tensor) -> Tensor:
        """Energies of a ragged batch of molecules.

        Parameters
        ----------
        coordinates
            [n_atoms, 3] in Å, of the model's dtype.
        species
            [n_atoms] int64, places in ``elements``.
        offsets
            [n_structures + 1] int64.

        Returns
        -------
        Tensor
            [n_structures] energies in eV, float64.
        """
        return self.networks(self.aev(coordinates, species, offsets), species, offsets, self.sae)

    @torch.jit.export
    def energies_and_forces(self, coordinates: Tensor, species: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and forces in one pass; the arguments are those of :meth:`forward`.

        Returns
        -------
        energies : Tensor
            [n_structures] in eV, float64.
        forces : Tensor
            [n_atoms, 3], -dE/dx in eV/Å, of the model's dtype.

        Notes
        -----
        Both can be differentiated with respect to the weights, not with respect to the coordinates: for those, take
        the gradient of what :meth:`forward` gives.
        """
        return torch.ops.kinml_fast.energy_forces(
            coordinates,
            species,
            offsets,
            self.networks.weights,
            self.sae,
            self.aev.packed,
            self.networks.sizes,
            self.networks.activation_codes,
            self.networks.biases,
        )

    @torch.jit.unused
    def to_dict(self) -> dict[str, Any]:
        """The architecture, as plain lists, strings and numbers."""
        layers = self.networks.layers
        return {
            "descriptor": self.descriptor.to_dict(),
            "layers": layers[0] if all(widths == layers[0] for widths in layers) else layers,
            "activations": list(self.networks.activations),
            "biases": self.networks.biases,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EnergyModel:
        """A model of the architecture that :meth:`to_dict` gave; its weights are new."""
        try:
            return cls(
                AEVParameters.from_dict(values["descriptor"]),
                values["layers"],
                values["activations"],
                values["biases"],
                {"float64": torch.float64, "float32": torch.float32}[values["dtype"]],
            )
        except KeyError as error:
            raise InputError(f"The model's architecture lacks or does not know {error}.") from error
