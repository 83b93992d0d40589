"""What a step's log shows of the loss, as sums that may be added over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_nft.algorithms.nft import negative_argument
from megatron_nft.types import PackedBatch

_EXP_LIMIT = 80.0  # exp(80) is still a finite float32; a ratio beyond it is shown as 5.5e34


@torch.no_grad()
def diagnostics(logprobs: Tensor, loss: Tensor, batch: PackedBatch, *, clamp: float | None) -> dict[str, Tensor]:
    """Scalar tensors over the masked tokens of one micro-batch.

    Keys without prefix are sums: add them over micro-batches and ranks, then divide by `tokens`, `positive_tokens`
    or `negative_tokens`. Keys with `max_` are maxima (0 in a filler). `loss` is the per-token loss [T].

    tokens, positive_tokens, negative_tokens   counts, by verdict
    positive_loss, negative_loss               loss over correct and over wrong answers
    ratio, log_ratio                           R and log R against the behaviour policy
    kl                                         R - 1 - log R, an estimate of KL(behaviour || policy) that is never < 0
    clamped_tokens                             wrong tokens whose clamp is active (only with `clamp`)
    max_ratio, max_inverse_ratio               largest R and largest 1 / R
    """
    mask = batch.loss_mask > 0
    log_ratio = torch.where(mask, logprobs - batch.behaviour_logprobs, 0.0).float()
    log_ratio = log_ratio.clamp(-_EXP_LIMIT, _EXP_LIMIT)
    ratio = log_ratio.exp()
    positive = mask & (batch.correct > 0)
    negative = mask & (batch.correct <= 0)

    def total(values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, values, 0.0).sum()

    def largest(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).max()

    out = {
        "tokens": mask.sum().float(),
        "positive_tokens": positive.sum().float(),
        "negative_tokens": negative.sum().float(),
        "positive_loss": total(loss, positive).float(),
        "negative_loss": total(loss, negative).float(),
        "ratio": total(ratio, mask),
        "log_ratio": total(log_ratio, mask),
        "kl": total(ratio - 1.0 - log_ratio, mask),
        "max_ratio": largest(ratio),
        "max_inverse_ratio": largest((-log_ratio).exp()),
    }
    if clamp is not None:
        out["clamped_tokens"] = (negative & (negative_argument(log_ratio, batch.correct_rate) < clamp)).sum().float()
    return out
