"""Finds the formulas in what a model or a data set wrote.

Formulas are `$...$`, `$$...$$`, `\\(...\\)`, `\\[...\\]`, a LaTeX environment that stands by itself, and the content of
`\\boxed{...}`. Everything else is plain text. Time is linear in the length of the text, also for a text that repeats an
opening delimiter that is never closed, as a model that has run into a loop writes it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LONGEST_DOLLAR_FORMULA = 2000  # characters; single dollars further apart are prices

_OPENING = re.compile(r"[$\\]")
_ENVIRONMENT = re.compile(r"\\begin\{((?:align|aligned|equation|gather|gathered|cases|array|[pbvV]?matrix)\*?)\}")
_DOLLAR_OR_STOP = re.compile(r"\\.|\$|\n\n", re.DOTALL)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_DELIMITERS = (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False))
_BOXED = "\\boxed{"


class Formula(NamedTuple):
    """One formula as it is written, without its delimiters."""

    source: str
    display: bool  # on a line of its own
    boxed: bool = False  # the content of \boxed{...}


def find_maths(text: str) -> list[str | Formula]:
    """The parts of `text` in order: strings of plain text, none of them empty, and formulas."""
    return _Scan(text).parts()


class _Scan:
    """One pass over a text. What was once searched for in vain is not searched for again."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._absent: set[str] = set()
        self._closing: dict[int, int] | None = None

    def parts(self) -> list[str | Formula]:
        text, found, plain, i = self.text, list[str | Formula](), 0, 0
        while opening := _OPENING.search(text, i):
            start = opening.start()
            formula, end = self._formula(start)
            if formula is not None:
                if start > plain:
                    found.append(text[plain:start])
                found.append(formula)
                plain = end
            i = end
        if plain < len(text):
            found.append(text[plain:])
        return found

    def _formula(self, start: int) -> tuple[Formula | None, int]:
        """(the formula that opens at `start` or None, where to go on)."""
        text = self.text
        for opening, closing, display in _DELIMITERS:
            if text.startswith(opening, start):
                end = self._find(closing, start + 2)
                if end >= 0:
                    return Formula(text[start + 2 : end], display), end + 2
                return None, start + 2
        if text[start] == "$":
            end = self._closing_dollar(start)
            return (None, start + 1) if end < 0 else (Formula(text[start + 1 : end], False), end + 1)
        if environment := _ENVIRONMENT.match(text, start):
            closing = f"\\end{{{environment[1]}}}"
            end = self._find(closing, start)
            if end >= 0:
                return Formula(text[start : end + len(closing)], True), end + len(closing)
        if text.startswith(_BOXED, start):
            inside = start + len(_BOXED)
            end = self._closing_brace(inside - 1)
            if end >= 0:
                return Formula(text[inside:end], False, boxed=True), end + 1
        return None, start + 2  # a backslash and what it escapes

    def _find(self, closing: str, start: int) -> int:
        """Where `closing` stands next; -1 where it does not occur any more."""
        if closing in self._absent:
            return -1
        end = self.text.find(closing, start)
        if end < 0:
            self._absent.add(closing)
        return end

    def _closing_dollar(self, start: int) -> int:
        """Where the formula opened by the single dollar at `start` ends, -1 where the dollar opens none.

        Pandoc's rule, so that prices stay prices: no space after the first dollar, none before the last, no digit
        after it, and no blank line between them.
        """
        text = self.text
        if text[start + 1 : start + 2].isspace() or start + 1 == len(text):
            return -1
        for stop in _DOLLAR_OR_STOP.finditer(text, start + 1):
            end = stop.start()
            if end >= start + LONGEST_DOLLAR_FORMULA or stop[0] == "\n\n":
                return -1
            if stop[0] == "$":
                return -1 if text[end - 1].isspace() or text[end + 1 : end + 2] in tuple("0123456789") else end
        return -1

    def _closing_brace(self, opening: int) -> int:
        """Where the brace at `opening` is closed; -1 where it is not."""
        if self._closing is None:  # all braces are matched at once, from the first one that is asked for
            self._closing, open_braces = {}, list[int]()
            for brace in _BRACE.finditer(self.text, opening):
                if brace[0] == "{":
                    open_braces.append(brace.start())
                elif brace[0] == "}" and open_braces:
                    self._closing[open_braces.pop()] = brace.start()
        return self._closing.get(opening, -1)
