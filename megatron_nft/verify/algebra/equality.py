"""Whether two answers, read by answer.py, are the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from megatron_nft.verify.algebra.comparison import proportional
from megatron_nft.verify.algebra.exact import exact
from megatron_nft.verify.algebra.families import same_family
from megatron_nft.verify.algebra.names import by_name, has_letters, is_name, points_of, with_names_of
from megatron_nft.verify.algebra.quantity import is_rounded, same_quantity
from megatron_nft.verify.algebra.regions import FLIPPED, ORDERS, combine_inequalities, region, variable
from megatron_nft.verify.algebra.tree import Tree
from megatron_nft.verify.algebra.values import OutOfRange, has, symbols

_MAX_ITEMS = 200
_MAX_SIGNS = 6
_ARITHMETIC = frozenset(("+", "-", "*", "/", "^", "root"))
_LEAVES = frozenset(("n", "s"))
_STRUCTURES = frozenset(("list", "tuple", "set", "union", "matrix", "reals"))


def same(gold: Tree, found: Tree) -> bool:
    """Whether `found` is the same answer as the reference `gold`. Raises Undecided where a value cannot be computed."""
    if gold == found:
        return True
    if gold[0] == "family" or found[0] == "family":
        return same_family(gold, found, same)
    return any(_same_expanded(*pair) for pair in itertools.product(_expansions(gold), _expansions(found)))


def _same_expanded(gold: Tree, found: Tree) -> bool:
    if gold[0] in ("text", "prose") or found[0] in ("text", "prose"):
        return gold == found
    if gold[0] == "rel" or found[0] == "rel":
        return _same_relation(gold, found)
    if gold[0] == found[0] == "ratio":
        return _same_ratio(gold[1:], found[1:])
    if "ratio" in (gold[0], found[0]) and gold[0] != "list" != found[0]:
        return False
    if gold[0] in _STRUCTURES or found[0] in _STRUCTURES:
        return _same_structure(gold, found)
    return same_quantity(gold, found)


# ---------------------------------------------------------------------- lists, tuples, intervals, sets, matrices


def _same_structure(gold: Tree, found: Tree) -> bool:
    """Compare where at least one side is a list, tuple, set, union, matrix or all real numbers."""
    kinds = (gold[0], found[0])
    if kinds == ("matrix", "matrix"):
        return len(gold) == len(found) and all(_in_order(g, f) for g, f in zip(gold[1:], found[1:], strict=True))
    if "matrix" in kinds:
        return _is_vector_of(gold, found) or _is_vector_of(found, gold)
    if "reals" in kinds:
        other = gold if found[0] == "reals" else found
        return other[0] == "tuple" and other[3:] == (("-", ("inf",)), ("inf",))
    if kinds == ("tuple", "tuple"):
        return _same_brackets(gold, found) and _in_order(gold[3:], found[3:], rounded=True)
    if kinds == ("union", "union"):
        return _in_any_order(gold[1:], found[1:])
    if "union" in kinds:  # (1, 2), (3, 4) for the union of both
        other = gold if found[0] == "union" else found
        return other[0] == "list" and _in_any_order(gold[1:], found[1:])
    if "tuple" in kinds:
        listed = gold if found[0] == "tuple" else found
        ordered = gold if gold[0] == "tuple" else found
        plain = ordered[1:3] in (("(", ")"), (r"\langle", r"\rangle"), ("", ""))
        if listed[0] == "list":  # y = 3, x = 2 is (2, 3)
            gold, found = by_name(gold), by_name(found)
        return plain and listed[0] in ("list", "set") and _in_order(gold[-_count(gold) :], found[-_count(found) :])
    if kinds == ("list", "list") and has_letters(gold) and all(item[0] != "rel" for item in found[1:]):
        return _in_order(gold[1:], found[1:]) or _in_order(by_name(gold)[1:], found[1:])  # 4, 3 is not x = 3, y = 4
    if kinds == ("list", "list") or kinds == ("set", "set"):
        return _in_any_order(gold[1:], found[1:])
    if "set" in kinds:  # {1, 2} for 1, 2 and {5} for 5
        gold, found = (tree if tree[0] in ("list", "set") else ("list", tree) for tree in (gold, found))
        return _in_any_order(gold[1:], found[1:])
    return found[0] == "list" and all(same(gold, item) for item in found[1:])  # 5/3 or 1 2/3; else several for one


def _same_ratio(gold: Sequence[Tree], found: Sequence[Tree]) -> bool:
    """Whether any two terms have the same ratio in both."""
    if len(gold) != len(found) or [exact(term) == 0 for term in gold] != [exact(term) == 0 for term in found]:
        return False
    pairs = itertools.combinations(zip(gold, found, strict=True), 2)
    return all(same_quantity(("*", g, other_f), ("*", f, other_g)) for (g, f), (other_g, other_f) in pairs)


def _count(tree: Tree) -> int:
    return len(tree) - (3 if tree[0] == "tuple" else 1)


def _same_brackets(gold: Tree, found: Tree) -> bool:
    """Brackets matter where the tuple can be an interval; (1, 2, 3) and [1, 2, 3] are one vector."""
    angle = {r"\langle": "(", r"\rangle": ")"}
    brackets = [tuple(angle.get(bracket, bracket) for bracket in tree[1:3]) for tree in (gold, found)]
    return brackets[0] == brackets[1] or len(gold) != 5


def _is_vector_of(matrix: Tree, other: Tree) -> bool:
    """Whether `other` lists the entries of a matrix of one row or column."""
    if matrix[0] != "matrix" or other[0] not in ("tuple", "list"):
        return False
    rows = matrix[1:]
    if len(rows) > 1 and len(rows[0]) > 1:
        return False
    return _in_order([cell for row in rows for cell in row], other[-_count(other) :])


def _in_order(gold: Sequence[Tree], found: Sequence[Tree], *, rounded: bool = False) -> bool:
    """Whether both have the same elements in the same order; if `rounded`, decimals of three places are enough."""
    if len(gold) != len(found):
        return False
    return all(same(g, f) or (rounded and is_rounded(g, f)) for g, f in zip(gold, found, strict=True))


def _in_any_order(gold: Sequence[Tree], found: Sequence[Tree]) -> bool:
    """Whether both have the same elements, each the same number of times."""
    if len(gold) != len(found):
        return False
    if len(gold) > _MAX_ITEMS:
        raise OutOfRange(f"more than {_MAX_ITEMS} answers")
    left = list(found)
    for item in gold:
        match = next((index for index, candidate in enumerate(left) if same(item, candidate)), None)
        if match is None:
            return False
        del left[match]
    return True


def _expansions(tree: Tree) -> list[Tree]:
    r"""Return the tree without `\pm`; there are two readings of `(\pm 3, \pm 2)`: four points or two."""
    if tree[0] in ("tuple", "list", "set") and _has_sign(tree):
        return [_expand(tree, linked=False), _expand(tree, linked=True)]
    return [_expand(tree)]


def _expand(tree: Tree, linked: bool = True) -> Tree:
    r"""Write `1 \pm x` as the list of its two values, merged into a surrounding list or set.

    linked: the signs in a tuple are all upper or all lower ones, so that `(\pm 3, \pm 2)` is two points, not four.
    """
    if tree[0] == "tuple" and _has_sign(tree):
        sides = [[_signed(part, sign) for part in tree[3:]] for sign in (1, -1)]
        if linked:
            return ("list", *((*tree[:3], *side) for side in sides))
        choices = [(upper, lower) if upper != lower else (upper,) for upper, lower in zip(*sides, strict=True)]
        if len(choices) > _MAX_SIGNS:
            raise OutOfRange(f"a tuple of more than {_MAX_SIGNS} parts with signs")
        return ("list", *((*tree[:3], *point) for point in itertools.product(*choices)))
    if tree[0] in ("list", "set"):
        items: list[Tree] = []
        for item in points_of(tree)[1:]:
            expanded = _expand(item, linked)
            items.extend(expanded[1:] if expanded[0] == "list" else [expanded])
        found = (tree[0], *items)
        return combine_inequalities(found[1:]) or found if tree[0] == "list" else found
    if tree[0] == "rel" and tree[1] == ("=",) and _has_sign(tree[3]):
        return ("list", *(("rel", ("=",), tree[2], _signed(tree[3], sign)) for sign in (1, -1)))
    if tree[0] not in ("tuple", "union", "matrix", "rel", "text", "prose") and _has_sign(tree):
        return ("list", _signed(tree, 1), _signed(tree, -1))
    return tree


def _has_sign(tree: Tree) -> bool:
    if tree[0] in ("pm", "mp"):
        return True
    for part in tree:  # noqa: SIM110 (quicker than any(): all trees are looked through, and nearly all have none)
        if type(part) is tuple and _has_sign(part):
            return True
    return False


def _signed(tree: Tree, sign: int) -> Tree:
    r"""Replace every `\pm` by its upper sign (1) or its lower sign (-1), and every `\mp` by the other one."""
    parts = tuple(_signed(part, sign) if isinstance(part, tuple) else part for part in tree)
    if tree[0] in ("pm", "mp"):
        plus = (tree[0] == "pm") == (sign > 0)
        return ("+", parts[1], parts[2] if plus else ("-", parts[2]))
    return parts


# ---------------------------------------------------------------------- equations and inequalities


def _same_relation(gold: Tree, found: Tree) -> bool:
    """Compare where at least one side is a relation: `x = 5` also answers 5, and `x > 3` the interval (3, inf)."""
    if gold[0] == "rel" and found[0] == "rel":
        return _same_relations(gold, found)
    relation = gold if gold[0] == "rel" else found
    signs = relation[1]
    if signs == (r"\in",) or signs[0] in ORDERS or signs == ("!=",):
        values = [region(relation)]
    elif not is_name(relation[2]) and (relation is gold or _is_unsolved(relation)):
        values = []  # 0 is not an answer to 2x + 3y = 0, nor 2x = 14 to 14
    elif set(signs) <= {"=", r"\approx", r"\equiv"}:
        values = [relation[-1]]
        if r"\approx" in signs:
            values.append(relation[signs.index(r"\approx") + 2])
    else:
        values = []
    for value in values:
        if value is not None and (same(value, found) if relation is gold else same(gold, value)):
            return True
    return False


def _is_unsolved(relation: Tree) -> bool:
    """Whether a relation is an equation in one letter or in x, y and z, such as `2x = 14`, or one with coefficients.

    A chain of equations is not, because its end was computed. A sum of letters, also x + y, is what some questions ask
    for, and so are `a^2 + b^2` and `f(1) + f(2)`, but not `2a + 3b`.
    """
    left = relation[2]
    letters = symbols(left)
    if left[0] == "bind" and letters and _is_arithmetic(left[-1]):  # for which n is the sum 5?
        return True
    is_sum_of_letters = left[0] == "+" and all(part[0] == "s" for part in left[1:])
    if len(relation) > 4 or is_sum_of_letters or not (letters or has(left, "app")):
        return False
    if any((len(name) > 1 and name.isalpha()) or name in "fgh" for name in letters):  # words, and f of f^{-1}(2)
        return False
    if _is_arithmetic(left) and (len(letters) == 1 or letters <= set("xyz")):
        return True
    return _has_coefficient(left) and _is_arithmetic(left, _LEAVES | {"app"})


def _has_coefficient(tree: Tree) -> bool:
    """Whether a number stands in a tree other than as an exponent, the degree of a root or the 1 of 1/a."""
    if tree[0] in ("n", "app"):
        return bool(tree[0] == "n")
    if tree[0] in ("^", "root"):
        return _has_coefficient(tree[1 if tree[0] == "^" else 2])
    parts = tree[2:] if tree[0] == "/" and tree[1] == ("n", 1) else tree[1:]
    return any(_has_coefficient(part) for part in parts if isinstance(part, tuple))


def _is_arithmetic(tree: Tree, leaves: frozenset[str] = _LEAVES) -> bool:
    if tree[0] in leaves:
        return True
    inner = tree[2:] if tree[:2] == ("f", "abs") else tree[1:]
    return (tree[0] in _ARITHMETIC or inner != tree[1:]) and all(_is_arithmetic(part, leaves) for part in inner)


def _same_relations(gold: Tree, found: Tree) -> bool:
    """Compare two relations: equations up to a factor, inequalities as sets of numbers."""
    found = with_names_of(gold, found)
    gold_signs, found_signs = set(gold[1]), set(found[1])
    if gold_signs == found_signs == {"="}:
        if is_name(gold[2]) and is_name(found[2]) and gold[2] != found[2] and len(gold) == len(found) == 4:
            return _proportional(gold, found, sign_matters=False)
        if is_name(gold[2]) and gold[2] == found[2]:
            return same(gold[-1], found[-1])
        return len(gold) == len(found) == 4 and _proportional(gold, found, sign_matters=False)
    first, second = region(gold), region(found)
    if first is not None and second is not None:
        return variable(gold) == variable(found) and same(first, second)
    if len(gold) == len(found) == 4 and gold_signs | found_signs <= set(FLIPPED):
        if gold[1] == found[1]:
            return _proportional(gold, found, sign_matters=gold[1][0] in ORDERS)
        if FLIPPED[gold[1][0]] == found[1][0]:
            return _proportional(gold, ("rel", gold[1], found[3], found[2]), sign_matters=True)
        return False
    return gold[1] == found[1] and _in_order(gold[2:], found[2:])


def _proportional(gold: Tree, found: Tree, *, sign_matters: bool) -> bool:
    """Whether the differences of the two sides are equal up to a constant factor, positive if `sign_matters`."""
    if any(side[0] in _STRUCTURES | {"text", "prose", "unit"} for side in (*gold[2:], *found[2:])):
        turned = not sign_matters and _in_order(gold[2:], found[:1:-1])
        return turned or _in_order(gold[2:], found[2:])
    differences = [("+", tree[2], ("-", tree[3])) for tree in (gold, found)]
    names = [symbols(difference) for difference in differences]
    if names[0] != names[1] or not names[0]:
        return False
    sign = proportional(*differences)
    return sign > 0 or (sign < 0 and not sign_matters)
