"""What the kernels of csrc/cuda take on a GPU, as nvcc says, and whether that is within the bounds below.

    python scripts/cuda_resources.py                      compiles them, prints a table, writes cuda_resources.json
    python scripts/cuda_resources.py --architectures 90   only for one compute capability, and writes nothing
    python scripts/cuda_resources.py --current            whether cuda_resources.json is of these sources and this nvcc

Exit status 1 where a bound is broken, or the file is not current. Every warning is an error, and the objects are linked
to one shared library, with the CUDA runtime and nothing else. Compiles in KINML_BUILD_DIR, or in build/cuda. With
cuobjdump in PATH instructions are counted too (cuda_counts.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import cmake_build
import cuda_counts
import cuda_toolkit
from cmake_build import ROOT

TABLE = ROOT / "scripts" / "cuda_resources.json"


@dataclass(frozen=True)
class Bound:
    """The most that kernels may take whose name holds `kernel`, a regular expression."""

    kernel: str
    registers: int
    spills: int = 0  # bytes, loads and stores together
    stack: int = 0  # bytes


# The first that fits a kernel holds. Names: AdamStep<double> stands for run<(anonymous namespace)::AdamStep<double>>.
BOUNDS = [
    Bound(r"^probe$", 32),
    Bound(r"^AdamStep<", 64, stack=8),
    # One function but for what is called aside, which is given structures in local memory. Registers are few in
    # float64, and with the tile in the workspace, where addresses take two.
    Bound(r"^ForceKernel<float, .*(true|1)>$", 255, spills=64, stack=1024),
    Bound(r"^ForceKernel<", 255, spills=384, stack=1024),
    # Nodes of a tree that are not yet added, by height (csrc/core/shares.h).
    Bound(r"^(Finish|Nodes)Kernel<", 128, stack=272),
    # Vectors of a cell, one of which is chosen by number; once for each structure.
    Bound(r"^ImageKernel<", 128, stack=256),
    # The library's sort, as it is tuned there: on sm_100 one of its kernels spills 44 bytes.
    Bound(r"^cub::", 255, spills=64),
    # Any other: nothing in local memory, two blocks of 128 threads on a multiprocessor.
    Bound(r"", 255),
]


@dataclass
class Kernel:
    """What ptxas reports of one kernel on one architecture; bytes."""

    file: str
    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0  # static; what a launch asks for comes on top
    constant: int = 0

    def faults(self) -> list[str]:
        """What goes beyond the bounds, in words."""
        bound = next(bound for bound in BOUNDS if re.search(bound.kernel, self.name))
        place = f"{self.name} on sm_{self.architecture} ({self.file})"
        spills = self.spill_stores + self.spill_loads
        found = []
        if self.registers > bound.registers:
            found.append(f"{place} takes {self.registers} registers, more than {bound.registers}")
        if spills > bound.spills:
            found.append(f"{place} spills {spills} bytes of registers, more than {bound.spills}")
        if self.stack > bound.stack + spills:
            found.append(f"{place} has {self.stack} bytes in local memory, more than {bound.stack}")
        return found


def short_name(demangled: str) -> str:
    """The kernel's own name: run<(anonymous namespace)::AdamStep<float>>(...) becomes AdamStep<float>."""
    name = re.sub(r"\(anonymous namespace\)::|kinml::cuda::|kinml::baseline::|kinml::|^void ", "", demangled)
    depth = 0
    for place, letter in enumerate(name):  # without the arguments: up to the first bracket outside of < >
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:place]
            break
    inner = re.fullmatch(r"run<(.*)>", name)
    return (inner[1] if inner else name).replace("> >", ">>").strip()


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names, where there is cu++filt or c++filt."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run([tool, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, (short_name(line) for line in done.stdout.splitlines()), strict=True))


def parse(file: str, report: str) -> list[Kernel]:
    """The kernels of what `nvcc -Xptxas -v` prints."""
    kernels: list[Kernel] = []
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernels.append(Kernel(file, found[1], found[2]))
        elif not kernels:
            continue
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # Of the kernel itself, then of each function that it calls.
            stack, stores, loads = map(int, found.groups())
            kernels[-1].stack = max(kernels[-1].stack, stack)
            kernels[-1].spill_stores += stores
            kernels[-1].spill_loads += loads
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(found[1])
            kernels[-1].shared = sum(map(int, re.findall(r"(\d+) bytes smem", line)))
            kernels[-1].constant = sum(map(int, re.findall(r"(\d+) bytes cmem", line)))
    names = demangle([kernel.name for kernel in kernels])
    for kernel in kernels:
        kernel.name = names[kernel.name]
    return kernels


