"""Trained tokens per second of each rollout.mode, with a real trainer and a server that only waits.

    python benchmarks/rollout_modes.py [--workload benchmarks/rollout_modes.json] [--ratios 0.5 1 2]
                                       [--repetitions N] [--out FILE]

The workload stands in one file and is the same for all modes: questions, answers and lengths (log-normal, the 7B run's
mean and longest answer divided by 37). A tenth of the answers is right, so that about a third of the groups can be
trained, as in the published geometry of 1536 questions for 512. One thing is measured first: the seconds that this
trainer takes for a step without generation. A token of the server then takes as long as makes a synchronous step's
generation `generation_to_training` times that. Steps of the warm-up are left out; every repetition runs all modes in
turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_nft.data.synthetic import write_model, write_task
from megatron_nft.processes import free_port

HERE = Path(__file__).resolve().parent
MODES = ("synchronous", "streaming", "overlapped")


def run(folder: Path, work: dict[str, Any], mode: str, token_s: float, seed: int, steps: int) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of a run in `folder` of `steps` steps."""
    folder.mkdir()
    engine = {name: work[name] for name in ("mean_tokens", "max_tokens", "spread", "max_rows")} | {"seed": seed}
    engine |= dict.fromkeys(("context_s", "row_s", "overhead_s", "prefill_s"), 0.0) | {"weights_s": token_s}
    (folder / "engine.json").write_text(json.dumps(engine))
    port, start = free_port(), folder.parent / "start"
    settings = {
        "run_dir": str(folder / "run"),
        "seed": seed,
        "num_processes": 2,
        "model": {"path": str(start / "model")},
        "policy": {"tensor_model_parallel_size": 2, "precision": "fp32", "micro_batch_tokens": 2048},
        "algorithm": {"loss_divisor": "tokens"},
        "data": {"train": [str(start / "task" / "train.jsonl")], "max_prompt_tokens": 16},
        "rollout": {
            "engine": "sglang",
            "mode": mode,
            "max_staleness": 0 if mode == "synchronous" else work["max_staleness"],
            "questions_per_batch": work["questions_per_batch"],
            "answers_per_question": work["answers_per_question"],
            "max_response_tokens": work["max_tokens"],
            "server": {"urls": [f"http://127.0.0.1:{port}"]},
        },
        "sync": {"transport": "disk", "probe_tolerance": 1e9, "in_flight": "abort"},
        "verify": {"grader": "waiting_engine.grade_few"},
        "train": {"num_steps": steps, "questions_per_step": work["questions_per_step"]},
        "checkpoint": {"every_steps": 10**6, "export_hf": False},
        "metrics": {"tensorboard": False},
    }
    settings["train"]["questions_per_optimizer_step"] = work["questions_per_step"] // 2
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(HERE / "waiting_engine.py"), "--port", str(port)]
    server = subprocess.Popen([*command, "--settings", str(folder / "engine.json")], stdout=subprocess.PIPE, text=True)
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    try:
        assert server.stdout is not None and server.stdout.readline() == "ready\n", "the server did not start"
        command = [sys.executable, "-m", "megatron_nft", "train", "--config", str(folder / "config.yaml")]
        with (folder / "log").open("w") as log:
            env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env, check=False)
    finally:
        server.kill()
        server.wait()
    if done.returncode:
        raise RuntimeError(f"{mode}: exit status {done.returncode}:\n{(folder / 'log').read_text()[-3000:]}")
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][1:]


def figures(rows: list[dict[str, Any]], warm_up: int) -> dict[str, float]:
    """Of the steps after the warm-up."""
    rows = rows[warm_up:]
    total = sum(row["seconds/total"] for row in rows)
    return {
        "tokens_per_s": sum(row["tokens/trained"] for row in rows) / total,
        "step_s": total / len(rows),
        "generate_s": sum(row["seconds/generate"] for row in rows) / len(rows),
        "age": float(np.mean([row["age/mean"] for row in rows])),
    }


def measure(folder: Path, work: dict[str, Any], repetitions: int, ratio: float) -> dict[str, list[dict[str, float]]]:
    """Figures of every repetition of every mode."""
    steps = work["warm_up"] + work["steps"]
    calibration = figures(run(folder / f"calibrate-{ratio:g}", work, "synchronous", 1e-4, 0, steps), work["warm_up"])
    training_s = calibration["step_s"] - calibration["generate_s"]
    # Beside the time of tokens, generation has costs of its own; a second run with longer tokens tells them apart.
    probe = figures(run(folder / f"probe-{ratio:g}", work, "synchronous", 0.02, 0, steps), work["warm_up"])
    of_tokens = probe["generate_s"] - calibration["generate_s"]
    token_s = max(1e-4, 0.02 * (ratio * training_s - calibration["generate_s"]) / of_tokens)
    print(f"a step without generation takes {training_s:.2f} s; a token {token_s * 1000:.1f} ms", flush=True)
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for repetition in range(repetitions):
        for mode in MODES:
            rows = run(folder / f"{mode}-{ratio:g}-{repetition}", work, mode, token_s, repetition + 1, steps)
            found[mode].append(figures(rows, work["warm_up"]))
            print(mode, {name: round(value, 3) for name, value in found[mode][-1].items()}, flush=True)
    return found


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Markdown rows: means over repetitions, and the speed-up with its smallest and largest."""
    lines = [
        "| mode | trained tokens/s | of synchronous | step s | generate s | mean age |",
        "|---|---|---|---|---|---|",
    ]
    base = [entry["tokens_per_s"] for entry in found["synchronous"]]
    for mode, entries in found.items():
        mean = {name: float(np.mean([entry[name] for entry in entries])) for name in entries[0]}
        ratios = [entry["tokens_per_s"] / b for entry, b in zip(entries, base, strict=True)]
        spread = f"{np.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        cells = (mode, f"{mean['tokens_per_s']:.0f}", spread, f"{mean['step_s']:.2f}", f"{mean['generate_s']:.2f}")
        lines.append(f"| {' | '.join(cells)} | {mean['age']:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", type=Path, default=HERE / "rollout_modes.json")
    parser.add_argument("--ratios", type=float, nargs="*", help="of generation to training; default: the workload's")
    parser.add_argument("--repetitions", type=int, help="default: the workload's")
    parser.add_argument("--out", type=Path, help="write the tables there as well")
    args = parser.parse_args()
    work = json.loads(args.workload.read_text())
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_task(folder / "start" / "task", num_train=2000, num_held_out=1)
        write_model(folder / "start" / "model")
        for ratio in args.ratios or [work["generation_to_training"]]:
            found = measure(folder, work, args.repetitions or work["repetitions"], ratio)
            lines += [f"generation : training = {ratio:g} : 1", "", *table(found), ""]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
