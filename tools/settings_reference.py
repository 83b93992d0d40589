#!/usr/bin/env python3
"""Print docs/settings.md: every key of the settings with its values, its default and what it does.

    python tools/settings_reference.py > docs/settings.md
    python tools/settings_reference.py --check          # is the file current?

The texts are the string literals below the fields of `megatron_nft.config` and of the algorithms' `Settings`. A test
runs the check. Exit status 1: the file is not current, or a field has no text.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import annotated_types
from pydantic.fields import FieldInfo

from megatron_nft.algorithms import ALGORITHMS, AlgorithmSettings, algorithm_class
from megatron_nft.config import Config
from megatron_nft.config.load import REMOVED
from megatron_nft.section import Section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEAD = """\
# Settings

Made by `python tools/settings_reference.py > docs/settings.md` from the texts below the fields in
`megatron_nft/config/` and `megatron_nft/algorithms/`; change them there.

`megatron-nft train --config FILE.yaml key=value …` reads YAML files and then dotted overrides; later ones win. A file
may name another one as `base:` and overlay it. Keys of a section are written below its name in a file and with a dot
on the command line: `optimizer.lr=2e-6`, `data.train=[a.parquet,b.jsonl]`. Unknown keys and values that cannot be used
are refused before anything starts; `--dry-run` prints all settings as they will be used.
"""
TYPES = {int: "integer", float: "number", str: "text", Path: "path", Any: "any value"}
PLURALS = {str: "texts", Path: "paths", int: "integers"}


def field_texts(section: type[Section]) -> dict[str, str]:
    """Field -> the string literal below it, on one line; inherited fields too. A field without one is left out."""
    texts: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if issubclass(cls, Section) and cls is not Section:
            texts |= _own_texts(cls)
    return {name: texts[name] for name in section.model_fields if name in texts}


@cache
def _own_texts(section: type[Section]) -> dict[str, str]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, below in zip(body.body, body.body[1:]):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            texts[field.target.id] = " ".join(below.value.value.split())
    return texts


def subsection(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, None for a value."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


@dataclass(frozen=True)
class Place:
    """A section where it stands in the settings."""

    path: str  # dotted, "" for the top level
    section: type[Section]  # for `algorithm`, what all algorithms have
    text: str  # what the section is about
    values: Section | None = None  # in force where nothing is given; None: some key is required


def places(top: Place) -> Iterator[Place]:
    """`top` and the sections below it, in the order of the fields."""
    yield top
    texts = field_texts(top.section)
    for name, field in top.section.model_fields.items():
        if (inner := subsection(field)) is not None:
            given = None if field.is_required() else field.get_default(call_default_factory=True)
            yield from places(Place(f"{top.path}.{name}".lstrip("."), inner, _text_of(top.section, name, texts), given))


def algorithms() -> Iterator[tuple[str, type[AlgorithmSettings]]]:
    """Name and settings of every built-in algorithm."""
    for name in ALGORITHMS:
        yield name, algorithm_class(name).Settings


def values(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """The values that a field takes, in words: `integer, > 0`, `path or null`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return values(arguments[0], [*metadata, *_flat(arguments[1:])])
    if origin in (typing.Union, types.UnionType):
        inner = [values(a) for a in arguments if a is not types.NoneType]
        return " or ".join([*inner, *["`null`"] * (types.NoneType in arguments)])
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if annotation is bool:
        return "`true`, `false`"
    if origin is list:
        least = [f", at least {m.min_length}" for m in metadata if isinstance(m, annotated_types.MinLen)]
        item, *bounds = typing.get_args(arguments[0]) or (arguments[0],)
        return ", ".join([f"list of {PLURALS[item]}{''.join(least)}", *_bounds(_flat(bounds))])
    if origin is dict:
        return f"mapping of {TYPES[arguments[0]]} to {TYPES[arguments[1]]}"
    if annotation not in TYPES:
        raise ValueError(f"{annotation}: add a word for this type to TYPES in {__file__}")
    return ", ".join([TYPES[annotation], *_bounds(metadata)])


def _flat(metadata: typing.Sequence[Any]) -> list[Any]:
    """pydantic wraps the bounds of an inner annotation in a FieldInfo."""
    return [part for m in metadata for part in (m.metadata if isinstance(m, FieldInfo) else [m])]


def _bounds(metadata: typing.Sequence[Any]) -> list[str]:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return [f"{sign} {getattr(m, key):g}" for key, sign in signs.items() for m in metadata if hasattr(m, key)]


def default(name: str, field: FieldInfo, given: Section | None) -> str:
    """The default of a field as YAML writes it, or `required`; `given` are the section's own values."""
    if given is None and field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True) if given is None else getattr(given, name)
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def table(section: type[Section], given: Section | None = None, without: typing.Collection[str] = ()) -> str:
    """The table of a section's keys, those `without` and whole sections left out. ValueError for one without a text."""
    texts, rows = field_texts(section), []
    for name, field in section.model_fields.items():
        if name in without or subsection(field) is not None:
            continue
        cells = (
            f"`{name}`",
            values(field.annotation, field.metadata),
            default(name, field, given),
            _text_of(section, name, texts),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(["| key | values | default | |", "|---|---|---|---|", *rows]) + "\n"


def _text_of(section: type[Section], name: str, texts: Mapping[str, str]) -> str:
    if not texts.get(name):
        raise ValueError(f"{section.__module__}.{section.__qualname__}.{name} has no text below it: write one")
    return texts[name]


def page() -> str:
    """The whole page. ValueError for a field without a text."""
    parts = [HEAD]
    for place in places(Place("", Config, "")):
        title = f"## `{place.path}`\n\n{place.text}\n" if place.path else "## Top level\n"
        parts += [title, table(place.section, place.values)]
        if place.section is AlgorithmSettings:
            for name, settings in algorithms():
                summary = inspect.cleandoc(settings.__doc__ or "").split("\n\n")[0]
                own = table(settings, without=AlgorithmSettings.model_fields)
                parts += [f"### `algorithm.name={name}`\n\n{summary}\n", own]
    removed = [f"| `{key}` | {reason} |\n" for key, reason in REMOVED.items()]
    parts += ["## Removed keys\n\nStill accepted, with a warning, and without effect.\n"]
    parts += ["| key | why |\n|---|---|\n" + "".join(removed)]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with docs/settings.md and print nothing")
    args = parser.parse_args()
    try:
        text = page()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if not args.check:
        print(text, end="")
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is not current: run python tools/settings_reference.py > docs/settings.md", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
