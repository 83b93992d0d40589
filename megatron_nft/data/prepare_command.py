"""`megatron-nft prepare`: a public question set as a file that `megatron-nft train` and `eval` read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_nft.arguments import describe, positive_int
from megatron_nft.console import show_progress
from megatron_nft.data.benchmarks import BOXED_INSTRUCTION
from megatron_nft.data.conflicts import add_conflicts_option
from megatron_nft.data.prepare import SETS, PreparationSummary, open_source, prepare, write_rows
from megatron_nft.data.rows import DataError
from megatron_nft.files import sha256_of_file

DETAILS = """
    %(prog)s math_train data/questions/train.parquet --from MATH/train.jsonl
    %(prog)s dapo_math_17k data/questions/train.parquet
    %(prog)s aime24 data/questions/aime24.parquet --copies 32

Without --from the set is taken from its place on the Hugging Face hub. --from names a local .jsonl or .parquet file, a
file on the hub (owner/name/file.parquet), or a data set on the hub (owner/name).

Every question stands once in the output (--copies N: N times, for avg@N during training). Rows without a usable answer
are dropped and counted; --strict refuses them. An answer that is null, NaN or infinite is refused with its row, unless
--missing drop counts it among those. Copies of a question that have different answers are refused and listed with their
rows, unless --conflicts says what to do with them: drop leaves the question out, majority keeps the answer of most
copies.

sets:
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    describe(parser, DETAILS + "\n".join(f"  {name:18} {s.title}" for name, s in SETS.items()))
    parser.add_argument("set", choices=SETS, metavar="SET", help="which set it is (see below)")
    parser.add_argument("output", type=_output, help=".parquet or .jsonl file to write")
    parser.add_argument("--from", dest="source", help="local file, or name on the hub")
    parser.add_argument("--split", default="train", help="split of a data set by hub name (default: train)")
    parser.add_argument("--subset", help="configuration of a data set by hub name")
    parser.add_argument(
        "--instruction",
        default=BOXED_INSTRUCTION,
        help="line put under each problem that does not ask for a box itself; empty for none (default: %(default)r)",
    )
    parser.add_argument("--copies", type=positive_int, default=1, metavar="N", help="write every question N times")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="stop after N different questions")
    add_conflicts_option(parser)
    parser.add_argument(
        "--missing",
        choices=("refuse", "drop"),
        default="refuse",
        help="rows whose answer is null, NaN or infinite: refuse the file or drop them (default: refuse)",
    )
    parser.add_argument("--strict", action="store_true", help="refuse a file with rows that cannot be used")


def _output(text: str) -> Path:
    if Path(text).suffix not in (".parquet", ".jsonl"):
        raise argparse.ArgumentTypeError(f"{text}: the output ends in .parquet or .jsonl")
    return Path(text)


def run(args: argparse.Namespace) -> int:
    """Prepare the set; return 0 where the output was written, 1 with one line where not."""
    try:
        rows, where = open_source(args.source, args.set, args.split, args.subset)
        out, summary = prepare(
            args.set,
            _counted(rows, where),
            where,
            instruction=args.instruction,
            copies=args.copies,
            limit=args.limit,
            conflicts=args.conflicts,
            missing=args.missing,
        )
        if args.strict and summary.dropped:
            reason, count = summary.dropped.most_common(1)[0]
            raise DataError(
                f"{where}: {sum(summary.dropped.values())} rows cannot be used, {count} of them (first: row "
                f"{summary.first_dropped[reason]}) because {reason}; leave out --strict to drop them"
            )
        write_rows(out, args.output)
    except DataError as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{args.prog}: {args.output} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    _report(summary, args.output)
    return 0


def _counted(rows: Iterator[tuple[int, dict[str, Any]]], title: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `rows` while showing how many there were."""
    with show_progress(f"reading {title} (rows)") as progress:
        for row in rows:
            progress.advance()
            yield row


def _report(summary: PreparationSummary, output: Path) -> None:
    """Say on standard error what became of the rows."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False)

    say(f"{summary.read} rows read, {summary.duplicates} copies left out, {sum(summary.dropped.values())} dropped")
    for reason, count in summary.dropped.most_common():
        say(f"  dropped {count} (first: row {summary.first_dropped[reason]}): {reason}")
    if summary.conflicts:
        say(
            f"  {summary.conflicts} questions have copies with different answers; {summary.conflict_rows} rows left out"
        )
    digest = sha256_of_file(output)
    say(f"{summary.written} rows written to {output} ({output.stat().st_size} bytes, sha256 {digest})")
