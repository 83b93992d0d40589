"""A run folder as the loop writes one, with made-up figures and answers, for tests of the report page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_nft.data.rollout_file import rollout_path, write_rollouts
from megatron_nft.types import Prompt, Rollout, RolloutGroup, Verdict

WORK = (
    "First we write the sum as $\\frac{{a}}{{b}} = {x}$, so that\n\\[ S = \\sum_{{k=1}}^{{{x}}} k^2 \\]\n"
    "The ticket costs $5 and the bus costs $7, which changes nothing.\nSo the answer is \\boxed{{{x}}}."
)


def make_group(rng: np.random.Generator, step: int, draw: int, answers: int, tokenizer, work=WORK) -> RolloutGroup:
    """A question with `answers` answers whose tokens are those of its text."""
    truth = int(rng.integers(10, 99))
    question = f"What is ${truth - 3} + 3$? Give the number (question {draw})."
    prompt = Prompt(
        draw % 5000, "sums", ({"role": "user", "content": question},), str(truth), np.arange(4, dtype=np.int32)
    )
    rollouts = []
    for k in range(answers):
        right = rng.random() < 0.2 + 0.6 * (draw % 7) / 7
        text = work.format(x=truth if right else truth + 1)
        ids = np.array(tokenizer(text)["input_ids"], dtype=np.int32)
        engine = -rng.exponential(0.4, len(ids)).astype(np.float32)
        noise = rng.normal(0, 0.03, len(ids)).astype(np.float32)
        verdict = Verdict.CORRECT if right else (Verdict.TIMEOUT if k == 3 else Verdict.WRONG)
        graders = {"maths": verdict, "dapo_boxed": Verdict.CORRECT if k == 2 else verdict}
        rollouts.append(
            Rollout(
                draw, k, ids, engine, "length" if k == 1 and draw % 3 == 0 else "stop", step, text,
                verdict=verdict, extracted=str(truth if right else truth + 1), grader_verdicts=graders,
                verify_s=0.001, trainer_logprobs=(engine + noise) if draw % 2 else None,
            )
        )  # fmt: skip
    return RolloutGroup(draw, prompt, rollouts, step)


def make_run(
    folder: Path, tokenizer, *, steps: int, groups: int, answers: int, metric_steps: int | None = None, work=WORK
) -> Path:
    """steps x groups x answers rollouts in two ranks' files, and metrics.jsonl."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        made = [make_group(rng, step, step * groups + i, answers, tokenizer, work) for i in range(groups)]
        for rank in range(2):
            mine = made[rank::2]
            fates = [{1.0: "all_correct", 0.0: "all_wrong"}.get(g.correct_rate, "trained") for g in mine]
            write_rollouts(rollout_path(folder, step, rank), mine, fates, step=step)
    with (folder / "metrics.jsonl").open("w") as f:
        for step in range(metric_steps or steps):
            f.write(json.dumps(made_record(rng, step, metric_steps or steps)) + "\n")
        f.write('{"step": 9999, "accuracy/tr')  # the line that the run is writing
    return folder


def made_record(rng: np.random.Generator, step: int, steps: int) -> dict:
    """A metrics record with every kind of figure."""
    share = step / max(1, steps - 1)
    accuracy = 0.35 + 0.35 * share + rng.normal(0, 0.01)
    rates = rng.binomial(10, np.clip(accuracy, 0, 1), 64)
    record = {
        "step": step,
        "accuracy/train": accuracy,
        "correct_rate/hist": np.bincount(rates, minlength=11).tolist(),
        "groups/kept": 40 + step % 5, "groups/all_correct": 10, "groups/all_wrong": 14 - step % 5, "groups/surplus": 3,
        "length/mean": 80 + 5 * share, "length/max": 200, "length/truncated": 0.01,
        "loss/total": -0.02 * share, "loss/positive": 0.01, "loss/negative": "nan" if step == 3 else 0.02,
        "ratio/mean": 1.0, "ratio/max": 1.7, "clamp/share": 0.1 * share, "gap/mean": 1e-6, "gap/max": 3e-5,
        "grad_norm": 0.5, "lr": 1e-6, "tokens_per_s": 900 + step,
        "seconds/generate": 2.0, "seconds/verify_wait": 0.1, "seconds/logprobs": 0.4, "seconds/train": 1.5,
        "seconds/sync": 0.2, "seconds/checkpoint": 0.0, "seconds/total": 4.2,
    }  # fmt: skip
    if step % 5 == 0:
        record |= {
            "eval/accuracy": accuracy,
            "eval/accuracy_low": accuracy - 0.04,
            "eval/accuracy_high": accuracy + 0.04,
        }
    return record
