"""What an inference engine takes of a GPU: the one place where plan, the check at a run's start and the run ask.

rollout.server.mem_fraction_static, f below, means another thing to each engine (config/engines.py, SHARE_OF):

SGLang  free: F bytes are free when the server starts. It loads its weights and gives the KV cache
        what is free then - (1 - f) F (kv_cache_configurator.py, _profile_available_bytes; 0.5.17 to 0.5.23), so that
            weights + KV cache = f F
        and working memory must fit into the (1 - f) F that it leaves. --enable-memory-saver changes none of this.
vLLM    device: its budget is f times the whole GPU, and it does not start where less than that is free
        (v1/worker/utils.py, request_memory; 0.32). Working memory, which it measures, comes out of the budget:
            weights + KV cache + working memory = f D

F is the GPU less the reserve and all that the trainer will ever keep there: the run holds the place of what it has not
allocated yet while its servers start (train/memory.py, keep_room), and plan counts the same bytes.

Working memory is an estimate, not measured: CUDA graphs; activations of one chunk of a prefill, e (2 h + 3 m / tp)
bytes per token for a hidden size h and an MLP width m (hidden states and their norm; gate, up and their product);
logits of all rows that are decoded at once, e bytes each and 4 more in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_nft.config import Config
from megatron_nft.config.engines import SHARE_OF
from megatron_nft.plan.architecture import kv_bytes_per_token, layer_matrices, mlp_width, total_params
from megatron_nft.plan.hardware import GIB, Chip, gib
from megatron_nft.plan.layout import Cluster, element_bytes, longest_sequence
from megatron_nft.policy.family import ModelSpec

PREFILL_TOKENS = 8192  # SGLang's chunk on GPUs of 60 to 90 GiB, and vLLM's
DECODED_ROWS = 256  # where rollout.server.max_running_requests leaves it to the engine
GRAPHS_BYTES = 3 * GIB // 2


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on one inference device; `kv_tokens` is the capacity of a whole engine."""

    weights: int
    kv_cache: int
    kv_tokens: int
    working: int  # CUDA graphs, activations, logits
    free: int  # F: what the engine finds free
    budget: int  # what mem_fraction_static gives it, of which `working` is a part in vLLM alone


def shares_device(config: Config, cluster: Cluster) -> bool:
    """Whether the engine is on the trainer's devices."""
    server = config.rollout.server
    return not config.rollout.uses_servers or not (cluster.engine_nodes or server.urls or server.registry)


def engine_memory(spec: ModelSpec, config: Config, chip: Chip, held: int = 0) -> EngineMemory:
    """held: bytes that the trainer keeps on the same device whatever the phase (weights, gradients, optimizer)."""
    e, free = element_bytes(config), chip.memory_bytes - chip.reserve_bytes - held
    if not config.rollout.uses_servers:
        tokens = config.rollout.embedded_batch_tokens
        kv = tokens * kv_bytes_per_token(spec) * e // 2
        return EngineMemory(total_params(spec) * e, kv, tokens, 0, free, free)
    server = config.rollout.server
    if server.dtype != "auto":
        e = {"float32": 4, "bfloat16": 2}[server.dtype]
    weights, working = _weights(spec, config, e), 0 if chip.name == "cpu" else _working(spec, config, e)
    of_device = SHARE_OF.get(config.rollout.engine) == "device"
    budget = int(server.mem_fraction_static * (chip.memory_bytes if of_device else max(0, free)))
    heads_per_device = max(1, spec.num_query_groups // server.tensor_parallel_size)  # replicated beyond the KV heads
    token_bytes = (
        2 * spec.num_layers * heads_per_device * spec.kv_channels * (e if server.kv_cache_dtype == "auto" else 1)
    )
    kv = max(0, budget - weights - (working if of_device else 0))
    if server.max_total_tokens is not None:
        kv = min(kv, server.max_total_tokens * token_bytes)
    return EngineMemory(weights, kv, kv // token_bytes, working, free, budget)


def _weights(spec: ModelSpec, config: Config, e: int) -> int:
    """Bytes of the weights on one device of an engine; FP8 quantizes the layers' matrices."""
    server = config.rollout.server
    matrices = layer_matrices(spec)
    matrix_e = 1 if server.quantization == "fp8" else e
    return (matrices * matrix_e + (total_params(spec) - matrices) * e) // server.tensor_parallel_size


def _working(spec: ModelSpec, config: Config, e: int) -> int:
    """Bytes beside weights and KV cache; see the top of the file."""
    server = config.rollout.server
    activations = PREFILL_TOKENS * e * (2 * spec.hidden_size + 3 * mlp_width(spec) // server.tensor_parallel_size)
    logits = (server.max_running_requests or DECODED_ROWS) * spec.vocab_size * (e + 4)
    return activations + logits + GRAPHS_BYTES * server.cuda_graphs


def largest_fraction(config: Config, engine: EngineMemory, chip: Chip, beside: int) -> float:
    """The largest mem_fraction_static, in steps of 0.01, that leaves `beside` bytes free (buckets of a weight sync)."""
    if SHARE_OF.get(config.rollout.engine) == "device":
        share = (engine.free - beside) / chip.memory_bytes
    else:
        share = 1 - (engine.working + beside) / engine.free if engine.free > 0 else 0.0
    return max(0.0, min(0.99, math.floor(share * 100 + 1e-9) / 100))


def engine_problem(config: Config, engine: EngineMemory, chip: Chip, beside: int) -> str | None:
    """Why an engine cannot start, or cannot hold one longest answer; None where it can.

    beside: bytes that a weight sync takes on its device.
    """
    longest, tokens, server = longest_sequence(config), engine.kv_tokens, config.rollout.server
    if not config.rollout.uses_servers:
        wrong = f"rollout.embedded_batch_tokens ({tokens}) must hold the longest answer ({longest} tokens)"
        return wrong if tokens < longest else None
    if server.max_total_tokens is not None and server.max_total_tokens < longest:
        return f"rollout.server.max_total_tokens ({server.max_total_tokens}) must hold the longest answer ({longest})"
    of_device = SHARE_OF.get(config.rollout.engine) == "device"
    share = (
        f"rollout.server.mem_fraction_static ({server.mem_fraction_static:g}) gives the engine {gib(engine.budget)} of "
        f"{gib(chip.memory_bytes if of_device else engine.free)} "
        + (f"on the GPU, {gib(engine.free)} are free beside the trainer" if of_device else "that are free")
    )
    needed = engine.budget if of_device else engine.weights + engine.kv_cache + engine.working
    if tokens >= longest and needed + beside > engine.free:
        return (
            f"{share}; its graphs and activations take {gib(engine.working)} and the buckets of a weight sync "
            f"{gib(beside)}: set at most {largest_fraction(config, engine, chip, beside):g}"
        )
    if tokens < longest:
        return (
            f"the engine cannot hold one longest answer ({longest} tokens): {share}, its weights take "
            f"{gib(engine.weights)} and its KV cache holds {tokens} tokens. Raise the fraction or "
            "rollout.server.tensor_parallel_size, or shard the trainer over more GPUs"
        )
    return None
