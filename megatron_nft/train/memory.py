"""Memory of a rank's GPU: what is known to be too little before anything is allocated, and the peak of every phase."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from megatron_nft.config import Config
from megatron_nft.plan.engine import engine_memory, engine_problem, shares_device
from megatron_nft.plan.hardware import CHIPS, gib
from megatron_nft.plan.layout import Cluster, LayoutSettings
from megatron_nft.plan.memory import export_bytes, resident, trainer_memory
from megatron_nft.policy.family import ModelSpec

TRAINING = ("activations", "packed attention", "logits chunk")
ENGINE = ("engine weights", "engine KV cache", "engine working")


def check_memory(config: Config, spec: ModelSpec, device: torch.device, *, stage: int, world_size: int) -> list[str]:
    """ValueError where trainer and engine cannot fit on this rank's GPU; warnings where an estimate says they may not.

    stage: the rank's place in the pipeline.

    Weights, gradients, optimizer, and the engine's weights with room for one longest answer are counted; activations
    are estimated (plan/activations.py), and so is the engine's working memory (plan/engine.py). Nothing is asked of a
    rank without a GPU.
    """
    if device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(device)
    return memory_problems(
        config,
        spec,
        free=free,
        total=total,
        stage=stage,
        world_size=world_size,
        local_world_size=_ranks_of_this_host(world_size),
    )


def memory_problems(
    config: Config, spec: ModelSpec, *, free: int, total: int, stage: int, world_size: int, local_world_size: int
) -> list[str]:
    """`check_memory` for a device of `total` bytes, of which `free` are free before anything is allocated."""
    own = CHIPS["h100"].reserve_bytes
    # What others hold on the device already is reserved like our own context.
    chip = replace(CHIPS["h100"], name="this GPU", memory_bytes=total, reserve_bytes=own + total - free)
    cluster = Cluster(chip, max(1, world_size // local_world_size), local_world_size)
    layout = LayoutSettings.of(config)
    kept = resident(spec, config, layout, cluster, stage)
    left = free - sum(kept.values()) - own
    if left < 0:
        raise ValueError(
            f"the trainer alone needs {gib(free - left)} on this GPU ({_parts(kept)}, reserve {gib(own)}), "
            f"{gib(free)} of {gib(total)} are free: raise policy.tensor_model_parallel_size or "
            "pipeline_model_parallel_size, or set policy.optimizer_offload=true"
        )
    train = trainer_memory(spec, config, layout, cluster, layout.pp)[stage].phases["train"]
    held = 0
    if config.rollout.uses_servers and shares_device(config, cluster):
        engine = engine_memory(spec, config, chip, sum(kept.values()))
        problem = engine_problem(config, engine, chip, export_bytes(spec, config, layout))
        if problem:
            mend = "" if layout.offload else "; policy.optimizer_offload=true moves the optimizer to the host"
            raise ValueError(f"{problem}. The trainer keeps {_parts(kept)}{mend}")
        held = sum(nbytes for name, nbytes in train.items() if name in ENGINE)
    needed = {name: train[name] for name in TRAINING if name in train}
    if sum(needed.values()) <= left - held:
        return []
    beside = f" and the engine keeps {gib(held)}" if held else ""
    mends = ["lower policy.micro_batch_tokens"]
    mends += ["set policy.recompute=full"] * (layout.recompute != "full")
    mends += ["set rollout.server.memory_saver=true"] * bool(held and not config.rollout.server.memory_saver)
    return [
        f"warning: a step may need more memory than there is: {_parts(needed)} are estimated, {gib(left - held)} are "
        f"left beside {_parts(kept)}{beside}. If it runs out: {' or '.join(mends)}"
    ]


@contextmanager
def keep_room(config: Config, spec: ModelSpec, device: torch.device, *, stage: int, world_size: int) -> Iterator[None]:
    """Hold, while servers start, the bytes that this rank has yet to allocate for good on its GPU.

    Adam's state comes with the first step. An engine that takes its share of what is free (SGLang) would take that
    place too, or leave it, by whether the run is new or goes on; so it gets what plan and `check_memory` count.
    """
    local = _ranks_of_this_host(world_size)
    cluster = Cluster(CHIPS["h100"], max(1, world_size // local), local)
    if device.type != "cuda" or not config.rollout.uses_servers or not shares_device(config, cluster):
        yield
        return
    torch.cuda.empty_cache()
    planned = sum(resident(spec, config, LayoutSettings.of(config), cluster, stage).values())
    missing = max(0, planned - torch.cuda.memory_reserved(device))
    room = torch.empty(missing, dtype=torch.uint8, device=device)
    try:
        yield
    finally:
        del room
        torch.cuda.empty_cache()


def _ranks_of_this_host(world_size: int) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


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


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {gib(nbytes)}" for name, nbytes in parts.items() if nbytes)
