"""A wrong or missing build ends in one readable sentence."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys

import pytest
import torch

import kinml_fast
from kinml_fast import _C, _library


def test_the_library_is_where_it_says_and_without_python():
    path = _library.library_path()
    assert path.is_file()
    assert str(path) in torch.ops.loaded_libraries
    with pytest.raises(AttributeError):
        ctypes.CDLL(str(path)).PyInit__C  # noqa: B018
    assert b"libpython" not in path.read_bytes()


def test_build_info_says_what_was_built_and_what_is_used():
    info = _library.build_info()
    assert info["version"] == kinml_fast.__version__
    assert info["torch"] == torch.__version__
    assert info["instruction set in use"] in info["instruction sets"].split()
    assert all(isinstance(text, str) and text for text in info.values())


def test_loading_again_is_harmless():
    _library._load()


@pytest.mark.parametrize("same", [True, False])
def test_a_copy_of_the_library_that_was_loaded_before(tmp_path, same):
    """As a metatomic file brings one: two in a process would end it."""
    copy = tmp_path / "libkinml_ops.so"
    shutil.copy(_library.library_path(), copy)
    if not same:
        with copy.open("ab") as file:
            file.write(b"of another version")
    program = f"import ctypes, torch; ctypes.CDLL({str(copy)!r}); import kinml_fast.ops"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if same:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 1
        assert f"The ops of another kinml_fast are loaded already, from {copy}: import" in done.stderr


@pytest.mark.parametrize("other", ["2.8.0", "2.12.1+cu130"])
def test_another_torch(monkeypatch, other):
    info = {**_C.build_info(), "torch": other}
    monkeypatch.setattr(_C, "build_info", lambda: info)
    with pytest.raises(ImportError) as caught:
        _library._load()
    text = str(caught.value)
    assert text.startswith(f"kinml_fast was compiled for torch {other}, but this is {torch.__version__}. ")
    assert "pip install --no-build-isolation --force-reinstall" in text
    assert "\n" not in text


def test_another_build_of_the_same_torch_loads(monkeypatch):
    info = {**_C.build_info(), "torch": torch.__version__.split("+")[0] + "+other"}
    monkeypatch.setattr(_C, "build_info", lambda: info)
    _library._load()


def test_missing_library(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    with pytest.raises(ImportError) as caught:
        _library._load()
    text = str(caught.value)
    assert text.startswith(f"kinml_fast's ops library is missing: {tmp_path / 'libkinml_ops.so'}. Reinstall it")
    assert "\n" not in text


def check_that_it_does_not_load(reason: str) -> None:
    with pytest.raises(ImportError) as caught:
        _library._load()
    text = str(caught.value)
    assert text.startswith("kinml_fast's ops library does not load (")
    assert reason in text  # the loader's own words, not only that it did not work
    assert "pip install --no-build-isolation --force-reinstall" in text
    assert "\n" not in text


def test_broken_library(monkeypatch, tmp_path):
    (tmp_path / "libkinml_ops.so").write_bytes(b"not a library")
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    check_that_it_does_not_load("file too short")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_library_with_an_unknown_symbol(monkeypatch, tmp_path):
    """What a library says that was compiled against another torch."""
    source = tmp_path / "wrong.cpp"
    source.write_text("void not_in_this_torch(); __attribute__((constructor)) void f() { not_in_this_torch(); }\n")
    command = ["g++", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "libkinml_ops.so")]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    check_that_it_does_not_load("undefined symbol: _Z17not_in_this_torchv")


def test_not_compiled(monkeypatch):
    monkeypatch.delattr(kinml_fast, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "kinml_fast._C", None)
    with pytest.raises(ImportError) as caught:
        _library._load()
    text = str(caught.value)
    assert text.startswith("kinml_fast is not compiled for this Python (")
    in_a_clone = (_library._FOLDER.parent / "setup.py").exists()
    assert ("run Python in another one" if in_a_clone else "pip install --no-build-isolation .") in text
    assert "\n" not in text


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("KINML_CPU_ISA", "avx1024")
    with pytest.raises(ImportError, match=r"KINML_CPU_ISA is 'avx1024': set it to one of baseline, avx2, avx512\."):
        _library._load()


def test_a_build_without_cuda_says_so():
    """Every op has an answer to tensors on a GPU; called directly, since here may be none to make them on."""
    if _C.build_info()["cuda"] != "none":
        pytest.skip("kinml_fast was built with CUDA")
    names = sorted(
        {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("kinml_fast::")}
    )
    assert len(names) >= 16
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
    on_gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    system = [torch.zeros(2, 3), torch.zeros(2), torch.zeros(2), None, None]
    with pytest.raises(RuntimeError) as caught:
        torch.ops.kinml_fast.aev_jacobian.default.redispatch(on_gpu, system, 2, [1.0])
    text = str(caught.value).splitlines()[0]
    assert text == (
        "kinml_fast::aev_jacobian got tensors on a GPU, but this build of kinml_fast has no CUDA kernels: "
        "reinstall it with KINML_CUDA=1 (it needs nvcc), or move the tensors to the CPU."
    )
