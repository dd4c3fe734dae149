"""Exceptions for input that a user can put right, by where the mistake is."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used: a file, a setting, an argument.

    The message is one sentence for the user: what is wrong, in which file and row, and the remedy. The command line
    prints it and exits with code 2. A subclass says where the mistake is; what has none of its own, such as a run
    folder or a file that cannot be written, is of this class.
    """


class DataError(InputError):
    """Data: a file of structures, a division or weights of them, that cannot be read or used; atoms to compute."""


class ModelError(InputError):
    """A model file or a checkpoint that is missing, damaged or of another kind; models that do not fit together."""


class ConfigError(InputError):
    """A setting or an argument that is not allowed, or that contradicts another, the data or the model."""


class DeviceError(InputError):
    """A device that is not there or cannot be used, or memory that is too small."""


class RankError(InputError):
    """Another process of several that train together could not go on; it says why."""


def first_line(error: Exception) -> str:
    """What an error says, cut to a line that fits into a sentence; its kind if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
