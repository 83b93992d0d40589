"""Nine arms on two tasks over many rollout seeds: paired differences to NFT.

    python benchmarks/grid.py [--seeds 10] [--tasks steps3 pairs] [--workers 2] [--out DIR]
    python benchmarks/grid.py --choose-lr                first, once: a learning rate for each arm and task

All arms of a task start from the same warmed-up model (seed 0) and, within a seed, draw the same questions with the
same random numbers. All of a seed's runs are made in one sitting, one process each, `--workers` at a time; a seed's
rows are written when all are done, so that an interrupted sitting repeats its seed. Learning rates are chosen by the
mean over two seeds that the comparison does not use. Writes rows.jsonl, lr.json and grid.md into OUT (default
benchmarks/results/grid). Only rows of one digest of the code are pooled.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from arms import GRID, ROOT, TABLE_HEAD, add_seed, compare_arms, describe, origin, read_seeds
from grid_tasks import is_right, pairs, write_pairs

sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
import prepare

from megatron_nft.data.synthetic import write_model

ARMS = {**GRID, "control": ("quickstart", ("verify.shuffle_within_groups=true",))}  # NFT, verdicts shuffled in groups
CONFIGS = tuple(sorted({config for config, _ in ARMS.values()}))
TASKS = ("steps3", "pairs")
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
LR_SEEDS = (1001, 1002)
HELD_OUT = {"steps3": prepare.NUM_HELD_OUT, "pairs": 2_000}
GEOMETRY = (  # a run takes about a minute of one core
    *("num_processes=1", "policy.tensor_model_parallel_size=1", "train.num_steps=60"),
    *("train.questions_per_step=32", "train.questions_per_optimizer_step=8", "rollout.questions_per_batch=48"),
    *("eval.every_steps=0", "checkpoint.every_steps=1000", "checkpoint.export_hf=false", "metrics.tensorboard=false"),
    *("optimizer.lr_warmup_steps=10", "optimizer.clip_grad=10"),
)


class Grid:
    """Starts and runs of a comparison of arms, in a folder of their own."""

    def __init__(
        self, work: Path, workers: int, extra: list[str], arms: Mapping[str, tuple[str, tuple[str, ...]]] = ARMS
    ) -> None:
        self.work, self.workers, self.extra, self.arms = work, workers, extra, arms
        self.configs = tuple(sorted({config for config, _ in arms.values()}))

    def start(self, task: str) -> Path:
        """The warmed-up model and the questions of a task, made once."""
        folder = self.work / f"start-{task}"
        if not (folder / ".warm").exists():
            model = write_model(folder / "model", seed=0)
            num_train, num_held_out = 10_000, HELD_OUT[task]
            if task == "pairs":
                write_pairs(folder / "task", num_train, num_held_out)
                drawn = pairs(num_train + num_held_out + prepare.NUM_CHECK)
                train, check = drawn[num_held_out : -prepare.NUM_CHECK], drawn[-prepare.NUM_CHECK :]
                prepare.warm_up(model, train, check, 0, is_right=is_right)
            else:
                prepare.main([str(folder)])
            (folder / ".warm").touch()
        return folder

    def run(self, task: str, arm: str, seed: int, lr: float, name: str) -> dict[str, Any]:
        """Train once and return what is kept of it. RuntimeError with the run's last lines where it fails."""
        start, run_dir = self.start(task), self.work / name / task / arm.replace(" ", "")
        config, settings = self.arms[arm]
        command = [sys.executable, "-m", "megatron_nft", "train", "--config", str(ROOT / "configs" / f"{config}.yaml")]
        command += [f"run_dir={run_dir}", f"seed={seed}", f"model.path={start / 'model'}", f"optimizer.lr={lr:g}"]
        command += [f"data.train=[{start / 'task' / 'train.jsonl'}]"]
        command += [f"eval.data=[{start / 'task' / 'held_out.jsonl'}]"]
        if task == "pairs":
            command += ["verify.grader=grid_tasks.grade"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        begun = time.monotonic()
        done = subprocess.run(
            [*command, *GEOMETRY, *settings, *self.extra],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{name} {task} {arm} ended with {done.returncode}:\n{done.stdout[-2000:]}")
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [row for row in rows if row["step"] > 0]
        return {
            "seed": seed,
            "task": task,
            "arm": f"{task}, {arm}",
            "lr": lr,
            "before": rows[0]["eval/accuracy"],
            "accuracy": rows[-1]["eval/accuracy"],
            "train_accuracy": [row["accuracy/train"] for row in steps],
            "entropy": [row["policy/entropy"] for row in steps],
            "clipped": float(np.mean([row["grad_norm/clipped"] for row in steps])),
            "groups": int(sum(row["groups/kept"] for row in steps)),
            "age": float(np.mean([row["age/mean"] for row in steps])),
            "seconds": time.monotonic() - begun,
            **origin(self.configs),
        }

    def run_all(self, wanted: list[tuple[str, str, int, float, str]]) -> list[dict[str, Any]]:
        """Runs, `workers` at a time, in their order; the first that fails ends the sitting."""
        for task in sorted({task for task, *_ in wanted}):
            self.start(task)
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda one: self.run(*one), wanted))


