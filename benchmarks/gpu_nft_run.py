"""A whole NFT run on one GPU: 113M parameters, steps3, Transformer Engine, SGLang on the same GPU asleep in between.

The accuracy curve, the share of each phase, and the memory of each phase at the beginning and the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
from gpu_common import ROOT, Results, free_memory
from gpu_engines import server_settings
from gpu_task import MAX_RESPONSE_TOKENS, NUM_HELD_OUT, NUM_TRAIN, warm_model

from megatron_nft.config import PolicyConfig
from megatron_nft.data.synthetic import write_task
from megatron_nft.policy import parallel

FOLDER = ROOT / "runs" / "gpu"
STEPS, RUN_S = 60, 300
GIB = 1 << 30


def settings() -> dict:
    train, held_out = write_task(FOLDER / "task", NUM_TRAIN, NUM_HELD_OUT)
    return {
        "run_dir": str(FOLDER / "nft"),
        "model": {"path": str(FOLDER / "warm")},
        "policy": {"micro_batch_tokens": 32768},
        "optimizer": {"lr": 2e-5, "lr_warmup_steps": 5, "weight_decay": 0.0},
        "algorithm": {"loss_divisor": "tokens"},
        "data": {"train": [str(train)], "max_prompt_tokens": 16},
        "eval": {"data": [str(held_out)], "every_steps": 10},
        "rollout": {
            "engine": "sglang",
            "answers_per_question": 16,
            "questions_per_batch": 256,
            "max_response_tokens": MAX_RESPONSE_TOKENS,
            "server": server_settings(memory_saver=True, max_running_requests=256, mem_fraction_static=0.3),
        },
        "verify": {"workers": 8},
        "train": {"num_steps": STEPS, "questions_per_step": 128, "questions_per_optimizer_step": 32},
        "checkpoint": {"every_steps": 30, "export_hf": False},
        "metrics": {"tensorboard": False},
    }


def run() -> None:
    """Goes on from the newest checkpoint where there is one."""
    path = FOLDER / "nft.json"
    path.write_text(json.dumps(settings()))
    command = [sys.executable, "-m", "megatron_nft", "train", "--config", str(path)]
    try:
        subprocess.run(command, check=True, timeout=RUN_S, env=dict(os.environ))
    except subprocess.TimeoutExpired:
        print(f"the run was ended after {RUN_S} s; what it reached is reported", flush=True)


def phases(rows: list[dict]) -> dict:
    """Seconds of each phase, the mean over steps, and its share of the step."""
    total = np.mean([r["seconds/total"] for r in rows])
    names = ("generate", "exchange", "logprobs", "write", "train", "sync")
    seconds = {n: float(np.mean([r.get(f"seconds/{n}", 0.0) for r in rows])) for n in names}
    return {"step s": float(total), **{f"{n} share": s / total for n, s in seconds.items()}}


def memory(row: dict) -> dict:
    names = ("generate", "logprobs", "train", "sync")
    return {f"{n} {kind} GiB": row[f"memory/{n}_{kind}_bytes"] / GIB for n in names for kind in ("peak", "device")}


def main() -> None:
    results = Results(
        "nft_run",
        f"{STEPS} steps of 128 questions x 16 answers, 4 optimizer steps each, lr 2e-5, NFT's published settings else; "
        "held-out accuracy is of one sample at temperature 1 for each of 500 questions.",
    )
    if results.get("accuracy") is not None:
        return
    warm_model(parallel.initialize(PolicyConfig(), seed=1), FOLDER, seconds=120)
    parallel.shutdown()
    free_memory()
    run()
    rows = [json.loads(line) for line in (FOLDER / "nft" / "metrics.jsonl").read_text().splitlines()]
    held_out = {f"held-out, step {r['step']}": r["eval/accuracy"] for r in rows if "eval/accuracy" in r}
    steps = [r for r in rows if r["step"] > 0]
    if len(steps) < 10:
        results.add("accuracy", failed=f"only {len(steps)} steps")
        return
    gap = {"gap mean": float(np.mean([r["gap/mean"] for r in steps])), "gap max": max(r["gap/max"] for r in steps)}
    results.add("phases", **phases(steps[2:]), **gap)
    results.add("memory, step 3", **memory(steps[2]))
    results.add(f"memory, step {steps[-1]['step']}", **memory(steps[-1]))
    sampled = {f"sampled, step {r['step']}": r["accuracy/train"] for r in steps[:: max(1, len(steps) // 6)]}
    results.add("accuracy", **held_out, **sampled)


if __name__ == "__main__":
    main()
