"""Files of `torch.save`, read without trust."""

from __future__ import annotations

import io
import warnings
import zipfile

import pytest
import torch

from kinml_fast.deploy.archive import unpacked


class Evil:
    """Unpickled by a program that runs what files say, it leaves a file."""

    def __reduce__(self) -> tuple:
        import os

        return os.system, ("touch was_run",)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_plain_values_and_tensors_come_back():
    value = unpacked(saved({"format": "x", "weights": torch.arange(3.0)}))
    assert value["format"] == "x"
    assert torch.equal(value["weights"], torch.arange(3.0))


def test_one_byte_of_the_weights_that_changed_is_seen():
    weights = torch.full((1000,), 1.25, dtype=torch.float64)
    raw = bytearray(saved({"weights": weights}))
    at = raw.index(weights.numpy().tobytes()[:64])
    raw[at + 7] ^= 1
    with pytest.raises(ValueError, match="data/0 has a wrong checksum"):
        unpacked(bytes(raw))


@pytest.mark.parametrize("raw", [b"", b"\0" * 40, b"no archive of anything", b"PK\x03\x04 no archive"])
def test_what_is_no_archive_is_said_in_one_line(raw):
    with pytest.raises(ValueError, match=r"\S") as said:
        unpacked(raw)
    assert "\n" not in str(said.value)


def test_reasons_name_what_a_file_wants_to_run_and_do_not_recommend_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"it names posix\.system, which is no plain value; nothing of it was run"):
        unpacked(saved({"optimizer": Evil()}))
    assert not (tmp_path / "was_run").exists()


def test_torch_says_nothing_beside_the_sentence():
    whole = zipfile.ZipFile(io.BytesIO(saved({"weights": torch.zeros(3)})))
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w") as archive:
        for name in whole.namelist():
            content = whole.read(name)
            if name.endswith("data.pkl"):  # another protocol, of which torch warns
                content = content.replace(b"\x80\x02", b"\x80\x05", 1)
            archive.writestr(name, content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(unpacked(changed.getvalue())) == ["weights"]
