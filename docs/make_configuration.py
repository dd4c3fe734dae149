"""Writes docs/configuration.md from the schema of the configuration (kinml_fast/train/config.py)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kinml_fast.train.config import Config

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """\
# The configuration of a run

One YAML file; `kinml-fast train FILE key=value …` changes any key, with a dot between section and key
(`training.optimizer.learning_rate=1e-4`). `kinml-fast train example` (energies) and `kinml-fast train forces`
(energies and forces) use the files that come with the package. An unknown key or a value that is not allowed ends with
one sentence and exit code 2. Only `data.files` has no default.

This page is made from `kinml_fast/train/config.py` by `python docs/make_configuration.py`.
"""


def type_name(kind: object) -> str:
    """A type as a user would call it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "numbers by name"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(kind, str(kind))


def default(field: FieldInfo) -> str:
    """The default in YAML's words."""
    if field.is_required():
        return "**required**"
    words = {None: "null", True: "true", False: "false"}
    value = field.default
    return f"`{words[value] if isinstance(value, bool | None) else value}`".replace("'", "")


def sections(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The table of a section, then those of the sections within it."""
    rows, inner = [], []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner += sections(kind, f"{prefix}{name}.")
        else:
            text = " ".join((field.description or "").split()).replace("|", "\\|")
            rows.append(f"| `{prefix}{name}` | {type_name(kind)} | {default(field)} | {text} |")
    title = f"## {prefix.rstrip('.')}" if prefix else "## top level"
    document = " ".join((model.__doc__ or "").split())
    table = ["| key | type | default | |", "|---|---|---|---|", *rows]
    return ["\n".join([title, document, "", *table]), *inner]


def page() -> str:
    return "\n\n".join([HEAD.rstrip(), *sections(Config)]) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(int(PAGE.read_text(encoding="utf-8") != page()))
    PAGE.write_text(page(), encoding="utf-8")
