"""NFT beside RFT and GRPO on the quick start, over several seeds, with a negative control.

    python benchmarks/quickstart_algorithms.py [--seeds 0 1 2] [--out DIR] [--finished] [key=value …]

Every algorithm of a seed starts from the same warmed-up model. The control is NFT with verdicts shuffled within each
group. Held-out accuracy is of 500 questions, sampled once each at temperature 1. Finished runs are not repeated, and an
interrupted one goes on from its checkpoint; `--finished` starts none and reports those that are there. Writes
benchmarks/results/quickstart_algorithms.md and .png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ALGORITHMS = {
    "NFT": ("quickstart", ()),
    "RFT": ("quickstart_rft", ()),
    "GRPO": ("quickstart_grpo", ()),
    "control": ("quickstart", ("verify.shuffle_within_groups=true",)),
}


def run_one(name: str, seed: int, out: Path, extra: list[str]) -> list[dict]:
    """Train once (or go on, or find it done) and return metrics.jsonl."""
    config, overrides = ALGORITHMS[name]
    start, run_dir = out / f"start-{seed}", out / f"{name.lower()}-{seed}"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not (start / ".warm").exists():
        prepare = ROOT / "examples" / "quickstart" / "prepare.py"
        subprocess.run([sys.executable, str(prepare), str(start), "--seed", str(seed)], check=True, env=env)
        (start / ".warm").touch()
    if not (run_dir / "hf").is_dir():
        task = start / "task"
        command = [sys.executable, "-m", "megatron_nft", "train", "--config", str(ROOT / "configs" / f"{config}.yaml")]
        command += [f"run_dir={run_dir}", f"seed={seed}", f"model.path={start / 'model'}"]
        command += [f"data.train=[{task / 'train.jsonl'}]", f"eval.data=[{task / 'held_out.jsonl'}]"]
        subprocess.run([*command, *overrides, *extra], check=True, env=env)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(rows: list[dict]) -> np.ndarray:
    """[N, 4]: step, accuracy, and its 95 % interval over questions, of every evaluation."""
    names = ("step", "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high")
    return np.array([[r[n] for n in names] for r in rows if "eval/accuracy" in r])


def cell(c: np.ndarray) -> str:
    """Start, end and its interval."""
    return f"{c[0, 1]:.1%} -> {c[-1, 1]:.1%} ({c[-1, 2]:.1%} to {c[-1, 3]:.1%})"


def table(curves: dict[tuple[str, int], np.ndarray], seeds: list[int]) -> str:
    """Start and end per seed, mean gain, and its 95 % interval over seeds (Student's t)."""
    quantile = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # t, two-sided 95 %, by degrees of freedom
    head = " | ".join(f"seed {s}" for s in seeds)
    lines = [f"| | {head} | mean gain (95 % over seeds) |", "|---|" + "---|" * (len(seeds) + 1)]
    for name in ALGORITHMS:
        ends = {s: curves[name, s][-1] for s in seeds if (name, s) in curves}
        starts = {s: curves[name, s][0, 1] for s in ends}
        cells = [
            f"{starts[s]:.1%} -> {ends[s][1]:.1%} ({ends[s][2]:.1%} to {ends[s][3]:.1%})" if s in ends else "not run"
            for s in seeds
        ]
        gains = np.array([100 * (ends[s][1] - starts[s]) for s in ends])
        mean = f"{gains.mean():+.1f} points" if len(gains) else ""
        if len(gains) > 1:
            half = quantile.get(len(gains) - 1, 1.96) * gains.std(ddof=1) / np.sqrt(len(gains))
            mean += f" (± {half:.1f})"
        lines.append(f"| {name} | {' | '.join(cells)} | {mean} |")
    return "\n".join(lines)


def plot(curves: dict[tuple[str, int], np.ndarray], seeds: list[int], path: Path) -> None:
    """Mean over seeds, with the range over seeds shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in ALGORITHMS:
        found = [curves[name, s] for s in seeds if (name, s) in curves]
        if not found:
            continue
        stacked = np.stack(found)
        accuracy = 100 * stacked[:, :, 1]
        (line,) = axes.plot(
            stacked[0, :, 0], accuracy.mean(0), marker="o", markersize=3, label=f"{name} ({len(found)})"
        )
        axes.fill_between(stacked[0, :, 0], accuracy.min(0), accuracy.max(0), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="training step", ylabel="held-out accuracy, sampled (%)", ylim=(0, 100))
    axes.set_title("quick start, mean and range over (number of) seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quickstart_algorithms")
    parser.add_argument("--finished", action="store_true", help="report the finished runs, start none")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    wanted = [(n, s) for s in args.seeds for n in ALGORITHMS]
    if args.finished:
        wanted = [(n, s) for n, s in wanted if (args.out / f"{n.lower()}-{s}" / "hf").is_dir()]
    rows = {(n, s): run_one(n, s, args.out, args.overrides) for n, s in wanted}
    curves = {key: curve(r) for key, r in rows.items()}
    text = table(curves, args.seeds)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    steps = int(next(iter(curves.values()))[-1, 0])
    (RESULTS / "quickstart_algorithms.md").write_text(
        f"# Quick start: NFT, RFT, GRPO and a negative control\n\n{datetime.date.today()}, {os.cpu_count()} CPU cores, "
        f"{steps} training steps, `python benchmarks/quickstart_algorithms.py {' '.join(args.overrides)}`.\n"
        "Held-out accuracy of 500 questions, one sample each at temperature 1, before -> after, with the 95 %\n"
        "bootstrap interval over questions of the latter. All algorithms of a seed start from the same model.\n\n"
        f"{text}\n\n![accuracy over training](quickstart_algorithms.png)\n"
    )
    plot(curves, args.seeds, RESULTS / "quickstart_algorithms.png")


if __name__ == "__main__":
    main()
