"""Numerical values of trees, to as many digits as `mp.workprec` sets, and a record of what rounding may have hidden."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from mpmath.ctx_mp import MPContext

from megatron_nft.verify.algebra.exact import exact, of_integers
from megatron_nft.verify.algebra.tree import Tree
from megatron_nft.verify.algebra.vocabulary import words

mp = MPContext()  # our own, because sympy uses the global one
BASE_BITS = 136  # 40 digits
mp.prec = BASE_BITS
SLACK_BITS = 50  # this many of the last bits may be rounding
MAX_LOG2 = 1e12  # logarithm of a power beyond which its 40 digits mean nothing
MAX_TERMS = 1000  # of all sums and products of a tree together
CONSTANTS = frozenset(("e", "i", "\\pi"))
Point = dict[str, Any]  # the value of each symbol

_INTEGER_FUNCTIONS = frozenset(("floor", "ceil"))
_TRIGONOMETRIC = frozenset(words("sin cos tan cot sec csc"))
_HYPERBOLIC = frozenset(words("sinh cosh tanh coth"))
_TINY_MAG = -40  # smaller values of sines, tangents and logarithms may be rounding
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


def symbols(tree: Tree) -> set[str]:
    """Return the names of the free symbols in a tree, without the constants e, i and pi."""
    found: set[str] = set()
    _collect_symbols(tree, found)
    return found


def _collect_symbols(tree: Tree, found: set[str]) -> None:
    if tree[0] == "s":
        if tree[1] not in CONSTANTS:
            found.add(tree[1])
    elif tree[0] == "bind":
        found |= set().union(*(symbols(part) for part in tree[3:])) - {tree[2]}
    else:
        for part in tree:
            if type(part) is tuple and part:
                _collect_symbols(part, found)


def has(tree: Tree, kind: str) -> bool:
    """Whether a node of this kind occurs in the tree."""
    if tree[0] == kind:
        return True
    for part in tree:  # noqa: SIM110 (quicker than any())
        if type(part) is tuple and part and has(part, kind):
            return True
    return False


def is_discrete(tree: Tree) -> bool:
    """Whether the tree is meant for integers: factorials, sums, (-1)^n."""
    if tree[0] in ("!", "binom"):
        return True
    if (tree[0] == "bind" and tree[1].startswith(("sum", "prod"))) or (tree[0] == "fn" and tree[1] in ("gcd", "lcm")):
        return True
    if tree[0] == "^" and symbols(tree[2]) and (base := exact(tree[1])) is not None and base < 0:
        return True
    return any(is_discrete(part) for part in tree[1:] if isinstance(part, tuple))


def has_steps(tree: Tree) -> bool:
    """Whether something in the tree is rounded to an integer."""
    if tree[0] == "f" and tree[1] in _INTEGER_FUNCTIONS:
        return True
    for part in tree:  # noqa: SIM110 (quicker than any())
        if type(part) is tuple and part and has_steps(part):
            return True
    return False


def value(tree: Tree, point: Point) -> Any:
    """Return the value of `tree` as an mpmath number, where `point` gives the value of each symbol.

    Raises OutOfRange where it is too large, Undecided for what has no value, such as words.
    """
    return Evaluation().value(tree, point)


class Evaluation:
    """Computes values and records what may spoil a comparison at the present precision.

    lost_bits: bits that cancelled in sums, sines and logarithms. spread_bits: how much smaller the smallest term of a
    sum was than the largest; so many further bits are needed for it to count. left_reals: whether a root, a logarithm
    or a power was taken of a number that is not positive. has_steps: whether a number was rounded to an integer.
    """

    def __init__(self) -> None:
        self.lost_bits = 0.0
        self.spread_bits = 0.0
        self.left_reals = False
        self.has_steps = False
        self.num_terms = 0

    def whole(self, tree: Tree, point: Point) -> Any:
        """Return the value of a whole tree at `point`; each has MAX_TERMS terms, whatever was computed before it."""
        self.num_terms = 0
        return self.value(tree, point)

    def value(self, tree: Tree, point: Point) -> Any:
        """Return the value of `tree` at `point`; see the function of the same name."""
        kind = tree[0]
        if kind == "n":
            return mp.mpf(tree[1].numerator) / tree[1].denominator
        if kind == "s":
            name = tree[1]  # the i of a sum over i is in `point`
            return _constant(name) if name in CONSTANTS and name not in point else point[name]
        if kind == "+":
            return self._sum([self.value(part, point) for part in tree[1:]])
        if kind in ("^", "root", "log"):
            first, second = self.value(tree[1], point), self.value(tree[2], point)
            return self._power(first, second) if kind == "^" else self._root_or_log(kind, first, second)
        if kind in _OPERATIONS:
            return _OPERATIONS[kind](*(self.value(part, point) for part in tree[1:]))
        if kind == "f":
            return self._function(tree[1], tree[2], point)
        if kind in ("app", "fn", "bind", "base", "inf"):
            return self._special(tree, point)
        raise Undecided(f"{kind} has no value")

    def _special(self, tree: Tree, point: Point) -> Any:
        if tree[0] == "inf":
            return mp.inf
        if tree[0] == "base":  # a numeral in another base equals only itself
            number = exact(tree)
            return _arbitrary(f"{tree[1]}_{tree[2]}") if number is None else mp.mpf(int(number))
        if tree[0] == "bind":
            terms = self._terms(tree, point)
            if terms is not None:
                return self._sum(terms) if tree[1] == "sum" else _product_of(mp.mpf(1), *terms)
            return _arbitrary(f"{tree[1]}{self._samples(tree, point)}")
        arguments = [self.value(part, point) for part in tree[2:]]
        return _of_several(tree[1], arguments) if tree[0] == "fn" else _opaque(tree[1], arguments)

    def _terms(self, tree: Tree, point: Point) -> list[Any] | None:
        """Return the terms of a sum or the factors of a product between moderate integers; None for other binders."""
        if tree[1] not in ("sum", "prod") or len(tree) != 6:
            return None
        first, last = (self.value(bound, point) for bound in tree[3:5])
        if not (mp.isint(first) and mp.isint(last)) or abs(last - first) > MAX_TERMS - self.num_terms:
            return None
        self.num_terms += max(0, int(last - first) + 1)
        return [self.value(tree[5], {**point, tree[2]: mp.mpf(k)}) for k in range(int(first), int(last) + 1)]

    def _samples(self, tree: Tree, point: Point) -> list[str]:
        """Return the bounds of a sum, an integral and the like, and what is summed at a few values of its variable.

        They do not depend on the name of the variable, nor on how the summand is written.
        """
        _, kind, name, *bounds, body = tree
        inside = (mp.mpf(4), mp.mpf(9)) if kind.startswith(("sum", "prod")) else (mp.mpf(11) / 16, mp.mpf(21) / 16)
        values = [self.value(bound, point) for bound in bounds]
        values += [self.value(body, {**point, name: sample}) for sample in inside]
        return [mp.nstr(number, 15) for number in values]

    def _sum(self, values: list[Any]) -> Any:
        total = mp.fsum(values)
        sizes = [mp.mag(term) for term in values if term]
        if sizes and mp.isfinite(total):
            largest = max(sizes)
            self.spread_bits = max(self.spread_bits, largest - min(sizes))
            self.lost_bits += max(0, largest - mp.mag(total)) if total else mp.prec
        return total

    def _see_small(self, x: Any) -> None:
        """Record a small argument: cos(x) and 2^x differ from 1 by its size or its square."""
        if x and mp.isfinite(x):
            self.spread_bits = max(self.spread_bits, -2 * mp.mag(x))

    def _see_cancelled(self, result: Any, argument_mag: Any) -> None:
        """Record a result that is tiny beside an argument of this magnitude: sin(pi) and ln(1) are only rounding."""
        if result and mp.isfinite(result) and mp.mag(result) < _TINY_MAG:
            self.lost_bits += max(0, argument_mag - mp.mag(result))

    def _function(self, name: str, argument: Tree, point: Point) -> Any:
        """Return the value of a named function; a trigonometric function of degrees is converted."""
        lost_before = self.lost_bits
        x = self.value(argument, point)
        if name in _TRIGONOMETRIC and argument[0] == "deg":
            x = x * mp.pi / 180
        if name in _INTEGER_FUNCTIONS:
            self.has_steps = True
            nearest = mp.nint(x)
            may_be_rounding = nearest or self.lost_bits > lost_before  # e^{-1000} by itself is not 0
            if may_be_rounding and abs(x - nearest) < mp.ldexp(1, SLACK_BITS - mp.prec):
                return nearest
            return mp.floor(x) if name == "floor" else mp.ceil(x)
        if name not in ("ln", "abs") and abs(x) > MAX_LOG2:
            raise OutOfRange(f"{name} of a number beyond {MAX_LOG2:g}")
        if name == "ln":
            self.left_reals = self.left_reals or not _is_positive(x)
        elif name != "abs":
            self._see_small(x)
        if name in _HYPERBOLIC:  # tanh(x) differs from 1, and cosh(x) from sinh(x), by a part e^{-2x}
            self.spread_bits = max(self.spread_bits, 3 * float(abs(x)))
        result = _FUNCTIONS[name](x)
        if name in _TRIGONOMETRIC:
            self._see_cancelled(result, mp.mag(x))
        elif name == "ln":
            self._see_cancelled(result, 0)
        return result

    def _power(self, base: Any, exponent: Any) -> Any:
        if not mp.isint(exponent):
            self.left_reals = self.left_reals or not (base == 0 or _is_positive(base))
            self._see_small(exponent)
        return _to_power(base, exponent)

    def _root_or_log(self, kind: str, first: Any, second: Any) -> Any:
        self.left_reals = self.left_reals or not (second == 0 or _is_positive(second))
        if kind == "root":
            return _root(first, second)
        result = mp.ln(second) / mp.ln(first)
        self._see_cancelled(result, 0)
        return result


def _is_positive(x: Any) -> bool:
    return isinstance(x, mp.mpf) and x > 0


def _constant(name: str) -> Any:
    return {"e": +mp.e, "i": mp.j, "\\pi": +mp.pi}[name]


def _arbitrary(key: str) -> Any:
    """Return a number between 0.38 and 2.3 that depends on `key` and on nothing else, exact at every precision."""
    return mp.ldexp(zlib.crc32(key.encode(errors="replace")) % 999983 + 200000, -19)


def _opaque(name: str, arguments: list[Any]) -> Any:
    """Return a value for an uninterpreted u(t) that depends on the value of t and on nothing else."""
    return _arbitrary(f"{name}({[mp.nstr(argument, 15) for argument in arguments]})")


def _of_several(name: str, arguments: list[Any]) -> Any:
    """Return gcd, lcm, max or min, whatever the order of the arguments."""
    if not all(isinstance(argument, mp.mpf) and mp.isfinite(argument) for argument in arguments):
        raise Undecided(f"{name} of numbers that have no order")
    if name in ("max", "min"):
        return max(arguments) if name == "max" else min(arguments)
    if all(mp.isint(argument) and mp.mag(argument) < mp.prec for argument in arguments):
        result = of_integers(name, [Fraction(int(argument)) for argument in arguments])
        return mp.mpf(result.numerator) if result is not None else mp.nan
    return _opaque(name, sorted(arguments))


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
    "*": _product_of,
    "/": lambda top, bottom: top / bottom,
    "-": lambda x: -x,
    "!": _gamma_bounded,
    "binom": _choose,
    "deg": lambda x: x,
    "pct": lambda x: x / 100,
}
