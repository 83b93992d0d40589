"""What a training algorithm is: its settings, its samples of a group, its loss per token and its metrics.

Built-in algorithms are one file each in this folder. One of your own is a class like these in any module that Python
finds, named in the settings as `algorithm.name=module:Class`; docs/extending.md shows one.

Settings are read before any rank starts, on machines that may have no torch: a module that holds an algorithm imports
torch under TYPE_CHECKING and works with the methods of the tensors that it is given.

Legend: T tokens of a packed micro-batch, P and R prompt and response tokens, K answers of a question.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from megatron_nft.algorithms.token_metrics import token_metrics
from megatron_nft.metrics import Max, Mean
from megatron_nft.section import PositiveFloat, Section
from megatron_nft.types import Rollout, RolloutGroup, TrainingSample

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_nft.types import PackedBatch


class AlgorithmSettings(Section):
    """The settings that every algorithm has. An algorithm adds its own in a subclass."""

    name: str
    """A built-in algorithm (nft, rft, grpo, dr_grpo, dapo, gspo, cispo or w_reinforce), or module:Class of your own."""
    loss_divisor: Literal["tokens", "answers"] | PositiveFloat = "tokens"
    """Global denominator: the optimizer step's trained response tokens, or its trained answers, over all ranks; or a
    fixed number."""
    truncated: Literal["negative", "drop"] = "negative"
    """Answers cut off at the length limit: trained as wrong, or left out of the loss."""
    behaviour: Literal["recomputed", "engine"] = "recomputed"
    """Whose log-probs the ratio R is taken against: those that the trainer computes before the first update, or those
    that the engine reported with the answer."""
    correction: Literal["none", "truncate", "mask"] | None = None
    """Weight of each token's loss for the gap between engine and trainer, w = pi_trainer / pi_engine without gradient:
    none, w brought into the bounds, or w inside the bounds and 0 outside. Tokens of weight 0 still count in
    `loss_divisor`. null: truncate where rollout.mode lets answers go on under other weights and behaviour is
    recomputed, else none."""
    correction_level: Literal["token", "sequence"] = "token"
    """One w per token, or one per answer, the geometric mean of its tokens' w."""
    correction_low: Annotated[float, Field(ge=0)] = 0.0
    """Lower bound of w."""
    correction_high: PositiveFloat | None = 2.0
    """Upper bound of w; null is none."""
    veto: Annotated[float, Field(gt=1)] | None = None
    """Leave an answer out of the loss (weight 0) where the ratio of a single token, pi_trainer / pi_engine, is above
    this number or below its inverse; null leaves none out."""
    gap_limit: PositiveFloat | None = None
    """End the run before the updates of the third step in a row whose mean gap between the engine's and the trainer's
    log-probs (`gap/mean`, nats per token) is above this; null never does."""

    @model_validator(mode="after")
    def _correction(self) -> AlgorithmSettings:
        high = self.correction_high
        if high is not None and self.correction_low > high:
            raise ValueError(f"correction_low ({self.correction_low}) must not be above correction_high ({high})")
        if self.behaviour == "engine" and self.correction not in (None, "none"):
            raise ValueError(
                f"behaviour=engine takes the ratio against the engine itself, which correction={self.correction} would "
                "weight a second time: use behaviour=recomputed, or correction=none"
            )
        return self

    @property
    def average_decay(self) -> float | None:
        """Decay per optimizer update of the moving average of the weights that R is taken against (policy/average.py);
        None where there is no average."""
        return None

    def with_correction_for(self, mode: str) -> Self:
        """These settings, with a `correction` that fits the mode of the rollouts (rollout.mode) where none is set."""
        if self.correction is not None:
            return self
        fresh = mode == "synchronous" or self.behaviour == "engine"
        return self.model_copy(update={"correction": "none" if fresh else "truncate"})

    def denominator(self, *, tokens: int, answers: int) -> float:
        """What the loss of an optimizer step with so many trained response tokens and answers is divided by."""
        counts = {"tokens": tokens, "answers": answers}
        return float(counts[self.loss_divisor] if isinstance(self.loss_divisor, str) else self.loss_divisor)

    def check_response_limit(self, max_response_tokens: int) -> None:
        """ValueError where these settings do not go with answers of at most `max_response_tokens` tokens."""


