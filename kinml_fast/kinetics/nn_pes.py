"""KinBot's calculator of neural networks (``qc: nn_pes``) for models of kinml_fast.

In KinBot (2.4.1) the place of this file is kinbot/ase_modules/calculators/nn_pes.py, for one that imports a package
which was never published. It imports nothing of kinml_fast that is not public. Scripts that KinBot writes from its
templates (``ase_sella_*.tpl.py``) import `Nn_surr` and call it with ``fname``, the files of the input's ``nn_model``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

from ase.calculators.calculator import BaseCalculator
from ase.vibrations import Vibrations

from kinml_fast.deploy import low_level, model_file
from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.errors import ConfigError, InputError
from kinml_fast.nn import EnergyModel, Ensemble

log = logging.getLogger(__name__)


def Nn_surr(fname: str | Sequence[str], charge: int = 0, mult: int | None = None, **_: Any) -> BaseCalculator:
    """The calculator of a model or of several, which make an ensemble.

    Parameters
    ----------
    fname
        A model file or run folder, or a list of these; or "tblite:METHOD", by which the same search is made with an
        xTB method.
    charge, mult
        Charge and multiplicity, which an xTB method needs.

    Returns
    -------
    BaseCalculator
        With energy and forces; frequencies that `kinbot.frequencies` calculates with it are from analytic second
        derivatives instead of differences of 6N forces.

    Raises
    ------
    InputError
        A model that cannot be read, or none.
    """
    files = [fname] if isinstance(fname, str | os.PathLike) else list(fname)
    if not files:
        raise ConfigError("nn_model names no model: give the file of one, or of each member of an ensemble")
    from kinbot import frequencies

    frequencies.Vibrations = _AnalyticVibrations  # what KinBot's calc_vibrations makes and asks for the Hessian
    if str(files[0]).startswith("tblite:"):
        if len(files) > 1:
            raise ConfigError(f"nn_model names {files[0]} and more: it stands alone")
        calculator = low_level.make(files[0], _Calculator)
        calculator.parameters.update(charge=charge, multiplicity=mult)  # KinBot takes no None for the charge
        return calculator
    return _Calculator(_model(*((os.path.abspath(file), _changed(file)) for file in files)))


class _Calculator(KinMLCalculator):
    """Says what is wrong with a structure: KinBot's scripts catch all errors and keep none."""

    def calculate(self, *arguments: Any, **options: Any) -> None:
        try:
            super().calculate(*arguments, **options)
        except InputError as error:
            log.error("%s", error)
            raise


class _AnalyticVibrations(Vibrations):
    """ASE's, which displaces no atoms where the calculator has the Hessian."""

    def run(self) -> None:
        if not hasattr(self.calc, "get_hessian"):
            super().run()

    def read(self, method: str = "standard", direction: str = "central") -> None:
        if not hasattr(self.calc, "get_hessian"):
            super().read(method, direction)
            return
        self.method, self.direction = method.lower(), direction.lower()
        self.H = self.calc.get_hessian(self.atoms)
        self._vibrations = self.get_vibrations(method, direction, read_cache=False)


def _changed(file: str) -> int:
    """When a file was written, ns; 0 of what is none, which reading says."""
    return os.stat(file).st_mtime_ns if os.path.exists(file) else 0


@functools.lru_cache(maxsize=1)
def _model(*files: tuple[str, int]) -> EnergyModel | Ensemble:
    """A process that runs many scripts reads the files once."""
    return model_file.resolve([file for file, _ in files])
