"""The one table of parameter names: Hugging Face <-> Megatron-Core, how they are merged and how they are split.

Every direction (import, export, checkpoint conversion, live sync, checksums) reads these rows. A new family is one more
entry of `FAMILIES`; a parameter that no row knows is an error that names it.

A row says: these HF tensors, in this order, make that Megatron parameter. Shapes are written with one letter per axis:

    h hidden_size            q query heads x head size      v vocab_size
    d head size              k key/value heads x head size  f ffn_hidden_size
    e number of experts      x ffn size of one expert
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Protocol


class Geometry(Protocol):
    """The figures of a model that the table needs; `policy.family.ModelSpec` has them."""

    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    kv_channels: int  # size of one head
    ffn_hidden_size: int
    vocab_size: int
    tied: bool  # the output layer is the embedding
    num_experts: int  # 0 for a dense model
    moe_ffn_hidden_size: int


class Kind(StrEnum):
    """How tensor-parallel ranks divide a parameter."""

    REPLICATED = "replicated"
    COLUMN = "column"  # split along dim 0
    ROW = "row"  # split along dim 1
    VOCAB = "vocab"  # split along dim 0, perhaps padded at the end
    QKV = "qkv"  # q, k, v: each split along dim 0, then interleaved per key/value group as [q heads | k | v]
    GATE_UP = "gate_up"  # gate, up: each split along dim 0, then [gate | up]


@dataclass(frozen=True, slots=True)
class Row:
    kind: Kind
    megatron: tuple[str, ...]  # the name in the local spec, then Transformer Engine's where that differs
    hf: tuple[tuple[str, str], ...]  # (HF name, axes), in Megatron's order
    expert: bool = False
    tied_copy: bool = False  # a second holder of the embedding: filled by an import, left out of an export
    stored: tuple[str, ...] = ()  # keys in a checkpoint, where all layers of a name make one tensor; see stored_keys

    @property
    def stored_keys(self) -> tuple[str, ...]:
        """Checkpoints use Transformer Engine's names under either layer spec."""
        return self.stored or (self.megatron[-1].replace("{layer}.", ""),)


_M, _H = "decoder.layers.{layer}.", "model.layers.{layer}."

_EMBEDDING = Row(Kind.VOCAB, ("embedding.word_embeddings.weight",), (("model.embed_tokens.weight", "vh"),))
_FINAL_NORM = Row(Kind.REPLICATED, ("decoder.final_layernorm.weight",), (("model.norm.weight", "h"),))
_OUTPUT = Row(Kind.VOCAB, ("output_layer.weight",), (("lm_head.weight", "vh"),))
_TIED_OUTPUT = Row(Kind.VOCAB, ("output_layer.weight",), (("model.embed_tokens.weight", "vh"),), tied_copy=True)

