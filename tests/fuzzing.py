"""Files that are broken in random ways, given to a way into the program: no traceback, no hang, no code run.

    python tests/fuzzing.py DOOR [--mutants 1000] [--seed 0] [--keep FOLDER]

writes one line of JSON: how many were tried, refused and accepted, the longest time and the largest memory, and the
faults. A refusal is exit code 2 and one sentence. Each mutant has a process of its own, a copy of this one; with --keep
those that make a fault stay in the folder. Doors are in fuzz_doors.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

SECONDS = 10.0
"""What takes longer hangs."""
MEGABYTES = 6000
"""A file of a few kilobytes must not make the program take more."""

Mutator = Callable[[random.Random, bytes], bytes]

_WORDS = (
    *("nan", "-inf", "1e999", "-1", "0", "99999999999999999999", "1e-320", "", "NaN", "0x10", "\u0661", "true", "null"),
    *("[]", "{}", '"', "'", "#", "\0", "\ufeff", "=", "C5H5/1", "!!python/object/apply:os.system [touch canary]"),
)


class _Canary:
    """Unpickled by a program that runs what files say, it leaves a file."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch canary",)


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, left out, put in or repeated."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        begin = rng.randrange(len(changed) + 1)
        end = min(len(changed), begin + rng.choice((1, 1, 2, 4, 8, 64, 1024)))
        kind = rng.randrange(6)
        if kind == 0:
            changed[begin:end] = bytes(b ^ (1 << rng.randrange(8)) for b in changed[begin:end])
        elif kind == 1:
            changed[begin:end] = rng.randbytes(end - begin)
        elif kind == 2:
            del changed[begin:end]
        elif kind == 3:
            changed[begin:begin] = changed[begin:end] * rng.choice((1, 3))
        elif kind == 4:
            changed[begin:end] = bytes(rng.choice((0, 255)) for _ in range(end - begin))
        elif rng.random() < 0.3:
            del changed[begin:]
    return bytes(changed)


def of_text(rng: random.Random, data: bytes) -> bytes:
    """Words and lines exchanged, left out, repeated or replaced by what is unusual."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            lines.insert(at, lines[other])
        else:
            parts = re.split(rb"([\s=:,\[\]{}]+)", lines[at])
            where = rng.randrange(0, len(parts), 2)
            parts[where] = rng.choice((*(w.encode() for w in _WORDS), rng.choice(parts), lines[other]))
            lines[at] = b"".join(parts)
    return b"\n".join(lines)


def of_archive(rng: random.Random, data: bytes) -> bytes:
    """One part of a zip archive changed, with the right checksum; or its pickle by one that runs a command."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([n for n in parts if n.endswith("data.pkl")] if rng.random() < 0.7 else list(parts))
    if name.endswith(".pkl") and rng.random() < 0.1:
        parts[name] = pickle.dumps(_Canary(), protocol=2)
    elif rng.random() < 0.1:
        del parts[name]
    else:
        parts[name] = (of_text if rng.random() < 0.2 else of_bytes)(rng, parts[name])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for part, contents in parts.items():
            archive.writestr(part, contents)
    return out.getvalue()


