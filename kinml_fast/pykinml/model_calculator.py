"""PyKinML's ASE calculator: energies and forces of trained models, and of several at once with their spread."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import all_changes

from kinml_fast.deploy import model_file, pykinml_checkpoint
from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.nn import EnergyModel, Ensemble
from kinml_fast.pykinml import state
from kinml_fast.pykinml.arguments import device_of, note, show_log
from kinml_fast.train import continued


class Nn_surr(KinMLCalculator):
    """Energies (eV) and forces (eV/Å) of molecules by models that PyKinML, its adapter or a native run has trained.

    Parameters
    ----------
    fname
        A checkpoint, model.pt, or a list of several, of one architecture.
    restart, ignore_bad_restart_file, label
        Not needed.
    atoms
        What the calculator is for.
    tnsr
        Whether `results` holds tensors, or numpy arrays.
    device
        Where to compute, see `arguments.device_of`.
    nrho_rad, nrho_ang, nalpha, R_c, present_elements, beta
        Settings of the descriptor, for checkpoints of PyKinML; other files say them themselves.
    mf
        Not needed: a file says whether its model is of two levels of theory, and then the results are of the higher.
    base, threads
        See `KinMLCalculator`. Without a base, a model of differences gives differences.

    Notes
    -----
    `results` has energy and forces [n, 3], energy_std and forces_std, which are 0 for one model and standard deviations
    (ddof = 1; forces_std [n, 3]) for several, and then also all_energies [M] and all_forces [M, n, 3].
    """

    def __init__(
        self,
        fname: str | os.PathLike | Sequence[str | os.PathLike],
        restart: Any = None,
        ignore_bad_restart_file: bool = False,
        label: str = "surrogate",
        atoms: Atoms | None = None,
        tnsr: bool = True,
        device: Any = "cpu",
        nrho_rad: int = 16,
        nrho_ang: int = 8,
        nalpha: int = 8,
        R_c: Sequence[float] = (5.2, 3.8),
        mf: bool = False,
        present_elements: Sequence[str] = ("C", "H"),
        beta: float = 0.95,
        base: Any = None,
        threads: int | None = None,
    ) -> None:
        show_log()
        place = str(device_of(device))
        names = [fname] if isinstance(fname, str | os.PathLike) else list(fname)
        settings = (tuple(present_elements), nrho_rad, nrho_ang, nalpha, tuple(R_c), beta)
        models = [_model(name, settings) for name in names]
        if base is None and any(model.baseline is not None for model in models):
            note(
                "the model is of differences of two levels of theory, and so are its results: base=CALCULATOR adds them"
            )
            for model in models:
                model.baseline = None
        if isinstance(base, Nn_surr):
            base = KinMLCalculator(base.model, base=base.base)  # whose results are arrays
        super().__init__(models if len(models) > 1 else models[0], base=base, threads=threads, device=place)
        self.tnsr, self.device, self.label = tnsr, device, label
        if atoms is not None:
            atoms.calc = self

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy", "forces"),
        system_changes: Sequence[str] = tuple(all_changes),
        args: Any = None,
    ) -> None:
        """Fill `results`."""
        super().calculate(atoms, properties, system_changes)
        found = {"energy_std": 0.0, "forces_std": 0.0} | dict(self.results.items())
        arrays = {name: np.asarray(value, dtype=np.float64) for name, value in found.items()}
        self.results = {n: torch.from_numpy(v) for n, v in arrays.items()} if self.tnsr else arrays


def _model(name: str | os.PathLike, settings: tuple) -> EnergyModel | Ensemble:
    kind = state.kind(name)
    if kind is None:
        return pykinml_checkpoint.load(name, *settings)[0]
    return model_file.load(name) if kind == model_file.FORMAT else continued.load(Path(name)).model
