"""What the default grader accepts of the reference answers of the public benchmarks, beside plain math-verify.

    python benchmarks/grading_accuracy.py [--plain-every 13] [--output benchmarks/results/grading_accuracy.md]

Every reference answer is given in the ways of tests/unit/verify_rewrites.py: itself in 22 wrappings, equivalent
rewrites, near misses that are wrong, and the answers of other rows of its benchmark. Ours grades all of them; plain
math-verify, which is slower, every n-th.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

from verify_rewrites import (  # noqa: E402
    BENCHMARKS,
    DATA,
    box,
    content,
    equivalents,
    near_misses,
    other_rows,
    references,
    wrappings,
)

from megatron_nft.verify import maths  # noqa: E402

Grade = Callable[[str, str], bool]
TARGETS = "Target: at least 99.5 (Minerva 99), 98, at most 0.5 (both over all), 2 in 10,000"
OTHER_ROWS = 10_000  # pairs per benchmark


def ours(response: str, answer: str) -> bool:
    return maths.grade(response, answer, "", None).verdict == "correct"


def plain_math_verify(response: str, answer: str) -> bool:
    """As its README says: parse both, verify."""
    from math_verify import parse, verify

    return verify(parse(f"\\boxed{{{answer}}}"), parse(response))


def columns(benchmark: str) -> dict[str, Iterator[tuple[str, str]]]:
    """(response, reference) by kind."""
    answers = references(benchmark)
    makers = {"itself": wrappings, "rewrites": equivalents, "near misses": near_misses}
    made = {kind: _rows(make, answers) for kind, make in makers.items()}
    return made | {"other rows": ((box(content(o)), g) for g, o in other_rows(answers, OTHER_ROWS))}


def _rows(make: Callable[[str], Iterator[tuple[str, str]]], answers: list[str]) -> Iterator[tuple[str, str]]:
    return ((response, a) for a in answers for _, response in make(a) if response)


def measure(grade: Grade, every: int) -> list[dict[str, tuple[int, int]]]:
    """Per benchmark and kind: how many were accepted, and how many there were."""
    counts = []
    for benchmark in BENCHMARKS:
        of_benchmark = {}
        for kind, rows in columns(benchmark).items():
            said = [grade(*row) for row in itertools.islice(rows, 0, None, every)]
            of_benchmark[kind] = (sum(said), len(said))
        counts.append(of_benchmark)
    return counts


def table(counts: list[dict[str, tuple[int, int]]]) -> list[str]:
    """Markdown: accepted in percent and of how many."""
    kinds = list(counts[0])
    total = {kind: tuple(map(sum, zip(*(c[kind] for c in counts), strict=True))) for kind in kinds}
    lines = ["| benchmark | " + " | ".join(kinds) + " |", "|" + "---|" * (len(kinds) + 1)]
    for name, cells in zip((*BENCHMARKS, "all"), (*counts, total), strict=True):
        lines.append(f"| {name} | " + " | ".join(cell(*cells[kind]) for kind in kinds) + " |")
    return lines


def cell(accepted: int, rows: int) -> str:
    return f"{100 * accepted / rows:.2f} % ({accepted} of {rows:,})" if rows else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain-every", type=int, default=13, metavar="N", help="0: leave plain math-verify out")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "grading_accuracy.md")
    args = parser.parse_args()
    if not DATA.is_dir():
        print(f"the public data is not in {DATA}; set NFT_DATA_DIR", file=sys.stderr)
        return 1
    lines = [
        "# What graders accept",
        "",
        f"Measured on {datetime.date.today()} with `python benchmarks/grading_accuracy.py`. Share accepted: of the",
        "reference answers themselves and of equivalent rewrites it should be high, of near misses and of other rows'",
        "answers low. " + TARGETS + ".",
        "",
        "## maths, our default",
        "",
        *table(measure(ours, 1)),
    ]
    if args.plain_every:
        plain = table(measure(plain_math_verify, args.plain_every))
        lines += ["", f"## Plain math-verify 0.9.0, every {args.plain_every}th row", "", *plain]
    lines += [
        "",
        "Other rows' answers that are equal in value (x=5 and 5) count as accepted all the same.",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
