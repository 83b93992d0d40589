"""One optimizer step of a model of Qwen2.5-7B's shape: tokens/s, TFLOP/s, share of the measured bf16 product.

Rows: a stack of 8 layers, and as many layers as fit with Adam on this card by the planner's memory model, each in bf16
and every FP8 recipe that the chip has. Model FLOPs without recompute. All rows run in one process, which starts once.
"""

from __future__ import annotations

from functools import partial

import torch
from gpu_common import Results, ceilings, free_memory, median_ms, spec_7b, training_flops, verdict
from gpu_policies import likelihood_loss, make_config, make_samples, packed, random_policy

from megatron_nft.policy import parallel
from megatron_nft.policy.capability import allowed_recipes, read_gpu_stack
from megatron_nft.train.memory import memory_problems

LENGTHS = [4096, 2048, 1024, 512, 512, 4096, 3072, 1024]  # 16384 tokens per micro-batch
MICRO_BATCHES = 2
STACK_LAYERS = 8


def config(recipe: str):
    settings = {"micro_batch_tokens": sum(LENGTHS), "fp8": {"recipe": recipe}}
    return make_config(
        "random",
        optimizer={"lr": 1e-6},  # weights of no meaning must stay finite
        data={"max_prompt_tokens": 1},
        rollout={"max_response_tokens": max(LENGTHS)},
        **settings,
    )


def most_layers(recipe: str) -> int:
    """By the planner: neither refused nor warned about."""
    free, total = torch.cuda.mem_get_info()
    for layers in range(40, STACK_LAYERS, -1):
        given = {"free": free, "total": total, "stage": 0, "world_size": 1, "local_world_size": 1}
        try:
            if not memory_problems(config(recipe), spec_7b(layers), **given):
                return layers
        except ValueError:
            continue
    return STACK_LAYERS


def target(recipe: str, figures: dict, bf16: dict | None) -> str:
    """Of bf16: the share of the measured product. Of a recipe: its TFLOP/s over those of the row `bf16`."""
    if recipe == "none":
        return verdict(figures["share of bf16 ceiling"], at_least=0.6)
    return "no bf16 row" if bf16 is None else verdict(figures["TFLOP/s"] / bf16["TFLOP/s"], at_least=1.4)


def measure(recipe: str, layers: int, ceiling: float) -> dict:
    settings = config(recipe)
    layout = parallel.initialize(settings.policy, seed=1)
    spec = spec_7b(layers)
    policy = random_policy(layout, spec, settings)
    batches = []
    for i in range(MICRO_BATCHES):
        batches += packed(policy, make_samples(LENGTHS, spec.vocab_size, seed=i))
    tokens = sum(b.tokens.numel() for b in batches)
    reports = []

    def step() -> None:
        reports.append(policy.train_step(batches, likelihood_loss, float(tokens)))

    torch.cuda.reset_peak_memory_stats()
    ms = median_ms(step, repeats=6, warmup=3)
    assert not any(r.skipped for r in reports), reports[-1].reason
    rate = training_flops(spec, LENGTHS * MICRO_BATCHES) / ms / 1e9
    logprobs_ms = median_ms(lambda: policy.compute_logprobs(batches), repeats=3, warmup=1)
    return {
        "layers": layers,
        "parameters": sum(p.numel() for c in policy.chunks for p in c.parameters()),
        "ms": ms,
        "tokens/s": 1e3 * tokens / ms,
        "TFLOP/s": rate,
        "share of bf16 ceiling": rate / ceiling,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
        "log-probs ms": logprobs_ms,
        "optimizer": policy.optimizer_kind,
    }


def main() -> None:
    results = Results(
        "train_step",
        f"{MICRO_BATCHES} micro-batches of {sum(LENGTHS)} tokens, lengths {LENGTHS}, V 152064, Adam, no recompute. "
        "Targets: bf16 at least 60 % of the measured product, FP8 at least 1.4 times bf16.",
    )
    ceiling = results.add("ceilings of this run", **ceilings())["bf16 TFLOP/s"]
    recipes = allowed_recipes(read_gpu_stack())
    rows = {f"{STACK_LAYERS} layers, {r}": (r, False) for r in recipes}
    rows |= {f"largest that fits, {r}": (r, True) for r in recipes}
    for row, (recipe, largest) in rows.items():
        bf16 = results.get(next(name for name, of in rows.items() if of == ("none", largest)))
        results.measure(row, partial(row_of, recipe, largest, ceiling, bf16))


def row_of(recipe: str, largest: bool, ceiling: float, bf16: dict | None) -> dict:
    """One row. What an earlier one left in the process, scales of FP8 and cached memory, is dropped before."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    free_memory()
    figures = measure(recipe, most_layers(recipe) if largest else STACK_LAYERS, ceiling)
    return figures | {"target": target(recipe, figures, bf16)}


if __name__ == "__main__":
    main()
