r"""The final answer in a response.

In this order: the last `\boxed{}` (and those beside it: "\boxed{1} and \boxed{3}"); else the last of `#### n`,
"Answer: x" and "the answer is x"; else, of a short response without a sentence, all of it; else the last formula; else
the last number of the last lines. The first of these that exists is the answer: nothing is tried out against the
reference.
"""

from __future__ import annotations

import itertools
import re

_box = re.compile(r"\\(?:boxed|fbox|framebox)\s*(\{?)")
_brace = re.compile(r"\\[{}\\]|[{}]")
_between_boxes = re.compile(
    r"""[\s$.,;&]* (?:\\[\])])? [\s$.,;&]*
        (?:and|or|\\text\s*\{\s*(?:and|or)\s*\}|\\quad)? [\s$\\(\[]* (?:[a-zA-Z](?:_\{?\d\}?)?\s*=\s*)?""",
    re.VERBOSE,
)
_percent_after = re.compile(r"[\s$]*(?:\\?%|percent\b)")
_anchor = re.compile(
    r"""\#\#\#\# | (?:final\s+)?answer\s*(?:\*\*)?\s*[:=]
      | \b(?:answers?|correct\s+(?:option|choice))\s+(?:is|are|must\s+be|should\s+be|equals)\b\s*:?""",
    re.IGNORECASE | re.VERBOSE,
)
_math = re.compile(
    r"""\$\$(?P<a>.+?)\$\$ | \\\[(?P<b>(?:(?!\\\[).)+?)\\\] | \\\((?P<c>(?:(?!\\\().)+?)\\\)
      | (?<![\\\d])\$(?P<d>(?:\\\$|[^$])+?)(?<!\\)\$(?!\d)""",
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
SHORT_CHARS = 300  # of a response that may be an answer and nothing else
TAIL_LINES = 3  # in which a bare number is looked for
TAIL_CHARS = 20_000  # in which anything but a box is looked for
MAX_BOXES = 20  # that are looked at, from the end


def find_answer(response: str) -> str | None:
    """The text of the final answer, None where there is none."""
    at = response.rfind(_thinking)
    if at >= 0 and response[at + len(_thinking) :].strip():
        response = response[at + len(_thinking) :]
    if "<answer>" in response[-TAIL_CHARS:]:
        response = _tag.findall(response[response.rfind("<answer>") :])[-1]
    if "\\boxed" in response or "\\fbox" in response or "\\framebox" in response:
        return last_boxes(response)  # a box that was begun and not finished is no answer
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


def last_box(text: str) -> str | None:
    """The content of the last complete box, as it stands."""
    spans = _boxes(text)
    return text[slice(*spans[0][1])] if spans else None


def last_boxes(text: str) -> str | None:
    """The content of the last complete box and of those joined to it by "," or "and", without repetitions."""
    contents: list[str] = []
    start = len(text)
    end = 0
    for (box_start, box_end), content in _boxes(text):
        inner = text[slice(*content)].strip()
        if contents and box_end >= start:  # a box around the one before
            start = box_start
            continue
        if contents and not _between_boxes.fullmatch(text[box_end:start]):
            break
        if inner not in contents:
            contents.append(inner)
        if not end:
            end = box_end
        start = box_start
    if not contents:
        return None
    answer = ", ".join(reversed(contents))
    return answer + r"\%" if _percent_after.match(text, end) and "%" not in answer else answer


def _boxes(text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans of the last complete boxes and of their contents, the last one first."""
    found = []
    stop = len(text)
    for _ in range(MAX_BOXES):
        at = max(text.rfind(name, 0, stop) for name in ("\\boxed", "\\fbox", "\\framebox"))
        if at < 0:
            break
        stop = at
        match = _box.match(text, at)
        if match is None:
            continue
        if match[1]:
            end = _closing_brace(text, match.end())
        else:  # \boxed 5
            end = match.end() + 1 if match.end() < len(text) and text[match.end()].isalnum() else -1
        if end >= 0:
            found.append(((at, end + (1 if match[1] else 0)), (match.end(), end)))
    return found


def _closing_brace(text: str, start: int) -> int:
    """Index of the brace that closes the one before `start`; -1 where it is missing."""
    depth = 1
    for match in _brace.finditer(text, start):
        sign = match[0]
        if sign == "{":
            depth += 1
        elif sign == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return -1


def _after_anchor(text: str) -> str | None:
    """What follows the last "Answer:", "the answer is" or "####"."""
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
    """The last formula in dollars or brackets, with those joined to it; with `first_run` the first such group."""
    runs: list[list[re.Match[str]]] = []
    for match in _math.finditer(text):
        if match["d"] and _prose.search(match["d"]):  # "$18 and the rest is $" is money
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
    return answer + r"\%" if _percent_after.match(text, run[-1].end()) and "%" not in answer else answer


def _content(match: re.Match[str]) -> str:
    return match["a"] or match["b"] or match["c"] or match["d"]


def _is_sentence(text: str) -> bool:
    """Whether a short text says more than an answer: "She has 18 eggs."."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", _math.sub(" ", text))
    return len(words) >= 3 or (bool(_math.search(text)) and len(words) >= 1)
