"""GRPO (arXiv 2402.03300) without its KL term: advantages in units of the group's standard deviation.

    loss_t = -min(R_t A, clip(R_t, 1 - clip_low, 1 + clip_high) A),    A = (reward - mean) / std

The paper takes the mean over an answer's tokens and then over answers: `answer_loss=mean loss_divisor=answers`.
"""

from __future__ import annotations

from megatron_nft.algorithms.policy_gradient import DeviationSettings, GroupRelative


class GRPOSettings(DeviationSettings):
    """GRPO: clipped policy gradient with advantages (reward - mean) / std."""

    name: str = "grpo"


class GRPO(GroupRelative):
    """Group Relative Policy Optimization."""

    Settings = GRPOSettings
    settings: GRPOSettings
