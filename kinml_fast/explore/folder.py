"""The folder of an exploration: what is kept on disk, and under which names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kinml_fast.data.files import replacing
from kinml_fast.errors import InputError


class ExploreFolder:
    """Names of what an exploration keeps."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "explore.yaml"
        self.start = self.path / "start.json"
        self.log = self.path / "explore.log"
        self.data = self.path / "data"
        self.xyz = self.data / "explored.xyz"
        self.model = self.path / "model.pt"
        self.report = self.path / "report"

    def __str__(self) -> str:
        return str(self.path)

    def round(self, number: int) -> RoundFolder:
        """That of a round; 0 is that of the first models."""
        return RoundFolder(self.path / f"round-{number:03}")

    def has_labels(self) -> bool:
        """Whether any structure was labelled, or could not be."""
        return any(self.path.glob("round-*/*labels/*.json"))

    def databases(self) -> list[Path]:
        """The databases that were written, one for each formula in atom order."""
        return sorted(self.data.glob("*.db"))


class RoundFolder:
    """Names of what a round keeps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chosen = path / "chosen.json"
        self.split = path / "split.txt"
        self.model = path / "model"
        self.result = path / "round.json"

    def labels(self, level: int) -> Path:
        """The labels of a level, 0 is the lowest."""
        return self.path / ("labels", "upper-labels")[level]

    def samples(self, item: int) -> Path:
        """What one item of the sampling has found."""
        return self.path / "samples" / f"{item:05}.json"


def read_json(path: Path) -> Any:
    """The values in a file that `write_json` has written.

    Raises
    ------
    InputError
        It is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): remove it, and it is made anew") from error


def write_json(path: Path, values: Any) -> None:
    """Write plain values, as a whole or not at all; numbers keep all their digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values), encoding="utf-8")
