"""Whether two trees have the same value: exactly for rational numbers, otherwise at a few points.

Two different elementary expressions agree at random points with a probability of about zero, so equality at these
points is taken for equality (the idea of the Schwartz-Zippel lemma). Unlike symbolic simplification this takes
microseconds and cannot hang. Equality is relative to the sizes that were added: values that agree to 12 digits are
computed again, with as many digits more as the smallest term needs, and are equal if their difference shrinks with
the rounding.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron_nft.verify.algebra.exact import exact
from megatron_nft.verify.algebra.tree import Tree
from megatron_nft.verify.algebra.values import (
    BASE_BITS,
    SLACK_BITS,
    Evaluation,
    OutOfRange,
    Point,
    Undecided,
    has,
    has_steps,
    is_discrete,
    mp,
    symbols,
)

POINTS = 3  # at which values are compared
_CANDIDATES = 10  # points that are tried, because some have no value
_NEAR_BITS = 40  # values that agree to so many bits are computed again
_MORE_BITS = 256  # with so many bits more, and those that the terms need
_MAX_PRECISION = 200_000  # bits
_REAL = frozenset("xyzt")  # letters that stand for any number beside a floor, where n and k are integers
_MIXED = 2  # the number of the point that has negative numbers

Pair = Callable[[Evaluation], tuple[Any, Any]]


def same_value(first: Tree, second: Tree) -> bool:
    """Whether both trees are the same function of their symbols. Raises Undecided where that cannot be computed.

    Letters in roots, logarithms and powers are meant to be positive, so that sqrt(ab) is sqrt(a) sqrt(b).
    """
    if first == second:
        return True
    exact_first, exact_second = exact(first), exact(second)
    if exact_first is not None and exact_second is not None:
        return exact_first == exact_second
    compared = 0
    outside: list[bool] = []  # verdicts at points where a root or a logarithm has no real value
    for point, mixed in _points(first, second):
        evaluation = Evaluation()
        verdict = _agree(_both(first, second, point), evaluation)
        if verdict is None or (mixed and evaluation.left_reals):
            continue
        if evaluation.left_reals:
            outside.append(verdict)
            if len(outside) == POINTS and not compared:
                break
            continue
        if not verdict:
            return _refuse(first, second)
        compared += 1
        if compared == 2 * POINTS or (compared == POINTS and not (has_steps(first) or has_steps(second))):
            break  # steps agree at many points
    if not compared and not outside:
        raise Undecided("no value at any point")
    return True if compared or all(outside) else _refuse(first, second)


def _refuse(first: Tree, second: Tree) -> bool:
    """Return False; sums, integrals and limits that are not written alike may still have the same value."""
    if has(first, "bind") or has(second, "bind"):
        raise Undecided("a sum, a product, an integral or a limit")
    return False


def proportional(first: Tree, second: Tree) -> int:
    """Return 1 or -1, the sign of the constant factor by which the two trees differ; 0 if there is none.

    Raises Undecided where that cannot be computed.
    """
    reference: Point | None = None
    sign = 0
    compared = 0
    for point, _ in _points(first, second):
        values = [_value_or_none(Evaluation(), tree, point) for tree in (first, second)]
        if None in values:
            continue
        if values[0] == 0 or values[1] == 0:
            return 0
        if reference is None:
            reference, ratio = point, mp.re(values[0] / values[1])
            sign = 1 if ratio > 0 else -1
            continue
        if not _agree(_crosswise(first, second, point, reference), Evaluation()):
            return 0
        compared += 1
        if compared == POINTS - 1:
            break
    if not compared:
        raise Undecided("an equation that cannot be evaluated")
    return sign


def _both(first: Tree, second: Tree, point: Point) -> Pair:
    """Return the values of both trees at a point."""
    return lambda run: (run.whole(first, point), run.whole(second, point))


def _crosswise(first: Tree, second: Tree, point: Point, reference: Point) -> Pair:
    """Return the two products that are equal if first/second is the same at both points."""

    def pair(run: Evaluation) -> tuple[Any, Any]:
        return (
            run.whole(first, point) * run.whole(second, reference),
            run.whole(second, point) * run.whole(first, reference),
        )

    return pair


def value_at_a_point(tree: Tree) -> Any:
    """Return the value of a tree as an mpmath number, at the first point if it has symbols; None if it has none."""
    point, _ = next(_points(tree))
    return _value_or_none(Evaluation(), tree, point)


def _agree(pair: Pair, evaluation: Evaluation) -> bool | None:
    """Whether the two values are the same; None if one of them does not exist.

    evaluation: for the first computation, whose record the caller may want to see.
    """
    first, second = _computed(pair, evaluation)
    if first is None or second is None:
        return None
    if mp.isinf(first) or mp.isinf(second):
        return bool(first == second)
    difference = abs(first - second)
    size = max(abs(first), abs(second))
    may_step = evaluation.has_steps and evaluation.spread_bits >= _NEAR_BITS  # floor(5 - e^{-100}) is 4
    if evaluation.lost_bits < _NEAR_BITS and not may_step and difference > mp.ldexp(size, -_NEAR_BITS):
        return False
    bits = BASE_BITS + _MORE_BITS + int(evaluation.spread_bits + evaluation.lost_bits)
    more = bits - BASE_BITS
    for _ in range(3):
        if bits > _MAX_PRECISION:
            raise OutOfRange("a sum whose terms differ too much in size")
        with mp.workprec(bits):
            first, second = _computed(pair, Evaluation())
            if first is None or second is None:
                return None
            before, difference = difference, abs(first - second)
            if difference <= mp.ldexp(before, SLACK_BITS - more):
                return True  # it was rounding, which has shrunk, or nothing both times
            if before and 2 * difference > before:
                return False
        more = _MORE_BITS // 2
        bits += more
    return bool(difference == 0)


def _computed(pair: Pair, evaluation: Evaluation) -> tuple[Any, Any]:
    try:
        first, second = pair(evaluation)
    except (ZeroDivisionError, ValueError):
        return None, None
    return _real_if_it_is(first), _real_if_it_is(second)


def _value_or_none(evaluation: Evaluation, tree: Tree, point: Point) -> Any:
    return _computed(lambda run: (run.whole(tree, point), 0), evaluation)[0]


def _real_if_it_is(result: Any) -> Any:
    """Return a value without an imaginary part that is only rounding; None for one that is not a number."""
    if mp.isnan(result):
        return None
    if isinstance(result, mp.mpc) and abs(result.imag) <= mp.ldexp(1 + abs(result.real), 36 - mp.prec):
        return result.real
    return result


def _points(*trees: Tree) -> Iterator[tuple[Point, bool]]:
    """Yield points, and whether they have negative numbers.

    Positive numbers between 0.4 and 2.3, positive integers where a tree is meant for integers; beside floors these are
    all letters but x, y, z and t. The second point has
    the letters in the reverse order of size, so that max(a, b) is neither a nor b. The third one has numbers of both
    signs, unless letters stand under roots, in logarithms or in powers and no absolute value says that their signs
    count. Only one point if there is nothing that depends on it.
    """
    names = sorted(set().union(*map(symbols, trees)))
    if not names and not any(has(tree, "app") or has(tree, "bind") for tree in trees):
        yield {}, False
        return
    discrete = any(map(is_discrete, trees))
    steps = bool(names) and not discrete and any(map(has_steps, trees))
    signs = not discrete and not steps and (not any(map(_wants_positive, trees)) or any(map(_has_absolute, trees)))
    for number in range(_CANDIDATES):
        point: Point = {}
        for name in names:
            seed = zlib.crc32(f"{number - (number == 1)}{name}".encode(errors="replace"))
            if discrete or (steps and name[0] not in _REAL):
                point[name] = mp.mpf(25 - seed % 23 if number == 1 else 3 + seed % 23 + 7 * number)
            else:
                size = 999983 - seed % 999983 if number == 1 else seed % 999983
                point[name] = mp.ldexp(size + 200000, -19)
                if number == _MIXED and signs and seed % 3:
                    point[name] = -point[name]
        yield point, number == _MIXED and signs


def _wants_positive(tree: Tree) -> bool:
    """Whether letters stand under a root, in a logarithm, or in a power that is not a plain integer one."""
    if tree[0] in ("root", "log") or (tree[0] == "f" and tree[1] == "ln"):
        return bool(symbols(tree))
    if tree[0] == "^" and symbols(tree) and ((power := exact(tree[2])) is None or power.denominator != 1):
        return True
    return any(_wants_positive(part) for part in tree[1:] if isinstance(part, tuple))


def _has_absolute(tree: Tree) -> bool:
    return tree[:2] == ("f", "abs") or any(_has_absolute(part) for part in tree[1:] if isinstance(part, tuple))