def of_sqlite(rng: random.Random, data: bytes) -> bytes:
    """A value, a table or a column of a database exchanged."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.db"
        path.write_bytes(data)
        database = sqlite3.connect(path)
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        table = rng.choice(tables)
        columns = [row[1] for row in database.execute(f"PRAGMA table_info('{table}')")]
        column = rng.choice(columns)
        values = [v for (v,) in database.execute(f"SELECT \"{column}\" FROM '{table}' LIMIT 20")] or [None]
        blobs = [v for v in values if isinstance(v, bytes)]
        value = rng.choice(
            [None, "text", float("inf"), -1, 2**62, 1e-320, b"", b"\x93NUMPY", pickle.dumps(_Canary()), values[-1]]
            + [of_bytes(rng, blob) for blob in blobs[:3]]
        )
        rows = rng.choice(("", f" WHERE rowid % 3 = {rng.randrange(3)}", " WHERE rowid = 2"))
        kind = rng.randrange(8)
        try:
            if kind == 0:
                database.execute(f"DROP TABLE '{table}'")
            elif kind == 1:
                database.execute(f"ALTER TABLE '{table}' RENAME COLUMN \"{column}\" TO other")
            elif kind == 2:
                database.execute(f"DELETE FROM '{table}'{rows}")
            else:
                database.execute(f"UPDATE '{table}' SET \"{column}\" = ?{rows}", (value,))
            database.commit()
        except sqlite3.Error:
            pass  # what the database does not allow
        database.close()
        return path.read_bytes()


def of_hdf5(rng: random.Random, data: bytes) -> bytes:
    """A data set or attribute left out, or of another type, shape or value."""
    import h5py
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.h5"
        path.write_bytes(data)
        with h5py.File(path, "r+") as file:
            found: list[str] = []
            file.visit(found.append)
            name = rng.choice(found)
            item = file[name]
            if item.attrs and rng.random() < 0.3:
                key = rng.choice(list(item.attrs))
                del item.attrs[key]
                if rng.random() < 0.7:
                    item.attrs[key] = rng.choice([0, -1, 2.5, "text", np.zeros(3), np.zeros((2, 2), dtype="i4")])
            elif isinstance(item, h5py.Dataset) and rng.random() < 0.8:
                value = item[()]
                del file[name]
                with contextlib.suppress(TypeError):  # what HDF5 cannot hold is missing then
                    file[name] = _other_value(rng, value)
            else:
                del file[name]
        return path.read_bytes()


def _other_value(rng: random.Random, value: object) -> object:
    import numpy as np

    array = np.asarray(value)
    kind = rng.randrange(7)
    if kind == 0:
        return array.reshape(-1)[: max(0, array.size - 1)]
    if kind == 1 and array.dtype.kind in "iuf":
        return array.astype(rng.choice(("f4", "i2", "u1", "f8", "i8")))
    if kind == 2:
        return rng.choice((0, -1, "text", np.zeros(0), np.zeros((1, 1, 1))))
    if kind == 3 and array.ndim:
        return np.concatenate([array, array])
    if kind == 4 and array.ndim:
        return array[::-1]
    if array.dtype.kind in "iuf" and array.size:
        changed = array.copy().reshape(-1)
        numbers = (np.nan, np.inf, -1, 1e300) if array.dtype.kind == "f" else (-1, 0, 1, 2**15 - 1)
        changed[rng.randrange(changed.size)] = rng.choice(numbers)
        return changed.reshape(array.shape)
    return array


@dataclass(frozen=True)
class Door:
    """A way for files into the program.

    Parameters
    ----------
    seeds
        Sound files, in the working folder.
    enter
        Takes the path of a mutant and a number, and returns an exit code; what it says is on standard error.
    mutators
        How files are broken, one of these each time.
    """

    seeds: Sequence[Path]
    enter: Callable[[Path, int], int]
    mutators: Sequence[Mutator] = (of_bytes, of_text)


@dataclass
class Figures:
    """What became of the mutants of a door."""

    tried: int = 0
    refused: int = 0
    accepted: int = 0
    longest: float = 0.0
    largest: int = 0
    faults: list[str] = field(default_factory=list)


def run(door: Door, mutants: int, seed: int, keep: Path | None = None) -> Figures:
    """Give mutants to a door, each in a copy of this process and a folder of its own."""
    figures = Figures()
    for source in door.seeds:
        for number in range(4):
            code, _, _, said, _ = _attempt(door, source.name, source.read_bytes(), number)
            assert code == 0, f"{source.name} is sound, but: {said}"
    for number in range(mutants):
        rng = random.Random(f"{seed}/{number}")
        source = door.seeds[rng.randrange(len(door.seeds))]
        mutant = rng.choice(door.mutators)(rng, source.read_bytes())
        code, seconds, megabytes, said, canary = _attempt(door, source.name, mutant, number)
        figures.tried += 1
        figures.longest, figures.largest = max(figures.longest, seconds), max(figures.largest, megabytes)
        figures.refused += code == 2
        figures.accepted += code == 0
        fault = _fault(code, seconds, megabytes, said, canary)
        if fault is not None:
            figures.faults.append(f"{number}: {fault}")
            if keep is not None:
                (keep / f"{number}-{source.name}").write_bytes(mutant)
    return figures


def _attempt(door: Door, name: str, contents: bytes, number: int) -> tuple[int, float, int, str, bool]:
    """Exit code (negative: the signal that ended it), seconds, megabytes, standard error, whether code was run."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(contents)
        os.chdir(folder)
        try:
            return *_enter(door, path, number), Path("canary").exists()
        finally:
            os.chdir(home)


def _enter(door: Door, path: Path, number: int) -> tuple[int, float, int, str]:
    started = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                limit = (MEGABYTES + 4000) << 20
                if "ASAN_OPTIONS" not in os.environ:  # which takes terabytes of addresses
                    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                code = door.enter(path, number)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 98
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status, usage = os.wait4(child, 0)
        err.seek(0)
        said = err.read().decode(errors="replace")
    seconds = time.monotonic() - started
    return os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss >> 10, said


def _fault(code: int, seconds: float, megabytes: int, said: str, canary: bool) -> str | None:
    last = (said.strip().splitlines() or [""])[-1][:300]
    if canary:
        return "ran code of the file"
    if seconds > SECONDS:
        return f"took {seconds:.1f} s"
    if code not in (0, 2):
        return f"exit code {code}: {last}"
    if "Traceback" in said:
        return f"traceback: {last}"
    if megabytes > MEGABYTES:
        return f"took {megabytes} MB"
    if code == 2 and said.count("\n") != 1:
        return f"{said.count(chr(10))} lines instead of one sentence: {last}"
    return None


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("door")
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    keep = options.keep and options.keep.resolve()
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    import fuzz_doors

    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)
        door = fuzz_doors.DOORS[options.door](Path(folder))
        sys.stdout.flush()
        figures = run(door, options.mutants, options.seed, keep)
        os.chdir(before)
    print(json.dumps(asdict(figures)))


if __name__ == "__main__":
    main()
