"""Compiles the two libraries of the package, with ninja where there is one.

- ``kinml_fast/libkinml_ops.so``: the ops, linked to libtorch, without Python. Files ``csrc/cpu/*_kernels.cpp`` are
  compiled once per instruction set.
- ``kinml_fast/_C*.so``: build information for Python (pybind11).

torch must be installed already, and stay the same afterwards: ``pip install --no-build-isolation .``
Environment: ``CXX`` the compiler, ``MAX_JOBS`` compilations at a time; ``KINML_CUDA=auto|0|1`` whether to compile
csrc/cuda (auto: where torch has CUDA and there is an nvcc), ``KINML_CUDA_ARCHS`` what for: scripts/cuda_toolkit.py.
CMakeLists.txt builds the same ops library for C++ projects.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "scripts"))

import cuda_toolkit  # noqa: E402
from compiling import CXX_FLAGS, ISA_FLAGS, Build, torch_flags  # noqa: E402

VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "kinml_fast" / "_version.py").read_text())[1]


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


def pybind11_include(cpp_extension) -> str:
    """Folder of pybind11's headers; torch brings them too."""
    try:
        import pybind11
    except ImportError:
        return cpp_extension.include_paths()[0]
    return pybind11.get_include()


def cuda_build(torch) -> cuda_toolkit.CudaBuild | None:
    """How to build csrc/cuda, if at all."""
    try:
        decision = cuda_toolkit.decide(torch.version.cuda)
    except cuda_toolkit.CudaError as error:
        sys.exit(str(error))
    for note in decision.notes:
        sys.stdout.write(f"Note: {note}\n")
    return decision.build


class LibraryBuild(build_ext):
    """Compiles both libraries in one go."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libkinml_ops"):
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        torch, cpp_extension = import_torch()
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            sys.exit(f"No C++ compiler '{compiler}' found: install g++ 11 or newer, or set CXX.")
        cuda = cuda_build(torch)
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        info = {
            "KINML_VERSION": VERSION,
            "KINML_TORCH_VERSION": torch.__version__,
            "KINML_COMPILER": version.splitlines()[0],
            "KINML_ISAS": " ".join(ISA_FLAGS),
            "KINML_CUDA": cuda.text() if cuda else "none",
        }
        cxx = [compiler, *CXX_FLAGS]
        torch_compile, torch_link = torch_flags(torch, cpp_extension)
        python_flags = [
            *("-isystem", sysconfig.get_paths()["include"]),
            *("-isystem", pybind11_include(cpp_extension)),
            *(f'-D{name}="{value}"' for name, value in info.items()),
        ]

        build = Build(Path(self.build_temp))
        objects = []
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            if source.stem.endswith("_kernels"):
                for isa, flags in ISA_FLAGS.items():
                    name = f"{source.stem}_{isa}.o"
                    objects.append(build.compile([*cxx, *flags, f"-DKINML_ISA={isa}"], source, name))
            else:
                objects.append(build.compile(cxx, source, f"{source.stem}.o"))
        for source in sorted((ROOT / "csrc" / "torch").glob("*.cpp")):
            if (source.stem.endswith("_cuda") and cuda is None) or (source.stem == "cpu_only" and cuda is not None):
                continue
            objects.append(build.compile([*cxx, *torch_compile], source, f"torch_{source.stem}.o"))
        # -fopenmp is not given at link time: the OpenMP runtime is the one that libtorch brings, so that there is
        # one pool of threads and torch.set_num_threads governs it.
        link = torch_link
        if cuda is not None:
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
                objects.append(build.compile([cuda.toolkit.nvcc, *cuda.flags()], source, f"cuda_{source.stem}.o"))
            link = [*torch_link, *cuda.toolkit.link_flags()]
        build.link(compiler, objects, "libkinml_ops.so", link)
        module = build.compile(
            [*cxx, *torch_compile[:1], *python_flags], ROOT / "csrc" / "python" / "module.cpp", "module.o"
        )
        build.link(compiler, [module, "dispatch.o"], "_C.so", [])
        if not build.run():
            sys.exit("kinml_fast could not be compiled: see the compiler's message above.")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(build.folder / f"{extension.name.split('.')[-1]}.so", target)


setup(
    ext_modules=[Extension("kinml_fast.libkinml_ops", []), Extension("kinml_fast._C", [])],
    cmdclass={"build_ext": LibraryBuild},
)
