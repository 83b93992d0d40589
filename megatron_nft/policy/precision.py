"""FP8 (and NVFP4): our settings in megatron-core's terms, and the matrix sizes that the recipes allow.

The linear layers inside the transformer layers are quantized: QKV, projection, gate and up, down. Embedding, norms,
attention and the output layer (policy/logprobs.py) stay in bf16; weights and gradients are stored as without FP8.
Imports no torch: `plan` uses it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from megatron_nft.config import FP8_ALIGNMENT, Fp8Config, PolicyConfig
from megatron_nft.policy.family import ModelSpec

DELAYED_HISTORY = 1024
"""Micro-batches whose largest value sets a scale of the delayed recipe (Transformer Engine's default; megatron-core's
is 1, the newest alone, and a filler micro-batch would then set the scale for the next real one)."""


class Quantizable(Protocol):
    """A model with megatron-core's TransformerConfig as `config`."""

    config: Any


def transformer_fields(fp8: Fp8Config) -> dict[str, Any]:
    """Fields of megatron-core 0.16.1's TransformerConfig; none where nothing is quantized."""
    if fp8.recipe == "none":
        return {}
    if fp8.recipe == "nvfp4":
        return {"fp4": "e2m1", "fp4_recipe": "nvfp4"}
    fields: dict[str, Any] = {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "first_last_layers_bf16": fp8.num_layers_at_start_in_bf16 + fp8.num_layers_at_end_in_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
    }
    if fp8.recipe == "delayed":
        fields |= {"fp8_amax_history_len": DELAYED_HISTORY, "fp8_amax_compute_algo": "max"}
    return fields


@contextmanager
def in_bf16(chunks: Sequence[Quantizable]) -> Iterator[None]:
    """Forward passes of `chunks` inside run without quantization; scales and their histories are left as they are.

    megatron-core decides per forward pass: TransformerBlock enters Transformer Engine's autocast when its config says
    `fp8` or `fp4`. All modules of a chunk share that config object.
    """
    configs = list({id(chunk.config): chunk.config for chunk in chunks}.values())
    saved = [(config, config.fp8, config.fp4) for config in configs]
    try:
        for config in configs:
            config.fp8 = config.fp4 = None
        yield
    finally:
        for config, fp8, fp4 in saved:
            config.fp8, config.fp4 = fp8, fp4


def size_problems(spec: ModelSpec, recipe: str, tensor_parallel: int, expert_parallel: int) -> list[str]:
    """Sizes of the quantized matrices on one rank that the recipe cannot cut into its blocks, one line each."""
    multiple, tp = FP8_ALIGNMENT[recipe], tensor_parallel
    q, kv = spec.num_attention_heads * spec.kv_channels, spec.num_query_groups * spec.kv_channels
    width = (
        spec.moe_ffn_hidden_size / (1 if expert_parallel > 1 else tp) if spec.num_experts else spec.ffn_hidden_size / tp
    )
    sizes = {
        "hidden_size": spec.hidden_size,
        "QKV rows per rank": (q + 2 * kv) / tp,
        "attention output per rank": q / tp,
        "MLP width per rank": width,
    }
    return [
        f"fp8.recipe={recipe} needs multiples of {multiple}: {name} is {size:g} with TP {tp}"
        for name, size in sizes.items()
        if size % multiple
    ]


def check_sizes(spec: ModelSpec, policy: PolicyConfig) -> None:
    """ValueError where the model or the number of bf16 layers does not suit the recipe, before anything is built."""
    fp8, pp = policy.fp8, policy.pipeline_model_parallel_size
    problems = size_problems(spec, fp8.recipe, policy.tensor_model_parallel_size, policy.expert_model_parallel_size)
    if problems:
        raise ValueError("; ".join(problems) + ". Use another recipe or tensor_model_parallel_size")
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count, most = getattr(fp8, name), spec.num_layers // pp
        if fp8.recipe != "none" and count > most:
            raise ValueError(
                f"fp8.{name} is {count}; at most {most} layers, those of one pipeline stage, can be kept in bf16"
            )
