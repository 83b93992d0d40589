"""The table of the formulas that a page shows: each is converted and stored once, however often it is used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import BinaryIO, TypeAlias

from megatron_nft.report.embed import data_element, to_json
from megatron_nft.report.find_maths import find_maths
from megatron_nft.report.mathml import Tree, to_mathml

BLOCK_SIZE = 500
"""Formulas per block. The page unpacks a block when it shows one of its formulas, and keeps it for the next."""

Text: TypeAlias = str | list[str | int | list[int]]
"""A text as the page's chunks hold it: a string where it has no maths; otherwise its parts in order, n for formula n
and [n] for formula n in a box."""


@dataclass(slots=True)
class FormulaTable:
    """Numbers formulas in the order of their first use and writes them to `out`, block by block.

    A block is a list with, for each formula, [LaTeX source, tree of the `math` element or null where the source cannot
    be converted].
    """

    out: BinaryIO
    num_blocks: int = 0
    _numbers: dict[tuple[str, bool], int] = field(default_factory=dict)  # (source, display) -> number
    _block: list[tuple[str, Tree | None]] = field(default_factory=list)

    def encode(self, text: str) -> Text:
        """`text` with its formulas replaced by their numbers; those that are new are converted."""
        if "$" not in text and "\\" not in text:
            return text
        parts: list[str | int | list[int]] = []
        for part in find_maths(text):
            if isinstance(part, str):
                parts.append(part)
            else:
                number = self._number(part.source, part.display)
                parts.append([number] if part.boxed else number)
        return text if all(isinstance(part, str) for part in parts) else parts

    def flush(self) -> None:
        """Write what has not been written yet."""
        if self._block:
            self.out.write(data_element(f"formulas-{self.num_blocks}", to_json(self._block)))
            self.num_blocks += 1
            self._block = []

    def _number(self, source: str, display: bool) -> int:
        number = self._numbers.setdefault((source, display), len(self._numbers))
        if number == self.num_blocks * BLOCK_SIZE + len(self._block):
            self._block.append((source, to_mathml(source, display)))
            if len(self._block) == BLOCK_SIZE:
                self.flush()
        return number
