"""What the policy gradients share: the clipped surrogate loss, and advantages from a group's rewards."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from megatron_nft.algorithms.answers import tokens_per_answer
from megatron_nft.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    at_least_float32,
    counted,
    refuse_token_divisor,
    training_sample,
)
from megatron_nft.section import PositiveFloat

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from megatron_nft.types import PackedBatch, Rollout, RolloutGroup, TrainingSample

Deviation = Literal["population", "sample"]
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

    Nothing is reduced; the algorithms differ in advantages, clip_high and the denominator. Computed in the dtype of
    `logprobs`, at least float32. ValueError for shapes that differ or for a clip that is not above 0.
    """
    log_ratio, advantage = prepare(logprobs, behaviour_logprobs, advantage)
    return clipped_loss(log_ratio.clamp(max=ratio_max_log), advantage, clip_low, clip_high)


def prepare(logprobs: Tensor, behaviour_logprobs: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """log R and the advantages, [T] each, in one dtype of at least 32 bits. ValueError for shapes that differ."""
    if logprobs.dim() != 1 or behaviour_logprobs.shape != logprobs.shape or advantage.shape != logprobs.shape:
        raise ValueError(
            "all tensors must be 1-D and of one length, but: "
            f"logprobs {tuple(logprobs.shape)}, behaviour_logprobs {tuple(behaviour_logprobs.shape)}, "
            f"advantage {tuple(advantage.shape)}"
        )
    logprobs = at_least_float32(logprobs)
    return logprobs - behaviour_logprobs.detach().to(logprobs.dtype), advantage.to(logprobs.dtype)


def clipped_loss(log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """PPO's clipped surrogate, elementwise: -min(R A, clip(R, 1 - clip_low, 1 + clip_high) A)."""
    if not (clip_low > 0 and clip_high > 0):
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: both must be above 0")
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -(ratio * advantage).minimum(clipped * advantage)


def advantages(rewards: npt.ArrayLike, kind: str, deviation: Deviation = "population") -> npt.NDArray[np.float64]:
    """Advantages of one question's answers, float64 [K], from their rewards [K].

    dr_grpo      A = reward - mean                                                   (arXiv 2503.20783)
    grpo, dapo   A = (reward - mean) / std; 0 where all rewards are equal (arXiv 2402.03300, arXiv 2503.14476)

    deviation: std is the `population` standard deviation, which divides the squares by K, or the `sample` one, which
    divides them by K - 1.

        advantages(np.array([1, 0, 0, 0]), "dr_grpo")         # [.75, -.25, -.25, -.25]
        advantages(np.array([1, 0, 0, 0]), "grpo")            # [1.7321, -.5774, -.5774, -.5774]
        advantages(np.array([1, 0, 0, 0]), "grpo", "sample")  # [1.5, -.5, -.5, -.5]
    """
    import numpy as np  # settings must be readable without it

    if kind not in ADVANTAGES:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(ADVANTAGES)}")
    values: npt.NDArray[np.float64] = np.asarray(rewards, dtype=np.float64)
    centred: npt.NDArray[np.float64] = values - values.mean()
    if kind == "dr_grpo":
        return centred
    if deviation not in ("population", "sample"):
        raise ValueError(f"deviation={deviation!r}: must be population or sample")
    std = values.std(ddof=int(deviation == "sample" and values.size > 1))
    # Rewards that are equal up to rounding must not be blown up to unit variance.
    return centred / std if std > 1e-6 else np.zeros_like(centred)


class PolicyGradientSettings(AlgorithmSettings):
    """The settings that all policy gradients share."""

    ratio_max_log: PositiveFloat = 10.0
    """Upper bound of log R before exp."""
    clip_low: PositiveFloat = 0.2
    """R is clipped to at least 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """R is clipped to at most 1 + clip_high (0.28 in DAPO's paper)."""
    answer_loss: Literal["sum", "mean"] = "sum"
    """What an answer adds to the loss: the sum over its tokens, or their mean. GRPO's paper has the mean with
    `loss_divisor` answers."""

    @model_validator(mode="after")
    def _divisor(self) -> PolicyGradientSettings:
        if self.answer_loss == "mean":
            refuse_token_divisor(self, "answer_loss=mean")
        return self


class DeviationSettings(PolicyGradientSettings):
    """The settings of policy gradients whose advantages are in units of the group's standard deviation."""

    deviation: Deviation = "population"
    """Which standard deviation of a group's rewards: `population` divides by K, as NFT's identity with GRPO needs,
    `sample` by K - 1, as torch.std and the reference do. Advantages are 3 % smaller with `sample` at 16 answers."""


class PolicyGradient(Algorithm):
    """A policy gradient; a subclass says what the advantages of a group's rewards are."""

    settings: PolicyGradientSettings

    @property
    def per_token(self) -> bool:
        """Where a token's loss is not divided by the tokens of its answer."""
        return self.settings.answer_loss == "sum"

    def reward(self, rollout: Rollout) -> float:
        """1 for a correct answer and 0 for any other, or the grader's number."""
        return rollout.score

    @abstractmethod
    def advantages(self, rewards: list[float]) -> npt.NDArray[np.float64]:
        """Advantages of one question's answers, [K], from their rewards [K]."""

    def samples(self, group: RolloutGroup) -> list[TrainingSample]:
        """Every answer that counts, with its advantage in the group."""
        rollouts = counted(group)
        scores = self.advantages([self.reward(rollout) for rollout in rollouts])
        return [training_sample(group, rollout, advantage=float(a)) for rollout, a in zip(rollouts, scores)]

    def loss(self, logprobs: Tensor, batch: PackedBatch) -> Tensor:
        """The loss of each token, [T]; divided by the tokens of its answer where `answer_loss` is mean."""
        per_token = self.token_loss(logprobs, batch)
        if self.settings.answer_loss == "mean":
            return per_token / tokens_per_answer(batch.loss_mask, batch.segment_ids)
        return per_token

    def token_loss(self, logprobs: Tensor, batch: PackedBatch) -> Tensor:
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


class GroupRelative(PolicyGradient):
    """A policy gradient with GRPO's advantages: the reward's distance from the group's mean, in standard deviations."""

    settings: DeviationSettings

    def advantages(self, rewards: list[float]) -> npt.NDArray[np.float64]:
        """(reward - mean) / std, [K]."""
        return advantages(rewards, "grpo", self.settings.deviation)
