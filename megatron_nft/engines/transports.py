"""The transports into engine servers, by the names of `sync.transport`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from megatron_nft.weights.transports.disk import DiskTransport
from megatron_nft.weights.transports.distributed import DistributedTransport
from megatron_nft.weights.transports.servers import ServerTransport
from megatron_nft.weights.transports.tensor import TensorTransport

TRANSPORTS: dict[str, type[ServerTransport]] = {
    "tensor": TensorTransport,
    "distributed": DistributedTransport,
    "disk": DiskTransport,
}


def server_transport(name: str, urls: Sequence[str]) -> type[ServerTransport]:
    """The transport of `sync.transport` into servers at `urls`.

    `auto`: shared memory where every server is on this machine (ours, or at a loopback address), else a group.
    """
    if name == "auto":
        local = {"127.0.0.1", "localhost", "::1", os.uname().nodename}
        name = "tensor" if all(urlsplit(url).hostname in local for url in urls) else "distributed"
    return TRANSPORTS[name]
