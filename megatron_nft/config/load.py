"""From YAML files and dotted overrides to a checked `Config`.

A file may name a `base:` file (relative to itself) whose values it overlays. Later files and then
`key=value` overrides win. Overrides are YAML values: `optimizer.lr=1e-5`, `data.train=[a.parquet]`.

Which keys `algorithm` has depends on `algorithm.name`. Where an overlay replaces the name, keys below it that only the
replaced algorithm reads are dropped; beside or above the name that holds, they are refused like any unknown key.
"""

from __future__ import annotations

import difflib
import functools
import re
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_nft.algorithms import ALGORITHMS, DEFAULT, AlgorithmError, algorithm_class
from megatron_nft.config.settings import Config

REMOVED = {
    "checkpoint.save_optimizer": "it had no effect, a checkpoint always holds the optimizer's state",
    "rollout.server.request_timeout_s": "an answer may take as long as it takes; rollout.server.stall_timeout_s says "
    "how long a server may stand still",
}
"""Former key -> why it is gone. Files and overrides that have one are still read; the key is dropped with a warning."""
KEYS_OF_0_1_0 = {
    *("name", "loss_divisor", "truncated", "ratio_max_log", "clip_low", "clip_high"),
    *("negative_weight", "clamp", "prompt_weight", "ratio", "correct_rate_min", "correct_rate_max"),
    *("overlong_buffer_tokens", "overlong_penalty"),
}
"""The keys of `algorithm` that version 0.1.0 wrote to every run's config.yaml, whatever the algorithm."""


