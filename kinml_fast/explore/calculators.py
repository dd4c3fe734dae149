"""The calculators that label: any of ASE's, by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ase.calculators.calculator import BaseCalculator, get_calculator_class

from kinml_fast.errors import ConfigError, first_line

_WAYS = (
    "tblite:METHOD, pyscf:METHOD/BASIS, ASE's name of a calculator (orca, gaussian, psi4 …), module:Class or a model "
    "file"
)


def make(name: str, options: Mapping[str, Any]) -> BaseCalculator:
    """The calculator that a name stands for.

    Parameters
    ----------
    name
        tblite:METHOD; pyscf:METHOD/BASIS, see `pyscf.PySCF`; the name of one of ASE's calculators; module:Class; a
        model file (.pt) or run folder.
    options
        Keyword arguments of it.

    Raises
    ------
    ConfigError
        There is no such calculator, or it refuses the options.
    """
    try:
        # A folder of an exploration may well be called orca.
        if name.startswith("tblite:") or Path(name).suffix == ".pt" or (Path(name) / "model.pt").exists():
            from kinml_fast.deploy import low_level
            from kinml_fast.deploy.calculator import KinMLCalculator

            return low_level.make(name, KinMLCalculator, **options)
        if name.startswith("pyscf:"):
            from kinml_fast.explore.pyscf import PySCF

            return PySCF(name.removeprefix("pyscf:"), **options)
        module, colon, kind = name.partition(":")
        if colon:
            return getattr(importlib.import_module(module), kind)(**options)
        return get_calculator_class(name)(**options)
    except ConfigError:
        raise
    except Exception as error:  # whatever a package runs into when it is imported or set up
        raise ConfigError(
            f"the calculator {name} cannot be made ({type(error).__name__}: {first_line(error)}): give {_WAYS}, and "
            "options that it knows"
        ) from error
