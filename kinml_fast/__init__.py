"""Fast training and running of ANI-type neural network potentials.

Atomic environment vectors (AEV) of the atoms of a molecule go through one small network per element; the sum of the
networks' outputs is the molecule's energy, its derivative the forces. Units: eV, Å, eV/Å.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kinml_fast._version import __version__
from kinml_fast.errors import ConfigError, DataError, DeviceError, InputError, ModelError

if TYPE_CHECKING:
    from kinml_fast.deploy.calculator import KinMLCalculator

__all__ = [
    "ConfigError",
    "DataError",
    "DeviceError",
    "InputError",
    "KinMLCalculator",
    "ModelError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import the calculator, and torch and ASE with it, when it is asked for."""
    if name == "KinMLCalculator":
        from kinml_fast.deploy.calculator import KinMLCalculator

        return KinMLCalculator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
