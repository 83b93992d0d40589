"""CUDA_DEVICE_MAX_CONNECTIONS, which must be set before CUDA starts.

Megatron's overlap of tensor- and context-parallel communication with matrix products relies on the GPU starting
kernels in the order in which they were given to it, which chips before Blackwell do only with one connection
(megatron-core 0.16.1, tensor_parallel/layers.py: "we rely on CUDA_DEVICE_MAX_CONNECTIONS=1"). With more, results are
the same and the communication is not hidden. Blackwell keeps the order anyway, and there one connection only costs.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from megatron_nft.config import PolicyConfig
from megatron_nft.processes import set_own_variable

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
BLACKWELL = 10.0  # compute capability
TIME_LIMIT_S = 60.0


def set_connections(policy: PolicyConfig) -> None:
    """Set the variable of this process as the settings say. ValueError for a value under which tensor or context
    parallelism would not overlap, whether from the settings or from the environment."""
    wanted = policy.cuda_device_max_connections
    value = str(wanted) if wanted is not None else os.environ.get(VARIABLE)
    needs_order = (
        max(policy.tensor_model_parallel_size, policy.context_parallel_size) > 1 and _oldest_capability() < BLACKWELL
    )
    if needs_order and value not in (None, "1"):
        source = "the environment" if wanted is None else "policy.cuda_device_max_connections"
        raise ValueError(
            f"{VARIABLE} is {value} by {source}; with tensor_model_parallel_size="
            f"{policy.tensor_model_parallel_size} and context_parallel_size={policy.context_parallel_size} on chips "
            "before Blackwell Megatron needs 1: leave it out"
        )
    if needs_order:
        value = "1"
    if value is not None:
        set_own_variable(VARIABLE, value)  # servers have it as it was given


def _oldest_capability() -> float:
    """The lowest compute capability of this machine's GPUs; infinity where the driver's tool finds none. Asked of the
    tool, because asking CUDA would start it."""
    if shutil.which("nvidia-smi") is None:
        return float("inf")
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S)
    found = [float(line) for line in done.stdout.split()] if done.returncode == 0 else []
    return min(found, default=float("inf"))
