"""The `tensor` transport: engines on this machine read buckets in place, from shared memory or over CUDA IPC."""

from __future__ import annotations

import torch

from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.shared_memory import shared_buffer
from megatron_nft.weights.transports.servers import ServerTransport


class TensorTransport(ServerTransport):
    """Tells every server, in one HTTP call per bucket, where to read the bucket."""

    name = "tensor"

    def allocate(self, nbytes: int) -> torch.Tensor:
        return shared_buffer(nbytes, self._layout.device)

    def send(self, bucket: Bucket) -> None:
        self._ledger.note(bucket.metas)
        self._run(lambda server: server.load_shared(bucket))
