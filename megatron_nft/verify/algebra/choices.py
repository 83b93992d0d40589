r"""Answers to multiple-choice questions: `(C)`, `Option C`, `\text{C: the words of the choice}`."""

from __future__ import annotations

import re

_text = re.compile(r"\\text\s*\{([^{}]*)\}")
_named = re.compile(
    r"(?:the\s+)?(?:correct\s+|right\s+)?(?:option|choice|alternative|answer)\s*(?:is\s*)?:?\s*\(?\s*([A-Ja-j])\s*\)?"
    r"(?=$|[\s.,:)-])\s*[.:,)-]?\s*",
    re.IGNORECASE,
)
_bracketed = re.compile(r"\(\s*([A-J])\s*\)\s*[.:]?\s*(?=\S|$)")
_marked = re.compile(r"([A-J])(?:\s?(?:[.:](?!\d)|\))|\s+[-–—]\s+(?=[A-Za-z]{2})|(?=\s?\([A-Za-z]{3}))\s*(?=\S|$)")  # noqa: RUF001
_goes_on = re.compile(  # `(C) and (D)`, `(C), (D)`, `(C) is wrong`
    r"\s*\)?\s*(?:[;/&]|(?:[.:,]\s*)?(?:and|or|but|is\s+(?:wrong|not|incorrect|false))\b|,\s*\(\s*[A-J]\s*\))",
    re.IGNORECASE,
)
_another = re.compile(  # `(A) none, (B) some`, `A: none; B: some`, `(A) none and (B) some`, but not `both (A) and (B)`
    r"""[,;]\s*(?:(?:and|or|but|not)\s+)*(?:\(\s*[A-J]\s*\)|[A-J][.:)]\s*\w)
      | (?<!\([A-J]\))(?<!\b[A-J])(?<!\s)\s+(?:and|or)\s+(?:\(\s*[A-J]\s*\)|[A-J][.:)]\s*\w)""",
    re.VERBOSE,
)


def choice_of(text: str) -> tuple[str, str] | None:
    r"""Return the letter of a choice and the content that follows it, which may be empty; None for other answers.

    Several choices, or words that take the choice back, are other answers.

    text: a normalised answer. A letter alone is an ordinary symbol, and `A` before a word may be an article.
    """
    if not (text[:1].isalpha() or text[:1] == "(" or text.startswith("\\text")):
        return None
    plain = _text.sub(lambda match: match[1], text).strip() if "\\text" in text else text
    for pattern in (_named, _bracketed, _marked):
        match = pattern.match(plain)
        if match:
            if _goes_on.match(plain, match.end(1)) or _another.search(plain, match.end(1)):
                return None
            if pattern is not _named and plain[match.end() :].startswith(","):
                return None
            return match[1].upper(), _rest(text, plain, match.end())
    return None


def _rest(text: str, plain: str, end: int) -> str:
    r"""Return what follows the letter; words stay in `\text{}` if the answer was in one."""
    content = plain[end:].strip()
    if text == plain or not content:
        return content
    rest = text[len(text) - len(content) :] if text.endswith(content) else f"\\text{{{content}}}"
    return rest if rest.count("{") == rest.count("}") else content
