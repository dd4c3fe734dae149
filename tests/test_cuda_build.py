"""Whether and how setup.py builds csrc/cuda, with an nvcc that is a shell script."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_toolkit
import pytest
from cuda_toolkit import CudaError, decide

ROOT = Path(__file__).resolve().parents[1]


def fake_nvcc(folder: Path, version: str = "13.0", known: str = "75 80 86 90 100 120") -> Path:
    """A toolkit whose nvcc says what is asked of it; return its folder."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    nvcc = folder / "bin" / "nvcc"
    lines = [
        "#!/bin/sh",
        'case "$*" in',
        f"*--version*) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;",
        f"*--list-gpu-code*) for name in {known}; do echo sm_$name; done ;;",
        f"*--dryrun*) echo '#$ TOP={folder}' ;;",
        "esac",
    ]
    nvcc.write_text("\n".join(lines) + "\n")
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def toolkit(tmp_path) -> dict[str, str]:
    """An environment with a toolkit."""
    return {"CUDA_HOME": str(fake_nvcc(tmp_path / "cuda")), "PATH": "/usr/bin:/bin"}


def test_auto_goes_by_torch(toolkit):
    assert decide(None, toolkit).build is None
    decision = decide("13.0", toolkit)
    assert decision.notes == []
    assert decision.build.architectures == ("80", "90", "100")
    assert decision.build.text() == "13.0, compute capability 8.0, 9.0, 10.0"


def test_one_builds_beside_any_torch_and_zero_beside_none(toolkit):
    assert decide(None, {**toolkit, "KINML_CUDA": "1"}).build is not None
    assert decide("13.0", {**toolkit, "KINML_CUDA": "0"}).build is None


def test_no_nvcc(tmp_path):
    environment = {"CUDA_HOME": str(tmp_path), "PATH": ""}
    decision = decide("12.8", environment)
    assert decision.build is None
    assert len(decision.notes) == 1
    assert decision.notes[0].startswith("This torch has CUDA 12.8, but there is no nvcc (looked for in CUDA_HOME, ")
    with pytest.raises(CudaError) as caught:
        decide("12.8", {**environment, "KINML_CUDA": "1"})
    assert str(caught.value) == (
        "KINML_CUDA=1, but there is no nvcc (looked for in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda): install "
        "the CUDA toolkit 12.1 or newer, or set CUDA_HOME to where it is; KINML_CUDA=0 builds for the CPU."
    )


def test_nvcc_of_path(toolkit, tmp_path):
    environment = {"PATH": f"{tmp_path / 'cuda' / 'bin'}:/usr/bin:/bin"}
    found = decide("13.0", environment).build.toolkit
    assert found.nvcc == str(tmp_path / "cuda" / "bin" / "nvcc")
    assert found.folder == tmp_path / "cuda"


def test_an_old_nvcc(tmp_path):
    environment = {"CUDA_PATH": str(fake_nvcc(tmp_path / "old", "12.0", "80 90")), "PATH": "/usr/bin:/bin"}
    assert "is version 12.0: install the CUDA toolkit 12.1 or newer" in decide("12.0", environment).notes[0]
    with pytest.raises(CudaError, match=r"KINML_CUDA=1, but .*nvcc is version 12\.0: install the CUDA toolkit 12\.1"):
        decide(None, {**environment, "KINML_CUDA": "1"})


def test_a_broken_nvcc(tmp_path):
    folder = fake_nvcc(tmp_path / "broken")
    (folder / "bin" / "nvcc").write_text("#!/bin/sh\necho no licence\nexit 3\n")
    environment = {"CUDA_HOME": str(folder), "PATH": "/usr/bin:/bin", "KINML_CUDA": "1"}
    with pytest.raises(CudaError, match=r"KINML_CUDA=1, but '.*nvcc --version' fails: no licence; KINML_CUDA=0"):
        decide(None, environment)


