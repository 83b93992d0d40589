"""`megatron-nft diff`: two sets of weights, compared tensor by tensor."""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.table import Table

from megatron_nft.arguments import describe
from megatron_nft.console import Progress, show_progress
from megatron_nft.weights.offline.summary import kind_of_tensor, table_console

if TYPE_CHECKING:
    from megatron_nft.weights.offline.diff import TensorComparison

T = TypeVar("T")
DETAILS = """
A and B are Hugging Face folders or Megatron checkpoints. Weights are compared under HF names; of two training
checkpoints the optimizer states too, under Megatron's keys. A line is printed for every kind of tensor, and one with
both checksums for every tensor that differs (--all: for every one). The exit status is 0 where everything is equal, 1
where something differs, 2 where a side cannot be read.

    %(prog)s Qwen2.5-Math-7B Qwen2.5-Math-7B-megatron
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    describe(parser, DETAILS)
    parser.add_argument("left", type=Path, metavar="A")
    parser.add_argument("right", type=Path, metavar="B")
    parser.add_argument("--all", action="store_true", help="list every tensor with its checksums")
    parser.add_argument("--weights-only", action="store_true", help="leave optimizer states out")


def run(args: argparse.Namespace) -> int:
    """Compare and print; return 0 where everything is equal, 1 where not, 2 where a side cannot be read."""
    warnings.filterwarnings("ignore")  # megatron-core's notes on packages that a comparison does not need
    start, errors = time.perf_counter(), Console(stderr=True, soft_wrap=True, highlight=False)
    listed = Table("tensor", "shape", "dtype", "max |difference|", "checksum A", "checksum B", box=None, pad_edge=False)
    kinds: dict[tuple[str, str], KindOfTensor] = {}
    try:
        with show_progress("comparing", in_bytes=True, console=errors) as progress:
            for found in _comparisons(args.left, args.right, args.weights_only, progress):
                kind = kinds.setdefault((kind_of_tensor(found.name), _cells(found)[0]), KindOfTensor())
                kind.add(found)
                progress.advance(max(found.nbytes), found.name)
                if args.all or not found.same:
                    listed.add_row(found.name, *_cells(found))
    except (ValueError, OSError, KeyError) as error:
        errors.print(f"{args.prog}: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        return 130
    console = table_console()
    console.print(_summary(kinds))
    if listed.row_count:
        console.print()
        console.print(listed)
    count, different = (sum(getattr(kind, name) for kind in kinds.values()) for name in ("count", "different"))
    sizes = " / ".join(f"{sum(kind.nbytes[side] for kind in kinds.values()):,}" for side in (0, 1))
    console.print(f"{count} tensors, {different} differ, {sizes} bytes, {time.perf_counter() - start:.1f} s")
    return 1 if different else 0


@dataclass
class KindOfTensor:
    """The tensors that stand in the same place of every layer."""

    count: int = 0
    different: int = 0
    nbytes: tuple[int, int] = (0, 0)  # of either side
    max_difference: float = 0.0  # NaN as soon as one tensor's is

    def add(self, found: TensorComparison) -> None:
        """Count one tensor."""
        self.count += 1
        self.different += not found.same
        self.nbytes = (self.nbytes[0] + found.nbytes[0], self.nbytes[1] + found.nbytes[1])
        difference = found.max_difference or 0.0
        if math.isnan(difference) or difference > self.max_difference:
            self.max_difference = difference


def _summary(kinds: dict[tuple[str, str], KindOfTensor]) -> Table:
    """Return one line per kind of tensor."""
    table = Table("tensor", "count", "differ", "shape", "bytes", "max |difference|", box=None, pad_edge=False)
    for (name, shape), kind in kinds.items():
        sizes = " / ".join(dict.fromkeys(f"{n:,}" for n in kind.nbytes))
        table.add_row(name, str(kind.count), str(kind.different), shape, sizes, f"{kind.max_difference:.3g}")
    return table


def _comparisons(left: Path, right: Path, weights_only: bool, progress: Progress) -> Iterator[TensorComparison]:
    """Every tensor; `progress` is told the bytes of all, of each tensor those of the side where it is larger."""
    from megatron_nft.weights.hf_folder import HFFolder
    from megatron_nft.weights.offline.diff import (
        compare,
        compare_optimizers,
        larger_bytes,
        open_weights,
        optimizer_keys,
    )
    from megatron_nft.weights.offline.megatron_reader import MegatronCheckpoint

    sides = open_weights(left), open_weights(right)
    total_bytes = larger_bytes(*sides)
    states = None
    if not weights_only and not any(isinstance(side, HFFolder) for side in sides):
        states = MegatronCheckpoint(left), MegatronCheckpoint(right)
        total_bytes += larger_bytes(*states, names=optimizer_keys(*states))
    progress.expect(total_bytes)
    yield from compare(*sides)
    if states is not None:
        yield from compare_optimizers(*states)


def _cells(found: TensorComparison) -> list[str]:
    """Shape, dtype, difference and checksums as text; `A / B` where the sides differ."""
    return [
        _both(found.shapes, lambda shape: "x".join(map(str, shape)) or "scalar"),
        _both(found.dtypes, lambda dtype: str(dtype).removeprefix("torch.")),
        "-" if found.max_difference is None else f"{found.max_difference:.3g}",
        *("-" if checksum is None else checksum for checksum in found.checksums),
    ]


def _both(pair: tuple[T | None, T | None], text: Callable[[T], str]) -> str:
    words = ["-" if value is None else text(value) for value in pair]
    return words[0] if words[0] == words[1] else " / ".join(words)
