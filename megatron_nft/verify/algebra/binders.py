r"""Read sums, products, integrals and limits.

    ("bind", "sum", "k", lower, upper, body)      \sum_{k=1}^n k^2; bounds that are not given are left out

The name of a bound variable means nothing, so that `\sum_i i^2` is `\sum_k k^2`. An index that holds a bound variable
becomes an argument: within a sum over k, `a_k` is read as a(k).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from megatron_nft.verify.algebra.tree import NotUnderstood, Tree

if TYPE_CHECKING:
    from megatron_nft.verify.algebra.parse import Parser

BINDERS = frozenset(("sum", "prod", "int", "lim"))
_SIGNS = frozenset(("<", "<=", ">", ">=", "!=", "|", r"\in"))
_CLOSING = {"(": ")", r"\{": r"\}", "{": "}", "[": "]"}
_term = re.compile(r"([+-]?)(\d*)([A-Za-z]?)")


def binder(parser: Parser, name: str) -> Tree:
    """Read a sum, product, integral or limit behind its command."""
    if name == "int":
        return _integral(parser)
    if name == "lim":
        variable, bounds = _variable(parser, r"\to")
        return _bound("lim", variable, bounds, parser.product())
    variable, bounds = "", []
    if chain := _chain(parser):
        return _bound_chain(name, *chain, parser.product())
    for _ in range(2):
        if parser.peek() == "_" and not variable:
            variable, bounds = _variable(parser, "=")
        elif parser.peek() == "^":
            parser.at += 1
            bounds.append(_limit(parser))
    if not variable:
        raise NotUnderstood(f"a {name} without a variable")
    return _bound(name, variable, bounds, parser.product())


def _variable(parser: Parser, sign: str) -> tuple[str, list[Tree]]:
    r"""Read `_k`, `_{k}`, `_{k=1}` or `_{x \to 0}`: the variable, and its lower bound or limit."""
    parser.expect("_")
    if parser.peek() != "{":
        name = parser.take()
        if not name.isalpha():
            raise NotUnderstood("a sum without a variable")
        return name, []
    parser.at += 1
    name = parser.take()
    if not (name.isalpha() and len(name) == 1):
        raise NotUnderstood("a sum without a variable")
    bounds = []
    if parser.peek() == sign:
        parser.at += 1
        bounds.append(parser.sum())
    elif parser.peek() == ">=" and sign == "=":  # from there on
        parser.at += 1
        bounds += [parser.sum(), ("inf",)]
    parser.expect("}")
    return name, bounds


def _chain(parser: Parser) -> tuple[str, list[str], list[Tree]] | None:
    r"""Read the condition of `_{d \mid n}`, `_{i \in S}` or `_{1 \le i < j \le n}`; take nothing of other subscripts.

    Returns the signs, the bound variables (the first letter, or those between two signs) and the other sides.
    """
    start = parser.at
    end = next((i for i in range(start, len(parser.tokens)) if parser.tokens[i] == "}"), start)
    inner = parser.tokens[start + 2 : end]
    signs = [token for token in inner if token in _SIGNS]
    if parser.tokens[start : start + 2] != ["_", "{"] or not signs or signs == [">="] or "{" in inner:
        return None
    sides: list[list[str]] = [[]]
    for token in inner:
        if token in _SIGNS:
            sides.append([])
        else:
            sides[-1].append(token)
    variables = sides[1:-1] if len(sides) > 2 else sides[:1]
    if not all(len(side) == 1 and side[0].isalpha() and len(side[0]) == 1 for side in variables):
        raise NotUnderstood("a sum without a variable")
    others = [side for side in sides if side not in variables]
    parser.at = end + 1
    bounds = [type(parser)(side).parse() for side in others]
    return " ".join(signs), [side[0] for side in variables], bounds


def _bound_chain(kind: str, signs: str, variables: list[str], bounds: list[Tree], body: Tree) -> Tree:
    """Return nested sums, one for each variable; the bounds stand in the innermost one."""
    for variable in reversed(variables):
        body = _bound(f"{kind} {signs}", variable, bounds, body)
        bounds = []
    return body


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


def index_terms(index: str) -> list[dict[str, int]] | None:
    """Read an index such as `n-1-k` or `i,j`: for each part the factor of each letter, "" for the number.

    Letters that stand side by side are indices of their own: `ij`. None for names such as `max`.
    """
    parts = index.split(",")
    if index.isalpha() and len(index) == 2:
        parts = list(index)
    read = [_terms(part.strip()) for part in parts]
    known = [part for part in read if part]
    return known if len(known) == len(read) else None


def _terms(text: str) -> dict[str, int] | None:
    found: dict[str, int] = {}
    at = 0
    while at < len(text):
        match = _term.match(text, at)
        if (
            match is None
            or match.end() == at
            or not (match[2] or match[3])
            or (at and not match[1])
            or len(match[2]) > 9
        ):
            return None
        number = int(match[2] or 1) * (-1 if match[1] == "-" else 1)
        found[match[3]] = found.get(match[3], 0) + number
        at = match.end()
    return found


def canonical_index(index: str) -> str:
    """Return one spelling of an index: `n-k-1` for `n-1-k`. Names such as `max` are kept."""
    if "+" not in index and "-" not in index:
        return index
    parts = index_terms(index)
    return index if parts is None else ",".join(map(_written, parts))


def _written(terms: dict[str, int]) -> str:
    text = ""
    for letter in sorted(terms, key=lambda letter: (not letter, letter)):
        if number := terms[letter]:
            size = "" if abs(number) == 1 and letter else str(abs(number))
            text += ("-" if number < 0 else "+" if text else "") + size + letter
    return text or "0"
