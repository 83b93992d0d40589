"""Rows of the table of parameter names, and those that several model families share.

A row says: these HF tensors, in this order, make that Megatron parameter. Shapes are written with one letter per axis:

    h hidden_size            q query heads x head size      v vocab_size
    d head size              k key/value heads x head size  f ffn_hidden_size
    e number of experts      x ffn size of one expert

`{layer}` and `{expert}` in a name stand for indices, counted from 0 over the whole model and the whole layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """How tensor-parallel ranks divide a parameter."""

    REPLICATED = "replicated"
    COLUMN = "column"  # split along dim 0
    ROW = "row"  # split along dim 1
    VOCAB = "vocab"  # split along dim 0, perhaps padded at the end
    QKV = "qkv"  # q, k, v: each split along dim 0, then interleaved per key/value group as [q heads | k | v]
    GATE_UP = "gate_up"  # gate, up: each split along dim 0, then [gate | up]


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """These HF tensors, in this order, make that Megatron parameter."""

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

EMBEDDING = ParameterRow(Kind.VOCAB, ("embedding.word_embeddings.weight",), (("model.embed_tokens.weight", "vh"),))
FINAL_NORM = ParameterRow(Kind.REPLICATED, ("decoder.final_layernorm.weight",), (("model.norm.weight", "h"),))
OUTPUT = ParameterRow(Kind.VOCAB, ("output_layer.weight",), (("lm_head.weight", "vh"),))
TIED_OUTPUT = ParameterRow(Kind.VOCAB, ("output_layer.weight",), (("model.embed_tokens.weight", "vh"),), tied_copy=True)

ATTENTION = (
    ParameterRow(
        Kind.REPLICATED,
        (_M + "input_layernorm.weight", _M + "self_attention.linear_qkv.layer_norm_weight"),
        ((_H + "input_layernorm.weight", "h"),),
    ),
    ParameterRow(
        Kind.QKV,
        (_M + "self_attention.linear_qkv.weight",),
        (
            (_H + "self_attn.q_proj.weight", "qh"),
            (_H + "self_attn.k_proj.weight", "kh"),
            (_H + "self_attn.v_proj.weight", "kh"),
        ),
    ),
    ParameterRow(Kind.ROW, (_M + "self_attention.linear_proj.weight",), ((_H + "self_attn.o_proj.weight", "hq"),)),
)
QKV_BIAS = (
    ParameterRow(
        Kind.QKV,
        (_M + "self_attention.linear_qkv.bias",),
        (
            (_H + "self_attn.q_proj.bias", "q"),
            (_H + "self_attn.k_proj.bias", "k"),
            (_H + "self_attn.v_proj.bias", "k"),
        ),
    ),
)
QK_NORM = (
    ParameterRow(
        Kind.REPLICATED, (_M + "self_attention.q_layernorm.weight",), ((_H + "self_attn.q_norm.weight", "d"),)
    ),
    ParameterRow(
        Kind.REPLICATED, (_M + "self_attention.k_layernorm.weight",), ((_H + "self_attn.k_norm.weight", "d"),)
    ),
)
DENSE_MLP = (
    ParameterRow(
        Kind.REPLICATED,
        (_M + "pre_mlp_layernorm.weight", _M + "mlp.linear_fc1.layer_norm_weight"),
        ((_H + "post_attention_layernorm.weight", "h"),),
    ),
    ParameterRow(
        Kind.GATE_UP,
        (_M + "mlp.linear_fc1.weight",),
        ((_H + "mlp.gate_proj.weight", "fh"), (_H + "mlp.up_proj.weight", "fh")),
    ),
    ParameterRow(Kind.ROW, (_M + "mlp.linear_fc2.weight",), ((_H + "mlp.down_proj.weight", "hf"),)),
)
_HX = _H + "mlp.experts.{expert}."
_STORED = "decoder.layers.mlp."
EXPERT_MLP = (
    ParameterRow(
        Kind.REPLICATED,
        (_M + "pre_mlp_layernorm.weight",),
        ((_H + "post_attention_layernorm.weight", "h"),),
        stored=("decoder.layers.pre_mlp_layernorm.weight", _STORED + "linear_fc1.layer_norm_weight"),  # TE's, local's
    ),
    ParameterRow(Kind.REPLICATED, (_M + "mlp.router.weight",), ((_H + "mlp.gate.weight", "eh"),)),
    ParameterRow(
        Kind.GATE_UP,
        (_M + "mlp.experts.local_experts.{expert}.linear_fc1.weight", _M + "mlp.experts.linear_fc1.weight{expert}"),
        ((_HX + "gate_proj.weight", "xh"), (_HX + "up_proj.weight", "xh")),
        expert=True,
        stored=(_STORED + "experts.experts.linear_fc1.weight",),
    ),
    ParameterRow(
        Kind.ROW,
        (_M + "mlp.experts.local_experts.{expert}.linear_fc2.weight", _M + "mlp.experts.linear_fc2.weight{expert}"),
        ((_HX + "down_proj.weight", "hx"),),
        expert=True,
        stored=(_STORED + "experts.experts.linear_fc2.weight",),
    ),
)
