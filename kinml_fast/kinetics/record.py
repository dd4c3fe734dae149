"""What a search has come to: told at each step, and kept in files, so that it goes on after a kill."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kinml_fast.data.files import replacing
from kinml_fast.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

SECONDS_BETWEEN_FILES = 1.0
"""The state within a stage is written at least this far apart; what is lost in between is done again."""

_INPUTS = "inputs.json"


class Record:
    """The stages of a search, such as a band or one side of a path.

    A stage has a state of plain values and arrays, from which it goes on with the same bits as if it had never ended.

    Parameters
    ----------
    folder
        Where states are kept, a file for each stage; None: nowhere.
    tell
        Is called at each step with the stage, the number of the step and the largest force in eV/Å; None: nobody.
    """

    def __init__(self, folder: Path | None = None, tell: Callable[[str, int, float], None] | None = None) -> None:
        self._folder, self._tell = folder, tell
        self._next = 0.0

    def begin(self, inputs: Mapping[str, Any]) -> bool:
        """Go on with what the folder has, or make it; whether there was any.

        Raises
        ------
        InputError
            The folder holds the states of a search with other inputs, or cannot be written.
        """
        if self._folder is None:
            return False
        given = json.loads(_text(inputs))
        if (self._folder / _INPUTS).exists():
            before = _read(self._folder / _INPUTS)
            other = [key for key in given if not isinstance(before, dict) or before.get(key) != given[key]]
            if other:
                raise InputError(
                    f"{self._folder}: holds an unfinished search with another {', '.join(other)}: give the same, "
                    "choose another folder, or remove this one"
                )
            return True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self._folder}: cannot be made ({error.strerror}): choose another folder") from error
        self._write(_INPUTS, given)
        return False

    def state(self, stage: str) -> dict[str, Any] | None:
        """What was kept last of a stage; None: nothing."""
        path = None if self._folder is None else self._file(stage)
        return None if path is None or not path.exists() else _read(path)

    def keep(self, stage: str, state: Mapping[str, Any]) -> None:
        """Keep the state of a stage in place of the one before."""
        if self._folder is not None:
            self._write(self._file(stage).name, state)

    def step(self, stage: str, number: int, force: float, state: Callable[[], Mapping[str, Any]] | None = None) -> None:
        """Tell of a step, and keep the state after it if the last one was kept a while ago."""
        if self._tell is not None:
            self._tell(stage, number, force)
        if state is not None and self._folder is not None and time.monotonic() >= self._next:
            self.keep(stage, state())
            self._next = time.monotonic() + SECONDS_BETWEEN_FILES

    def remove(self) -> None:
        """Keep nothing any more: the search is at its end."""
        if self._folder is None or not self._folder.exists():
            return
        last = self._folder / _INPUTS  # as long as there are states, it says of what they are
        for path in [*self._folder.glob("*.json"), *self._folder.glob(".*.part")]:
            if path != last:
                path.unlink(missing_ok=True)
        last.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what else is in it stays
            self._folder.rmdir()

    def _file(self, stage: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{stage.replace(' ', '-')}.json"

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        assert self._folder is not None
        with replacing(self._folder / name) as temporary:
            temporary.write_text(_text(values), encoding="utf-8")


class Live:
    """A line on a terminal that changes in place; as a context manager it goes with the block.

    Parameters
    ----------
    console
        The terminal; None: nothing is shown.
    steps
        At most so many of a stage.
    """

    def __init__(self, console: Console | None, steps: int) -> None:
        self._console, self._steps = console, steps
        self._bar: Progress | None = None

    def __enter__(self) -> Live:
        if self._console is not None:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.fields[stage]}"), BarColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=self._console, auto_refresh=False, transient=True)
            self._task = self._bar.add_task("", total=self._steps, stage="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, stage: str, number: int, force: float) -> None:
        """Show a step, see `Record`."""
        if self._bar is not None:
            text = f"step {number} of at most {self._steps}, largest force {force:.2g} eV/Å"
            self._bar.update(self._task, completed=number, stage=stage, description=text, refresh=True)


def _text(values: Mapping[str, Any]) -> str:
    """JSON, in which numbers keep all their digits."""
    return json.dumps(values, default=lambda value: value.tolist() if isinstance(value, np.ndarray) else str(value))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): remove its folder, and the search begins anew") from error
