"""A policy's state in Megatron's terms: every tensor with its place in the whole model, and what is not sharded."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_nft.policy.fp8_history import fp8_history
from megatron_nft.policy.own_ranges import distributed_parts, divided_parameters
from megatron_nft.policy.policy import Policy

EXTRA_STATE = "_extra_state"
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""Megatron's names for how the optimizer state is laid out. Handed out as copies: Megatron adds groups to it."""


def sharded_models(policy: Policy) -> dict[str, Any]:
    """Megatron's description of all chunks' tensors, without Transformer Engine's extra state."""
    models = {f"model{i}": chunk.sharded_state_dict(metadata=dict(CONTENT)) for i, chunk in enumerate(policy.chunks)}
    return {
        model: {name: sharded for name, sharded in entries.items() if not name.endswith(EXTRA_STATE)}
        for model, entries in models.items()
    }


def undivided_state(policy: Policy, models: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """What `own_ranges` leave: a state as Megatron's dist_checkpointing takes it."""
    divided = divided_parameters(policy.optimizer)
    undivided = {
        model: {name: sharded for name, sharded in entries.items() if sharded.data not in divided}
        for model, entries in models.items()
    }
    if distributed_parts(policy.optimizer):
        optimizer = _hyper_parameters(policy) if not loading else {}
    else:
        optimizer = policy.optimizer.sharded_state_dict(models, is_loading=loading, metadata=dict(CONTENT))
    scales = _by_rank(policy, "fp8", fp8_history(policy.chunks))
    return {**undivided, "optimizer": optimizer, "rng": _sharded_rng(policy), **({"fp8": scales} if scales else {})}


def _hyper_parameters(policy: Policy) -> dict[Any, Any]:
    """What Megatron's distributed optimizers save beside their tensors."""
    parts = distributed_parts(policy.optimizer)
    if len(parts) > 1:
        policy.optimizer._synchronize_steps()
    states = [part.state_dict() | {"param_state_sharding_type": "fully_reshardable"} for part in parts]
    return states[0] if len(states) == 1 else dict(enumerate(states))


def without_classes(state: Any) -> Any:
    """`state` without entries that are classes: the optimizer on the host names its own in every parameter group, and a
    class is what loading refuses to unpickle."""
    if isinstance(state, dict):
        return {key: without_classes(value) for key, value in state.items() if not isinstance(value, type)}
    return [without_classes(value) for value in state] if isinstance(state, list) else state


def _sharded_rng(policy: Policy) -> dict[str, ShardedTensor]:
    """This rank's generator states, uint8, each one row of a [world_size, bytes] tensor."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    return _by_rank(policy, "rng", states)


def _by_rank(policy: Policy, kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, ShardedTensor]:
    """Tensors that every rank has its own of, each one row of a [world_size, ...] tensor."""
    at = policy.layout
    return {
        name: ShardedTensor.from_rank_offsets(f"{kind}.{name}", tensor[None].clone(), (0, at.rank, at.world_size))
        for name, tensor in tensors.items()
    }
