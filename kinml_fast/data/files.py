"""Files: patterns and shipped data sets to paths, file types, writing without half-written results."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from kinml_fast import datasets
from kinml_fast.errors import ConfigError, DataError, InputError

SHIPPED = "shipped:"
_SQLITE_MAGIC = b"SQLite format 3\0"
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


def expand(files: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    """Paths of the files that paths, glob patterns (`**` included) and `shipped:NAME` stand for.

    The order of the list is kept, the matches of one pattern are sorted, and a file that is named twice counts once.

    Raises
    ------
    InputError
        A pattern that matches nothing, a missing file, a directory, an unreadable file, or an empty list.
    """
    if isinstance(files, str | os.PathLike):
        files = [files]
    paths: dict[Path, Path] = {}
    for entry in files:
        for path in _expand_one(os.fspath(entry)):
            paths.setdefault(path.resolve(), path)
    if not paths:
        raise ConfigError("no data files are given: name at least one")
    return [_checked(path) for path in paths.values()]


def expand_one(file: str | os.PathLike) -> Path:
    """The path that `expand` gives, of one file only.

    Raises
    ------
    InputError
        As `expand`, or a pattern that matches several files.
    """
    path, *others = expand(file)
    if others:
        raise ConfigError(f"{file}: matches several files, among them {others[0]}: name one at a time")
    return path


def is_sqlite(path: Path) -> bool:
    """Whether the file is an SQLite database: by its first bytes, or by the suffix `.db` of a damaged one."""
    return begins_with(path, _SQLITE_MAGIC) or path.suffix == ".db"


def is_ase_database(path: Path) -> bool:
    """Whether the file is a database of ASE's (ase.db), whatever its name is."""
    if not begins_with(path, _SQLITE_MAGIC):
        return False
    with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):  # names of a damaged one need be no text
        address = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
            names = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            return {"systems", "species", "keys"} <= names
    return False


def is_hdf5(path: Path) -> bool:
    """Whether the file is an HDF5 file: by its first bytes, or by the suffix `.h5` or `.hdf5` of a damaged one."""
    return not is_sqlite(path) and (begins_with(path, _HDF5_MAGIC) or path.suffix in (".h5", ".hdf5"))


def first_few(items: Sequence[object], shown: int = 3) -> str:
    """The first few for a message, and how many there are: "a, b, c … (17 in all)"."""
    return ", ".join(map(str, items[:shown])) + (f" … ({len(items)} in all)" if len(items) > shown else "")


def check_distinct(paths: Sequence[Path], label: Callable[[Path], str]) -> None:
    """Refuse two files whose structures would get the same labels, since split files name structures by label."""
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(label(path), path)
        if other is not path:
            raise DataError(
                f"{other} and {path} would give their structures the same labels: "
                f"rename one, for instance to {path.stem}_2{path.suffix}"
            )


def check_output(path: str | os.PathLike, inputs: Iterable[str | os.PathLike], suffixes: Sequence[str] = ()) -> None:
    """Refuse to write over a file that is read, or a file whose name says that it is of another kind.

    Parameters
    ----------
    path
        The file to write.
    inputs
        Files that are read.
    suffixes
        Those that the file may have; none given: any.

    Raises
    ------
    ConfigError
        It is one of the inputs, or has another suffix.
    InputError
        There is no such folder to write it into.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written ({os.strerror(errno.ENOENT)}): choose a folder that can")
    for other in map(Path, inputs):
        if path.resolve() == other.resolve():
            raise ConfigError(f"{path}: is what is read and would be overwritten: give the output another name")
    if suffixes and not path.name.lower().endswith(tuple(suffixes)):
        raise ConfigError(f"{path}: the output is a file of another kind: give it the suffix {' or '.join(suffixes)}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file so that it is there as a whole or not at all.

    Yields the path of a temporary file in the same folder, which takes the place of `path` when the block ends well
    and is removed when it does not.

    Raises
    ------
    InputError
        The folder does not exist or cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}): choose a folder that can") from error
    temporary = Path(name)
    try:
        # mkstemp makes private files; a result gets the usual rights.
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(descriptor, 0o666 & ~umask)
        os.close(descriptor)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: could not be written ({error.strerror or error}): nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True)


def begins_with(path: Path, magic: bytes) -> bool:
    """Whether these are the first bytes of a file."""
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _expand_one(entry: str) -> list[Path]:
    if entry.startswith(SHIPPED):
        return [datasets.path(entry[len(SHIPPED) :])]
    try:
        path = Path(entry).expanduser()
        path.resolve(strict=path.exists())
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a ring of links, too long, a zero byte
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        shown = entry if len(entry) < 80 else f"{entry[:77]}..."
        raise DataError(f"{shown}: is no path of a file ({reason}): correct it, or give a list of names") from error
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        raise DataError(f"{entry}: the pattern matches no file: correct it")
    return matches


def _checked(path: Path) -> Path:
    if path.is_dir():
        raise DataError(f"{path}: is a folder: name the files in it, for instance {path}/*.db")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): correct the path or the file's rights") from error
    if empty:
        raise DataError(f"{path}: is empty: take a file with structures")
    return path


def _sync_folder(folder: Path) -> None:
    # Makes the new name itself survive a power cut; some systems do not let a folder be opened.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
