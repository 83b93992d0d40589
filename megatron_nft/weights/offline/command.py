"""The common face of the weight tools: arguments, progress, summary, errors of one line."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from megatron_nft.weights.offline.convert import Summary

LINE_EVERY_S = 10.0  # of progress, where there is no terminal
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Reports(Protocol):
    """Where a conversion tells how far it is."""

    def total(self, nbytes: int) -> None:
        """How much will be written."""

    def done(self, name: str, nbytes: int) -> None:
        """A tensor, or a part of one, has been written."""


def parser(doc: str) -> argparse.ArgumentParser:
    """`doc`: the tool's docstring; its first line is the description, the rest is shown below the options."""
    first, _, rest = doc.strip().partition("\n")
    return argparse.ArgumentParser(
        description=first, epilog=rest.strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_layout(arguments: argparse.ArgumentParser) -> None:
    """--tp, --pp, --vpp"""
    arguments.add_argument("--tp", type=_positive, default=1, metavar="N", help="tensor parallel size (default 1)")
    arguments.add_argument("--pp", type=_positive, default=1, metavar="N", help="pipeline parallel size (default 1)")
    arguments.add_argument(
        "--vpp", type=_positive, default=1, metavar="N", help="model chunks per pipeline rank (default 1)"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def dtype_of(text: str | None) -> torch.dtype | None:
    """A choice of `DTYPES` -> torch.dtype."""
    import torch

    return None if text is None else getattr(torch, DTYPES[text])


class _Bar:
    """Reports on a rich progress bar."""

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=None, name="")

    def total(self, nbytes: int) -> None:
        self._progress.update(self._task, total=nbytes)

    def done(self, name: str, nbytes: int) -> None:
        self._progress.update(self._task, advance=nbytes, name=name)


class _Lines:
    """Reports in a line every `LINE_EVERY_S`, for log files."""

    def __init__(self, console: Console, description: str) -> None:
        self._console, self._description = console, description
        self._total = self._done = 0
        self._start = self._said = time.perf_counter()

    def total(self, nbytes: int) -> None:
        self._total = nbytes

    def done(self, name: str, nbytes: int) -> None:
        self._done += nbytes
        now = time.perf_counter()
        if now - self._said >= LINE_EVERY_S:
            self._said = now
            self._console.print(
                f"{self._description} {name}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, "
                f"{now - self._start:.0f} s",
                markup=False,
            )


@contextlib.contextmanager
def reports_on(console: Console, verb: str) -> Iterator[Reports]:
    """A progress bar on a terminal, else lines."""
    if not console.is_terminal:
        yield _Lines(console, verb)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress, verb)


def run(verb: str, out: Path, work: Callable[[Reports], Summary]) -> int:
    """Run `work`, show its progress on stderr and print its summary; the exit code.

    Errors that say what is wrong with the input are printed in one line.
    """
    warnings.filterwarnings("ignore")  # megatron-core's notes on packages that a conversion does not need
    errors, start = Console(stderr=True, soft_wrap=True, highlight=False), time.perf_counter()
    try:
        with reports_on(errors, verb) as reports:
            summary = work(reports)
    except (ValueError, OSError, KeyError) as error:
        errors.print(f"{Path(sys.argv[0]).name}: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        errors.print(f"interrupted; {out} was not made", markup=False)
        return 130
    _print_summary(summary, out, time.perf_counter() - start)
    return 0


def results() -> Console:
    """Standard output for tables: as wide as they are, since rich shortens names and checksums to fit a window."""
    return Console(soft_wrap=True, highlight=False, width=1000)


def kind_of(name: str) -> str:
    """`model.layers.*.mlp.experts.*.up_proj.weight`: the name that a tensor has in every layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _print_summary(summary: Summary, out: Path, seconds: float) -> None:
    """One line per kind of tensor (the same in every layer), and the totals."""
    groups: dict[tuple[str, tuple[int, ...], str], int] = {}
    for tensor in summary.tensors:
        key = (kind_of(tensor.name), tensor.shape, str(tensor.dtype).removeprefix("torch."))
        groups[key] = groups.get(key, 0) + 1
    table = Table("tensor", "count", "shape", "dtype", "bytes", box=None, pad_edge=False)
    for (name, shape, dtype), count in groups.items():
        size = count * math.prod(shape) * _itemsize(dtype)
        table.add_row(name, str(count), "x".join(map(str, shape)), dtype, f"{size:,}")
    console = results()
    console.print(table)
    rate = summary.nbytes / seconds / 1e6
    console.print(
        f"{out}: {len(summary.tensors)} tensors, {summary.num_parameters:,} elements, {summary.nbytes:,} bytes "
        f"in {summary.num_files} files, {seconds:.1f} s ({rate:.0f} MB/s)",
        markup=False,
    )


def _itemsize(dtype: str) -> int:
    import torch

    return getattr(torch, dtype).itemsize
