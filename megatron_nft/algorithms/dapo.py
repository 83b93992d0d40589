"""DAPO (arXiv 2503.14476): GRPO's advantages of a reward of -1 or 1, a higher upper clip, a penalty for long answers.

Its token-level mean is `loss_divisor=tokens`; its dynamic sampling is how every algorithm here samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from megatron_nft.algorithms.policy_gradient import DeviationSettings, GroupRelative
from megatron_nft.section import NonNegativeInt

if TYPE_CHECKING:
    from megatron_nft.types import Rollout


class DAPOSettings(DeviationSettings):
    """DAPO: GRPO with a soft penalty for answers near the length limit."""

    name: str = "dapo"
    overlong_buffer_tokens: NonNegativeInt = 0
    """Soft penalty over the last N tokens before the limit; 0 turns it off."""
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    """What an answer at the limit loses of its reward."""

    def check_response_limit(self, max_response_tokens: int) -> None:
        """ValueError where the penalty would begin before the first token."""
        if self.overlong_buffer_tokens > max_response_tokens:
            raise ValueError(
                f"algorithm.overlong_buffer_tokens ({self.overlong_buffer_tokens}) must be at most "
                f"rollout.max_response_tokens ({max_response_tokens})"
            )


class DAPO(GroupRelative):
    """Decoupled Clip and Dynamic sAmpling Policy Optimization."""

    Settings = DAPOSettings
    settings: DAPOSettings

    def reward(self, rollout: Rollout) -> float:
        """1 or -1, less the penalty for a long answer (section 3.4 of the paper).

        The penalty rises linearly from 0 to `overlong_penalty` over the last `overlong_buffer_tokens` tokens.
        """
        reward = 2.0 * rollout.score - 1.0
        buffer = self.settings.overlong_buffer_tokens
        if buffer:
            excess = len(rollout.response_ids) - (self.max_response_tokens - buffer)
            reward -= self.settings.overlong_penalty * min(max(excess / buffer, 0.0), 1.0)
        return reward