def table(kernels: list[Kernel]) -> str:
    """The kernels as Markdown."""
    lines = [
        "| kernel | file | sm | registers | spill stores | spill loads | stack | static shared |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for k in kernels:
        name = k.name.replace("|", "\\|")
        numbers = [k.architecture, k.registers, k.spill_stores, k.spill_loads, k.stack, k.shared]
        lines.append(f"| `{name}` | {k.file} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines) + "\n"


def toolkit() -> cuda_toolkit.Toolkit:
    """The toolkit of this machine; there is none: the program ends."""
    nvcc = cuda_toolkit.find_nvcc()
    if nvcc is None:
        raise SystemExit("There is no nvcc (looked for in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda).")
    return cuda_toolkit.inspect(nvcc)


def origin(nvcc: str) -> dict[str, str]:
    """What a table depends on: the version of nvcc, and a hash of all sources and flags that kernels are made from."""
    folders = (ROOT / "csrc" / "core", ROOT / "csrc" / "cuda")
    digest = hashlib.sha256()
    for path in [ROOT / "cmake" / "cuda.cmake", *(path for folder in folders for path in sorted(folder.iterdir()))]:
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return {"nvcc": nvcc, "sources": digest.hexdigest()}


def kept() -> tuple[dict[str, str], list[Kernel]]:
    """The origin and the kernels of cuda_resources.json."""
    content = json.loads(TABLE.read_text())
    return content["origin"], [Kernel(**row) for row in content["kernels"]]


def keep(source: dict[str, str], kernels: list[Kernel], counts: list[cuda_counts.Counts]) -> None:
    """Write cuda_resources.json, a line for each kernel."""
    rows, counted = (",\n".join(json.dumps(asdict(row)) for row in table) for table in (kernels, counts))
    TABLE.write_text(
        f'{{"origin": {json.dumps(source)},\n"kernels": [\n{rows}\n],\n"instructions": [\n{counted}\n]}}\n'
    )


def instructions(folder: Path) -> list[cuda_counts.Counts]:
    """Those of the kernels that were compiled in a folder; none without cuobjdump, or for other architectures."""
    found = []
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        found += cuda_counts.count(source.name, folder / "cuda" / f"{source.stem}.o") or []
    names = demangle([kernel.name for kernel in found])
    for kernel in found:
        kernel.name = names[kernel.name]
    return sorted(found, key=lambda k: (k.file, k.name))


def report(tools: cuda_toolkit.Toolkit, architectures: list[str], folder: Path) -> list[Kernel]:
    """Compile csrc/cuda for the architectures, link it, and return what its kernels take."""
    cmake_build.build(
        ["kinml_cuda_closed"],
        folder,
        KINML_CUDA="ON",
        KINML_CUDA_ARCHS=";".join(architectures),
        KINML_CUDA_REPORT="ON",
        CUDAToolkit_ROOT=str(tools.folder),
    )
    kernels = []
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        kernels += parse(source.name, (folder / "cuda" / f"{source.stem}.txt").read_text())
    return sorted(kernels, key=lambda k: (k.file, k.name, int(k.architecture)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", help="compute capabilities, such as 80;90")
    parser.add_argument("--current", action="store_true", help="say whether cuda_resources.json is current")
    options = parser.parse_args()
    tools = toolkit()
    source = origin(tools.version_text)
    if options.current:
        current = TABLE.is_file() and kept()[0] == source
        state = "is of these sources" if current else "is of other sources: make it anew with scripts/cuda_resources.py"
        sys.stdout.write(f"{TABLE.name} {state}\n")
        return 0 if current else 1
    everything = [name for name in cuda_toolkit.DEFAULT_ARCHITECTURES if name in tools.known]
    architectures = options.architectures.split(";") if options.architectures else everything
    folder = cmake_build.build_folder() if os.environ.get("KINML_BUILD_DIR") else ROOT / "build" / "cuda"
    try:
        kernels = report(tools, architectures, folder)
    except cmake_build.BuildError as error:
        raise SystemExit(str(error)) from None
    sys.stdout.write(table(kernels))
    counts = instructions(folder)
    sys.stdout.write(f"\n{cuda_counts.text(counts)}\n" if counts else "")
    if architectures == everything:
        keep(source, kernels, counts)
    faults = [fault for kernel in kernels for fault in kernel.faults()]
    sys.stdout.write("".join(f"{fault}.\n" for fault in faults))
    sys.stdout.write(f"{len(kernels)} kernels, {len(faults)} beyond the bounds of {Path(__file__).name}\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
