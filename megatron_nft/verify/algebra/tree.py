r"""Trees: the form into which expressions and answers are read.

A tree is a nested tuple, so that equal trees are equal answers and trees can be dictionary keys:

    ("n", Fraction)              number                    ("s", name)          symbol, including e, i and pi
    ("+", a, b, ...)             sum                       ("*", a, b, ...)     product
    ("/", a, b)  ("^", a, b)     quotient, power           ("-", a)             minus a
    ("f", name, a)               sin, ln, abs, floor ...   ("log", base, a)  ("root", n, a)  ("binom", n, k)
    ("fn", name, a, ...)         gcd, lcm, max, min        ("bind", kind, variable, bounds ..., body)  binders.py
    ("app", name, a, ...)        an uninterpreted function: u(t), \delta(t), f(x, y)
    ("!", a)  ("deg", a)  ("pct", a)  ("pm", a, b)  ("mp", a, b)  ("inf",)  ("base", digits, base)

and the structures around expressions (answer.py):

    ("list", a, ...)                  1, 2 and 3 in any order      ("tuple", "(", ")", a, ...)   also an interval
    ("set", a, ...)                   {1, 2}                       ("union", a, ...)
    ("family", element, condition, domain, ("s", name), ...)       families.py
    ("matrix", (a, ...), ...)         rows                         ("reals",)
    ("ratio", a, b, c, ...)           a : b : c, of three terms or more
    ("rel", ("=", "<="), a, b, c)     a = b <= c
    ("unit", a, "cm^2")               a quantity; 90^\circ too     ("text", "ellipse")           only words
    ("prose", text without spaces)    words mixed with mathematics, compared as text
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

Tree = tuple[Any, ...]

MAX_DIGITS = 10_000  # of a number
MAX_EXPONENT = 10_000  # as in 1e10000: larger Fractions are slow
_DIGITS_AT_ONCE = 4000  # Python refuses to read more than 4300


class NotUnderstood(ValueError):
    """The text is not an expression or answer that our parser can read."""


class TooMuch(NotUnderstood):
    """The text is too long, too deeply nested or has too many digits for any parser."""


class Written(Fraction):
    """A decimal with zeros at its end: 1.7320 is equal to 1.732, but it is rounded to four places."""

    places = 0

    @classmethod
    def with_places(cls, value: Fraction, places: int) -> Written:
        """Return the number `value`, written with so many decimal places."""
        number = cls(value)
        number.places = places
        return number

    def __neg__(self) -> Written:
        return self.with_places(super().__neg__(), self.places)


def read_number(token: str) -> Fraction:
    """Return the exact value of a number token such as `12`, `.5` or `4.5e33`.

    Raises TooMuch for more than MAX_DIGITS digits or an exponent beyond MAX_EXPONENT.
    """
    mantissa, _, exponent = token.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or (exponent and abs(int(exponent[:9])) > MAX_EXPONENT):
        raise TooMuch("a number of too many digits")
    whole, _, decimals = mantissa.partition(".")
    value = Fraction(integer(whole + decimals or "0"), 10 ** len(decimals))
    if exponent:
        return value * Fraction(10) ** int(exponent)
    return Written.with_places(value, len(decimals)) if decimals.endswith("0") else value


def integer(digits: str) -> int:
    """Return the number that `digits` stand for, however many they are."""
    if len(digits) <= _DIGITS_AT_ONCE:
        return int(digits)
    scale: int = 10**_DIGITS_AT_ONCE
    return integer(digits[:-_DIGITS_AT_ONCE]) * scale + int(digits[-_DIGITS_AT_ONCE:])


def times(left: Tree, right: Tree) -> Tree:
    """Return the product, flattened: `(a * b) * c` is one product of three factors."""
    return (*left, right) if left[0] == "*" else ("*", left, right)


def negate(tree: Tree) -> Tree:
    """Return minus `tree`; a number is negated in place."""
    return ("n", -tree[1]) if tree[0] == "n" else ("-", tree)
