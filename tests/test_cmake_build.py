"""How setup.py, the tests and the scripts build: one project, one folder, one sentence where something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cmake_build
import pytest
from cmake_build import BuildError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with one library, in the place of the true one, and a build folder of its own; return its source."""
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("needs cmake and g++")
    folder = tmp_path / "a project"
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.21)\nproject(p LANGUAGES CXX)\nadd_library(a SHARED ${KIND}.cpp)\n"
    )
    (folder / "good.cpp").write_text("int a() { return 1; }\n")
    (folder / "bad.cpp").write_text("int b( { }\n")
    monkeypatch.setattr(cmake_build, "ROOT", folder)
    monkeypatch.setenv("KINML_BUILD_DIR", str(tmp_path / "build folder"))
    monkeypatch.setenv("CXX", "g++")
    return folder


def hide(monkeypatch, *names: str) -> None:
    """Let programs not be found."""
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name in names else which(name, path=path))


@pytest.mark.parametrize("missing", [(), ("ninja",)])
def test_the_same_comes_out_with_ninja_and_without(project, monkeypatch, capfd, missing):
    if missing and shutil.which("make") is None:
        pytest.skip("needs make")
    hide(monkeypatch, *missing)
    folder = cmake_build.build(["a"], KIND="good")
    assert folder == project.parent / "build folder"
    assert (folder / "liba.so").is_file()

    # What is not named stays, and what has not changed is not compiled again.
    before = (folder / "liba.so").stat().st_mtime_ns
    cmake_build.build([])
    assert (folder / "liba.so").stat().st_mtime_ns == before

    with pytest.raises(BuildError, match=r"^kinml_fast could not be compiled: see the message above\.$"):
        cmake_build.build(["a"], KIND="bad")
    assert "error: " in "".join(capfd.readouterr())


def test_a_folder_of_another_tree_is_begun_anew(project, monkeypatch):
    """Such as that of a source distribution, which pip unpacks somewhere else each time."""
    cmake_build.build(["a"], KIND="good")
    other = shutil.copytree(project, project.parent / "other")
    monkeypatch.setattr(cmake_build, "ROOT", other)
    (other / "good.cpp").write_text("int other() { return 2; }\n")
    library = cmake_build.build(["a"], KIND="good") / "liba.so"
    assert b"other" in library.read_bytes()


def test_a_folder_of_another_compiler_is_begun_anew(project, monkeypatch):
    cmake_build.build(["a"], KIND="good")
    other = project.parent / "other-g++"
    other.write_text('#!/bin/sh\nexec g++ "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    folder = cmake_build.build(["a"], KIND="good")
    assert f"={other}\n" in (folder / "CMakeCache.txt").read_text()


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("g++", "No C++ compiler 'g++' found: install g++ 11 or newer, or set CXX."),
        ("cmake", "No CMake found: install it (for example 'pip install cmake'), version 3.21 or newer."),
    ],
)
def test_what_is_missing_is_said(project, monkeypatch, missing, sentence):
    hide(monkeypatch, missing)
    with pytest.raises(BuildError) as caught:
        cmake_build.build([])
    assert str(caught.value) == sentence


def setup(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run setup.py."""
    command = [sys.executable, "setup.py", *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"CXX": "no-compiler"}, "No C++ compiler 'no-compiler' found: install g++ 11 or newer, or set CXX."),
        ({"KINML_CUDA": "yes"}, "KINML_CUDA must be auto, 0 or 1, not 'yes'."),
    ],
)
def test_setup_ends_with_the_sentence(tmp_path, environment, sentence):
    """No traceback: what pip shows is the one line."""
    done = setup("build_ext", f"--build-lib={tmp_path}", KINML_BUILD_DIR=str(tmp_path), **environment)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == sentence
    assert "Traceback" not in done.stderr


def test_setup_without_torch_says_so(tmp_path):
    """An empty module in torch's place that is not there."""
    (tmp_path / "torch.py").write_text("raise ImportError\n")
    done = setup("build_ext", f"--build-lib={tmp_path}", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.startswith("kinml_fast is compiled against the installed torch, and there is none in this envir")


# What the sources are; other things may lie beside them.
FOLDERS = ("benchmarks", "cmake", "csrc", "docs", "kinml_fast", "python_examples", "scripts", "tests")
FILES = (".clang-format", "CHANGELOG.md", "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md")
FILES += ("pyproject.toml", "setup.py")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of this source tree that a test may write into."""
    folder = tmp_path_factory.mktemp("tree")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.py[cod]"))
    for name in FILES:
        shutil.copy2(ROOT / name, folder)
    shutil.rmtree(folder / "benchmarks" / "data", ignore_errors=True)  # made by benchmarks
    return folder


def backend(tree: Path, code: str, **environment: str) -> str:
    """Call setuptools as pip does; return what it prints last."""
    code = f"from setuptools import build_meta as b; print(b.{code})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def requirements(metadata: str) -> list[str]:
    """What metadata say of torch."""
    return re.findall(r"^Requires-Dist: (torch\b[^;\n]*)$", metadata, re.MULTILINE)


def test_source_distribution_is_the_whole_tree(tree, tmp_path):
    """All that is compiled, tested and read; metadata of any torch that fits."""
    wanted = {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}
    assert {Path("setup.py"), Path("cmake/cuda.cmake"), Path("csrc/core/config.h")} < wanted
    name = backend(tree, f"build_sdist({str(tmp_path)!r})")
    top = Path(name.removesuffix(".tar.gz"))
    with tarfile.open(tmp_path / name) as archive:
        found = {Path(member.name) for member in archive if member.isfile()}
        metadata = archive.extractfile(str(top / "PKG-INFO"))
        assert metadata is not None
        assert requirements(metadata.read().decode()) == ["torch>=2.8"]
    assert sorted(path for path in wanted if top / path not in found) == []


def test_metadata_of_a_wheel_name_its_torch(tree, tmp_path):
    version = importlib.metadata.version("torch").partition("+")[0]
    folder = backend(tree, f"prepare_metadata_for_build_wheel({str(tmp_path)!r})")
    assert requirements((tmp_path / folder / "METADATA").read_text()) == [f"torch=={version}"]


def test_an_installed_wheel_is_of_this_python_and_platform():
    """Its module _C is of one version of Python; tags of the file are those of the installation."""
    try:
        installed = importlib.metadata.distribution("kinml_fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("kinml_fast is not installed, but used in place")
    wheel = installed.read_text("WHEEL")
    if wheel is None:
        pytest.skip("kinml_fast is used in place")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"Tag: {python}-{python}-linux_" in wheel
    assert "Root-Is-Purelib: false" in wheel
    version = importlib.metadata.version("torch").partition("+")[0]
    assert f"torch=={version}" in installed.requires
