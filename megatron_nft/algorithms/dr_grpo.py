"""Dr. GRPO (arXiv 2503.20783): GRPO whose advantages are not divided by the group's standard deviation."""

from __future__ import annotations

from megatron_nft.algorithms.policy_gradient import PolicyGradient, PolicyGradientSettings


class DrGRPOSettings(PolicyGradientSettings):
    """Dr. GRPO: clipped policy gradient with advantages reward - mean."""

    name: str = "dr_grpo"


class DrGRPO(PolicyGradient):
    """GRPO Done Right."""

    Settings = DrGRPOSettings
    settings: DrGRPOSettings
    advantage = "dr_grpo"
