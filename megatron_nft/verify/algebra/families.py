r"""Answers that a letter runs through: `k\pi, k \in \mathbb{Z}`, `\{x \mid x^2 > 2\}`, `\bigcup_{n=1}^\infty (n, n+1)`.

    ("family", element, condition, domain, ("s", "k"), ...)

condition and domain are ("all",) where they are not given. The letters mean nothing outside, so that k may be n.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from megatron_nft.verify.algebra.binders import conditions, index_and_bounds
from megatron_nft.verify.algebra.names import rename
from megatron_nft.verify.algebra.parse import Parser
from megatron_nft.verify.algebra.tree import NotUnderstood, Tree
from megatron_nft.verify.algebra.values import symbols

ALL: Tree = ("all",)
BIG = frozenset((r"\bigcup", r"\bigcap"))
MAX_LETTERS = 3
_NUMBER_SETS = frozenset(("Z", "N", "R", "Q", "C"))

Same = Callable[[Tree, Tree], bool]


def number_set(membership: Tree) -> tuple[Tree, str] | None:
    r"""Return the letter and the set of `k \in \mathbb{Z}`; None for what says more than which kind of number it is."""
    if membership[0] != "rel" or membership[1] != (r"\in",):
        return None
    if membership[3] == ("reals",):
        return membership[2], "R"
    name = membership[3][1].removeprefix("mathbb:") if membership[3][0] == "s" else ""
    return (membership[2], name) if name in _NUMBER_SETS else None


def with_domain(answer: Tree, memberships: list[tuple[Tree, str]]) -> Tree:
    r"""Return an answer whose letters are said to be numbers of a kind, such as `k\pi, k \in \mathbb{Z}`, as a family.

    An unknown that the answer is the value of is not such a letter: `x = 3, x \in \mathbb{R}`.
    """
    relations = answer[1:] if answer[0] == "list" else (answer,)
    asked_for = {relation[2] for relation in relations if relation[0] == "rel"}
    letters = [letter for letter, _ in memberships if letter[0] == "s" and letter not in asked_for]
    if not letters or not symbols(answer).issuperset(name for _, name in letters):
        return answer
    return ("family", answer, ALL, ("s", memberships[0][1]), *letters)


def set_builder(element: Tree, condition: Tree) -> Tree:
    r"""Return `\{x \mid x > 2\}`, `\{(x, y) : y = x^2\}` or `\{2k : k \in \mathbb{Z}\}` as a family."""
    domain = ALL
    if (kind := number_set(element)) is not None:
        element, domain = kind[0], ("s", kind[1])
    if (kind := number_set(condition)) is not None:
        condition, domain = ALL, ("s", kind[1])
        letters = [kind[0]]
    else:
        if condition[0] == "family":
            _, condition, _, domain, *_ = condition
        names = symbols(element) & symbols(condition)
        letters = [part for part in _parts(element) if part[0] == "s" and part[1] in names]
        letters += [("s", name) for name in sorted(names) if ("s", name) not in letters]
    return ("family", element, condition, domain, *letters) if letters else condition


def big_union(tokens: list[str], read: Callable[[list[str]], Tree]) -> Tree:
    r"""Read `\bigcup_{n=1}^\infty (n, n+1)` and `\bigcap_{i \in S} A_i`."""
    parser = Parser(tokens[1:])
    condition = conditions(parser)
    if condition is None:
        variables, bounds = index_and_bounds(parser)
        shape = "="
    else:
        signs, sides = condition
        variables, bounds = sides[0], [Parser(side).parse() for side in sides[1:]]
        shape = "".join(signs)
    if len(variables) != 1 or not variables[0].isalpha():
        raise NotUnderstood(f"a {tokens[0]} without a variable")
    letter: Tree = ("s", variables[0])
    body = read(parser.tokens[parser.at :])
    kind = number_set(("rel", (shape,), letter, *bounds)) if len(bounds) == 1 else None
    if kind is not None and tokens[0] == r"\bigcup":
        return ("family", body, ALL, ("s", kind[1]), letter)
    return ("family", body, ("app", f"{tokens[0]}{shape}", *bounds), ALL, letter)


def same_family(gold: Tree, found: Tree, same: Same) -> bool:
    """Whether two answers, of which one at least is a family, are the same; `same` compares their parts."""
    gold, found = _members(gold), _members(found)
    if gold[0] != "family":
        return any(same(gold, part) for part in _plainly(found))
    if found[0] != "family":
        return any(same(part, found) for part in _plainly(gold))
    letters, others = gold[4:], found[4:]
    if len(letters) != len(others) or len(letters) > MAX_LETTERS:
        return False
    if ALL not in (gold[3], found[3]) and gold[3] != found[3]:
        return False
    if (gold[2] == ALL) != (found[2] == ALL):
        return False
    return any(
        _same_with(gold, found, {theirs[1]: ours[1] for theirs, ours in zip(order, letters, strict=True)}, same)
        for order in itertools.permutations(others)
    )


def _same_with(gold: Tree, found: Tree, names: dict[str, str], same: Same) -> bool:
    """Whether the families are the same if the letters of `found` are called so; no letter may get two meanings."""
    if any(new in symbols(found) and new not in names for new in names.values()):
        return False
    renamed = rename(found[1:3], names)
    return same(gold[1], renamed[0]) and (gold[2] == ALL or same(gold[2], renamed[1]))


def _members(answer: Tree) -> Tree:
    r"""Return the family of `x \in \{2k : k \in \mathbb{Z}\}`; another answer unchanged."""
    is_membership = answer[0] == "rel" and answer[1] == (r"\in",) and answer[3][0] == "family"
    inner: Tree = answer[3] if is_membership else answer
    return inner


def _parts(element: Tree) -> tuple[Tree, ...]:
    return element[3:] if element[0] == "tuple" else (element,)


def _plainly(family: Tree) -> list[Tree]:
    r"""Return what a family says if its letter is not mentioned: `x > 2` for `\{x \mid x > 2\}`, else its element."""
    _, element, condition, _, *letters = family
    if condition == ALL:
        return [element]
    return [condition] if set(_parts(element)) <= set(letters) else []
