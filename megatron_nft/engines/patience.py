"""How long a server may take to start, where rollout.server.start_timeout_s leaves it to us."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nft.engines.engine import NO_WEIGHTS

if TYPE_CHECKING:
    from megatron_nft.config import ServerConfig

START_S = 300.0  # imports, kernels compiled, CUDA graphs
READ_BYTES_PER_S = 0.2e9  # one server's part of a shared disk that all hosts read at once
FILL_BYTES_PER_S = 1e9  # of one device: memory allocated and filled with anything


def reads_weights(server: ServerConfig, weight_version: int) -> bool:
    """Whether a started server reads the model's weights. Not where the first weight sync brings them, unless the
    engine quantizes: what it takes later has to look like what it read at its start."""
    return weight_version != NO_WEIGHTS or server.quantization != "none"


def start_timeout_s(server: ServerConfig, model: Path | None = None, weight_version: int = NO_WEIGHTS) -> float:
    """Seconds to wait for a server of the model folder, or for a process without a model."""
    if server.start_timeout_s is not None:
        return server.start_timeout_s
    nbytes = sum(path.stat().st_size for path in model.glob("*.safetensors")) if model is not None else 0
    if reads_weights(server, weight_version):
        return START_S + nbytes / READ_BYTES_PER_S
    return START_S + nbytes / server.tensor_parallel_size / FILL_BYTES_PER_S
