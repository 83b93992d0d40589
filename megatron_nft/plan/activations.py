"""Bytes that the backward pass keeps, per token and layer, for the GPU spec and the CPU spec.

Legend: e bytes per element, h hidden, q = heads x head size D, kv = key/value heads x D, f MLP width, tp
tensor-parallel size, s = tp under sequence parallel, else 1, cp context-parallel size. q, kv and f below are a rank's
share: whole / tp. Tokens are a rank's own: under context parallelism 1 / cp of a micro-batch.

GPU spec (Transformer Engine: norm fused into the next linear, fused RoPE and SwiGLU), read off the tensors that
`_LayerNormLinear`, `_Linear`, `FusedAttnFunc` and megatron-core's `SwiGLUFunction` save; not measured:

    attention  norm input h e/s, norm output h e/s, QKV (q + 2 kv) e (kept alive by its view V), rotated Q and K
               (q + kv) e, Qwen3 also the normed ones (q + kv) e, output q e, log-sum-exp 4 heads
    MLP        norm input h e/s, norm output h e/s, gate and up 2 f e, their product f e

Under FP8 the inputs of the four linears are kept in one byte (the attention's output in both). Transformer Engine's
context-parallel attention (K and V go round the ranks) keeps a rank's own K and V for the backward pass.

CPU spec (own RMSNorm in fp32, unfused linears, SDPA per segment, unfused RoPE and SwiGLU), counted with saved-tensor
hooks by tests/unit/test_plan_memory.py:

    norm       fp32 input 4 h/s, its inverse size 4/s, normed h e/s, weighted h e/s (the next linear's input)
    attention  a norm, cos and sin 4 D e, gathered Q, K, V (q + 2 kv) e (under context parallelism each chunk has K
               and V of its segment up to its end, (cp + 1/2) 2 kv e in place of 2 kv e for the two together; their mask
               is not counted), SDPA's output q e and log-sum-exp 4 heads,
               the projection's input q e; Qwen3's two norms (q + kv) (4 + e) + 4 heads, in fp32 also QKV itself
    MLP        a norm, gate and up 2 f e, SiLU's output, the other factor, their product 3 f e
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_nft.plan.architecture import kv_size, mlp_width, q_size
from megatron_nft.plan.layout import LayoutSettings
from megatron_nft.policy.family import ModelSpec


@dataclass(frozen=True)
class LayerBytes:
    """Bytes per token of one layer on one rank."""

    kept: dict[str, float]  # recompute setting -> from the forward pass until the layer's backward pass
    recomputed: dict[str, float]  # recompute setting -> on top, in the layer that is being walked backwards
    gradients: float  # largest gradients alive at once in that layer


@dataclass(frozen=True)
class _Sizes:
    """The legend's letters for one rank."""

    h: float
    q: float
    kv: float
    f: float
    heads: float
    kv_heads: float
    s: int

    @classmethod
    def of(cls, spec: ModelSpec, layout: LayoutSettings) -> _Sizes:
        tp = layout.tp
        # With EP a rank has whole experts; under sequence parallel it gets them for its share of the tokens.
        mlp_split = tp if layout.ep == 1 or layout.sequence_parallel else 1
        return cls(
            h=spec.hidden_size,
            q=q_size(spec) / tp,
            kv=kv_size(spec) / tp,
            f=mlp_width(spec) / mlp_split,
            heads=spec.num_attention_heads / tp,
            kv_heads=spec.num_query_groups / tp,
            s=tp if layout.sequence_parallel else 1,
        )


def _layer(
    attention: float, mlp: float, selective: float, mlp_input: float, core: float, full: float, gradients: float
) -> LayerBytes:
    """Selective recompute brings back `core` and `mlp - mlp_input`, one after the other."""
    kept = {"none": attention + mlp, "selective": selective, "full": full}
    recomputed = {"none": 0.0, "selective": max(core, mlp - mlp_input), "full": attention + mlp}
    return LayerBytes(kept, recomputed, gradients)


def gpu_layer(spec: ModelSpec, layout: LayoutSettings, fp8: bool) -> LayerBytes:
    """The GPU spec in bf16, linears in FP8 if `fp8`."""
    e, z = 2, _Sizes.of(spec, layout)
    linear_input = 1 if fp8 else e
    norm = z.h * (e + linear_input) / z.s
    lse = 4 * z.heads
    attention = norm + (z.q + 2 * z.kv) * e + (z.q + z.kv) * e * (2 if spec.qk_layernorm else 1) + z.q * e + lse
    attention += z.q if fp8 else 0  # the projection's quantized input beside the attention's own output
    mlp = norm + 2 * z.f * e + z.f * linear_input
    residual = z.h * e / z.s
    gathered = z.h * e if z.s > 1 else 0
    return _layer(
        attention=attention,
        mlp=mlp,
        selective=attention - lse + residual,
        mlp_input=residual,
        core=lse,
        full=residual,
        gradients=3 * z.f * e + gathered,
    )


def cpu_layer(spec: ModelSpec, layout: LayoutSettings, e: int) -> LayerBytes:
    """The CPU spec; `e` is 4 in fp32 and 2 in bf16."""
    z = _Sizes.of(spec, layout)
    norm = (4 * z.h + 4 + 2 * z.h * e) / z.s
    rope = 4 * spec.kv_channels * e
    head_norms = 0.0
    if spec.qk_layernorm:
        head_norms = (z.q + z.kv) * (4 + e) + 4 * (z.heads + z.kv_heads) + ((z.q + z.kv) * e if e == 4 else 0)
    keys = layout.cp + 0.5 if layout.cp > 1 else 1
    core = (2 * z.q + 2 * z.kv * keys) * e + 4 * z.heads
    mlp = norm + 5 * z.f * e
    # A checkpointed core attention keeps the rotated Q and K, and the QKV tensor that V is a view of.
    core_inputs = (2 * z.q + 3 * z.kv) * e - (z.q + 2 * z.kv) * e * (spec.qk_layernorm and e == 4)
    return _layer(
        attention=norm + rope + head_norms + core + z.q * e,
        mlp=mlp,
        selective=norm + rope + head_norms + core_inputs + z.q * e + norm,
        mlp_input=norm,
        core=core,
        full=z.h * e / z.s,
        gradients=3 * z.f * e,
    )


def cpu_ends(spec: ModelSpec, layout: LayoutSettings, e: int, stage: int) -> float:
    """Bytes per token outside the layers: token ids on the first stage, the final norm and its result on the last."""
    z = _Sizes.of(spec, layout)
    ids = 8 if stage == 0 else 0
    return ids + ((4 * z.h + 4 + 2 * z.h * e) / z.s if stage == layout.pp - 1 else 0)


def packed_attention_workspace(spec: ModelSpec, layout: LayoutSettings) -> float:
    """Bytes per token of FlashAttention's backward: fp32 dQ, and 16-bit dK, dV expanded to all heads. Or, if that is
    more, of the forward pass of Transformer Engine's context-parallel attention: from each rank in 16 bits K and V, and
    an output of its own."""
    q, kv, cp = q_size(spec) / layout.tp, kv_size(spec) / layout.tp, layout.cp
    return max(8 * q, 2 * cp * (q + 2 * kv) if cp > 1 else 0)
