"""The C++ side: CMake's build, its tests without torch, and the programs of docs/cpp.md."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cmake_build
import cuda_toolkit
import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="needs cmake and a C++ compiler",
)


def run(*command: str | Path, **options) -> str:
    """Return what a command prints; a failure shows it."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def page_block(language: str, number: int) -> str:
    """Return the number-th fenced block of a language in docs/cpp.md."""
    page = (ROOT / "docs" / "cpp.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[number]


def build_project(folder: Path, name: str, cpp: str, cmake: str, *options: str) -> Path:
    """Build a project of one program; return the program."""
    folder.mkdir()
    (folder / f"{name}.cpp").write_text(cpp)
    (folder / "CMakeLists.txt").write_text(cmake)
    run("cmake", "-S", folder, "-B", folder / "build", *options)
    run("cmake", "--build", folder / "build")
    return folder / "build" / name


def build_program(folder: Path, name: str, number: int, *options: str) -> Path:
    """Build the number-th program of docs/cpp.md with the CMakeLists.txt beside it; return it."""
    return build_project(folder, name, page_block("cpp", number), page_block("cmake", number), *options)


@pytest.fixture(scope="module")
def build() -> Path:
    """The build folder, with all that is built by default: what is there from the installation is used."""
    import torch

    options = {"KINML_WITH_TORCH": "ON", "CMAKE_PREFIX_PATH": torch.utils.cmake_prefix_path}
    return cmake_build.build([], KINML_BUILD_TESTS="ON", **options)


@pytest.fixture(scope="module")
def package(build, tmp_path_factory) -> Path:
    """The CMake package, installed."""
    folder = tmp_path_factory.mktemp("package")
    run("cmake", "--install", build, "--prefix", folder)
    return folder


@pytest.mark.slow
def test_ctest(build):
    listed = run("ctest", "--test-dir", build, "--show-only")
    for name in ("aev", "force_step", "jacobian", "networks", "simd"):
        assert f"{name}.baseline" in listed
    for source in (ROOT / "tests" / "cpp").glob("test_cuda_*.cpp"):
        assert f"{source.stem.removeprefix('test_')}.twin" in listed
    assert "symbols.kernels" in listed
    report = run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in report
    # The processor's own instruction set was tested.
    assert re.search(r"aev\.\w+ \.+ +Passed", report)


def test_one_of_the_programs_of_ctest():
    """In the default selection for all of them: the installation has left most of what it is made from."""
    folder = cmake_build.build(["test_jacobian"], KINML_BUILD_TESTS="ON")
    assert re.search(r"^[1-9]\d* passed, 0 failed$", run(folder / "tests" / "cpp" / "test_jacobian"), re.MULTILINE)


@pytest.mark.slow
def test_program_without_torch(package, tmp_path):
    program = build_program(tmp_path / "water", "water", 1, f"-DCMAKE_PREFIX_PATH={package}")
    printed = run(program)
    # The oxygen's first number by hand: two hydrogen atoms at the same distance.
    r = math.hypot(0.76, 0.59)
    first = 2 * math.exp(-4 * (r - 0.8) ** 2) * (math.cos(math.pi * r / 5.2) / 2 + 0.5)
    assert printed.startswith(f"24 numbers an atom, a[0] = {first:.6f}, z of the oxygen = ")
    assert math.isfinite(float(printed.split()[-1]))


PROGRAMS = {
    "kinml_core_cuda": "#include <cuda/launch.h>\nint main() { kinml::cuda::pretend_device(nullptr); }\n",
    # Linked, and so loaded: docs/cpp.md, "Linked instead of opened".
    "kinml_ops": '#include <dlfcn.h>\nint main() { return !dlopen("libkinml_ops.so", RTLD_NOLOAD | RTLD_NOW); }\n',
}


@pytest.mark.slow
@pytest.mark.parametrize("component", PROGRAMS)
def test_program_against_the_package(package, tmp_path, component):
    if not list(package.glob(f"lib*/**/lib{component}.*")):
        pytest.skip(f"built without {component}")
    cmake = (
        "cmake_minimum_required(VERSION 3.21)\nproject(p LANGUAGES CXX)\n"
        f"find_package(kinml_fast REQUIRED COMPONENTS {component})\n"
        f"add_executable(p p.cpp)\ntarget_link_libraries(p PRIVATE kinml_fast::{component})\n"
    )
    run(build_project(tmp_path / "p", "p", PROGRAMS[component], cmake, f"-DCMAKE_PREFIX_PATH={package}"))


@pytest.mark.slow
def test_missing_component(package, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.21)\nproject(p LANGUAGES CXX)\n"
        "find_package(kinml_fast REQUIRED COMPONENTS kinml_core_tpu)\n"
    )
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={package}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "this installation has no kinml_core_tpu" in " ".join(done.stderr.split())


