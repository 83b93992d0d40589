r"""Named quantities: left sides that only say what the right side is the value of, as in `|AB| = 7` or `f(x) = 2x`."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_nft.verify.algebra.tree import Tree
from megatron_nft.verify.algebra.values import symbols

_TRIGONOMETRIC = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))
_VALUES = frozenset(("n", "s", "/", "*", "+", "-", "^", "root"))
_COORDINATES = frozenset("xyz")  # an equation in these may be a curve
_VARIABLES = frozenset("xyztunmks")  # letters that stand for any number; the A of P(A) is a certain thing
_indexed = re.compile(r"(.+_)([A-Za-z])$|(.+_)((?:\d*[-+])?\d*)([A-Za-z])([-+]\d+)$")  # a_n, a_n+1


def is_name(tree: Tree) -> bool:
    r"""Whether a left side is only the name of what the right side gives: x, f(x), m_{max}, ABC, |AB|, V_1 : V_2.

    Sums with coefficients and powers of x are not, because `2x + 3y = 0` and `x^2 = 4` say more than their right sides.
    """
    kind = tree[0]
    if kind in ("s", "app", "text", "unit", "prose"):
        return True
    if kind == "tuple":  # (x, y)
        return all(part[0] == "s" for part in tree[3:])
    if kind == "bind":  # \lim_{x \to 0} f(x); with another letter it may be an equation for this one
        return not symbols(tree)
    if kind in ("ratio", "fn"):  # a : b : c, gcd(a, b)
        return all(map(is_name, tree[1 if kind == "ratio" else 2 :]))
    if kind == "*":
        return all(part[0] in ("s", "app") or _is_segment_squared(part) for part in tree[1:])
    if kind == "/":
        return bool(symbols(tree)) and (_is_derivative(tree) or all(_is_part_of_ratio(side) for side in tree[1:]))
    if kind == "f":
        of_x = tree[2] in (("s", "x"), ("s", "y"))
        return (tree[1] == "abs" and not of_x and is_name(tree[2])) or (tree[1] in _TRIGONOMETRIC and is_name(tree[2]))
    if kind == "+":
        plain = {part[1] for part in tree[1:] if part[0] == "s"} - _COORDINATES
        segments = {part for part in tree[1:] if part[0] == "*" and all(map(_is_capital, part[1:]))}  # AB + BC
        return len(plain) + len(segments) == len(tree) - 1
    return _is_segment_squared(tree) or (kind == "^" and tree[1][:2] == ("f", "abs") and is_name(tree[1]))


def _is_part_of_ratio(tree: Tree) -> bool:
    return tree[0] in ("s", "app", "*", "f", "/") and is_name(tree)


def _is_segment_squared(tree: Tree) -> bool:
    """Whether a tree is a capital letter with an exponent, as the last factor of AB^2."""
    return bool(tree[0] == "^" and _is_capital(tree[1]) and tree[2][0] == "n")


def _is_capital(tree: Tree) -> bool:
    return bool(tree[0] == "s" and tree[1][:1].isupper())


def _is_derivative(tree: Tree) -> bool:
    return all(side[0] == "*" and side[1] == ("s", "d") for side in tree[1:])


def with_names_of(gold: Tree, found: Tree) -> Tree:
    """Return the relation `found` with the arguments of its left side called as in `gold`: f(n) = 2n as f(x) = 2x.

    It is returned unchanged where the left sides differ in more than that, or where a letter would get two meanings,
    or where the letters may be given things: P(B) = 1/3 is not P(A) = 1/3.
    """
    if _length_of(gold[2]) == _length_of(found[2]):  # |AB| is AB
        return (*found[:2], gold[2], *found[3:])
    if turned := _turned(gold, found):
        return turned
    theirs, ours = _arguments(gold[2]), _arguments(found[2])
    if not theirs or not ours or theirs[0] != ours[0] or len(theirs) != len(ours):
        return found
    renamed = {old: new for old, new in zip(ours[1:], theirs[1:], strict=True) if old != new}
    if not renamed or len(set(ours)) != len(ours) or len(set(theirs)) != len(theirs):
        return found
    if any(new in symbols(found) and new not in renamed for new in renamed.values()):
        return found
    right: Tree = found[3:]
    for old, new in renamed.items():
        if not {old, new} <= _VARIABLES and rename(right, {old: new}) == right:
            return found
    return rename(found, renamed)


def _turned(gold: Tree, found: Tree) -> Tree | None:
    """Return `V_2 : V_1 = 8:3` as `V_1 : V_2 = 3:8` if `gold` gives that ratio; None for what is no such ratio."""
    ours, theirs = found[2], gold[2]
    if ours[0] != theirs[0] or len(found) != 4 or found[1] != ("=",):
        return None
    if ours[0] == "/" and ours[1:] == theirs[:0:-1] and is_name(ours):
        return (*found[:2], theirs, ("/", ("n", Fraction(1)), found[3])) if found[3][0] in _VALUES else None
    if ours[0] == found[3][0] == "ratio" and len(ours) == len(found[3]) == len(theirs) and set(ours) == set(theirs):
        terms = dict(zip(ours[1:], found[3][1:], strict=True))
        return (*found[:2], theirs, ("ratio", *(terms[name] for name in theirs[1:])))
    return None


def _length_of(side: Tree) -> Tree:
    """Return AB of |AB|; another tree unchanged."""
    segment = side[:2] == ("f", "abs") and side[2][0] == "*" and all(map(_is_capital, side[2][1:]))
    inner: Tree = side[2] if segment else side
    return inner


def _arguments(tree: Tree) -> tuple[str, ...]:
    """Return ("f", "x", "y") for f(x, y) and ("a_", "n") for a_n and a_{n+1}; () for other names."""
    if tree[0] == "app" and all(part[0] == "s" for part in tree[2:]):
        return (tree[1], *(part[1] for part in tree[2:]))
    indexed = _indexed.match(tree[1]) if tree[0] == "s" else None
    if indexed is None:
        return ()
    return (indexed[1], indexed[2]) if indexed[1] else (f"{indexed[3]}{indexed[4]}{indexed[6]}", indexed[5])


def rename(tree: Tree, names: dict[str, str]) -> Tree:
    """Return a tree with other names for its symbols, and for their indices: n to k makes a_n + n into a_k + k."""
    if tree[0] == "s":
        if tree[1] in names:
            return ("s", names[tree[1]])
        indexed = _indexed.match(tree[1])
        if indexed is None or (letter := indexed[2] or indexed[5]) not in names:
            return tree
        if indexed[1]:
            return ("s", indexed[1] + names[letter])
        return ("s", f"{indexed[3]}{indexed[4]}{names[letter]}{indexed[6]}")
    if tree[0] == "bind" and tree[2] in names:  # a letter of its own
        names = {old: new for old, new in names.items() if old != tree[2]}
    return tuple(rename(part, names) if isinstance(part, tuple) and part else part for part in tree)


def has_letters(tree: Tree) -> bool:
    """Whether a tree lists equations for different letters, as `x = 3, y = 4` does; `x_1 = 3, x_2 = 4` does not."""
    items = tree[1:]
    if tree[0] != "list" or not all(item[0] == "rel" and item[1] == ("=",) and item[2][0] == "s" for item in items):
        return False
    names = [item[2][1] for item in items]
    return len(set(names)) == len(names) and all(len(name) == 1 for name in names)


def by_name(tree: Tree) -> Tree:
    """Return equations for different letters, `y = 3, x = 2`, in the order of the letters; other trees unchanged."""
    return ("list", *sorted(tree[1:], key=lambda item: str(item[2][1]))) if has_letters(tree) else tree


def points_of(tree: Tree) -> Tree:
    """Return `p = 3, q = 8, p = 5, q = 1`, in which the names repeat, as the list of the points (3, 8) and (5, 1)."""
    items = tree[1:]
    if tree[0] != "list" or len(items) < 4 or not all(item[0] == "rel" and item[1] == ("=",) for item in items):
        return tree
    names = [item[2] for item in items]
    size = next((index for index, name in enumerate(names) if index and name == names[0]), len(names))
    if size in (1, len(names)) or len(set(names)) != size or names != names[:size] * (len(names) // size):
        return tree
    starts = range(0, len(items), size)
    return ("list", *(("tuple", "(", ")", *(item[3] for item in items[at : at + size])) for at in starts))
