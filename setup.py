"""Compiles the libraries of the package: targets of CMakeLists.txt, in the folder that KINML_BUILD_DIR names.

- ``kinml_fast/libkinml_ops.so``: the ops, linked to libtorch, without Python.
- ``kinml_fast/libkinml_md.so``: models for MD codes, without torch; sources of the plugin for LAMMPS are beside it.
- ``kinml_fast/_C*.so``: build information for Python (pybind11).

torch must be installed already, and stay the same afterwards: ``pip install --no-build-isolation .``
Environment: ``KINML_CUDA=auto|0|1`` whether to compile csrc/cuda (auto: where torch has CUDA and there is an nvcc),
``KINML_CUDA_ARCHS`` what for: scripts/cuda_toolkit.py; ``CXX``, ``MAX_JOBS``: scripts/cmake_build.py.
"""

import importlib.metadata
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "scripts"))

import cmake_build  # noqa: E402
import cuda_toolkit  # noqa: E402


def torch_requirement() -> str:
    """What is compiled against one torch runs with no other, and says so; sources fit any that is new enough."""
    if "sdist" not in sys.argv:
        try:
            return f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
        except importlib.metadata.PackageNotFoundError:
            pass
    return "torch>=2.8"


def import_torch():
    try:
        import torch
    except ImportError:
        sys.exit(
            "kinml_fast is compiled against the installed torch, and there is none in this environment: install torch "
            "first (for example 'pip install torch==2.13.0'), then 'pip install --no-build-isolation .'."
        )
    return torch


def pybind11_include(torch) -> str:
    """Folder of pybind11's headers; torch brings them too."""
    try:
        import pybind11
    except ImportError:
        return str(Path(torch.__file__).parent / "include")
    return pybind11.get_include()


def cuda_options(torch) -> dict[str, str]:
    """How to build csrc/cuda, if at all, as CMake's options."""
    decision = cuda_toolkit.decide(torch.version.cuda)
    for note in decision.notes:
        sys.stdout.write(f"Note: {note}\n")
    if decision.build is None:
        return {"KINML_CUDA": "OFF", "KINML_CUDA_TEXT": "none"}
    return {
        "KINML_CUDA": "ON",
        "KINML_CUDA_ARCHS": ";".join(decision.build.architectures),
        "KINML_CUDA_TEXT": decision.build.text(),
        "CUDAToolkit_ROOT": str(decision.build.toolkit.folder),
    }


LIBRARIES = ("libkinml_ops", "libkinml_md")


class LibraryBuild(build_ext):
    """Compiles all libraries in one go."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith(LIBRARIES):
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        torch = import_torch()
        try:
            folder = cmake_build.build(
                ["kinml_ops", "kinml_md", "kinml_python"],
                KINML_WITH_TORCH="ON",
                KINML_TORCH_VERSION=torch.__version__,
                KINML_PYTHON_INCLUDE=f"{sysconfig.get_paths()['include']};{pybind11_include(torch)}",
                CMAKE_PREFIX_PATH=torch.utils.cmake_prefix_path,
                **cuda_options(torch),
            )
        except (cmake_build.BuildError, cuda_toolkit.CudaError) as error:
            sys.exit(str(error))
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / f"{extension.name.split('.')[-1]}.so", target)
        if not self.inplace:  # there, csrc is at hand
            for source in [ROOT / "csrc/md/kinml.h", *(ROOT / "csrc/md/lammps").glob("*.[hc]*")]:
                target = Path(self.build_lib) / "kinml_fast/md" / source.relative_to(ROOT / "csrc/md")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)


setup(
    ext_modules=[Extension(f"kinml_fast.{name}", []) for name in (*LIBRARIES, "_C")],
    cmdclass={"build_ext": LibraryBuild},
    install_requires=[
        torch_requirement(),
        "numpy>=1.26",
        "scipy>=1.10",
        "ase>=3.23",
        "h5py>=3.10",
        "matplotlib>=3.8",
        "pydantic>=2.7",
        "PyYAML>=6.0",
        "rich>=13",
        "tensorboard>=2.15",
    ],
)
