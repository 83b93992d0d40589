"""Prints held-out accuracy before and after training, from a run's metrics.jsonl."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    path = Path(sys.argv[1]) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    evaluated = [r for r in rows if "eval/accuracy" in r]
    first, last = evaluated[0], evaluated[-1]
    for name, row in (("before", first), ("after", last)):
        low, high = row["eval/accuracy_low"], row["eval/accuracy_high"]
        print(f"{name:>6}: step {row['step']}, {row['eval/accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%})")
    before, after = 100 * first["eval/accuracy"], 100 * last["eval/accuracy"]
    print(f"held-out accuracy (sampled): {before:.1f} % -> {after:.1f} %")


if __name__ == "__main__":
    main()
