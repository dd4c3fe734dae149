"""D3(BJ) beside a model, by the package dftd3."""

from __future__ import annotations

from ase.calculators.calculator import BaseCalculator

from kinml_fast.errors import ConfigError, ModelError
from kinml_fast.nn import EnergyModel, Ensemble
from kinml_fast.nn.dispersion import Dispersion


def make(dispersion: Dispersion | None) -> BaseCalculator | None:
    """The calculator that computes it; None of None.

    Raises
    ------
    InputError
        dftd3 is not installed, or does not know the method.
    """
    if dispersion is None:
        return None
    try:
        from dftd3.ase import DFTD3
        from dftd3.interface import RationalDampingParam
    except ImportError as error:
        raise ConfigError(
            f"the model's energies go with {dispersion}, which needs the package dftd3 ({error}): pip install dftd3"
        ) from error
    parameters = {"method": dispersion.method} if dispersion.method else dict(dispersion.parameters)
    try:
        RationalDampingParam(**parameters)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{dispersion}: dftd3 has no such parameters ({error}): name another method, or give s8, a1 and a2"
        ) from error
    return DFTD3(damping="d3bj", params_tweaks=parameters)


def check_without(model: EnergyModel | Ensemble, what: str, how: str) -> None:
    """Refuse a model whose dispersion would be left out.

    Parameters
    ----------
    model
        Any.
    what
        What cannot have it.
    how
        What to do there, one clause.
    """
    if model.dispersion is not None:
        raise ModelError(
            f"the model's energies go with {model.dispersion}, which {what} not have: take the model without it "
            f"(model.dispersion = None in Python), and {how}"
        )
