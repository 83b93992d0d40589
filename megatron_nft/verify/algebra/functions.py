r"""Read named functions: `\sin^2 x`, `\log_{10} 2`, and those of several arguments such as `\gcd(a, b)`."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from megatron_nft.verify.algebra.tree import NotUnderstood, Tree, read_number, times
from megatron_nft.verify.algebra.vocabulary import FUNCTIONS

if TYPE_CHECKING:
    from megatron_nft.verify.algebra.parse import Parser

SEVERAL = frozenset(("gcd", "lcm", "max", "min"))
_CLOSING = {"(": ")", r"\{": r"\}", "{": "}", "[": "]"}


def several(parser: Parser, name: str) -> Tree:
    r"""Read the arguments of gcd, lcm, max or min: `(a, b)`, `\{a, b\}`."""
    opening = parser.take()
    closing = _CLOSING.get(opening)
    if closing is None:
        raise NotUnderstood(f"{name} without brackets")
    arguments = [parser.sum()]
    while parser.peek() in (",", ";"):
        parser.at += 1
        arguments.append(parser.sum())
    parser.expect(closing)
    return ("fn", name, *arguments)


def function(parser: Parser, name: str) -> Tree:
    r"""Read a named function: `\sin^2 x`, `\log_{10} 2`, `\cos(2t)`, `\sin 2\omega t`."""
    base = power = None
    for _ in range(2):
        if parser.peek() == "_" and name == "log" and base is None:
            parser.at += 1
            is_number = parser.peek()[:1].isdigit()  # in \log_2 8 and \log_2 3/4 the base is just 2
            base = ("n", read_number(parser.take())) if is_number else parser.exponent()
        elif parser.peek() == "^" and power is None:
            parser.at += 1
            power = parser.exponent()
    if parser.peek() in ("(", "{", "["):
        value = parser.bracketed()
    else:
        value = parser.signed() if parser.peek() == "-" else parser.power()
        while parser.starts_factor(parser.peek()) and parser.peek()[1:] not in FUNCTIONS and parser.peek() != "(":
            value = times(value, parser.power())
    if name == "lg" or base is not None:
        tree: Tree = ("log", base or ("n", Fraction(10)), value)
    else:
        tree = ("f", "ln" if name == "log" else name, value)
    if power == ("n", Fraction(-1)) and not name.startswith("arc"):
        return ("f", f"arc{name}", value)
    return tree if power is None else ("^", tree, power)