_ATTENTION = (
    Row(
        Kind.REPLICATED,
        (_M + "input_layernorm.weight", _M + "self_attention.linear_qkv.layer_norm_weight"),
        ((_H + "input_layernorm.weight", "h"),),
    ),
    Row(
        Kind.QKV,
        (_M + "self_attention.linear_qkv.weight",),
        (
            (_H + "self_attn.q_proj.weight", "qh"),
            (_H + "self_attn.k_proj.weight", "kh"),
            (_H + "self_attn.v_proj.weight", "kh"),
        ),
    ),
    Row(Kind.ROW, (_M + "self_attention.linear_proj.weight",), ((_H + "self_attn.o_proj.weight", "hq"),)),
)
_QKV_BIAS = (
    Row(
        Kind.QKV,
        (_M + "self_attention.linear_qkv.bias",),
        (
            (_H + "self_attn.q_proj.bias", "q"),
            (_H + "self_attn.k_proj.bias", "k"),
            (_H + "self_attn.v_proj.bias", "k"),
        ),
    ),
)
_QK_NORM = (
    Row(Kind.REPLICATED, (_M + "self_attention.q_layernorm.weight",), ((_H + "self_attn.q_norm.weight", "d"),)),
    Row(Kind.REPLICATED, (_M + "self_attention.k_layernorm.weight",), ((_H + "self_attn.k_norm.weight", "d"),)),
)
_DENSE_MLP = (
    Row(
        Kind.REPLICATED,
        (_M + "pre_mlp_layernorm.weight", _M + "mlp.linear_fc1.layer_norm_weight"),
        ((_H + "post_attention_layernorm.weight", "h"),),
    ),
    Row(
        Kind.GATE_UP,
        (_M + "mlp.linear_fc1.weight",),
        ((_H + "mlp.gate_proj.weight", "fh"), (_H + "mlp.up_proj.weight", "fh")),
    ),
    Row(Kind.ROW, (_M + "mlp.linear_fc2.weight",), ((_H + "mlp.down_proj.weight", "hf"),)),
)
_HX = _H + "mlp.experts.{expert}."
_STORED = "decoder.layers.mlp."
_MOE_MLP = (
    Row(
        Kind.REPLICATED,
        (_M + "pre_mlp_layernorm.weight",),
        ((_H + "post_attention_layernorm.weight", "h"),),
        stored=("decoder.layers.pre_mlp_layernorm.weight", _STORED + "linear_fc1.layer_norm_weight"),  # TE's, local's
    ),
    Row(Kind.REPLICATED, (_M + "mlp.router.weight",), ((_H + "mlp.gate.weight", "eh"),)),
    Row(
        Kind.GATE_UP,
        (_M + "mlp.experts.local_experts.{expert}.linear_fc1.weight", _M + "mlp.experts.linear_fc1.weight{expert}"),
        ((_HX + "gate_proj.weight", "xh"), (_HX + "up_proj.weight", "xh")),
        expert=True,
        stored=(_STORED + "experts.experts.linear_fc1.weight",),
    ),
    Row(
        Kind.ROW,
        (_M + "mlp.experts.local_experts.{expert}.linear_fc2.weight", _M + "mlp.experts.linear_fc2.weight{expert}"),
        ((_HX + "down_proj.weight", "hx"),),
        expert=True,
        stored=(_STORED + "experts.experts.linear_fc2.weight",),
    ),
)

FAMILIES: dict[str, tuple[Row, ...]] = {
    "llama": _ATTENTION + _DENSE_MLP,
    "qwen2": _ATTENTION + _QKV_BIAS + _DENSE_MLP,
    "qwen3": _ATTENTION + _QK_NORM + _DENSE_MLP,
    "qwen3_moe": _ATTENTION + _QK_NORM + _MOE_MLP,
}


def rows(family: str, tied: bool) -> tuple[Row, ...]:
    """All rows of a family in the order of a forward pass. ValueError for a family that the table does not know."""
    if family not in FAMILIES:
        raise ValueError(f"model family {family!r} is not in the name table; known: {', '.join(sorted(FAMILIES))}")
    return (_EMBEDDING, *FAMILIES[family], _FINAL_NORM, _TIED_OUTPUT if tied else _OUTPUT)


@dataclass(frozen=True, slots=True)
class Place:
    """One Megatron parameter of the whole model."""

    row: Row
    layer: int | None  # counted over the whole model
    expert: int | None  # counted over the whole layer

    @property
    def hf_names(self) -> list[str]:
        return [name.format(layer=self.layer, expert=self.expert) for name, _ in self.row.hf]

    def hf_shapes(self, geometry: Geometry) -> list[tuple[int, ...]]:
        sizes = axis_sizes(geometry)
        return [tuple(sizes[axis] for axis in axes) for _, axes in self.row.hf]


def axis_sizes(geometry: Geometry) -> dict[str, int]:
    """Letter of an axis -> its length."""
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
def _by_megatron_pattern(family: str, tied: bool) -> dict[str, Row]:
    return {name.format(layer="#", expert="#"): row for row in rows(family, tied) for name in row.megatron}


def place_of(megatron_name: str, geometry: Geometry) -> Place:
    """Row and indices of a Megatron parameter name. ValueError for a name that no row of the family knows."""
    row = _by_megatron_pattern(geometry.family, geometry.tied).get(_INDEX.sub("#", megatron_name))
    if row is None:
        raise ValueError(
            f"Megatron parameter {megatron_name!r} is not in the name table of family {geometry.family!r} "
            "(megatron_nft/weights/names.py)"
        )
    indices = [int(i) for i in _INDEX.findall(megatron_name)]
    return Place(row, indices[0] if indices else None, indices[1] if row.expert else None)


def all_places(geometry: Geometry) -> Iterator[Place]:
    """Every parameter of the model, tied copies included, in the order of a forward pass."""
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
    """HF name -> full shape, for every tensor that the model's folder must hold and nothing else."""
    return {
        name: shape
        for place in all_places(geometry)
        for name, shape in zip(place.hf_names, place.hf_shapes(geometry), strict=True)
    }
