"""A grader for numbers that need not be exact: equal within a relative tolerance.

`numeric` allows 1e-3; `numeric:0.01` sets another tolerance. Answers are read as by the default grader, with their
units, percent signs and powers of ten.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron_nft.types import ReasonKind, Verdict
from megatron_nft.verify.algebra.answer import read
from megatron_nft.verify.algebra.comparison import value_at_a_point
from megatron_nft.verify.algebra.normalize import normalize
from megatron_nft.verify.algebra.tree import NotUnderstood, Tree
from megatron_nft.verify.algebra.values import Undecided, symbols
from megatron_nft.verify.extract import final_answer
from megatron_nft.verify.maths import gold_text
from megatron_nft.verify.outcome import Outcome
from megatron_nft.verify.thinking import NoAnswer, is_opened

DEFAULT_TOLERANCE = 1e-3


def with_tolerance(tolerance: float) -> Callable[[str, str, str, dict[str, Any] | None], Outcome]:
    """Return a grader that accepts |answer - reference| <= tolerance * |reference|."""
    return functools.partial(grade, tolerance=tolerance)


def grade(
    response: str,
    answer: str,
    data_source: str,
    extra: dict[str, Any] | None,
    tolerance: float = DEFAULT_TOLERANCE,
) -> Outcome:
    """Grade whether the final answer of `response` is a number within `tolerance` of the reference."""
    gold = _number(gold_text(answer))
    if gold is None:
        reason = f"the reference answer {answer!r:.80} is not a number"
        return Outcome(Verdict.UNPARSEABLE, reason=reason, kind=ReasonKind.REFERENCE)
    try:
        extracted = final_answer(response, opened=is_opened(extra))
    except NoAnswer as error:
        return Outcome(Verdict.UNPARSEABLE, reason=str(error), kind=error.kind)
    found = _number(normalize(extracted))
    if found is None:
        return Outcome(Verdict.UNPARSEABLE, extracted, "the answer is not a number")
    return Outcome(Verdict.CORRECT if abs(found - gold) <= tolerance * abs(gold) else Verdict.WRONG, extracted)


def _number(text: str) -> Any:
    """Return the value of a normalised text as an mpmath number; None if it is not a single number."""
    try:
        return _value(read(text)[0])
    except (NotUnderstood, Undecided):
        return None


def _value(tree: Tree) -> Any:
    if tree[0] == "unit":
        return _value(tree[1])
    if tree[0] == "rel" and set(tree[1]) <= {"=", r"\approx"}:
        return _value(tree[-1])
    return None if symbols(tree) else value_at_a_point(tree)
