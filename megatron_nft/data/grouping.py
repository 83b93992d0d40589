"""Which questions' groups of graded answers are trained."""

from __future__ import annotations

from typing import Literal

from megatron_nft.types import RolloutGroup

GroupClass = Literal["kept", "all_correct", "all_wrong", "too_few"]


def classify(group: RolloutGroup) -> GroupClass:
    """Whether the group teaches anything: it does when its answers that count are neither all right nor all wrong. With
    a grader that gives numbers it does when their rewards differ.

    too_few: fewer than two answers count (the rest were set aside as `ignored`).
    """
    counted = [r for r in group.rollouts if not r.ignored]
    if len(counted) < 2:
        return "too_few"
    if len({r.score for r in counted}) > 1:
        return "kept"
    return "all_correct" if counted[0].correct else "all_wrong"
