"""Descriptor, networks and model as torch modules, scriptable and exportable."""

from kinml_fast.nn.aev import AEV, AEVParameters
from kinml_fast.nn.calibration import Calibration
from kinml_fast.nn.dispersion import Dispersion
from kinml_fast.nn.ensemble import Ensemble
from kinml_fast.nn.extension import extended
from kinml_fast.nn.networks import ACTIVATIONS, SpeciesNetworks
from kinml_fast.nn.potential import EnergyModel
from kinml_fast.nn.repulsion import Repulsion

__all__ = [
    "ACTIVATIONS",
    "AEV",
    "AEVParameters",
    "Calibration",
    "Dispersion",
    "EnergyModel",
    "Ensemble",
    "Repulsion",
    "SpeciesNetworks",
    "extended",
]