def test_each_installed_header_compiles_alone(tmp_path):
    """With all that it includes, in a program that has only the package; nothing need be built for that."""
    cuda = "ON" if cuda_toolkit.find_nvcc() else "OFF"
    run("cmake", "-S", ROOT, "-B", tmp_path / "build", f"-DKINML_CUDA={cuda}", "-DKINML_BUILD_TESTS=OFF")
    run("cmake", "--install", tmp_path / "build", "--component", "headers", "--prefix", tmp_path)
    include = tmp_path / "include" / "kinml_fast"
    headers = sorted(str(path.relative_to(include)) for path in include.rglob("*.h"))
    public = list((ROOT / "csrc" / "cpu").glob("*_cpu.h"))
    if cuda == "ON":
        public += (ROOT / "csrc" / "cuda").glob("*_cuda.h")
    assert {str(path.relative_to(ROOT / "csrc")) for path in public} < set(headers)
    # Not what only the kernels see.
    assert not [name for name in headers if name.endswith(("_kernels.h", "_group.h", "simd.h"))]

    def compile_alone(header: str) -> None:
        source = tmp_path / header.replace("/", "_").replace(".h", ".cpp")
        source.write_text(f"#include <{header}>\n")
        flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        run(os.environ.get("CXX", "c++"), *flags, f"-I{include}", source)

    with ThreadPoolExecutor(cmake_build.jobs()) as pool:
        list(pool.map(compile_alone, headers))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("-DKINML_CUDA=ON -DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON", "there is no nvcc of CUDA 12.1 or newer"),
        ("-DKINML_CUDA=perhaps", "KINML_CUDA must be auto, OFF or ON, not 'perhaps'"),
        ("-DKINML_SANITIZE=memory", "must be address,undefined or thread, not 'memory'"),
        ("-DKINML_WITH_TORCH=ON -DCMAKE_PREFIX_PATH=/nowhere", "there is no torch in CMAKE_PREFIX_PATH or Torch_DIR"),
    ],
)
def test_bad_options(tmp_path, option, message):
    done = subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, *option.split()], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


def test_torch_with_cuda_beside_no_toolkit(tmp_path):
    """Only the files of torch count: its own find_package(Torch) would fail without the toolkit."""
    for name in ("share/cmake/Torch/TorchConfig.cmake", "lib/libtorch_cuda.so"):
        (tmp_path / "torch" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "torch" / name).touch()
    options = ["-DKINML_WITH_TORCH=ON", f"-DCMAKE_PREFIX_PATH={tmp_path / 'torch' / 'share' / 'cmake'}"]
    no_toolkit = "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"
    printed = run("cmake", "-S", ROOT, "-B", tmp_path / "build", *options, no_toolkit)
    assert f"torch: {tmp_path / 'torch'}" in printed
    assert "there is no nvcc of CUDA 12.1 or newer: kinml_fast is built for the CPU only" in " ".join(printed.split())


