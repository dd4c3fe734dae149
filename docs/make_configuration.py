"""Writes docs/configuration.md, and the keys in docs/explore.md, from the schemas of the configurations.

They are those of kinml_fast/train/config.py and kinml_fast/explore/config.py.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kinml_fast.explore.config import ExploreConfig
from kinml_fast.train.config import Config

PAGE = Path(__file__).with_name("configuration.md")
EXPLORE = Path(__file__).with_name("explore.md")
KEYS = "<!-- keys -->\n", "<!-- /keys -->"
OF_TRAINING = {"descriptor", "network", "training", "ensemble"}
"""Sections of an exploration that are those of a run, but for the defaults that the page names."""

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
        return "numbers by name" if type_name(arguments[1]) == "number" else "values by name"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(kind, str(kind))


def default(field: FieldInfo) -> str:
    """The default in YAML's words."""
    if field.is_required():
        return "**required**"
    words = {None: "null", True: "true", False: "false"}
    value = field.default
    return f"`{words[value] if isinstance(value, bool | None) else value}`".replace("'", "")


def sections(model: type[BaseModel], prefix: str = "", without: Collection[str] = ()) -> list[str]:
    """The table of a section, then those of the sections within it, but for some."""
    rows, inner = [], []
    for name, field in model.model_fields.items():
        if name in without:
            continue
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


def explore_page() -> str:
    """The page on explorations with the keys of today."""
    before, found, rest = EXPLORE.read_text(encoding="utf-8").partition(KEYS[0])
    assert found, f"{EXPLORE} has no {KEYS[0]}"
    _, end, after = rest.partition(KEYS[1])
    tables = "\n\n".join(sections(ExploreConfig, without=OF_TRAINING)).replace("## ", "### ")
    return before + found + tables + "\n" + end + after


PAGES = {PAGE: page, EXPLORE: explore_page}

if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(int(any(path.read_text(encoding="utf-8") != made() for path, made in PAGES.items())))
    for path, made in PAGES.items():
        path.write_text(made(), encoding="utf-8")
