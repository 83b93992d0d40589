"""What GRPO, Dr. GRPO and DAPO share: the clipped policy gradient, and advantages from a group's rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megatron_nft.algorithms.base import Algorithm, AlgorithmSettings, at_least_float32, counted, training_sample
from megatron_nft.section import PositiveFloat

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from megatron_nft.types import PackedBatch, Rollout, RolloutGroup, TrainingSample

ADVANTAGES = ("grpo", "dr_grpo", "dapo")


def policy_gradient_loss(
    logprobs: Tensor,  # [T] with gradient
    behaviour_logprobs: Tensor,  # [T]
    advantage: Tensor,  # [T]
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_max_log: float = 10.0,
) -> Tensor:
    """Per-token loss [T]: -min(R A, clip(R, 1 - clip_low, 1 + clip_high) A), R = exp(min(log ratio, ratio_max_log)).

    Nothing is reduced; the three algorithms differ in `advantages`, clip_high and the denominator. Computed in the
    dtype of `logprobs`, at least float32. ValueError for shapes that differ or for a clip that is not above 0.
    """
    if logprobs.dim() != 1 or behaviour_logprobs.shape != logprobs.shape or advantage.shape != logprobs.shape:
        raise ValueError(
            "all tensors must be 1-D and of one length, but: "
            f"logprobs {tuple(logprobs.shape)}, behaviour_logprobs {tuple(behaviour_logprobs.shape)}, "
            f"advantage {tuple(advantage.shape)}"
        )
    if not (clip_low > 0 and clip_high > 0):
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: both must be above 0")
    logprobs = at_least_float32(logprobs)
    advantage = advantage.to(logprobs.dtype)
    ratio = (logprobs - behaviour_logprobs.detach().to(logprobs.dtype)).clamp(max=ratio_max_log).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -(ratio * advantage).minimum(clipped * advantage)


def advantages(rewards: npt.ArrayLike, kind: str) -> npt.NDArray[np.float64]:
    """Advantages of one question's answers, float64 [K], from their rewards [K].

    dr_grpo      A = reward - mean                                                   (arXiv 2503.20783)
    grpo, dapo   A = (reward - mean) / std, with the population standard deviation; 0 where all rewards are equal
                                                                       (arXiv 2402.03300, arXiv 2503.14476)

        advantages(np.array([1, 0, 0, 0]), "dr_grpo")  # [.75, -.25, -.25, -.25]
        advantages(np.array([1, 0, 0, 0]), "grpo")     # [1.7321, -.5774, -.5774, -.5774]
    """
    import numpy as np  # settings must be readable without it

    if kind not in ADVANTAGES:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(ADVANTAGES)}")
    values: npt.NDArray[np.float64] = np.asarray(rewards, dtype=np.float64)
    centred: npt.NDArray[np.float64] = values - values.mean()
    if kind == "dr_grpo":
        return centred
    std = values.std()
    # Rewards that are equal up to rounding must not be blown up to unit variance.
    return centred / std if std > 1e-6 else np.zeros_like(centred)


class PolicyGradientSettings(AlgorithmSettings):
    """The settings that GRPO, Dr. GRPO and DAPO share."""

    ratio_max_log: PositiveFloat = 10.0
    """Upper bound of log R before exp."""
    clip_low: PositiveFloat = 0.2
    """R is clipped to at least 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """R is clipped to at most 1 + clip_high (0.28 in DAPO's paper)."""


class PolicyGradient(Algorithm):
    """The clipped policy gradient; a subclass says which `advantages` it takes, and of which reward."""

    settings: PolicyGradientSettings
    advantage: ClassVar[str]

    def reward(self, rollout: Rollout) -> float:
        """1 for a correct answer, 0 for any other."""
        return float(rollout.correct)

    def samples(self, group: RolloutGroup) -> list[TrainingSample]:
        """Every answer that counts, with its advantage in the group."""
        rollouts = counted(group)
        scores = advantages([self.reward(rollout) for rollout in rollouts], self.advantage)
        return [training_sample(group, rollout, advantage=float(a)) for rollout, a in zip(rollouts, scores)]

    def loss(self, logprobs: Tensor, batch: PackedBatch) -> Tensor:
        """`policy_gradient_loss` of the micro-batch, [T]."""
        settings = self.settings
        return policy_gradient_loss(
            logprobs,
            batch.behaviour_logprobs,
            batch.advantage,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            ratio_max_log=settings.ratio_max_log,
        )
