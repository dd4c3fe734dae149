"""The plain model file: a model for programs without Python and torch, see csrc/md/plain_model.h.

It is a safetensors file, which any reader of that format opens: the weights, and texts that say what they are.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kinml_fast._version import __version__
from kinml_fast.data.files import replacing
from kinml_fast.deploy import lammps, model_file
from kinml_fast.errors import DataError, ModelError
from kinml_fast.nn import EnergyModel, Ensemble

FORMAT = "kinml_fast.plain"
_ALIGNMENT = 64
_TYPES = {torch.float64: "F64", torch.float32: "F32"}


def save(
    path: str | os.PathLike,
    model: EnergyModel | Ensemble,
    training: dict[str, Any] | None = None,
    grade: torch.Tensor | None = None,
) -> None:
    """Write a model, as a whole or not at all.

    Parameters
    ----------
    path
        The file to write; one that is there is replaced.
    model
        Of an ensemble all members are in the file.
    training
        What is known about the model's origin; tensors are left out.
    grade
        [n_species, D, D] float64 from `grade.fit`, for extrapolation grades of atoms; None: without.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    members, levels = (model.n_members if isinstance(model, Ensemble) else 1), model.levels
    tensors = {
        "weights": model.networks.weights.detach().reshape(members, -1),
        "sae": model.sae.detach().reshape(members, levels, -1),
    }
    if grade is not None:
        tensors["grade"] = grade.detach()
    about = model.to_dict()
    about |= {"elements": list(model.elements), "layers": model.networks.layers}
    blobs = {name: value.cpu().contiguous().numpy().tobytes() for name, value in tensors.items()}
    crc, place, entries = 0, 0, {}
    for name, blob in blobs.items():
        entries[name] = {
            "dtype": _TYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [place, place + len(blob)],
        }
        crc, place = zlib.crc32(blob, crc), place + len(blob)
    texts = {
        "format": FORMAT,
        "format_version": str(model_file.version_for(model)),
        "crc32": f"{crc:08x}",
        "model": json.dumps(about),
        "single_atom_energies": json.dumps(model.sae.tolist()),
        "units": json.dumps(model_file.UNITS, ensure_ascii=False),
        "training": json.dumps(readable(training or {}), ensure_ascii=False),
        "version": json.dumps(__version__),
    }
    header = json.dumps({"__metadata__": texts, **entries}).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for blob in blobs.values():
            file.write(blob)


