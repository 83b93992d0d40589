"""A grader's result for one answer, and how the results of several graders become one verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_nft.types import ReasonKind, Verdict

MAX_EXTRACTED_CHARS = 2000  # no answer worth keeping is longer


@dataclass(frozen=True, slots=True)
class Outcome:
    """One grader's verdict on one answer."""

    verdict: Verdict
    extracted: str | None = None  # what the grader read as the answer
    reason: str = ""  # why the verdict is neither correct nor wrong
    kind: ReasonKind | None = None  # of the reason; None counts as `other` where there is one
    reward: float | None = None  # in [0, 1], of a grader that gives numbers


@dataclass(frozen=True, slots=True)
class Graded:
    """The verdict that training and evaluation use.

    With several graders `verdict`, `extracted`, `grader`, `reason`, its kind and `reward` are the first one's.
    """

    verdict: Verdict
    extracted: str | None
    grader: str
    seconds: float  # in the worker, all graders together
    by_grader: dict[str, Verdict]
    ignored: bool  # left out of the loss: there is no verdict, or the graders disagree, and the settings say so
    reason: str = ""
    reason_kind: ReasonKind | None = None
    reward: float | None = None  # Outcome.reward


def combine(
    names: tuple[str, ...],
    outcomes: list[Outcome],
    seconds: float,
    on_disagreement: str = "trust_first",
    on_failure: str = "drop",
) -> Graded:
    """Combine the outcomes of the graders `names`, given in the same order.

    seconds: for all graders together. on_disagreement, on_failure: as in `VerifyConfig`.
    """
    first = outcomes[0]
    disagree = graders_disagree([outcome.verdict for outcome in outcomes])
    set_aside = on_disagreement == "drop" or (on_disagreement == "not_negative" and first.verdict != Verdict.CORRECT)
    ignored = (disagree and set_aside) or (first.verdict.is_missing and on_failure == "drop")
    return Graded(
        verdict=first.verdict,
        extracted=first.extracted,
        grader=names[0],
        seconds=seconds,
        by_grader={name: outcome.verdict for name, outcome in zip(names, outcomes, strict=True)},
        ignored=ignored,
        reason=first.reason,
        reason_kind=first.kind or (ReasonKind.OTHER if first.reason else None),
        reward=first.reward,
    )


def graders_disagree(verdicts: Sequence[Verdict]) -> bool:
    """Whether the first of the graders says correct and another does not, or the other way round; False for none.

    Other differences do not change what is learned, and another grader that gave no verdict differs from nobody.
    """
    return any(
        (verdict is Verdict.CORRECT) != (verdicts[0] is Verdict.CORRECT)
        for verdict in verdicts[1:]
        if not verdict.is_missing
    )


def shorten(text: str | None) -> str | None:
    """Return `text` in a form that can be written to a file: valid UTF-8, cut off after MAX_EXTRACTED_CHARS."""
    if text is None:
        return None
    if len(text) > MAX_EXTRACTED_CHARS:
        text = text[:MAX_EXTRACTED_CHARS] + " [cut]"
    return text.encode("utf-8", "replace").decode("utf-8")
