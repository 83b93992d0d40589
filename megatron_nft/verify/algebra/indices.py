"""Indices of symbols: the `n-1-k` of `C_{n-1-k}`, as the parts of a symbol's name."""

from __future__ import annotations

import re

from megatron_nft.verify.algebra.tree import Tree
from megatron_nft.verify.algebra.values import symbols

_term = re.compile(r"([+-]?)(\d*)([A-Za-z]?)")


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


def index_letters(tree: Tree) -> set[str]:
    """Return the letters of indices in a tree: i and j of `x_i x_j`, also where sums within it have bound them."""
    if tree[0] == "s":
        terms = index_terms(tree[1].partition("_")[2]) or []
        return {letter for part in terms for letter in part}
    if tree[0] == "app" and tree[1].endswith("_"):
        return set().union(*map(symbols, tree[2:]))
    return set().union(*(index_letters(part) for part in tree[1:] if isinstance(part, tuple) and part))