def read_texts(path: str | os.PathLike) -> dict[str, str] | None:
    """The texts of a plain file's header; None: it is none. OSError if it cannot be read."""
    with open(path, "rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            texts = json.loads(file.read(min(length, os.path.getsize(path))))["__metadata__"]
            return texts if texts["format"] == FORMAT else None
        except (struct.error, ValueError, KeyError, TypeError, RecursionError):
            return None


def readable(value: Any) -> Any:
    """Plain values as JSON has them; what it cannot say is named by its type."""
    if isinstance(value, dict):
        return {str(key): readable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [readable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return f"({type(value).__name__})"


class PlainPotential:
    """A plain model file as C programs see it: csrc/md/kinml.h by way of ctypes, without torch.

    Parameters
    ----------
    path
        The file.
    dtype
        float64 or float32, the arithmetic; default: as the model was trained.

    Raises
    ------
    InputError
        The file is missing, damaged, or none of this program's.
    """

    def __init__(self, path: str | os.PathLike, dtype: str | None = None) -> None:
        self._library = _library()
        self._handle = self._library.kinml_open(os.fspath(path).encode(), _PRECISIONS[dtype])
        if not self._handle:
            raise ModelError(self._library.kinml_error().decode(errors="replace"))
        self.n_members = int(self._library.kinml_n_members(self._handle))
        count = self._library.kinml_n_elements(self._handle)
        self.elements = tuple(
            self._library.kinml_element(self._handle, i).decode(errors="replace") for i in range(count)
        )
        self.has_grades = bool(self._library.kinml_has_grades(self._handle))
        self.cutoff = float(self._library.kinml_cutoff(self._handle))
        self.energy_factor = float(self._library.kinml_energy_factor(self._handle))
        self.forces_factors = tuple(float(self._library.kinml_forces_factor(self._handle, i)) for i in range(count))

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.kinml_close(self._handle)

    def __call__(
        self,
        positions: np.ndarray,
        species: np.ndarray,
        cell: np.ndarray | None = None,
        periodic: Sequence[bool] | None = None,
        pairs: tuple[np.ndarray, np.ndarray] | None = None,
        n_centres: int | None = None,
        threads: int = 1,
        hessians: bool = False,
    ) -> dict[str, np.ndarray]:
        """Energies, forces and virials of one structure, of each of the M members.

        Parameters
        ----------
        positions
            [n, 3] in Å.
        species
            [n] places in `elements`.
        cell, periodic
            [3, 3] rows are lattice vectors, in Å; [3] along which of them. Default: a molecule.
        pairs
            A full list of neighbours: [n + 1] where those of an atom begin, and [n_pairs] atoms. Default: looked for.
        n_centres
            The first so many atoms have energies, the others are their neighbours only. Default: all.
        threads
            How many compute.
        hessians
            Whether second derivatives are wanted.

        Returns
        -------
        dict
            ``energies`` [M] in eV, ``forces`` [M, n, 3] in eV/Å, ``atomic_energies`` [M, n] in eV, and ``virials``
            [M, n, 3, 3] in eV, whose sum over atoms is the derivative of the energy by a strain. If `has_grades` also
            ``grades`` [n], see `kinml_fast.deploy.grade`; if wanted ``hessians`` [M, 3n, 3n] in eV/Å².

        Raises
        ------
        InputError
            What the library says, such as positions that are no numbers.
        """
        n, members = len(species), self.n_members
        results = {
            "energies": np.zeros(members),
            "forces": np.zeros((members, n, 3)),
            "atomic_energies": np.zeros((members, n)),
            "virials": np.zeros((members, n, 3, 3)),
        }
        if self.has_grades:
            results["grades"] = np.zeros(n)
        if hessians:
            results["hessians"] = np.zeros((members, 3 * n, 3 * n))
        numbers: list[np.ndarray | None] = [
            np.ascontiguousarray(positions, float),
            np.ascontiguousarray(species, np.int64),
        ]
        numbers.append(None if cell is None else np.ascontiguousarray(cell, float))
        numbers.append(None if cell is None else np.array(periodic if periodic is not None else [1, 1, 1], np.int64))
        numbers += [None, None] if pairs is None else [np.ascontiguousarray(part, np.int64) for part in pairs]
        atoms = _Atoms(n, n if n_centres is None else n_centres, *map(_pointer, numbers))
        found = _Results(**{name: _pointer(array) for name, array in results.items()})
        if self._library.kinml_compute(self._handle, ctypes.byref(atoms), ctypes.byref(found), threads) != 0:
            raise DataError(self._library.kinml_error().decode(errors="replace"))
        return results


class _Atoms(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int64),
        ("n_centres", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("positions", "species", "cell", "periodic", "pair_starts", "neighbours")
        ),
    )


class _Results(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("energies", "forces", "atomic_energies", "virials", "grades", "hessians")
    )


_PRECISIONS = {None: 0, "float32": 32, "float64": 64}


def _pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.fspath(lammps.library()))
    pointer, number, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    for name, result, arguments in (
        ("open", pointer, [text, ctypes.c_int]),
        ("close", None, [pointer]),
        ("n_members", number, [pointer]),
        ("n_elements", number, [pointer]),
        ("element", text, [pointer, number]),
        ("cutoff", ctypes.c_double, [pointer]),
        ("energy_factor", ctypes.c_double, [pointer]),
        ("forces_factor", ctypes.c_double, [pointer, number]),
        ("has_grades", ctypes.c_int, [pointer]),
        ("compute", ctypes.c_int, [pointer, pointer, pointer, ctypes.c_int]),
        ("error", text, []),
    ):
        function = getattr(library, f"kinml_{name}")
        function.restype, function.argtypes = result, arguments
    return library
