"""Whether two trees have the same value: exactly where they are rational, else at a few points to 25 digits.

Two different elementary expressions agree at random points with a probability of about zero, so equality at the points
is taken for equality (the idea of Schwartz and Zippel). Unlike simplification this takes microseconds and cannot hang.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from mpmath.ctx_mp import MPContext

from megatron_nft.verify.algebra.tree import Tree
from megatron_nft.verify.algebra.vocabulary import words

mp = MPContext()  # our own: sympy works with the global one
mp.dps = 40
_TOLERANCE = mp.mpf(10) ** -25  # relative
_ZERO = mp.mpf(10) ** -30  # absolute, for values that cancel
MAX_BITS = 20_000  # of an exact integer
MAX_LOG2 = 1e12  # of a power, beyond which 40 digits say nothing
CONSTANTS = frozenset(("e", "i", "\\pi"))
_INTEGER_FUNCTIONS = frozenset(("floor", "ceil"))
_TRIGONOMETRIC = frozenset(words("sin cos tan cot sec csc"))
_FUNCTIONS = {
    "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc, "sinh": mp.sinh,
    "cosh": mp.cosh, "tanh": mp.tanh, "coth": mp.coth, "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan,
    "arccot": mp.acot, "arcsec": mp.asec, "arccsc": mp.acsc, "arcsinh": mp.asinh, "arccosh": mp.acosh,
    "arctanh": mp.atanh, "ln": mp.ln, "exp": mp.exp, "abs": mp.fabs,
}  # fmt: skip


class Undecided(ArithmeticError):
    """The values cannot be compared: there are none at any of the points."""


class OutOfRange(Undecided):
    """A value has too many digits to be computed."""


def exact(tree: Tree) -> Fraction | None:
    """The value of a rational expression of moderate size; None for any other."""
    kind = tree[0]
    if kind == "n":
        return tree[1]
    if kind in ("+", "*", "/", "-", "pct", "^", "!", "binom"):
        values = [exact(part) for part in tree[1:]]
        if None in values:
            return None
        try:
            value = _EXACT[kind](*values)
        except ZeroDivisionError:
            return None
        if value is not None and value.numerator.bit_length() + value.denominator.bit_length() <= MAX_BITS:
            return value
    return None


def _sum(*values: Fraction) -> Fraction:
    return sum(values, Fraction(0))


def _product(*values: Fraction) -> Fraction:
    result = Fraction(1)
    for value in values:
        result *= value
    return result


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    return base ** int(exponent) if bits * abs(exponent) <= MAX_BITS else None


def _factorial(n: Fraction) -> Fraction | None:
    return _product(*(Fraction(k) for k in range(2, int(n) + 1))) if n.denominator == 1 and 0 <= n <= 1000 else None


def _binomial(n: Fraction, k: Fraction) -> Fraction | None:
    if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 1000:
        return None
    result = Fraction(1)
    for i in range(min(int(k), int(n - k))):
        result = result * (n - i) / (i + 1)
    return result


_EXACT = {
    "+": _sum,
    "*": _product,
    "/": lambda a, b: a / b,
    "-": lambda a: -a,
    "pct": lambda a: a / 100,
    "^": _power,
    "!": _factorial,
    "binom": _binomial,
}


def same_value(a: Tree, b: Tree) -> bool:
    """Whether `a` and `b` are the same function of their symbols. Undecided where that cannot be computed."""
    if a == b:
        return True
    exact_a, exact_b = exact(a), exact(b)
    if exact_a is not None and exact_b is not None:
        return exact_a == exact_b
    compared = 0
    for value_a, value_b in zip(*values_at_points(a, b), strict=True):
        if value_a is None or value_b is None:
            continue
        if not close(value_a, value_b):
            return False
        compared += 1
    if not compared:
        raise Undecided("no value at any point")
    return True


def values_at_points(*trees: Tree) -> list[list[Any]]:
    """Values of each tree at the same points; None where it has none (off the positive numbers: none that is real)."""
    names = sorted({name for tree in trees for name in symbols(tree)})
    discrete = any(_is_discrete(tree) for tree in trees)
    points = _points(names, discrete) if names or any(_has(tree, "app") for tree in trees) else [{}]
    columns = []
    for point in points:
        values = [_value_or_none(tree, point) for tree in trees]
        if point.get("") == "mixed signs" and any(isinstance(value, mp.mpc) for value in values):
            values = [None] * len(values)  # outside the real domain: roots and logarithms of negative numbers
        columns.append(values)
    return [list(row) for row in zip(*columns, strict=True)]


def close(a: Any, b: Any) -> bool:
    if mp.isinf(a) or mp.isinf(b):
        return a == b
    difference = abs(a - b)
    return difference <= _ZERO or difference <= _TOLERANCE * max(abs(a), abs(b))


def _points(names: list[str], discrete: bool) -> Iterator[dict[str, Any]]:
    """Two points of positive numbers and one of both signs; three of positive integers for floors and factorials."""
    for number in range(3):
        point: dict[str, Any] = {}
        for name in names:
            seed = zlib.crc32(f"{number}{name}".encode(errors="replace"))
            if discrete:
                point[name] = mp.mpf(3 + seed % 23 + 7 * number)
            else:
                point[name] = mp.mpf(seed % 999983 + 200000) / 500000  # 0.4 to 2.4
                if number == 2 and seed % 3:
                    point[name] = -point[name]
        if number == 2 and not discrete:
            point[""] = "mixed signs"
        yield point


def symbols(tree: Tree) -> set[str]:
    """Names of the symbols of a tree, constants left out."""
    if tree[0] == "s":
        return set() if tree[1] in CONSTANTS else {tree[1]}
    return set().union(*(symbols(part) for part in tree[1:] if isinstance(part, tuple)))


def _has(tree: Tree, kind: str) -> bool:
    return tree[0] == kind or any(_has(part, kind) for part in tree[1:] if isinstance(part, tuple))


def _is_discrete(tree: Tree) -> bool:
    """Whether the tree is made for integers: floors, factorials, (-1)^n."""
    if tree[0] in ("!", "binom") or (tree[0] == "f" and tree[1] in _INTEGER_FUNCTIONS):
        return True
    if tree[0] == "^" and symbols(tree[2]) and (base := exact(tree[1])) is not None and base < 0:
        return True
    return any(_is_discrete(part) for part in tree[1:] if isinstance(part, tuple))


def _value_or_none(tree: Tree, point: dict[str, Any]) -> Any:
    try:
        result = value(tree, point)
    except (ZeroDivisionError, ValueError):
        return None
    if mp.isnan(result):
        return None
    if isinstance(result, mp.mpc) and abs(result.imag) <= _ZERO * (1 + abs(result.real)):
        return result.real
    return result


def value(tree: Tree, point: dict[str, Any]) -> Any:
    """The number that `tree` stands for with the symbols' values in `point`. OutOfRange where it is too large."""
    kind = tree[0]
    if kind == "n":
        return mp.mpf(tree[1].numerator) / tree[1].denominator
    if kind == "s":
        return _constant(tree[1]) if tree[1] in CONSTANTS else point[tree[1]]
    if kind == "inf":
        return mp.inf
    if kind == "app":
        return _opaque(tree, point)
    if kind == "base":  # a numeral of another base is equal to itself only
        return mp.mpf(zlib.crc32(f"{tree[1]}_{tree[2]}".encode()) + 1) / 1000003
    if kind == "f":
        return _function(tree[1], tree[2], point)
    if kind in _OPERATIONS:
        return _OPERATIONS[kind](*(value(part, point) for part in tree[1:]))
    raise Undecided(f"{kind} has no value")