@pytest.mark.parametrize("text", ["90;80", "8.0, 9.0", "sm_90 compute_80", "90 80 90"])
def test_architectures_in_any_order_and_form(toolkit, text):
    assert decide("13.0", {**toolkit, "KINML_CUDA_ARCHS": text}).build.architectures == ("80", "90")


def test_architecture_with_features_of_its_own(toolkit):
    assert decide("13.0", {**toolkit, "KINML_CUDA_ARCHS": "90a"}).build.architectures == ("90a",)


def test_architectures_that_nvcc_does_not_know(tmp_path):
    environment = {"CUDA_HOME": str(fake_nvcc(tmp_path / "cuda", "12.4", "80 90")), "PATH": "/usr/bin:/bin"}
    decision = decide("12.4", environment)
    assert decision.build.architectures == ("80", "90")
    assert decision.notes == ["nvcc 12.4 does not know the architectures 100: they are left out."]
    assert decide(None, {**environment, "KINML_CUDA": "1"}).build.architectures == ("80", "90")
    asked = {**environment, "KINML_CUDA_ARCHS": "90;120"}
    assert decide("12.4", asked).build.architectures == ("90",)
    with pytest.raises(CudaError) as caught:
        decide("12.4", {**asked, "KINML_CUDA": "1"})
    assert str(caught.value) == "KINML_CUDA_ARCHS: nvcc 12.4 does not know the architectures 120; it knows 80, 90."


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("KINML_CUDA", "yes", "KINML_CUDA must be auto, 0 or 1, not 'yes'."),
        ("KINML_CUDA_ARCHS", "hopper", "KINML_CUDA_ARCHS holds 'hopper': give compute capabilities, such as 80;90."),
        ("KINML_CUDA_ARCHS", ";", "KINML_CUDA_ARCHS is empty: unset it, or give compute capabilities, such as 80;90."),
    ],
)
def test_variables_that_make_no_sense(toolkit, variable, value, message):
    with pytest.raises(CudaError) as caught:
        decide("13.0", {**toolkit, variable: value})
    assert str(caught.value) == message


def test_setup_ends_with_the_sentence(tmp_path):
    """No traceback: what pip shows is the one line."""
    environment = {"CUDA_HOME": str(tmp_path), "KINML_CUDA": "1", "PATH": "/usr/local/bin:/usr/bin:/bin"}
    command = [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("KINML_CUDA=1, but there is no nvcc")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(cuda_toolkit.find_nvcc() is None, reason="needs nvcc")
def test_the_nvcc_of_this_machine():
    toolkit = cuda_toolkit.inspect(cuda_toolkit.find_nvcc())
    assert toolkit.version >= (11, 0)
    if toolkit.version >= cuda_toolkit.OLDEST:
        assert "80" in toolkit.known
        assert list(toolkit.folder.glob("lib*/**/libcudart_static.a"))


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++")
@pytest.mark.parametrize(
    ("architectures", "codes"),
    [
        ("90;80", ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]),
        ("90a", ["compute_90a,code=sm_90a"]),  # no PTX: it would be for that one only
        ("80;77", ["compute_80,code=sm_80", "compute_80,code=compute_80"]),
    ],
)
def test_what_nvcc_compiles_for(toolkit, tmp_path, architectures, codes):
    folder = Path(toolkit["CUDA_HOME"])
    for file in (folder / "include" / "cuda_runtime.h", folder / "lib64" / "libcudart.so"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    options = ["-DKINML_CUDA=ON", f"-DKINML_CUDA_ARCHS={architectures}", f"-DCUDAToolkit_ROOT={folder}"]
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Unix Makefiles", *options]
    subprocess.run(command, check=True, capture_output=True)
    (rules,) = (tmp_path / "build").glob("CMakeFiles/kinml_core_cuda.dir/build.make")
    (line,) = (line for line in rules.read_text().splitlines() if "nvcc -std" in line and "adam_cuda.cu " in line)
    assert re.findall(r"-gencode arch=(\S+)", line) == codes
    assert "fast_math" not in line