def choose_rates(grid: Grid, tasks: list[str], out: Path) -> dict[str, float]:
    """The learning rate with the best mean held-out accuracy over LR_SEEDS, of each arm and task."""
    wanted = [
        (task, arm, seed, lr, f"lr{lr:g}-{seed}")
        for task in tasks
        for arm in ARMS
        if arm != "control"
        for lr in LEARNING_RATES
        for seed in LR_SEEDS
    ]
    found: dict[str, dict[float, list[float]]] = {}
    for row in grid.run_all(wanted):
        found.setdefault(row["arm"], {}).setdefault(row["lr"], []).append(row["accuracy"])
    means = {arm: {lr: float(np.mean(values)) for lr, values in rates.items()} for arm, rates in found.items()}
    best = {arm: max(rates, key=lambda lr: rates[lr]) for arm, rates in means.items()}
    shown = {arm: {f"{lr:g}": value for lr, value in rates.items()} for arm, rates in means.items()}
    write = {"chosen": best, "accuracy": shown, "seeds": LR_SEEDS, **origin(CONFIGS)}
    (out / "lr.json").write_text(json.dumps(write, indent=1) + "\n", encoding="utf-8")
    return best


def read_rates(out: Path, tasks: list[str]) -> dict[str, float]:
    """What `--choose-lr` has written; the control takes NFT's. SystemExit where it is missing."""
    path = out / "lr.json"
    if not path.is_file():
        raise SystemExit(f"{path} is not there: run `python benchmarks/grid.py --choose-lr` first")
    rates: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["chosen"]
    return rates | {f"{task}, control": rates[f"{task}, NFT(1 - r)"] for task in tasks}


def report(seeds: dict[int, dict[str, dict[str, Any]]], tasks: list[str]) -> str:
    """Markdown: accuracies and paired differences to NFT(1 - r), per task."""
    lines = []
    order = sorted(seeds)
    for task in tasks:
        rows = {arm: [seeds[s][f"{task}, {arm}"] for s in order] for arm in ARMS}
        before = rows["NFT(1 - r)"][0]["before"]
        lines += ["", f"## {task}", "", f"Start: {before:.1%} of {HELD_OUT[task]} held-out questions. After training:"]
        lines += ["", "| arm | learning rate | accuracy, mean over seeds | lowest to highest | clipped updates |"]
        lines += ["|---|---|---|---|---|"]
        for arm, found in rows.items():
            values = [100 * row["accuracy"] for row in found]
            clipped = max(row["clipped"] for row in found)
            lines += [
                f"| {arm} | {found[0]['lr']:g} | {np.mean(values):.1f} % | {min(values):.1f} to {max(values):.1f} % | "
                f"at most {clipped:.1%} |"
            ]
        lines += ["", f"Differences to NFT(1 - r) within seeds, {len(order)} seeds:", "", *TABLE_HEAD.split("\n")]
        nft = [row["accuracy"] for row in rows["NFT(1 - r)"]]
        for arm, found in rows.items():
            if arm != "NFT(1 - r)":
                lines += [describe(arm, compare_arms([row["accuracy"] for row in found], nft))]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many there are to be in the end")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one process and one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "grid")
    parser.add_argument("--choose-lr", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for trials, with an OUT of their own")
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    digest = origin(CONFIGS)["digest"]
    grid = Grid(ROOT / "runs" / "grid" / f"{args.out.name}-{digest}", args.workers, args.settings)
    if args.choose_lr:
        print(json.dumps(choose_rates(grid, args.tasks, args.out), indent=1))
        return
    rates, path = read_rates(args.out, args.tasks), args.out / "rows.jsonl"
    while len(seeds := read_seeds(path, digest)) < args.seeds:
        seed = next(s for s in range(args.seeds) if s not in seeds)
        begun = time.monotonic()
        wanted = [(t, arm, seed, rates[f"{t}, {arm}"], f"seed{seed}") for t in args.tasks for arm in ARMS]
        add_seed(path, grid.run_all(wanted))
        print(f"seed {seed}: {len(wanted)} runs, {(time.monotonic() - begun) / 60:.1f} min", flush=True)
    one = next(iter(seeds[min(seeds)].values()))
    command = f"python benchmarks/grid.py --seeds {args.seeds} {' '.join(args.settings)}".rstrip()
    text = (
        f"# Nine arms on two tasks, paired over seeds\n\n{datetime.date.today()}, commit {one['commit']}, "
        f"code {digest}, {one['machine']}, torch {one['torch']}, `{command}`.\n{report(seeds, args.tasks)}\n"
    )
    (args.out / "grid.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
