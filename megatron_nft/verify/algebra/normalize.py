r"""One spelling for what LaTeX, Unicode and people write in many ways.

`normalize` changes the notation and never the value: `\dfrac12`, `$\frac{1}{2}$` and `½` become `\frac{1}{2}`. Two
answers whose `without_spaces(normalize(...))` are equal are the same answer; everything else is left to the parser.
"""

from __future__ import annotations

import re
import unicodedata

from megatron_nft.verify.algebra.sympy_spelling import nested_list, plain_calls
from megatron_nft.verify.algebra.vocabulary import CHARACTERS, COMMANDS, DROPPED, TEXTS
from megatron_nft.verify.boxed import closing_brace
from megatron_nft.verify.markup import without_entities, without_marks, without_signs, without_tags

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))
_superscripts = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_subscripts = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_fraction_characters = re.compile("(\\d*)([¼-¾⅐-⅞])")
_unicode_root = re.compile(r"\\sqrt\s+([\d.]+|\\pi)")  # √10, where TeX would take one digit

_command = re.compile(r"\\([A-Za-z]+)\s*")
_spacing = re.compile(r"(\\\\)|\\[ ,;:>!\n]|~")  # the end of a row, `\\ `, is not a space
_thousands_comma = re.compile(r"(?<=\d)(?:\{,\}|,\s*\\!|\\!\s*,)\s*(?=\d{3})")  # `10,\!080`, `10{,}080`
_thousands_space = re.compile(r"(?<![\d.,])\d{1,3}(?:\s\d{3})+(?!\d)")  # `10 080`
_text = re.compile(r"\\text\s*\{([^{}]*)\}")
_power_in_text = re.compile(r"(\\text\s*\{[^{}]*)\^\{(-?\d+)\}")  # \text{m s^{-2}}
_number_in_text = re.compile(r"([-+]?\d[\d.,/:]*)\s*([^\d]*)$")
_unit = r"\{\s*(\\text\{[^{}]*\}(?:\^\{?\d\}?)?)\s*\}"
_unit_fraction = re.compile(rf"\\frac\s*{_unit}\s*{_unit}")
_per_cent = re.compile(r"\bper\s+cent\b")
_in_base = re.compile(  # 1101 \text{ in base } 2, 1101 (base 2), 1101_{\text{base } 2}
    r"(?:\\text\s*\{\s*)?(?<![\w.])(?P<digits>[0-9A-F]+)\s*(?P<open>[({]|_\s*\{)?\s*(?:\\text\s*\{\s*)?(?:\(\s*)?(?:in\s+)?[Bb]ase[\s-]*"
    r"(?:\}\s*)?\{?(?P<base>\d+|[a-z]+)\b\s*\}?[)}\s]*$"
)
_BASES = {"binary": 2, "octal": 8, "hexadecimal": 16}
_named_base = re.compile(r"(?<=[\s({])(?:in\s+)?(binary|octal|hexadecimal)(?=[\s)}]*$)")
_base_first = re.compile(  # base 2: 1101, \text{In base 2: } 1101
    r"(?:\\text\s*\{\s*)?(?:in\s+)?base[\s-]*(?:\}\s*)?\{?(?P<base>\d+)\}?\s*(?:\}\s*)?:\s*(?:\}\s*)?(?P<digits>[0-9A-F]+)$",
    re.IGNORECASE,
)
_base_in_brackets = re.compile(r"(?<=[\dA-F)])\s*_\s*\{?\s*\(\s*(\d+)\s*\)\s*\}?")  # 1101_{(2)}
_python_base = re.compile(r"0(?:b(?P<two>[01]+)|o(?P<eight>[0-7]+)|x(?P<sixteen>[0-9A-Fa-f]+))$")
_us_dollar = re.compile(r"(?<![A-Za-z])(?:US\s*\\?\$|USD\s*(?=[\d$\\])|\\text\s*\{\s*USD\s*\}\s*(?=\d))")
_decimal_brace = re.compile(r"(?<![\d,.])(\d+)\{,\}(?!\d{3}(?!\d))(\d+)(?![\d,{])")  # 3{,}14, but not 10{,}080
_decimal_zero = re.compile(r"(?<![\d,.])0\{,\}(\d+)(?![\d,{])")
_quad = re.compile(r"(?<==)([^=,;]{1,200}?)\\q?quad(?![A-Za-z])(?=\s*(?!\\text|\\left|\(|\\q?quad)[^=,;]{1,200}=)")
_several = re.compile(r"\\text\s*\{\s*(gcd|lcm|max|min)\s*\}\s*(?=[({]|\\\{)|(?<![A-Za-z\\])(gcd|lcm|max|min)(?=\()")
_bracketed_base = re.compile(r"\((\d+)\)(?=\s*_)")  # (204)_5
_hours_and = re.compile(r"(?<=\w)\s+and$")
_ordinal = re.compile(r"\^\s*\{?\s*\\text\{(?:st|nd|rd|th)\}\s*\}?")
_ratio = re.compile(r"(?<=\d)\s*\\text\{to\}\s*(?=\d)")
_infix = re.compile(r"\{([^{}\\]*)\\(over|choose)(?![A-Za-z])\s*([^{}\\]*)\}")
_bold_letter = re.compile(r"\\(?:mathbf|boldsymbol|bm|pmb|symbf|mathit)\s*\{\s*([A-Za-z])\s*\}")
_color = re.compile(r"\\(?:textcolor|color)\s*\{[^{}]*\}")
_repeating = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))(?![\d\\])")
_counted = re.compile(r"(?<=[\d}%])\s*([\u4e00-\u9fff]{1,3})[\s.。]*$")  # a Chinese unit
_currency = re.compile(r"([€£])\s*(\d[\d.,]*)")
MAX_PERIOD_DIGITS = 100
MAX_BRACES = 3
_digits_of_fraction = re.compile(r"\\frac\s*(\d)\s*(\d)")  # TeX takes one digit each: \frac12
_digit_argument = re.compile(r"(\\frac|\\sqrt)\s*(\d)")
_half_day = re.compile(r"(?<=:\d\d)\s*([apAP])\.?\s?[mM]\.?$")  # 2:30 pm
_times_ten = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_trailing = re.compile(r"(?:[\s.,;:]|\\\\|\\$)+$")
_inner_trailing = re.compile(r"[\s.,;:]+\}$")
_double_backslash = re.compile(r"\\\\(?=[A-Za-z])")
_space_run = re.compile(r"\s+")
_space = re.compile(r"(\\[A-Za-z]+ (?=[A-Za-z])|(?<=[\d.]) (?=[\d.]|[eE][+-]\d))| ")
_python_power = re.compile(r"(?<=[\w)}\]])\s*\*\*\s*(?=[\w({+-])")
_old_font = re.compile(r"\{\s*\\(?:rm|bf|it|sf|tt)\b([^{}]*)\}")
_markdown = re.compile(r"\*{2,3}|__(?=\S)|`")


