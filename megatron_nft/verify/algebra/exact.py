"""Exact values of rational expressions, as fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from megatron_nft.verify.algebra.tree import Tree, integer

MAX_BITS = 100_000  # numerator and denominator of an exact value together
MAX_INTEGER_BITS = 400_000  # integers are quicker: they need no greatest common divisors
_MAX_FACTORIAL = 10_000


def exact(tree: Tree) -> Fraction | None:
    """Return the exact value of a rational expression of moderate size; None for any other."""
    kind = tree[0]
    if kind == "n":
        number: Fraction = tree[1]
        return number
    if kind == "base":
        return Fraction(integer(tree[1] or "0")) if tree[2] == "10" and tree[1].isdecimal() else None
    if kind in _EXACT:
        values = [exact(part) for part in tree[1:]]
    elif kind == "fn" or (kind == "f" and tree[1] in _ROUNDED):
        values = [exact(part) for part in tree[2:]]
    else:
        return None
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    try:
        if kind == "f":
            result: Fraction | None = Fraction(_ROUNDED[tree[1]](known[0]))
        else:
            result = of_integers(tree[1], known) if kind == "fn" else _EXACT[kind](*known)
    except ZeroDivisionError:
        return None
    return result if result is not None and _is_moderate(result) else None


def of_integers(name: str, values: list[Fraction]) -> Fraction | None:
    """Return the value of gcd, lcm, max or min; None for the first two of numbers that are no integers."""
    if name in ("max", "min"):
        return max(values) if name == "max" else min(values)
    if any(value.denominator != 1 for value in values):
        return None
    function = math.gcd if name == "gcd" else math.lcm
    return Fraction(function(*(int(value) for value in values)))


def _is_moderate(value: Fraction) -> bool:
    bits = value.numerator.bit_length() + value.denominator.bit_length()
    return bits <= (MAX_INTEGER_BITS if value.denominator == 1 else MAX_BITS)


def _sum(*values: Fraction) -> Fraction:
    return sum(values, Fraction(0))


def _product(*values: Fraction) -> Fraction | None:
    result = Fraction(1)
    for value in values:
        result *= value
        if not _is_moderate(result):
            return None  # a long product of huge numbers would take minutes
    return result


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    if abs(base) == 1:
        return base ** int(exponent % 2)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    limit = MAX_INTEGER_BITS if base.denominator == 1 else MAX_BITS
    return base ** int(exponent) if bits * abs(exponent) <= limit else None


def _factorial(n: Fraction) -> Fraction | None:
    return Fraction(math.factorial(int(n))) if n.denominator == 1 and 0 <= n <= _MAX_FACTORIAL else None


def _binomial(n: Fraction, k: Fraction) -> Fraction | None:
    if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= _MAX_FACTORIAL:
        return None
    return Fraction(math.comb(int(n), int(k)))


_EXACT: dict[str, Callable[..., Fraction | None]] = {
    "+": _sum,
    "*": _product,
    "/": lambda top, bottom: top / bottom,
    "-": lambda number: -number,
    "pct": lambda number: number / 100,
    "^": _power,
    "!": _factorial,
    "binom": _binomial,
}
_ROUNDED: dict[str, Callable[[Fraction], Fraction | int]] = {"floor": math.floor, "ceil": math.ceil, "abs": abs}
