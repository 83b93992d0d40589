#!/usr/bin/env python3
"""Compare two sets of weights, each a Hugging Face folder or a Megatron checkpoint: names, shapes, values, checksums.

Weights are compared under HF names; of two training checkpoints the optimizer states too, under Megatron's keys. A line
is printed for every kind of tensor, and one with both checksums for every tensor that differs (--all: for every one).
The exit code is 0 where everything is equal, 1 where something differs, 2 where a side cannot be read.

    python tools/diff_checkpoints.py Qwen2.5-Math-7B Qwen2.5-Math-7B-megatron
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_nft.weights.offline.command import kind_of, parser, reports_on, results


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("a", type=Path, metavar="A")
    arguments.add_argument("b", type=Path, metavar="B")
    arguments.add_argument("--all", action="store_true", help="list every tensor with its checksums")
    arguments.add_argument("--weights-only", action="store_true", help="leave optimizer states out")
    args = arguments.parse_args()
    warnings.filterwarnings("ignore")  # megatron-core's notes on packages that a comparison does not need
    start, errors = time.perf_counter(), Console(stderr=True, soft_wrap=True, highlight=False)
    listed = Table("tensor", "shape", "dtype", "max |difference|", "checksum A", "checksum B", box=None, pad_edge=False)
    kinds: dict[tuple[str, str], Kind] = {}
    try:
        with reports_on(errors, "comparing") as reports:
            for row in rows(args.a, args.b, args.weights_only, reports.total):
                kind = kinds.setdefault((kind_of(row.name), cells(row)[0]), Kind())
                kind.add(row)
                reports.done(row.name, max(row.nbytes))
                if args.all or not row.same:
                    listed.add_row(row.name, *cells(row))
    except (ValueError, OSError, KeyError) as error:
        errors.print(f"diff_checkpoints.py: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        return 130
    console = results()
    console.print(summary(kinds))
    if listed.row_count:
        console.print()
        console.print(listed)
    count, different = (sum(getattr(kind, figure) for kind in kinds.values()) for figure in ("count", "different"))
    sizes = " / ".join(f"{sum(kind.nbytes[side] for kind in kinds.values()):,}" for side in (0, 1))
    console.print(f"{count} tensors, {different} differ, {sizes} bytes, {time.perf_counter() - start:.1f} s")
    return 1 if different else 0


@dataclass
class Kind:
    """A tensor over all layers."""

    count: int = 0
    different: int = 0
    nbytes: tuple[int, int] = (0, 0)
    max_difference: float = 0.0  # NaN as soon as one tensor's is

    def add(self, row) -> None:
        self.count += 1
        self.different += not row.same
        self.nbytes = tuple(a + b for a, b in zip(self.nbytes, row.nbytes, strict=True))
        gap = row.max_difference or 0.0
        if math.isnan(gap) or gap > self.max_difference:
            self.max_difference = gap


def summary(kinds: dict[tuple[str, str], Kind]) -> Table:
    """One line per kind of tensor."""
    table = Table("tensor", "count", "differ", "shape", "bytes", "max |difference|", box=None, pad_edge=False)
    for (name, shape), kind in kinds.items():
        sizes = " / ".join(dict.fromkeys(f"{n:,}" for n in kind.nbytes))
        table.add_row(name, str(kind.count), str(kind.different), shape, sizes, f"{kind.max_difference:.3g}")
    return table


def rows(a: Path, b: Path, weights_only: bool, total: Callable[[int], None]):
    """Every row; `total` is told how many bytes there are, of each tensor those of the side where it is larger."""
    from megatron_nft.weights.offline.diff import compare, compare_optimizers, larger_bytes, open_weights, optimizer_keys
    from megatron_nft.weights.hf_folder import HFFolder
    from megatron_nft.weights.offline.megatron_reader import MegatronCheckpoint

    sides = [open_weights(path) for path in (a, b)]
    total_bytes, states = larger_bytes(*sides), []
    if not weights_only and not any(isinstance(side, HFFolder) for side in sides):
        states = [MegatronCheckpoint(path) for path in (a, b)]
        total_bytes += larger_bytes(*states, names=optimizer_keys(*states))
    total(total_bytes)
    yield from compare(*sides)
    if states:
        yield from compare_optimizers(*states)


def cells(row) -> list[str]:
    """Shape, dtype, difference and checksums as text; `A / B` where the sides differ."""

    def both(pair, text) -> str:
        words = ["-" if value is None else text(value) for value in pair]
        return words[0] if words[0] == words[1] else " / ".join(words)

    return [
        both(row.shapes, lambda shape: "x".join(map(str, shape)) or "scalar"),
        both(row.dtypes, lambda dtype: str(dtype).removeprefix("torch.")),
        "-" if row.max_difference is None else f"{row.max_difference:.3g}",
        *(value or "-" for value in row.checksums),
    ]


if __name__ == "__main__":
    sys.exit(main())
