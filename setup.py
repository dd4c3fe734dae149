"""Compiles the two libraries of the package with ninja.

- ``kinml_fast/libkinml_ops.so``: the ops, linked to libtorch, without Python. Files ``csrc/cpu/*_kernels.cpp`` are
  compiled once per instruction set.
- ``kinml_fast/_C*.so``: build information for Python (pybind11).

torch must be installed already, and stay the same afterwards: ``pip install --no-build-isolation .``
Environment: ``CXX`` the compiler, ``KINML_CUDA=auto|0|1`` whether to compile csrc/cuda, ``KINML_CUDA_ARCHS``,
``MAX_JOBS`` compilations at a time. CMakeLists.txt builds the same ops library for C++ projects.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "kinml_fast" / "_version.py").read_text())[1]

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


def import_torch():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit(
            "kinml_fast is compiled against the installed torch, and there is none in this environment: install torch "
            "first (for example 'pip install torch==2.13.0'), then 'pip install --no-build-isolation .'."
        )
    return torch, cpp_extension


def cuda_sources() -> list[Path]:
    """CUDA files to compile: those of csrc/cuda, if KINML_CUDA and the machine allow."""
    wish = os.environ.get("KINML_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"KINML_CUDA must be auto, 0 or 1, not '{wish}'.")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if wish == "1" and not sources:
        sys.exit(f"KINML_CUDA=1, but kinml_fast {VERSION} has no CUDA kernels yet: unset it to build for the CPU.")
    return [] if wish == "0" else sources


class NinjaBuild(build_ext):
    """Writes one build.ninja for both libraries and runs it."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libkinml_ops"):
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        torch, cpp_extension = import_torch()
        import pybind11

        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            sys.exit(f"No C++ compiler '{compiler}' found: install g++ 11 or newer, or set CXX.")
        if cuda_sources():
            sys.exit("csrc/cuda has sources that this setup.py does not know how to build.")
        torch_includes = [f"-isystem {path}" for path in cpp_extension.include_paths()]
        torch_libraries = cpp_extension.library_paths()
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        info = {
            "KINML_VERSION": VERSION,
            "KINML_TORCH_VERSION": torch.__version__,
            "KINML_COMPILER": version.splitlines()[0],
            "KINML_ISAS": " ".join(ISA_FLAGS),
            "KINML_CUDA": "none",
        }
        python_flags = [
            f"-isystem {sysconfig.get_paths()['include']}",
            f"-isystem {pybind11.get_include()}",
            *(f"'-D{name}=\"{value}\"'" for name, value in info.items()),
        ]

        temporary = Path(self.build_temp).resolve()
        temporary.mkdir(parents=True, exist_ok=True)
        lines = [
            "ninja_required_version = 1.8",
            f"cxx = {compiler}",
            f"cxxflags = {' '.join(CXX_FLAGS)}",
            "rule cxx",
            "  command = $cxx $cxxflags $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link",
            "  command = $cxx -shared $in -o $out $flags",
            "  description = link $out",
        ]

        def compile_rule(source: Path, name: str, flags: list[str]) -> str:
            lines.append(f"build {name}: cxx {source}\n  flags = {' '.join(flags)}")
            return name

        objects = []
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            if source.stem.endswith("_kernels"):
                for isa, flags in ISA_FLAGS.items():
                    objects.append(compile_rule(source, f"{source.stem}_{isa}.o", [*flags, f"-DKINML_ISA={isa}"]))
            else:
                objects.append(compile_rule(source, f"{source.stem}.o", []))
        for source in sorted((ROOT / "csrc" / "torch").glob("*.cpp")):
            objects.append(compile_rule(source, f"torch_{source.stem}.o", [abi, *torch_includes]))
        module = compile_rule(ROOT / "csrc" / "python" / "module.cpp", "module.o", [abi, *python_flags])

        # -fopenmp is not given at link time: the OpenMP runtime is the one that libtorch brings, so that there is
        # one pool of threads and torch.set_num_threads governs it.
        link = [*(f"-L{path}" for path in torch_libraries), "-ltorch", "-ltorch_cpu", "-lc10"]
        # Beside the installed package first, then where torch is now (for builds in place).
        link += [f"-Wl,-rpath,'{path}'" for path in ("$$ORIGIN/../torch/lib", *torch_libraries)]
        lines.append(f"build libkinml_ops.so: link {' '.join(objects)}\n  flags = {' '.join(link)}")
        lines.append(f"build _C.so: link {module} dispatch.o\n  flags =")
        lines.append("default libkinml_ops.so _C.so\n")
        (temporary / "build.ninja").write_text("\n".join(lines))

        command = [sys.executable, "-m", "ninja", "-C", str(temporary)]
        if "MAX_JOBS" in os.environ:
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode != 0:
            sys.exit("kinml_fast could not be compiled: see the compiler's message above.")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(temporary / f"{extension.name.split('.')[-1]}.so", target)


setup(
    ext_modules=[Extension("kinml_fast.libkinml_ops", []), Extension("kinml_fast._C", [])],
    cmdclass={"build_ext": NinjaBuild},
)
