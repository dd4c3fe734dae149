"""Structures in a file of blocks, which are read a few at a time: data that are larger than memory.

The file begins with a line that names its kind. Then come blocks of about half a megabyte, each the arrays of
consecutive structures of one part of the split (train, validation, test, in this order), and at the end a JSON text
that says what is where, with a checksum of each block, then its own checksum and length. So a file that is cut off has
no end, and a block that is damaged is found when it is read for the first time.
"""

from __future__ import annotations

import json
import os
import struct
import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kinml_fast.data.files import begins_with, replacing
from kinml_fast.data.split import PARTS
from kinml_fast.data.structures import Structures, atoms_of
from kinml_fast.errors import DataError, InputError

BLOCK_BYTES = 1 << 19
"""About so many bytes are a block."""

_KIND = b"kinml_fast blocks "
_FORMAT = _KIND + b"1\n"
_END = struct.Struct("<IQ")  # checksum and length of the JSON text
_MOST_ELEMENTS = 256  # species are bytes


def is_ours(path: Path) -> bool:
    """Whether a file is one of blocks, of whatever version, or a damaged one."""
    return path.is_file() and begins_with(path, _KIND)


@dataclass(frozen=True, eq=False)
class Piece:
    """Some structures of a data set.

    Parameters
    ----------
    structures
        With energies.
    origin
        Where each of them was in what the data set was made of, int64 [n].
    weights
        Their weights in the loss, float64 [n]; None: all 1.
    """

    structures: Structures
    origin: np.ndarray
    weights: np.ndarray | None

    def __len__(self) -> int:
        return len(self.origin)

    def select(self, indices: np.ndarray) -> Piece:
        """Those with these indices, as new arrays."""
        s = self.structures
        atoms, offsets = atoms_of(s.offsets, indices)
        structures = Structures.trusted(
            elements=s.elements,
            species=s.species[atoms],
            coordinates=None if s.coordinates is None else s.coordinates[atoms],
            offsets=offsets,
            energies=None if s.energies is None else np.ascontiguousarray(s.energies[..., indices]),
            forces=None if s.forces is None else np.ascontiguousarray(s.forces[..., atoms, :]),
            labels=tuple(s.labels[i] for i in indices.tolist()),
            cells=None if s.cells is None else s.cells[indices],
            periodic=None if s.periodic is None else s.periodic[indices],
            stresses=None if s.stresses is None else np.ascontiguousarray(s.stresses[..., indices, :, :]),
        )
        return Piece(structures, self.origin[indices], None if self.weights is None else self.weights[indices])


def join(pieces: Sequence[Piece]) -> Piece:
    """One piece of several of the same elements and levels; of forces, cells and so on all have some or none has."""
    parts = [piece.structures for piece in pieces]

    def joined(name: str, axis: int) -> np.ndarray | None:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays, axis=axis)

    shifts = np.cumsum([0] + [int(part.offsets[-1]) for part in parts])
    structures = Structures.trusted(
        elements=parts[0].elements,
        species=joined("species", 0),
        coordinates=joined("coordinates", 0),
        offsets=np.concatenate([[0], *(p.offsets[1:] + s for p, s in zip(parts, shifts, strict=False))]),
        energies=joined("energies", -1),
        forces=joined("forces", -2),
        labels=tuple(label for part in parts for label in part.labels),
        cells=joined("cells", 0),
        periodic=joined("periodic", 0),
        stresses=joined("stresses", -3),
    )
    weights = [piece.weights for piece in pieces if piece.weights is not None]
    return Piece(
        structures, np.concatenate([piece.origin for piece in pieces]), np.concatenate(weights) if weights else None
    )


@dataclass(frozen=True)
class _Block:
    """What a block holds: structures, atoms, bytes of labels."""

    part: str
    structures: int
    atoms: int
    labels: int
    checksum: int


