"""The energy model: descriptor, networks, single-atom energies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, List, Optional, Tuple  # noqa: UP035  (TorchScript reads the hints)

import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.errors import ConfigError
from kinml_fast.nn.aev import AEV, AEVParameters
from kinml_fast.nn.dispersion import Dispersion
from kinml_fast.nn.networks import SpeciesNetworks
from kinml_fast.nn.repulsion import Repulsion


class Potential(torch.nn.Module):
    """What a model and an ensemble have in common.

    Attributes
    ----------
    descriptor : AEVParameters
        Parameters of the AEV.
    aev : AEV
        The module that computes it.
    networks : SpeciesNetworks
        The networks of all levels.
    sae : Tensor
        Single-atom energies in eV, float64. They are large, and stay float64 when the type of the module is changed.
    baseline : int or None
        The level that the energies are differences from (delta learning).
    levels : int
        K, the number of levels of theory.
    repulsion : Repulsion or None
        What is added to the energies of all levels at short distances.
    dispersion : Dispersion or None
        What `KinMLCalculator` adds to them; the methods here do not.
    """

    __jit_unused_properties__: tuple[str, ...] = ("dtype", "elements", "fidelities")

    if TYPE_CHECKING:  # TorchScript would read these and does not know all of them
        descriptor: AEVParameters
        aev: AEV
        networks: SpeciesNetworks
        sae: Tensor
        baseline: int | None
        levels: int
        repulsion: Repulsion | None
        dispersion: Dispersion | None
        _fidelities: tuple[int, ...]

    @property
    def elements(self) -> tuple[str, ...]:
        """The elements that the model knows; their place in this list is the species code."""
        return self.descriptor.elements

    @property
    def fidelities(self) -> tuple[int, ...]:
        """The levels of theory, lowest first, as the data call them."""
        return self._fidelities

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights, coordinates and features."""
        return self.networks.weights.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        """What `float()`, `to(torch.float32)` and the like call."""
        exact = self.sae
        super()._apply(fn, recurse)
        if self.sae.dtype != exact.dtype:
            self.sae = exact.to(self.sae.device)
        return self

    def extra_repr(self) -> str:
        parts = {"repulsion": self.repulsion, "dispersion": self.dispersion}
        return ", ".join(f"{name}: {part}" for name, part in parts.items() if part is not None)

    def _weights(self) -> Tuple[Tensor, Optional[Tensor]]:  # noqa: UP006, UP045
        """The weights as the fused ops take them, and what was prepared of them.

        Those of an ensemble have no derivative. Nothing is prepared for a GPU, nor where a step of training is going to
        change the weights.
        """
        networks = self.networks
        weights: Tensor = networks.weights
        if weights.dim() == 2:
            weights = weights.detach()
        if weights.is_cuda or (weights.requires_grad and torch.is_grad_enabled()):
            return weights, None
        return weights, torch.ops.kinml_fast.prepare_weights(weights, networks.packed)

    def _fused(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]],  # noqa: UP006, UP045
        sae: Tensor,
        first_level: int,
    ) -> tuple[Tensor, Tensor]:
        system = ops.surrounded(coordinates, species, offsets, around)
        weights, prepared = self._weights()
        return torch.ops.kinml_fast.energy_forces(
            system, weights, sae, self.aev.packed, self.networks.packed, first_level, prepared
        )

    def _all(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]],  # noqa: UP006, UP045
        sae: Tensor,
        first_level: int,
        atomic: bool,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
        system = ops.surrounded(coordinates, species, offsets, around)
        weights, prepared = self._weights()
        return torch.ops.kinml_fast.energy_forces_virials(
            system, weights, sae, self.aev.packed, self.networks.packed, first_level, atomic, prepared
        )

    def _hessian(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]],  # noqa: UP006, UP045
        atoms: Optional[Tensor],  # noqa: UP045
    ) -> Tensor:
        system = ops.surrounded(coordinates, species, offsets, around)
        most = coordinates.size(0)
        if offsets.size(0) > 2:
            most = int((offsets[1:] - offsets[:-1]).max())
        return torch.ops.kinml_fast.energy_hessians(
            system,
            self.networks.weights.detach(),
            self.aev.packed,
            self.networks.packed,
            self.levels - 1,
            most,
            atoms,
        )

    def _product(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        v: Tensor,
        around: Optional[List[Optional[Tensor]]],  # noqa: UP006, UP045
    ) -> Tensor:
        system = ops.surrounded(coordinates, species, offsets, around)
        weights, prepared = self._weights()
        return torch.ops.kinml_fast.hessian_products(
            system, weights.detach(), v, self.aev.packed, self.networks.packed, self.levels - 1, prepared
        )


