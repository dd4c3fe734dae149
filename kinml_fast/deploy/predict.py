"""Energies and forces for a file of molecules."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, CalculatorError
from ase.calculators.singlepoint import SinglePointCalculator

from kinml_fast.data import xyz
from kinml_fast.data.files import expand, replacing
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import dispersion, low_level, model_file
from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.deploy.evaluate import BATCH_SIZE, Predictions, evaluate
from kinml_fast.errors import ConfigError, DataError, InputError

log = logging.getLogger(__name__)


def predict(
    model_path: str | os.PathLike | Sequence[str | os.PathLike],
    in_path: str | os.PathLike,
    out_path: str | os.PathLike,
    batch_size: int = BATCH_SIZE,
    base: BaseCalculator | str | None = None,
    device: str | None = None,
) -> int:
    """Write the molecules of a file as extended XYZ with the model's energy (eV) and forces (eV/Å).

    Energies and forces are those of the highest level of theory; those of a lower level are `energy_fidelity0` and
    `forces_fidelity0`. Of an ensemble they are the means, and `energy_std` and `forces_std` are the standard deviations
    of its members (ddof = 1). What the file has under these names is replaced; whatever else ASE has read stays.

    Parameters
    ----------
    model_path
        What `model_file.resolve` takes: a model file, a run folder, a pattern, or several, which make an ensemble.
    in_path
        A file that ASE reads.
    out_path
        The file to write, as a whole or not at all; one that is there is replaced.
    batch_size
        Structures at a time.
    base
        The low level of a model of differences, whose energies and forces are added: a calculator, or what
        `low_level.make` takes.
    device
        Where to compute, see `model_file.resolve`; the base computes where it is.

    Returns
    -------
    int
        Number of molecules.

    Raises
    ------
    InputError
        A file that cannot be read or written, a frame that is periodic or has atoms in one place, an element that the
        model does not know, a model of differences without a base, a frame for which the base fails, or a device that
        cannot be used.
    """
    model = model_file.resolve(model_path, device)
    added = {
        "base": low_level.checked(model, base, KinMLCalculator),
        "dispersion": dispersion.make(model.dispersion),
    }
    path, *others = expand(in_path)
    if others:
        raise ConfigError(f"{in_path}: matches several files, among them {others[0]}: name one at a time")
    structures = xyz.read(path, labelled=False)
    _check_elements(path, structures, model.elements, model_file.name(model_path))
    predictions = evaluate(model, structures, batch_size, forces=True)
    with replacing(out_path) as temporary:
        frames = list(_frames(path, structures, predictions, model.fidelities, added))
        ase.io.write(temporary, frames, format="extxyz")
    log.info("wrote energies and forces of %d molecules to %s", len(structures), out_path)
    return len(structures)


def _frames(
    path: Path,
    structures: Structures,
    predictions: Predictions,
    fidelities: Sequence[int],
    added: Mapping[str, BaseCalculator | None],
) -> Iterator[Atoms]:
    levels = len(fidelities)
    assert predictions.forces is not None
    energies, forces = predictions.energies.reshape(levels, -1), predictions.forces.reshape(levels, -1, 3)
    frames = ase.io.iread(path, index=":", do_not_split_by_at_sign=True)
    for i, frame in enumerate(frames):
        atoms = slice(structures.offsets[i], structures.offsets[i + 1])
        energy, of_frame = float(energies[-1, i]), forces[-1, atoms]
        for name, other in added.items():
            if other is not None:
                further_energy, further_forces = _further(f"{path}: frame {i + 1}: the {name}", frame, other)
                energy, of_frame = energy + further_energy, of_frame + further_forces
        if predictions.energy_std is not None and predictions.forces_std is not None:
            frame.info["energy_std"] = float(predictions.energy_std.reshape(levels, -1)[-1, i])
            frame.arrays["forces_std"] = predictions.forces_std.reshape(levels, -1, 3)[-1, atoms]
        for level, fidelity in enumerate(fidelities[:-1]):
            frame.info[f"energy_fidelity{fidelity}"] = float(energies[level, i])
            frame.arrays[f"forces_fidelity{fidelity}"] = forces[level, atoms]
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=of_frame)
        yield frame


def _further(what: str, frame: Atoms, other: BaseCalculator) -> tuple[float, np.ndarray]:
    try:
        forces = other.get_property("forces", frame)
        return other.get_property("energy", frame), forces
    except (InputError, CalculatorError) as error:
        raise DataError(f"{what} cannot compute it ({error}): leave the frame out") from error


def _check_elements(path: Path, structures: Structures, elements: tuple[str, ...], model: str) -> None:
    unknown = [number for number, element in enumerate(structures.elements) if element not in elements]
    atoms = np.flatnonzero(np.isin(structures.species, unknown))
    if atoms.size:
        raise DataError(
            f"{path}: frame {structures.owners[atoms[0]] + 1} contains "
            f"{structures.elements[structures.species[atoms[0]]]}, but {model} knows only {' '.join(elements)}: "
            "leave the frame out or train a model with this element"
        )