class ConfigError(ValueError):
    """Settings that cannot be used. The message names key, value and what is allowed."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 1e-6 is a number and a key that stands twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*(?:[eE][-+]?\d+)|\.\d+(?:[eE][-+]?\d+)?|\d[\d_]*\.[\d_]*)$"),
    list("-+0123456789."),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(k) for k, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"key {key!r} stands twice{str(node.start_mark).rstrip()}")
    mapping: dict[Any, Any] = yaml.SafeLoader.construct_mapping(loader, node, deep=True)
    return mapping


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, mapping by mapping; lists are replaced."""
    out = dict(base)
    for key, value in top.items():
        out[key] = _merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def read_layers(path: Path, _seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """One config file with its `base:` files before it, each overlaid by the next. ConfigError if unreadable."""
    path = Path(path)
    if path.resolve() in _seen:
        raise ConfigError(f"{path}: `base:` comes back to a file that it started from")
    try:
        raw: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
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
        return [raw]
    if not isinstance(base, str):
        raise ConfigError(f"config file {path}: base must be a file name, not {base!r}")
    return [*read_layers(path.parent / base, (*_seen, path.resolve())), raw]


def _algorithm_of(layer: Mapping[str, Any]) -> dict[str, Any]:
    section = layer.get("algorithm")
    return section if isinstance(section, dict) else {}


def _keys_of_algorithm(name: object) -> set[str]:
    """The keys that an algorithm reads; none where it cannot be loaded, which validation refuses with the reason."""
    try:
        return set(algorithm_class(name).Settings.model_fields)
    except AlgorithmError:
        return set()


def _drop_replaced(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers, lowest first, without the keys of algorithms whose name a higher layer replaces.

    nft: {clamp: 0.5, clip: 1}  <-  grpo: {}     # `clamp` goes; `clip`, which nft does not read either, stays

    ConfigError for a key beside a name that does not read it, although the name is replaced by one that does; and for
    keys of a replaced algorithm that cannot be loaded, since nobody can say which of them it reads.
    """
    names: list[object] = []  # in force at each layer
    for layer in layers:
        names.append(_algorithm_of(layer).get("name", names[-1] if names else DEFAULT))
    read = _keys_of_algorithm(names[-1]) if names else set()
    kept = []
    for layer, name in zip(layers, names, strict=True):
        section = _algorithm_of(layer)
        if read and section and name != names[-1]:
            _check_replaced(section, name, read)
            dropped = section.keys() & _keys_of_algorithm(name) - read
            layer = {**layer, "algorithm": {key: v for key, v in section.items() if key not in dropped}}
        kept.append(layer)
    return kept


def _check_replaced(section: Mapping[str, Any], name: object, read: set[str]) -> None:
    """ConfigError for a section, under the replaced `name`, that is wrong by itself; `read`: keys of the new name."""
    try:
        own = algorithm_class(name).Settings.model_fields
    except AlgorithmError as e:
        if section.keys() - read:
            raise ConfigError(f"algorithm.name: {e}") from None
        return
    for key in sorted(section.keys() & read - own.keys()) if "name" in section else ():
        raise ConfigError(_unknown_algorithm_key(key, name))


def _without_unread(layer: dict[str, Any]) -> dict[str, Any]:
    """The layer; one that version 0.1.0 wrote, without the keys that its algorithm does not read. A FutureWarning
    names those."""
    section = _algorithm_of(layer)
    read = _keys_of_algorithm(section.get("name"))
    unread = sorted(KEYS_OF_0_1_0 - read) if section.keys() >= KEYS_OF_0_1_0 and read else []
    if not unread:
        return layer
    warnings.warn(
        f"algorithm lists the keys of every algorithm, as version 0.1.0 wrote them; {section['name']} does not read "
        f"{', '.join(unread)}: dropped",
        FutureWarning,
        stacklevel=1,
    )
    return {**layer, "algorithm": {key: value for key, value in section.items() if key not in unread}}


def _without_removed(layer: dict[str, Any]) -> dict[str, Any]:
    """The layer without the keys of `REMOVED`; a FutureWarning names each that it had."""
    for key, reason in REMOVED.items():
        if _has(layer, key.split(".")):
            warnings.warn(f"{key} was removed: {reason}", FutureWarning, stacklevel=1)
            layer = _without(layer, key.split("."))
    return layer


def _has(tree: Any, path: Sequence[str]) -> bool:
    first, *rest = path
    return isinstance(tree, dict) and first in tree and (not rest or _has(tree[first], rest))


def _without(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    first, *rest = path
    others = {key: value for key, value in tree.items() if key != first}
    return {**tree, first: _without(tree[first], rest)} if rest else others


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=1` -> {"a": {"b": 1}}. ConfigError without an `=` or with a value that is no YAML."""
    key, sep, value = text.partition("=")
    parts = key.strip().split(".")
    if not sep or not all(parts):
        raise ConfigError(f"override {text!r}: write it as key=value, for example optimizer.lr=1e-5")
    try:
        loaded = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as e:
        raise ConfigError(f"override {text!r}: the value is not YAML ({e})") from None
    *sections, last = parts
    tree: dict[str, Any] = {last: loaded}
    for part in reversed(sections):
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


def _unknown_algorithm_key(key: str, name: object) -> str:
    """What is wrong with `algorithm.KEY`, which the algorithm `name` does not read."""
    allowed = sorted(_keys_of_algorithm(name))
    readers = [other for other in ALGORITHMS if key in _keys_of_algorithm(other)]
    near = difflib.get_close_matches(key, allowed, 1, 0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    if readers:
        hint = f"read by {', '.join(readers)}; "
    return f"algorithm.{key}: unknown key for algorithm.name={name} ({hint}allowed: {', '.join(allowed)})"


def describe(error: ValidationError, tree: Mapping[str, Any], model: type[BaseModel] = Config) -> str:
    """One line per problem: key, value, what is allowed. `tree` are the values that were refused."""
    lines = []
    for e in error.errors():
        key = ".".join(str(p) for p in e["loc"]) or "settings"
        message = e["msg"].removeprefix("Value error, ")
        if e["type"] == "extra_forbidden" and len(e["loc"]) == 2 and e["loc"][0] == "algorithm":
            lines.append(_unknown_algorithm_key(str(e["loc"][1]), _algorithm_of(tree).get("name", DEFAULT)))
        elif e["type"] == "extra_forbidden":
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
    layers = [layer for path in paths for layer in read_layers(Path(path))]
    if overrides:
        layers.append(functools.reduce(_merge, map(parse_override, overrides)))
    nothing: dict[str, Any] = {}
    layers = [_without_unread(_without_removed(layer)) for layer in layers]
    tree = functools.reduce(_merge, _drop_replaced(layers), nothing)
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        raise ConfigError(describe(e, tree)) from None


def dump_config(config: Config) -> str:
    """The resolved settings as YAML that `load_config` reads back to the same `Config`."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text
