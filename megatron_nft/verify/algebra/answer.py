r"""Read a normalised answer as a tree: lists, tuples, intervals, sets, matrices, relations, quantities, words."""

from __future__ import annotations

import contextlib
import itertools
import re

from megatron_nft.verify.algebra.choices import choice_of
from megatron_nft.verify.algebra.families import BIG, big_union, number_set, set_builder, with_domain
from megatron_nft.verify.algebra.normalize import without_spaces
from megatron_nft.verify.algebra.parse import Parser
from megatron_nft.verify.algebra.presentation import strip_presentation
from megatron_nft.verify.algebra.tokens import tokenize
from megatron_nft.verify.algebra.tree import NotUnderstood, TooMuch, Tree
from megatron_nft.verify.algebra.units import (
    SHORT_WORDS,
    UNIT_WORDS,
    canonical,
    is_unit,
    is_unit_token,
    scale_of,
    split_unit,
)
from megatron_nft.verify.algebra.variants import variants
from megatron_nft.verify.algebra.wording import is_filler, is_words, word_tree

MAX_CHARS = 10_000
MAX_TERMS = 20  # of a ratio
_OPENING = frozenset(("(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil", r"\beginmatrix"))
_CLOSING = frozenset((")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil", r"\endmatrix"))
_BRACKETS = frozenset(("(", "[", r"\{", r"\langle"))
_MODULI = frozenset((r"\pmod", r"\mod", r"\bmod", '"mod'))
_RELATIONS = frozenset(("=", "<", ">", "<=", ">=", "!=", r"\in", r"\approx", r"\equiv"))
_choice = re.compile(r"\(?([A-J])\)?[.:)]?$")
_choices = re.compile(r"\(?[A-J]\)?(?:\s*(?:,|,?\s*and|,?\s*or|&)\s*\(?[A-J]\)?)+$")  # (A) and (C)
_short_unit = re.compile(rf"(?<![A-Za-z\\])(?:{'|'.join(sorted(SHORT_WORDS))})(?![A-Za-z])")


def read(text: str, *, lenient: bool = True) -> tuple[Tree, ...]:
    """Return the readings of a normalised answer, the likeliest first.

    There are several where the notation is ambiguous: `1,200` is a number or a list, `(C) 12` a choice followed by its
    content. A response is read leniently; a reference is not: there `(12,102)` is only a pair.

    Raises NotUnderstood if there is no reading, TooMuch if the text is too long or too deeply nested.
    """
    if len(text) > MAX_CHARS:
        raise TooMuch(f"longer than {MAX_CHARS} characters")
    readings: list[Tree] = []
    error: NotUnderstood | None = None
    choice = choice_of(text)
    if is_words(text):
        readings.append(word_tree(text))
    text = strip_presentation(text)
    vocabularies = [UNIT_WORDS] if not _short_unit.search(text) else [UNIT_WORDS, UNIT_WORDS - SHORT_WORDS]
    for variant, unit_words in itertools.product(variants(text, lenient=lenient), vocabularies):
        try:
            readings.append(_item_or_list(tokenize(variant, unit_words)))
        except NotUnderstood as caught:
            error = error or caught
        except RecursionError:
            raise TooMuch("nested too deeply") from None
    if choice:
        letter, content = choice
        readings.append(("s", letter))
        if content and not choice_of(f"({content})"):  # E is not the answer in `(D) E`
            with contextlib.suppress(NotUnderstood):
                readings.extend(read(content, lenient=lenient))
    if not readings:
        raise error or NotUnderstood("empty")
    return tuple(readings)


def _item_or_list(tokens: list[str]) -> Tree:
    r"""Read one answer or several; of a derivation only what follows the last `\Rightarrow`."""
    if not tokens:
        raise NotUnderstood("empty")
    if r"\Rightarrow" in tokens:
        tokens = tokens[len(tokens) - tokens[::-1].index(r"\Rightarrow") :]
    if groups := _groups(tokens):
        return groups
    parts = _split(tokens, (",", ";"))
    parts = [part for part in parts if part]  # `1, and 2` has two separators
    if not parts:
        raise NotUnderstood("empty")
    if len(parts) == 1:
        return _item(parts[0])
    items: list[Tree] = []
    for part in parts:
        item = _item(part)
        items.extend(item[1:] if item[0] == "list" else [item])
    memberships = [kind for item in items if (kind := number_set(item)) is not None]  # k \pi, k \in \mathbb{Z}
    kept = [item for item in items if number_set(item) is None]
    if not kept:
        return items[0]
    return with_domain(("list", *kept) if len(kept) > 1 else kept[0], memberships)


