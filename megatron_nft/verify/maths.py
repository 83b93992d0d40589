r"""The default grader `maths`: whether the final answer of a response is mathematically equal to the reference answer.

1. Find the answer (extract.py) and put it into one spelling (algebra/normalize.py). Equal spellings are equal answers.
2. Read both answers as trees (algebra/answer.py) and compare them by structure and value (algebra/equality.py): exactly
   for rational numbers, at random points for expressions. This decides nearly all answers, in well under a
   millisecond.
3. Only where our algebra cannot decide (integrals, sums, limits and the like) ask the math-verify package, which works
   symbolically.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from megatron_nft.types import ReasonKind, Verdict
from megatron_nft.verify.algebra.answer import read
from megatron_nft.verify.algebra.equality import same
from megatron_nft.verify.algebra.normalize import normalize, without_spaces
from megatron_nft.verify.algebra.tree import NotUnderstood, TooMuch, Tree
from megatron_nft.verify.algebra.units import is_unit, scale_of
from megatron_nft.verify.algebra.values import OutOfRange, Undecided
from megatron_nft.verify.algebra.wording import is_words, same_wording, word_tree
from megatron_nft.verify.boxed import last_boxes
from megatron_nft.verify.extract import final_answer
from megatron_nft.verify.outcome import Outcome
from megatron_nft.verify.thinking import NoAnswer, is_opened

logging.getLogger("math_verify").setLevel(logging.ERROR)  # its own timeouts are off: the worker is killed instead

MAX_CHARS = 200_000  # longer answers are not read
MAX_SYMBOLIC_CHARS = 1000  # math-verify is not asked about longer answers
_gsm8k = re.compile(r"####\s*(.+)")
_unit_at_end = re.compile(r"\\text\{([^{}]*)\}(?:\^\{?\d\}?)?$")
_symbolic = re.compile(  # what math-verify can read and our parser cannot
    r"\\(?:i{0,3}int|oint|sum|prod|lim|det|gcd|lcm|max|min|bmod|mod|setminus|cap|partial|frac\s*\{\s*d"
    r"|begin\s*\{[a-z]*matrix\}(?=.*\\end))(?![a-z])"
)
_negation = re.compile(r"\b(?:not|no|never|isn't|none)\b", re.IGNORECASE)


@lru_cache(maxsize=8192)
def gold_text(answer: str) -> str:
    r"""Return the reference answer in one spelling.

    answer: the bare answer, or a solution that ends in `\boxed{}` or `#### n`.
    """
    box = last_boxes(answer) if "\\" in answer else None
    if box is not None:
        answer = box
    elif "####" in answer:
        answer = _gsm8k.findall(answer)[-1]
    return normalize(answer)


def grade(response: str, answer: str, data_source: str, extra: dict[str, Any] | None) -> Outcome:
    """Grade whether the final answer of `response` is equal to the reference `answer`."""
    gold = gold_text(answer)
    if not gold:
        return Outcome(Verdict.UNPARSEABLE, reason="the reference answer is empty", kind=ReasonKind.REFERENCE)
    if gold.lower() == "nan":  # what a missing number becomes as text
        reason = f"the reference answer is {gold}, a missing number as text"
        return Outcome(Verdict.UNPARSEABLE, reason=reason, kind=ReasonKind.REFERENCE)
    try:
        extracted = final_answer(response, opened=is_opened(extra))
    except NoAnswer as error:
        return Outcome(Verdict.UNPARSEABLE, reason=str(error), kind=error.kind)
    if len(extracted) > MAX_CHARS:
        return Outcome(Verdict.UNPARSEABLE, extracted, f"the answer has {len(extracted)} characters")
    found = normalize(extracted)
    if without_spaces(found) == without_spaces(gold):
        return Outcome(Verdict.CORRECT, extracted)
    if not found:
        return Outcome(Verdict.UNPARSEABLE, extracted, "the answer is empty")
    return _compare(gold, found, extracted)


def _compare(gold: str, found: str, extracted: str) -> Outcome:
    """Compare two normalised answers: correct if any reading of one is the same as any reading of the other."""
    gold_readings, gold_problem = _readings(gold, lenient=False)
    found_readings, found_problem = _readings(found, lenient=True)
    undecided = None
    for gold_tree in gold_readings:
        for found_tree in found_readings:
            try:
                if same(gold_tree, found_tree):
                    return Outcome(Verdict.CORRECT, extracted)
            except OutOfRange as error:
                return Outcome(Verdict.UNPARSEABLE, extracted, str(error))
            except Undecided as error:
                undecided = error
    if _repeats_with_unit(gold, found):
        return Outcome(Verdict.CORRECT, extracted)
    if (gold_problem or gold_readings[0][0] in ("text", "prose")) and same_wording(gold, found):
        return Outcome(Verdict.CORRECT, extracted)
    if gold_problem:
        return _symbolically(gold, found, extracted, gold_problem, "the reference answer")
    if problem := found_problem or undecided:
        return _symbolically(gold, found, extracted, problem, "the answer")
    if gold_readings[0][0] == "prose":
        return Outcome(
            Verdict.UNPARSEABLE,
            extracted,
            "the reference answer mixes words and mathematics",
            kind=ReasonKind.REFERENCE,
        )
    return Outcome(Verdict.WRONG, extracted)


def _repeats_with_unit(gold: str, found: str) -> bool:
    r"""Whether `found` is `gold` followed by a unit, whatever `gold` is: `(3, 4] \text{ cm}`."""
    unit = _unit_at_end.search(found) if "\\text" in found else None
    return (
        unit is not None
        and is_unit(unit[1])
        and scale_of(unit[1])[0] == 1
        and without_spaces(found[: unit.start()].rstrip()) == without_spaces(gold)
    )


@lru_cache(maxsize=8192)
def _readings(text: str, lenient: bool) -> tuple[tuple[Tree, ...], NotUnderstood | None]:
    """Return the readings of a normalised text, or the reason why there are none."""
    try:
        return read(text, lenient=lenient), None
    except NotUnderstood as error:
        return (), error


def _symbolically(gold: str, found: str, extracted: str, problem: Exception, whose: str) -> Outcome:
    """Ask math-verify about an answer that our own algebra cannot decide, if math-verify is known to read such answers.

    problem: why our algebra cannot decide. whose: the answer that it cannot read, for the verdict's reason.
    """
    if is_words(gold) or is_words(found) or _negation.search(found):
        same_words = word_tree(gold) == word_tree(found) != ("text", "")
        return Outcome(Verdict.CORRECT if same_words else Verdict.WRONG, extracted)
    kind = ReasonKind.REFERENCE if whose == "the reference answer" else None
    unreadable = Outcome(Verdict.UNPARSEABLE, extracted, f"{whose} cannot be read: {problem}", kind=kind)
    if isinstance(problem, TooMuch) or max(len(gold), len(found)) > MAX_SYMBOLIC_CHARS:
        return unreadable
    if not (isinstance(problem, Undecided) or _symbolic.search(gold) or _symbolic.search(found)):
        return unreadable  # math-verify ignores what it does not know: to it 2 hours 30 is 2 hours 20
    gold_parsed, found_parsed = _parse(gold), _parse(found)
    if not gold_parsed or not found_parsed:
        return unreadable
    correct = verify(list(gold_parsed), list(found_parsed), timeout_seconds=None)
    return Outcome(Verdict.CORRECT if correct else Verdict.WRONG, extracted)


@lru_cache(maxsize=1024)
def _parse(text: str) -> tuple[Any, ...]:
    """Return math-verify's reading of a whole formula."""
    parsed = parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None, fallback_mode="no_fallback")
    return tuple(part for part in parsed if not isinstance(part, str))


def warm_up() -> None:
    """Fill the caches before workers are forked."""
    for response, answer in (("\\boxed{\\sqrt{2}x^2}", "0.5"), ("\\boxed{\\int x dx}", "\\int_0^1 x dx")):
        grade(response, answer, "", None)
