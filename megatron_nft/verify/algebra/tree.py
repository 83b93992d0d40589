r"""Trees: what expressions and answers are read into.

A tree is a nested tuple, so that equal trees are equal answers and trees can be cached:

    ("n", Fraction)              number                    ("s", name)          symbol, e, i and pi among them
    ("+", a, b, ...)             sum                       ("*", a, b, ...)     product
    ("/", a, b)  ("^", a, b)     quotient, power           ("-", a)             minus a
    ("f", name, a)               sin, ln, abs, floor ...   ("log", base, a)  ("root", n, a)  ("binom", n, k)
    ("app", name, a, ...)        a function without a meaning: u(t), \delta(t), f(x, y)
    ("!", a)  ("deg", a)  ("pct", a)  ("pm", a, b)  ("mp", a, b)  ("inf",)  ("base", digits, base)

and around them (answer.py):

    ("list", a, ...)                  1, 2 and 3: any order        ("tuple", "(", ")", a, ...)   also an interval
    ("set", a, ...)                   {1, 2}                       ("union", a, ...)
    ("matrix", (a, ...), ...)         rows                         ("reals",)
    ("rel", ("=", "<="), a, b, c)     a = b <= c
    ("unit", a, "cm^2")               a quantity; 90^\circ too     ("text", "ellipse")           words alone
    ("prose", squashed text)          words and mathematics, compared as text only
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

Tree = tuple[Any, ...]

MAX_DIGITS = 3000  # of a number
MAX_EXPONENT = 3000  # of 1e3000: Fractions beyond are slow


class NotUnderstood(ValueError):
    """The text is not an expression or answer that our parser knows."""


class TooMuch(NotUnderstood):
    """The text is too long, too deeply nested or has too many digits, for any parser."""


def read_number(token: str) -> Fraction:
    """The exact value of a number token."""
    mantissa, _, exponent = token.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or (exponent and abs(int(exponent[:9])) > MAX_EXPONENT):
        raise TooMuch("a number of too many digits")
    whole, _, decimals = mantissa.partition(".")
    value = Fraction(int(whole + decimals or "0"), 10 ** len(decimals))
    return value * Fraction(10) ** int(exponent) if exponent else value


def times(a: Tree, b: Tree) -> Tree:
    return (*a, b) if a[0] == "*" else ("*", a, b)


def negate(tree: Tree) -> Tree:
    return ("n", -tree[1]) if tree[0] == "n" else ("-", tree)
