"""The house rules that a reader cannot see in one file: which layer may use which."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kinml_fast"
CSRC = ROOT / "csrc"

LAYERS = [
    {"errors", "lock", "units", "metrics", "signals", "_version"},
    {"_library", "external"},
    {"devices"},
    {"ops"},
    {"nn"},
    {"data", "datasets"},
    {"report"},
    {"deploy"},
    {"kinetics"},
    {"train"},
    {"explore"},
    {"cli", "__main__"},
    {"pykinml"},
]
"""Parts of kinml_fast, lowest first. A module imports from its own layer and from those below."""

LATE = {
    "aevmod": "optional",
    "dftd3": "optional",
    "kinbot": "optional",
    "openmm": "optional",
    "pyscf": "optional",
    "sella": "optional",
    "tblite": "optional",
    "matplotlib": "takes half a second, and only drawing needs it",
    "rich": "only a terminal needs it",
    "tensorboard": "only a run's event file needs it",
}
"""Packages that may be imported inside functions, and why; everything else is imported at the top of a module."""

LATE_IN = {
    "__init__.py": "torch and ASE are imported when the calculator is asked for",
    "_library.py": "says in a sentence why the compiled module cannot be imported",
    "cli.py": "--help and mistakes are answered without waiting for torch",
    "deploy/export.py": "metatomic is optional",
    "explore/calculators.py": "processes that label by other programs do without torch and its memory",
    "nn/repulsion.py": "scripts/gpu_check.sh runs the tests of the ops without ASE",
}
"""Modules whose functions may import anything, and why."""


def test_every_package_is_installed():
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.S)
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    assert set(re.findall(r'"(.*?)"', listed.group(1))) == folders


REFERENCE_IMPORTS = {"torch", *sys.stdlib_module_names}

INCLUDES = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "torch": {"core", "cpu", "cuda", "torch"},
    "md": {"core", "cpu", "md"},
}
"""Folders of csrc from which a folder may include headers."""

SYSTEM_HEADERS = {
    "core": set(),
    "cpu": {"immintrin.h", "omp.h"},
    "cuda": {
        *("cuda_runtime.h", "cuda_runtime_api.h", "cub/device/device_radix_sort.cuh"),
        *("linux/futex.h", "sys/syscall.h", "unistd.h"),
    },
}
"""Headers besides the standard library's that a torch-free folder may include."""

ONLY_IN = {
    "immintrin.h": "cpu/simd.h",
    "omp.h": "cpu/parallel.h",
    "thread": "cpu/parallel.h or cuda/group_threads.h",
    "linux/futex.h": "cuda/group_threads.h",
    "sys/syscall.h": "cuda/group_threads.h",
    "unistd.h": "cuda/group_threads.h",
    "cub/device/device_radix_sort.cuh": "cuda/sort.cu",
}
"""One file owns the intrinsics, one the threads, one the library that sorts, one lanes that are threads."""


class Import(NamedTuple):
    """One name that a module imports: "kinml_fast.data.sqlite", "numpy"."""

    line: int
    name: str
    late: bool
    """Whether it is inside a function."""


def imports(tree: ast.AST, package: tuple[str, ...], late: bool = False) -> list[Import]:
    """Return all that a module of ``package`` imports, at its top, for type checkers only, or inside functions."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = [*base, *([node.module] if node.module else [])]
            found += [Import(node.lineno, ".".join([*stem, alias.name]), late) for alias in node.names]
        else:
            found += imports(node, package, late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return found


def circle(sources: Mapping[str, str]) -> list[str]:
    """Return modules that import each other in a circle, wherever they do so; none if there is no such.

    ``sources`` are the modules by dotted name; a package has the name of its folder.
    """
    packages = {name.rpartition(".")[0] for name in sources}
    uses = {}
    for name, source in sources.items():
        package = name if name in packages else name.rpartition(".")[0]
        targets = [found.name for found in imports(ast.parse(source), tuple(package.split(".")))]
        # What follows `import` is a module, or something in one.
        modules = {target if target in sources else target.rpartition(".")[0] for target in targets}
        uses[name] = modules & sources.keys() - {name}
    try:
        TopologicalSorter(uses).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def module_name(path: Path) -> str:
    """Return the dotted name of a module; ``path`` is relative to the package."""
    return ".".join(["kinml_fast", *path.with_suffix("").parts]).removesuffix(".__init__")


def level(part: str) -> int | None:
    """Return the layer of a part of kinml_fast ("nn", "errors"), None where it has none."""
    return next((n for n, parts in enumerate(LAYERS) if part in parts), None)


def python_faults(path: Path, source: str) -> list[str]:
    """Return what is wrong with a module of kinml_fast; ``path`` is relative to the package."""
    part = path.parts[0].removesuffix(".py")
    tree = ast.parse(source)
    faults = []
    if part not in {"__init__", "reference"} and level(part) is None:
        faults.append(f"{path}: {part} has no layer: give it one in tests/test_layers.py")
    for line, name, late in imports(tree, ("kinml_fast", *path.parent.parts)):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if part == "reference":
            if top not in REFERENCE_IMPORTS:
                faults.append(f"{path}:{line}: imports {name}, but reference.py imports only torch")
        elif top == "kinml_fast" and other == "pykinml" and part != "pykinml":
            faults.append(f"{path}:{line}: imports {name}, which only kinml_fast.pykinml may")
        elif late and top not in LATE and path.as_posix() not in LATE_IN:
            faults.append(f"{path}:{line}: imports {name} inside a function, which only what stands in LATE may be")
        elif top == "kinml_fast" and None not in (level(part), level(other)) and level(other) > level(part):
            faults.append(f"{path}:{line}: imports {name}, but {other} is above {part}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            faults.append(f"{path}:{node.lineno}: calls print, use logging")
    return faults


def without_comments(source: str) -> str:
    """Return C++ source with its comments blanked and its lines kept."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), source, flags=re.DOTALL)


