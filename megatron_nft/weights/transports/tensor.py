"""The `tensor` transport: engines on this machine read buckets in place, from shared memory or over CUDA IPC."""

from __future__ import annotations

import torch

from megatron_nft.engines.weights import EngineServer
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.shared_memory import shared_buffer
from megatron_nft.weights.transports.servers import ServerTransport


class TensorTransport(ServerTransport):
    """One HTTP call per bucket and server."""

    name = "tensor"

    def allocate(self, nbytes: int) -> torch.Tensor:
        return shared_buffer(nbytes, self._layout.device)

    def _send_to(self, server: EngineServer, bucket: Bucket) -> None:
        server.load_shared(bucket, self._facts.tp_size)
