"""Verdicts per second and per-row latency: the default grader beside plain math-verify.

    python benchmarks/grading.py [--rows 4000] [--output benchmarks/results/grading.md]

Two mixes of rows, made from the reference answers of the public benchmarks (see tests/unit/verify_rewrites.py):

- slow mix: tricky answers over-represented: rewrites, near misses and other rows' answers of MATH-500, OlympiadBench
  and Minerva, each distinct;
- ordinary outputs: 16 answers to each question, half of them right, in a box after 3000 characters of work.

Plain math-verify parses the reference and the response of every row and verifies, in this process, with its own
time-outs. Ours is measured in this process (the grader alone) and through a pool of one worker. The overhead of a row
is what the pool takes beyond the grader itself.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

from verify_rewrites import DATA, WORK, box, content, equivalents, near_misses, references  # noqa: E402

from megatron_nft.config import VerifyConfig  # noqa: E402
from megatron_nft.verify import VerifierPool, maths  # noqa: E402

Rows = list[tuple[str, str]]  # response, reference
TARGETS = {"slow mix": 1.4, "ordinary outputs": 3.0}  # rows per second of the pool, times plain math-verify
TARGET_OVERHEAD_MS = 0.1
REPEATS = 3


def slow_mix(count: int) -> Rows:
    """Distinct tricky rows."""
    generator = random.Random(0)
    answers = [a for name in ("math500", "olympiadbench", "minerva_math") for a in references(name)]
    rows = [
        (response, a) for a in answers for make in (equivalents, near_misses) for _, response in make(a) if response
    ]
    rows += [(box(content(other)), a) for a in answers for other in generator.sample(answers, 3)]
    rows = list(dict.fromkeys(rows))
    generator.shuffle(rows)
    return rows[:count]


def ordinary_outputs(count: int) -> Rows:
    """What a model writes: long work, a box at the end, 16 answers to a question."""
    generator = random.Random(1)
    answers = [a for name in ("math500", "gsm8k", "aime24", "amc23") for a in references(name)]
    rows: Rows = []
    while len(rows) < count:
        answer = generator.choice(answers)
        for index in range(16):
            given = answer if index % 2 else generator.choice(answers)
            rows.append((WORK * 30 + f"\n\nTherefore the answer is \\boxed{{{content(given)}}}.", answer))
    return rows[:count]


def plain_math_verify(response: str, answer: str) -> bool:
    """As its README says: parse both, verify."""
    from math_verify import parse, verify

    return verify(parse(f"\\boxed{{{answer}}}"), parse(response))


def ours(response: str, answer: str) -> bool:
    return maths.grade(response, answer, "", None).verdict == "correct"


def latencies(grade: Callable[[str, str], bool], rows: Rows) -> tuple[list[float], float]:
    """Milliseconds of each row, and the share of rows said to be correct."""
    times, correct = [], 0
    for response, answer in rows:
        start = time.perf_counter()
        correct += grade(response, answer)
        times.append(1e3 * (time.perf_counter() - start))
    return times, correct / len(rows)


def pool_ms(pool: VerifierPool, rows: Rows) -> float:
    """Milliseconds per row through the pool."""
    start = time.perf_counter()
    for future in [pool.submit(*row) for row in rows]:
        future.result()
    return 1e3 * (time.perf_counter() - start) / len(rows)


def overhead_ms() -> tuple[float, float]:
    """Pool time less grader time for rows that cost the grader next to nothing, the best of some runs; and the
    processor time of a row in the owner's process, which does not depend on what else the machine does."""
    from megatron_nft.verify import dapo

    rows = [(f"So it is \\boxed{{{index}}}.", "7") for index in range(20_000)]
    with VerifierPool(VerifyConfig(grader="dapo_boxed", workers=1)) as pool:
        pool.wait_ready()
        pool_ms(pool, rows[:1000])
        used = time.process_time()
        through_pool = min(pool_ms(pool, rows) for _ in range(REPEATS))
        owner_ms = 1e3 * (time.process_time() - used) / (REPEATS * len(rows))
    alone = min(
        statistics.mean(latencies(lambda r, a: dapo.grade_boxed(r, a, "", None).verdict == "correct", rows)[0])
        for _ in range(REPEATS)
    )
    return through_pool - alone, owner_ms


def measure(name: str, rows: Rows) -> Iterator[tuple[str, ...]]:
    """The table's lines for one mix; the last one compares."""
    for response, answer in rows[:50]:  # imports and caches that are filled once
        plain_math_verify(response, answer)
    plain, plain_correct = latencies(plain_math_verify, rows)
    yield line(name, "plain math-verify", plain, plain_correct)
    maths.gold_text.cache_clear()
    maths._readings.cache_clear()
    alone, our_correct = latencies(ours, rows)
    yield line(name, "ours, the grader alone", alone, our_correct)
    with VerifierPool(VerifyConfig(workers=1)) as pool:
        pool.wait_ready()
        through_pool = pool_ms(pool, rows)
    factor = statistics.mean(plain) / through_pool
    verdict = "met" if factor >= TARGETS[name] else "MISSED"
    yield (name, "ours, pool of one worker", f"{1e3 / through_pool:.0f}", f"{through_pool:.3f}", "", "", "", "")
    yield (name, f"factor {factor:.1f} (target {TARGETS[name]}: {verdict})", "", "", "", "", "", "")


def line(name: str, what: str, times: list[float], correct: float) -> tuple[str, ...]:
    ordered = sorted(times)
    mean = statistics.mean(times)
    p50, p99 = ordered[len(ordered) // 2], ordered[int(0.99 * len(ordered))]
    return (name, what, f"{1e3 / mean:.0f}", *(f"{t:.3f}" for t in (mean, p50, p99, ordered[-1])), f"{correct:.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "grading.md")
    args = parser.parse_args()
    if not DATA.is_dir():
        print(f"the public data is not in {DATA}; set NFT_DATA_DIR", file=sys.stderr)
        return 1
    header = ("mix", "grader", "rows/s", "mean ms", "p50 ms", "p99 ms", "max ms", "correct")
    load = os.getloadavg()[0]
    mixes = {"slow mix": slow_mix(args.rows), "ordinary outputs": ordinary_outputs(args.rows)}
    lines = [header, *(cells for name, rows in mixes.items() for cells in measure(name, rows))]
    overhead, owner_ms = overhead_ms()
    met = "met" if overhead <= TARGET_OVERHEAD_MS else "MISSED"
    text = "\n".join(
        [
            "# Grading",
            "",
            f"Measured on {datetime.date.today()} with `python benchmarks/grading.py --rows {args.rows}`; "
            f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, one core per grader, "
            f"load before the run {load:.1f}.",
            "",
            "| " + " | ".join(lines[0]) + " |",
            "|" + "---|" * len(header),
            *("| " + " | ".join(cells) + " |" for cells in lines[1:]),
            "",
            f"Overhead of the pool: {overhead:.3f} ms per row (target {TARGET_OVERHEAD_MS}: {met}); "
            f"processor time in the owner's process: {owner_ms:.3f} ms per row.",
            "",
            "`correct` is the share of rows accepted. The slow mix holds rewrites that are right and near misses that",
            "are wrong, on which graders differ; `tests/unit/test_verify_real_data.py` says which of them is right.",
            "",
        ]
    )
    print(text)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