def normalize(text: str) -> str:
    """Return `text` in one spelling, with the same meaning."""
    text = without_tags(without_entities(text))
    if text.isascii():
        if text.isalnum():
            return _python_base.sub(_python_numeral, text) if text[0] == "0" else text
    else:
        text = _plain_characters(text)
    text = without_marks(text)
    if "**" in text or "`" in text:
        text = _markdown.sub("", _python_power.sub("^", text))
    if "_" in text and "(" in text:
        text = _base_in_brackets.sub(r"_{\1}", text)
    if "US" in text:
        text = _us_dollar.sub(r"\$", text)
    if ")_" in text:
        text = _bracketed_base.sub(r"\1", text)
    if "\\" in text or "$" in text or "~" in text or "{,}" in text:
        text = _plain_latex(text)
    if "cent" in text:
        text = _per_cent.sub("percent", text)
    if "binary" in text or "octal" in text or "hexadecimal" in text:
        text = _named_base.sub(lambda match: f"base {_BASES[match[1]]}", text)
    if "ase" in text:
        text = _in_base.sub(r"\g<digits>_{\g<base>}", _space_run.sub(" ", text))
        text = _base_first.sub(r"\g<digits>_{\g<base>}", text)
    if "(" in text or text[:2] == "[[":
        text = nested_list(text) or plain_calls(text)
    if ("(" in text or "\\text" in text) and any(name in text for name in ("max", "min", "gcd", "lcm")):
        text = _several.sub(r"\\\1\2", text)
    text = _thousands_space.sub(lambda match: re.sub(r"\s", "", match[0]), text)
    if ":" in text:
        text = _half_day.sub(lambda match: rf" \text{{{match[1].lower()}m}}", text)
    text = _times_ten.sub(r"\\times ", text)
    return _strip_end(_without_outer_braces(_space_run.sub(" ", text).strip()))


def _python_numeral(match: re.Match[str]) -> str:
    """Write `0b1010` as `1010_{2}`."""
    base = {"two": 2, "eight": 8, "sixteen": 16}[str(match.lastgroup)]
    return f"{match[match.lastgroup or 0].upper()}_{{{base}}}"


def _without_outer_braces(text: str) -> str:
    """Return `{1, 2}` as `1, 2`: braces group and are not printed. A few layers are taken off, not thousands."""
    for _ in range(MAX_BRACES):
        if text[:1] != "{" or text[-1:] != "}" or closing_brace(text, 1) != len(text) - 1:
            break
        text = text[1:-1].strip()
    return text


def without_spaces(text: str) -> str:
    """Return a normalised text without the spaces that mean nothing (`1 2` stays two numbers)."""
    return _space.sub(lambda match: match[1] or "", text) if " " in text else text


