"""From YAML files and dotted overrides to a checked `Config`.

A file may name a `base:` file (relative to itself) whose values it overlays. Later files and then
`key=value` overrides win. Overrides are YAML values: `optimizer.lr=1e-5`, `data.train=[a.parquet]`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_nft.config.settings import Config


class ConfigError(ValueError):
    """Settings that cannot be used. The message names key, value and what is allowed."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 1e-6 is a number and a key that stands twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*(?:[eE][-+]?\d+)|\.\d+(?:[eE][-+]?\d+)?|\d[\d_]*\.[\d_]*)$"),
    list("-+0123456789."),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(k) for k, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"key {key!r} stands twice{str(node.start_mark).rstrip()}")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, mapping by mapping; lists are replaced."""
    out = dict(base)
    for key, value in top.items():
        out[key] = _merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def read_yaml(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One config file with its `base:` files under it. ConfigError if it cannot be read."""
    path = Path(path)
    if path.resolve() in _seen:
        raise ConfigError(f"{path}: `base:` comes back to a file that it started from")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as e:
        raise ConfigError(f"config file {path}: {e.strerror or e}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config file {path}: not UTF-8 text") from None
    except (yaml.YAMLError, ConfigError) as e:
        raise ConfigError(f"config file {path}: {e}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {path}: holds a {type(raw).__name__}, not a mapping of settings")
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"config file {path}: base must be a file name, not {base!r}")
    return _merge(read_yaml(path.parent / base, (*_seen, path.resolve())), raw)


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=1` -> {"a": {"b": 1}}. ConfigError without an `=` or with a value that is no YAML."""
    key, sep, value = text.partition("=")
    parts = key.strip().split(".")
    if not sep or not all(parts):
        raise ConfigError(f"override {text!r}: write it as key=value, for example optimizer.lr=1e-5")
    try:
        tree: Any = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as e:
        raise ConfigError(f"override {text!r}: the value is not YAML ({e})") from None
    for part in reversed(parts):
        tree = {part: tree}
    return tree


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(filter(None, map(_section_of, typing.get_args(annotation))), None)
    return None


def _allowed_keys(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Keys of the section that `path`'s last part stands in."""
    for part in path[:-1]:
        field = model.model_fields.get(str(part))
        section = _section_of(field.annotation) if field else None
        if section is None:
            break
        model = section
    return sorted(model.model_fields)


def describe(error: ValidationError, model: type[BaseModel] = Config) -> str:
    """One line per problem: key, value, what is allowed."""
    lines = []
    for e in error.errors():
        key = ".".join(str(p) for p in e["loc"]) or "settings"
        message = e["msg"].removeprefix("Value error, ")
        if e["type"] == "extra_forbidden":
            allowed = _allowed_keys(model, e["loc"])
            near = difflib.get_close_matches(str(e["loc"][-1]), allowed, 1, 0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            lines.append(f"{key}: unknown key ({hint}allowed: {', '.join(allowed)})")
        elif e["type"] == "missing":
            lines.append(f"{key}: missing, and has no default")
        elif e["type"] == "value_error":
            lines.append(f"{key}: {message}")
        else:
            lines.append(f"{key} = {e['input']!r}: {message[0].lower()}{message[1:]}")
    return "\n".join(lines)


def load_config(paths: Sequence[Path | str], overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check. ConfigError (a ValueError) with one line per problem."""
    tree: dict[str, Any] = {}
    for path in paths:
        tree = _merge(tree, read_yaml(Path(path)))
    for text in overrides:
        tree = _merge(tree, parse_override(text))
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        raise ConfigError(describe(e)) from None


def dump_config(config: Config) -> str:
    """The resolved settings as YAML that `load_config` reads back to the same `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
