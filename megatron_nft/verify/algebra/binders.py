r"""Read sums, products, integrals and limits.

    ("bind", "sum", "k", lower, upper, body)      \sum_{k=1}^n k^2; bounds that are not given are left out

The name of a bound variable means nothing, so that `\sum_i i^2` is `\sum_k k^2`. An index that holds a bound variable
becomes an argument: within a sum over k, `a_k` is read as a(k).
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from megatron_nft.verify.algebra.indices import index_letters, index_terms
from megatron_nft.verify.algebra.tree import NotUnderstood, Tree

if TYPE_CHECKING:
    from megatron_nft.verify.algebra.parse import Parser

BINDERS = frozenset(("sum", "prod", "int", "lim"))
_SIGNS = frozenset(("<", "<=", ">", ">=", "!=", "|", r"\in"))
_DESCENDING = frozenset((">", ">="))
_ORDERS = _DESCENDING | {"<", "<=", "!="}
_DEPTH = {"{": 1, "}": -1}
_CLOSING = {"(": ")", r"\{": r"\}", "{": "}", "[": "]"}


def binder(parser: Parser, name: str) -> Tree:
    """Read a sum, product, integral or limit behind its command."""
    if name == "int":
        return _integral(parser)
    if name == "lim":
        variables, bounds = _variables(parser, r"\to")
        return _bound("lim", variables[0], bounds, parser.product())
    if condition := conditions(parser):
        return _bound_by_condition(parser, name, *condition)
    variables, bounds = index_and_bounds(parser)
    if not variables:
        raise NotUnderstood(f"a {name} without a variable")
    body = parser.product()
    for variable in reversed(variables):
        body = _bound(name, variable, bounds, body)
    return body


def index_and_bounds(parser: Parser) -> tuple[list[str], list[Tree]]:
    r"""Read `_{k=1}^n`, `_{i,j}` or `_k`: the variables, none without a subscript, and the bounds that are given."""
    variables: list[str] = []
    bounds: list[Tree] = []
    for _ in range(2):
        if parser.peek() == "_" and not variables:
            variables, lower = _variables(parser)
            bounds = lower + bounds
        elif parser.peek() == "^":
            parser.at += 1
            bounds.append(_limit(parser))
    return variables, bounds


def _variables(parser: Parser, sign: str = "=") -> tuple[list[str], list[Tree]]:
    r"""Read `_k`, `_{i,j}`, `_{k=1}` or `_{x \to 0}`: the variables, and their lower bound or limit."""
    parser.expect("_")
    if parser.peek() != "{":
        name = parser.take()
        if not name.isalpha():
            raise NotUnderstood("a sum without a variable")
        return [name], []
    names: list[str] = []
    while not names or (parser.peek() == "," and sign == "="):
        parser.at += 1
        names.append(parser.take())
    if not all(name.isalpha() and len(name) == 1 for name in names):
        raise NotUnderstood("a sum without a variable")
    bounds: list[Tree] = []
    if parser.peek() == sign:
        parser.at += 1
        bounds.append(parser.sum())
    elif parser.peek() == ">=" and sign == "=":  # from there on
        parser.at += 1
        bounds += [parser.sum(), ("inf",)]
    parser.expect("}")
    return names, bounds


def conditions(parser: Parser) -> tuple[list[str], list[list[str]]] | None:
    r"""Read the condition of `_{d \mid n}`, `_{i \in S}` or `_{1 \le i < j \le n}`; take nothing of other subscripts.

    Returns the signs and the tokens of the sides.
    """
    start = parser.at
    if parser.tokens[start : start + 2] != ["_", "{"]:
        return None
    depth, end = 1, start + 2
    while end < len(parser.tokens) and (depth := depth + _DEPTH.get(parser.tokens[end], 0)):
        end += 1
    signs: list[str] = []
    sides: list[list[str]] = [[]]
    for token in parser.tokens[start + 2 : end]:
        if token in _SIGNS:
            signs.append(token)
            sides.append([])
        else:
            sides[-1].append(token)
    if not signs or signs == [">="]:
        return None
    parser.at = end + 1
    return signs, sides


def _bound_by_condition(parser: Parser, kind: str, signs: list[str], sides: list[list[str]]) -> Tree:
    """Return nested sums, one for each variable; the bounds stand in the innermost one.

    Variables are the first side, or those between two signs, and letters of an order that are indices in the summand:
    both letters of `i < j` below a sum of `x_i x_j`, but not the n of `d | n`.
    """
    body = parser.product()
    inner = sides[1:-1] if len(sides) > 2 else sides[:1] if _letters_of(sides[0]) else sides[1:]
    indices = index_letters(body) if set(signs) <= _ORDERS else set()
    if set(signs) <= _DESCENDING:
        signs, sides = [sign.replace(">", "<") for sign in reversed(signs)], sides[::-1]
    variables: list[str] = []
    bounds: list[Tree] = []
    shape = kind
    for side, sign in zip(sides, [*signs, ""], strict=True):
        letters = _letters_of(side)
        if side in inner or (letters and indices.issuperset(letters)):
            if not letters:
                raise NotUnderstood("a sum without a variable")
            variables += letters
            shape += f" .{sign}"
        else:
            bounds.append(type(parser)(side).parse())
            shape += f" _{sign}"
    for variable in reversed(variables):
        body = _bound(shape, variable, bounds, body)
        bounds = []
    return body


def _letters_of(side: list[str]) -> list[str]:
    """Return i and j of the side `i, j`; nothing for a side that is more than letters."""
    letters = side[::2]
    is_list = all(token == "," for token in side[1::2]) and len(side) % 2 == 1
    return letters if is_list and all(letter.isalpha() and len(letter) == 1 for letter in letters) else []


def _limit(parser: Parser) -> Tree:
    r"""Read a bound: a group or a single token, because `_0^1` is not a power."""
    if parser.peek() == "{":
        return parser.bracketed()
    token = parser.take()
    if token.isalpha():
        return ("s", token)
    parser.at -= 1
    return parser.atom()


def _integral(parser: Parser) -> Tree:
    r"""Read `_0^1 f(x) dx`, with the differential at the end of a product."""
    bounds: dict[str, Tree] = {}
    while (sign := parser.peek()) in ("_", "^") and sign not in bounds:
        parser.at += 1
        bounds[sign] = _limit(parser)
    if parser.tokens[parser.at : parser.at + 3] == [r"\frac", "{", "d"]:  # \frac{dx}{x}
        return _reciprocal(parser, bounds)
    end = _differential(parser)
    variable = parser.tokens[end + 1]
    if end == parser.at:
        body: Tree = ("n", Fraction(1))
    else:
        inner = type(parser)(parser.tokens[parser.at : end])
        inner.depth = parser.depth + 1
        body = inner.parse()
    parser.at = end + 2
    given = [bounds[sign] for sign in ("_", "^") if sign in bounds]
    return _bound("int", variable, given, body)


def _reciprocal(parser: Parser, bounds: dict[str, Tree]) -> Tree:
    parser.at += 3
    variable = parser.take()
    parser.expect("}")
    body: Tree = ("/", ("n", Fraction(1)), parser.argument())
    return _bound("int", variable, [bounds[sign] for sign in ("_", "^") if sign in bounds], body)


def _differential(parser: Parser) -> int:
    """Return the index of the `d` of the `dx` that ends this integral, outside brackets and inner integrals."""
    depth = inner = 0
    for index in range(parser.at, len(parser.tokens) - 1):
        token = parser.tokens[index]
        depth += (token in _CLOSING) - (token in _CLOSING.values())
        if depth < 0:
            break
        following = parser.tokens[index + 1]
        if depth == 0 and token == r"\int":
            inner += 1
        if depth == 0 and token == "d" and ((following.isalpha() and len(following) == 1) or following in _GREEK):
            if not inner:
                return index
            inner -= 1
    raise NotUnderstood("an integral without a differential")


_GREEK = frozenset((r"\theta", r"\phi", r"\tau", r"\omega", r"\alpha", r"\xi", r"\mu", r"\lambda"))


def _bound(kind: str, variable: str, bounds: list[Tree], body: Tree) -> Tree:
    return ("bind", kind, variable, *bounds, _with_arguments(body, variable))


def _with_arguments(tree: Tree, variable: str) -> Tree:
    """Return a tree in which indices that hold `variable` are arguments: `a_k` as a(k), `a_{n-k}` as a(n - k)."""
    if tree[0] == "s":
        name, _, index = tree[1].partition("_")
        terms = index_terms(index) if index else None
        if not terms or variable not in {letter for part in terms for letter in part}:
            return tree
        return ("app", f"{name}_", *(_linear(part) for part in terms))
    return tuple(_with_arguments(part, variable) if isinstance(part, tuple) and part else part for part in tree)


def _linear(terms: dict[str, int]) -> Tree:
    parts = [
        ("n", Fraction(number)) if not letter else ("*", ("n", Fraction(number)), ("s", letter))
        for letter, number in terms.items()
    ]
    return parts[0] if len(parts) == 1 else ("+", *parts)
