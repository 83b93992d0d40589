"""How full micro-batches get, how evenly ranks are loaded, and how long the planning takes.

    python benchmarks/packing.py [--samples 8192] [--seeds 5]

Lengths are log-normal with a long tail, cut off at the token cap as generation cuts answers off at its limit. `pad`
puts answers into rectangles in the order given, `in order` starts a micro-batch whenever the next answer does not fit;
both are what packing replaces. Writes benchmarks/results/packing.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_nft.data.packing import attention_cost, balance, plan_micro_batches

RESULT = Path(__file__).resolve().parent / "results" / "packing.md"
HIDDEN_SIZE = 5120


def lengths_of(samples: int, seed: int) -> np.ndarray:
    """Long-tailed answer lengths in tokens, int64 [samples]."""
    return np.maximum(np.random.default_rng(seed).lognormal(6.5, 0.8, samples).astype(np.int64), 1)


def pad(lengths: np.ndarray, cap: int) -> int:
    """Tokens of padded micro-batches in the order given: rows x longest row <= cap."""
    total, rows, longest = 0, 0, 0
    for length in lengths.tolist():
        if rows and (rows + 1) * max(longest, length) > cap:
            total, rows, longest = total + rows * longest, 0, 0
        rows, longest = rows + 1, max(longest, length)
    return total + rows * longest


def in_order(lengths: np.ndarray, cap: int) -> int:
    """Tokens of room in packed micro-batches filled in the order given."""
    bins, room = 1, cap
    for length in lengths.tolist():
        if length > room:
            bins, room = bins + 1, cap
        room -= length
    return bins * cap


def packed(lengths: np.ndarray, cap: int) -> int:
    """Tokens of room in the micro-batches of `plan_micro_batches`."""
    return len(plan_micro_batches(lengths, cap)) * cap


def fill_table(samples: int, seeds: int) -> list[dict]:
    methods: dict[str, Callable[[np.ndarray, int], int]] = {"pad": pad, "in order": in_order, "ours": packed}
    rows = []
    for factor in (4, 8, 16):
        for name, method in methods.items():
            full, seconds = [], []
            for seed in range(seeds):
                lengths = lengths_of(samples, seed)
                cap = int(factor * lengths.mean())
                lengths = np.minimum(lengths, cap)
                started = time.perf_counter()
                room = method(lengths, cap)
                seconds.append(time.perf_counter() - started)
                full.append(lengths.sum() / room)
            rows.append({"cap": f"{factor} x mean", "method": name, "full_min": min(full), "seconds": min(seconds)})
    return rows


def balance_table(samples: int, seeds: int) -> list[dict]:
    rows = []
    for count, ranks in ((samples, 8), (samples, 64), (512, 8), (512, 32)):
        spread, in_turn, seconds = [], [], []
        for seed in range(seeds):
            costs = attention_cost(lengths_of(count, seed), HIDDEN_SIZE)
            started = time.perf_counter()
            bins = balance(costs, ranks)
            seconds.append(time.perf_counter() - started)
            loads = np.array([costs[b].sum() for b in bins])
            spread.append(loads.max() / loads.mean())
            in_turn.append(max(costs[r::ranks].sum() for r in range(ranks)) / loads.mean())
        rows.append(
            {
                "samples": count,
                "ranks": ranks,
                "ours_max": max(spread),
                "in_turn_max": max(in_turn),
                "seconds": min(seconds),
            }
        )
    return rows


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    fill = [
        [r["cap"], r["method"], f"{r['full_min']:.2%}", f"{r['seconds']:.3f}"]
        for r in fill_table(args.samples, args.seeds)
    ]
    loads = [
        [str(r["samples"]), str(r["ranks"]), f"{r['ours_max']:.6f}", f"{r['in_turn_max']:.3f}", f"{r['seconds']:.3f}"]
        for r in balance_table(args.samples, args.seeds)
    ]
    text = (
        f"# Packing\n\n{args.samples} answers, {args.seeds} seeds, one process; {datetime.date.today()}, "
        f"{platform.machine()}, Python {platform.python_version()}. `python benchmarks/packing.py`\n\n"
        + markdown(["token cap", "method", "full (worst seed)", "seconds (best seed)"], fill)
        + "\nBalance by attention cost: the heaviest rank's load over the mean.\n\n"
        + markdown(["answers", "ranks", "balanced (worst seed)", "dealt in turn", "seconds (best seed)"], loads)
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
