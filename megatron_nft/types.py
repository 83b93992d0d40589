"""What flows through one step, with shapes and dtypes on every field.

Legend: P prompt tokens, R response tokens, K answers per question, T tokens of a packed micro-batch, S segments.
Host-side records hold numpy arrays; only `PackedBatch` holds torch tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


class Verdict(StrEnum):
    """What the verifier says of an answer. Only `correct` is a positive; `unparseable` is the answer's own fault."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"
    TIMEOUT = "timeout"  # a case of no verdict, which has had a name of its own from the beginning
    NO_VERDICT = "no_verdict"

    @property
    def is_missing(self) -> bool:
        """Whether grading took too long, raised or crashed, which says nothing of the answer."""
        return self in (Verdict.TIMEOUT, Verdict.NO_VERDICT)


class ReasonKind(StrEnum):
    """Why an answer has a verdict that no comparison gave; the text beside it says it in full."""

    CUT_OFF = "cut_off"  # no end within the limit
    UNFINISHED = "unfinished"  # the last box or the thinking is not closed
    NO_ANSWER = "no_answer"  # the grader found none in the text
    REFERENCE = "reference"  # the reference answer cannot be used
    GRADER_FAILED = "grader_failed"  # it raised, or its process ended
    TIMEOUT = "timeout"  # grading used up its time
    MEMORY = "memory"  # grading used up its memory
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the engine sees it."""

    index: int  # row in the prompt data, in file order: stable over runs
    data_source: str
    messages: tuple[dict[str, str], ...]  # [{role, content}]
    answer: str  # ground truth for the grader
    token_ids: np.ndarray  # int32 [P], chat template applied
    extra: dict[str, Any] = field(default_factory=dict)
    opens_thinking: bool = False  # it ends in `<think>`: the answer begins within the thinking


@dataclass(slots=True)
class Rollout:
    """One answer to one question."""

    draw: int  # running number of the question in the prompt stream; with sample_index it keys the sampling seed
    sample_index: int  # 0 .. K-1
    response_ids: np.ndarray  # int32 [R], end token included when it was produced
    rollout_logprobs: np.ndarray  # float32 [R], the engine's, at the sampling temperature
    finish_reason: str  # stop | length
    weight_version: int  # version under which the answer was finished
    text: str  # response_ids decoded, special tokens left out
    weight_version_spans: tuple[tuple[int, int, int], ...] = ()  # (version, start, end) where several made it
    verdict: Verdict | None = None
    reward: float | None = None  # in [0, 1], of a grader that gives numbers; None: 1 for `correct`, else 0
    extracted: str | None = None  # what the grader read as the answer
    reason: str = ""  # why the verdict is neither right nor wrong by comparison, as the grader says it
    reason_kind: ReasonKind | None = None  # None where there is no reason
    grader_verdicts: dict[str, Verdict] = field(default_factory=dict)  # by grader, where several were asked
    verify_s: float = 0.0
    ignored: bool = False  # left out of the loss (truncated=drop, graders disagree)
    trainer_logprobs: np.ndarray | None = None  # float32 [R], behaviour policy, by the trainer

    @property
    def version_spans(self) -> tuple[tuple[int, int, int], ...]:
        """(version, start, end) of every token, also where the whole answer has one version."""
        return self.weight_version_spans or ((self.weight_version, 0, len(self.response_ids)),)

    @property
    def correct(self) -> bool:
        return self.verdict is Verdict.CORRECT

    @property
    def score(self) -> float:
        """The reward, in [0, 1]: the grader's number, or 1 for `correct` and 0 for any other verdict."""
        return float(self.correct) if self.reward is None else self.reward


@dataclass(slots=True)
class RolloutGroup:
    """A question and its K answers."""

    draw: int
    prompt: Prompt
    rollouts: list[Rollout]  # K
    step: int  # training step in which it was generated

    @property
    def correct_rate(self) -> float:
        """Mean reward of the answers that count, in [0, 1]."""
        counted = [r.score for r in self.rollouts if not r.ignored]
        return sum(counted) / len(counted) if counted else 0.0


@dataclass(slots=True)
class TrainingSample:
    """One answer ready for the loss."""

    draw: int
    sample_index: int
    input_ids: np.ndarray  # int32 [P + R]
    prompt_length: int  # P
    rollout_logprobs: np.ndarray  # float32 [R]
    behaviour_logprobs: np.ndarray | None  # float32 [R]; None until the trainer has computed them
    correct: bool
    correct_rate: float  # r of the group, in (0, 1), as the loss sees it
    advantage: float = 0.0  # GRPO family
    step: int = 0  # training step in which it was generated
    reward: float | None = None  # Rollout.reward
    weights: np.ndarray | None = None  # float32 [R], of each token's loss; None: 1
    reference_logprobs: np.ndarray | None = None  # float32 [R], that R is taken against; None: behaviour's

    @property
    def response_length(self) -> int:
        return len(self.input_ids) - self.prompt_length


@dataclass(slots=True)
class PackedBatch:
    """One packed (thd) micro-batch. Position t predicts labels[t] = tokens[t + 1] of the same segment.

    Padding, if any, is further segments at the end with loss_mask 0; under context parallelism a sample's own segment
    may end with a few such tokens, too.
    """

    tokens: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], restart at 0 per segment
    labels: torch.Tensor  # int64 [T], 0 where there is nothing to predict
    loss_mask: torch.Tensor  # float32 [T], 1 where labels is a response token that is trained
    cu_seqlens: torch.Tensor  # int32 [S + 1]
    max_seqlen: int
    behaviour_logprobs: torch.Tensor  # float32 [T], 0 outside the mask
    rollout_logprobs: torch.Tensor  # float32 [T], 0 outside the mask
    correct: torch.Tensor  # float32 [T], Rollout.score: 0 or 1, or a reward in between
    correct_rate: torch.Tensor  # float32 [T], 0.5 outside the mask
    advantage: torch.Tensor  # float32 [T]
    weights: torch.Tensor  # float32 [T], of each token's loss; 1 outside the mask
    segment_ids: torch.Tensor  # int64 [T], which segment a token belongs to
    sample_ids: list[int]  # per real segment: position in the list that was packed; empty for a filler

    def tokens_of(self, rows: slice) -> PackedBatch:
        """The tokens from `rows.start` to `rows.stop`, for a loss that is per token: each segment keeps its number, and
        has the tokens that lie inside, none for most; `sample_ids` and `max_seqlen` stay."""
        return replace(
            self,
            tokens=self.tokens[rows],
            position_ids=self.position_ids[rows],
            labels=self.labels[rows],
            loss_mask=self.loss_mask[rows],
            cu_seqlens=(self.cu_seqlens - rows.start).clamp(0, rows.stop - rows.start),
            behaviour_logprobs=self.behaviour_logprobs[rows],
            rollout_logprobs=self.rollout_logprobs[rows],
            correct=self.correct[rows],
            correct_rate=self.correct_rate[rows],
            advantage=self.advantage[rows],
            weights=self.weights[rows],
            segment_ids=self.segment_ids[rows],
        )
