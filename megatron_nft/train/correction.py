"""The gap between the engine's and the trainer's log-probs: what it is, and the weights that correct for it.

    w_t = pi_trainer(a_t) / pi_engine(a_t)

is the importance weight of a token that the engine drew and the trainer treats as its own. It holds what differs in
kernels and precision, and, where the engine had older weights, their age. Weights have no gradient and multiply the
loss of right and wrong answers alike. Truncated importance sampling: Yao et al., "Your Efficient RL Framework Secretly
Brings You Off-Policy RL Training"; masking in place of truncation: IcePop (arXiv 2510.18855). Both bound the variance
and make the estimate biased; docs/nft.md has a table of the bias.

Legend: R response tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from megatron_nft.algorithms import AlgorithmSettings
from megatron_nft.types import TrainingSample

GAP_STEPS = 3
"""How many steps in a row the gap must be above `algorithm.gap_limit` to end a run."""
_EXP_LIMIT = 80.0  # exp(80) is finite in float32


class GapError(RuntimeError):
    """The engine's log-probs have been too far from the trainer's for too many steps."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What is done with one answer."""

    weights: npt.NDArray[np.float64]  # [R], of each token's loss
    ratio: npt.NDArray[np.float64]  # [R], w before any bound, at the level of the settings
    truncated: int  # tokens whose w was brought to a bound
    masked: int  # tokens whose weight is 0 because w is outside the bounds, or by the veto
    vetoed: bool


def correct(log_ratio: npt.NDArray[np.float64], settings: AlgorithmSettings) -> Correction:
    """The weights of one answer from log w of its tokens, [R]."""
    log_ratio = log_ratio.clip(-_EXP_LIMIT, _EXP_LIMIT)
    vetoed = settings.veto is not None and bool(np.abs(log_ratio).max(initial=0.0) > np.log(settings.veto))
    if settings.correction_level == "sequence":
        log_ratio = np.full_like(log_ratio, log_ratio.mean())
    ratio = np.exp(log_ratio)
    high = np.inf if settings.correction_high is None else settings.correction_high
    outside = (ratio < settings.correction_low) | (ratio > high)
    if settings.correction == "truncate":
        weights = ratio.clip(settings.correction_low, high)
    elif settings.correction == "mask":
        weights = np.where(outside, 0.0, ratio)
    else:
        weights = np.ones_like(ratio)
    if vetoed:
        weights = np.zeros_like(ratio)
    masked = ratio.size if vetoed else int(outside.sum()) * (settings.correction == "mask")
    truncated = int(outside.sum()) * (settings.correction == "truncate" and not vetoed)
    return Correction(weights, ratio, truncated, masked, vetoed)


def corrected(samples: Sequence[TrainingSample], settings: AlgorithmSettings) -> list[TrainingSample]:
    """The samples as the loss takes them: with their weights, and with the behaviour policy of the settings."""
    return [
        replace(
            sample,
            behaviour_logprobs=denominator_of(sample, settings),
            weights=correct(log_ratio_of(sample), settings).weights.astype(np.float32),
        )
        for sample in samples
    ]


def denominator_of(sample: TrainingSample, settings: AlgorithmSettings) -> npt.NDArray[np.float32] | None:
    """The log-probs of the policy that R is taken against, [R]."""
    if sample.reference_logprobs is not None:
        return sample.reference_logprobs
    return sample.rollout_logprobs if settings.behaviour == "engine" else sample.behaviour_logprobs


def log_ratio_of(sample: TrainingSample) -> npt.NDArray[np.float64]:
    """log w of each token, [R]."""
    assert sample.behaviour_logprobs is not None, "computed before it is compared with the engine's"
    log_ratio: npt.NDArray[np.float64] = sample.behaviour_logprobs.astype(np.float64) - sample.rollout_logprobs
    return log_ratio


@dataclass
class Gap:
    """Sums over the tokens of answers, which add up over ranks."""

    tokens: int = 0
    answers: int = 0
    absolute: float = 0.0  # |log w|
    largest: float = 0.0  # of them
    k1: float = 0.0  # -log w
    k3: float = 0.0  # w - 1 - log w
    ratio: float = 0.0  # w at the level of the settings, before any bound
    ratio_squared: float = 0.0
    truncated: int = 0
    masked: int = 0
    vetoed: int = 0

    @classmethod
    def of(cls, samples: Iterable[TrainingSample], settings: AlgorithmSettings) -> Gap:
        """Of the answers `samples`, whose trainer log-probs are known."""
        total = cls()
        for sample in samples:
            log_ratio = log_ratio_of(sample)
            done = correct(log_ratio, settings)
            total.add(
                cls(
                    tokens=log_ratio.size,
                    answers=1,
                    absolute=float(np.abs(log_ratio).sum()),
                    largest=float(np.abs(log_ratio).max(initial=0.0)),
                    k1=float(-log_ratio.sum()),
                    k3=float((np.exp(log_ratio.clip(max=_EXP_LIMIT)) - 1.0 - log_ratio).sum()),
                    ratio=float(done.ratio.sum()),
                    ratio_squared=float(np.square(done.ratio).sum()),
                    truncated=done.truncated,
                    masked=done.masked,
                    vetoed=int(done.vetoed),
                )
            )
        return total

    def add(self, other: Gap) -> None:
        """Add the answers of `other`."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            # np.maximum keeps a NaN, which max() may lose
            setattr(self, field.name, float(np.maximum(mine, theirs)) if field.name == "largest" else mine + theirs)

    @property
    def mean(self) -> float:
        """Mean |log w|, nats per token; 0 of nothing."""
        return self.absolute / self.tokens if self.tokens else 0.0

    @property
    def effective_share(self) -> float:
        """Effective sample size of the weights as a share of the tokens, (sum w)^2 / (n sum w^2) (Kong 1992)."""
        return self.ratio**2 / (self.tokens * self.ratio_squared) if self.ratio_squared else 0.0


def steps_over_limit(before: int, gap: Gap, settings: AlgorithmSettings, newest: Callable[[], int]) -> int:
    """How many steps in a row, this one included, had a mean gap above the limit; `before` of them until the last.

    GapError at GAP_STEPS, on every rank. `newest`: the step of the newest checkpoint, 0 without one; then asked for.
    """
    if settings.gap_limit is None or gap.mean <= settings.gap_limit:
        return 0
    if before + 1 >= GAP_STEPS:
        saved_step = newest()
        saved = f"the weights of step {saved_step} are in the newest checkpoint" if saved_step else "nothing was saved"
        raise GapError(
            f"the engine's log-probs differ from the trainer's by {gap.mean:.3g} nats per token, and in "
            f"{GAP_STEPS} steps in a row by more than algorithm.gap_limit ({settings.gap_limit:g}); {saved}. Look at "
            "gap/mean and gap/max in metrics.jsonl and at precision and quantization of the engine, or raise the limit"
        )
    return before + 1
