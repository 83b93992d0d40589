r"""Inequalities as sets of numbers: `x < 1 or x > 3` is (-\infty, 1) \cup (3, \infty)."""

from __future__ import annotations

import itertools
from typing import Any

from megatron_nft.verify.algebra.tree import Tree
from megatron_nft.verify.algebra.values import Undecided, mp, symbols, values_at_points

FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
ORDERS = frozenset(("<", ">", "<=", ">="))
_MINUS_INFINITY: Tree = ("-", ("inf",))
_INFINITY: Tree = ("inf",)


def variable(relation: Tree) -> Tree:
    """The symbol that a chain of inequalities, or a membership, is about."""
    return next((side for side in relation[2:] if side[0] == "s"), ("s", ""))


def region(relation: Tree) -> Tree | None:
    r"""The numbers that `x \in [1, 2)`, `1 <= x < 2`, `x > 3` or `x \ne 3` allow; None for other relations."""
    signs, sides = relation[1], relation[2:]
    if signs == (r"\in",):
        return sides[1] if sides[0][0] == "s" else None
    if signs == ("!=",):
        if sides[0][0] != "s" or symbols(sides[1]) or sides[1][0] not in ("n", "-", "/", "*", "+", "root", "^"):
            return None
        return ("union", ("tuple", "(", ")", _MINUS_INFINITY, sides[1]), ("tuple", "(", ")", sides[1], _INFINITY))
    if not set(signs) <= ORDERS or len({sign[0] for sign in signs}) > 1:
        return None
    if signs[0][0] == ">":  # turn it round, so that it rises
        signs, sides = tuple(FLIPPED[sign] for sign in reversed(signs)), tuple(reversed(sides))
    names = [index for index, side in enumerate(sides) if side[0] == "s" and side[1] not in ("e", "i", "\\pi")]
    if len(names) != 1 or any(symbols(side) for index, side in enumerate(sides) if index != names[0]):
        return None
    at = names[0]
    low, high = (sides[0] if at == 1 else None), (sides[-1] if at == len(sides) - 2 else None)
    if at > 1 or at < len(sides) - 2:
        return None
    opening = "[" if low is not None and signs[0] == "<=" else "("
    closing = "]" if high is not None and signs[-1] == "<=" else ")"
    return ("tuple", opening, closing, low or _MINUS_INFINITY, high or _INFINITY)


def joined(items: tuple[Tree, ...]) -> Tree | None:
    r"""Inequalities of one variable as one membership: `x < 1, x > 3` is a union, `x > 1, x < 3` the interval between.

    Which of the two is meant shows in the numbers: inequalities without a common number are alternatives. None where
    that cannot be told.
    """
    if len(items) < 2 or any(item[0] != "rel" or not set(item[1]) <= ORDERS for item in items):
        return None
    intervals = [region(item) for item in items]
    if None in intervals or len({variable(item) for item in items}) > 1:
        return None
    try:
        ends = [(values_at_points(i[3])[0][0], values_at_points(i[4])[0][0]) for i in intervals]
    except Undecided:
        return None
    if not all(isinstance(end, mp.mpf) for pair in ends for end in pair):
        return None
    order = sorted(range(len(items)), key=lambda index: ends[index])
    if all(_apart(intervals[a], ends[a], intervals[b], ends[b]) for a, b in itertools.pairwise(order)):
        whole: Tree | None = ("union", *(intervals[index] for index in order))
    else:
        whole = _common(intervals, ends) if len(items) == 2 else None
    return None if whole is None else ("rel", (r"\in",), variable(items[0]), whole)


def _apart(first: Tree, first_ends: tuple[Any, Any], second: Tree, second_ends: tuple[Any, Any]) -> bool:
    """Whether the second interval starts where the first one has ended."""
    if first_ends[1] == second_ends[0]:
        return first[2] == ")" or second[1] == "("
    return first_ends[1] < second_ends[0]


def _common(intervals: list[Tree], ends: list[tuple[Any, Any]]) -> Tree | None:
    """The intersection of two rays that point at each other."""
    (low, low_ends), (high, high_ends) = sorted(zip(intervals, ends, strict=True), key=lambda pair: pair[1])[::-1]
    if low[4] != _INFINITY or high[3] != _MINUS_INFINITY or low_ends[0] >= high_ends[1]:
        return None
    return ("tuple", low[1], high[2], low[3], high[4])
