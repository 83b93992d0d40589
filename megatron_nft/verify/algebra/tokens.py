r"""Split a normalised answer into tokens.

Numbers start with a digit or a dot, commands with a backslash, and words (`\text{cm}`, `dollars`) with a quotation
mark; letters and signs stand for themselves: `2x \text{cm}` -> ["2", "x", '"cm'].
"""

from __future__ import annotations

import re

from megatron_nft.verify.algebra.vocabulary import NAMES

_TOKEN = re.compile(
    r"""
      (?:\d+(?:\.\d*)?|\.\d+)(?:(?:[eE][+-]?\d+|\s[eE]\d+)(?![\d.]))?   # 12, 1.5, .5, 4.5e33
    | \\text\s*\{[^{}]*\}
    | \\(?:begin|end)\s*\{\w+\*?\}(?:\{[lcr|\s]*\})?
    | \\[A-Za-z]+ | \\\\ | \\.
    | \s?[A-Za-z]+
    | <= | >= | != | == | :=
    | \S
    """,
    re.VERBOSE,
)
_FUNCTION_AND_LETTER = re.compile(r"(arc(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|ln|log)([A-Za-z])$")
_SIGNS = {"==": "=", ":=": "=", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\times": "*", r"\|": "|", r"\_": "_"}
_SIGNS |= {r"\degree": r"\degrees", r"\-": "-", r"\&": "&"}
_MODULE = re.compile(r"\b(?:np|numpy|math|sympy|sp|torch)\.(?=[a-z])")
_MATRIX = re.compile(r"\\(begin|end)\s*\{[pbBvV]?(?:small)?(?:matrix|array)\*?\}")
WORD_LENGTH = 4  # a run of at least this many letters is a word rather than a product


def tokenize(text: str, unit_words: frozenset[str]) -> list[str]:
    """Return the tokens of a normalised text. Any run of letters in `unit_words` is a word, however short it is."""
    tokens: list[str] = []
    if "." in text and "p" in text:
        text = _MODULE.sub("", text)
    for token in _TOKEN.findall(text):
        first = token[0]
        if first.isdigit() or first == ".":
            tokens.append(token.replace(" ", ""))
        elif first == "\\":
            tokens.append(_command(token))
        elif first.isalpha() or first.isspace():
            _letters(token, tokens, unit_words)
        else:
            tokens.append(_SIGNS.get(token, token))
    return tokens


def _command(token: str) -> str:
    if token.startswith("\\text"):
        inner = token[token.find("{") + 1 : -1].strip() if "{" in token else ""
        return f'"{inner}' if "{" in token else token
    if token.startswith(("\\begin", "\\end")):
        matrix = _MATRIX.match(token)
        return f"\\{matrix[1]}matrix" if matrix else token
    return _SIGNS.get(token, token)


def _letters(token: str, tokens: list[str], unit_words: frozenset[str]) -> None:
    """Append a run of letters to `tokens`: as a known name, a word, or a product of letters."""
    run = token.strip()
    if not run:
        return
    after_space = token is not run or not tokens
    if len(run) > 1:
        if run in NAMES:
            tokens.append(NAMES[run])
            return
        unit = run in unit_words or (len(run) >= WORD_LENGTH and run.lower() in unit_words)
        word = unit or run == "mod" or (len(run) >= WORD_LENGTH and (after_space or run.isupper()))
        if word and not (tokens and tokens[-1] in ("_", "^")):
            tokens.append(f'"{run}')
            return
        split = _FUNCTION_AND_LETTER.match(run)
        if split:
            tokens.extend((NAMES[split[1]], split[2]))
            return
    tokens.extend(run)
