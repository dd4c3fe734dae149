"""Builds the twin of the CUDA ops: csrc/cuda and csrc/torch/*_cuda.cpp compiled for the host, in the CPU's place.

A process that loads it (KINML_TWIN=1: conftest.py) runs the ops' tests on the source of the GPU's kernels, without one:
csrc/cuda/group.h says how far that goes. `python tests/build_twin.py` builds it and prints where it is.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import cmake_build


def build() -> Path:
    """Compile what has changed since the last time; return the library."""
    import torch

    options = {"KINML_WITH_TORCH": "ON", "CMAKE_PREFIX_PATH": torch.utils.cmake_prefix_path}
    return cmake_build.build(["kinml_twin"], **options) / "libkinml_twin.so"


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
