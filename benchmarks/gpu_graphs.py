"""Where torch.compile pays in the training step, and what CUDA graphs could save there.

Training runs no CUDA graphs: packed micro-batches differ in their numbers of tokens and segments. What graphs could
save is bounded by `waits for the host`, the share of a step in which the GPU has nothing to do. gpu_decoding.py
measures the graphs of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from gpu_common import ROOT, Results, free_memory, median_ms, spec_7b
from gpu_policies import likelihood_loss, make_config, make_samples, packed, random_policy
from gpu_task import SHAPE, start_model

from megatron_nft.policy import parallel
from megatron_nft.policy.family import read_family

TOKENS, LAYERS = 16384, 8


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


def main() -> None:
    results = Results(
        "graphs",
        f"One micro-batch of {TOKENS} tokens, {LAYERS} layers of Qwen2.5-7B's shape (V 32768) and the 113M model.",
    )
    small = read_family(start_model(ROOT / "runs" / "gpu" / "start"))
    for name, spec in (("7B layers", spec_7b(LAYERS, vocab_size=32768)), (f"113M, {SHAPE['layers']} layers", small)):
        for recipe in ("none", "tensorwise"):
            for compiled in (True, False):
                row = f"{name}, {'bf16' if recipe == 'none' else recipe}" + ("" if compiled else ", compile=false")
                results.measure(row, lambda s=spec, r=recipe, c=compiled: training(s, r, c))
                free_memory()


if __name__ == "__main__":
    main()
