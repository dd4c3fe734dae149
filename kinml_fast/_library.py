"""Loads the compiled ops, once, and says clearly why when that fails."""

from __future__ import annotations

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
        raise ImportError(
            f"kinml_fast is not compiled for this Python ({error}). Install it with: pip install --no-build-isolation ."
            " (or, in a clone: python setup.py build_ext --inplace)"
        ) from error
    built_for = _C.build_info()["torch"]
    if built_for.split("+")[0] != torch.__version__.split("+")[0]:
        raise ImportError(f"kinml_fast was compiled for torch {built_for}, but this is {torch.__version__}. {_REMEDY}")
    library = _FOLDER / "libkinml_ops.so"
    if not library.exists():
        raise ImportError(f"kinml_fast's ops library is missing: {library}. {_REMEDY}")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ImportError(f"kinml_fast's ops library does not load ({reason}). {_REMEDY}") from error


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
