"""Where the CUDA toolkit is and what csrc/cuda is compiled for: for setup.py and scripts/cuda_resources.py.

Flags are in cmake/cuda.cmake.

Environment: ``KINML_CUDA=auto|0|1`` (auto: where the installed torch has CUDA and there is an nvcc),
``KINML_CUDA_ARCHS`` such as ``80;90``, ``CUDA_HOME`` or ``CUDA_PATH`` the toolkit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

OLDEST = (12, 1)  # arguments of a kernel beyond 4 KiB
DEFAULT_ARCHITECTURES = ("80", "90", "100")


class CudaError(Exception):
    """One sentence: what is missing, and what to do."""


@dataclass(frozen=True)
class Toolkit:
    """An nvcc, its version, the architectures that it knows, and the folder of the toolkit."""

    nvcc: str
    version: tuple[int, int]
    known: tuple[str, ...]
    folder: Path

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


@dataclass(frozen=True)
class CudaBuild:
    """What to compile csrc/cuda with and for."""

    toolkit: Toolkit
    architectures: tuple[str, ...]

    def text(self) -> str:
        """For `kinml-fast info`."""
        names = ", ".join(f"{name[:-1]}.{name[-1]}" if name.isdigit() else name for name in self.architectures)
        return f"{self.toolkit.version_text}, compute capability {names}"


@dataclass(frozen=True)
class Decision:
    """Whether and how to build for CUDA, and what to tell who builds."""

    build: CudaBuild | None
    notes: list[str] = field(default_factory=list)


def find_nvcc(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the nvcc of CUDA_HOME or CUDA_PATH, of PATH, or of /usr/local/cuda."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            found = Path(environment[name]) / "bin" / "nvcc"
            return str(found) if found.is_file() else None
    found = shutil.which("nvcc", path=environment.get("PATH", ""))
    usual = Path("/usr/local/cuda/bin/nvcc")
    return found or (str(usual) if usual.is_file() else None)


def _output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise CudaError(f"'{' '.join(command)}' fails: {(done.stdout.strip() or 'no message').splitlines()[-1]}")
    return done.stdout


def inspect(nvcc: str) -> Toolkit:
    """Ask nvcc what it is."""
    version = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if version is None:
        raise CudaError(f"'{nvcc} --version' does not say which version it is.")
    number = (int(version[1]), int(version[2]))
    known = tuple(re.findall(r"^sm_(\w+)$", _output(nvcc, "--list-gpu-code"), re.MULTILINE)) if number >= OLDEST else ()
    # What is in PATH may be a link or a script that calls the real one.
    top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull), re.MULTILINE)
    return Toolkit(nvcc, number, known, Path(top[1] if top else Path(nvcc).parents[1]).resolve())


def _wanted_architectures(text: str) -> list[str]:
    words = [word for word in re.split(r"[;,\s]+", text) if word]
    names = []
    for word in words:
        name = re.fullmatch(r"(?:sm_|compute_)?(\d+)\.?(\d[af]?)", word)
        if name is None:
            raise CudaError(f"KINML_CUDA_ARCHS holds '{word}': give compute capabilities, such as 80;90.")
        names.append(name[1] + name[2])
    if not names:
        raise CudaError("KINML_CUDA_ARCHS is empty: unset it, or give compute capabilities, such as 80;90.")
    return sorted(set(names), key=lambda name: (int(re.match(r"\d+", name)[0]), name))


def choose_architectures(
    toolkit: Toolkit, environment: Mapping[str, str] = os.environ, strict: bool = False
) -> tuple[tuple[str, ...], list[str]]:
    """Return the architectures to compile for, and notes. Unknown ones that were asked for are an error if strict."""
    given = environment.get("KINML_CUDA_ARCHS")
    wanted = list(DEFAULT_ARCHITECTURES) if given is None else _wanted_architectures(given)
    known = [name for name in wanted if name.rstrip("af") in toolkit.known]
    unknown = ", ".join(name for name in wanted if name not in known)
    knows = f"nvcc {toolkit.version_text} does not know"
    if not known or (unknown and given is not None and strict):
        raise CudaError(f"KINML_CUDA_ARCHS: {knows} the architectures {unknown}; it knows {', '.join(toolkit.known)}.")
    return tuple(known), [f"{knows} the architectures {unknown}: they are left out."] if unknown else []


def decide(torch_cuda: str | None, environment: Mapping[str, str] = os.environ) -> Decision:
    """Return how csrc/cuda is built beside a torch with CUDA `torch_cuda` (None: a torch for CPUs).

    Errors
    ------
    CudaError
        when KINML_CUDA=1 cannot be had, or an environment variable makes no sense
    """
    wish = environment.get("KINML_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise CudaError(f"KINML_CUDA must be auto, 0 or 1, not '{wish}'.")
    if wish == "0" or (wish == "auto" and torch_cuda is None):
        return Decision(None)
    try:
        nvcc = find_nvcc(environment)
        if nvcc is None:
            raise CudaError(
                "there is no nvcc (looked for in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda): install the CUDA "
                "toolkit 12.1 or newer, or set CUDA_HOME to where it is"
            )
        toolkit = inspect(nvcc)
        if toolkit.version < OLDEST:
            raise CudaError(f"{nvcc} is version {toolkit.version_text}: install the CUDA toolkit 12.1 or newer")
    except CudaError as error:
        if wish == "1":
            raise CudaError(f"KINML_CUDA=1, but {error}; KINML_CUDA=0 builds for the CPU.") from None
        return Decision(None, [f"This torch has CUDA {torch_cuda}, but {error}. kinml_fast is built for the CPU only."])
    architectures, notes = choose_architectures(toolkit, environment, strict=wish == "1")
    return Decision(CudaBuild(toolkit, architectures), notes)
