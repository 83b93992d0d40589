"""CISPO (MiniMax-M1, arXiv 2506.13585): REINFORCE whose importance weight is clipped, so that no token loses its
gradient.

    loss_t = -sg( clip(R_t, 1 - clip_low, 1 + clip_high) ) A log pi_theta(a_t)

sg stops the gradient, A is GRPO's advantage. The paper has no lower bound, which is `clip_low=1`, and divides by the
tokens of the group; `loss_divisor=tokens` divides by those of the optimizer step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_nft.algorithms.base import at_least_float32
from megatron_nft.algorithms.policy_gradient import DeviationSettings, GroupRelative, prepare
from megatron_nft.section import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_nft.types import PackedBatch


def cispo_loss(
    logprobs: Tensor,  # [T] with gradient
    behaviour_logprobs: Tensor,  # [T]
    advantage: Tensor,  # [T]
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    ratio_max_log: float = 10.0,
) -> Tensor:
    """Per-token loss [T] of the equation above. ValueError for shapes that differ or a clip that is not above 0."""
    if not (clip_low > 0 and clip_high > 0):
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: both must be above 0")
    log_ratio, advantage = prepare(logprobs, behaviour_logprobs, advantage)
    weight = log_ratio.detach().clamp(max=ratio_max_log).exp().clamp(1.0 - clip_low, 1.0 + clip_high)
    return -weight * advantage * at_least_float32(logprobs)


class CISPOSettings(DeviationSettings):
    """CISPO: REINFORCE with clipped importance weights."""

    name: str = "cispo"
    clip_low: PositiveFloat = 1.0
    """The weight is clipped to at least 1 - clip_low; 1 is no bound, as in the paper."""
    clip_high: PositiveFloat = 4.0
    """The weight is clipped to at most 1 + clip_high. The paper does not give its value."""


class CISPO(GroupRelative):
    """Clipped IS-weight Policy Optimization."""

    Settings = CISPOSettings
    settings: CISPOSettings
    per_token = GroupRelative.per_token  # a token's weight is its own

    def token_loss(self, logprobs: Tensor, batch: PackedBatch) -> Tensor:
        """`cispo_loss` of the micro-batch, [T]."""
        settings = self.settings
        return cispo_loss(
            logprobs,
            batch.behaviour_logprobs,
            batch.advantage,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            ratio_max_log=settings.ratio_max_log,
        )