def _groups(tokens: list[str]) -> Tree | None:
    """Read `p = 3, q = 8; p = 5, q = 1` as a list of points; None for lists of another kind."""
    if ";" not in tokens or "," not in tokens:
        return None
    groups = [[part for part in _split(group, (",",)) if part] for group in _split(tokens, (";",)) if group]
    sizes = {len(group) for group in groups}
    if len(groups) < 2 or len(sizes) != 1 or sizes == {1}:
        return None
    return ("list", *(("tuple", "(", ")", *map(_item, group)) for group in groups))


def _split(tokens: list[str], separators: tuple[str, ...]) -> list[list[str]]:
    """Split at those `separators` that stand outside all brackets."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
        if depth == 0 and token in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    if depth != 0:
        raise NotUnderstood("brackets that do not match")
    return parts


def _item(tokens: list[str]) -> Tree:
    """Read one answer of a list, without introductory words such as `The answer is:`."""
    while len(tokens) > 1 and tokens[0][:1] == '"' and is_filler(tokens[0]):
        tokens = tokens[2 if tokens[1] == ":" and len(tokens) > 2 else 1 :]
    if not _RELATIONS.isdisjoint(tokens):
        return _relation(tokens)
    return _side(tokens)


def _ratio(tokens: list[str]) -> Tree | None:
    """Read `1 : 2 : 3`, where only the terms' sizes beside each other count; None for anything else."""
    if tokens.count(":") < 2:
        return None
    parts = _split(tokens, (":",))
    if not 2 < len(parts) <= MAX_TERMS or not all(parts):
        return None
    terms = [_quantity(part) for part in parts]
    return ("ratio", *terms) if all(term[0] != "unit" for term in terms) else None  # 2:30:00 pm


def _relation(tokens: list[str]) -> Tree:
    """Read a chain of equations or inequalities such as `a = b <= c`."""
    parts: list[list[str]] = [[]]
    signs: list[str] = []
    depth = 0
    for token in tokens:
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0 and token in _RELATIONS:
            signs.append(token)
            parts.append([])
        else:
            parts[-1].append(token)
    if not signs:
        return _side(tokens)
    if not parts[0] and signs in (["="], [r"\approx"]):  # `= 5`
        return _item(parts[1])
    first: Tree
    try:
        first = _side(parts[0])
    except NotUnderstood:
        if set(signs) != {"="}:
            raise
        first = ("prose", without_spaces("".join(parts[0])))  # P(A | B) = 1/6: only a name
    return ("rel", tuple(signs), first, *map(_side, parts[1:]))


def _side(tokens: list[str]) -> Tree:
    return _braced(tokens) or _ratio(tokens) or _quantity(tokens)


def _braced(tokens: list[str]) -> Tree | None:
    """Read a tuple, interval, set, union, matrix or the name of a set; None for a plain expression."""
    if tokens and tokens[0] in BIG:
        return big_union(tokens, _item)
    parts = _split(tokens, (r"\cup",))
    if len(parts) == 1 and "U" in tokens:
        parts = _split(tokens, ("U",))
        if not all(part and part[0] in _BRACKETS and part[-1] in _CLOSING for part in parts):
            parts = [tokens]
    if len(parts) > 1:
        return ("union", *(_braced(part) or _quantity(part) for part in parts))
    if tokens in ([r"\mathbb", "{", "R", "}"], [r"\mathbb", "R"]):
        return ("reals",)
    if tokens == [r"\emptyset"]:
        return ("set",)
    if tokens and tokens[0] == r"\beginmatrix":
        return _matrix(tokens)
    if len(tokens) < 2 or tokens[0] not in _BRACKETS or tokens[-1] not in _CLOSING or not _is_one_bracket(tokens):
        return None
    inner = tokens[1:-1]
    if tokens[0] == r"\{":
        return _by_condition(inner) or ("set", *_items(inner))
    parts = _split(inner, (",", ";"))
    if len(parts) == 1:
        return None
    return ("tuple", tokens[0], tokens[-1], *_items(inner))


