"""The quick start in each rollout.mode over seeds: held-out accuracy after the same number of trained answers.

    python benchmarks/mode_accuracy.py [--seeds 10] [--out DIR] [key=value …]

`synchronous` and `streaming` with the embedded engine, side by side, then `overlapped` with an SGLang server beside the
trainer (`bash tools/install_engine.sh sglang` first). Every run starts from the quick start's warmed-up model and
trains GEOMETRY of grid.py: 60 steps of 32 questions, 16 answers each, so all train as many answers; runs of a seed draw
the same questions. The seed's rows are written when its runs are done: an interrupted sitting repeats its seed and
keeps the others. Writes rows.jsonl and mode_accuracy.md into OUT (default benchmarks/results/mode_accuracy). Only rows
of one digest of the code are pooled. Settings other than the geometry's are for trials, with an OUT of their own.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path
from typing import Any

import numpy as np
from arms import ROOT, add_seed, compare_arms, origin, read_seeds
from grid import HELD_OUT, Grid

CONFIGS = ("quickstart",)
TASK, LR = "steps3", 3e-4  # the quick start's
TARGET = 0.03  # of the difference to `synchronous`
MODES: dict[str, tuple[str, tuple[str, ...]]] = {  # mode -> (file of configs/, settings)
    "synchronous": ("quickstart", ()),
    "streaming": ("quickstart", ("rollout.mode=streaming", "rollout.max_staleness=1")),
    "overlapped": (
        "quickstart",
        ("rollout.mode=overlapped", "rollout.max_staleness=1", "rollout.engine=sglang"),
    ),
}
EMBEDDED = ("synchronous", "streaming")  # one process each, so two at a time


def run_seed(grid: Grid, seed: int) -> list[dict[str, Any]]:
    """Train in every mode. RuntimeError where a run fails, or they have not trained the same number of groups."""
    rows = grid.run_all([(TASK, mode, seed, LR, f"seed{seed}") for mode in EMBEDDED])
    rows += grid.run_all([(TASK, mode, seed, LR, f"seed{seed}") for mode in MODES if mode not in EMBEDDED])
    if len({row["groups"] for row in rows}) > 1:
        raise RuntimeError(f"seed {seed}: groups trained are { ({row['arm']: row['groups'] for row in rows}) }")
    return rows


def report(seeds: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Markdown: accuracies, and differences to `synchronous` within seeds."""
    order = sorted(seeds)
    rows = {mode: [seeds[seed][f"{TASK}, {mode}"] for seed in order] for mode in MODES}
    first = rows["synchronous"][0]
    lines = [
        f"Start: {first['before']:.1%} of {HELD_OUT[TASK]} held-out questions, one sampled answer each. "
        f"After {first['groups']} trained groups, {len(order)} seeds:",
        "",
        "| mode | accuracy, mean over seeds | lowest to highest | mean age of tokens, in syncs | seconds of a run |",
        "|---|---|---|---|---|",
    ]
    for mode, found in rows.items():
        values = [100 * row["accuracy"] for row in found]
        age, seconds = (float(np.mean([row[name] for row in found])) for name in ("age", "seconds"))
        spread = f"{min(values):.1f} to {max(values):.1f} %"
        lines.append(f"| {mode} | {np.mean(values):.1f} % | {spread} | {age:.2f} | {seconds:.0f} |")
    lines += [
        "",
        "Differences to `synchronous` within seeds:",
        "",
        f"| mode | difference in points (95 %) | seeds won : lost (sign test) | within ± {100 * TARGET:g} points? |",
        "|---|---|---|---|",
    ]
    base = [row["accuracy"] for row in rows["synchronous"]]
    for mode, found in rows.items():
        if mode != "synchronous":
            d = compare_arms([row["accuracy"] for row in found], base)
            interval = d.paired.difference
            mean, low, high = (100 * value for value in (interval.mean, interval.low, interval.high))
            won = f"{d.wins} : {d.losses} (p {d.sign_p:.2f})"
            verdict = is_within(interval.low, interval.high)
            lines.append(f"| {mode} | {mean:+.1f} ({low:+.1f} to {high:+.1f}) | {won} | {verdict} |")
    return "\n".join(lines)


def is_within(low: float, high: float) -> str:
    """What the interval of a difference says of the target."""
    if low > TARGET or high < -TARGET:
        return "no"
    return "yes" if low >= -TARGET and high <= TARGET else "not decided"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many there are to be in the end")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "mode_accuracy")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for trials, with an OUT of their own")
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path, digest = args.out / "rows.jsonl", origin(CONFIGS)["digest"]
    grid = Grid(ROOT / "runs" / "mode_accuracy" / f"{args.out.name}-{digest}", 2, args.settings, MODES)
    while len(seeds := read_seeds(path, digest)) < args.seeds:
        seed = next(s for s in range(args.seeds) if s not in seeds)
        begun = time.monotonic()
        add_seed(path, run_seed(grid, seed))
        print(f"seed {seed}: {(time.monotonic() - begun) / 60:.1f} min", flush=True)
    one = next(iter(seeds[min(seeds)].values()))
    command = f"python benchmarks/mode_accuracy.py --seeds {args.seeds} {' '.join(args.settings)}".rstrip()
    text = (
        f"# The quick start in each mode of the rollouts\n\n{datetime.date.today()}, commit {one['commit']}, code "
        f"{digest}, {one['machine']}, torch {one['torch']}, `{command}`.\n\n{report(seeds)}\n"
    )
    (args.out / "mode_accuracy.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