class EnergyModel(Potential):
    """Energies of molecules: E = Σ over atoms (network of the atom's element (AEV) + single-atom energy), and,
    if the model has one, a repulsion of pairs at short distances.

    At several levels of theory the energies of a level are those of the level below plus what a network of its own
    adds, which takes the AEV and the atom's energy at the level below (without single-atom energy).

    Parameters
    ----------
    descriptor
        Parameters of the AEV; their elements are the elements that the model knows, in order.
    layers, activations, biases, dtype
        See :class:`~kinml_fast.nn.networks.SpeciesNetworks`.
    fidelities
        The levels of theory, lowest first, as the data call them; their number is K.
    baseline
        The level that the energies of the model are differences from (delta learning); None: they are whole energies.
    repulsion
        Of pairs at short distances, for the same elements; None: there is none. Differences have none.
    dispersion
        What is added where the model runs in ASE, and is not in the energies that it is trained on; None: nothing.

    Attributes
    ----------
    sae : Tensor
        Single-atom energies [n_elements], of several levels [K, n_elements], in eV, float64, zero at first.
    """

    def __init__(
        self,
        descriptor: AEVParameters,
        layers: Sequence[int] | Sequence[Sequence[int]] = (48, 24, 12, 1),
        activations: Sequence[str] = ("gaussian", "gaussian", "gaussian", "identity"),
        biases: bool = True,
        dtype: torch.dtype = torch.float64,
        fidelities: Sequence[int] = (1,),
        baseline: int | None = None,
        repulsion: Repulsion | None = None,
        dispersion: Dispersion | None = None,
    ) -> None:
        super().__init__()
        self._fidelities = tuple(fidelities)
        self.baseline = baseline
        self._check_levels()
        self.levels = len(self._fidelities)
        self.descriptor = descriptor
        self.repulsion, self.dispersion = repulsion, dispersion
        self._check_repulsion()
        self.aev = AEV(descriptor, repulsion)
        self.networks = SpeciesNetworks(
            descriptor.elements, descriptor.length, layers, activations, biases, dtype, self.levels
        )
        shape = (len(descriptor.elements),) if self.levels == 1 else (self.levels, len(descriptor.elements))
        self.register_buffer("sae", torch.zeros(shape, dtype=torch.float64))

    def _check_levels(self) -> None:
        if not self._fidelities or len(set(self._fidelities)) < len(self._fidelities):
            raise ConfigError(f"A model has one or more different fidelities, not {list(self._fidelities)}.")
        if self.baseline is not None and (len(self._fidelities) > 1 or self.baseline in self._fidelities):
            raise ConfigError(
                f"A model of differences has one fidelity and another one as its baseline, not "
                f"{list(self._fidelities)} and {self.baseline}."
            )

    def _check_repulsion(self) -> None:
        if self.repulsion is None:
            return
        if self.baseline is not None:
            raise ConfigError("A model of differences has no repulsion: give one to the level that it is added to.")
        if len(self.repulsion.charges) != len(self.descriptor.elements):
            raise ConfigError(
                f"The repulsion is of {len(self.repulsion.charges)} elements, the model of "
                f"{len(self.descriptor.elements)}."
            )
        longest = max(self.descriptor.radial_cutoff, self.descriptor.angular_cutoff)
        if self.repulsion.cutoff > longest:
            raise ConfigError(
                f"The repulsion reaches {self.repulsion.cutoff:.3g} Å, farther than the descriptor's {longest:.3g} Å: "
                f"make outer smaller than {longest / (2 * max(self.repulsion.radii)):.3g}."
            )

    def forward(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> Tensor:
        """Energies of a ragged batch of molecules and crystals, at the highest level of theory.

        Parameters
        ----------
        coordinates
            [n_atoms, 3] in Å, of the model's dtype.
        species
            [n_atoms] int64, places in ``elements``.
        offsets
            [n_structures + 1] int64.
        around
            Cells, ghosts and given pairs, as `ops.surroundings` makes them; None: all structures are molecules.

        Returns
        -------
        Tensor
            [n_structures] energies in eV, float64. They can be differentiated twice with respect to coordinates and
            weights, once with respect to cells.
        """
        return self.level_energies(coordinates, species, offsets, around)[-1]

    @torch.jit.export
    def level_energies(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> Tensor:
        """Energies [K, n_structures] of all levels, lowest first; otherwise as :meth:`forward`."""
        sums, every = ops.centre_sums(offsets, around)
        energies = self.networks(self.aev(coordinates, species, offsets, around), species, sums, self.sae)
        of_levels = (energies.unsqueeze(0) if self.levels == 1 else energies)[:, ::every]
        return self.aev.add_repulsion(of_levels, coordinates, species, offsets, around)

    @torch.jit.export
    def energies_and_forces(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> tuple[Tensor, Tensor]:
        """Energies and forces at the highest level in one pass; the arguments are those of :meth:`forward`.

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
        sae = self.sae if self.levels == 1 else self.sae[-1]
        energies, forces = self._fused(coordinates, species, offsets, around, sae, self.levels - 1)
        return energies.squeeze(0), forces.squeeze(0)

    @torch.jit.export
    def energies_forces_virials(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Energies and forces as of :meth:`energies_and_forces`, and virials [n_structures, 3, 3] in eV, float64.

        The virial is the derivative of the energy by a strain ε that takes all places and lattice vectors x to x + ε x;
        by the volume of the cell it is the stress in ASE's sign.
        """
        sae = self.sae if self.levels == 1 else self.sae[-1]
        all = self._all(coordinates, species, offsets, around, sae, self.levels - 1, False)
        return all[0].squeeze(0), all[1].squeeze(0), all[2].squeeze(0)

    @torch.jit.export
    def hessian(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
        atoms: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tensor:
        """Second derivatives of the energy at the highest level; other arguments are those of :meth:`forward`.

        Parameters
        ----------
        atoms
            [n] int64, different atoms, whose rows are wanted; None: all.

        Returns
        -------
        Tensor
            [n, 3, 3 max_atoms] in eV/Å², of the model's dtype, max_atoms being the atoms of the largest structure:
            entry 3 q + d of a row is the derivative with respect to coordinate d of the q-th atom of the same
            structure. Of one structure, ``.reshape(3 * n_atoms, -1)`` is its Hessian. It has no derivative.
        """
        return self._hessian(coordinates, species, offsets, around, atoms).squeeze(0)

    @torch.jit.export
    def hessian_product(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        v: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> Tensor:
        """The Hessian of each structure times v [n_atoms, 3], in about twice the time of energies and forces.

        The result is [n_atoms, 3], in eV/Å² times the unit of v; it has no derivative. Otherwise as :meth:`hessian`.
        """
        return self._product(coordinates, species, offsets, v, around).squeeze(0)

    @torch.jit.export
    def level_results(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
        """What `ops.energy_forces_virials` gives of all levels, with that of each atom."""
        return self._all(coordinates, species, offsets, around, self.sae, 0, True)

    @torch.jit.export
    def level_energies_and_forces(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> tuple[Tensor, Tensor]:
        """Energies [K, n_structures] and forces [K, n_atoms, 3] of all levels, lowest first, in one pass.

        Otherwise as :meth:`energies_and_forces`.
        """
        return self._fused(coordinates, species, offsets, around, self.sae, 0)

    @torch.jit.unused
    def to_dict(self) -> dict[str, Any]:
        """The architecture, as plain lists, strings and numbers."""
        layers = self.networks.layers
        values = {
            "descriptor": self.descriptor.to_dict(),
            "layers": layers[0] if all(widths == layers[0] for widths in layers) else layers,
            "activations": list(self.networks.activations),
            "biases": self.networks.biases,
            "dtype": str(self.dtype).removeprefix("torch."),
            "fidelities": list(self.fidelities),
            "baseline": self.baseline,
        }
        # Only where there are such: what does not know them must not take the file for one without (model_file.py).
        further = {"repulsion": self.repulsion, "dispersion": self.dispersion}
        return values | {name: part.to_dict() for name, part in further.items() if part is not None}

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
                values["fidelities"],
                values["baseline"],
                Repulsion.from_dict(values["repulsion"]) if "repulsion" in values else None,
                Dispersion.from_dict(values["dispersion"]) if "dispersion" in values else None,
            )
        except KeyError as error:
            raise ConfigError(f"The model's architecture lacks or does not know {error}.") from error
