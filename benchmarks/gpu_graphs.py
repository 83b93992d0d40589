"""Where torch.compile and CUDA graphs pay: the training step with and without, decoding with and without.

Training runs no CUDA graphs: packed micro-batches differ in their numbers of tokens and segments. What graphs could
save there is bounded by `waits for the host`, the share of a step in which the GPU has nothing to do. Decoding is
measured in SGLang, whose graphs are on by default (rollout.server.cuda_graphs).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from gpu_common import ROOT, Results, free_memory, median_ms, spec_7b
from gpu_policies import likelihood_loss, make_config, make_samples, packed, random_policy
from gpu_servers import config_for, dummy, folder_7b, running
from gpu_task import SHAPE, start_model

from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.policy import parallel
from megatron_nft.policy.family import read_family

TOKENS, LAYERS = 16384, 8
RESPONSE = 256


def busy_us(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def device_busy_ms(work: Callable[[], object]) -> float:
    """Time in which at least one kernel or copy ran, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    on_gpu = (
        e
        for e in profile.events()
        if e.device_type is torch.autograd.DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
    )
    return busy_us((e.time_range.start, e.time_range.end) for e in on_gpu) / 1e3


def training(spec, recipe: str, compiled: bool) -> dict:
    config = make_config(
        "random",
        optimizer={"lr": 1e-6},  # weights of no meaning must stay finite
        data={"max_prompt_tokens": 1},
        rollout={"max_response_tokens": 1024},
        micro_batch_tokens=TOKENS,
        compile=compiled,
        fp8={"recipe": recipe},
    )
    policy = random_policy(parallel.initialize(config.policy, seed=1), spec, config)
    batches = packed(policy, make_samples([1024] * (TOKENS // 1024), spec.vocab_size))

    def step() -> None:
        policy.train_step(batches, likelihood_loss, float(TOKENS))

    ms = median_ms(step, repeats=8, warmup=3)
    busy = device_busy_ms(step)
    return {"ms": ms, "tokens/s": 1e3 * TOKENS / ms, "busy ms": busy, "waits for the host": max(0.0, 1 - busy / ms)}


def decoding(engine, batch: int) -> dict:
    rng = np.random.default_rng(batch)
    requests = [Request(rng.integers(10, 250, 64).astype(np.int32), 1, (i,)) for i in range(batch)]
    engine.weight_version = 0
    list(engine.generate(requests[:8], SamplingParams(16)))
    started = time.perf_counter()
    tokens = sum(len(c.token_ids) for _, _, c in engine.generate(requests, SamplingParams(RESPONSE)))
    seconds = time.perf_counter() - started
    return {"answers": batch, "tokens/s": tokens / seconds}


def main() -> None:
    results = Results(
        "graphs",
        f"Training: one micro-batch of {TOKENS} tokens, {LAYERS} layers of Qwen2.5-7B's shape (V 32768) and the 113M "
        f"model. Decoding: 28 layers of Qwen2.5-7B's shape, answers of {RESPONSE} tokens.",
    )
    small = read_family(start_model(ROOT / "runs" / "gpu" / "start"))
    for name, spec in (("7B layers", spec_7b(LAYERS, vocab_size=32768)), (f"113M, {SHAPE['layers']} layers", small)):
        for recipe in ("none", "tensorwise"):
            for compiled in (True, False):
                row = f"{name}, {'bf16' if recipe == 'none' else recipe}" + ("" if compiled else ", compile=false")
                results.measure(row, lambda s=spec, r=recipe, c=compiled: training(s, r, c))
                free_memory()
    folder = folder_7b()
    for graphs in (True, False):
        rows = {f"decoding, batch {n}, CUDA graphs {'on' if graphs else 'off'}": n for n in (16, 256)}
        if all(results.get(row) for row in rows):
            continue
        server = dummy(max_running_requests=256, cuda_graphs=graphs)
        server["extra_args"] = [*server["extra_args"], "--weight-version=0"]
        config = config_for(folder, server=server)
        started = time.perf_counter()
        with running(config, parallel.initialize(config.policy, seed=1)) as engine:
            start_s = time.perf_counter() - started
            for row, batch in rows.items():
                results.measure(row, lambda b=batch, s=start_s: {"start s": s, **decoding(engine, b)})


if __name__ == "__main__":
    main()
