"""Several models of one architecture as one: means of their energies and forces, and each member's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, List, Optional, Tuple  # noqa: UP035  (TorchScript reads the hints)

import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.errors import ModelError
from kinml_fast.nn.aev import AEV
from kinml_fast.nn.calibration import Calibration
from kinml_fast.nn.potential import EnergyModel, Potential

_WORDS = {
    "elements": "knows the elements",
    "descriptor": "has the descriptor",
    "layers": "has the layers",
    "activations": "has the activations",
    "biases": "has biases =",
    "dtype": "computes in",
    "fidelities": "has the fidelities",
    "baseline": "has the baseline",
    "repulsion": "has the repulsion",
    "dispersion": "has the dispersion",
}
"""What members share, and how a message says that one differs."""


class Ensemble(Potential):
    """M models that differ in their weights and single-atom energies only; one fused op evaluates all of them.

    Parameters
    ----------
    members
        At least one model; their weights are copied, to the device of the first.
    names
        What a message calls each of them; default: member 1, member 2 …

    Attributes
    ----------
    networks : SpeciesNetworks
        As a member's, but its ``weights`` are [M, n_parameters], a row for each member.
    sae : Tensor
        Single-atom energies [M, n_elements], of K > 1 levels of theory [M, K, n_elements], in eV, float64.
    calibration : Calibration or None
        Factors of the members' standard deviations, which evaluation, prediction, calculators and exported files apply;
        None: there are none. Parts of this ensemble, and larger ones, have none.

    Raises
    ------
    InputError
        No members, or one that differs from the first in elements, descriptor, layers, activations, biases, precision,
        fidelities, baseline, repulsion or dispersion.

    Notes
    -----
    Means are sums in the order of the members, divided by M: the same bits for any number of threads.
    """

    __jit_unused_properties__ = (*Potential.__jit_unused_properties__, "n_members")

    def __init__(self, members: Sequence[EnergyModel], names: Sequence[str] | None = None) -> None:
        super().__init__()
        _check_alike(members, [f"member {i}" for i in range(1, len(members) + 1)] if names is None else names)
        first = members[0]
        self._architecture = first.to_dict()
        self._fidelities = first.fidelities
        self.baseline = first.baseline
        self.levels = first.levels
        self.descriptor = first.descriptor
        self.repulsion, self.dispersion = first.repulsion, first.dispersion
        self.calibration: Calibration | None = None
        self.aev = AEV(first.descriptor, first.repulsion)
        self.networks = copy.deepcopy(first.networks)
        device = first.sae.device
        weights = torch.stack([member.networks.weights.detach().to(device) for member in members])
        self.networks.weights = torch.nn.Parameter(weights)
        self.register_buffer("sae", torch.stack([member.sae.to(device) for member in members]))

    @property
    def n_members(self) -> int:
        """M."""
        return self.networks.weights.shape[0]

    def forward(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> Tensor:
        """Mean energies [n_structures] at the highest level in eV, float64, differentiable.

        The arguments are those of :meth:`EnergyModel.forward`.
        """
        return self._mean(self.member_level_energies(coordinates, species, offsets, around)[:, -1])

    @torch.jit.export
    def member_level_energies(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> Tensor:
        """Energies [M, K, n_structures] of every member at all levels in eV, float64, differentiable."""
        features = self.aev(coordinates, species, offsets, around)
        sums, every = ops.centre_sums(offsets, around)
        energies: list[Tensor] = []
        for member in range(self.sae.size(0)):
            own = self.networks.with_weights(features, species, sums, self.sae[member], self.networks.weights[member])
            energies.append((own.unsqueeze(0) if self.levels == 1 else own)[:, ::every])
        return self.aev.add_repulsion(torch.stack(energies), coordinates, species, offsets, around)

    @torch.jit.export
    def energies_and_forces(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> tuple[Tensor, Tensor]:
        """Mean energies [n_structures] in eV and mean forces [n_atoms, 3] in eV/Å at the highest level."""
        energies, forces = self.member_energies_and_forces(coordinates, species, offsets, around)
        return self._mean(energies), self._mean(forces)

    @torch.jit.export
    def level_energies_and_forces(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> tuple[Tensor, Tensor]:
        """Mean energies [K, n_structures] and mean forces [K, n_atoms, 3] of all levels, lowest first."""
        energies, forces = self.member_level_energies_and_forces(coordinates, species, offsets, around)
        return self._mean(energies), self._mean(forces)

    @torch.jit.export
    def member_energies_and_forces(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> tuple[Tensor, Tensor]:
        """Energies and forces of every member at the highest level in one pass, in which descriptors are computed once.

        Returns
        -------
        energies : Tensor
            [M, n_structures] in eV, float64.
        forces : Tensor
            [M, n_atoms, 3], -dE/dx in eV/Å, of the members' dtype.

        Notes
        -----
        Not differentiable: for derivatives take those of :meth:`forward` or :meth:`member_level_energies`.
        """
        sae = self.sae if self.levels == 1 else self.sae[:, -1]
        energies, forces = self._fused(coordinates, species, offsets, around, sae, self.levels - 1)
        return energies.squeeze(1), forces.squeeze(1)

    @torch.jit.export
    def member_level_energies_and_forces(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> tuple[Tensor, Tensor]:
        """Energies [M, K, n_structures] and forces [M, K, n_atoms, 3] of every member at all levels, lowest first.

        Otherwise as :meth:`member_energies_and_forces`.
        """
        return self._fused(coordinates, species, offsets, around, self.sae, 0)

    @torch.jit.export
    def energies_forces_virials(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Means of what :meth:`EnergyModel.energies_forces_virials` gives, at the highest level."""
        sae = self.sae if self.levels == 1 else self.sae[:, -1]
        all = self._all(coordinates, species, offsets, around, sae, self.levels - 1, False)
        return self._mean(all[0].squeeze(1)), self._mean(all[1].squeeze(1)), self._mean(all[2].squeeze(1))

    @torch.jit.export
    def hessian(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
        atoms: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tensor:
        """The mean of :meth:`member_hessians`; see :meth:`EnergyModel.hessian`."""
        return self._mean(self.member_hessians(coordinates, species, offsets, around, atoms))

    @torch.jit.export
    def member_hessians(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
        atoms: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tensor:
        """What :meth:`EnergyModel.hessian` gives of every member, [M, n, 3, 3 max_atoms]."""
        return self._hessian(coordinates, species, offsets, around, atoms).squeeze(1)

    @torch.jit.export
    def hessian_product(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        v: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> Tensor:
        """The mean of what :meth:`EnergyModel.hessian_product` gives of every member."""
        return self._mean(self._product(coordinates, species, offsets, v, around).squeeze(1))

    @torch.jit.export
    def member_level_results(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
        """What `ops.energy_forces_virials` gives of every member at all levels, with that of each atom."""
        return self._all(coordinates, species, offsets, around, self.sae, 0, True)

    def _mean(self, values: Tensor) -> Tensor:
        total = values[0]
        for member in range(1, values.size(0)):
            total = total + values[member]
        return total / values.size(0)

    @torch.jit.unused
    def member(self, index: int) -> EnergyModel:
        """One member (counted from 0) as a model of its own, with copies of its weights."""
        model = EnergyModel.from_dict(self._member_dict()).to(self.sae.device)
        with torch.no_grad():
            model.networks.weights.copy_(self.networks.weights[index])
            model.sae.copy_(self.sae[index])
        return model.train(self.training)

    @torch.jit.unused
    def to_dict(self) -> dict[str, Any]:
        """The architecture, as plain lists, strings and numbers: that of a member, and how many there are."""
        values = {"members": self.n_members, **self._member_dict()}
        return values if self.calibration is None else values | {"calibration": self.calibration.to_dict()}

    @torch.jit.unused
    def _member_dict(self) -> dict[str, Any]:
        return {**self._architecture, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ensemble:
        """An ensemble of the architecture that :meth:`to_dict` gave; its weights are new, and all members alike."""
        ensemble = cls([EnergyModel.from_dict(values)] * values["members"])
        if "calibration" in values:
            known = Calibration.from_dict(values["calibration"])
            ensemble.calibration = known.checked(ensemble.levels, ensemble.elements)
        return ensemble

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"members: {self.n_members}", super().extra_repr())))


def _check_alike(members: Sequence[EnergyModel], names: Sequence[str]) -> None:
    if not members:
        raise ModelError("an ensemble needs at least one model, none are given")
    first = _shared(members[0])
    for name, member in zip(names, members, strict=True):
        this = _shared(member)
        for key, words in _WORDS.items():
            if this.get(key) != first.get(key):
                raise ModelError(
                    f"{name} {words} {_shown(key, this, first)}, but {names[0]} {_shown(key, first, this)}: models of "
                    f"one ensemble need the same {key}"
                )


def _shared(model: EnergyModel) -> dict[str, Any]:
    return {"elements": list(model.elements), **model.to_dict()}


def _shown(key: str, this: dict[str, Any], other: dict[str, Any]) -> str:
    if key == "elements":
        return " ".join(this[key])
    if key == "descriptor":  # only what differs
        return ", ".join(f"{name} = {value}" for name, value in this[key].items() if value != other[key].get(name))
    return str(this.get(key))
