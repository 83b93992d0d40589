r"""Find the final answer in a response.

The first of these that exists is the answer; none of them is tried against the reference:

1. the last `\boxed{}` and those joined to it ("\boxed{1} and \boxed{3}");
2. the last of `#### n`, "Answer: x", "the answer is x" and a heading "Answer" with x below it;
3. the whole response, if it is short and not a sentence;
4. a bold answer below the last formula, or a number there in a concluding line;
5. the last formula;
6. the last number of the last lines.
"""

from __future__ import annotations

import itertools
import re

from megatron_nft.types import ReasonKind
from megatron_nft.verify.boxed import is_cut_off, last_boxes, percent_sign
from megatron_nft.verify.markup import plain_lines
from megatron_nft.verify.thinking import NoAnswer, answer_part

_anchor = re.compile(
    r"""\#\#\#\# | (?:final\s+)?answer\s{0,20}(?:\*\*|__)?\s{0,20}(?:[-=]>|[:=：→⇒➜➡]|\s[-–—]\s)
      | \b(?:answers?|correct\s+(?:option|choice))\s+(?:is|are|must\s+be|should\s+be|equals)\b\s*:?
      | ^[^\w\n]*(?:the\s+)?(?:(?:final\s+)?(?:answer|result)s?|final\s+solution)[^\w\n]*$
      | ^[^\w\n]*(?:the\s+)?(?:final\s+)?answer(?:\*\*|__)?[ \t]+(?=[-+]?[\d$\\(\[{*])
      | (?:最终|最後の|正确)?答(?:案|え)?\s*(?:应该)?(?:是|为|為|は|[:：])\s*[:：]? | 答案(?:\*\*|__|】)\s*[:：]?
      | ^[^\w\n]*(?:最终|最後の|正确)?答(?:案|え)[^\w\n]*$
      | \b(?:la\s+respuesta|la\s+réponse|die\s+antwort|a\s+resposta|la\s+risposta)\s+(?:final\s+)?
        (?:es|est|ist|lautet|é|è)\b
      | \b(?:respuesta|réponse|antwort|resposta|risposta|ответ)\s*(?:\*\*)?\s*[:：]""",  # noqa: RUF001
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
_anchor_words = (  # one of them stands in every anchor
    *("nswer", "NSWER", "####", "orrect ", "inal ", "INAL ", "esult", "RESULT"),
    *("答", "espuesta", "éponse", "ntwort", "esposta", "isposta", "твет"),
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
_bold = re.compile(r"\*\*([^*\n]{1,200})\*\*|__([^_\n]{1,200})__")
_bold_answer = re.compile(r"[^\w\n]*(?:[A-Za-z]\w{0,3}\s*=\s*)?[-+(\[$\\]*(?:\d.*|[A-J][).]?)$")
_concluding = re.compile(
    r"\s*(?:so|thus|hence|therefore|then|in total|altogether|finally|in conclusion|this means)\b"
    r"|(?:\b(?:is|are|was|were|equals?|has|have|had|gets?|got|costs?|needs?|takes?|gives?|makes?|totals?|totall?ing)"
    rf"|[=:→])[\s*_]*(?:exactly\s+)?{_number.pattern}[^\d]*$"
    rf"|^[^\w\n]*{_number.pattern}\s?[A-Za-z]*\W*$",
    re.IGNORECASE,
)
_fence = re.compile(r"^\s*```\w*\n")
_told = re.compile(r"\s*[A-Z][a-z]*\s+[a-z]+\s+\**\\?\$?[-+]?\d")  # He pays $5
_QUOTES = (("“", "”"), ("«", "»"), ("„", "“"), ("「", "」"), ('"', '"'))
_tag = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_markers = " \t*_:=→⇒➜➡|："  # noqa: RUF001
SHORT_CHARS = 300  # a response of at most this length may be nothing but an answer
TAIL_LINES = 3  # a bare number is looked for in this many last lines
TAIL_CHARS = 20_000  # anything but a box is looked for in this many last characters


def find_answer(response: str, *, opened: bool = False) -> str | None:
    """Return the text of the final answer; None if there is none. See `final_answer`."""
    try:
        return final_answer(response, opened=opened)
    except NoAnswer:
        return None


def final_answer(response: str, *, opened: bool = False) -> str:
    """Return the text of the final answer. Raises NoAnswer, which says why there is none.

    Only what follows `</think>` counts, and the last `<answer>` takes precedence over everything else. opened: the
    prompt ends in `<think>`.
    """
    response = answer_part(response, opened=opened)
    if "<answer>" in response[-TAIL_CHARS:]:
        response = _tag.findall(response[response.rfind("<answer>") :])[-1]
    if is_cut_off(response):
        raise NoAnswer("the last box is cut off", ReasonKind.UNFINISHED)
    answer = last_boxes(response)
    if answer is None:
        answer = _without_box(plain_lines(response[-TAIL_CHARS:]))
    if answer is None:
        raise NoAnswer("no answer found in the response")
    return answer


def _without_box(response: str) -> str | None:
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
        return _below_formula(response) or formula
    return _last_number([line for line in text.splitlines() if line.strip()][-TAIL_LINES:])


def _last_number(lines: list[str]) -> str | None:
    """Return the last number of the lines, with those listed before it: `the two numbers are 3 and 7`."""
    for line in reversed(lines):
        numbers = _number.findall(line)
        if numbers:
            *_, listed = ["", *(match[0] for match in _listed.finditer(line))]
            last = numbers[-1].strip().rstrip(",")
            return listed.strip() if listed.endswith(last) else last
    return None


def _below_formula(text: str) -> str | None:
    """Return a bold answer behind the last formula, or the number of a concluding line below it; None without."""
    *_, last = _formulas(text)
    rest = text[last.end() :]
    for match in reversed(list(_bold.finditer(rest))):
        content = (match[1] or match[2]).strip().rstrip(".,;")
        if _bold_answer.match(content) and not _prose.search(content):
            return content
    lines = [line for line in rest.split("\n")[1:] if line.strip()]
    concluding = [line for line in lines if _concluding.search(line)]
    return _last_number(concluding[-1:])


def _after_anchor(text: str) -> str | None:
    """Return what follows the last "Answer:", "the answer is", heading "Answer" or "####"; None without any of them."""
    if not any(word in text for word in _anchor_words):
        return None
    anchors = list(_anchor.finditer(text))
    if not anchors:
        return None
    rest = _fence.sub("", text[anchors[-1].end() :].lstrip(_markers).removeprefix("}"))  # \text{Answer: } 73
    rest = _within_quotation(text[: anchors[-1].start()].rpartition("\n")[2], rest)
    if not rest.strip():
        return None
    if rest[:1] == "\n":  # the answer stands on the next line
        rest = rest.lstrip().lstrip(_markers)
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


def _within_quotation(before: str, rest: str) -> str:
    """Return `rest` up to the mark that closes a quotation which was opened in the line `before` it."""
    for opening, closing in _QUOTES:
        if opening in before and (opening == closing or closing not in before) and before.count(opening) % 2:
            end = rest.find(closing, 1)
            return rest[:end] if end > 0 else rest
    return rest


def _formulas(text: str) -> list[re.Match[str]]:
    """Return the formulas of a text; "$18 and the rest is $" is money."""
    return [match for match in _math.finditer(text) if not (match["dollars"] and _prose.search(match["dollars"]))]


def last_formula(text: str, *, first_run: bool = False) -> str | None:
    """Return the last formula between dollars or brackets, with those joined to it; if `first_run`, the first one."""
    runs: list[list[re.Match[str]]] = []
    for match in _formulas(text):
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
    return len(words) >= 3 or bool(_told.match(text)) or (bool(_math.search(text)) and len(words) >= 1)
