"""NFT, Negative-aware Fine-Tuning (arXiv 2505.18116), and what its special case RFT shares with it.

R_t is the ratio of the trained policy to the behaviour policy, c the answer's reward, 1 for a right and 0 for a wrong
one or a grader's number in between, and r the group's mean of it:

    loss_t = omega(r) * [ c * (-log R_t) + w * (1 - c) * (-log max_v((1 - r R_t) / (1 - r), eps)) ]

max_v clamps the value and keeps the gradient of its argument (straight-through). Nothing is reduced: the caller masks,
sums and divides.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from megatron_nft.algorithms.answers import sum_per_answer
from megatron_nft.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    at_least_float32,
    counted,
    refuse_token_divisor,
    training_sample,
)
from megatron_nft.algorithms.token_metrics import bounded_log_ratio
from megatron_nft.metrics import Max, Mean
from megatron_nft.section import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_nft.types import PackedBatch, RolloutGroup, TrainingSample

PROMPT_WEIGHTS = ("uniform", "dr_grpo", "grpo")


def nft_loss(
    logprobs: Tensor,  # [T] log pi_theta of each token, with gradient
    behaviour_logprobs: Tensor,  # [T] log pi of the policy that generated the data
    correct: Tensor,  # [T] c: 0 or 1, or a soft reward in between
    correct_rate: Tensor,  # [T] r of the question, in (0, 1), used as given
    *,
    negative_weight: float = 1.0,
    clamp: float = 1.0,
    prompt_weight: str = "dr_grpo",
    ratio_max_log: float = 10.0,
) -> Tensor:
    """Per-token NFT loss [T], one ratio per token.

    negative_weight  w; 0 is RFT
    clamp            eps, above 0; with eps <= 1 the on-policy gradient is Dr. GRPO's (`dr_grpo`) or GRPO's (`grpo`)
    prompt_weight    omega: `uniform` 1, `dr_grpo` 1 - r, `grpo` sqrt((1 - r) / r)
    ratio_max_log    upper bound of log R before exp; beyond it a token has no gradient

    Computed in the dtype of `logprobs`, at least float32. ValueError for shapes that differ, a rate outside (0, 1),
    and options out of range.
    """
    log_ratio, correct, rate = _prepare(logprobs, behaviour_logprobs, correct, correct_rate)
    return _nft_terms(log_ratio, correct, rate, negative_weight, clamp, prompt_weight, ratio_max_log)


def nft_sequence_loss(
    logprobs: Tensor,  # [T]
    behaviour_logprobs: Tensor,  # [T]
    correct: Tensor,  # [T], one value per segment
    correct_rate: Tensor,  # [T], one value per segment
    loss_mask: Tensor,  # [T], 1 on response tokens
    segment_ids: Tensor,  # int64 [T], 0 .. S-1
    *,
    negative_weight: float = 1.0,
    clamp: float = 1.0,
    prompt_weight: str = "dr_grpo",
    ratio_max_log: float = 10.0,
) -> Tensor:
    """NFT with one ratio per answer: log R is the sum over its tokens. Loss [T], 0 outside the mask.

    An answer's loss is spread evenly over its n tokens, loss_t = loss_answer / n, so that the masked sum over tokens
    is the sum over answers. Divide that by a number of answers, not of tokens, to get a mean.
    """
    log_ratio, correct, rate = _prepare(logprobs, behaviour_logprobs, correct, correct_rate)
    if loss_mask.shape != logprobs.shape or segment_ids.shape != logprobs.shape:
        raise ValueError(
            f"loss_mask {tuple(loss_mask.shape)} and segment_ids {tuple(segment_ids.shape)} must have the shape of "
            f"logprobs, {tuple(logprobs.shape)}"
        )
    if segment_ids.numel() == 0:
        return log_ratio
    inside = loss_mask > 0
    mask = inside.to(log_ratio.dtype)
    num_segments = int(segment_ids.max()) + 1
    zeros = log_ratio.new_zeros(num_segments)  # [S]
    tokens = zeros.index_add(0, segment_ids, mask).clamp(min=1.0)  # [S]
    # where, not a product: outside the mask log-probs may be anything, NaN too.
    log_ratio = zeros.index_add(0, segment_ids, log_ratio.where(inside, 0.0))  # [S]
    correct = zeros.index_add(0, segment_ids, correct * mask) / tokens  # [S]
    rate = log_ratio.new_full((num_segments,), 0.5).index_copy(0, segment_ids[inside], rate[inside])  # [S]
    per_answer = _nft_terms(log_ratio, correct, rate, negative_weight, clamp, prompt_weight, ratio_max_log)
    return (per_answer / tokens)[segment_ids] * mask


def negative_argument(log_ratio: Tensor, correct_rate: Tensor) -> Tensor:
    """(1 - r R) / (1 - r), the implicit negative policy's ratio before the clamp."""
    return (1.0 - correct_rate * log_ratio.exp()) / (1.0 - correct_rate)


