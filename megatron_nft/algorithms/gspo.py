"""GSPO, Group Sequence Policy Optimization (arXiv 2507.18071): one ratio per answer, and one clip.

    s = exp( (1 / n) sum over the answer's n tokens of log R_t )                     (equation 7)
    loss of the answer = -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)           (equation 5)

A is GRPO's advantage. The paper takes the mean over answers: `loss_divisor=answers`, and `answer_loss=mean`, which
spreads an answer's loss evenly over its tokens. With `answer_loss=sum` every token has the answer's whole loss, so that
an answer counts by its length, as in GRPO with a token divisor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from megatron_nft.algorithms.answers import sum_per_answer, tokens_per_answer
from megatron_nft.algorithms.policy_gradient import DeviationSettings, GroupRelative, clipped_loss, prepare
from megatron_nft.section import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_nft.types import PackedBatch


def gspo_loss(
    logprobs: Tensor,  # [T] with gradient
    behaviour_logprobs: Tensor,  # [T]
    advantage: Tensor,  # [T], one value per segment
    loss_mask: Tensor,  # [T], 1 on response tokens
    segment_ids: Tensor,  # int64 [T], 0 .. S-1
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    ratio_max_log: float = 10.0,
) -> Tensor:
    """The loss of each token's answer, [T]: not divided by the answer's tokens. ValueError for shapes that differ."""
    log_ratio, advantage = prepare(logprobs, behaviour_logprobs, advantage)
    mask = loss_mask.to(log_ratio.dtype)
    mean_log_ratio = sum_per_answer(log_ratio, mask, segment_ids) / tokens_per_answer(mask, segment_ids)
    return clipped_loss(mean_log_ratio.clamp(max=ratio_max_log), advantage, clip_low, clip_high)


class GSPOSettings(DeviationSettings):
    """GSPO: clipped policy gradient with one ratio per answer, the geometric mean of its tokens' ratios."""

    name: str = "gspo"
    loss_divisor: Literal["tokens", "answers"] | PositiveFloat = "answers"
    """Global denominator: the optimizer step's trained response tokens, or its trained answers, over all ranks; or a
    fixed number."""
    clip_low: PositiveFloat = 3e-4
    """The answer's ratio is clipped to at least 1 - clip_low."""
    clip_high: PositiveFloat = 4e-4
    """The answer's ratio is clipped to at most 1 + clip_high."""
    answer_loss: Literal["sum", "mean"] = "mean"
    """What an answer adds to the loss: its loss once for each of its tokens, or once."""


class GSPO(GroupRelative):
    """Group Sequence Policy Optimization."""

    Settings = GSPOSettings
    settings: GSPOSettings

    def token_loss(self, logprobs: Tensor, batch: PackedBatch) -> Tensor:
        """`gspo_loss` of the micro-batch, [T]."""
        settings = self.settings
        return gspo_loss(
            logprobs,
            batch.behaviour_logprobs,
            batch.advantage,
            batch.loss_mask,
            batch.segment_ids,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            ratio_max_log=settings.ratio_max_log,
        )
