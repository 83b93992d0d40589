"""Rotary position embedding as a parsed config.json has it, in the form of transformers 4 or of transformers 5.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`. A file that was edited may have
both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class UnsupportedModelError(ValueError):
    """A model that may be sound, but that this code does not compute: another family, activation or RoPE scaling."""


LLAMA3_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's `rope_type: llama3`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Rope:
    """RoPE as one place of config.json has it."""

    key: str  # rope_parameters | rope_scaling
    theta: float
    kind: str
    values: dict[str, Any]

    def scaling(self) -> RopeScaling | None:
        """Read the scaling; UnsupportedModelError for a kind that the code does not compute."""
        if self.kind == "default":
            return None
        if self.kind != "llama3":
            raise UnsupportedModelError(f"{self.key}.rope_type is {self.kind!r}; allowed: 'default', 'llama3'")
        values = self.values
        missing = [name for name in LLAMA3_ROPE_KEYS if not isinstance(values.get(name), int | float)]
        if missing:
            raise ValueError(f"{self.key} of rope_type llama3 lacks the number(s) {', '.join(missing)}")
        if not values["high_freq_factor"] > values["low_freq_factor"]:
            raise ValueError(
                f"{self.key}.high_freq_factor ({values['high_freq_factor']}) must exceed "
                f"low_freq_factor ({values['low_freq_factor']})"
            )
        return RopeScaling(*(values[name] for name in LLAMA3_ROPE_KEYS))


def read_rope(config: dict[str, Any]) -> Rope:
    """RoPE from `rope_parameters`, from `rope_theta` and `rope_scaling`, or from both where they agree.

    ValueError, naming the places, where they do not: libraries differ in which of them they believe.
    """
    found = [_rope_at(config, key) for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    if not found:
        return _rope_at(config, "rope_scaling")
    first, *others = found
    for other in others:
        if (first.theta, first.kind, first.values) != (other.theta, other.kind, other.values):
            raise ValueError(
                f"rope_parameters is {config['rope_parameters']!r} and rope_scaling is {config['rope_scaling']!r}: "
                "they contradict each other; keep the one that the model was trained with"
            )
    return first


def _rope_at(config: dict[str, Any], key: str) -> Rope:
    """RoPE as `key` has it, with the theta beside it where it has none of its own."""
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{key} is {rope!r}; it must be an object or null")
    beside = config.get("rope_theta")
    theta = rope.get("rope_theta", 10000.0 if beside is None else beside)
    if not isinstance(theta, int | float) or theta <= 0:
        raise ValueError(f"rope_theta is {theta!r}; it must be a positive number")
    if beside is not None and beside != theta:
        raise ValueError(f"rope_theta is {beside!r} and {key}.rope_theta is {theta!r}; keep the one that is right")
    kinds = [rope[name] for name in ("rope_type", "type") if name in rope] or ["default"]
    if len(set(kinds)) > 1:
        raise ValueError(f"{key}.rope_type is {kinds[0]!r} and {key}.type is {kinds[1]!r}; keep the one that is right")
    own = {"rope_theta", "rope_type", "type"} if kinds[0] != "default" else rope.keys()  # default reads theta alone
    return Rope(key, float(theta), kinds[0], {name: value for name, value in rope.items() if name not in own})
