"""The transports into engine servers, by the names of `sync.transport`, and where those servers are."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch

from megatron_nft.distributed import gather_objects
from megatron_nft.weights.routes import Places, RankPlace, ServerPlace
from megatron_nft.weights.transport import WeightSyncError
from megatron_nft.weights.transports.disk import DiskTransport
from megatron_nft.weights.transports.distributed import DistributedTransport
from megatron_nft.weights.transports.servers import ServerTransport
from megatron_nft.weights.transports.tensor import TensorTransport

if TYPE_CHECKING:
    from megatron_nft.config import Config
    from megatron_nft.engines.engine import Ranks

TRANSPORTS: dict[str, type[ServerTransport]] = {
    "tensor": TensorTransport,
    "distributed": DistributedTransport,
    "disk": DiskTransport,
}


def server_transport(name: str, places: Places) -> type[ServerTransport]:
    """The transport of `sync.transport` into these servers.

    `auto`: shared memory where every server is on a trainer's host, else a group. WeightSyncError for shared memory
    where one is not.
    """
    if name == "auto":
        name = "distributed" if places.foreign else "tensor"
    if name == "tensor" and places.foreign:
        hosts = ", ".join(dict.fromkeys(rank.host for rank in places.ranks))
        raise WeightSyncError(
            f"sync.transport=tensor: {', '.join(places.foreign)}: not on a trainer's host ({hosts}), and memory is "
            "shared within a host alone. Allowed here: auto, distributed, disk"
        )
    return TRANSPORTS[name]


def check_transport(config: Config, device: str) -> None:
    """ValueError for a transport that cannot reach servers that the run starts beside trainer ranks on `device`.

    device: cpu | cuda. Servers take the first GPUs of each host, so one of them is on rank 0's, which sends.
    """
    server, name = config.rollout.server, config.sync.transport
    if not config.rollout.uses_servers or server.urls or server.registry or name == "disk":
        return
    if server.device not in ("auto", device):
        raise ValueError(
            f"sync.transport={name} with rollout.server.device={server.device}: the trainer's weights are on {device}. "
            "Allowed here: disk"
        )
    if name == "distributed" and device == "cuda":
        raise ValueError(
            "sync.transport=distributed: the servers that the run starts share their GPUs with trainer ranks, and NCCL "
            "does not take two ranks on one GPU (Duplicate GPU detected). Allowed here: auto, tensor, disk"
        )


def locate(urls: Sequence[str], local_urls: Sequence[str] | None, layout: Ranks) -> Places:
    """Where all ranks and the servers at `urls` are. Collective.

    local_urls: those of the servers on this host; None to look which of `urls` have an address of this host.
    WeightSyncError, on every rank, where several hosts have the address of one URL.
    """
    if local_urls is None:
        local_urls = [url for url in urls if is_own_address(urlsplit(url).hostname or "")]
    found = gather_objects((RankPlace(os.uname().nodename, _gpu_names(layout.device)), local_urls), layout.world_gloo)
    hosts: dict[str, set[str]] = {url: set() for url in urls}
    for rank, local in found:
        for url in local:
            hosts[url].add(rank.host)
    for url, names in hosts.items():
        if len(names) > 1:
            raise WeightSyncError(
                f"rollout.server.urls: {url} is another server on each of {', '.join(sorted(names))}; give the address "
                "at which all hosts reach it"
            )
    servers = [ServerPlace(url.rstrip("/"), next(iter(names), None)) for url, names in hosts.items()]
    return Places(tuple(rank for rank, _ in found), tuple(servers))


def is_own_address(host: str) -> bool:
    """Whether an address or a name is of this host, loopback included: then a socket can be bound to it."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
            return True
    return False


def _gpu_names(device: torch.device) -> tuple[str, ...]:
    """The names of a rank's GPU, as `RankPlace.gpu` has them."""
    if device.type != "cuda":
        return ()
    return str(torch.cuda.get_device_properties(device).uuid), str(device.index)
