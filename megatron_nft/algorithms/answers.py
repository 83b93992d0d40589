"""Sums over the tokens of an answer, within a packed micro-batch. An answer is never split over micro-batches.

Legend: T tokens of the micro-batch; a token's answer is its segment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def sum_per_answer(
    values: Tensor,  # [T]
    loss_mask: Tensor,  # [T], 1 on response tokens
    segment_ids: Tensor,  # int64 [T], 0 .. S-1
) -> Tensor:
    """Sum of `values` over the response tokens of each token's answer, [T]: the same on all tokens of a segment.

    Outside the mask `values` may be anything, NaN too.
    """
    if segment_ids.numel() == 0:
        return values
    inside = values.where(loss_mask > 0, 0.0)
    per_segment = values.new_zeros(int(segment_ids.max()) + 1).index_add(0, segment_ids, inside)  # [S]
    return per_segment[segment_ids]


def tokens_per_answer(loss_mask: Tensor, segment_ids: Tensor) -> Tensor:
    """Response tokens of each token's answer, in the dtype of `loss_mask`, [T]; 1 where it has none."""
    return sum_per_answer(loss_mask, loss_mask, segment_ids).clamp(min=1.0)
