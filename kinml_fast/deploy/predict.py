"""Energies and forces for a file of molecules."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from kinml_fast.data import xyz
from kinml_fast.data.files import expand, replacing
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import model_file
from kinml_fast.deploy.evaluate import BATCH_SIZE, evaluate
from kinml_fast.errors import InputError

log = logging.getLogger(__name__)


def predict(
    model_path: str | os.PathLike,
    in_path: str | os.PathLike,
    out_path: str | os.PathLike,
    batch_size: int = BATCH_SIZE,
) -> int:
    """Write the molecules of a file as extended XYZ with the model's energy (eV) and forces (eV/Å).

    Energies and forces that the file has under these names are replaced; whatever else ASE has read stays.

    Parameters
    ----------
    model_path
        A model file.
    in_path
        A file that ASE reads.
    out_path
        The file to write, as a whole or not at all; one that is there is replaced.
    batch_size
        Structures at a time.

    Returns
    -------
    int
        Number of molecules.

    Raises
    ------
    InputError
        A file that cannot be read or written, a frame that is periodic or has atoms in one place, an element that the
        model does not know.
    """
    model = model_file.load(model_path)
    path, *others = expand(in_path)
    if others:
        raise InputError(f"{in_path}: matches several files, among them {others[0]}: name one at a time")
    structures = xyz.read(path, labelled=False)
    _check_elements(path, structures, model.elements, model_path)
    predictions = evaluate(model, structures, batch_size, forces=True)
    with replacing(out_path) as temporary:
        frames = list(_frames(path, structures, predictions.energies, predictions.forces))
        ase.io.write(temporary, frames, format="extxyz")
    log.info("wrote energies and forces of %d molecules to %s", len(structures), out_path)
    return len(structures)


def _frames(path: Path, structures: Structures, energies: np.ndarray, forces: np.ndarray) -> Iterator[Atoms]:
    frames = ase.io.iread(path, index=":", do_not_split_by_at_sign=True)
    for i, frame in enumerate(frames):
        own = forces[structures.offsets[i] : structures.offsets[i + 1]]
        frame.calc = SinglePointCalculator(frame, energy=float(energies[i]), forces=own)
        yield frame


def _check_elements(
    path: Path, structures: Structures, elements: tuple[str, ...], model_path: str | os.PathLike
) -> None:
    unknown = [number for number, element in enumerate(structures.elements) if element not in elements]
    atoms = np.flatnonzero(np.isin(structures.species, unknown))
    if atoms.size:
        raise InputError(
            f"{path}: frame {structures.owners[atoms[0]] + 1} contains "
            f"{structures.elements[structures.species[atoms[0]]]}, but {model_path} knows only {' '.join(elements)}: "
            "leave the frame out or train a model with this element"
        )
