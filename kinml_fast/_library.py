"""Loads the compiled ops, once, and says clearly why when that fails."""

from __future__ import annotations

import filecmp
import functools
import hashlib
import os
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_ISAS = ("baseline", "avx2", "avx512")
_REMEDY = (
    "Reinstall it against this torch: pip install --no-build-isolation --force-reinstall --no-deps <kinml_fast folder>"
)


def _load() -> None:
    wish = os.environ.get("KINML_CPU_ISA")
    if wish not in (None, *_ISAS):
        raise ImportError(f"The environment variable KINML_CPU_ISA is '{wish}': set it to one of {', '.join(_ISAS)}.")
    try:
        from kinml_fast import _C
    except ImportError as error:
        remedy = "Install it with: pip install --no-build-isolation ."
        if (_FOLDER.parent / "setup.py").exists():
            remedy = (
                "This is a clone's folder: run Python in another one, where it finds what is installed, or compile "
                "here: python setup.py build_ext --inplace"
            )
        raise ImportError(f"kinml_fast is not compiled for this Python ({error}). {remedy}") from error
    built_for = _C.build_info()["torch"]
    if built_for.split("+")[0] != torch.__version__.split("+")[0]:
        raise ImportError(f"kinml_fast was compiled for torch {built_for}, but this is {torch.__version__}. {_REMEDY}")
    library = _FOLDER / "libkinml_ops.so"
    if not library.exists():
        raise ImportError(f"kinml_fast's ops library is missing: {library}. {_REMEDY}")
    other = _loaded_before()
    if other is not None and filecmp.cmp(other, library, shallow=False):
        return
    if other is not None:
        raise ImportError(
            f"The ops of another kinml_fast are loaded already, from {other}: import kinml_fast before what loads "
            "them, or export that model again"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ImportError(f"kinml_fast's ops library does not load ({reason}). {_REMEDY}") from error


def _loaded_before() -> Path | None:
    """An ops library that something else has loaded in this process: metatomic loads the copy beside a model."""
    if not hasattr(torch.ops.kinml_fast, "energy_forces"):
        return None
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        paths = {Path(line.split(maxsplit=5)[5].rstrip("\n")) for line in maps if "libkinml_ops" in line}
    return min((path for path in paths if str(path) not in torch.ops.loaded_libraries), default=None)


def library_path() -> Path:
    """The ops library: C++ programs load it (dlopen) before they load a scripted model."""
    return _FOLDER / "libkinml_ops.so"


def build_info() -> dict[str, str]:
    """What this installation was built with and what it uses here: versions, compiler, instruction sets, CUDA."""
    from kinml_fast import _C

    return {**_C.build_info(), "instruction set in use": _C.cpu_isa()}


@functools.cache
def identity() -> dict[str, str]:
    """What must be alike where several processes are to have the same bits: versions, sources, instruction set."""
    found = {
        "kinml_fast": build_info()["version"],
        "torch": torch.__version__,
        "instruction set": build_info()["instruction set in use"],
    }
    for what, suffix in (("digest of the sources", "py"), ("digest of the compiled ops", "so")):
        digest = hashlib.sha256()
        for path in sorted(_FOLDER.rglob(f"*.{suffix}")):
            digest.update(f"{path.relative_to(_FOLDER)} ".encode() + path.read_bytes())
        found[what] = digest.hexdigest()[:12]
    return found


_load()
