"""GRPO (arXiv 2402.03300) without its KL term: advantages in units of the group's standard deviation."""

from __future__ import annotations

from megatron_nft.algorithms.policy_gradient import PolicyGradient, PolicyGradientSettings


class GRPOSettings(PolicyGradientSettings):
    """GRPO: clipped policy gradient with advantages (reward - mean) / std."""

    name: str = "grpo"


class GRPO(PolicyGradient):
    """Group Relative Policy Optimization."""

    Settings = GRPOSettings
    settings: GRPOSettings
    advantage = "grpo"
