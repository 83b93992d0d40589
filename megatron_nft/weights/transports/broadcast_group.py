"""A process group of one trainer rank (rank 0) and the engines' ranks, beside torch.distributed's own groups.

The engines join with torch.distributed's helpers under a group name (SGLang: init_weights_update_group), which fixes
under which keys of the store the members find each other; BroadcastGroup uses the same keys.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch exports them silently


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the members of a group find each other. The port is the system's choice, so there is no race for it."""

    store: TCPStore
    address: str
    name: str
    world_size: int
    backend: str  # gloo | nccl
    device: torch.device  # of the trainer's end

    @classmethod
    def open(cls, address: str, name: str, world_size: int, device: torch.device, timeout_s: float) -> Rendezvous:
        """Start the store at this machine's `address`; `device` decides between gloo and NCCL."""
        timeout = datetime.timedelta(seconds=timeout_s)
        store = TCPStore(address, 0, None, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True)
        return cls(store, address, name, world_size, "nccl" if device.type == "cuda" else "gloo", device)

    @property
    def port(self) -> int:
        """TCP port of the store."""
        port: int = self.store.port
        return port

    @property
    def keys(self) -> PrefixStore:
        """The part of the store in which torch's members find each other."""
        device = "cuda" if self.backend == "nccl" else "cpu"
        store = PrefixStore(self.name, self.store)
        return PrefixStore(f"{device}/", PrefixStore(f"{self.name}/", store))

    def unique_id(self) -> bytes:
        """NCCL's 128 bytes for those who join without a store. Waits until the trainer's end has made them."""
        return bytes(self.keys.get("0"))  # torch's name for the id of a group's first communicator


class BroadcastGroup:
    """Sends from this rank to all other members, who must have been told to join: making one waits until they have."""

    def __init__(self, rendezvous: Rendezvous, timeout_s: float, *, warm_up: bool = False) -> None:
        """warm_up: sum one number with all members, as those do who join by `Rendezvous.unique_id`."""
        timeout = datetime.timedelta(seconds=timeout_s)
        store = rendezvous.keys
        self._group: Any  # torch has no type for what its two kinds of group have in common
        if rendezvous.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, 0, rendezvous.world_size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, 0, rendezvous.world_size, timeout)
        self._store = rendezvous.store  # the server of the keys; it lives as long as the group
        self._work: Any = None  # dist.Work of the broadcast under way
        if warm_up:
            self._group.allreduce([torch.zeros(1, device=rendezvous.device)]).wait()

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Start to send. One at a time: `wait` comes before the next."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._work = self._group.broadcast([tensor], options)

    def is_sent(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return bool(self._work.is_completed())

    def wait(self) -> None:
        """Return when the tensor may be written again. RuntimeError if a member left."""
        self._work.wait()
        self._work = None  # it holds the tensor: one larger than a bucket must be gone before the next is made

    def close(self, wait_s: float = 0.0) -> None:
        """Leave: members that still wait for data get an error. Returns once the group is gone, or after `wait_s`.

        The connections close with the last reference, that of a broadcast under way included. Dropping it waits for
        that broadcast, which an engine that never takes part holds up until the timeout: hence the thread.
        """
        held = [self._group, self._work]
        self._group = self._work = None
        dropping = threading.Thread(target=_drop, args=(held,), name="broadcast-group-close", daemon=True)
        dropping.start()
        dropping.join(wait_s)


def _drop(held: list[Any]) -> None:
    with contextlib.suppress(AttributeError, RuntimeError):
        held[0].abort()
    held.clear()


def address_towards(url: str) -> str:
    """This machine's address as the host of `url` sees it."""
    where = urlsplit(url)
    host, port = where.hostname or "localhost", where.port or 80
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing: only picks the interface
        address: str = probe.getsockname()[0]
        return address
