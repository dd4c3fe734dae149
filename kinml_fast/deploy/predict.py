"""Energies, forces and stresses for a file of molecules and crystals."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, CalculatorError, all_properties
from ase.calculators.singlepoint import SinglePointCalculator

from kinml_fast.data import Selection, xyz
from kinml_fast.data.files import check_output, expand_one, replacing
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import dispersion, low_level, model_file
from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.deploy.evaluate import BATCH_SIZE, Predictions, evaluate
from kinml_fast.errors import ConfigError, DataError, InputError

log = logging.getLogger(__name__)

_FORMS = {"extxyz": (".xyz", ".extxyz", ".xyz.gz", ".extxyz.gz"), "traj": (".traj",)}
"""What can be written, and the suffixes that say so."""
_REPLACED = ("energy", "free_energy", "forces", "stress", "energies", "stresses")
"""What a frame has of another calculation and gets anew, or what would not fit it."""
_VOIGT = ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])
"""Rows and columns of xx yy zz yz xz xy."""


def predict(
    model_path: str | os.PathLike | Sequence[str | os.PathLike],
    in_path: str | os.PathLike,
    out_path: str | os.PathLike,
    batch_size: int = BATCH_SIZE,
    base: BaseCalculator | str | None = None,
    device: str | None = None,
    form: str | None = None,
) -> int:
    """Write the structures of a file, as extended XYZ or ASE's trajectory, with the model's energy, forces and stress.

    In eV, eV/Å and eV/Å³. A stress, in ASE's sign, have crystals whose cell has a volume. All are those of the highest
    level of theory; those of a lower level are `energy_fidelity0`, `forces_fidelity0` and `stress_fidelity0` (xx yy zz
    yz xz xy). Of an ensemble they are the means, and `energy_std`, `forces_std` and `stress_std` are the standard
    deviations of its members (ddof = 1). What the file has under these names is replaced; whatever else ASE has read
    stays, dipoles and charges too.

    Parameters
    ----------
    model_path
        What `model_file.resolve` takes: a model file, a run folder, a pattern, or several, which make an ensemble.
    in_path
        A file that ASE reads.
    out_path
        The file to write, as a whole or not at all; one that is there is replaced. The suffix says what it is.
    batch_size
        Structures at a time.
    base
        The low level of a model of differences, whose energies, forces and, if it has any, stresses are added: a
        calculator, or what `low_level.make` takes.
    device
        Where to compute, see `model_file.resolve`; the base computes where it is.
    form
        Format of the file that is read, by ASE's name; None: what its suffix says, or its contents.

    Returns
    -------
    int
        Number of structures.

    Raises
    ------
    InputError
        A file that cannot be read or written, a frame whose cell has no volume or is left-handed, or that has atoms in
        one place, an element that the model does not know, a model of differences without a base, a frame for which the
        base fails, or a device that cannot be used.
    """
    model = model_file.resolve(model_path, device)
    added = {
        "base": low_level.checked(model, base, KinMLCalculator),
        "dispersion": dispersion.make(model.dispersion),
    }
    path = expand_one(in_path)
    written_as = _form(Path(out_path))
    check_output(out_path, [path, *model_file.files(model_path)])
    structures = xyz.read(path, Selection(format=form), labelled=False)
    _check_elements(path, structures, model.elements, model_file.name(model_path))
    predictions = evaluate(model, structures, batch_size, forces=True, stresses=True)
    with replacing(out_path) as temporary, tempfile.TemporaryDirectory(dir=Path(out_path).parent) as folder:
        frames = list(_frames(path, xyz.frames(path, form), structures, predictions, model.fidelities, added))
        written = Path(folder) / Path(out_path).name  # whose suffix says how it is compressed
        ase.io.write(written, frames, format=written_as)
        written.replace(temporary)
    what = "molecules" if predictions.stresses is None else "structures, and stresses of crystals,"
    log.info("wrote energies and forces of %d %s to %s", len(structures), what, out_path)
    return len(structures)


def _form(path: Path) -> str:
    """The format of a file to write, by its suffix."""
    name = path.name.lower()
    for form, suffixes in _FORMS.items():
        if name.endswith(suffixes):
            return form
    known = ", ".join(suffix for suffixes in _FORMS.values() for suffix in suffixes)
    raise ConfigError(f"{path}: the suffix names no format for structures with energies: take one of {known}")


def _frames(
    path: Path,
    read: Iterator[Atoms],
    structures: Structures,
    predictions: Predictions,
    fidelities: Sequence[int],
    added: Mapping[str, BaseCalculator | None],
) -> Iterator[Atoms]:
    levels = len(fidelities)
    assert predictions.forces is not None
    energies, forces = predictions.energies.reshape(levels, -1), predictions.forces.reshape(levels, -1, 3)
    stresses, stresses_std = (
        None if x is None else x.reshape(levels, -1, 3, 3)[..., _VOIGT[0], _VOIGT[1]]
        for x in (predictions.stresses, predictions.stresses_std)
    )
    for i, frame in enumerate(read):
        atoms = slice(structures.offsets[i], structures.offsets[i + 1])
        energy, of_frame = float(energies[-1, i]), forces[-1, atoms]
        has_stress = stresses is not None and not np.isnan(stresses[-1, i]).any()
        results = {"stress": stresses[-1, i]} if stresses is not None and has_stress else {}
        for name, other in added.items():
            if other is None:
                continue
            where = f"{path}: frame {i + 1}: the {name}"
            further_energy, further_forces, further_stress = _further(where, frame, other, bool(results))
            energy, of_frame = energy + further_energy, of_frame + further_forces
            results = {} if further_stress is None else {"stress": results["stress"] + further_stress}
        if predictions.energy_std is not None and predictions.forces_std is not None:
            frame.info["energy_std"] = float(predictions.energy_std.reshape(levels, -1)[-1, i])
            frame.arrays["forces_std"] = predictions.forces_std.reshape(levels, -1, 3)[-1, atoms]
            if stresses_std is not None and has_stress:
                frame.info["stress_std"] = stresses_std[-1, i]
        for level, fidelity in enumerate(fidelities[:-1]):
            frame.info[f"energy_fidelity{fidelity}"] = float(energies[level, i])
            frame.arrays[f"forces_fidelity{fidelity}"] = forces[level, atoms]
            if stresses is not None and has_stress:
                frame.info[f"stress_fidelity{fidelity}"] = stresses[level, i]
        before = frame.calc.results if frame.calc is not None else {}
        for key in _REPLACED:
            frame.info.pop(key, None)
            frame.arrays.pop(key, None)
        kept = {key: value for key, value in before.items() if key in all_properties and key not in _REPLACED}
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=of_frame, **kept, **results)
        yield frame


def _further(
    what: str, frame: Atoms, other: BaseCalculator, stress: bool
) -> tuple[float, np.ndarray, np.ndarray | None]:
    """Energy, forces and stress [6] of another calculator; None without a stress, or of one that gives none."""
    try:
        has_stress = stress and "stress" in other.implemented_properties
        energy, forces = other.get_property("energy", frame), other.get_property("forces", frame)
        return energy, forces, other.get_property("stress", frame) if has_stress else None
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
