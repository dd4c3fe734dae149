"""Configures and builds the project of CMakeLists.txt: for setup.py, tests and scripts.

Environment: ``KINML_BUILD_DIR`` the build folder (build/cmake of this tree without), in which the package, the C++
tests, the twin and the CUDA build share objects; ``CXX`` the compiler (g++ without), ``MAX_JOBS`` compilations at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class BuildError(Exception):
    """One sentence: what is missing, and what to do."""


def build_folder() -> Path:
    """Where objects are, or will be."""
    return Path(os.environ.get("KINML_BUILD_DIR") or ROOT / "build" / "cmake").resolve()


def jobs() -> int:
    """Compilations at a time."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def compiler() -> str:
    """Return the path of the C++ compiler.

    Errors
    ------
    BuildError
        when there is none
    """
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise BuildError(f"No C++ compiler '{name}' found: install g++ 11 or newer, or set CXX.")
    return found


def _program(name: str) -> str | None:
    """Return cmake or ninja: of this Python's environment, which need not be active, or of PATH."""
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))


def _cmake() -> str:
    found = _program("cmake")
    if found is None:
        raise BuildError("No CMake found: install it (for example 'pip install cmake'), version 3.21 or newer.")
    return found


def _run(command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        raise BuildError("kinml_fast could not be compiled: see the message above.")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder; no other process builds in it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(targets: list[str], folder: Path | None = None, **options: str) -> Path:
    """Set CMake's options, compile what has changed, and return the build folder.

    Parameters
    ----------
    targets
        of CMakeLists.txt; all that is built by default if empty
    folder
        build_folder() if None
    options
        of CMakeLists.txt, such as KINML_CUDA="ON"; what is not named stays as it was in this folder

    Errors
    ------
    BuildError
        when a tool is missing or the compiler fails
    """
    folder = folder or build_folder()
    cmake, ninja, cxx = _cmake(), _program("ninja"), compiler()
    with locked(folder):
        cache = folder / "CMakeCache.txt"
        text = cache.read_text() if cache.is_file() else ""
        # With another source tree or compiler CMake would refuse, or forget the options half-way.
        same = re.search(rf"^CMAKE_CXX_COMPILER:\w+={re.escape(cxx)}$", text, re.MULTILINE)
        if not same or f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in text:
            cache.unlink(missing_ok=True)
            text = ""
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DCMAKE_CXX_COMPILER={cxx}"]
        if ninja is not None and (not text or "CMAKE_GENERATOR:INTERNAL=Ninja\n" in text):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        _run([*configure, *(f"-D{name}={value}" for name, value in options.items())])
        named = ["--target", *targets] if targets else []
        _run([cmake, "--build", str(folder), "--parallel", str(jobs()), *named])
    return folder
