"""Checkpoints: written as a whole or not at all, checked when read, and without code in them."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinml_fast.data.files import replacing
from kinml_fast.deploy.archive import unpacked
from kinml_fast.errors import ModelError

FORMAT = "kinml_fast checkpoint"
VERSION = 3


def save(path: Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint.

    Parameters
    ----------
    path
        Replaced only when the new file is complete and on the disk.
    contents
        Tensors and plain values. Tensors are written as CPU tensors, which every machine reads.

    Raises
    ------
    InputError
        The file cannot be written, for instance because the disk is full.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **on_cpu(contents)}, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors on the CPU.

    Raises
    ------
    InputError
        The file is missing, damaged, of another kind, or of a later version.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read as a checkpoint ({error.strerror})") from error
    try:
        contents = unpacked(raw)
    except ValueError as error:
        raise ModelError(
            f"{path}: is no readable checkpoint ({error}): put an intact one in its place, "
            "for instance one of the epoch-*.pt files beside it, or start a new run"
        ) from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ModelError(f"{path}: was not written by this program as a checkpoint: give one that was")
    if contents.get("version") != VERSION:
        raise ModelError(
            f"{path}: is a checkpoint of version {contents.get('version')}, this program reads version {VERSION}: "
            "use the program that wrote it"
        )
    return contents


def on_cpu(value: Any) -> Any:
    """Nested dictionaries and lists with their tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(inner) for key, inner in value.items()}
    return type(value)(map(on_cpu, value)) if isinstance(value, list | tuple) else value


def random_states() -> dict[str, Any]:
    """The states of the random generators of torch (CPU, and GPUs in use), numpy and Python."""
    name, words, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - it may be in use elsewhere
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": {
            "name": str(name),
            "words": torch.from_numpy(np.asarray(words).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators into the states that `random_states` gave.

    Those of GPUs are left alone when their number is another one.
    """
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    state = states["numpy"]
    words = state["words"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002
        (state["name"], words, state["position"], state["has_gauss"], state["gauss"])
    )
    random.setstate(states["python"])
