"""The command `megatron-nft report RUN_DIR`: one HTML page about a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `report`."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run, finished or in progress")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN_DIR/report.html")
    parser.add_argument("--max-rollouts", type=int, default=100_000, metavar="N", help="default: 100000")
    parser.add_argument("--max-mb", type=int, default=200, metavar="MB", help="rough size of the page (default: 200)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="folder with the run's tokenizer (default: the run's model)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and return the exit status: 0, or 2 where the folder or an option is refused."""
    from megatron_nft.console import show_progress
    from megatron_nft.data.rollout_file import list_rollout_files
    from megatron_nft.report.run_page import run_page

    out = args.out or args.run_dir / "report.html"
    try:
        if args.max_rollouts < 1 or args.max_mb < 1:
            raise ValueError("--max-rollouts and --max-mb must be at least 1")
        with show_progress("rollout files", len(list_rollout_files(args.run_dir))) as progress:
            size = run_page(
                args.run_dir,
                out,
                max_rollouts=args.max_rollouts,
                max_bytes=args.max_mb << 20,
                tokenizer_dir=args.tokenizer,
                on_file=progress.advance,
            )
    except (ValueError, OSError) as e:
        print(f"megatron-nft report: {e}", file=sys.stderr)
        return 2
    print(f"{out} ({size / 1e6:.1f} MB)")
    return 0