def _constant(name: str) -> Any:
    return {"e": +mp.e, "i": mp.j, "\\pi": +mp.pi}[name]


def _opaque(tree: Tree, point: dict[str, Any]) -> Any:
    """A value for u(t) that depends on the value of t, and on nothing else."""
    arguments = [mp.nstr(value(part, point), 15) for part in tree[2:]]
    return mp.mpf(zlib.crc32(f"{tree[1]}({arguments})".encode(errors="replace")) % 999983 + 200000) / 500000


def _function(name: str, argument: Tree, point: dict[str, Any]) -> Any:
    x = value(argument, point)
    if name in _TRIGONOMETRIC and argument[0] == "deg":
        x = x * mp.pi / 180
    if name in _INTEGER_FUNCTIONS:
        nearest = mp.nint(x)
        if abs(x - nearest) < _TOLERANCE:
            return nearest
        return mp.floor(x) if name == "floor" else mp.ceil(x)
    if name not in ("ln", "abs") and abs(x) > MAX_LOG2:
        raise OutOfRange(f"{name} of a number beyond {MAX_LOG2:g}")
    return _FUNCTIONS[name](x)


def _to_power(base: Any, exponent: Any) -> Any:
    if base == 0:
        return mp.mpf(1) if exponent == 0 else mp.mpf(0) if mp.re(exponent) > 0 else base**-1
    if mp.isinf(exponent) or mp.isinf(base) or abs(mp.log(abs(base))) * abs(exponent) > MAX_LOG2:
        raise OutOfRange("a power of too many digits")
    return mp.power(base, exponent)


def _root(degree: Any, x: Any) -> Any:
    if isinstance(x, mp.mpf) and x < 0 and degree == mp.nint(degree) and int(degree) % 2:
        return -mp.root(-x, int(degree))  # the real cube root of -8
    return mp.sqrt(x) if degree == 2 else _to_power(x, 1 / degree)


def _gamma_bounded(x: Any) -> Any:
    if abs(x) > MAX_LOG2:
        raise OutOfRange("a factorial of too many digits")
    return mp.factorial(x)


def _choose(n: Any, k: Any) -> Any:
    if max(abs(n), abs(k)) > MAX_LOG2:
        raise OutOfRange("a binomial coefficient of too many digits")
    return mp.binomial(n, k)


def _product_of(*values: Any) -> Any:
    result = values[0]
    for factor in values[1:]:
        result = result * factor
    return result


_OPERATIONS = {
    "+": lambda *values: mp.fsum(values),
    "*": _product_of,
    "/": lambda a, b: a / b,
    "-": lambda a: -a,
    "^": _to_power,
    "root": _root,
    "log": lambda base, x: mp.ln(x) / mp.ln(base),
    "!": _gamma_bounded,
    "binom": _choose,
    "deg": lambda x: x,
    "pct": lambda x: x / 100,
}