@pytest.mark.slow
def test_scripted_model_in_cpp(tmp_path):
    import torch

    from kinml_fast._library import library_path
    from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble

    def made(fidelities: tuple[int, ...], seed: int = 0) -> EnergyModel:
        torch.manual_seed(seed)
        model = EnergyModel(AEVParameters.aevmod(("C", "H")), fidelities=fidelities)
        model.sae.copy_(torch.tensor([-1035.0, -16.0]))
        return model

    program = build_program(tmp_path / "predict", "predict", 0, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    for model in (made((1,)), made((0, 1)), Ensemble([made((0, 1), seed) for seed in range(3)])):
        torch.jit.script(model).save(tmp_path / "model.ts")
        printed = [float(word) for word in run(program, tmp_path / "model.ts", library_path()).split()]

        coordinates = torch.tensor([[0, 0, 0.6], [0, 0, -0.6], [0, 0.1, 1.7], [0, 0, -1.7]], dtype=torch.float64)
        coordinates.requires_grad_()
        energies = model(coordinates, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 4]))
        forces = -torch.autograd.grad(energies.sum(), coordinates)[0]
        assert printed[0] == pytest.approx(energies.item(), rel=1e-14)
        assert printed[1:] == pytest.approx(forces.flatten().tolist(), rel=1e-10, abs=1e-13)

    # Without the library: an error that names the op, no crash.
    done = subprocess.run([program, tmp_path / "model.ts"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "kinml_fast::aev" in done.stderr


def test_library_symbols():
    from kinml_fast._library import library_path

    script = ROOT / "tests" / "cpp" / "test_symbols.sh"
    assert run("sh", script, "library", library_path()).endswith(" 0 failed\n")


@pytest.mark.slow
@pytest.mark.parametrize("periodic", [False, True])
def test_dynamics_is_the_same_from_every_kind_of_file(dynamics, tmp_path, periodic):
    """csrc/md's two examples: the torch-free one, and that with libtorch on TorchScript and AOTInductor."""
    import ase.io
    import numpy as np

    from kinml_fast import KinMLCalculator

    places = np.array([[0.1, 0, 0.6], [0, 0.2, -0.6], [0, 0.1, 1.7], [0, 0, -1.7]])
    cell = [[4.1, 0, 0], [0.3, 4.4, 0], [-0.2, 0.5, 5.3]]
    atoms = ase.Atoms("CCHH", places, cell=cell if periodic else None, pbc=periodic)
    ase.io.write(tmp_path / "in.xyz", atoms, format="extxyz")
    atoms.calc = KinMLCalculator(dynamics["model"])

    printed = {}
    for name, command in dynamics["commands"].items():
        with (tmp_path / "in.xyz").open() as file:
            rows = run(*command, "200", "0.5", "300", stdin=file).splitlines()[1:]
        printed[name] = np.array([row.split() for row in rows], float)
    for name, rows in printed.items():
        assert len(rows) == 11
        np.testing.assert_allclose(rows, printed["plain"], atol=2e-9, err_msg=name)
        np.testing.assert_allclose(rows[0, 1], atoms.get_potential_energy(), atol=1e-9)
    moved = np.ptp(printed["plain"][:, 1])
    assert np.ptp(printed["plain"][:, 3]) < 0.05 * moved


@pytest.mark.slow
def test_what_is_wrong_ends_the_dynamics_in_a_sentence(dynamics, tmp_path):
    (tmp_path / "in.xyz").write_text("1\n\nFe 0 0 0\n")
    (tmp_path / "none").write_text("no model")
    for command in dynamics["commands"].values():
        for changed, sentence in (
            (command, "the model does not know the element Fe"),
            ([command[0], tmp_path / "none", *command[2:]], ""),
        ):
            with (tmp_path / "in.xyz").open() as file:
                done = subprocess.run(changed, stdin=file, capture_output=True, text=True)
            assert done.returncode == 2
            assert len(done.stderr.splitlines()) == 1
            assert sentence in done.stderr


@pytest.fixture(scope="module")
def dynamics(tmp_path_factory) -> dict:
    """A model, and the commands that run it in each form."""
    import torch

    from kinml_fast._library import library_path
    from kinml_fast.deploy import export, model_file
    from kinml_fast.nn import AEVParameters, EnergyModel

    options = {"KINML_WITH_TORCH": "ON", "CMAKE_PREFIX_PATH": torch.utils.cmake_prefix_path}
    build = cmake_build.build(["example_md", "example_md_torch"], **options)
    folder = tmp_path_factory.mktemp("dynamics")
    torch.manual_seed(0)
    model = EnergyModel(AEVParameters.aevmod(("C", "H"), 4, 2, 2), (8, 4, 4, 1))
    model_file.save(folder / "model.pt", model)
    for suffix in ("kinml", "ts", "pt2"):
        export.export(folder / "model.pt", folder / f"model.{suffix}")
    with_torch = [[build / "example_md_torch", folder / f"model.{s}", library_path()] for s in ("ts", "pt2")]
    return {
        "model": folder / "model.pt",
        "commands": {
            "plain": [build / "example_md", folder / "model.kinml"],
            "TorchScript": with_torch[0],
            "AOTInductor": with_torch[1],
        },
    }
