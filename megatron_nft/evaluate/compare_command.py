"""`megatron-nft compare A B`: is B better than A?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_nft.evaluate.compare import Comparison
    from megatron_nft.evaluate.intervals import PairedDifference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `compare`."""
    parser.add_argument("a", type=Path, metavar="A", help="folder of the first evaluation")
    parser.add_argument("b", type=Path, metavar="B", help="folder of the second")
    parser.add_argument(
        "--allow-different", action="store_true", help="compare although prompts, sampling, engine or versions differ"
    )
    parser.add_argument("--show", type=int, default=10, metavar="N", help="changed questions to print (default: 10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything, all changed questions too, as JSON")


def run(args: argparse.Namespace) -> int:
    """Compare and print; return 0 whichever is better, 2 where the two cannot be compared."""
    from megatron_nft.evaluate.compare import compare, to_json
    from megatron_nft.files import write_atomically

    try:
        comparisons, average, differ = compare(args.a, args.b, allow_different=args.allow_different)
        if args.out is not None:
            write_atomically(args.out, json.dumps(to_json(comparisons, average, differ), indent=2) + "\n")
    except (ValueError, OSError) as e:
        print(f"megatron-nft compare: {e}", file=sys.stderr)
        return 2
    if differ:
        print("the protocols differ:\n  " + "\n  ".join(differ) + "\n")
    print(_table(comparisons, average))
    print(_notes(comparisons))
    for c in comparisons:
        _print_changes(c, args.show)
    return 0


def _row(name: str, questions: str, mean_a: float, mean_b: float, paired: PairedDifference, p: float) -> list[str]:
    from megatron_nft.evaluate.compare import verdict

    d = paired.difference
    interval = f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
    return [name, questions, f"{100 * mean_a:.1f}", f"{100 * mean_b:.1f}", interval, f"{p:.3f}", verdict(d.mean, p)]


def _table(comparisons: list[Comparison], average: dict[str, Any] | None) -> str:
    corrected = f"p of {len(comparisons)}" if len(comparisons) > 1 else "p"
    header = ["benchmark", "questions", "A %", "B %", "B - A, points [95 %]", corrected, ""]
    rows = [_row(c.name, str(c.questions), c.a, c.b, c.paired, c.p_corrected) for c in comparisons]
    if average is not None:
        rows.append(_row("average", "", average["a"], average["b"], average["paired"], average["paired"].p_value))
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [header, *rows])


def _notes(comparisons: list[Comparison]) -> str:
    from megatron_nft.evaluate.compare import NOTE

    if len(comparisons) < 2:
        return NOTE
    return (
        f"Each interval is that of one benchmark; p-values of benchmarks, and what is said of them, are corrected for "
        f"{len(comparisons)} benchmarks (Holm). {NOTE}"
    )


def _print_changes(comparison: Comparison, limit: int) -> None:
    gained = sum(change.b > change.a for change in comparison.changes)
    print(f"\n{comparison.name}: {gained} questions gained, {len(comparison.changes) - gained} lost")
    for change in comparison.changes[:limit]:
        question = " ".join(change.prompt.split())
        print(f"  {100 * change.a:5.1f} -> {100 * change.b:5.1f} %  [{change.id}] {question[:90]}")
    if len(comparison.changes) > limit:
        print(f"  ... and {len(comparison.changes) - limit} more (--show, or --out for all)")