def _nft_terms(
    log_ratio: Tensor,
    correct: Tensor,
    rate: Tensor,
    negative_weight: float,
    clamp: float,
    prompt_weight: str,
    ratio_max_log: float,
) -> Tensor:
    """The module's equation, elementwise over tokens [T] or answers [S]."""
    if not negative_weight >= 0:
        raise ValueError(f"negative_weight={negative_weight}: must be 0 (RFT) or above")
    if not clamp > 0:
        raise ValueError(f"clamp={clamp}: must be above 0, the loss takes its logarithm")
    if not ratio_max_log > 0:
        raise ValueError(f"ratio_max_log={ratio_max_log}: must be above 0")
    weight = _prompt_weight(rate, prompt_weight)
    log_ratio = log_ratio.clamp(max=ratio_max_log)
    argument = negative_argument(log_ratio, rate)
    # Clamped value, unclamped gradient. `x + (clamp(x) - x).detach()` would lose the value to rounding in fp32
    # where x is near -1e6; here the added term is exactly 0.
    straight_through = argument.detach().clamp(min=clamp) + (argument - argument.detach())
    positive, negative = -log_ratio, -negative_weight * straight_through.log()
    both = correct * positive + (1.0 - correct) * negative
    # where, not the sum, for rewards of 0 and 1: the other term may be infinite
    return weight * positive.where(correct >= 1, negative.where(correct <= 0, both))


def _prompt_weight(rate: Tensor, kind: str) -> Tensor:
    """omega, shaped like `rate`."""
    if kind == "uniform":
        return rate.new_ones(rate.shape)
    if kind == "dr_grpo":
        return 1.0 - rate
    if kind == "grpo":
        return ((1.0 - rate) / rate).sqrt()
    raise ValueError(f"prompt_weight={kind!r}: must be one of {', '.join(PROMPT_WEIGHTS)}")