class _Layout:
    """Where the arrays of a block are: name, type and shape of each."""

    def __init__(self, levels: int, forces: bool, weights: bool, cells: bool, stresses: bool) -> None:
        self.levels, self.forces, self.weights = levels, forces, weights
        self.cells = self.periodic = cells
        self.stresses = stresses

    def arrays(self, structures: int, atoms: int, labels: int) -> list[tuple[str, str, tuple[int, ...]]]:
        """Those of a block of so many structures, atoms and bytes of labels; wide types first, so all are aligned."""
        found = [
            ("energies", "<f8", (self.levels, structures)),
            ("weights", "<f8", (structures,)),
            ("origin", "<i8", (structures,)),
            ("coordinates", "<f8", (atoms, 3)),
            ("forces", "<f8", (self.levels, atoms, 3)),
            ("cells", "<f8", (structures, 3, 3)),
            ("stresses", "<f8", (self.levels, structures, 3, 3)),
            ("sizes", "<i4", (structures,)),
            ("periodic", "u1", (structures, 3)),
            ("species", "u1", (atoms,)),
            ("labels", "u1", (labels,)),
        ]
        return [row for row in found if getattr(self, row[0], True)]

    def bytes(self, structures: int, atoms: int, labels: int) -> int:
        """Length of such a block."""
        rows = self.arrays(structures, atoms, labels)
        return sum(np.dtype(kind).itemsize * int(np.prod(shape)) for _, kind, shape in rows)