class Algorithm(ABC):
    """One algorithm, opened with its settings. A subclass names its `Settings` and defines at least `loss`."""

    Settings: ClassVar[type[AlgorithmSettings]]
    """The class that `algorithm.*` of the configuration is checked against."""
    settings: AlgorithmSettings
    """An instance of `Settings`; a subclass declares it as such."""

    @property
    def per_token(self) -> bool:
        """Whether the loss of a token depends on nothing of other tokens. The trainer may then call `loss` on some
        tokens of a micro-batch at a time (`policy.lm_head`), in which an answer need not be whole.

        Nobody inherits it with another loss: a class that defines `loss` (or a policy gradient's `token_loss`) says so
        itself, or is taken for one that is not per token.
        """
        return False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if {"loss", "token_loss"} & vars(cls).keys() and "per_token" not in vars(cls):
            cls.per_token = False  # type: ignore[assignment,method-assign]  # in place of the property

    def __init__(self, settings: AlgorithmSettings, *, max_response_tokens: int) -> None:
        """`max_response_tokens` is the length at which generation cuts an answer off."""
        self.settings = settings
        self.max_response_tokens = max_response_tokens

    def samples(self, group: RolloutGroup) -> list[TrainingSample]:
        """The answers of a group that are trained, in order. Answers that are set aside (`ignored`) never are.

        Called for groups whose answers are neither all right nor all wrong.
        """
        return [training_sample(group, rollout) for rollout in counted(group)]

    @abstractmethod
    def loss(self, logprobs: Tensor, batch: PackedBatch) -> Tensor:
        """The loss of each token, [T], with its gradient; neither masked, nor summed, nor divided.

        `logprobs` [T], fp32, are those of the policy in training at `rollout.temperature`; the policy that generated
        the data has `batch.behaviour_logprobs`. The trainer multiplies by `batch.weights`, ignores values where
        `batch.loss_mask` is 0, adds up the others over micro-batches and replicas, and divides by `loss_divisor`.
        """

    def metrics(self, logprobs: Tensor, loss: Tensor, batch: PackedBatch) -> dict[str, Mean | Max]:
        """What to log of a micro-batch, without gradients; `loss` [T] is that of `loss` with its weights, 0 outside the
        mask.

        The names must be the same in every call, fillers (no token with loss_mask 1) included. They are the names in
        metrics.jsonl. Totals and counts are added over micro-batches, replicas and the optimizer steps of a step.
        """
        return token_metrics(logprobs, loss, batch)


def counted(group: RolloutGroup) -> list[Rollout]:
    """The answers of a group that were not set aside (`ignored`), in order."""
    return [rollout for rollout in group.rollouts if not rollout.ignored]


def training_sample(
    group: RolloutGroup, rollout: Rollout, *, correct_rate: float | None = None, advantage: float = 0.0
) -> TrainingSample:
    """One answer of the group as a sample. `correct_rate` None: the group's own."""
    import numpy as np  # settings must be readable without it

    return TrainingSample(
        draw=group.draw,
        sample_index=rollout.sample_index,
        input_ids=np.concatenate([group.prompt.token_ids, rollout.response_ids]).astype(np.int32),
        prompt_length=len(group.prompt.token_ids),
        rollout_logprobs=rollout.rollout_logprobs,
        behaviour_logprobs=rollout.trainer_logprobs,
        correct=rollout.correct,
        reward=rollout.reward,
        correct_rate=group.correct_rate if correct_rate is None else correct_rate,
        advantage=advantage,
        step=group.step,
    )


def refuse_token_divisor(settings: AlgorithmSettings, because: str) -> None:
    """ValueError where the loss is one number per answer, `because` of a setting, and is divided by tokens."""
    if settings.loss_divisor == "tokens":
        raise ValueError(
            f"{because} gives one loss per answer, which algorithm.loss_divisor=tokens would divide by the tokens of "
            "all answers: set loss_divisor=answers for a mean over answers, or a fixed number"
        )


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in fp32 where their dtype is narrower; fp64 stays."""
    return values if values.element_size() >= 4 else values.float()
