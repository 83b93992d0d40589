"""Turns a public question set into a file that `megatron-nft train` and `eval` read.

    python tools/prepare_data.py math_train data/questions/train.parquet --from MATH/train.jsonl
    python tools/prepare_data.py dapo_math_17k data/questions/train.parquet
    python tools/prepare_data.py aime24 data/questions/aime24.parquet --copies 32

Without --from the set is taken from its place on the Hugging Face hub. --from names a local .jsonl or .parquet file, a
file on the hub (owner/name/file.parquet), or a data set on the hub (owner/name).

Every question stands once in the output (--copies N: N times, for avg@N during training). Rows without a usable answer
are dropped and counted; --strict refuses them.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_nft.data.benchmarks import BOXED_INSTRUCTION
from megatron_nft.data.prepare import SETS, Summary, open_source, prepare, write_rows
from megatron_nft.data.rows import DataError


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="sets:\n" + "\n".join(f"  {name:18} {s.title}" for name, s in SETS.items()),
    )
    parser.add_argument("set", choices=SETS, metavar="SET", help="which set it is (see below)")
    parser.add_argument("output", type=Path, help=".parquet or .jsonl file to write")
    parser.add_argument("--from", dest="source", help="local file, or name on the hub")
    parser.add_argument("--split", default="train", help="split of a data set by hub name (default: train)")
    parser.add_argument("--subset", help="configuration of a data set by hub name")
    parser.add_argument(
        "--instruction",
        default=BOXED_INSTRUCTION,
        help="line put under each problem that does not ask for a box itself; empty for none (default: %(default)r)",
    )
    parser.add_argument("--copies", type=_positive, default=1, metavar="N", help="write every question N times")
    parser.add_argument("--limit", type=_positive, metavar="N", help="stop after N different questions")
    parser.add_argument("--strict", action="store_true", help="refuse a file with rows that cannot be used")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".parquet", ".jsonl"):
        parser.error(f"{args.output}: the output ends in .parquet or .jsonl")
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def shown(rows: Iterator, title: str, console: Console) -> Iterator:
    """`rows`, with a progress bar."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"reading {title} (rows)", total=None)
        for row in rows:
            progress.advance(bar)
            yield row


def report(summary: Summary, output: Path, console: Console) -> None:
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    say(f"{summary.read} rows read, {summary.duplicates} copies left out, {sum(summary.dropped.values())} dropped")
    for reason, count in summary.dropped.most_common():
        say(f"  dropped {count} (first: row {summary.first_dropped[reason]}): {reason}")
    if summary.conflicts:
        say(f"  {summary.conflicts} questions stand with more than one answer; all are kept")
    say(f"{summary.written} rows written to {output} ({output.stat().st_size} bytes, sha256 {digest})")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console(stderr=True)
    try:
        rows, where = open_source(args.source, args.set, args.split, args.subset)
        out, summary = prepare(
            args.set,
            shown(rows, where, console),
            where,
            instruction=args.instruction,
            copies=args.copies,
            limit=args.limit,
        )
        if args.strict and summary.dropped:
            reason, count = summary.dropped.most_common(1)[0]
            raise DataError(
                f"{where}: {sum(summary.dropped.values())} rows cannot be used, {count} of them (first: row "
                f"{summary.first_dropped[reason]}) because {reason}; leave out --strict to drop them"
            )
        write_rows(out, args.output)
    except DataError as e:
        print(f"prepare_data: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"prepare_data: {args.output} cannot be written: {e.strerror or e}", file=sys.stderr)
        return 1
    report(summary, args.output, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