def _by_condition(tokens: list[str]) -> Tree | None:
    r"""Read the condition of `\{x \mid x > 2\}`; None if the braces list elements."""
    bar = next((index for index, token in enumerate(tokens) if token in ("|", ":")), 0)
    condition = tokens[bar + 1 :]
    if not bar or _RELATIONS.isdisjoint(condition):
        return None
    return set_builder(_item(tokens[:bar]), _item_or_list(condition))


def _items(tokens: list[str]) -> list[Tree]:
    return [_item(part) for part in _split(tokens, (",", ";"))] if tokens else []


def _is_one_bracket(tokens: list[str]) -> bool:
    """Whether the bracket opened by the first token is closed by the last one."""
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _matrix(tokens: list[str]) -> Tree:
    """Read a matrix as its rows."""
    if tokens[-1] != r"\endmatrix" or not _is_one_bracket(tokens):
        raise NotUnderstood("a matrix within an expression")
    rows = [row for row in _split(tokens[1:-1], ("\\\\",)) if row]
    tree = tuple(tuple(_quantity(cell) for cell in _split(row, ("&",))) for row in rows)
    if len({len(row) for row in tree}) != 1:
        raise NotUnderstood("a matrix with rows of different lengths")
    return ("matrix", *tree)


def _quantity(tokens: list[str]) -> Tree:
    """Read an expression with its unit, or words."""
    if not tokens:
        raise NotUnderstood("empty")
    if tokens[0][0] == '"' and all(token[0] == '"' for token in tokens):
        return _text(" ".join(token[1:] for token in tokens))
    tokens, modulus = _split_modulus(tokens)
    if modulus:
        return ("unit", _quantity(tokens), f"mod {modulus}")
    value, unit = split_unit(tokens)
    if parts := _compound(value, tokens[len(value) :]):
        return parts
    if any(token[0] == '"' and (" " in token or not is_unit(token[1:])) for token in value):
        return ("prose", without_spaces("".join(tokens)))
    tree = Parser(list(value)).parse()
    if unit and r"\%" not in unit:
        factor, unit = scale_of(unit)
        if factor != 1:
            tree = ("*", tree, ("n", factor))
    if value[0] == r"\dollar" and not unit:
        unit = "$"
    if tree[0] == "deg" or (tree[0] == "-" and tree[1][0] == "deg"):
        tree, unit = (tree[1] if tree[0] == "deg" else ("-", tree[1][1])), f"deg {unit or ''}"
    return ("unit", tree, canonical(unit)) if unit else tree


def _split_modulus(tokens: list[str]) -> tuple[list[str], str]:
    r"""Return the tokens before `\pmod{7}` or `(mod 7)`, and "7".

    A modulus is treated like a unit: it may be left out, but must not differ.
    """
    if _MODULI.isdisjoint(tokens):
        return tokens, ""
    at = next(index for index, token in enumerate(tokens) if token in _MODULI)
    if not at:
        return tokens, ""
    modulus = "".join(token for token in tokens[at + 1 :] if token not in ("{", "}", "(", ")"))
    if tokens[at] != r"\pmod":
        at -= 1
    plain = modulus.isalnum() and (tokens[at] in ("(", r"\pmod"))
    return (tokens[:at], modulus) if plain and at else (tokens, "")


def _compound(value: list[str], unit: list[str]) -> Tree | None:
    """Read `2 hours 30 minutes` as its parts; None for an ordinary quantity."""
    if not unit or len(value) < 3 or not all(token[0].isdigit() or is_unit_token(token) for token in value):
        return None
    words = [index for index, token in enumerate(value) if token[0] == '"']
    if not words or not all(value[index - 1][0].isdigit() for index in words):
        return None
    starts = [0, *(index + 1 for index in words)]
    parts = [value[start:end] for start, end in itertools.pairwise(starts)] + [value[starts[-1] :] + unit]
    return ("tuple", "", "", *map(_quantity, parts))


def _text(phrase: str) -> Tree:
    """Read words; `(C)` and single letters are symbols."""
    choice = _choice.match(phrase)
    if choice:
        return ("s", choice[1])
    if _choices.match(phrase):
        return ("list", *(("s", letter) for letter in re.findall("[A-J]", phrase)))
    return ("s", phrase) if len(phrase) == 1 else word_tree(phrase)
