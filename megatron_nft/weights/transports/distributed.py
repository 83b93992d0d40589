"""The `distributed` transport: each stage leader broadcasts its buckets to all ranks of all engines, over gloo or NCCL.

A broadcast blocks every engine until all have it, so two leaders must never broadcast at the same time: leaders take
turns, stage by stage. Engines that are in one group at a time get everything from the first leader, to whom the others
send their buckets over the trainer's groups (`receivers`). An engine that is lost breaks the group for all: the group
is then made anew without it and the whole stream is sent again (`must_resend`). One that died and came back between two
syncs answers every call, but is in no group any more: it is told by its weight version, which is not the one that it
was left with.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from itertools import count

import torch
import torch.distributed as dist

from megatron_nft.config import Config
from megatron_nft.distributed import gather_objects
from megatron_nft.policy.family import ModelSpec
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.weights.buckets import Bucket
from megatron_nft.weights.client import WeightClient
from megatron_nft.weights.receivers import open_receivers
from megatron_nft.weights.routes import Places
from megatron_nft.weights.transport import SPARED, EngineLost, Ledger, WeightSyncError, none_left
from megatron_nft.weights.transports.broadcast_group import BroadcastGroup, Rendezvous, address_towards
from megatron_nft.weights.transports.servers import ServerTransport, Versioned

POLL_S = 0.0005
CLOSE_S = 10.0  # for an idle group to be gone: a process that exits meanwhile is aborted by the C++ runtime
_numbers = count()  # group names are used once per process


class DistributedTransport(ServerTransport):
    """The transport that the module describes. Groups are made at the first sync and kept."""

    name = "distributed"

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
        if layout.device.type == "cuda":
            _refuse_shared_gpus(self._places, layout.stage_leaders)
        self._group: BroadcastGroup | None = None
        self._group_name = ""
        self._members: list[str] = []  # URLs
        self._left_with: dict[str, int] = {}  # URL -> version
        self._has_turn = False
        self._leaders = layout.stage_leaders
        if self._facts.one_sender:
            self._leaders = self._leaders[:1]
            self.receivers = open_receivers(self._leaders, layout, config.sync.timeout_s)

    def begin(self, version: int) -> None:
        """Open the sessions and, at the first sync or after a loss, the groups. No rank leaves before the others."""
        errors: list[Exception] = []
        restarted: list[str] = []
        with _collected(errors):
            super().begin(version)
            restarted = [url for url in self._each(self._if_restarted) if url is not None]
        self.must_resend = False
        found = gather_objects((self.lost, restarted), self._layout.world_gloo)
        for lost, _ in found:
            self.lost |= lost
        if not self.engines():
            raise none_left(self.lost)  # on every rank
        must_join = any(urls for _, urls in found) or self._group is None or self._members != self.engines()
        for leader in self._leaders:  # one group at a time: an engine that waits for one cannot join another
            if self._layout.rank == leader and must_join:
                with _collected(errors):
                    self._join_engines()
            dist.barrier(group=self._layout.world_gloo)
        if errors:
            raise errors[0]

    def _if_restarted(self, server: WeightClient) -> str | None:
        """Return the URL of a server that has not the version that the last sync left it with."""
        left_with = self._left_with.get(server.url)
        return server.url if left_with is not None and server.version() != left_with else None

    def _join_engines(self) -> None:
        """Make this leader's group with every engine that is not lost; one that is lost meanwhile is left out."""
        wait(self._leave())  # vLLM has one group at a time: a late farewell would end the next one
        while self._group is None:
            try:
                self._group = self._gather_engines()
            except EngineLost as lost:
                self.lost[lost.url] = lost.reason
                if not self.engines():
                    raise none_left(self.lost) from None

    def _gather_engines(self) -> BroadcastGroup:
        """Return a group with the engines that are left. EngineLost where one of them does not answer."""
        servers = [server for server in self._servers if server.url not in self.lost]
        name = f"megatron-nft-{self._layout.rank}-{os.getpid()}-{next(_numbers)}"  # hosts may have equal process ids
        world_size = 1 + len(servers) * self._facts.tp_size
        timeout_s = self._config.sync.timeout_s
        rendezvous = Rendezvous.open(address_towards(servers[0].url), name, world_size, self._layout.device, timeout_s)
        answers = [
            self._threads.submit(server.join, rendezvous, 1 + i * self._facts.tp_size)
            for i, server in enumerate(servers)
        ]
        self._group_name, self._members = name, [server.url for server in servers]
        return _open_group(rendezvous, timeout_s, answers, warm_up=self._facts.one_sender)

    def send(self, bucket: Bucket) -> None:
        self._ledger.note(bucket.metas)
        if self.must_resend:
            return
        self._take_turn()
        answers = [
            (server, self._threads.submit(server.load_broadcast, bucket, self._group_name))
            for server in self._servers
            if server.url in self._members
        ]
        group = self._group
        assert group is not None, "only leaders send, and `begin` has opened their group"
        group.broadcast(bucket.flat)
        if not _arrived(group, [future for _, future in answers]):
            self._leave()  # engines that wait for the rest of the broadcast get an error and answer
        refusals = []
        for server, future in answers:
            try:
                future.result()
            except EngineLost as lost:
                self.lost[server.url] = lost.reason
                self.must_resend = True
            except WeightSyncError as error:
                refusals.append(str(error))
        if refusals and not self.must_resend:
            raise WeightSyncError("; ".join(refusals))

    def _take_turn(self) -> None:
        """Wait until the leader of the stage before has sent everything."""
        if not self._has_turn and self._layout.pp.rank > 0:
            turn = torch.zeros(1)
            dist.recv(turn, src=self._leaders[self._layout.pp.rank - 1], group=self._layout.world_gloo)
        self._has_turn = True

    def end_stream(self) -> None:
        if not self._leads or self.receivers.ranks:
            return
        self._take_turn()
        if self._layout.pp.rank + 1 < self._layout.pp.size:
            dist.send(torch.zeros(1), dst=self._leaders[self._layout.pp.rank + 1], group=self._layout.world_gloo)
        self._has_turn = False

    def resume(self, version: int) -> None:
        super().resume(version)
        self._left_with |= dict.fromkeys(self.engines(), version)

    def _leave(self, wait_s: float = 0.0) -> list[Future[None]]:
        """Close the group; returns what tells the engines so."""
        if self._group is None:
            return []
        self._group.close(wait_s)
        self._group = None
        members = (server for server in self._servers if server.url in self._members)
        left = [server for server in members if self.lost.get(server.url, SPARED) == SPARED]
        return [self._threads.submit(_forget, server, self._group_name) for server in left]

    def close(self) -> None:
        self._leave(CLOSE_S)
        super().close()
        self.receivers.close()


