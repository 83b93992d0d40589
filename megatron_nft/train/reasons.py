"""Verdicts and their reasons, counted, for the errors of a step that trains nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_nft.types import ReasonKind, RolloutGroup, Verdict


@dataclass
class Outcomes:
    """Verdicts and reasons of answers, counted."""

    answers: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[ReasonKind] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)  # what graders that failed said

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup]) -> Outcomes:
        """Count the answers of `groups`."""
        found = cls()
        for rollout in (r for group in groups for r in group.rollouts):
            kind = rollout.reason_kind
            found.answers += 1
            found.verdicts[str(rollout.verdict)] += 1
            found.reasons.update([kind] if kind else [])
            found.failures.update([rollout.reason] if kind is ReasonKind.GRADER_FAILED else [])
        return found

    def add(self, other: Outcomes) -> None:
        """Add what another rank or batch counted."""
        self.answers += other.answers
        self.verdicts.update(other.verdicts)
        self.reasons.update(other.reasons)
        self.failures.update(other.failures)

    def share(self, *kinds: ReasonKind) -> float:
        """Return the share of answers with a reason of one of these kinds, in [0, 1]."""
        return sum(self.reasons[kind] for kind in kinds) / self.answers if self.answers else 0.0

    @property
    def missing_share(self) -> float:
        """The share of answers without a verdict, in [0, 1]."""
        return sum(self.verdicts[str(v)] for v in Verdict if v.is_missing) / self.answers if self.answers else 0.0

    def __str__(self) -> str:
        verdicts = ", ".join(f"{n} {_words(v)}" for v in Verdict if (n := self.verdicts[str(v)]))
        reasons = ", ".join(f"{n} {_words(kind)}" for kind, n in self.reasons.most_common())
        return f"{self.answers} answers: {verdicts or 'none'}" + (f" (reasons: {reasons})" if reasons else "")


def _words(name: str) -> str:
    return name.replace("_", " ")
