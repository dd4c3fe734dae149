"""XYZ files as text: frame after frame, to the end of the file, with the line where something is wrong.

ASE makes structures of the frames. It ends at a blank line, takes what is no element for one that does not exist, and
names no lines; so the frames are cut, and their symbols understood, here.
"""

from __future__ import annotations

import codecs
import io
import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from ase import Atoms
from ase.data import chemical_symbols
from ase.io.extxyz import read_xyz
from ase.io.formats import open_with_compression

from kinml_fast.errors import DataError

log = logging.getLogger(__name__)

_SUFFIXES = (".xyz", ".extxyz")
_COMPRESSED = (".gz", ".bz2", ".xz")
_ELEMENTS = frozenset(chemical_symbols[1:])
_ISOTOPES = {"D": "H", "T": "H"}
_KEYS = re.compile(r"(?<!\S)([^\s=\"']+)=")
_VALUES = re.compile(r"""([^\s=\"']+)=("[^"]*"|'[^']*'|\{[^}]*\}|\[[^\]]*\]|\S*)|"[^"]*"|'[^']*'""")
_FORCES = "Properties=species:S:1:pos:R:3:forces:R:3"


def is_xyz(path: Path) -> bool:
    """Whether the suffix says that a file is XYZ, maybe compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in _SUFFIXES


def frames(path: Path) -> Iterator[Atoms]:
    """The frames of an XYZ file, as ASE's `read_xyz` makes them.

    Blank lines between frames and a byte order mark are passed over; one of UTF-16 says the encoding. In the column of
    symbols atomic numbers (8), numbered atoms (O1) and isotopes (D) are understood as well; the log says so once for a
    file.

    Raises
    ------
    DataError
        A line that is not what it must be, a file that ends within a frame; a line of atoms with several numbers
        without a name, stars where a number was too long, or a comment line that gives a key two values.
    OSError
        It cannot be read.
    """
    with open_with_compression(str(path), "rb") as binary:
        begin = binary.peek(2)[:2]  # type: ignore[attr-defined]  # all that it opens can
        encoding = "utf-16" if begin in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        lines = _Lines(path, io.TextIOWrapper(binary, encoding=encoding, errors="backslashreplace"))
        while (n_atoms := lines.count()) is not None:
            yield lines.frame(n_atoms)


class _Lines:
    """The lines of a file, counted from 1."""

    def __init__(self, path: Path, text: io.TextIOWrapper) -> None:
        self._path, self._lines, self._number, self._frame = path, iter(text), 0, 0
        self._read: dict[str, str] = {}
        """Symbols that were understood as others, and as which."""
        self._said: set[str] = set()
        """Those of which the log has said so."""

    def count(self) -> int | None:
        """The number of atoms with which a frame begins; None at the end of the file."""
        for line in self._lines:
            self._number += 1
            if not line.strip():
                continue
            self._frame += 1
            word = line.split()[0]
            if not word.isdecimal():
                self._fail(f"{line.strip()[:40]!r} is not the number of atoms with which frame {self._frame} begins")
            return int(word)
        return None

    def frame(self, n_atoms: int) -> Atoms:
        """The frame whose number of atoms has been read."""
        comment = self._next("comment").rstrip("\n")
        self._check_keys(comment)
        first = self._number + 1
        rows = list(itertools.islice(self._lines, n_atoms))
        self._number += len(rows)
        for i, row in enumerate(rows):
            if not row.strip():
                self._fail(f"is blank, but frame {self._frame} has {n_atoms} atoms and only {i} before it", first + i)
        if len(rows) < n_atoms:
            raise DataError(
                f"{self._path}: ends within frame {self._frame}, which has {len(rows)} of its {n_atoms} atoms: copy it "
                "again, or remove the frame"
            )
        if "Properties=" not in comment or re.search(r"Properties=\"?species:S:1", comment):
            rows = [self._understood(row, first + i) for i, row in enumerate(rows)]
        if "Properties=" not in comment and rows:
            self._check_columns(rows, first)
        for i, row in enumerate(rows):
            if "*" in row:
                column = next(k for k, word in enumerate(row.split(), start=1) if "*" in word)
                self._fail(f"has stars in column {column}, where a number was too long: write it with more", first + i)
        text = io.StringIO(
            f"{n_atoms}\n{comment}\n{''.join(row if row.endswith(chr(10)) else row + chr(10) for row in rows)}"
        )
        try:
            frame = next(iter(read_xyz(text, 0)))
        except Exception as error:  # its parsing raises many kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self._path}: frame {self._frame} (line {first - 2}) cannot be read ({reason}): correct it"
            ) from error
        # Said of a frame that was read, not beside what is wrong with it.
        for symbol in sorted(self._read.keys() - self._said):
            log.warning("%s: %s is read as %s", self._path, symbol, self._read[symbol])
        self._said = set(self._read)
        return frame

    def _next(self, what: str) -> str:
        self._number += 1
        line = next(self._lines, None)
        if line is None:
            raise DataError(f"{self._path}: ends before the {what} of frame {self._frame}: copy it again")
        return line

    def _understood(self, row: str, number: int) -> str:
        """A line of an atom with the symbol of an element in its first column."""
        symbol = row.split(None, 1)[0]
        if symbol in _ELEMENTS:
            return row
        element = _element(symbol)
        if element is None:
            self._fail(f"{symbol!r} in frame {self._frame} is no element: write a chemical symbol", number)
        self._read[symbol] = element
        return row.replace(symbol, element, 1)

    def _check_keys(self, comment: str) -> None:
        """Refuse two values of one key, of which ASE would take the last."""
        if len(keys := _KEYS.findall(comment)) == len(set(keys)):
            return
        values: dict[str, str] = {}
        for key, value in _VALUES.findall(comment):
            if key and values.setdefault(key, value) != value:
                self._fail(f"gives {key} twice, {values[key]} and {value}: leave one of them out")

    def _check_columns(self, rows: list[str], first: int) -> None:
        """Refuse what may be forces, but has no name."""
        columns = len(rows[0].split())
        if columns >= 7:
            self._fail(
                f"has {columns} columns, but the comment of frame {self._frame} names none: add the columns' names to "
                f"it, such as {_FORCES}, or remove those behind x, y and z",
                first,
            )

    def _fail(self, what: str, number: int | None = None) -> NoReturn:
        raise DataError(f"{self._path}:{number or self._number}: {what}")


def _element(word: str) -> str | None:
    """The element that is meant by what is no symbol: 8, O1, D, h; None: nothing that is certain."""
    if word.isdecimal():
        return chemical_symbols[int(word)] if 0 < int(word) < len(chemical_symbols) else None
    letters = word.rstrip("0123456789")
    if letters.islower():
        letters = letters.capitalize()
    letters = _ISOTOPES.get(letters, letters)
    return letters if letters in _ELEMENTS else None
