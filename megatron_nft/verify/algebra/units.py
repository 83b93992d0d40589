r"""Units at the end of an answer: `5 \text{ cm}^2`, `18 dollars`, `90^\circ`, `60 miles per hour`, `5 \text{ million}`.

An answer without the reference's unit is accepted; an answer with another unit is not.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from megatron_nft.verify.algebra.vocabulary import NAMES, words

_SYNONYMS = {
    "m": "meter metre", "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre",
    "um": "micrometer micron \\mum", "nm": "nanometer", "in": "inch inches", "ft": "foot feet", "yd": "yard",
    "mi": "mile", "g": "gram gm", "kg": "kilogram", "mg": "milligram", "lb": "pound", "oz": "ounce", "t": "tonne ton",
    "s": "second sec", "min": "minute", "h": "hour hr", "d": "day", "wk": "week", "yr": "year", "mo": "month",
    "l": "liter litre", "ml": "milliliter millilitre", "gal": "gallon", "J": "joule", "kJ": "kilojoule", "N": "newton",
    "W": "watt", "kW": "kilowatt", "V": "volt", "A": "ampere amp", "K": "kelvin", "Hz": "hertz", "Pa": "pascal",
    "mol": "mole", "eV": "electronvolt", "deg": "degree \\degrees", "rad": "radian", "$": "dollar usd buck \\dollar",
    "cent": "cent ¢", "eur": "euro", "gbp": "pound_sterling", "unit": "unit", "mph": "mph", "kmph": "kmph kph",
    "angstrom": "Å", "erg": "erg", "ohm": "ohm \\Omega", "T": "tesla", "C": "coulomb", "F": "farad", "acre": "acre",
    "person": "people", "child": "children", "man": "men", "woman": "women",
}  # fmt: skip
_CANONICAL = {name: unit for unit, names in _SYNONYMS.items() for name in [unit, *names.split()]}
_AS_WRITTEN = frozenset(name for name in _CANONICAL if name != name.lower())  # J, kW, Hz: case matters
UNIT_WORDS = frozenset(
    form
    for name in _CANONICAL
    if name.isalpha() and len(name) > 1 and name.lower() == name and name not in ("in", "min", "um", "mo")
    for form in (name, f"{name}s")
)
# Short words such as mg, km and hr may also be products of letters.
SHORT_WORDS = frozenset(word for word in UNIT_WORDS if len(word) < 4 and word not in NAMES)
SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NOT_UNITS = frozenset(
    words(
        """
    not no nor isn isnt never except without and or but if then for where when with otherwise is are was does
    do all any only at least most more less than false wrong incorrect none half double twice times to from
    plus minus over divided approximately about non neither
    """
    )
)
_SIGNS = (r"\Omega", r"\dollar")
_RING = [r"\circ", "}"]  # the end of ^{\circ}
_word = re.compile(r"[^\W\d_]+|\\[A-Za-z]+|[$¢%]")
_power = re.compile(r"\^\{?(-?\d+)\}?")
_half_day = re.compile(r"\b([ap])\.?\s?m\b\.?")
_PREFIX_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}


def is_unit(text: str) -> bool:
    """Whether words after a number may be a unit or a noun: any words except those that change the meaning."""
    words = _word.findall(text)
    return bool(words) and not any(word.lower() in _NOT_UNITS for word in words)


def scale_of(text: str) -> tuple[Fraction, str]:
    """Split off leading words that stand for a factor: `"million dollars"` -> (1000000, "dollars")."""
    factor = Fraction(1)
    words = text.split()
    while words and words[0].lower().rstrip("s") in SCALES:
        factor *= SCALES[words.pop(0).lower().rstrip("s")]
    return factor, " ".join(words)


def canonical(text: str) -> str:
    """Return one spelling of a unit: `"square centimeters"`, `"cm^2"` -> "cm^2"; `"miles per hour"`, `"mi/h"` -> "mph".

    Units that are not in the table (`"eggs"`) are put in the singular.
    """
    factors: list[list[Any]] = []  # [name, power]
    power, sign = 1, 1
    text = _half_day.sub(r"\1m", text.lower()) if _half_day.search(text.lower()) else text
    text = re.sub(r"\bper\b", "/", text.replace("~", " ").replace(".", " ").replace(r"\mu ", r"\mu"))
    for token in re.findall(r"\^\{?-?\d+\}?|[^\W\d_]+|\\[A-Za-z]+|[$¢%]|/|\*|⋅", text):
        exponent = _power.match(token)
        if exponent:
            if factors:
                factors[-1][1] *= int(exponent[1])
        elif token == "/":
            sign = -1
        elif token.lower() in _PREFIX_POWERS:
            if token.lower().endswith("ed") and factors:
                factors[-1][1] *= _PREFIX_POWERS[token.lower()]
            else:
                power = _PREFIX_POWERS[token.lower()]
        elif token not in ("*", "⋅"):
            factors.append([_singular(token), sign * power])
            power = 1
    return _COMBINED.get(name := _written(factors), name)


def _written(factors: list[list[Any]]) -> str:
    """Join factors: `[["m", 1], ["s", -2]]` -> "m/s^2"; in alphabetical order if all of them are in the table."""
    if all(name in _SYNONYMS for name, _ in factors):
        factors = sorted(factors)
    above = [name if power == 1 else f"{name}^{power}" for name, power in factors if power > 0]
    below = [name if power == -1 else f"{name}^{-power}" for name, power in factors if power < 0]
    return "/".join([" ".join(above), *below])


_COMBINED = {"mi/h": "mph", "km/h": "kmph", "deg C": "celsius", "deg F": "fahrenheit", "deg celsius": "celsius"}
_COMBINED |= {"deg fahrenheit": "fahrenheit", "degC": "celsius", "degF": "fahrenheit"}


def _singular(word: str) -> str:
    if word in _AS_WRITTEN or word in _CANONICAL:
        return _CANONICAL[word]
    lowered = word.lower()
    for form in (lowered, lowered.removesuffix("es"), lowered.removesuffix("s")):
        if form in _CANONICAL and not (len(word) == 1 and word.isupper()):
            return _CANONICAL[form]
    return lowered[:-1] if len(lowered) > 3 and lowered.endswith("s") else lowered


def is_unit_token(token: str) -> bool:
    """Whether a token (tokens.py) is a word that may be a unit."""
    return token[0] == '"' and is_unit(token[1:])


def split_unit(tokens: list[str]) -> tuple[list[str], str]:
    r"""Return the tokens before a unit, and the unit: `\text{cm}^2`, `\text{m}/\text{s}`, `dollars`."""
    end = len(tokens)
    while end > 1:
        token = tokens[end - 1]
        if tokens[end - 2] == "_":  # 1011_\text{two}
            break
        between = token in ("/", "*") and tokens[end - 2][0] == '"' and end < len(tokens)
        if (
            between
            or is_unit_token(token)
            or token in (r"\Omega", r"\dollar")
            or (token == r"\mu" and end < len(tokens))
        ):
            end -= 1
        elif token in ("C", "F") and (tokens[end - 2] in (r"\circ", r"\degrees") or tokens[end - 3 : end - 1] == _RING):
            end -= 1  # 25^\circ C
        elif end > 2 and token.isdigit() and tokens[end - 2] == "^" and tokens[end - 3][0] == '"':
            end -= 2
        elif end > 4 and token == "}" and tokens[end - 4 : end - 2] == ["^", "{"] and tokens[end - 5][0] == '"':
            end -= 4
        elif end > 5 and token == "}" and tokens[end - 5 : end - 2] == ["^", "{", "-"] and tokens[end - 6][0] == '"':
            end -= 5
        else:
            break
    unit = " ".join(token.lstrip('"') for token in tokens[end:]).replace(" ^ ", "^")
    return tokens[:end], re.sub(r"(?<=[{-]) | (?=\})", "", unit)
