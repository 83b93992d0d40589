"""Dr. GRPO (arXiv 2503.20783): GRPO whose advantages are not divided by the group's standard deviation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_nft.algorithms.policy_gradient import PolicyGradient, PolicyGradientSettings, advantages

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class DrGRPOSettings(PolicyGradientSettings):
    """Dr. GRPO: clipped policy gradient with advantages reward - mean."""

    name: str = "dr_grpo"


class DrGRPO(PolicyGradient):
    """GRPO Done Right."""

    Settings = DrGRPOSettings
    settings: DrGRPOSettings

    def advantages(self, rewards: list[float]) -> npt.NDArray[np.float64]:
        """reward - mean, [K]."""
        return advantages(rewards, "dr_grpo")
