"""Files that `torch.save` wrote: read as plain values and tensors, with nothing of them run."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from typing import Any

import torch

from kinml_fast.errors import first_line

_OF_ARCHIVES = b"PK"


def unpacked(raw: bytes) -> Any:
    """What is in a file.

    Parameters
    ----------
    raw
        The file.

    Raises
    ------
    ValueError
        It is damaged, no file of `torch.save`, or names what is no plain value and is not among the classes that the
        caller allows by `torch.serialization.safe_globals`; the reason, fit for a part of a sentence.
    """
    try:
        if raw.startswith(_OF_ARCHIVES):
            # torch.load does not look at the checksums.
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} has a wrong checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of what is refused anyway
            return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # what damaged files raise has no common type
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    # torch's own sentence recommends to run what is in the file; why it was refused is in the error within.
    within = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
    reason = first_line(within if isinstance(within, Exception) else error)
    named = re.search(r"GLOBAL (\S+)", reason)
    return f"it names {named[1]}, which is no plain value; nothing of it was run" if named else reason.rstrip(". ")
