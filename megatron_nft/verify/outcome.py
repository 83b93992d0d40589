"""A grader's result for one answer, and how the results of several graders become one verdict."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_nft.types import Verdict

MAX_EXTRACTED_CHARS = 2000  # no answer worth keeping is longer


@dataclass(frozen=True, slots=True)
class Outcome:
    """One grader's verdict on one answer."""

    verdict: Verdict
    extracted: str | None = None  # what the grader read as the answer
    reason: str = ""  # why the verdict is neither correct nor wrong
    reward: float | None = None  # in [0, 1], of a grader that gives numbers


@dataclass(frozen=True, slots=True)
class Graded:
    """The verdict that training and evaluation use.

    With several graders `verdict`, `extracted`, `grader`, `reason` and `reward` are the first one's.
    """

    verdict: Verdict
    extracted: str | None
    grader: str
    seconds: float  # in the worker, all graders together
    by_grader: dict[str, Verdict]
    ignored: bool  # left out of the loss: the graders disagree and `on_disagreement` says so
    reason: str = ""
    reward: float | None = None  # Outcome.reward


def combine(
    names: tuple[str, ...], outcomes: list[Outcome], seconds: float, on_disagreement: str = "trust_first"
) -> Graded:
    """Combine the outcomes of the graders `names`, given in the same order.

    Graders disagree when one says correct and another does not; other differences do not change what is learned.

    seconds: for all graders together. on_disagreement: as in `VerifyConfig`.
    """
    correct = [outcome.verdict is Verdict.CORRECT for outcome in outcomes]
    disagree = any(correct) != all(correct)
    ignored = disagree and (on_disagreement == "drop" or (on_disagreement == "not_negative" and not correct[0]))
    first = outcomes[0]
    return Graded(
        verdict=first.verdict,
        extracted=first.extracted,
        grader=names[0],
        seconds=seconds,
        by_grader={name: outcome.verdict for name, outcome in zip(names, outcomes, strict=True)},
        ignored=ignored,
        reason=first.reason,
        reward=first.reward,
    )


def shorten(text: str | None) -> str | None:
    """Return `text` in a form that can be written to a file: valid UTF-8, cut off after MAX_EXTRACTED_CHARS."""
    if text is None:
        return None
    if len(text) > MAX_EXTRACTED_CHARS:
        text = text[:MAX_EXTRACTED_CHARS] + " [cut]"
    return text.encode("utf-8", "replace").decode("utf-8")
