"""The dispersion that is added to a model's energies: a choice that the model's file keeps, computed elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kinml_fast.errors import ConfigError

_NEEDED, _KNOWN = ("s8", "a1", "a2"), ("s6", "s8", "s9", "a1", "a2")


@dataclass(frozen=True)
class Dispersion:
    """D3 with damping by Becke and Johnson, for models of a functional that lacks dispersion.

    Source: Grimme, Antony, Ehrlich, Krieg, J. Chem. Phys. 2010, 132, 154104 (DOI 10.1063/1.3382344); Grimme, Ehrlich,
    Goerigk, J. Comput. Chem. 2011, 32, 1456 (DOI 10.1002/jcc.21759).

    Attributes
    ----------
    method
        The functional, as the package dftd3 calls it, such as pbe; None: there are parameters.
    parameters
        Of the damping: s8, a1, a2 (in bohr), and if they are not 1 s6, s9.
    """

    method: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.method is None) == (not self.parameters):
            raise ConfigError("A dispersion is of one method or has parameters (s8, a1, a2), one of both.")
        unknown = sorted(set(self.parameters) - set(_KNOWN))
        if unknown or (self.parameters and not set(_NEEDED) <= set(self.parameters)):
            raise ConfigError(
                f"The parameters of D3(BJ) are {', '.join(_NEEDED)}, and if not 1 s6, s9; not "
                f"{', '.join(sorted(self.parameters))}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML, JSON and checkpoints."""
        return {"kind": "d3bj", "method": self.method, "parameters": dict(self.parameters)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Dispersion:
        if values.get("kind") != "d3bj":
            raise ConfigError(f"The model's dispersion is {values.get('kind')!r}; this program knows d3bj.")
        return cls(values["method"], values["parameters"])

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value:g}" for name, value in self.parameters.items())
        return f"D3(BJ) of {self.method}" if self.method else f"D3(BJ) with {values}"
