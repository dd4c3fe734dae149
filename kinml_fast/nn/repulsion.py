"""The repulsion of nuclei at short distances, where there are no data: a pair potential that is part of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.errors import ConfigError


@dataclass(frozen=True)
class Repulsion:
    """The universal screened potential of nuclei (ZBL), switched off smoothly before any bond's length.

    V = Σ over pairs of Z_i Z_j e²/(4πε₀ r) Σ_k c_k exp(−d_k r/a) S(t) with a = 0.4685 Å / (Z_i^0.23 + Z_j^0.23) and
    S = 1 − t³ (10 − 15 t + 6 t²), t = (r − r_in) / (r_out − r_in), between r_in = `inner` · (R_i + R_j) and r_out =
    `outer` · (R_i + R_j): energies, forces and their derivatives are continuous. Nothing of it is fitted.

    Source: Ziegler, Biersack, Littmark, The Stopping and Range of Ions in Matter, Pergamon, New York 1985.
    Radii: Cordero et al., Dalton Trans. 2008, 2832 (DOI 10.1039/B801115J).

    Attributes
    ----------
    charges
        [S] Z, in the order of the model's elements.
    radii
        [S] covalent radii R in Å.
    inner, outer
        Fractions of the sum of two radii: 0 ≤ inner < outer.
    """

    charges: tuple[float, ...]
    radii: tuple[float, ...]
    inner: float
    outer: float

    def __post_init__(self) -> None:
        for field in ("charges", "radii"):
            object.__setattr__(self, field, tuple(float(x) for x in getattr(self, field)))
        if len(self.charges) != len(self.radii) or not all(x > 0 for x in (*self.charges, *self.radii)):
            raise ConfigError(
                f"A repulsion needs a positive charge and radius of each element, not {self.charges} and {self.radii}."
            )
        if not 0 <= self.inner < self.outer:
            raise ConfigError(f"A repulsion needs 0 <= inner < outer, not {self.inner} and {self.outer}.")

    @classmethod
    def zbl(cls, elements: Sequence[str], inner: float = 0.4, outer: float = 0.75) -> Repulsion:
        """That of some elements, with their covalent radii."""
        from ase.data import atomic_numbers, covalent_radii  # not on the bare machines of scripts/gpu_check.sh

        numbers = [atomic_numbers[element] for element in elements]
        return cls(tuple(map(float, numbers)), tuple(float(covalent_radii[z]) for z in numbers), inner, outer)

    @property
    def cutoff(self) -> float:
        """Beyond which no two atoms repel each other, Å."""
        return 2 * self.outer * max(self.radii)

    def packed(self) -> list[float]:
        """The numbers that stand behind those of a descriptor (csrc/torch/checks.h reads them)."""
        return [self.inner, self.outer, *self.charges, *self.radii]

    def alone(self) -> list[float]:
        """A descriptor without shifts: the vector of an atom is one number, its share of the energy in eV."""
        return [float(len(self.charges)), *[0.0] * 11, *self.packed()]

    def energies_and_forces(self, system: ops.System) -> tuple[Tensor, Tensor]:
        """Energies [n_structures] in eV, float64, and forces [n_atoms, 3] in eV/Å."""
        with torch.inference_mode():
            of_atoms = ops.aev(system, self.alone())
            forces = -ops.aev_vjp(system, torch.ones_like(of_atoms), self.alone())
            owners = torch.repeat_interleave(torch.arange(len(system.offsets) - 1), system.offsets.diff())
            energies = torch.zeros(len(system.offsets) - 1, dtype=torch.float64)
            return energies.index_add(0, owners, of_atoms[:, 0].double()), forces

    def virials(self, system: ops.System) -> Tensor:
        """The derivatives of the energies by strains, [n_structures, 3, 3] in eV, float64."""
        with torch.inference_mode():
            weights = torch.ones(len(system.species), 1, dtype=torch.float64, device=system.species.device)
            return ops.aev_virials(system, weights, self.alone())

    def with_elements(self, elements: Sequence[str]) -> Repulsion:
        """The same with further elements behind those that it has."""
        of_all = Repulsion.zbl(elements, self.inner, self.outer)
        n = len(self.charges)
        return replace(of_all, charges=self.charges + of_all.charges[n:], radii=self.radii + of_all.radii[n:])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for YAML, JSON and checkpoints."""
        return {
            "kind": "zbl",
            "charges": list(self.charges),
            "radii": list(self.radii),
            "inner": self.inner,
            "outer": self.outer,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Repulsion:
        kind = values.get("kind")
        if kind != "zbl":
            raise ConfigError(f"The model has a repulsion of the kind {kind!r}; this program knows zbl.")
        return cls(*(values[name] for name in ("charges", "radii", "inner", "outer")))
