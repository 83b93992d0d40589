"""Marks beside an answer that say nothing: HTML, quotation marks, block quotes, emoji, arrows, table rows.

`plain_lines` works on a whole response, `without_marks` on an answer.
"""

from __future__ import annotations

import html
import re
import unicodedata
from itertools import groupby

_html_tag = re.compile(
    r"</?(?:a|b|big|blockquote|br|center|code|details|div|em|font|h[1-6]|hr|i|li|mark|ol|p|pre|small|span|strong|summary"
    r"|table|tbody|td|th|thead|tr|tt|u|ul)(?:\s[^<>]{0,200})?/?>",
    re.IGNORECASE,
)
_paired_tag = re.compile(
    r"<(b|big|code|em|font|i|mark|small|span|strong|tt|u)(?:\s[^<>]{0,200})?>(.*?)</\1>", re.IGNORECASE
)
_bold_tag = re.compile(r"</?(?:b|strong|mark)>", re.IGNORECASE)
_line_tag = re.compile(r"<(?:br|hr)\s*/?>|</(?:p|div|li|h[1-6]|tr|blockquote|pre)>", re.IGNORECASE)
_struck_out = re.compile(r"~~[^~\n]{1,200}~~")
_raised = re.compile(r"<(su[pb])>([^<>]{1,40})</\1>", re.IGNORECASE)
_entity = re.compile(r"&(?:[A-Za-z]{2,8}\d{0,2}|#\d{1,6}|#x[0-9a-fA-F]{1,5});")
_quote = re.compile(r"^[ \t]*(?:>[ \t]?)+(?=\S)", re.MULTILINE)
_rule = re.compile(r"^[ \t]*(?:-{2,}|={2,}|\*{3,}|_{3,})[ \t]*$", re.MULTILINE)  # below a heading, or between parts
_end_of_proof = re.compile(
    r"(?:\$\$?|\\[(\[])\s*(?:\\hfill\s*)?\\(?:blacksquare|square|Box|qed|qedsymbol|checkmark)\s*(?:\$\$?|\\[)\]])"
)
_table_row = re.compile(r"^[ \t]*\|(.*)\|[ \t]*$", re.MULTILINE)
_before = re.compile(r"^\s*(?:(?:\\(?:to|rightarrow|Rightarrow|longrightarrow|implies)(?![A-Za-z])|[-=]>)\s*)+")
_after = re.compile(
    r"(?:\s*(?:\\(?:blacksquare|square|Box|qed|qedsymbol|checkmark)(?![A-Za-z])|(?:(?<=\s)|^)Q\.?E\.?D\.?))+\s*$"
)
_QUOTES = (('"', '"'), ("''", "''"), ("``", "''"), ("'", "'"), ("«", "»"), ("„", '"'), ("「", "」"))
_CLOSING = frozenset('"\N{RIGHT DOUBLE QUOTATION MARK}»」')
_ANY_QUOTE = _CLOSING | frozenset("'`\N{PRIME}\N{RIGHT SINGLE QUOTATION MARK}")
_QUOTE_STARTS = frozenset(opening[0] for opening, _ in _QUOTES)
TAIL_CHARS = 200  # marks behind an answer are looked for in this many last characters
KEPT_SIGNS = frozenset("°△▵∠\N{REPLACEMENT CHARACTER}")  # the last is a token that is no text


def plain_lines(text: str) -> str:
    """Return a response without HTML tags, block quotes, rules, what is struck out, bars of table rows and signs of the
    end of a proof.

    Bold tags become `**`.
    """
    if "<" in text:
        text = _raised.sub(_as_script, text)
        text = _html_tag.sub(" ", _line_tag.sub("\n", _bold_tag.sub("**", text)))
    text = without_entities(text)
    if ">" in text:
        text = _quote.sub("", text)
    if "~~" in text:
        text = _struck_out.sub(" ", text)
    if "|" in text:
        text = _table_row.sub(_as_line, text)
    if any(line in text for line in ("\n--", "\n==", "\n***", "\n___")):
        text = _rule.sub("", text)
    if _may_end_proof(text):
        text = _end_of_proof.sub("", text)
    return text


def without_entities(text: str) -> str:
    """Return `text` with the characters that HTML's entities stand for: `a &lt; b` as `a < b`."""
    return _entity.sub(lambda match: html.unescape(match[0]), text) if "&" in text else text


def without_tags(text: str) -> str:
    """Return an answer without HTML tags that are opened and closed; `a < b > c` has none."""
    return _paired_tag.sub(r" \2 ", _raised.sub(_as_script, text)) if "</" in text else text


def _as_script(match: re.Match[str]) -> str:
    """Write `<sup>2</sup>` as `^{2}` and `<sub>2</sub>` as `_{2}`."""
    return ("^" if match[1].lower() == "sup" else "_") + f"{{{match[2]}}}"


def _may_end_proof(text: str) -> bool:
    return "\\" in text and ("square" in text or "Box" in text or "qed" in text or "checkmark" in text)


def _as_line(match: re.Match[str]) -> str:
    """Write the table rows `| Answer | 73 |` as `Answer: 73` and `| 73 |` as `73`; longer ones are kept."""
    cells = [cell.strip() for cell in match[1].split("|")]
    if len(cells) == 1:
        return cells[0]
    return f"{cells[0].strip('*_ :')}: {cells[1]}" if len(cells) == 2 and cells[0] else match[0]


def without_signs(text: str) -> str:
    """Return `text` without emoji, ticks, boxes and other characters that are pictures.

    One between two digits or letters stays: 7 and 2 with something between them are not 72.
    """
    if text.isascii():
        return text
    runs = [(picture, "".join(group)) for picture, group in groupby(text, key=_is_picture)]
    kept = []
    for i, (picture, run) in enumerate(runs):
        inside = 0 < i < len(runs) - 1 and runs[i - 1][1][-1].isalnum() and runs[i + 1][1][0].isalnum()
        if inside or not picture:
            kept.append(run)
    return "".join(kept)


def _is_picture(character: str) -> bool:
    if character.isascii() or character in KEPT_SIGNS:
        return False
    kind = unicodedata.category(character)
    return kind in ("So", "Sk", "Me", "Cn") or character in "\N{VARIATION SELECTOR-16}\N{END OF PROOF}"


def without_marks(text: str) -> str:
    """Return an answer without arrows before it, signs of the end of a proof behind it, and quotation marks around."""
    text = text.strip()
    if text[:1] in ("\\", "-", "="):
        text = _before.sub("", text)
    if text[:1] == text[-1:] == "*":
        text = text.strip("*").strip()
    tail = text[-TAIL_CHARS:]
    if "Q" in tail or _may_end_proof(tail):
        text = text[:-TAIL_CHARS] + _after.sub("", tail)
    if text[:1] not in _QUOTE_STARTS:
        return text[:-1].rstrip() if _ends_quotation(text) else text
    for opening, closing in _QUOTES:
        if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            if closing not in inner:
                return inner.strip()
    return text


def _ends_quotation(text: str) -> bool:
    """Whether the last character closes a quotation that began before the answer: `42"`, but not 30' 15" or f"."""
    before = text[:-1]
    if text[-1:] not in _CLOSING or not before or any(mark in before for mark in _ANY_QUOTE):
        return False
    return not (before[-1].islower() and not before[-2:-1].isalpha())
