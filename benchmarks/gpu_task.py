"""A model of 113M parameters on the synthetic task steps3: supervised warm-up with our own policy, and its data."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from gpu_policies import make_policy, packed
from objectives import Objective

from megatron_nft.data.synthetic import MAX_RESPONSE_TOKENS, Problem, make_tokenizer, problems, sft_samples, write_model
from megatron_nft.engines.embedded.engine import EmbeddedEngine
from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.policy.policy import Policy
from megatron_nft.types import TrainingSample
from megatron_nft.weights.export_hf import save_hf

SHAPE = {"hidden": 768, "layers": 18, "heads": 12, "kv_heads": 4, "ffn": 2048}
BATCH, LR, CHECK_EVERY = 256, 3e-4, 100
NUM_TRAIN, NUM_HELD_OUT, NUM_CHECK = 20_000, 500, 300


def start_model(folder: Path) -> Path:
    """The untrained model, once."""
    if not (folder / "config.json").is_file():
        write_model(folder, **SHAPE)
    return folder


def teacher_samples(seed: int = 0) -> list[TrainingSample]:
    """Worked solutions of the training questions."""
    made = []
    for i, (prompt, solution) in enumerate(sft_samples(make_tokenizer(), problems(NUM_TRAIN + NUM_HELD_OUT, seed))):
        zeros = np.zeros(len(solution), np.float32)
        made.append(TrainingSample(i, 0, np.concatenate([prompt, solution]), len(prompt), zeros, zeros, True, 0.5))
    return made[NUM_HELD_OUT:]


supervised_loss = Objective(lambda logprobs, batch: -logprobs)


def supervised_steps(policy: Policy, samples: list[TrainingSample], num_steps: int, seed: int = 0) -> list[float]:
    """Mean loss per solution token of every step."""
    rng, losses = np.random.default_rng(seed), []
    for _ in range(num_steps):
        chosen = [samples[i] for i in rng.choice(len(samples), BATCH, replace=False)]
        tokens = float(sum(s.response_length for s in chosen))
        report = policy.train_step(packed(policy, chosen), supervised_loss, tokens)
        losses.append(report.loss)
    return losses


def make_task_policy(layout: ParallelLayout, model: Path, **settings: object) -> Policy:
    """Ready for supervised steps; the whole batch is one micro-batch."""
    optimizer = {"lr": LR, "lr_warmup_steps": 50, "weight_decay": 0.01, "adam_beta2": 0.99}
    return make_policy(layout, model, optimizer=optimizer, micro_batch_tokens=16384, **settings)


def sampled_accuracy(folder: Path, questions: list[Problem], device: torch.device) -> float:
    """Share of `questions` answered right by one sample at temperature 1, end token required."""
    tokenizer = make_tokenizer()
    engine = EmbeddedEngine.create(folder, dtype="bfloat16", device=device)
    encoded = tokenizer([p.question for p in questions])["input_ids"]
    requests = [Request(np.array(ids, dtype=np.int32), 1, (i,)) for i, ids in enumerate(encoded)]
    right = 0
    for i, _, answer in engine.generate(requests, SamplingParams(MAX_RESPONSE_TOKENS)):
        boxed = tokenizer.decode(answer.token_ids.tolist(), skip_special_tokens=True).rpartition("\\boxed{")[2]
        right += answer.finish_reason == "stop" and boxed == questions[i].answer + "}"
    engine.close()
    return right / len(questions)


def warm_model(layout: ParallelLayout, folder: Path, *, target: float = 0.4, seconds: float = 150.0) -> Path:
    """folder/warm: trained by supervision until sampled accuracy reaches `target` or the time is up; made once."""
    warm = folder / "warm"
    if (folder / "warm.done").is_file():
        return warm
    started, start = time.monotonic(), start_model(folder / "start")
    policy, samples = make_task_policy(layout, start), teacher_samples()
    known = set(problems(NUM_TRAIN + NUM_HELD_OUT))
    check = [p for p in problems(2 * NUM_CHECK, seed=1) if p not in known][:NUM_CHECK]
    step = 0
    while True:
        losses = supervised_steps(policy, samples, CHECK_EVERY, seed=step)
        step += CHECK_EVERY
        save_hf(policy.chunks, policy.spec, layout, start, warm, replace=True)
        accuracy = sampled_accuracy(warm, check, layout.device)
        print(f"warm-up step {step}: loss {losses[-1]:.3f}, sampled accuracy {accuracy:.1%}", flush=True)
        if accuracy >= target or time.monotonic() - started > seconds:
            break
    (folder / "warm.done").write_text(f"{accuracy}\n")
    return warm