def _prepare(
    logprobs: Tensor, behaviour_logprobs: Tensor, correct: Tensor, correct_rate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log R, verdict and rate in one dtype of at least 32 bits."""
    shapes = {
        "logprobs": logprobs,
        "behaviour_logprobs": behaviour_logprobs,
        "correct": correct,
        "correct_rate": correct_rate,
    }
    if logprobs.dim() != 1 or any(t.shape != logprobs.shape for t in shapes.values()):
        listed = ", ".join(f"{name} {tuple(t.shape)}" for name, t in shapes.items())
        raise ValueError(f"all tensors must be 1-D and of one length, but: {listed}")
    if not bool(((correct_rate > 0) & (correct_rate < 1)).all()):
        low, high = correct_rate.min().item(), correct_rate.max().item()
        raise ValueError(f"correct_rate spans [{low}, {high}]: must lie strictly between 0 and 1; clamp it first")
    logprobs = at_least_float32(logprobs)
    dtype = logprobs.dtype
    return logprobs - behaviour_logprobs.detach().to(dtype), correct.to(dtype), correct_rate.to(dtype)


class LikelihoodSettings(AlgorithmSettings):
    """The settings that NFT and RFT share."""

    prompt_weight: Literal["uniform", "dr_grpo", "grpo"] = "dr_grpo"
    """omega(q): 1, 1 - r, or sqrt((1 - r) / r)."""
    ratio: Literal["token", "sequence"] = "token"
    """One likelihood ratio per token, or one per answer; the latter needs `loss_divisor` answers or a number."""
    ratio_max_log: PositiveFloat = 10.0
    """Upper bound of log R before exp."""
    correct_rate_min: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """The loss sees the group's correct rate as at least this."""
    correct_rate_max: Annotated[float, Field(gt=0.5, lt=1)] = 0.98
    """The loss sees the group's correct rate as at most this."""

    @model_validator(mode="after")
    def _divisor(self) -> LikelihoodSettings:
        if self.ratio == "sequence":
            refuse_token_divisor(self, "ratio=sequence")
        return self


class NFTSettings(LikelihoodSettings):
    """NFT: likelihood of the correct answers, and of the wrong ones under the implicit negative policy."""

    name: str = "nft"
    negative_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the wrong answers' term; with 0 they are not trained."""
    clamp: PositiveFloat = 1.0
    """NFT's epsilon: lower clamp of (1 - r R) / (1 - r), straight-through."""
    reference: Literal["behaviour", "ema"] = "behaviour"
    """The policy that R is taken against: that of `behaviour`, or the one whose weights are the exponential moving
    average of the trained weights, as it is at the start of the step."""
    reference_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """reference=ema: share of the average that each optimizer update keeps. The average is reference_decay /
    (1 - reference_decay) updates old; 0 follows the weights at once."""

    @property
    def average_decay(self) -> float | None:
        """`reference_decay` where there is an average."""
        return self.reference_decay if self.reference == "ema" else None

    @model_validator(mode="after")
    def _reference(self) -> NFTSettings:
        if self.reference == "behaviour":
            return self
        if self.behaviour == "engine":
            raise ValueError("reference=ema and behaviour=engine both say what R is taken against: leave one out")
        if not self.negative_weight:
            raise ValueError(
                "reference=ema acts on the wrong answers alone, and negative_weight=0 does not train them: leave it out"
            )
        return self


class Likelihood(Algorithm):
    """Supervised likelihood ratios, weighted per question. A subclass says what becomes of wrong answers."""

    settings: LikelihoodSettings

    @property
    @abstractmethod
    def negative_weight(self) -> float:
        """w of the equation."""

    @property
    def clamp(self) -> float:
        """eps of the equation."""
        return 1.0

    @property
    def per_token(self) -> bool:
        """Where each token has its own ratio."""
        return self.settings.ratio == "token"

    def samples(self, group: RolloutGroup) -> list[TrainingSample]:
        """The answers that count, with the group's correct rate clamped to the range of the settings.

        Without a negative term the answers of reward 0 are left out: they would cost a forward pass each, and with
        loss_divisor=tokens they would count in the denominator of a loss they are not in.
        """
        rate = min(max(group.correct_rate, self.settings.correct_rate_min), self.settings.correct_rate_max)
        return [
            training_sample(group, rollout, correct_rate=rate)
            for rollout in counted(group)
            if rollout.score or self.negative_weight
        ]

    def loss(self, logprobs: Tensor, batch: PackedBatch) -> Tensor:
        """`nft_loss` or `nft_sequence_loss` of the micro-batch, [T]."""
        settings = self.settings
        if settings.ratio == "sequence":
            return nft_sequence_loss(
                logprobs,
                batch.behaviour_logprobs,
                batch.correct,
                batch.correct_rate,
                batch.loss_mask,
                batch.segment_ids,
                negative_weight=self.negative_weight,
                clamp=self.clamp,
                prompt_weight=settings.prompt_weight,
                ratio_max_log=settings.ratio_max_log,
            )
        return nft_loss(
            logprobs,
            batch.behaviour_logprobs,
            batch.correct,
            batch.correct_rate,
            negative_weight=self.negative_weight,
            clamp=self.clamp,
            prompt_weight=settings.prompt_weight,
            ratio_max_log=settings.ratio_max_log,
        )


class NFT(Likelihood):
    """Negative-aware Fine-Tuning."""

    Settings = NFTSettings
    settings: NFTSettings

    @property
    def negative_weight(self) -> float:
        """w of the equation."""
        return self.settings.negative_weight

    @property
    def clamp(self) -> float:
        """eps of the equation."""
        return self.settings.clamp

    def metrics(self, logprobs: Tensor, loss: Tensor, batch: PackedBatch) -> dict[str, Mean | Max]:
        """Those of every algorithm, and clamp/share: the share of the wrong answers' tokens at the clamp. With
        ratio=sequence it is that of the tokens whose answer is at the clamp."""
        negative = (batch.loss_mask > 0) & (batch.correct < 0.5)
        log_ratio = bounded_log_ratio(logprobs, batch)
        if self.settings.ratio == "sequence":
            log_ratio = sum_per_answer(log_ratio, batch.loss_mask, batch.segment_ids)
        at_clamp = negative_argument(log_ratio, batch.correct_rate) < self.clamp
        share = Mean((negative & at_clamp).sum(), negative.sum())
        return super().metrics(logprobs, loss, batch) | {"clamp/share": share}
