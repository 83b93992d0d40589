"""NFT is a policy gradient when it is strictly on-policy: the same weights, through the whole trainer.

    python benchmarks/identity.py [--layout single | tp2 | pp2] [--steps 4] [--out DIR]

Trains a small random model from one start with NFT, Dr. GRPO and GRPO and compares the weights that come out: after
generation, grading, packing, Megatron, Adam and the weight sync of every step. With one update per step every ratio is
1, and

    NFT with omega = 1 - r               ends in the weights of Dr. GRPO, bit for bit,
    NFT with omega = sqrt((1 - r) / r)   in those of GRPO, up to 1e-5;

other pairs do not, and with four updates per step none does. The grader is a coin that the text decides (`grade`): a
model with random weights is right half of the time, and no warm-up is needed. A minute on two cores. Exit status 1
where one of the four statements is false.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {
    "single": ["num_processes=1"],
    "tp2": ["num_processes=2", "policy.tensor_model_parallel_size=2"],
    "pp2": ["num_processes=2", "policy.pipeline_model_parallel_size=2"],
}
ARMS = {
    "NFT(1 - r)": ["algorithm.name=nft", "algorithm.prompt_weight=dr_grpo"],
    "Dr. GRPO": ["algorithm.name=dr_grpo"],
    "NFT(sqrt)": ["algorithm.name=nft", "algorithm.prompt_weight=grpo"],
    "GRPO": ["algorithm.name=grpo"],
}
QUESTIONS, UPDATES = 8, 4  # per step; updates in the arms that are off-policy
SETTINGS = [
    *("policy.precision=fp32", "policy.micro_batch_tokens=512", "algorithm.loss_divisor=200"),
    *("optimizer.lr=3e-4", "optimizer.lr_warmup_steps=0", "optimizer.weight_decay=0.0"),
    *(f"rollout.questions_per_batch={2 * QUESTIONS}", "rollout.answers_per_question=8"),
    *("rollout.max_response_tokens=12", "rollout.max_staleness=0", "data.max_prompt_tokens=16"),
    *(f"train.questions_per_step={QUESTIONS}", "verify.grader=identity.grade", "metrics.tensorboard=false"),
]


def grade(response: str, answer: str, data_source: str, extra: dict[str, Any] | None) -> bool:
    """True where the characters' code points add up to an even number."""
    return sum(map(ord, response)) % 2 == 0


def make_start(folder: Path) -> list[str]:
    """A random model and questions; the settings that name them."""
    from megatron_nft.data.synthetic import write_model, write_task

    train, _ = write_task(folder / "task", num_train=256, num_held_out=1)
    model = write_model(folder / "model")
    # A random model seldom says the one end token: here a third of all tokens end an answer.
    generation = model / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": list(range(2, 260, 3))}))
    return [f"model.path={model}", f"data.train=[{train}]"]


def train(run_dir: Path, settings: list[str]) -> None:
    """One run; SystemExit with its output where it fails."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = run_dir / "empty.yaml"
    config.write_text("{}\n")
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_nft", "train", "--config", str(config), f"run_dir={run_dir}", *settings]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{run_dir.name} failed:\n{done.stdout}")


def largest_difference(a: Path, b: Path) -> float:
    """Of two runs' weights."""
    from safetensors.numpy import load_file

    one, other = (
        {k: v for p in sorted((run / "hf").glob("*.safetensors")) for k, v in load_file(p).items()} for run in (a, b)
    )
    assert one.keys() == other.keys()
    return max(float(abs(one[name].astype("float64") - other[name]).max()) for name in one)


def furthest_ratio(run: Path) -> float:
    """The largest of R and 1 / R over all updates; 1.0 where training was strictly on-policy."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(max(row["ratio/max"], row["ratio/max_inverse"]) for row in rows if row["step"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="single")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, help="folder for the runs; by default they are thrown away")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        common = [*make_start(out / "start"), *SETTINGS, *LAYOUTS[args.layout], f"train.num_steps={args.steps}"]
        per_update = "train.questions_per_optimizer_step="
        runs = {name: [*arm, f"{per_update}{QUESTIONS}"] for name, arm in ARMS.items()}
        for name in ("NFT(1 - r)", "Dr. GRPO"):
            runs[f"{name}, off-policy"] = [*ARMS[name], f"{per_update}{QUESTIONS // UPDATES}"]
        with ThreadPoolExecutor(max_workers=2) as pool:  # most of a run's time is its start
            list(pool.map(lambda run: train(out / run[0], [*common, *run[1]]), runs.items()))
        return report(out)


def report(out: Path) -> int:
    """Print the table; 1 where a statement of the module's text is false."""
    checks = [
        ("NFT(1 - r)", "Dr. GRPO", "bit for bit", lambda d: d == 0.0),
        ("NFT(sqrt)", "GRPO", "to 1e-5", lambda d: d <= 1e-5),
        ("NFT(1 - r)", "GRPO", "no", lambda d: d > 1e-4),
        ("NFT(sqrt)", "Dr. GRPO", "no", lambda d: d > 1e-4),
        ("NFT(1 - r), off-policy", "Dr. GRPO, off-policy", "no", lambda d: d > 1e-5),
    ]
    good = True
    print("| runs | | furthest ratio from 1 | same weights | largest difference | |\n|---|---|---|---|---|---|")
    for a, b, expected, holds in checks:
        difference = largest_difference(out / a, out / b)
        ratio = max(furthest_ratio(out / a), furthest_ratio(out / b))
        held = holds(difference) and (ratio > 1.0 if "off-policy" in a else ratio == 1.0)
        good &= held
        print(f"| {a} | {b} | {ratio:.7g} | {expected} | {difference:.2e} | {'as said' if held else 'NOT AS SAID'} |")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
