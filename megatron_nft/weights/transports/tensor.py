"""The `tensor` transport: engines read buckets in place, from the memory of trainer ranks of their own host.

    leader -- broadcast over the trainer's group --> receivers of every host
    receivers of one host: each says where its copy lies -> the caller -- one HTTP call per server --> engine ranks
    the caller's answer to them -> their memory may be written again

`routes.py` decides who receives and who calls; memory is shared by files in /dev/shm, on a GPU by CUDA IPC.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_nft.config import Config
from megatron_nft.distributed import gather_to_first, told_by_first
from megatron_nft.policy.family import ModelSpec
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.client import WeightClient
from megatron_nft.weights.receivers import open_receivers
from megatron_nft.weights.routes import Places
from megatron_nft.weights.shared_memory import shared_buffer
from megatron_nft.weights.transport import Ledger, WeightSyncError
from megatron_nft.weights.transports.servers import ServerTransport, Versioned

Shares = dict[tuple[str, int], Any]
"""(URL, number of the source, as `Places.sources` has them) -> where the bucket lies"""


class TensorTransport(ServerTransport):
    """The transport that the module describes."""

    name = "tensor"

    def __init__(
        self,
        servers: Sequence[WeightClient],
        places: Places,
        engine: Versioned,
        config: Config,
        spec: ModelSpec,
        layout: ParallelLayout,
        ledger: Ledger,
    ) -> None:
        super().__init__(servers, places, engine, config, spec, layout, ledger)
        self._check_device()
        if self._facts.hosts > 1:
            raise WeightSyncError(
                f"sync.transport=tensor: the ranks of {servers[0].url} are on {self._facts.hosts} hosts, and memory is "
                "shared within a host alone. Allowed here: distributed, disk"
            )
        size, timeout_s = self._facts.tp_size, config.train.collective_timeout_s
        meetings = self._places.meetings(size)
        self.receivers = open_receivers({rank for ranks in meetings.values() for rank in ranks}, layout, timeout_s)
        self._meeting = _open_meeting(list(meetings.values()), layout, timeout_s)
        sources = [self._places.sources(place, size) for place in self._places.servers]
        self._num_sources = {server.url: len(ranks) for server, ranks in zip(servers, sources, strict=True)}
        self._shared = [  # what this rank shares: with which server, and in which place of the message
            (server, number)
            for server, ranks in zip(servers, sources, strict=True)
            for number, source in enumerate(ranks)
            if source == layout.rank
        ]

    def allocate(self, nbytes: int) -> torch.Tensor:
        return shared_buffer(nbytes, self._layout.device) if self._shared else super().allocate(nbytes)

    def send(self, bucket: Bucket) -> None:
        shares: Shares | None = None
        try:
            self._ledger.note(bucket.metas)
            shares = {(s.url, number): s.share(bucket) for s, number in self._shared if s.url not in self.lost}
        finally:  # the other ranks of the meeting must hear of an error
            self._meet(bucket, shares)

    def skip(self) -> None:
        self._meet(None, None)

    def _meet(self, bucket: Bucket | None, shares: Shares | None) -> None:
        """Bring a bucket to the host's servers, with all ranks that share it; with none, if one of them cannot."""
        shared = [shares] if self._meeting is None else gather_to_first(shares, self._meeting)
        try:
            if shared is not None and bucket is not None and None not in shared:
                found = {key: share for of_rank in shared if of_rank for key, share in of_rank.items()}
                numbers = self._num_sources
                self._each(lambda s: s.load_shared(bucket, [found[s.url, i] for i in range(numbers[s.url])]))
        finally:
            if self._meeting is not None:
                self.lost |= told_by_first(self.lost, self._meeting)  # nothing more is shared with those

    def close(self) -> None:
        super().close()
        self.receivers.close()
        if self._meeting is not None:
            dist.destroy_process_group(self._meeting)


def _open_meeting(
    meetings: Sequence[Sequence[int]], layout: ParallelLayout, timeout_s: float
) -> dist.ProcessGroup | None:
    """Make a group, in host memory, of each host's receivers; return this rank's, None where it is alone. Collective.

    The caller, which is the first rank of its host, is also the first of the group.
    """
    timeout, own = datetime.timedelta(seconds=timeout_s), None
    for ranks in meetings:
        if len(ranks) > 1:
            group = dist.new_group(sorted(ranks), backend="gloo", timeout=timeout)
            own = group if layout.rank in ranks else own
    return own
