"""Who calls whom, and who sends what to whom, in a weight sync: decided from where ranks and servers are, nothing else.

    caller     Every server is called by one rank alone: the first rank of the server's host. A server on no trainer's
               host is called by rank 0.
    sources    In the `tensor` transport each rank of an engine reads the buckets from one trainer rank of its own host:
               on a GPU from the rank that works on the same GPU, where there is one, else from the caller. A server
               whose ranks find the memory on their own GPU themselves is told of all trainer ranks of its host.
    receivers  The ranks that must therefore have every bucket: sources and callers.

    two hosts of two GPUs, a server of TP 2 on each:    rank 0, GPU 0 -> engine rank 0 | rank 2, GPU 0 -> engine rank 0
                                                        rank 1, GPU 1 -> engine rank 1 | rank 3, GPU 1 -> engine rank 1
                                                        rank 0 calls the server of h1  | rank 2 calls the server of h2

So a message to a server never leaves its host, and what the hosts tell each other goes over the trainer's groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a trainer rank is."""

    host: str
    gpu: tuple[str, ...] = ()  # the names of its GPU: UUID, and number on the host; none on a CPU


@dataclass(frozen=True, slots=True)
class ServerPlace:
    """Where a server is."""

    url: str
    host: str | None  # None: on no trainer's host
    gpus: tuple[str, ...] = ()  # one name for the GPU of each of its ranks; none on a CPU, or where it does not say
    finds_gpu: bool = False  # each of its ranks looks for its own GPU among those of all trainer ranks of the host


@dataclass(frozen=True, slots=True)
class Places:
    """Ranks in their order, and servers."""

    ranks: tuple[RankPlace, ...]
    servers: tuple[ServerPlace, ...]

    @property
    def foreign(self) -> list[str]:
        """URLs of servers that are on no trainer's host."""
        return [server.url for server in self.servers if server.host is None]

    def caller(self, server: ServerPlace) -> int:
        """Return the rank that makes the HTTP calls to a server."""
        return self.first_of(server.host)

    def first_of(self, host: str | None) -> int:
        """Return the first rank of a host; rank 0 for None."""
        return 0 if host is None else [rank.host for rank in self.ranks].index(host)

    def sources(self, server: ServerPlace, tp_size: int) -> tuple[int, ...]:
        """Return for each of a server's `tp_size` ranks the trainer rank whose memory it reads. Its host has ranks.

        All trainer ranks of the host, in their order, for a server whose ranks find theirs themselves.
        """
        if server.finds_gpu:
            return tuple(r for r, place in enumerate(self.ranks) if place.host == server.host)
        caller = self.caller(server)
        if len(server.gpus) != tp_size:
            return (caller,) * tp_size
        by_gpu = {name: r for r, place in enumerate(self.ranks) if place.host == server.host for name in place.gpu}
        return tuple(by_gpu.get(gpu, caller) for gpu in server.gpus)

    def meetings(self, tp_size: int) -> dict[str, list[int]]:
        """Host with servers -> its receivers, the caller first: they put a message to the servers together."""
        found: dict[str, set[int]] = {}
        for server in self.servers:
            if server.host is not None:
                found.setdefault(server.host, set()).update(self.sources(server, tp_size))
        firsts = {host: self.first_of(host) for host in found}
        return {host: [firsts[host], *sorted(ranks - {firsts[host]})] for host, ranks in found.items()}

    def on_gpus_of(self, ranks: Sequence[int]) -> list[tuple[str, int]]:
        """Return (URL, rank) for every server that has a rank on the GPU of one of these trainer ranks."""
        return [
            (server.url, rank)
            for server in self.servers
            for rank in ranks
            if server.host == self.ranks[rank].host and set(server.gpus) & set(self.ranks[rank].gpu)
        ]
