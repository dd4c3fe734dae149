"""Atomic environment vectors: their parameters and the module that computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, List, Optional  # noqa: UP035  (TorchScript reads the hints)

import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.errors import ConfigError
from kinml_fast.nn.repulsion import Repulsion


@dataclass(frozen=True)
class AEVParameters:
    """Which atomic environment vector: elements in order, shifts, exponents, cutoffs.

    General enough for aevmod's vectors (:meth:`aevmod`) and those of the ANI models (:meth:`ani`). Lengths in Å.
    Source: Smith, Isayev, Roitberg, Chem. Sci. 2017, 8, 3192 (DOI 10.1039/C6SC05720A).
    """

    elements: tuple[str, ...]
    radial_shifts: tuple[float, ...]
    radial_eta: float
    radial_cutoff: float
    angular_shifts: tuple[float, ...]
    angular_eta: float
    angular_cutoff: float
    sections: tuple[float, ...]
    zeta: float
    beta: float = 0.95
    radial_factor: float = 1.0
    angular_factor: float = 1.0

    def __post_init__(self) -> None:
        for field in ("elements", "radial_shifts", "angular_shifts", "sections"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
            if not getattr(self, field):
                raise ConfigError(f"The descriptor's '{field}' is empty: it needs at least one entry.")
        if len(set(self.elements)) != len(self.elements):
            raise ConfigError(f"The descriptor's elements {list(self.elements)} name one element twice.")
        if not (self.radial_cutoff > 0 and self.angular_cutoff > 0):
            raise ConfigError(
                f"Both cutoffs of the descriptor must be positive lengths in Å, not {self.radial_cutoff} and "
                f"{self.angular_cutoff}."
            )
        if not self.zeta >= 1:
            raise ConfigError(f"The descriptor's zeta must be at least 1, not {self.zeta}.")
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"The descriptor's beta must lie between 0 and 1, not {self.beta}.")

    @classmethod
    def aevmod(
        cls,
        elements: Sequence[str],
        n_radial: int = 16,
        n_angular: int = 8,
        n_sections: int = 8,
        cutoffs: Sequence[float] = (5.2, 3.8),
        beta: float = 0.95,
    ) -> AEVParameters:
        """The vectors of aevmod and PyKinML: shifts spread evenly, widths from their distance, zeta 8."""
        if min(n_radial, n_angular, n_sections) < 1:
            raise ConfigError(
                f"The numbers of shifts and sections must be at least 1, not {n_radial}, {n_angular}, {n_sections}."
            )
        radial, angular = (float(c) for c in cutoffs)

        def shifts(n: int, cutoff: float) -> tuple[tuple[float, ...], float]:
            step = cutoff / n
            first, last = step / 2, cutoff - step / 2
            spread = [first + (last - first) * i / max(n - 1, 1) for i in range(n)]
            return tuple(spread), (2.0 / 3.0 * step) ** -2

        radial_shifts, radial_eta = shifts(n_radial, radial)
        angular_shifts, angular_eta = shifts(n_angular, angular)
        sections = tuple(math.pi * m / max(n_sections - 1, 1) for m in range(n_sections))
        return cls(
            tuple(elements),
            radial_shifts,
            radial_eta,
            radial,
            angular_shifts,
            angular_eta,
            angular,
            sections,
            8.0,
            beta,
        )

    @classmethod
    def ani(
        cls,
        elements: Sequence[str],
        radial_shifts: Sequence[float],
        radial_eta: float,
        radial_cutoff: float,
        angular_shifts: Sequence[float],
        angular_eta: float,
        angular_cutoff: float,
        sections: Sequence[float],
        zeta: float,
    ) -> AEVParameters:
        """The vectors of TorchANI (ANI-1x, ANI-2x …): radial terms count 1/4, angular ones 2, beta 0.95."""
        return cls(
            tuple(elements),
            tuple(radial_shifts),
            radial_eta,
            radial_cutoff,
            tuple(angular_shifts),
            angular_eta,
            angular_cutoff,
            tuple(sections),
            zeta,
            beta=0.95,
            radial_factor=0.25,
            angular_factor=2.0,
        )

    @property
    def length(self) -> int:
        """D, the length of an atom's vector."""
        s = len(self.elements)
        return s * len(self.radial_shifts) + s * (s + 1) // 2 * len(self.angular_shifts) * len(self.sections)

    def packed(self) -> list[float]:
        """The numbers in the order that the ops take (csrc/torch/checks.h reads them)."""
        return [
            float(len(self.elements)),
            float(len(self.radial_shifts)),
            float(len(self.angular_shifts)),
            float(len(self.sections)),
            self.radial_eta,
            self.radial_cutoff,
            self.radial_factor,
            self.angular_eta,
            self.angular_cutoff,
            self.angular_factor,
            self.zeta,
            self.beta,
            *self.radial_shifts,
            *self.angular_shifts,
            *self.sections,
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for YAML, JSON and checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AEVParameters:
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ConfigError(f"The descriptor has unknown entries {unknown}; it knows {sorted(names)}.")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"The descriptor is incomplete: {error}.") from error


class AEV(torch.nn.Module):
    """Computes atomic environment vectors: (coordinates, species, offsets, around) -> [n_atoms, D].

    ``around`` is what `ops.surroundings` gives, None for molecules.

    Attributes
    ----------
    packed : list of float
        What the ops take for the descriptor, with the model's repulsion, if it has one, behind it: those for energies
        and forces together add that energy.
    repels : bool
        Whether there is a repulsion.
    repulsion : list of float
        What the ops take for the repulsion alone.
    """

    def __init__(self, parameters: AEVParameters, repulsion: Repulsion | None = None) -> None:
        super().__init__()
        self.packed = parameters.packed() + ([] if repulsion is None else repulsion.packed())
        self.length = parameters.length
        self.repels = repulsion is not None
        self.repulsion = [0.0] if repulsion is None else repulsion.alone()

    def forward(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> Tensor:
        return torch.ops.kinml_fast.aev(ops.surrounded(coordinates, species, offsets, around), self.packed)

    @torch.jit.export
    def add_repulsion(
        self,
        energies: Tensor,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> Tensor:
        """Energies [..., n_structures] in eV with the repulsion, if there is one; differentiable as the vectors are."""
        if not self.repels:
            return energies
        of_atoms = self.atomic_repulsion(coordinates, species, offsets, around)
        structures = torch.arange(offsets.size(0) - 1, device=offsets.device)
        owners = torch.repeat_interleave(structures, offsets.diff(), output_size=species.size(0))
        sums = torch.zeros(offsets.size(0) - 1, dtype=energies.dtype, device=energies.device)
        return energies + sums.index_add(0, owners, of_atoms.to(energies.dtype))

    @torch.jit.export
    def atomic_repulsion(
        self,
        coordinates: Tensor,
        species: Tensor,
        offsets: Tensor,
        around: Optional[List[Optional[Tensor]]] = None,  # noqa: UP006, UP045
    ) -> Tensor:
        """Each atom's half of the repulsion of its pairs, [n_atoms] in eV; 0 for ghosts."""
        if not self.repels:
            return torch.zeros_like(coordinates[:, 0])
        return torch.ops.kinml_fast.aev(ops.surrounded(coordinates, species, offsets, around), self.repulsion)[:, 0]

    def extra_repr(self) -> str:
        return f"length={self.length}"
