"""Several models of one architecture as one: means of their energies and forces, and each member's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kinml_fast.errors import InputError
from kinml_fast.nn.aev import AEV
from kinml_fast.nn.potential import EnergyModel

_WORDS = {
    "elements": "knows the elements",
    "descriptor": "has the descriptor",
    "layers": "has the layers",
    "activations": "has the activations",
    "biases": "has biases =",
    "dtype": "computes in",
    "fidelities": "has the fidelities",
    "baseline": "has the baseline",
}
"""What members share, and how a message says that one differs."""


class Ensemble(torch.nn.Module):
    """M models that differ in their weights and single-atom energies only; one fused op evaluates all of them.

    Parameters
    ----------
    members
        At least one model; their weights are copied.
    names
        What a message calls each of them; default: member 1, member 2 …

    Attributes
    ----------
    weights : Parameter
        [M, n_parameters], a row for each member.
    sae : Tensor
        Single-atom energies [M, n_elements] in eV, float64.

    Raises
    ------
    InputError
        No members, or one that differs from the first in elements, descriptor, layers, activations, biases, precision,
        fidelities or baseline.

    Notes
    -----
    Means are sums in the order of the members, divided by M: the same bits for any number of threads.
    """

    __jit_unused_properties__ = ("elements", "dtype", "n_members")

    def __init__(self, members: Sequence[EnergyModel], names: Sequence[str] | None = None) -> None:
        super().__init__()
        _check_alike(members, [f"member {i}" for i in range(1, len(members) + 1)] if names is None else names)
        first = members[0]
        self._architecture = first.to_dict()
        self.descriptor = first.descriptor
        self.aev = AEV(first.descriptor)
        self.sizes = list(first.networks.sizes)
        self.activation_codes = list(first.networks.activation_codes)
        self.biases = first.networks.biases
        self.n_species = first.networks.n_species
        self.weights = torch.nn.Parameter(torch.stack([member.networks.weights.detach() for member in members]))
        self.register_buffer("sae", torch.stack([member.sae for member in members]))

    @property
    def elements(self) -> tuple[str, ...]:
        """The elements that the members know; their place in this list is the species code."""
        return self.descriptor.elements

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights, coordinates and features."""
        return self.weights.dtype

    @property
    def n_members(self) -> int:
        """M."""
        return self.weights.shape[0]

    def forward(self, coordinates: Tensor, species: Tensor, offsets: Tensor) -> Tensor:
        """Mean energies [n_structures] in eV, float64, differentiable; the arguments are those of `EnergyModel`."""
        return self._mean(self.member_energies(coordinates, species, offsets))

    @torch.jit.export
    def member_energies(self, coordinates: Tensor, species: Tensor, offsets: Tensor) -> Tensor:
        """Energies [M, n_structures] of every member in eV, float64, differentiable."""
        features = self.aev(coordinates, species, offsets)
        rows, owners, starts = torch.ops.kinml_fast.species_order(species, offsets, self.n_species)
        energies: list[Tensor] = []
        for weights, sae in zip(self.weights.unbind(0), self.sae.unbind(0)):  # noqa: B905  (unknown to TorchScript)
            energies.append(
                torch.ops.kinml_fast.networks(
                    features,
                    rows,
                    owners,
                    starts,
                    weights,
                    sae,
                    self.sizes,
                    self.activation_codes,
                    self.biases,
                    offsets.size(0) - 1,
                )
            )
        return torch.stack(energies)

    @torch.jit.export
    def energies_and_forces(self, coordinates: Tensor, species: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean energies [n_structures] in eV and mean forces [n_atoms, 3] in eV/Å."""
        energies, forces = self.member_energies_and_forces(coordinates, species, offsets)
        return self._mean(energies), self._mean(forces)

    @torch.jit.export
    def member_energies_and_forces(
        self, coordinates: Tensor, species: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Energies and forces of every member in one pass, in which descriptors are computed once.

        Returns
        -------
        energies : Tensor
            [M, n_structures] in eV, float64.
        forces : Tensor
            [M, n_atoms, 3], -dE/dx in eV/Å, of the members' dtype.

        Notes
        -----
        Not differentiable: for derivatives take those of :meth:`forward` or :meth:`member_energies`.
        """
        return torch.ops.kinml_fast.energy_forces(
            coordinates,
            species,
            offsets,
            self.weights.detach(),
            self.sae,
            self.aev.packed,
            self.sizes,
            self.activation_codes,
            self.biases,
        )

    def _mean(self, values: Tensor) -> Tensor:
        total = values[0]
        for member in range(1, values.size(0)):
            total = total + values[member]
        return total / values.size(0)

    @torch.jit.unused
    def member(self, index: int) -> EnergyModel:
        """One member (counted from 0) as a model of its own, with copies of its weights."""
        model = EnergyModel.from_dict(self._architecture).to(self.sae.device)
        with torch.no_grad():
            model.networks.weights.copy_(self.weights[index])
            model.sae.copy_(self.sae[index])
        return model.train(self.training)

    @torch.jit.unused
    def to_dict(self) -> dict[str, Any]:
        """The architecture, as plain lists, strings and numbers: that of a member, and how many there are."""
        return {"members": self.n_members, **self._architecture}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ensemble:
        """An ensemble of the architecture that :meth:`to_dict` gave; its weights are new, and all members alike."""
        return cls([EnergyModel.from_dict(values)] * values["members"])

    def extra_repr(self) -> str:
        return f"members={self.n_members}, parameters={self.weights.shape[1]} each"


def _check_alike(members: Sequence[EnergyModel], names: Sequence[str]) -> None:
    if not members:
        raise InputError("an ensemble needs at least one model, none are given")
    first = _shared(members[0])
    for name, member in zip(names, members, strict=True):
        own = _shared(member)
        for key, words in _WORDS.items():
            if own.get(key) != first.get(key):
                raise InputError(
                    f"{name} {words} {_shown(key, own, first)}, but {names[0]} {_shown(key, first, own)}: models of "
                    f"one ensemble need the same {key}"
                )


def _shared(model: EnergyModel) -> dict[str, Any]:
    return {"elements": list(model.elements), **model.to_dict()}


def _shown(key: str, own: dict[str, Any], other: dict[str, Any]) -> str:
    if key == "elements":
        return " ".join(own[key])
    if key == "descriptor":  # only what differs
        return ", ".join(f"{name} = {value}" for name, value in own[key].items() if value != other[key].get(name))
    return str(own.get(key))
