r"""Inequalities as sets of numbers: `x < 1 or x > 3` is (-\infty, 1) \cup (3, \infty)."""

from __future__ import annotations

import itertools
from typing import Any

from megatron_nft.verify.algebra.comparison import value_at_a_point
from megatron_nft.verify.algebra.names import is_name
from megatron_nft.verify.algebra.tree import Tree
from megatron_nft.verify.algebra.values import Undecided, mp, symbols

FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
ORDERS = frozenset(("<", ">", "<=", ">="))
_MINUS_INFINITY: Tree = ("-", ("inf",))
_INFINITY: Tree = ("inf",)


def variable(relation: Tree) -> Tree:
    """Return the name that a chain of inequalities, or a membership, is about; ("s", "") if there is none."""
    return next((side for side in relation[2:] if _is_variable(side)), ("s", ""))


def _is_variable(side: Tree) -> bool:
    """Whether a side is what a relation says something about: x, f(x), |AB|."""
    return is_name(side) and bool(symbols(side)) and side[0] not in ("tuple", "prose", "text", "unit")


def region(relation: Tree) -> Tree | None:
    r"""Return the set of numbers that `x \in [1, 2)`, `1 <= x < 2`, `x > 3` or `x \ne 3` allow; None for others."""
    signs, sides = relation[1], relation[2:]
    if signs == (r"\in",):
        return sides[1] if _is_variable(sides[0]) else None
    if signs == ("!=",):
        if not _is_variable(sides[0]) or symbols(sides[1]) or sides[1][0] not in ("n", "-", "/", "*", "+", "root", "^"):
            return None
        return ("union", ("tuple", "(", ")", _MINUS_INFINITY, sides[1]), ("tuple", "(", ")", sides[1], _INFINITY))
    if not set(signs) <= ORDERS or len({sign[0] for sign in signs}) > 1:
        return None
    if signs[0][0] == ">":  # turn it round, so that it ascends
        signs, sides = tuple(FLIPPED[sign] for sign in reversed(signs)), tuple(reversed(sides))
    names = [index for index, side in enumerate(sides) if _is_variable(side)]
    if len(names) != 1 or any(symbols(side) for index, side in enumerate(sides) if index != names[0]):
        return None
    at = names[0]
    low, high = (sides[0] if at == 1 else None), (sides[-1] if at == len(sides) - 2 else None)
    if at > 1 or at < len(sides) - 2:
        return None
    opening = "[" if low is not None and signs[0] == "<=" else "("
    closing = "]" if high is not None and signs[-1] == "<=" else ")"
    return ("tuple", opening, closing, low or _MINUS_INFINITY, high or _INFINITY)


def combine_inequalities(items: tuple[Tree, ...]) -> Tree | None:
    r"""Return inequalities of one variable as a single membership.

    `x < 1, x > 3` is a union and `x > 1, x < 3` the interval between: inequalities that have no number in common are
    alternatives. None where it cannot be told which of the two is meant.
    """
    if len(items) < 2 or any(item[0] != "rel" or not set(item[1]) <= ORDERS for item in items):
        return None
    intervals = [interval for item in items if (interval := region(item)) is not None]
    if len(intervals) < len(items) or len({variable(item) for item in items}) > 1:
        return None
    try:
        ends = [(value_at_a_point(i[3]), value_at_a_point(i[4])) for i in intervals]
    except Undecided:
        return None
    if not all(isinstance(end, mp.mpf) for pair in ends for end in pair):
        return None
    order = sorted(range(len(items)), key=lambda index: ends[index])
    pairs = itertools.pairwise(order)
    if all(_is_before(intervals[i], ends[i], intervals[j], ends[j]) for i, j in pairs):
        whole: Tree | None = ("union", *(intervals[index] for index in order))
    else:
        whole = _intersection(intervals, ends) if len(items) == 2 else None
    return None if whole is None else ("rel", (r"\in",), variable(items[0]), whole)


def _is_before(first: Tree, first_ends: tuple[Any, Any], second: Tree, second_ends: tuple[Any, Any]) -> bool:
    """Whether the first interval ends before the second one starts."""
    if first_ends[1] == second_ends[0]:
        return bool(first[2] == ")" or second[1] == "(")
    return bool(first_ends[1] < second_ends[0])


def _intersection(intervals: list[Tree], ends: list[tuple[Any, Any]]) -> Tree | None:
    """Return the intersection of two rays that point towards each other; None for other intervals."""
    (low, low_ends), (high, high_ends) = sorted(zip(intervals, ends, strict=True), key=lambda pair: pair[1])[::-1]
    if low[4] != _INFINITY or high[3] != _MINUS_INFINITY or low_ends[0] >= high_ends[1]:
        return None
    return ("tuple", low[1], high[2], low[3], high[4])