class BlockWriter:
    """Writes a file of blocks from pieces of the data; `add` for all of a part, part after part, then `finish`.

    Parameters
    ----------
    file
        Opened for writing, empty.
    elements
        Of the structures, in the order of their species.
    levels
        K, levels of theory.
    forces, weights, cells, stresses
        Whether there are any.
    """

    def __init__(
        self,
        file: BinaryIO,
        elements: Sequence[str],
        levels: int,
        forces: bool,
        weights: bool,
        cells: bool = False,
        stresses: bool = False,
    ) -> None:
        self._file, self._elements = file, tuple(elements)
        self._layout = _Layout(levels, forces, weights, cells, stresses)
        self._blocks: list[_Block] = []
        self._numbers: dict[str, dict[str, list[int]]] = {}
        self._components, self._stress_components = np.zeros((2, levels), dtype=np.int64)
        if len(self._elements) > _MOST_ELEMENTS:
            raise DataError(f"{len(self._elements)} elements are too many for a file of blocks: take fewer")
        file.write(_FORMAT)

    def add(self, part: str, piece: Piece) -> None:
        """Write structures of a part, in blocks of their own."""
        structures, levels = piece.structures, self._layout.levels
        known, forces, stresses = structures.known_energies, structures.known_forces, structures.known_stresses
        kinds = {"energies": known, "forces": forces, "stresses": stresses}
        numbers = self._numbers.setdefault(part, {name: [0] * levels for name in kinds})
        for name, of_kind in kinds.items():
            numbers[name] = (of_kind.sum(axis=1) + numbers[name]).tolist()
        if part == "train":
            counted = np.ones(len(piece), dtype=bool) if piece.weights is None else piece.weights != 0
            self._components += 3 * ((forces & counted) * structures.sizes).sum(axis=1)
            self._stress_components += 9 * (stresses & counted).sum(axis=1)
        lengths = [len(label.encode()) + 1 for label in structures.labels]
        ends = np.cumsum(
            self._layout.bytes(1, 0, 0) + (self._layout.bytes(0, 1, 0)) * structures.sizes + np.array(lengths)
        )
        first = 0
        while first < len(piece):
            before = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + BLOCK_BYTES, side="right")))
            self._write(part, piece, first, last)
            first = last

    def _write(self, part: str, piece: Piece, first: int, last: int) -> None:
        s, levels = piece.structures, self._layout.levels
        some, atoms = slice(first, last), slice(int(s.offsets[first]), int(s.offsets[last]))
        assert s.energies is not None
        assert s.coordinates is not None
        forces = np.full((levels, len(s.species), 3), np.nan) if s.forces is None else s.forces
        text = "\n".join(s.labels[some]).encode()
        values = {
            "energies": s.energies.reshape(levels, -1)[:, some],
            "weights": np.ones(len(piece)) if piece.weights is None else piece.weights[some],
            "origin": piece.origin[some],
            "coordinates": s.coordinates[atoms],
            "forces": forces.reshape(levels, -1, 3)[:, atoms],
            "cells": np.zeros((last - first, 3, 3)) if s.cells is None else s.cells[some],
            "periodic": np.zeros((last - first, 3)) if s.periodic is None else s.periodic[some],
            "stresses": np.full((levels, last - first, 3, 3), np.nan)
            if s.stresses is None
            else s.stresses.reshape(levels, -1, 3, 3)[:, some],
            "sizes": s.sizes[some],
            "species": s.species[atoms],
            "labels": np.frombuffer(text, dtype=np.uint8),
        }
        numbers = last - first, atoms.stop - atoms.start, len(text)
        checksum = 0
        for name, kind, _ in self._layout.arrays(*numbers):
            data = np.ascontiguousarray(values[name], dtype=kind).tobytes()
            checksum = zlib.crc32(data, checksum)
            self._file.write(data)
        self._blocks.append(_Block(part, *numbers, checksum))

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write the end of the file, with plain values that the reader gives back."""
        text = json.dumps(
            {
                "about": about,
                "elements": self._elements,
                "levels": self._layout.levels,
                "forces": self._layout.forces,
                "weights": self._layout.weights,
                "cells": self._layout.cells,
                "stresses": self._layout.stresses,
                "numbers": self._numbers,
                "components": self._components.tolist(),
                "stress_components": self._stress_components.tolist(),
                "blocks": [[b.part, b.structures, b.atoms, b.labels, b.checksum] for b in self._blocks],
            }
        ).encode()
        self._file.write(text)
        self._file.write(_END.pack(zlib.crc32(text), len(text)))


def write(
    path: Path,
    parts: Iterable[tuple[str, Piece]],
    *,
    elements: Sequence[str],
    levels: int,
    forces: bool,
    weights: bool,
    about: Mapping[str, Any],
    cells: bool = False,
    stresses: bool = False,
) -> None:
    """Write a file of blocks in one step.

    Parameters
    ----------
    path
        Replaced when the new file is complete and on the disk.
    parts
        Pieces of the training, validation and test part, in this order; what they are made from may be read meanwhile.
    elements, levels, forces, weights, cells, stresses
        See `BlockWriter`.
    about
        Plain values to keep with the data.

    Raises
    ------
    InputError
        The file cannot be written, for instance because the disk is full; an older one is left as it was.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        writer = BlockWriter(file, elements, levels, forces, weights, cells, stresses)
        for part, piece in parts:
            writer.add(part, piece)
        writer.finish(about)


