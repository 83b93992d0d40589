"""Losses: pure functions of 1-D tensors, per token, not reduced.

`nft_loss`, `nft_sequence_loss`, `rft_loss` and `policy_gradient_loss` are public and stable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_nft.config import AlgorithmConfig
from megatron_nft.algorithms.diagnostics import diagnostics
from megatron_nft.algorithms.nft import nft_loss, nft_sequence_loss, rft_loss
from megatron_nft.algorithms.policy_gradient import advantages, policy_gradient_loss
from megatron_nft.types import PackedBatch

__all__ = [
    "LossFunction",
    "advantages",
    "diagnostics",
    "make_loss",
    "nft_loss",
    "nft_sequence_loss",
    "policy_gradient_loss",
    "rft_loss",
]

LossFunction = Callable[[Tensor, PackedBatch], tuple[Tensor, dict[str, Tensor]]]
"""(log-probs [T], batch) -> (masked per-token loss [T], `diagnostics` of it)."""


def make_loss(algorithm: AlgorithmConfig) -> LossFunction:
    """The loss that the settings name, over packed micro-batches; 0 outside the loss mask."""
    per_token = _per_token(algorithm)
    clamp = algorithm.clamp if algorithm.name == "nft" else None

    def loss(logprobs: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        masked = torch.where(batch.loss_mask > 0, per_token(logprobs, batch), 0.0)
        return masked, diagnostics(logprobs, masked, batch, clamp=clamp)

    return loss


def _per_token(a: AlgorithmConfig) -> Callable[[Tensor, PackedBatch], Tensor]:
    if a.name in ("grpo", "dr_grpo", "dapo"):
        clip = {"clip_low": a.clip_low, "clip_high": a.clip_high, "ratio_max_log": a.ratio_max_log}
        return lambda logprobs, b: policy_gradient_loss(logprobs, b.behaviour_logprobs, b.advantage, **clip)
    options = {
        "negative_weight": 0.0 if a.name == "rft" else a.negative_weight,
        "clamp": a.clamp,
        "prompt_weight": a.prompt_weight,
        "ratio_max_log": a.ratio_max_log,
    }
    if a.ratio == "sequence":
        return lambda logprobs, b: nft_sequence_loss(
            logprobs, b.behaviour_logprobs, b.correct, b.correct_rate, b.loss_mask, b.segment_ids, **options
        )
    return lambda logprobs, b: nft_loss(logprobs, b.behaviour_logprobs, b.correct, b.correct_rate, **options)
