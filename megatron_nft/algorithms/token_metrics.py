"""The metrics that every algorithm logs of its loss and of the ratio of the trained to the behaviour policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_nft.metrics import Max, Mean

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_nft.types import PackedBatch

_EXP_LIMIT = 80.0  # exp(80) is still a finite float32; a ratio beyond it is shown as 5.5e34


def token_metrics(logprobs: Tensor, loss: Tensor, batch: PackedBatch) -> dict[str, Mean | Max]:
    """Metrics over the trained tokens of one micro-batch; `logprobs` and `loss` are [T], the loss 0 outside the mask.

    loss/positive, loss/negative    loss per token of correct and of wrong answers
    tokens/positive_share           share of the tokens that belong to correct answers
    ratio/mean, ratio/log_mean      R and log R against the behaviour policy
    ratio/kl                        R - 1 - log R, an estimate of KL(behaviour || policy) that is never below 0
                                    (k3 of Schulman, "Approximating KL Divergence")
    ratio/max, ratio/max_inverse    largest R and largest 1 / R (0 in a filler)
    """
    mask = batch.loss_mask > 0
    positive = mask & (batch.correct >= 0.5)  # as the verdict is made of a grader's number
    negative = mask & (batch.correct < 0.5)
    log_ratio = bounded_log_ratio(logprobs, batch)
    ratio = log_ratio.exp()
    tokens, positive_tokens = mask.sum(), positive.sum()

    def total(values: Tensor, where: Tensor) -> Tensor:
        return values.where(where, 0.0).sum().float()

    def largest(values: Tensor) -> Max:
        return Max(values.where(mask, 0.0).max())

    return {
        "loss/positive": Mean(total(loss, positive), positive_tokens),
        "loss/negative": Mean(total(loss, negative), negative.sum()),
        "tokens/positive_share": Mean(positive_tokens, tokens),
        "ratio/mean": Mean(total(ratio, mask), tokens),
        "ratio/log_mean": Mean(total(log_ratio, mask), tokens),
        "ratio/kl": Mean(total(ratio - 1.0 - log_ratio, mask), tokens),
        "ratio/max": largest(ratio),
        "ratio/max_inverse": largest((-log_ratio).exp()),
    }


def bounded_log_ratio(logprobs: Tensor, batch: PackedBatch) -> Tensor:
    """log R of each trained token, fp32 [T], within the range in which R and 1 / R are finite; 0 outside the mask."""
    log_ratio = (logprobs - batch.behaviour_logprobs).where(batch.loss_mask > 0, 0.0).float()
    return log_ratio.clamp(-_EXP_LIMIT, _EXP_LIMIT)