class BlockFile:
    """A file of blocks, opened for reading.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    path : Path
    elements : tuple of str
    levels : int
        K, levels of theory.
    sizes : dict
        Number of structures of each part.
    known_energies, known_forces, known_stresses : dict
        How many structures of each part have energies, forces and stresses at each level, lists [K].
    components, stress_components : list of int [K]
        Components of forces and of stresses of training structures that have a weight.
    has_crystals : bool
        Whether any structure is periodic.
    about : dict
        What `BlockWriter.finish` was given.
    digest : int
        Checksum of all this and of the checksums of the blocks.

    Raises
    ------
    InputError
        The file is missing, damaged, or of another kind.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}): run kinml-fast prepare") from error
        weakref.finalize(self, os.close, self._descriptor)
        length = os.fstat(self._descriptor).st_size
        if self._bytes(0, len(_FORMAT)) != _FORMAT:
            raise DataError(f"{self.path}: is no data set in blocks of this version: run kinml-fast prepare again")
        try:
            self.digest, text_length = _END.unpack(self._bytes(length - _END.size, _END.size))
            text_at = length - _END.size - text_length
            text = self._bytes(text_at, text_length)
            if zlib.crc32(text) != self.digest:
                raise ValueError("wrong checksum")
            contents = json.loads(text)
            self.about: dict[str, Any] = contents["about"]
            self.elements = tuple(contents["elements"])
            self.levels: int = contents["levels"]
            self.has_crystals: bool = contents.get("cells", False)  # files from before there were any
            self._layout = _Layout(
                self.levels,
                contents["forces"],
                contents["weights"],
                self.has_crystals,
                contents.get("stresses", False),
            )
            self._blocks = [_Block(*row) for row in contents["blocks"]]
            self.components: list[int] = contents["components"]
            self.stress_components: list[int] = contents.get("stress_components", [0] * self.levels)
            numbers = contents["numbers"]
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise self._damaged("its end is missing") from error
        self.known_energies, self.known_forces, self.known_stresses = (
            {part: numbers.get(part, {}).get(name, [0] * self.levels) for part in PARTS}
            for name in ("energies", "forces", "stresses")
        )
        self.sizes = {part: sum(b.structures for b in self._blocks if b.part == part) for part in PARTS}
        self._lengths = np.array([self._layout.bytes(b.structures, b.atoms, b.labels) for b in self._blocks])
        self._places = len(_FORMAT) + np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        if self._places[-1] != text_at:
            raise self._damaged("it is shorter than it should be")
        self._checked = np.zeros(len(self._blocks), dtype=bool)

    def blocks(self, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers of the blocks of a part in their order, structures in each, and bytes; int64 [n]."""
        numbers = np.array([i for i, block in enumerate(self._blocks) if block.part == part], dtype=np.int64)
        structures = np.array([self._blocks[i].structures for i in numbers], dtype=np.int64)
        return numbers, structures, self._lengths[numbers]

    def read(self, numbers: Sequence[int], before: Piece | None = None) -> Piece:
        """The structures of some blocks, in this order, behind others that are there already.

        Raises
        ------
        InputError
            A block is damaged, or cannot be read.
        """
        return join([*([] if before is None else [before]), *(self._piece(int(number)) for number in numbers)])

    def _piece(self, number: int) -> Piece:
        """The structures of a block."""
        block = self._blocks[number]
        data = self._bytes(int(self._places[number]), int(self._lengths[number]))
        if not self._checked[number]:
            if zlib.crc32(data) != block.checksum:
                raise self._damaged(f"block {number} has a wrong checksum")
            self._checked[number] = True
        values, place = {}, 0
        for name, kind, shape in self._layout.arrays(block.structures, block.atoms, block.labels):
            count = int(np.prod(shape))
            values[name] = np.frombuffer(data, kind, count, place).reshape(shape)
            place += count * np.dtype(kind).itemsize
        forces, stresses, several = values.get("forces"), values.get("stresses"), self.levels > 1
        structures = Structures.trusted(
            elements=self.elements,
            species=values["species"].astype(np.int64),
            coordinates=values["coordinates"],
            offsets=np.concatenate([[0], np.cumsum(values["sizes"], dtype=np.int64)]),
            energies=values["energies"] if several else values["energies"][0],
            forces=forces if forces is None or several else forces[0],
            labels=tuple(values["labels"].tobytes().decode().split("\n")),
            cells=values.get("cells"),
            periodic=values["periodic"].astype(np.int64) if self.has_crystals else None,
            stresses=stresses if stresses is None or several else stresses[0],
        )
        return Piece(structures, values["origin"], values.get("weights"))

    def _bytes(self, place: int, length: int) -> bytes:
        """Exactly so many bytes of the file."""
        try:
            data = os.pread(self._descriptor, length, place) if place >= 0 and length >= 0 else b""
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}): run kinml-fast prepare again") from error
        if len(data) != length:
            raise self._damaged("it is cut off")
        return data

    def _damaged(self, how: str) -> InputError:
        return DataError(f"{self.path}: is damaged ({how}): run kinml-fast prepare again")
