"""Builds the twin of the CUDA ops: csrc/cuda and csrc/torch/*_cuda.cpp compiled for the host, in the CPU's place.

A process that loads it (KINML_TWIN=1: conftest.py) runs the ops' tests on the source of the GPU's kernels, without one:
csrc/cuda/group.h says how far that goes. `python tests/build_twin.py` builds it and prints where it is.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from compiling import CXX_FLAGS, ROOT, Build, torch_flags

# The kernels' steps are loops here: without optimisation they take minutes.
FLAGS = [*(flag for flag in CXX_FLAGS if flag not in ("-O3", "-fopenmp")), "-O2", "-DKINML_TWIN"]


def build(folder: Path = ROOT / "build" / "twin") -> Path:
    """Compile what has changed since the last time; return the library."""
    import torch
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "g++")
    torch_compile, torch_link = torch_flags(torch, cpp_extension)
    commands = Build(folder)
    objects = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        objects.append(commands.compile([compiler, *FLAGS, "-x", "c++"], source, f"cuda_{source.stem}.o"))
    for source in sorted((ROOT / "csrc" / "torch").glob("*_cuda.cpp")):
        objects.append(commands.compile([compiler, *FLAGS, *torch_compile], source, f"torch_{source.stem}.o"))
    commands.link(compiler, objects, "libkinml_twin.so", torch_link)
    if not commands.run():
        raise RuntimeError("The twin of the CUDA ops could not be compiled: see the compiler's message above.")
    return commands.folder / "libkinml_twin.so"


def load() -> Path:
    """Build the library and load it into this process, over the CPU's ops; return it."""
    import torch

    import kinml_fast.ops  # noqa: F401  the ops that it replaces

    library = build()
    torch.ops.load_library(library)
    return library


def replaced_ops() -> list[str]:
    """Names of the ops whose CPU kernel in this process is the twin's."""
    import torch

    names = sorted(
        {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("kinml_fast::")}
    )
    # _dispatch_dump has a line for each key: "CPU: registered at .../adam_ops_cuda.cpp:34 :: ..."
    return [
        name.removeprefix("kinml_fast::")
        for name in names
        if re.search(r"^CPU: registered at [^\n]*_cuda\.cpp", torch._C._dispatch_dump(name), re.MULTILINE)
    ]


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
