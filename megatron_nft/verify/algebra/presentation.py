r"""Reduce the presentation of a normalised answer to its content: environments, trailing conditions, ]a, b[ brackets.

normalize.py changes only the spelling. This module also drops things that were said but hold anyway:
`f(x) = x^2 \text{ for all } x` becomes `f(x) = x^2`.
"""

from __future__ import annotations

import re

from megatron_nft.verify.algebra.units import is_unit

_environment = re.compile(
    r"\\begin\s*\{(aligned|align\*?|gathered|split|cases|array)\}(?:\{[lcr|\s]*\})?(.*)\\end\s*\{\1\}", re.DOTALL
)
_condition = re.compile(
    r"""[\s,;]*
        (?: \\text\s*\{\s*for\ (?:all|every|any|each|some|an?)[^{}]*\}\s*(?P<all>[A-Za-z])?
          | \\forall\s*(?P<forall>[A-Za-z])
          | \\text\s*\{\s*(?:for|where|with)\s*\}\s*(?P<where>[A-Za-z])(?=\s*\\in) )
        (?P<domain>\s*\\in\s*(?:\\mathbb\s*\{?[ZNRQC]\}?|[ZNRQ])(?:\^[+*])?)?
        \s*(?:\\text\s*\{[^{}=<>\d]*\})?$""",
    re.VERBOSE,
)
_whole_numbers = re.compile(  # where k is an integer, for all positive integers k
    r"""[\s,;(]* (?:(?:for|where|with)\s+)? (?:(?:all|any|every|each|some|an?|the)\s+)?
        (?: (?P<positive>positive\s+)? integers?\s+(?P<behind>[A-Za-z])
          | (?P<before>[A-Za-z])\s+(?:is\s+|being\s+)?(?:any\s+|an\s+)?integer )
        \s*\)?$""",
    re.VERBOSE,
)
_words = re.compile(r"\\text\{([^{}]*)\}")
_unit_in_brackets = re.compile(r"(?<=[\d}%])\s*\(\s*([A-Za-z]{3,}(?:\s+[A-Za-z]{2,}){0,4}|[ckm]?m|k?g|in|ft)\s*\)$")
_membership = re.compile(r"\s*\(\s*([A-Za-z](?:\s*,\s*[A-Za-z])*\s*\\in\s*(?:\\mathbb\s*\{?[ZNRQC]\}?|[ZNRQ]))\s*\)$")
_outward_bracket = re.compile(r"(^|\\cup|\\in)(\s*)([\[\](])([^\[\]()]*[,;][^\[\]()]*)([\[\])])(?=\s*(?:\\cup|$))")


def strip_presentation(text: str) -> str:
    """Return `text` without environments and without conditions behind the answer that hold anyway."""
    if "\\begin" in text:
        text = _without_environment(text)
    if "integer" in text:
        text = _with_whole_numbers(text)
    if "\\in" in text or "\\text" in text or "\\forall" in text:
        condition = _condition.search(text)
        if condition and condition.start():
            letter = condition["all"] or condition["forall"] or condition["where"]
            named = f" , {letter}{condition['domain']}" if letter and condition["domain"] else ""
            text = text[: condition.start()] + named
        text = _membership.sub(r" , \1", text)
    if text.endswith(")") and (noun := _unit_in_brackets.search(text)) and is_unit(noun[1]):  # 73 (residents)
        text = f"{text[: noun.start()]} \\text{{{noun[1]}}}"
    if text.count("[") != text.count("]") or text.lstrip().startswith("]"):
        text = _outward_bracket.sub(_inward, text)
    return text


def _with_whole_numbers(text: str) -> str:
    r"""Write `2k \text{ where } k \text{ is an integer}` as `2k , k \in \mathbb{Z}`."""
    plain = _words.sub(r" \1 ", text)
    found = _whole_numbers.search(plain)
    if found is None or not found.start():
        return text
    letter = found["behind"] or found["before"]
    return f"{plain[: found.start()]} , {letter} \\in \\mathbb{{{'N' if found['positive'] else 'Z'}}}"


def _without_environment(text: str) -> str:
    r"""Write `\begin{cases} x = 1 \\ y = 2 \end{cases}` as `x = 1 , y = 2`.

    A row that starts with `=` continues the row before it.
    """
    match = _environment.fullmatch(text.strip())
    if match is None:
        return text
    rows = [row.replace("&", " ").strip() for row in match[2].split("\\\\")]
    rows = [row.rstrip(" ,;") for row in rows if row]
    if len(rows) > 1 and not all("=" in row for row in rows):  # a vector, or a function by cases
        return text
    result = rows[0] if rows else ""
    for row in rows[1:]:
        result += f" {row}" if row.startswith("=") else f" , {row}"
    return result


def _inward(match: re.Match[str]) -> str:
    """Write `]2, 5[`, the French notation for an open interval, as `(2, 5)`."""
    opening, closing = match[3].replace("]", "("), match[5].replace("[", ")")
    return f"{match[1]}{match[2]}{opening}{match[4]}{closing}"
