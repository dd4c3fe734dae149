"""What the kernels of csrc/cuda take on a GPU: compiles them as CI does, and compares with the bounds below.

    python scripts/cuda_resources.py                         a table; exit status 1 where a bound is broken
    python scripts/cuda_resources.py --output FOLDER         also FOLDER/resources.json and resources.md
    python scripts/cuda_resources.py csrc/cuda/adam_cuda.cu  only this file

Every warning is an error. The objects are also linked to one shared library, with the CUDA runtime and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import cuda_toolkit

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90", "100")


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
    # Its phases are functions, which are given structures in local memory.
    Bound(r"^ForceKernel<", 255, stack=512),
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


def compile_file(build: cuda_toolkit.CudaBuild, source: Path, output: Path) -> list[Kernel]:
    """Compile one file for all architectures; an error or a warning ends the program."""
    flags = [*build.flags(), *cuda_toolkit.WARNING_FLAGS, "-Xptxas", "-v"]
    command = [build.toolkit.nvcc, *flags, "-c", str(source), "-o", str(output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if not line.startswith(("ptxas info", "    "))]
        raise SystemExit(f"{source}: nvcc fails:\n" + "\n".join(lines))
    return parse(source.name, done.stdout)


def link(build: cuda_toolkit.CudaBuild, objects: list[Path], folder: Path) -> None:
    """Link everything to one library without an undefined symbol."""
    compiler = os.environ.get("CXX", "g++")
    flags = ["-shared", "-Wl,--no-undefined", *build.toolkit.link_flags()]
    command = [compiler, *map(str, objects), "-o", str(folder / "libkinml_cuda.so"), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SystemExit(f"The objects of csrc/cuda do not link:\n{done.stdout}")


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


def report(sources: list[Path], folder: Path) -> list[Kernel]:
    """Compile the sources for the architectures that this nvcc knows, link them, and return what they take."""
    nvcc = cuda_toolkit.find_nvcc()
    if nvcc is None:
        raise SystemExit("There is no nvcc (looked for in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda).")
    toolkit = cuda_toolkit.inspect(nvcc)
    build = cuda_toolkit.CudaBuild(toolkit, tuple(name for name in ARCHITECTURES if name in toolkit.known))
    objects = [folder / f"{source.stem}.o" for source in sources]
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        lists = list(pool.map(lambda pair: compile_file(build, *pair), zip(sources, objects, strict=True)))
    link(build, objects, folder)
    return sorted((k for found in lists for k in found), key=lambda k: (k.file, k.name, int(k.architecture)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="csrc/cuda/*.cu")
    parser.add_argument("--output", type=Path, help="folder for resources.json and resources.md")
    options = parser.parse_args()
    whole = not options.files
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if whole else options.files
    if not whole and ROOT / "csrc" / "cuda" / "launch.cu" not in [path.resolve() for path in sources]:
        sources = [*sources, ROOT / "csrc" / "cuda" / "launch.cu"]  # what all others call
    with tempfile.TemporaryDirectory() as folder:
        kernels = report(sources, Path(folder))
    text = table(kernels)
    sys.stdout.write(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        rows = [asdict(kernel) for kernel in kernels]
        (options.output / "resources.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.output / "resources.md").write_text(text)
    faults = [fault for kernel in kernels for fault in kernel.faults()]
    sys.stdout.write("".join(f"{fault}.\n" for fault in faults))
    sys.stdout.write(f"{len(kernels)} kernels, {len(faults)} beyond the bounds of {Path(__file__).name}\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
