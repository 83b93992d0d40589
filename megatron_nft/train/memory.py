"""Memory of a rank's GPU: what is known to be too little before anything is allocated, and the peak of every phase."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from megatron_nft.config import Config
from megatron_nft.engines.open import engine_kind
from megatron_nft.plan.hardware import CHIPS
from megatron_nft.plan.layout import Cluster, LayoutSettings, longest_sequence
from megatron_nft.plan.memory import engine_memory, trainer_memory
from megatron_nft.policy.family import ModelSpec

RESIDENT = ("weights", "gradients", "optimizer")
TRAINING = ("activations", "packed attention", "logits chunk")
GIB = 1 << 30


def check_memory(config: Config, spec: ModelSpec, device: torch.device, *, stage: int, world_size: int) -> list[str]:
    """ValueError where trainer and engine cannot fit on this rank's GPU; warnings where an estimate says they may not.

    stage: the rank's place in the pipeline.

    Weights, gradients, optimizer, and the engine's weights with room for one longest answer are counted; activations
    are estimated (plan/activations.py). Nothing is asked of a rank without a GPU.
    """
    if device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return memory_problems(
        config, spec, free=free, total=total, stage=stage, world_size=world_size, local_world_size=local
    )


def memory_problems(
    config: Config, spec: ModelSpec, *, free: int, total: int, stage: int, world_size: int, local_world_size: int
) -> list[str]:
    """`check_memory` for a device of `total` bytes, of which `free` are free before anything is allocated."""
    chip = replace(CHIPS["h100"], name="this GPU", memory_bytes=total)
    cluster = Cluster(chip, max(1, world_size // local_world_size), local_world_size)
    plan = LayoutSettings.of(config)
    train = trainer_memory(spec, config, plan, cluster, plan.pp)[stage].phases["train"]
    resident = {name: train[name] for name in RESIDENT}
    left = free - sum(resident.values()) - chip.reserve_bytes
    if left < 0:
        raise ValueError(
            f"the trainer alone needs {_gib(free - left)} on this GPU ({_parts(resident)}, "
            f"reserve {_gib(chip.reserve_bytes)}), {_gib(free)} of {_gib(total)} are free: raise "
            "policy.tensor_model_parallel_size or pipeline_model_parallel_size, or set policy.optimizer_offload=true"
        )
    held = _engine(config, spec, cluster, left, total, resident)
    needed = {name: train[name] for name in TRAINING if name in train}
    if sum(needed.values()) <= left - held:
        return []
    engine = f" and the engine keeps {_gib(held)}" if held else ""
    return [
        f"warning: a step may need more memory than there is: {_parts(needed)} are estimated, {_gib(left - held)} are "
        f"left beside {_parts(resident)}{engine}. If it runs out: lower policy.micro_batch_tokens or set "
        "policy.recompute=full" + (" or rollout.server.memory_saver=true" if held else "")
    ]


def _engine(config: Config, spec: ModelSpec, cluster: Cluster, left: int, total: int, resident: dict[str, int]) -> int:
    """Bytes that an engine on this GPU keeps while the trainer works. ValueError where it cannot hold one answer."""
    server = config.rollout.server
    if not config.rollout.uses_servers or server.urls or server.registry:
        return 0
    base = engine_kind(config.rollout.engine).memory_base(left, total, server.mem_fraction_static)
    engine = engine_memory(spec, config, replace(cluster, chip=replace(cluster.chip, memory_bytes=base)))
    share, longest = int(base * server.mem_fraction_static), longest_sequence(config)
    if engine.weights > share or engine.kv_tokens < longest:
        raise ValueError(
            f"the engine cannot hold one longest answer ({longest} tokens) beside the trainer on this GPU: the trainer "
            f"({_parts(resident)}) leaves {_gib(left)}, rollout.server.mem_fraction_static "
            f"({server.mem_fraction_static:g}) gives the engine {_gib(share)} of it, its weights take "
            f"{_gib(engine.weights)} and its KV cache then holds {engine.kv_tokens} tokens. Raise the fraction, shard "
            "the trainer over more GPUs, or set policy.optimizer_offload=true"
        )
    if not server.memory_saver:
        return engine.weights + engine.kv_cache
    return engine.weights if server.sleep_level == "kv_cache" else 0


def release_unused() -> None:
    """Give blocks that torch keeps for later back to the driver, for another process on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class PhaseMemory:
    """The memory of this rank's GPU in each phase: the most that this process allocated during the phase, and what all
    processes held at its end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._phases: dict[str, tuple[int, int]] = {}

    def note(self, phase: str) -> None:
        """Record the memory of the phase that has just ended, and start a new peak. Of a phase that ran twice, the
        larger values are kept."""
        if self._device is None:
            return
        free, total = torch.cuda.mem_get_info(self._device)
        found = torch.cuda.max_memory_allocated(self._device), total - free
        torch.cuda.reset_peak_memory_stats(self._device)
        before = self._phases.get(phase, (0, 0))
        self._phases[phase] = max(found[0], before[0]), max(found[1], before[1])

    def take(self) -> dict[str, tuple[int, int]]:
        """phase -> (peak bytes of this process, bytes held on the device); since the last call."""
        phases, self._phases = self._phases, {}
        return phases


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_gib(nbytes)}" for name, nbytes in parts.items() if nbytes)
