"""Where to compute: the processor, or a GPU that torch finds and this build has kernels for."""

from __future__ import annotations

import re

import torch

from kinml_fast import _library
from kinml_fast.errors import InputError, first_line

NAMES = "auto, cpu, cuda or cuda:N"
"""What `resolve` takes."""


def is_name(text: str) -> bool:
    """Whether a text is one of `NAMES`, there or not."""
    return re.fullmatch(r"auto|cpu|cuda(:\d+)?", text) is not None


def resolve(name: str) -> torch.device:
    """The device that a name stands for, a GPU with its index.

    Parameters
    ----------
    name
        One of `NAMES`. auto: the current GPU if there is one that can be used, else the CPU.

    Raises
    ------
    InputError
        Another name, or a GPU that cannot be used: why, and what to do.
    """
    if not is_name(name):
        raise InputError(f"{name!r} is no device: give {NAMES}")
    if name == "cpu" or (name == "auto" and why_no_gpu() is not None):
        return torch.device("cpu")
    if reason := why_no_gpu():
        raise InputError(f"the device is {name}, but {reason}, or take the device cpu")
    count, index = torch.cuda.device_count(), torch.device("cuda" if name == "auto" else name).index
    if index is not None and index >= count:
        there = "only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise InputError(f"the device is {name}, but there is {there}: name a GPU that is there")
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def why_no_gpu() -> str | None:
    """Why no GPU can be used here, and what to do; None if one can."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA: install one that has, and then kinml_fast again"
    if _library.build_info()["cuda"] == "none":
        return (
            "this build of kinml_fast has no CUDA kernels: install it again where there is nvcc, with "
            "KINML_CUDA=1 pip install --no-build-isolation"
        )
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
        reason = "it gives no reason"
    except RuntimeError as error:
        reason = first_line(error).rstrip(".")
    return f"torch finds no GPU ({reason}): see nvidia-smi and CUDA_VISIBLE_DEVICES"