def _plain_characters(text: str) -> str:
    """Replace Unicode characters by LaTeX or ASCII."""
    text = _fraction_characters.sub(_vulgar_fraction, text)
    text = _currency.sub(r"\2 \1", _counted.sub(r" \\text{\1}", text))
    text = _superscripts.sub(lambda match: "^{" + "".join(_SUPERSCRIPTS[sign] for sign in match[0]) + "}", text)
    text = _subscripts.sub(lambda match: "_{" + "".join(_SUBSCRIPTS[sign] for sign in match[0]) + "}", text)
    text = "".join(CHARACTERS.get(character, character) for character in text)
    text = _unicode_root.sub(r"\\sqrt{\1}", text)
    text = without_signs(unicodedata.normalize("NFKC", text))  # full-width digits, mathematical letters
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))


def _vulgar_fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[2]).partition("\N{FRACTION SLASH}")
    return f"{match[1]}\\frac{{{top}}}{{{bottom}}}" if bottom else match[0]


def _plain_latex(text: str) -> str:
    """Replace LaTeX commands by their one spelling, and drop those that only affect the layout."""
    if "matrix" not in text and "array" not in text and "cases" not in text:
        text = _double_backslash.sub(r"\\", text)
    text = text.replace(r"\$", r"\dollar ").replace("$", " ")
    if "{,}" in text:
        text = _decimal_brace.sub(r"\1.\2", _decimal_zero.sub(r"0.\1", text))
    if "quad" in text:
        text = _quad.sub(r"\1 , ", text)
    for bracket in (r"\(", r"\)", r"\[", r"\]"):  # the delimiters of formulas
        text = text.replace(bracket, " ")
    text = _bold_letter.sub(r" \1 ", _color.sub(" ", text))
    text = _repeating.sub(_repeating_decimal, _infix.sub(_infix_as_prefix, text))
    text = _thousands_comma.sub(",", text)
    text = _spacing.sub(lambda match: match[1] or " ", text)
    text = _old_font.sub(r"\\text{\1}", text)
    text = _command.sub(_plain_command, text)
    text = _power_in_text.sub(r"\1^\2", text)
    text = _text.sub(_plain_text, text)
    if "\\text" in text:
        text = _ratio.sub(":", _ordinal.sub("", _unit_fraction.sub(r"\1/\2", text)))
    if "\\frac" in text or "\\sqrt" in text:
        text = _digits_of_fraction.sub(r"\\frac{\1}{\2}", text)
        text = _digit_argument.sub(r"\1{\2}", text)
    return text


def _infix_as_prefix(match: re.Match[str]) -> str:
    r"""Write `{3 \over 4}` as `\frac{3}{4}` and `{n \choose k}` as `\binom{n}{k}`."""
    return rf"\{'frac' if match[2] == 'over' else 'binom'}{{{match[1].strip()}}}{{{match[3].strip()}}}"


def _repeating_decimal(match: re.Match[str]) -> str:
    r"""Write `0.1\overline{6}` as `\frac{15}{90}`: (16 - 1) / 90, where 1 are the digits before the period."""
    before, period = (match[1] or "0") + match[2], match[3] or match[4]
    if len(before) + len(period) > MAX_PERIOD_DIGITS:
        return match[0]
    top, bottom = int(before + period) - int(before), int("9" * len(period) + "0" * len(match[2]))
    return rf"(\frac{{{top}}}{{{bottom}}})"


def _plain_command(match: re.Match[str]) -> str:
    name = match[1]
    if name in DROPPED:
        return " "
    if name in TEXTS:
        return r"\text"
    replacement = COMMANDS.get(name, f"\\{name}")
    letter_follows = match.string[match.end() : match.end() + 1].isalpha()
    return f"{replacement} " if letter_follows and replacement[-1].isalpha() else replacement


def _plain_text(match: re.Match[str]) -> str:
    r"""Write `\text{ and }` as a comma, `\text{e}` as e and `\text{5}` as 5; other words stay marked as words."""
    words = match[1].strip()
    words = without_marks(_hours_and.sub("", words))
    if words.startswith("\\dollar"):  # \text{\$28}
        return f" {words} "
    lowered = words.lower().strip(" ,;")
    if lowered in ("and", "or", "&"):
        return ","
    if not words or lowered in ("e", "i", "d") or not any(character.isalpha() for character in words):
        return f" {words} "
    if words[0].isdigit() and (number := _number_in_text.match(words)):  # \text{4 ways}
        return f" {number[1]} \\text{{{number[2]}}}"
    if lowered in ("%", "percent", "per cent", "pct", "percentage"):
        return r"\%"
    return f"\\text{{{words}}}"


def _strip_end(text: str) -> str:
    r"""Drop full stops, commas and line breaks at the end, also inside a final `\text{}`."""
    text = _trailing.sub("", text)
    return _inner_trailing.sub("}", text) if text.endswith("}") else text
