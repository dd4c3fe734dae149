"""The data sets that come with the package; `README.md` beside this says how they were made."""

from __future__ import annotations

from pathlib import Path

from kinml_fast.errors import DataError

_FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """Names of the shipped files that `path` takes: databases and example configurations, alphabetically."""
    return sorted(file.name for file in _FOLDER.iterdir() if file.suffix in {".db", ".yaml"})


def path(name: str) -> Path:
    """Where a shipped file lies.

    Parameters
    ----------
    name
        One of `names`, such as "C5H5.db".

    Raises
    ------
    InputError
        There is no such file; the message lists those that there are.
    """
    if name not in names():
        raise DataError(f"kinml_fast ships no file {name}: use one of {', '.join(names())}")
    return _FOLDER / name
