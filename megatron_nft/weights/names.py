"""The one table of parameter names: Hugging Face <-> Megatron-Core, how they are merged and how they are split.

Every direction (import, export, checkpoint conversion, live sync, checksums) reads these rows. They are part of each
family's record in policy/families; a parameter that no row knows is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from megatron_nft.policy.families import FAMILIES
from megatron_nft.policy.families.parameters import Kind as Kind
from megatron_nft.policy.families.parameters import ParameterRow as ParameterRow


class Geometry(Hashable, Protocol):
    """The sizes of a model that the table needs; `policy.family.ModelSpec` has them."""

    @property
    def family(self) -> str:
        """Name of the model family, a key of `FAMILIES`."""

    @property
    def num_layers(self) -> int:
        """Transformer layers of the whole model."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""

    @property
    def num_query_groups(self) -> int:
        """Key/value heads."""

    @property
    def kv_channels(self) -> int:
        """Size of one head."""

    @property
    def ffn_hidden_size(self) -> int:
        """Inner width of the dense MLP."""

    @property
    def vocab_size(self) -> int:
        """Rows of the HF embedding, without a layout's padding."""

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""

    @property
    def num_experts(self) -> int:
        """Experts per layer; 0 for a dense model."""

    @property
    def moe_ffn_hidden_size(self) -> int:
        """Inner width of one expert."""


def rows(family: str, tied: bool) -> tuple[ParameterRow, ...]:
    """Return all rows of a family in the order of a forward pass. ValueError for an unknown family."""
    if family not in FAMILIES:
        raise ValueError(f"model family {family!r} is not in the name table; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[family].rows(tied)


@dataclass(frozen=True, slots=True)
class Place:
    """One Megatron parameter of the whole model."""

    row: ParameterRow
    layer: int | None  # counted over the whole model
    expert: int | None  # counted over the whole layer

    @property
    def hf_names(self) -> list[str]:
        """Names of the HF tensors that the parameter holds."""
        return [name.format(layer=self.layer, expert=self.expert) for name, _ in self.row.hf]

    def hf_shapes(self, geometry: Geometry) -> list[tuple[int, ...]]:
        """Return the full shapes of the HF tensors, in the order of `hf_names`."""
        sizes = axis_sizes(geometry)
        return [tuple(sizes[axis] for axis in axes) for _, axes in self.row.hf]


def axis_sizes(geometry: Geometry) -> dict[str, int]:
    """Return the length of each axis by its letter."""
    return {
        "h": geometry.hidden_size,
        "q": geometry.num_attention_heads * geometry.kv_channels,
        "k": geometry.num_query_groups * geometry.kv_channels,
        "d": geometry.kv_channels,
        "f": geometry.ffn_hidden_size,
        "v": geometry.vocab_size,
        "e": geometry.num_experts,
        "x": geometry.moe_ffn_hidden_size,
    }


# `layers.7.`, `local_experts.3.` and Transformer Engine's `weight3`; the digit of `linear_fc1` is no index.
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)|(?<=weight)\d+$")


@cache
def _by_megatron_pattern(family: str, tied: bool) -> dict[str, ParameterRow]:
    return {name.format(layer="#", expert="#"): row for row in rows(family, tied) for name in row.megatron}


def place_of(megatron_name: str, geometry: Geometry) -> Place:
    """Return row and indices of a Megatron parameter name. ValueError for a name that no row of the family knows."""
    row = _by_megatron_pattern(geometry.family, geometry.tied).get(_INDEX.sub("#", megatron_name))
    if row is None:
        raise ValueError(
            f"Megatron parameter {megatron_name!r} is not in the name table of family {geometry.family!r} "
            "(megatron_nft/weights/names.py)"
        )
    indices = [int(i) for i in _INDEX.findall(megatron_name)]
    return Place(row, indices[0] if indices else None, indices[1] if row.expert else None)


def all_places(geometry: Geometry) -> Iterator[Place]:
    """Yield every parameter of the model, tied copies included, in the order of a forward pass."""
    table = rows(geometry.family, geometry.tied)
    per_layer = [row for row in table if "{layer}" in row.megatron[0]]
    first, *last = [row for row in table if "{layer}" not in row.megatron[0]]
    yield Place(first, None, None)
    for layer in range(geometry.num_layers):
        for row in per_layer:
            for expert in range(geometry.num_experts) if row.expert else [None]:
                yield Place(row, layer, expert)
    for row in last:
        yield Place(row, None, None)


def hf_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Return the full shape by HF name of exactly the tensors that the model's folder must hold."""
    return {
        name: shape
        for place in all_places(geometry)
        for name, shape in zip(place.hf_names, place.hf_shapes(geometry), strict=True)
    }
