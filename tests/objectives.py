"""What `Policy.train_step` minimizes, made of a function: for tests and benchmarks that need no algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_nft.metrics import Max, Mean
from megatron_nft.types import PackedBatch

ALGORITHM_DEFAULTS = {
    "truncated": "negative",
    "behaviour": "recomputed",
    "correction": None,
    "correction_level": "token",
    "correction_low": 0.0,
    "correction_high": 2.0,
    "veto": None,
    "gap_limit": None,
}
"""What every algorithm has in its settings, beside its name and `loss_divisor`."""


def no_metrics(logprobs: Tensor, loss: Tensor, batch: PackedBatch) -> dict[str, Mean | Max]:
    return {}


@dataclass(frozen=True)
class Objective:
    """`loss(logprobs, batch)` -> loss per token [T]; `metrics(logprobs, loss, batch)` -> means and maxima."""

    loss: Callable[[Tensor, PackedBatch], Tensor]
    metrics: Callable[[Tensor, Tensor, PackedBatch], dict[str, Mean | Max]] = no_metrics
    per_token: bool = False
