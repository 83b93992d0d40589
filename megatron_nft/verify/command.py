"""`megatron-nft grade`: verdicts for the responses in a file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from megatron_nft.arguments import positive_float, positive_int
from megatron_nft.files import RowsError
from megatron_nft.verify.grade_file import grade_file
from megatron_nft.verify.grade_report import print_report
from megatron_nft.verify.graders import GRADERS, GraderError
from megatron_nft.verify.inbox import VerifierError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--input", type=Path, required=True, help="JSONL or parquet with response (or text) and answer")
    parser.add_argument("--output", type=Path, required=True, help="JSONL or parquet; an existing file is replaced")
    parser.add_argument(
        "--grader",
        default="maths",
        help=f"one or several, comma-separated: {', '.join(GRADERS)}, numeric:TOLERANCE, or module.function "
        "(default: maths); the verdict is the first one's",
    )
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=positive_int, default=cpus, help="processes (default: one per CPU)")
    parser.add_argument("--timeout-s", type=positive_float, default=3.0, help="time for one verdict (default: 3)")
    memory_help = "memory that grading one row may take (default: 1 GiB)"
    parser.add_argument("--memory-bytes", type=positive_int, default=1 << 30, help=memory_help)


def run(args: argparse.Namespace) -> int:
    """Grade the file.

    Returns the exit status: 0 if every row has its verdict, 1 if the file cannot be graded, 2 if there is no such
    grader, 130 if interrupted.
    """
    from megatron_nft.config import VerifyConfig

    console = Console(soft_wrap=False, highlight=False)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    config = VerifyConfig(
        grader=args.grader, workers=args.workers, timeout_s=args.timeout_s, memory_bytes=args.memory_bytes
    )
    try:
        tally = grade_file(args.input, args.output, config, console)
    except (RowsError, GraderError, VerifierError, OSError) as error:
        errors.print(f"grade: {error}", markup=False, style="red")
        return 2 if isinstance(error, GraderError) else 1
    except KeyboardInterrupt:
        errors.print("grade: interrupted; the same command goes on from here", markup=False)
        return 130
    print_report(console, tally)
    console.print(f"written: {args.output}", markup=False)
    return 0