def csrc_faults(path: Path, source: str) -> list[str]:
    """Return what is wrong with a file of csrc; ``path`` is relative to csrc."""
    folder = path.parts[0]
    faults = []
    for number, line in enumerate(without_comments(source).splitlines(), start=1):
        if re.search(r"\bTORCH_LIBRARY(_FRAGMENT)?\s*\(", line) and path.as_posix() != "torch/schema.cpp":
            faults.append(f"{path}:{number}: declares ops, which only torch/schema.cpp may")
        include = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line)
        if not include or folder not in INCLUDES:
            continue
        quote, name = include.groups()
        if name in ONLY_IN and path.as_posix() not in ONLY_IN[name].split(" or ") and folder in SYSTEM_HEADERS:
            faults.append(f"{path}:{number}: includes {name}, which only {ONLY_IN[name]} may")
        if quote == '"':
            # Paths are relative to the including file or to csrc itself.
            local = (CSRC / path.parent / name).resolve()
            other = local.relative_to(CSRC).parts[0] if local.is_file() else name.split("/")[0]
            if other not in INCLUDES[folder]:
                faults.append(f"{path}:{number}: includes {name}, but {folder} sees only {sorted(INCLUDES[folder])}")
        elif folder in SYSTEM_HEADERS and re.search(r"[./]", name) and name not in SYSTEM_HEADERS[folder]:
            faults.append(f"{path}:{number}: includes {name}, but {folder} sees only the standard library")
    return faults


def relative_files(root: Path, *suffixes: str) -> list[Path]:
    """Return the files below ``root`` with one of ``suffixes``, relative to it."""
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.suffix in suffixes)


@pytest.mark.parametrize("path", relative_files(PACKAGE, ".py"), ids=str)
def test_python_module_keeps_the_rules(path):
    assert python_faults(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


def test_no_modules_import_each_other():
    sources = {
        module_name(path): (PACKAGE / path).read_text(encoding="utf-8") for path in relative_files(PACKAGE, ".py")
    }
    assert circle(sources | {"kinml_fast._C": ""}) == []


def test_the_tests_of_the_ops_need_neither_ase_nor_pydantic():
    """A machine that lends a GPU may have nothing but torch, numpy and pytest: scripts/gpu_check.sh."""
    code = """
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ase", "pydantic"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
for topic in ("adam", "aev", "forces", "levels", "networks", "shared"):
    importlib.import_module(f"test_ops_{topic}")
"""
    # The package that these tests import, which may be an installed one: then that of this tree is not compiled.
    where = Path(importlib.util.find_spec("kinml_fast").origin).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(where)])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr


def test_what_may_be_imported_late_is():
    trees = {path.as_posix(): ast.parse((PACKAGE / path).read_text()) for path in relative_files(PACKAGE, ".py")}
    late = {
        path: [found.name.split(".")[0] for found in imports(tree, ()) if found.late] for path, tree in trees.items()
    }
    assert set(LATE) <= {name for names in late.values() for name in names}
    assert all(late[path] for path in LATE_IN)


@pytest.mark.parametrize("path", relative_files(CSRC, ".h", ".cpp", ".cu", ".cuh"), ids=str)
def test_csrc_file_keeps_the_rules(path):
    assert csrc_faults(path, (CSRC / path).read_text(encoding="utf-8")) == []


