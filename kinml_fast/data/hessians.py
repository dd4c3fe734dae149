"""Second derivatives of energies that are trained on: of a few molecules, from databases and files."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms

from kinml_fast.data import sources, sqlite, xyz
from kinml_fast.data.files import expand, is_sqlite, replacing
from kinml_fast.errors import DataError, first_line

KEY = "hessian"
_ASYMMETRY = 1e-3


@dataclass(frozen=True, eq=False)
class MoleculeHessian:
    """That of one molecule of n atoms.

    Attributes
    ----------
    label
        What messages call it.
    symbols
        Of its atoms.
    positions
        [n, 3], Å.
    values
        [3n, 3n], eV/Å², symmetric: d²E/dx dx', x, y, z of atom after atom.
    """

    label: str
    symbols: tuple[str, ...]
    positions: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        size = 3 * len(self.symbols)
        found = np.asarray(self.values, dtype=np.float64)
        if found.size != size * size:
            raise DataError(
                f"{self.label}: its Hessian has {found.size} numbers, {len(self.symbols)} atoms have {size * size}"
            )
        found = found.reshape(size, size)
        if not np.isfinite(found).all() or not np.isfinite(self.positions).all():
            raise DataError(f"{self.label}: a number of its Hessian or geometry is NaN or infinite: leave it out")
        largest = float(np.abs(found).max())
        if np.abs(found - found.T).max() > _ASYMMETRY * largest:
            raise DataError(
                f"{self.label}: its Hessian is not symmetric: give second derivatives d²E/dx dx' in eV/Å², all rows"
            )
        object.__setattr__(self, "values", (found + found.T) / 2)


def read(files: str | os.PathLike | Sequence[str | os.PathLike], fidelity: int = 1) -> list[MoleculeHessian]:
    """The Hessians of files.

    Parameters
    ----------
    files
        Databases of PyKinML, whose column Hessian holds arrays [3n, 3n] (written by numpy.save) in rows of this
        fidelity; files that ASE reads, whose frames have ``hessian`` in their comment line (`Atoms.info`), all of
        these in eV/Å². Paths, patterns, `shipped:NAME`.
    fidelity
        Of databases.

    Raises
    ------
    InputError
        A file that cannot be read or has none, or one of the wrong shape, that is not symmetric or not finite.
    """
    found: list[MoleculeHessian] = []
    for path in expand(files):
        of_file = list(_of_database(path, fidelity) if _is_database(path) else _of_frames(path))
        if not of_file:
            what = f"rows of fidelity {fidelity} with a Hessian" if _is_database(path) else f"frames with {KEY}="
            raise DataError(f"{path}: contains no {what}: leave it out of training.loss.hessians, or add them")
        found += of_file
    return found


def write(path: Path, hessians: Sequence[MoleculeHessian]) -> None:
    """Write an extended XYZ file that `read` reads, to the last digit."""
    frames = []
    for one in hessians:
        frame = Atoms(one.symbols, one.positions)
        frame.info = {KEY: one.values, "label": one.label}
        frames.append(frame)
    with replacing(path) as temporary:
        ase.io.write(temporary, frames, format="extxyz")


def _is_database(path: Path) -> bool:
    """Whether it is one of PyKinML's."""
    return is_sqlite(path) and not sources.is_ase_database(path)


def _of_frames(path: Path) -> Iterator[MoleculeHessian]:
    for number, frame in enumerate(xyz.frames(path), start=1):
        if KEY in frame.info:
            label = str(frame.info.get("label", f"{path}: frame {number}"))
            try:
                values = np.asarray(frame.info[KEY], dtype=np.float64)
            except (TypeError, ValueError):
                raise DataError(f"{path}: frame {number}: {KEY} is no list of numbers: write 9 n² of them") from None
            yield MoleculeHessian(label, tuple(frame.get_chemical_symbols()), frame.positions, values)


def _of_database(path: Path, fidelity: int) -> Iterator[MoleculeHessian]:
    symbols = sqlite.formula_symbols(path.stem, str(path))
    for number, geometry, values in sqlite.hessians(path, fidelity):
        label = f"{path.stem}/{number}"
        positions, hessian = (
            _array(f"{path}: xyz id {number}: its {what}", blob)
            for what, blob in (("geom", geometry), ("Hessian", values))
        )
        if positions.shape != (len(symbols), 3):
            raise DataError(f"{path}: xyz id {number}: its geometry does not fit the formula of the file name")
        yield MoleculeHessian(label, symbols, positions, hessian)


def _array(what: str, blob: object) -> np.ndarray:
    try:
        if not isinstance(blob, bytes):
            raise ValueError("it is no blob")
        found = np.load(io.BytesIO(blob), allow_pickle=False)
        return np.asarray(found, dtype=np.float64)
    except Exception as error:  # a damaged header raises whatever its parser runs into
        raise DataError(f"{what} is no array of numbers ({first_line(error)}): write it with numpy.save") from error
