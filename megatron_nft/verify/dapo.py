r"""The strict rules of DAPO: an answer counts only in the form that the question asks for.

`dapo_boxed` takes the last `\boxed{}`, `dapo_minerva` what follows the last "Answer:". Both compare normalised strings
(`\dfrac12` becomes `\frac{1}{2}`; spaces and dollar signs are dropped), never values: 0.5 is not 1/2.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_nft.types import ReasonKind, Verdict
from megatron_nft.verify.algebra.normalize import normalize, without_spaces
from megatron_nft.verify.boxed import is_cut_off, last_box
from megatron_nft.verify.outcome import Outcome
from megatron_nft.verify.thinking import NoAnswer, answer_part, is_opened

_answer_line = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)


def grade_boxed(response: str, answer: str, data_source: str, extra: dict[str, Any] | None) -> Outcome:
    r"""Grade the content of the last `\boxed{}` against the reference, as normalised strings."""
    try:
        text = answer_part(response, opened=is_opened(extra))
    except NoAnswer as error:
        return Outcome(Verdict.UNPARSEABLE, reason=str(error), kind=error.kind)
    if is_cut_off(text):
        return Outcome(Verdict.UNPARSEABLE, reason="the last box is cut off", kind=ReasonKind.UNFINISHED)
    return _same_string(last_box(text), answer, r"no \boxed{} in the response")


def grade_minerva(response: str, answer: str, data_source: str, extra: dict[str, Any] | None) -> Outcome:
    """Grade what follows the last "Answer:" on its line against the reference, as normalised strings."""
    try:
        lines = _answer_line.findall(answer_part(response, opened=is_opened(extra)))
    except NoAnswer as error:
        return Outcome(Verdict.UNPARSEABLE, reason=str(error), kind=error.kind)
    return _same_string(lines[-1] if lines else None, answer, 'no "Answer:" line in the response')


def _same_string(found: str | None, answer: str, missing: str) -> Outcome:
    gold = without_spaces(normalize(last_box(answer) or answer))
    if not gold:
        return Outcome(Verdict.UNPARSEABLE, reason="the reference answer is empty", kind=ReasonKind.REFERENCE)
    if found is None:
        return Outcome(Verdict.UNPARSEABLE, reason=missing, kind=ReasonKind.NO_ANSWER)
    box = last_box(found)  # "Answer: \boxed{5}"
    text = without_spaces(normalize(found if box is None else box))
    return Outcome(Verdict.CORRECT if text == gold else Verdict.WRONG, found.strip())