def test_the_files_were_found():
    assert len(relative_files(PACKAGE, ".py")) > 5
    assert len(relative_files(CSRC, ".h", ".cpp", ".cu", ".cuh")) > 5


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("nn/aev.py", "import kinml_fast.train.trainer", "train is above nn"),
        ("nn/aev.py", "from kinml_fast import data", "data is above nn"),
        (
            "nn/aev.py",
            "if TYPE_CHECKING:\n    from ..train import trainer",
            "aev.py:2: imports kinml_fast.train.trainer",
        ),
        ("deploy/evaluate.py", "from kinml_fast.train import config", "train is above deploy"),
        ("report.py", "from kinml_fast.deploy import members", "deploy is above report"),
        (
            "train/runs.py",
            "def f():\n    from . import ensembles",
            "runs.py:2: imports kinml_fast.train.ensembles inside a",
        ),
        (
            "nn/aev.py",
            "class A:\n    def f(self):\n        if self:\n            import torch",
            "aev.py:4: imports torch ins",
        ),
        ("errors.py", "from kinml_fast.ops import aev", "ops is above errors"),
        ("train/trainer.py", "from kinml_fast.cli import main", "cli is above train"),
        ("__init__.py", "from kinml_fast.pykinml import prepper", "only kinml_fast.pykinml may"),
        ("cli.py", "import kinml_fast.pykinml", "only kinml_fast.pykinml may"),
        ("reference.py", "import numpy as np", "reference.py imports only torch"),
        ("reference.py", "from .ops import aev", "reference.py imports only torch"),
        ("data/xyz.py", "def f():\n    print(1)", "xyz.py:2: calls print"),
        ("newcomer.py", "", "has no layer"),
    ],
)
def test_python_faults_are_seen(path, source, fault):
    (found,) = python_faults(Path(path), source)
    assert fault in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train/trainer.py", "from kinml_fast import nn\nfrom ..data import sqlite\nfrom . import config"),
        ("deploy/low_level.py", "def f():\n    from tblite.ase import TBLite"),
        ("cli.py", "def f():\n    from kinml_fast.train import runs"),
        ("train/runs.py", "from kinml_fast.deploy import evaluate"),
        ("pykinml/prepper.py", "from kinml_fast.pykinml import trpes\nfrom kinml_fast.train import trainer"),
        ("reference.py", "import math\nimport torch.nn.functional as F\nfrom torch import Tensor"),
        ("data/xyz.py", '"""Never print("this")."""\nlog.info("print(1)")'),
    ],
)
def test_python_rules_allow(path, source):
    assert python_faults(Path(path), source) == []


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"k.a": "import k.b", "k.b": "import k.c", "k.c": ""}, set()),
        ({"k.a": "from k import b", "k.b": "from k.a import f"}, {"k.a", "k.b"}),
        ({"k.a": "import k.b", "k.b": "def f():\n    from . import a"}, {"k.a", "k.b"}),
        ({"k.a": "if TYPE_CHECKING:\n    import k.b", "k.b": "import k.a"}, {"k.a", "k.b"}),
        ({"k": "from k.a import f", "k.a": "from k import b", "k.b": ""}, set()),  # k.b is another module than k
        ({"k": "from k.a import f", "k.a": "from k import f"}, {"k", "k.a"}),
        ({"k.a": "import k.b", "k.b": "import k.c", "k.c": "import k.d", "k.d": "import k.b"}, {"k.b", "k.c", "k.d"}),
    ],
)
def test_circles_are_seen(sources, found):
    assert set(circle(sources)) == found


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("core/mlp.h", "#include <torch/torch.h>", "core sees only the standard library"),
        ("core/mlp.h", '\n#include "../cpu/simd.h"', "mlp.h:2: includes ../cpu/simd.h"),
        ("core/mlp.h", "#include <cuda_runtime.h>", "core sees only the standard library"),
        ("cpu/aev_cpu.cpp", '#include "torch/checks.h"', "cpu sees only"),
        ("cpu/aev_cpu.cpp", '#include "../cuda/launch.h"', "cpu sees only"),
        ("cpu/aev_cpu.cpp", "#include <immintrin.h>", "only cpu/simd.h may"),
        ("cpu/aev_cpu.cpp", "#include <thread>", "only cpu/parallel.h or cuda/group_threads.h may"),
        ("cuda/aev_cuda.cu", '#include "cpu/parallel.h"', "cuda sees only"),
        ("cuda/aev_cuda.cu", "#include <ATen/ATen.h>", "cuda sees only the standard library"),
        ("torch/ops_cpu.cpp", "TORCH_LIBRARY(kinml, m) {}", "only torch/schema.cpp may"),
    ],
)
def test_csrc_faults_are_seen(path, source, fault):
    (found,) = csrc_faults(Path(path), source)
    assert fault in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/mlp.h", '#include <cmath>\n// #include <torch/torch.h>\n/*\n#include "cpu/simd.h"\n*/'),
        ("cpu/aev_cpu.cpp", '#include "core/config.h"\n#include "../core/config.h"\n#include "simd.h"'),
        ("cuda/aev_cuda.cu", "#include <cuda_runtime.h>\n#include <cstdint>"),
        (
            "torch/ops_cpu.cpp",
            '#include <ATen/ATen.h>\n#include "cpu/simd.h"\nTORCH_LIBRARY_IMPL(kinml, CPU, m) {}',
        ),
        ("torch/schema.cpp", "TORCH_LIBRARY(kinml, m) {}"),
    ],
)
def test_csrc_rules_allow(path, source):
    assert csrc_faults(Path(path), source) == []
