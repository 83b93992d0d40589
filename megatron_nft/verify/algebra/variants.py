r"""The ways in which an ambiguous text can be meant: `1,200` as one number or two, `\log` to base e or to base 10."""

from __future__ import annotations

import re

from megatron_nft.verify.algebra.sympy_spelling import other_constants

_thousands = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_slash = re.compile(r"/\s?([A-Za-z](?:_\{?\w+\}?)?)\s?([A-Za-z](?:_\{?\w+\}?)?)(?![A-Za-z(_^])")
_bare_log = re.compile(r"\\log(?![A-Za-z])(?!\s*_)")
_decimal_comma = re.compile(  # 0,125 and 12,05; but 12,050 has thousands, and 3,14 may be two numbers
    r"(-?(?:0(?=,)|\d+(?=,0\d(?!\d(?!\d)))|\d{1,3}(?:\.\d{3})+(?=,))),(\d+)(?![\d,.])(?=[^,;()\[\]]*$)"
)
_semicolons = re.compile(r"[(\[](?:[^(),;]|(?<=\d),(?=\d))*;(?:[^(),;]|;|(?<=\d),(?=\d))*[)\]]")  # (0,5; 1)
_comma_between_digits = re.compile(r"(?<=\d),(?=\d)")


def variants(text: str, *, lenient: bool) -> list[str]:
    """Return the readings of a text that need no grammar, the likeliest first.

    If `lenient`, t/RC can also mean t/(RC), and 2*I twice the imaginary unit.
    """
    found = _with_thousands(text, lenient)
    if _bare_log.search(text):
        found += [_bare_log.sub(r"\\lg ", variant) for variant in found]
    if lenient and _slash.search(text):
        found += [_slash.sub(r"/(\1 \2)", variant) for variant in found]
    if lenient and ("I" in text or "E" in text) and "\\" not in text:
        found += [other for variant in found if (other := other_constants(variant)) != variant]
    if "," in text and (decimal := _decimal_comma.match(text)):
        found.insert(0, decimal[1].replace(".", "") + "." + decimal[2] + text[decimal.end() :])
    if ";" in text and _semicolons.fullmatch(text):
        found.append(_comma_between_digits.sub(".", text))
    return found


def _with_thousands(text: str, lenient: bool) -> list[str]:
    """Return the text with `1,200` as one number outside brackets, if `lenient` also inside them, and unchanged."""
    if "," not in text or not _thousands.search(text):
        return [text]

    def outside_brackets(match: re.Match[str]) -> str:
        before = text[: match.start()]
        depth = sum(map(before.count, "([")) - sum(map(before.count, ")]")) + before.count(r"\{") - before.count(r"\}")
        return match[0] if depth else match[0].replace(",", "")

    found = [_thousands.sub(outside_brackets, text)]
    if lenient:
        found.append(_thousands.sub(lambda match: match[0].replace(",", ""), text))
    if lenient or not re.search(r"\d,0", text):  # 40,000 is not a list of 40 and 000
        found.append(text)
    return list(dict.fromkeys(found))
