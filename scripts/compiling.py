"""Compiler flags, and commands run by ninja or by themselves: for setup.py and tests/build_twin.py."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Kernels throw nothing; without exceptions their objects hold no symbol that the linker could merge.
ISA_FLAGS = {"baseline": ["-fno-exceptions"]}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-fno-exceptions", "-march=x86-64-v3"]
    ISA_FLAGS["avx512"] = ["-fno-exceptions", "-march=x86-64-v4", "-mprefer-vector-width=512"]

# No -ffast-math: results must not depend on how the compiler reorders sums.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]


def torch_flags(torch, cpp_extension) -> tuple[list[str], list[str]]:
    """Return what the installed torch needs to compile and to link with it."""
    folders = cpp_extension.library_paths()
    compile_flags = [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    for folder in cpp_extension.include_paths():
        compile_flags += ["-isystem", folder]
    # libtorch has no symbol of its own and brings libtorch_cuda where there is one.
    whole = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    link_flags = [*(f"-L{folder}" for folder in folders), *whole, "-ltorch_cpu", "-lc10"]
    # Beside the installed package first, then where torch is now (for builds in place).
    return compile_flags, link_flags + [f"-Wl,-rpath,{folder}" for folder in ("$ORIGIN/../torch/lib", *folders)]


@dataclass(frozen=True)
class Command:
    words: list[str]
    inputs: list[Path]
    output: str
    compiles: bool


class Build:
    """Commands that make files in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.commands: list[Command] = []

    def compile(self, compiler: list[str], source: Path, output: str) -> str:
        """Compile source to output with the compiler and flags given; return output."""
        words = [*compiler, "-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", output]
        self.commands.append(Command(words, [source], output, True))
        return output

    def link(self, compiler: str, objects: list[str], output: str, flags: list[str]) -> str:
        """Link objects to a shared library."""
        words = [compiler, "-shared", *objects, "-o", output, *flags]
        self.commands.append(Command(words, [self.folder / name for name in objects], output, False))
        return output

    def run(self) -> bool:
        """Whether all went well. MAX_JOBS: commands at a time."""
        jobs = os.environ.get("MAX_JOBS")
        if importlib.util.find_spec("ninja") is not None:
            ninja = [sys.executable, "-m", "ninja"]
        elif shutil.which("ninja") is not None:
            ninja = ["ninja"]
        else:
            return self._run_without_ninja(int(jobs or os.cpu_count() or 1))
        self._write_ninja()
        return subprocess.run([*ninja, "-C", str(self.folder), *(["-j", jobs] if jobs else [])]).returncode == 0

    def _write_ninja(self) -> None:
        def escaped(path: object) -> str:
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        lines = ["ninja_required_version = 1.8"]
        for rule, extra in (("compile", ["  depfile = $out.d", "  deps = gcc"]), ("link", [])):
            lines += [f"rule {rule}", "  command = $words", f"  description = {rule} $out", *extra]
        for command in self.commands:
            rule = "compile" if command.compiles else "link"
            inputs = [path.name if path.parent == self.folder else path for path in command.inputs]
            lines.append(f"build {escaped(command.output)}: {rule} {' '.join(map(escaped, inputs))}")
            lines.append(f"  words = {shlex.join(command.words).replace('$', '$$')}")
        (self.folder / "build.ninja").write_text("\n".join(lines) + "\n")

    def _run_without_ninja(self, jobs: int) -> bool:
        def run(command: Command) -> bool:
            sys.stdout.write(f"{'compile' if command.compiles else 'link'} {command.output}\n")
            sys.stdout.flush()
            return subprocess.run(command.words, cwd=self.folder).returncode == 0

        with ThreadPoolExecutor(jobs) as pool:
            compiled = all(list(pool.map(run, [command for command in self.commands if command.compiles])))
        return compiled and all(run(command) for command in self.commands if not command.compiles)
