"""Packed (thd) causal attention for the CPU: every segment attends to itself alone.

Megatron's local attention refuses packed sequences and Transformer Engine's needs a GPU. Segments of similar length are
gathered into one padded batch, so that hundreds of short answers cost a few calls and not hundreds:

    cu_seqlens [0, 3, 5, 12, 15]  ->  widths 3: segments 0, 3 | 2: segment 1 | 7: segment 2

A causal mask needs no further padding mask: padding stands at the end, where no real token looks. The plan is made once
per micro-batch, not once per layer.

Under context parallelism a rank has two chunks of every segment (policy/context_parallel.py). Keys and values of all
ranks are gathered, and each chunk attends to its segment up to its own end:

    a segment of 8, CP 2    rank 0: queries 0 1 -> keys 0 to 1, queries 6 7 -> keys 0 to 7
                            rank 1: queries 2 3 -> keys 0 to 3, queries 4 5 -> keys 0 to 5
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

from megatron_nft.policy.context_parallel import UNSPLIT, TokenSplit


@dataclass
class PaddedBatch:
    """Segments, or chunks of them, of similar length. Past an end its last token is repeated."""

    queries: Tensor  # int64 [N, W]: index into this rank's tokens
    keys: Tensor  # int64 [N, K]: index into the keys and values
    mask: Tensor | None  # bool [N, 1, W, K]: whether a query sees a key; None: causal, and K = W


@dataclass
class SegmentPlan:
    """How this rank's tokens (T, or T / CP) become padded batches, and back."""

    batches: list[PaddedBatch]
    restore: Tensor  # int64 [T / CP]: index into the concatenated, flattened queries


@dataclass
class SegmentParams(PackedSeqParams):  # type: ignore[misc]  # megatron-core has no types
    """Megatron's packed parameters, with the plan for `PackedAttention`.

    `cu_seqlens_*_padded` is [0, T / CP]: it makes Megatron's RoPE take one frequency per token, as `PolicyModel`
    supplies them, in place of a slice per segment.
    """

    plan: SegmentPlan = field(kw_only=True)
    split: TokenSplit = field(kw_only=True)


def bucket_width(length: int) -> int:
    """The width that a segment is padded to: four steps per octave, so less than a quarter of a row is padding.

    1, 2, 3, ..., 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...
    """
    step = 1 << max(0, (length - 1).bit_length() - 3)
    return -(-length // step) * step


def plan_segments(cu_seqlens: Tensor, split: TokenSplit = UNSPLIT) -> SegmentPlan:
    """The plan for `cu_seqlens` (int32 [S + 1], from 0 to T), of this rank's tokens under `split`. Empty segments are
    left out."""
    if split.by_rank is None:
        return _plan(cu_seqlens, size=1, chunks=(0,), places=None)
    chunks = split.rank, 2 * split.size - 1 - split.rank
    return _plan(cu_seqlens, size=split.size, chunks=chunks, places=split.places)


def _plan(cu_seqlens: Tensor, *, size: int, chunks: tuple[int, ...], places: Tensor | None) -> SegmentPlan:
    """`chunks`: which of a segment's size * len(chunks) chunks this rank has. `places`: where each token's keys are."""
    bounds = cu_seqlens.tolist()
    parts = size * len(chunks)
    by_width: dict[int, list[tuple[int, int]]] = {}  # of chunks -> (start of the segment, its chunks' length)
    for start, end in itertools.pairwise(bounds):
        if end > start:
            length = (end - start) // parts
            by_width.setdefault(bucket_width(length), []).append((start, length))
    batches, restore, offset = [], torch.empty(bounds[-1] // size, dtype=torch.int64), 0
    for (width, segments), (nth, chunk) in itertools.product(sorted(by_width.items()), enumerate(chunks)):
        starts, lengths = (column[:, None] for column in torch.tensor(segments).T)  # [N, 1] each
        inside = torch.arange(width)
        queries = starts // size + nth * lengths + torch.minimum(inside, lengths - 1)  # [N, W]
        real = inside < lengths
        restore[queries[real]] = offset + real.flatten().nonzero().squeeze(1)
        position = torch.arange((chunk + 1) * width)  # of a key in its segment
        keys = starts + torch.minimum(position, (chunk + 1) * lengths - 1)  # [N, K]
        mask = (position <= (chunk * lengths + inside)[..., None])[:, None].to(cu_seqlens.device) if chunk else None
        batches.append(PaddedBatch(queries, keys if places is None else places[keys], mask))
        offset += queries.numel()
    return SegmentPlan(batches, restore)


def segment_params(cu_seqlens: Tensor, max_seqlen: int, split: TokenSplit = UNSPLIT) -> SegmentParams:
    """Packed parameters for the CPU from int32 [S + 1]."""
    whole = torch.tensor([0, int(cu_seqlens[-1]) // split.size], dtype=torch.int32)
    return SegmentParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=whole,
        cu_seqlens_kv_padded=whole,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        plan=plan_segments(cu_seqlens, split),
        split=split,
    )


def attend(query: Tensor, key: Tensor, value: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
    """query [T / CP, N, D], key and value [T, G, D] with G dividing N (grouped queries) -> [T / CP, N * D]."""
    outputs = []
    for batch in plan.batches:
        q = query[batch.queries].transpose(1, 2)  # [n, N, W, D]
        k, v = (x[batch.keys].transpose(1, 2) for x in (key, value))  # [n, G, K, D]
        grouped, causal = q.size(1) != k.size(1), batch.mask is None
        out = F.scaled_dot_product_attention(q, k, v, batch.mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).reshape(batch.queries.numel(), -1))
    return torch.cat(outputs)[plan.restore]


class PackedAttention(MegatronModule):  # type: ignore[misc]  # megatron-core has no types
    """Core attention of the CPU layer spec; takes packed input only."""

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__(config=config)
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
        """query [T / CP, N, D], key and value [T / CP, G, D] -> [T / CP, N * D]. Causal within a segment."""
        split = packed_seq_params.split
        if split.by_rank is not None:
            key, value = split.gather(torch.cat([key, value], dim=1)).chunk(2, dim=1)  # [T, G, D] each
        return attend(query, key, value, packed_seq_params.plan, self.scale)
