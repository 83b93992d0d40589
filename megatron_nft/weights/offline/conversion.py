"""What the commands that write weights have in common: options, and from their work to an exit status."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_nft.arguments import positive_int
from megatron_nft.console import Progress, show_progress
from megatron_nft.weights.offline.summary import ConversionSummary, print_summary

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""Choices of `--dtype` and torch's names for them."""


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Add `--tp`, `--pp` and `--vpp`."""
    add = parser.add_argument
    add("--tp", type=positive_int, default=1, metavar="N", help="tensor parallel size (default 1)")
    add("--pp", type=positive_int, default=1, metavar="N", help="pipeline parallel size (default 1)")
    add("--vpp", type=positive_int, default=1, metavar="N", help="model chunks per pipeline rank (default 1)")


def dtype_of(choice: str | None) -> torch.dtype | None:
    """Return the torch dtype of a choice of `DTYPES`, None for None."""
    import torch

    if choice is None:
        return None
    dtype: torch.dtype = getattr(torch, DTYPES[choice])
    return dtype


def run_conversion(
    args: argparse.Namespace, verb: str, out: Path, convert: Callable[[Progress], ConversionSummary]
) -> int:
    """Run `convert`, show its progress on standard error and print its summary; return the exit status.

    0 where `out` was made, 1 with one line where the input cannot be used or `out` cannot be written, 130 where it was
    interrupted. `args.prog` begins the line.
    """
    warnings.filterwarnings("ignore")  # megatron-core's notes on packages that a conversion does not need
    errors, start = Console(stderr=True, soft_wrap=True, highlight=False), time.perf_counter()
    try:
        with show_progress(verb, in_bytes=True, console=errors) as progress:
            summary = convert(progress)
    except (ValueError, OSError, KeyError) as error:
        errors.print(f"{args.prog}: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        errors.print(f"interrupted; {out} was not made", markup=False)
        return 130
    print_summary(summary, out, time.perf_counter() - start)
    return 0
