"""Transformer Engine's user buffers, through which it moves the activations of sequence parallelism while it multiplies
(`policy.tp_comm_overlap`).

megatron-core's layers ask for them, and leave it to the program to make them before the first forward pass. Their size
is fixed, [micro_batch_tokens, hidden]: Transformer Engine refuses input of another size, so micro-batches are padded to
that number of tokens (`PolicyConfig.token_multiple`).

Sources: Transformer Engine 2.11 (module/base.py: initialize_ub, fill_userbuffers_buffer_for_all_gather) and Megatron-LM
(training/initialize.py). None of it runs without several GPUs.
"""

from __future__ import annotations

import socket

from megatron_nft.config import PolicyConfig
from megatron_nft.distributed import gather_objects
from megatron_nft.policy.family import ModelSpec
from megatron_nft.policy.parallel import ParallelLayout


def open_user_buffers(spec: ModelSpec, policy: PolicyConfig, layout: ParallelLayout) -> None:
    """Make the buffers of this process, unless it has them. Collective over all ranks.

    ValueError where the ranks of a tensor-parallel group are on several hosts: the buffers are memory that the GPUs of
    one host read directly.
    """
    check_hosts(gather_objects(socket.gethostname(), layout.world_gloo), layout.tp.size)
    from transformer_engine.pytorch.module import base

    if base._ub_communicators is not None:
        return
    base.initialize_ub(
        shape=[policy.micro_batch_tokens, spec.hidden_size],
        tp_size=layout.tp.size,
        quantization_modes=[base.UserBufferQuantizationMode[name] for name in buffer_modes(policy)],
        bootstrap_backend="gloo",
    )


def check_hosts(hosts: list[str], tp_size: int) -> None:
    """ValueError where tensor-parallel ranks, which are neighbours in `hosts` [world], are not on one host."""
    for first in range(0, len(hosts), tp_size):
        group = hosts[first : first + tp_size]
        if len(set(group)) > 1:
            raise ValueError(
                f"policy.tp_comm_overlap needs each tensor-parallel group on one host; ranks {first} to "
                f"{first + tp_size - 1} are on {', '.join(sorted(set(group)))}: use a tensor_model_parallel_size that "
                "divides the GPUs of a host, or leave tp_comm_overlap out"
            )


def buffer_modes(policy: PolicyConfig) -> list[str]:
    """Which kinds of buffers the layers ask for: those in 16 bits, those in FP8, or both, where some layers stay in
    bf16. The probe of a weight sync and bf16 log-probs run without FP8, so that both are there with any recipe."""
    return ["NONE"] if policy.fp8.recipe == "none" else ["FP8", "NONE"]
