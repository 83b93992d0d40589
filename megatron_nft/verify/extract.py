r"""Find the final answer in a response.

The first of these that exists is the answer; none of them is tried against the reference:

1. the last `\boxed{}` and those joined to it ("\boxed{1} and \boxed{3}");
2. the last of `#### n`, "Answer: x" and "the answer is x";
3. the whole response, if it is short and not a sentence;
4. the last formula;
5. the last number of the last lines.
"""

from __future__ import annotations

import itertools
import re

from megatron_nft.verify.boxed import last_boxes, percent_sign

_anchor = re.compile(
    r"""\#\#\#\# | (?:final\s+)?answer\s*(?:\*\*)?\s*[:=]
      | \b(?:answers?|correct\s+(?:option|choice))\s+(?:is|are|must\s+be|should\s+be|equals)\b\s*:?""",
    re.IGNORECASE | re.VERBOSE,
)
_math = re.compile(
    r"""\$\$(?P<display>.+?)\$\$ | \\\[(?P<brackets>(?:(?!\\\[).)+?)\\\] | \\\((?P<parentheses>(?:(?!\\\().)+?)\\\)
      | (?<![\\\d])\$(?P<dollars>(?:\\\$|[^$])+?)(?<!\\)\$(?!\d)""",
    re.DOTALL | re.VERBOSE,
)
_joins = re.compile(r"\s*(?:,|;|and|or|,\s*and|,\s*or|&)?\s*$", re.IGNORECASE)
_prose = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}\s+[A-Za-z]{2,}")
_sentence_end = re.compile(r"(?:\.|(?<!\d)[!?])(?:\s+(?=[A-Z\\$(*])|\s*$)")
_clause_end = re.compile(r",?\s+(?:because|since|so|which|where|as)\b", re.IGNORECASE)
_number = re.compile(r"(?<![\w.\\])[-+]?\s?\\?\$?\s?\d[\d,]*(?:\.\d+)?(?:\s?/\s?\d+)?(?:[eE][+-]?\d+)?\s?\\?%?")
_listed = re.compile(rf"{_number.pattern}(?:\s*,\s*{_number.pattern})*\s*,?\s+(?:and|or)\s+{_number.pattern}")
_subject = re.compile(
    r"(?:the|it|this|that|there|so|thus|he|she|they|we)\b[^\d$\\]*\b(?:is|are|was|were|equals)\s+", re.IGNORECASE
)
_tag = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_thinking = "</think>"
SHORT_CHARS = 300  # a response of at most this length may be nothing but an answer
TAIL_LINES = 3  # a bare number is looked for in this many last lines
TAIL_CHARS = 20_000  # anything but a box is looked for in this many last characters


def find_answer(response: str) -> str | None:
    """Return the text of the final answer; None if there is none.

    What follows `</think>`, or stands in the last `<answer>`, takes precedence over everything else.
    """
    at = response.rfind(_thinking)
    if at >= 0 and response[at + len(_thinking) :].strip():
        response = response[at + len(_thinking) :]
    if "<answer>" in response[-TAIL_CHARS:]:
        response = _tag.findall(response[response.rfind("<answer>") :])[-1]
    if "\\boxed" in response or "\\fbox" in response or "\\framebox" in response:
        return last_boxes(response)  # an unfinished box is not an answer
    response = response[-TAIL_CHARS:]
    anchored = _after_anchor(response)
    if anchored is not None:
        return anchored
    text = response.strip()
    if not text:
        return None
    if len(text) <= SHORT_CHARS and "\n" not in text and not _is_sentence(text):
        return text
    formula = last_formula(response)
    if formula is not None:
        return formula
    lines = [line for line in text.splitlines() if line.strip()][-TAIL_LINES:]
    for line in reversed(lines):
        numbers = _number.findall(line)
        if numbers:
            *_, listed = ["", *(match[0] for match in _listed.finditer(line))]  # the two numbers are 3 and 7
            last = numbers[-1].strip().rstrip(",")
            return listed.strip() if listed.endswith(last) else last
    return None


def _after_anchor(text: str) -> str | None:
    """Return what follows the last "Answer:", "the answer is" or "####"; None if there is none of them."""
    if not any(word in text for word in ("nswer", "NSWER", "####", "orrect ")):
        return None
    anchors = list(_anchor.finditer(text))
    if not anchors:
        return None
    rest = text[anchors[-1].end() :].lstrip(" \t*_:=")
    if not rest.strip():
        return None
    if rest[:1] == "\n":  # the answer stands on the next line
        rest = rest.lstrip()
    display = _math.match(rest)
    line = rest[: display.end()] + rest[display.end() :].split("\n", 1)[0] if display else rest.split("\n", 1)[0]
    formula = last_formula(line, first_run=True)
    if formula is not None:
        return formula
    line = _sentence_end.split(line, maxsplit=1)[0]
    if not anchors[-1][0].rstrip().endswith(":"):
        line = _clause_end.split(line, maxsplit=1)[0]
    line = line.strip().strip("*_").strip()
    subject = _subject.match(line)  # Answer: The price is 5 dollars
    return line[subject.end() :].strip() if subject and subject.end() < len(line) else line or None


def last_formula(text: str, *, first_run: bool = False) -> str | None:
    """Return the last formula between dollars or brackets, with those joined to it; if `first_run`, the first one."""
    runs: list[list[re.Match[str]]] = []
    for match in _math.finditer(text):
        if match["dollars"] and _prose.search(match["dollars"]):  # "$18 and the rest is $" is money
            continue
        between = text[runs[-1][-1].end() : match.start()] if runs else None
        if between is not None and _joins.fullmatch(between):
            runs[-1].append(match)
        else:
            runs.append([match])
    if not runs:
        return None
    run = runs[0 if first_run else -1]
    answer = _content(run[0]).strip()
    for before, match in itertools.pairwise(run):
        separator = " " if not text[before.end() : match.start()].strip() else " , "
        answer += separator + _content(match).strip()
    return answer + percent_sign(text, run[-1].end(), answer)


def _content(match: re.Match[str]) -> str:
    return match["display"] or match["brackets"] or match["parentheses"] or match["dollars"]


def _is_sentence(text: str) -> bool:
    """Whether a short text is more than an answer: "She has 18 eggs."."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", _math.sub(" ", text))
    return len(words) >= 3 or (bool(_math.search(text)) and len(words) >= 1)
