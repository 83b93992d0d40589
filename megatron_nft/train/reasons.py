"""The reasons of verdicts in a few stable groups, for metrics and for the error of a step that trains nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_nft.engines.answers import CUT_OFF
from megatron_nft.types import RolloutGroup, Verdict

REASONS = ("cut_off", "unfinished", "no_answer", "reference", "grader_failed", "timeout", "memory", "other")
"""cut_off: no end within the limit. unfinished: the last box or the thinking is not closed. no_answer: the grader found
none in the text. reference: the reference answer cannot be used. grader_failed: the grader raised, or its process
ended. timeout, memory: grading used up what it may."""

_BEGINNINGS = (
    (CUT_OFF, "cut_off"),
    ("the grader failed", "grader_failed"),
    ("the grading process ended", "grader_failed"),
    ("the row cannot be read", "grader_failed"),
    ("no verdict after", "timeout"),
    ("needed more than", "memory"),
    ("the reference", "reference"),
    ("the thinking is not finished", "unfinished"),
    ("the last box is cut off", "unfinished"),
    ("nothing follows", "no_answer"),
    ("the response is empty", "no_answer"),
)


def reason_group(reason: str) -> str | None:
    """Return the group of a reason as graders write it; None for an answer that was compared and has none."""
    if not reason:
        return None
    for beginning, group in _BEGINNINGS:
        if reason.startswith(beginning):
            return group
    if "reference answer" in reason:
        return "reference"
    return "no_answer" if reason.startswith("no ") or "finds no answer" in reason else "other"


@dataclass
class Outcomes:
    """Verdicts and reasons of answers, counted."""

    answers: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)  # by group
    failures: Counter[str] = field(default_factory=Counter)  # what graders that failed said

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup]) -> Outcomes:
        """Count the answers of `groups`."""
        found = cls()
        for rollout in (r for group in groups for r in group.rollouts):
            name = reason_group(rollout.reason)
            found.answers += 1
            found.verdicts[str(rollout.verdict)] += 1
            found.reasons.update([name] if name else [])
            found.failures.update([rollout.reason] if name == "grader_failed" else [])
        return found

    def add(self, other: Outcomes) -> None:
        """Add what another rank or batch counted."""
        self.answers += other.answers
        for mine, theirs in (
            (self.verdicts, other.verdicts),
            (self.reasons, other.reasons),
            (self.failures, other.failures),
        ):
            mine.update(theirs)

    def share(self, group: str) -> float:
        """Return the share of answers with a reason of this group, in [0, 1]."""
        return self.reasons[group] / self.answers if self.answers else 0.0

    def __str__(self) -> str:
        verdicts = ", ".join(f"{self.verdicts[str(v)]} {v}" for v in Verdict if self.verdicts[str(v)])
        reasons = ", ".join(f"{n} {group.replace('_', ' ')}" for group, n in self.reasons.most_common())
        return f"{self.answers} answers: {verdicts or 'none'}" + (f" (reasons: {reasons})" if reasons else "")
