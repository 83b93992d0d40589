"""The grader `math_verify_plain`: the math-verify package and nothing else, as its README uses it.

Only unfinished thinking and a box that is cut off are refused before it is asked, as by all graders here.
For comparison with published results and with the default grader `maths`; docs/verify.md compares what the two accept.
"""

from __future__ import annotations

import logging
from typing import Any

from math_verify import parse, verify

from megatron_nft.types import ReasonKind, Verdict
from megatron_nft.verify.boxed import is_cut_off
from megatron_nft.verify.outcome import Outcome
from megatron_nft.verify.thinking import NoAnswer, answer_part, is_opened

logging.getLogger("math_verify").setLevel(logging.ERROR)  # its own timeouts are off: the worker is killed instead


def grade(response: str, answer: str, data_source: str, extra: dict[str, Any] | None) -> Outcome:
    r"""Grade whether math-verify finds the answers in `response` equal to the reference `answer`.

    answer: the bare answer, which is put into a `\boxed{}` so that all of it is read as mathematics, or a solution that
    has a `\boxed{}`.
    """
    gold = parse(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not gold:
        return Outcome(
            Verdict.UNPARSEABLE, reason="math-verify cannot read the reference answer", kind=ReasonKind.REFERENCE
        )
    try:
        text = answer_part(response, opened=is_opened(extra))
    except NoAnswer as error:
        return Outcome(Verdict.UNPARSEABLE, reason=str(error), kind=error.kind)
    if is_cut_off(text):
        return Outcome(Verdict.UNPARSEABLE, reason="the last box is cut off", kind=ReasonKind.UNFINISHED)
    found = parse(text, parsing_timeout=None)
    if not found:
        return Outcome(
            Verdict.UNPARSEABLE, reason="math-verify finds no answer in the response", kind=ReasonKind.NO_ANSWER
        )
    correct = verify(gold, found, timeout_seconds=None)
    return Outcome(Verdict.CORRECT if correct else Verdict.WRONG, str(found[-1]))
