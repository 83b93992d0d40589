"""W-REINFORCE (arXiv 2506.01347): rewards of 1 and -1 without a baseline, the right answers weighted down.

    loss_t = -min(R_t A, clip(R_t, 1 - clip_low, 1 + clip_high) A),    A = positive_weight (right), -1 (wrong)

positive_weight is the paper's lambda: 1 is plain REINFORCE (RLVR), 0 trains wrong answers alone (NSR). On-policy the
gradient is -A grad log pi; the clip bounds the later updates of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from megatron_nft.algorithms.policy_gradient import PolicyGradient, PolicyGradientSettings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class WReinforceSettings(PolicyGradientSettings):
    """W-REINFORCE: wrong answers pushed down with weight 1, right answers up with a smaller one."""

    name: str = "w_reinforce"
    positive_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the right answers; the wrong ones have 1."""


class WReinforce(PolicyGradient):
    """Weighted REINFORCE."""

    Settings = WReinforceSettings
    settings: WReinforceSettings

    def advantages(self, rewards: list[float]) -> npt.NDArray[np.float64]:
        """positive_weight for a reward of 1, -1 for a reward of 0, in proportion between them, [K]."""
        import numpy as np  # settings must be readable without it

        right = np.asarray(rewards, dtype=np.float64)
        return self.settings.positive_weight * right - (1.0 - right)
