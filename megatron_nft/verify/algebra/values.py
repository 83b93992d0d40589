"""Whether two trees have the same value: exactly for rational numbers, otherwise at a few points to 25 digits.

Two different elementary expressions agree at random points with a probability of about zero, so equality at these
points is taken for equality (the idea of the Schwartz-Zippel lemma). Unlike symbolic simplification this takes
microseconds and cannot hang.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from mpmath.ctx_mp import MPContext

from megatron_nft.verify.algebra.tree import Tree
from megatron_nft.verify.algebra.vocabulary import words

mp = MPContext()  # our own, because sympy uses the global one
mp.dps = 40
_TOLERANCE = mp.mpf(10) ** -25  # relative
_ZERO = mp.mpf(10) ** -30  # absolute, for terms that cancel
MAX_BITS = 20_000  # numerator and denominator of an exact value together
MAX_LOG2 = 1e12  # logarithm of a power beyond which its 40 digits mean nothing
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
    """The values cannot be compared, because no point has any."""


class OutOfRange(Undecided):
    """A value has too many digits to be computed."""


def exact(tree: Tree) -> Fraction | None:
    """Return the exact value of a rational expression of moderate size; None for any other."""
    kind = tree[0]
    if kind == "n":
        number: Fraction = tree[1]
        return number
    if kind in _EXACT:
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


def same_value(first: Tree, second: Tree) -> bool:
    """Whether both trees are the same function of their symbols. Raises Undecided where that cannot be computed."""
    if first == second:
        return True
    exact_first, exact_second = exact(first), exact(second)
    if exact_first is not None and exact_second is not None:
        return exact_first == exact_second
    compared = 0
    for first_value, second_value in zip(*values_at_points(first, second), strict=True):
        if first_value is None or second_value is None:
            continue
        if not close(first_value, second_value):
            return False
        compared += 1
    if not compared:
        raise Undecided("no value at any point")
    return True


def values_at_points(*trees: Tree) -> list[list[Any]]:
    """Return, for each tree, its values at the same points (mpmath numbers).

    A value is None where the tree has none. At the point with negative numbers all values are None unless all of them
    are real, because roots and logarithms are meant for real arguments.
    """
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


def close(first: Any, second: Any) -> bool:
    """Whether two mpmath numbers agree to 25 digits."""
    if mp.isinf(first) or mp.isinf(second):
        return bool(first == second)
    difference = abs(first - second)
    return bool(difference <= _ZERO or difference <= _TOLERANCE * max(abs(first), abs(second)))


def _points(names: list[str], discrete: bool) -> Iterator[dict[str, Any]]:
    """Yield two points of positive numbers and one of both signs; if `discrete`, three points of positive integers."""
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
    """Return the names of the symbols in a tree, without the constants e, i and pi."""
    if tree[0] == "s":
        return set() if tree[1] in CONSTANTS else {tree[1]}
    return set().union(*(symbols(part) for part in tree[1:] if isinstance(part, tuple)))


def _has(tree: Tree, kind: str) -> bool:
    return tree[0] == kind or any(_has(part, kind) for part in tree[1:] if isinstance(part, tuple))


def _is_discrete(tree: Tree) -> bool:
    """Whether the tree is meant for integers: floors, factorials, (-1)^n."""
    if tree[0] in ("!", "binom") or (tree[0] == "f" and tree[1] in _INTEGER_FUNCTIONS):
        return True
    if tree[0] == "^" and symbols(tree[2]) and (base := exact(tree[1])) is not None and base < 0:
        return True
    return any(_is_discrete(part) for part in tree[1:] if isinstance(part, tuple))


def _value_or_none(tree: Tree, point: dict[str, Any]) -> Any:
    """Return the value at a point, without an imaginary part that is only rounding; None if there is no value."""
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
    """Return the value of `tree` as an mpmath number, where `point` gives the value of each symbol.

    Raises OutOfRange where it is too large, Undecided for what has no value, such as words.
    """
    kind = tree[0]
    if kind == "n":
        return mp.mpf(tree[1].numerator) / tree[1].denominator
    if kind == "s":
        return _constant(tree[1]) if tree[1] in CONSTANTS else point[tree[1]]
    if kind == "inf":
        return mp.inf
    if kind == "app":
        return _opaque(tree, point)
    if kind == "base":  # a numeral in another base equals only itself
        return mp.mpf(zlib.crc32(f"{tree[1]}_{tree[2]}".encode()) + 1) / 1000003
    if kind == "f":
        return _function(tree[1], tree[2], point)
    if kind in _OPERATIONS:
        return _OPERATIONS[kind](*(value(part, point) for part in tree[1:]))
    raise Undecided(f"{kind} has no value")


def _constant(name: str) -> Any:
    return {"e": +mp.e, "i": mp.j, "\\pi": +mp.pi}[name]


def _opaque(tree: Tree, point: dict[str, Any]) -> Any:
    """Return a value for an uninterpreted u(t) that depends on the value of t and on nothing else."""
    arguments = [mp.nstr(value(part, point), 15) for part in tree[2:]]
    return mp.mpf(zlib.crc32(f"{tree[1]}({arguments})".encode(errors="replace")) % 999983 + 200000) / 500000


def _function(name: str, argument: Tree, point: dict[str, Any]) -> Any:
    """Return the value of a named function; a trigonometric function of degrees is converted."""
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


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "+": lambda *values: mp.fsum(values),
    "*": _product_of,
    "/": lambda top, bottom: top / bottom,
    "-": lambda x: -x,
    "^": _to_power,
    "root": _root,
    "log": lambda base, x: mp.ln(x) / mp.ln(base),
    "!": _gamma_bounded,
    "binom": _choose,
    "deg": lambda x: x,
    "pct": lambda x: x / 100,
}