def _arrived(group: BroadcastGroup, answers: list[Future[None]]) -> bool:
    """Wait for a broadcast and all answers to it. Return whether it arrived; False as soon as one answer is an error.

    An engine that refuses answers at once and does not take part in the broadcast, which then never ends.
    """
    while not (group.is_sent() and all(answer.done() for answer in answers)):
        if any(answer.done() and answer.exception() for answer in answers):
            return False
        time.sleep(POLL_S)
    try:
        group.wait()
    except RuntimeError:  # a member left
        return False
    return not any(answer.exception() for answer in answers)


def _open_group(
    rendezvous: Rendezvous, timeout_s: float, answers: list[Future[None]], *, warm_up: bool
) -> BroadcastGroup:
    """Return the group once all have joined. Raise a server's error at once, without waiting for the others."""
    opened: list[BroadcastGroup] = []
    joining = threading.Thread(
        target=lambda: opened.append(BroadcastGroup(rendezvous, timeout_s, warm_up=warm_up)), daemon=True
    )
    joining.start()
    while joining.is_alive() or not all(answer.done() for answer in answers):
        for answer in answers:
            if answer.done():
                answer.result()
        time.sleep(POLL_S)
    for answer in answers:
        answer.result()
    if not opened:
        raise WeightSyncError(f"the engines did not join the update group within {timeout_s:g} s (sync.timeout_s)")
    return opened[0]


@contextmanager
def _collected(errors: list[Exception]) -> Iterator[None]:
    """Append an error of the block to `errors` instead of raising it, since the other ranks wait in a collective."""
    try:
        yield
    except Exception as error:
        errors.append(error)


def _forget(server: WeightClient, group_name: str) -> None:
    """Tell a server to drop its end of a group. Whatever it answers, the group is gone."""
    try:
        server.leave(group_name)
    except (EngineLost, WeightSyncError):
        return


def _refuse_shared_gpus(places: Places, leaders: Sequence[int]) -> None:
    """WeightSyncError where an engine rank is on the GPU of a rank that broadcasts: NCCL takes one rank per GPU."""
    if shared := places.on_gpus_of(leaders):
        text = ", ".join(f"{url} with rank {rank}" for url, rank in shared)
        raise WeightSyncError(
            f"sync.transport=distributed: servers share a GPU with a trainer rank that sends ({text}), and NCCL does "
            "not take two ranks on one GPU (Duplicate GPU detected). Allowed here: "
            + ("disk" if places.foreign else "tensor, disk")
        )
