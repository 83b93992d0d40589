"""Drawing tokens from logits, reproducibly and independently of what else is in the batch.

Every position of every answer has one uniform number of its own, a function of (seed key, sample, position) alone, and
the token is the inverse of the cumulative distribution at that number. Rows can be reordered, removed or decoded on
another rank without changing what they draw.

Legend: B rows (answers under way), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from megatron_nft.engines.engine import SamplingParams

# SplitMix64 (Steele, Lea, Flood 2014): a counter times the golden gamma, then a mix. uint64 arithmetic wraps.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, uint64 -> uint64."""
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def row_keys(keys: Iterable[tuple[int, ...]]) -> np.ndarray:
    """One starting state per row from its tuple of integers; tuples of one length: N tuples -> uint64 [N]."""
    columns = np.array([[part & 0xFFFFFFFFFFFFFFFF for part in key] for key in keys], dtype=np.uint64)
    state = np.zeros(len(columns), dtype=np.uint64)
    for column in columns.T:
        state = _mix((state ^ column) + _GAMMA)
    return state


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The uniform number in [0, 1) of each row's position: uint64 [B], int64 [B] -> float64 [B]."""
    bits = _mix(keys + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_tokens(
    logits_BV: torch.Tensor, uniforms_B: torch.Tensor, sampling: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row, and its log-prob under the uncut distribution at the sampling temperature.

    logits [B, V] of any float dtype, uniforms float64 [B] -> int64 [B], float32 [B]. Computed in float64.
    Temperature 0 takes the largest logit and gives its log-prob at temperature 1.
    """
    logits_BV = logits_BV.double()
    if sampling.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
    else:
        logits_BV = logits_BV / sampling.temperature
        tokens_B = _inverse_cdf(_cut(logits_BV, sampling), uniforms_B)
    logprobs_B = logits_BV.gather(-1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
    return tokens_B, logprobs_B.float()


def _inverse_cdf(probabilities_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """First token whose cumulative probability exceeds the uniform number; never one of probability 0."""
    cumulative_BV = probabilities_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    # A target below the total is met by some token; rounding alone could put u * total at the total itself.
    target_B1 = torch.minimum(uniforms_B[:, None] * total_B1, total_B1 * (1 - 2.0**-53))
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]


def _cut(logits_BV: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Probabilities [B, V] with all but the top-k and top-p tokens at 0; not normalised again.

    top-p keeps the smallest set of most probable tokens that reaches it, taken among the top-k.
    """
    probabilities_BV = logits_BV.softmax(-1)
    if sampling.top_k == -1 and sampling.top_p == 1:
        return probabilities_BV
    top_k = min(sampling.top_k, logits_BV.shape[-1]) if sampling.top_k != -1 else logits_BV.shape[-1]
    sorted_Bk, index_Bk = probabilities_BV.topk(top_k, dim=-1)  # descending
    share_Bk = sorted_Bk / sorted_Bk.sum(-1, keepdim=True)
    before_Bk = share_Bk.cumsum(-1) - share_Bk  # what the more probable tokens hold
    kept_Bk = torch.where(before_Bk < sampling.top_p, sorted_Bk, 0.0)
    return torch.zeros_like(probabilities_BV).scatter(-1, index_Bk, kept_Bk)
