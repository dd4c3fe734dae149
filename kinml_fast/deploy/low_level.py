"""The low level that a delta model corrects: any ASE calculator."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ase.calculators.calculator import BaseCalculator

from kinml_fast.errors import ConfigError
from kinml_fast.nn import EnergyModel, Ensemble

_TBLITE = "tblite:"
_WAYS = "an ASE calculator, tblite:METHOD (such as tblite:GFN1-xTB), or the model file of the low level"


def make(name: str | os.PathLike, of_file: Callable[..., BaseCalculator], **options: Any) -> BaseCalculator:
    """The calculator that a text stands for.

    Parameters
    ----------
    name
        "tblite:METHOD" for an xTB method of the package tblite, or a model file or run folder of kinml_fast.
    of_file
        Makes a calculator of a model file or run folder: `KinMLCalculator`, which stands above this module.
    options
        Further keyword arguments of the calculator.

    Raises
    ------
    InputError
        tblite is not installed or does not know the method, or there is no such model.
    """
    text = os.fspath(name)
    if not text.startswith(_TBLITE):
        if not Path(text).exists():
            raise ConfigError(f"{text}: is neither a file nor of the form tblite:METHOD: give {_WAYS}")
        return of_file(text, **options)
    method = text.removeprefix(_TBLITE)
    try:
        from tblite.ase import TBLite
    except ImportError as error:
        raise ConfigError(f"{text}: needs the package tblite ({error}): pip install tblite") from error
    known = ("GFN1-xTB", "GFN2-xTB", "IPEA1-xTB")
    if method not in known:
        raise ConfigError(f"{text}: tblite knows {', '.join(known)}: name one of them")
    return TBLite(**{"verbosity": 0, **options, "method": method})


def checked(
    model: EnergyModel | Ensemble,
    base: BaseCalculator | str | os.PathLike | None,
    of_file: Callable[[str], BaseCalculator],
) -> BaseCalculator | None:
    """The base of a model as a calculator; `of_file` is that of `make`.

    Raises
    ------
    InputError
        A delta model without a base, another model with one, or a base that is no calculator.
    """
    if model.baseline is None:
        if base is not None:
            raise ConfigError(
                "the model gives whole energies, no differences to a low level: leave out base, which is for models "
                "that were trained with data.baseline"
            )
        return None
    if base is None:
        raise ConfigError(
            f"the model gives differences of fidelity {model.fidelities[-1]} to fidelity {model.baseline}: give base, "
            f"which computes fidelity {model.baseline}: {_WAYS}"
        )
    if isinstance(base, str | os.PathLike):
        return make(base, of_file)
    if not hasattr(base, "get_property"):
        raise ConfigError(f"base is {type(base).__name__}, not a calculator: give {_WAYS}")
    return base
