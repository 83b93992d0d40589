"""What a conversion wrote, and the table of it that the commands print."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """A tensor that a conversion wrote."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size without any header."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ConversionSummary:
    """Everything that a conversion wrote."""

    tensors: list[WrittenTensor]
    num_files: int

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors, padding included."""
        return sum(math.prod(t.shape) for t in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the files' headers."""
        return sum(t.nbytes for t in self.tensors)


def table_console() -> Console:
    """Standard output for tables: as wide as they are, since rich shortens names and checksums to fit a window."""
    return Console(soft_wrap=True, highlight=False, width=1000)


def kind_of_tensor(name: str) -> str:
    """The name that a tensor has in every layer: `model.layers.*.mlp.experts.*.up_proj.weight`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def print_summary(summary: ConversionSummary, out: Path, seconds: float) -> None:
    """Print one line per kind of tensor (the same in every layer), and the totals."""
    groups: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for tensor in summary.tensors:
        key = (kind_of_tensor(tensor.name), tensor.shape, str(tensor.dtype).removeprefix("torch."))
        groups.setdefault(key, []).append(tensor.nbytes)
    table = Table("tensor", "count", "shape", "dtype", "bytes", box=None, pad_edge=False)
    for (name, shape, dtype), sizes in groups.items():
        table.add_row(name, str(len(sizes)), "x".join(map(str, shape)), dtype, f"{sum(sizes):,}")
    console = table_console()
    console.print(table)
    rate = summary.nbytes / seconds / 1e6
    console.print(
        f"{out}: {len(summary.tensors)} tensors, {summary.num_parameters:,} elements, {summary.nbytes:,} bytes "
        f"in {summary.num_files} files, {seconds:.1f} s ({rate:.0f} MB/s)",
        markup=False,
    )
