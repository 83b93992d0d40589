"""Optimizer state in a checkpoint: what megatron-core 0.16.1 gets wrong, and what torch's AdamW lacks."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from typing import Any

import torch

from megatron_nft.policy.optimizer import optimizer_parts
from megatron_nft.policy.policy import Policy


@contextlib.contextmanager
def quick_collection() -> Iterator[None]:
    """Keep the objects that exist now out of garbage collection. Megatron collects while it gathers; with the objects
    of every imported package, that would be most of the time that saving a small model takes."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def bucket_padding(policy: Policy) -> Iterator[None]:
    """Correct what megatron-core 0.16.1's distributed optimizer gathers of its state while the block runs.

    `get_parameter_state_dp_zero` joins a buffer's buckets without the padding between them, and the reshardable format
    then cuts parameters out by positions that count the padding: with two or more buckets (tied embeddings under
    pipeline parallelism, overlapped reduction) another part of the buffer is saved, without an error.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizers = [part for part in optimizer_parts(policy.optimizer) if isinstance(part, DistributedOptimizer)]
    for optimizer in optimizers:
        optimizer.get_parameter_state_dp_zero = functools.partial(_gather_with_padding, optimizer)
    try:
        yield
    finally:
        for optimizer in optimizers:
            del optimizer.get_parameter_state_dp_zero


def _gather_with_padding(optimizer: Any, **kwargs: Any) -> dict[Any, Any] | None:
    """type(optimizer).get_parameter_state_dp_zero, with each bucket at its place in the padded buffer."""
    state: dict[Any, Any] | None = type(optimizer).get_parameter_state_dp_zero(optimizer, **kwargs)
    if state is None:
        return None
    for index, buffer in enumerate(optimizer.buffers):
        for tensors in state[index].values():
            for key in ("param", "exp_avg", "exp_avg_sq"):
                joined, padded, done = tensors[key], tensors[key].new_zeros(buffer.numel), 0
                for (start, _), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True):
                    padded[start : start + bucket.numel_unpadded] = joined[done : done + bucket.numel_unpadded]
                    done += bucket.numel_unpadded
                tensors[key] = padded
    return state


def _adams(policy: Policy) -> list[torch.optim.Optimizer]:
    """torch's AdamWs in use; empty with Transformer Engine's or apex's, which Megatron fills by itself."""
    return [
        part.optimizer for part in optimizer_parts(policy.optimizer) if isinstance(part.optimizer, torch.optim.AdamW)
    ]


def fill_adam_state(policy: Policy) -> None:
    """torch's AdamW has no state before its first step; saving and loading need tensors to name."""
    for adam in _adams(policy):
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def separate_steps(policy: Policy) -> None:
    """Give every parameter its own `step`. megatron-core 0.16.1 loads one tensor into all of them, so that a step
    counts once per parameter and the bias correction of the resumed run is silently wrong."""
    for adam in _adams(policy):
        for state in adam.state.values():
            state["step"] = state["step"].clone()
