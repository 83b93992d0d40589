"""Packed (thd) causal attention for the CPU: every segment attends to itself alone.

Megatron's local attention refuses packed sequences and Transformer Engine's needs a GPU. Segments of similar length are
gathered into one padded batch, so that hundreds of short answers cost a few calls and not hundreds:

    cu_seqlens [0, 3, 5, 12, 15]  ->  widths 3: segments 0, 3 | 2: segment 1 | 7: segment 2

A causal mask needs no further padding mask: padding stands at the end, where no real token looks. The plan is made once
per micro-batch, not once per layer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass
class SegmentPlan:
    """How T packed tokens become padded batches of segments, and back."""

    gather: list[Tensor]  # per batch int64 [N, W]: index into T; past a segment's end its last token is repeated
    restore: Tensor  # int64 [T]: index into the concatenated, flattened batches


@dataclass
class SegmentParams(PackedSeqParams):  # type: ignore[misc]  # megatron-core has no types
    """Megatron's packed parameters, with the plan for `PackedAttention`.

    `cu_seqlens_*_padded` is [0, T]: it makes Megatron's RoPE take one frequency per token, as `PolicyModel` supplies
    them, in place of a slice per segment.
    """

    plan: SegmentPlan = field(kw_only=True)


def bucket_width(length: int) -> int:
    """The width that a segment is padded to: four steps per octave, so less than a quarter of a row is padding.

    1, 2, 3, ..., 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...
    """
    step = 1 << max(0, (length - 1).bit_length() - 3)
    return -(-length // step) * step


def plan_segments(cu_seqlens: Tensor) -> SegmentPlan:
    """The plan for `cu_seqlens` (int32 [S + 1], from 0 to T). Empty segments are left out."""
    bounds = cu_seqlens.tolist()
    by_width: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(bounds):
        if end > start:
            by_width.setdefault(bucket_width(end - start), []).append((start, end))
    gather, restore, offset = [], torch.empty(bounds[-1], dtype=torch.int64), 0
    for width, segments in sorted(by_width.items()):
        starts, ends = torch.tensor(segments).T  # [N] each
        index = starts[:, None] + torch.arange(width)  # [N, W]
        real = index < ends[:, None]
        restore[index[real]] = offset + real.flatten().nonzero().squeeze(1)
        gather.append(torch.minimum(index, ends[:, None] - 1))
        offset += index.numel()
    return SegmentPlan(gather, restore)


def segment_params(cu_seqlens: Tensor, max_seqlen: int) -> SegmentParams:
    """Packed parameters for the CPU from int32 [S + 1]."""
    whole = torch.tensor([0, int(cu_seqlens[-1])], dtype=torch.int32)
    return SegmentParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=whole,
        cu_seqlens_kv_padded=whole,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        plan=plan_segments(cu_seqlens),
    )


def attend(query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
    """query [T, N, D], key and value [T, G, D] with G dividing N (grouped queries) -> [T, N * D]."""
    outputs = []
    for index in plan.gather:
        q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))  # [n, heads, W, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))
        outputs.append(out.transpose(1, 2).reshape(index.numel(), -1))
    return torch.cat(outputs)[plan.restore]


class PackedAttention(MegatronModule):  # type: ignore[misc]  # megatron-core has no types
    """Core attention of the CPU layer spec; takes packed input only."""

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError(f"context_parallel_size is {config.context_parallel_size}; allowed on a CPU: 1")
        if config.attention_dropout:
            raise ValueError(f"attention_dropout is {config.attention_dropout}; allowed: 0")
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: SegmentParams,
        **_: Any,
    ) -> Tensor:
        """query [T, N, D], key and value [T, G, D] -> [T, N * D]. The mask is causal within a segment."""
        return attend(query, key, value, packed_seq_params.plan, self.scale)
