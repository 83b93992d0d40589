"""Where the seconds of a training step go on the quick start.

    python benchmarks/step_breakdown.py [RUN_DIR]      a finished run; default: 30 steps of its own

Means over steps; evaluation and checkpoints are left out of the total and set apart below. `overhead` is everything
that is neither generation, verification, log-probs, forward/backward nor the optimizer. Writes
benchmarks/results/step_breakdown.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WORK = ("generate", "logprobs", "train")
"""generate holds verification, which overlaps it; train holds packing, forward/backward and the optimizer."""
ASIDE = ("evaluate", "evaluate_wait", "checkpoint", "checkpoint_wait", "export")
NUM_STEPS = 30


def run_quickstart(folder: Path) -> Path:
    """A short quick start from a barely warmed-up model."""
    prepare = ROOT / "examples" / "quickstart" / "prepare.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(prepare), str(folder / "start"), "--target", "0.3"], check=True, env=env)
    task, run_dir = folder / "start" / "task", folder / "run"
    command = [sys.executable, "-m", "megatron_nft", "train", "--config", str(ROOT / "configs" / "quickstart.yaml")]
    command += [f"run_dir={run_dir}", f"model.path={folder / 'start' / 'model'}", f"train.num_steps={NUM_STEPS}"]
    command += [f"data.train=[{task / 'train.jsonl'}]", "eval.data=[]"]
    subprocess.run(command, check=True, env=env)
    return run_dir


def breakdown(run_dir: Path) -> str:
    """The table of a run. Steps that needed no or several generation batches count as they are."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["step"] > 2]  # the first ones fill caches
    prefix = "seconds/"
    aside = np.array([sum(r.get(prefix + n, 0.0) for n in ASIDE) for r in rows])
    total = np.array([r[prefix + "total"] for r in rows]) - aside
    phases = sorted({k.removeprefix(prefix) for r in rows for k in r if k.startswith(prefix)})
    phases = [p for p in phases if p not in (*ASIDE, "total", "verify_wait", "verify_per_answer", "start")]
    seconds = {p: np.array([r.get(prefix + p, 0.0) for r in rows]) for p in phases}
    seconds["rest (gathering of metrics)"] = total - sum(seconds.values())
    work = sum(seconds[p] for p in WORK)
    lines = ["| phase | mean s | share of the step |", "|---|---|---|"]
    for name, values in sorted(seconds.items(), key=lambda item: -item[1].sum()):
        lines.append(f"| {name} | {values.mean():.3f} | {values.sum() / total.sum():.1%} |")
    lines.append(f"| **step** | {total.mean():.3f} | 100 % |")
    lines.append(f"| **overhead** (all but {', '.join(WORK)}) | {(total - work).mean():.3f} | "
                 f"**{1 - work.sum() / total.sum():.1%}** (target: at most 10 %) |")  # fmt: skip
    answers = [r for r in rows if prefix + "verify_per_answer" in r]
    wait = np.array([r[prefix + "verify_wait"] for r in answers])
    per_answer = np.array([r[prefix + "verify_per_answer"] for r in answers])
    lines += [
        "",
        f"Verification overlaps generation: {1e3 * per_answer.mean():.3f} ms of a worker per answer; after the last "
        f"answer the slowest rank waited {wait.mean():.3f} s for verdicts, {wait.sum() / total.sum():.1%} of the step.",
        f"Beside the steps: {aside.sum() / len(rows):.3f} s per step of evaluation and checkpoints.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, nargs="?")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = breakdown(args.run_dir or run_quickstart(Path(scratch)))
    print(text)
    path = ROOT / "benchmarks" / "results" / "step_breakdown.md"
    path.parent.mkdir(exist_ok=True)
    machine = f"{datetime.date.today()}, {os.cpu_count()} CPU cores, 2 processes."
    path.write_text(f"# Where a step of the quick start goes\n\n{machine}\n\n{text}\n")


if __name__ == "__main__":
    main()
