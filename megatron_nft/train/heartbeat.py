"""Which ranks are still there, as told over the network: for runs on several hosts.

Every few seconds each rank writes where it is, with a number that grows, into the store through which the ranks found
each other. Rank 0 reads what all wrote, and writes down who has been silent and for how long; the others read that, and
what rank 0 wrote. So each rank reads and writes a few bytes per heartbeat, rank 0 a few for every rank, however many
hosts there are.

    host h2 is cut off or loses power    rank 0 hears no more from its ranks, and tells all others
    the host of rank 0 is                nobody gets an answer from the store
    h2's own ranks, if they live         get no answer from the store either

A rank that generates, compiles, reads a model or waits in a collective goes on writing: a thread of its own does it.
Silence is measured by the reader's own clock, from one change to the next, so that clocks of hosts are never compared.
The store answers from the memory of one process; no shared folder can hold this up.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from megatron_nft.distributed import gather_objects
from megatron_nft.train.whereabouts import SILENT_BEATS, Whereabouts

SILENT_KEY = "silent"
CLOSE_TIMEOUT_S = 2.0


def open_heartbeat(
    where: Callable[[], Whereabouts], group: dist.ProcessGroup, period_s: float, timeout_s: float
) -> Heartbeat | None:
    """The heartbeat of this rank; None in a run on one host, whose ranks end with their launcher. Collective.

    where: tells where this rank is. group: gloo ranks of the whole world. period_s: from one beat to the next.
    timeout_s: silence after which nobody waits for an answer any more.
    """
    if len(set(gather_objects(os.uname().nodename, group))) == 1:
        return None
    # A connection of its own: one that is shared would be held by whoever waits for a key.
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the ranks of one start
    own = PrefixStore(f"megatron_nft/heartbeat/{start}", store)
    heartbeat = Heartbeat(own, dist.get_rank(group), dist.get_world_size(group), where, period_s)
    dist.barrier(group)  # from here on every key that is read is there
    heartbeat.start()
    return heartbeat


class Heartbeat:
    """The beats of this rank, and what it heard of the others."""

    def __init__(
        self, store: Store, rank: int, world_size: int, where: Callable[[], Whereabouts], period_s: float
    ) -> None:
        """Write the first beat. `start` begins with the others once all ranks have come so far. See open_heartbeat."""
        self._store, self._rank, self._where, self._period_s = store, rank, where, period_s
        self._watched = list(range(1, world_size)) if rank == 0 else [0]
        self._keys = [str(r) for r in self._watched] + [SILENT_KEY]
        self._beats = 0
        self._heard: dict[int, tuple[str, float]] = {}  # rank -> its last beat, and when that came, by our clock
        self._told: list[Whereabouts] = []  # silent ranks, as rank 0 has them
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._write_own()
        if rank == 0:
            self._tell_silent()

    def start(self) -> None:
        """Begin to beat and to listen."""
        self._listen()
        self._thread.start()

    def silent(self) -> list[Whereabouts]:
        """Other ranks that have been silent for some beats, with `silent_s`, as far as this rank knows."""
        told = [r for r in self._told if r.rank not in (self._rank, *self._watched)]
        return self._unheard() + told

    def close(self) -> None:
        """End. Silence from here on means nothing, unless this rank has failed: NCCL does not tell the others."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while not self._closed.wait(self._period_s):
                self._beat()
            self._write_own(done=not self._where().ended)
        except RuntimeError:
            return  # the store is gone, and its host with it or at its end: that rank 0 is silent tells the rest

    def _beat(self) -> None:
        self._write_own()
        self._listen()
        if self._rank == 0:
            self._tell_silent()

    def _write_own(self, *, done: bool = False) -> None:
        self._beats += 1
        self._store.set(str(self._rank), json.dumps([self._beats, done, asdict(self._where())]))

    def _listen(self) -> None:
        *beats, told = self._store.multi_get(self._keys)
        now = time.monotonic()
        for rank, beat in zip(self._watched, map(bytes.decode, beats), strict=True):
            if rank not in self._heard or self._heard[rank][0] != beat:
                self._heard[rank] = (beat, now)
        if self._rank != 0:
            self._told = [Whereabouts(**fields) for fields in json.loads(told)]

    def _tell_silent(self) -> None:
        self._store.set(SILENT_KEY, json.dumps([asdict(r) for r in self._unheard()]))

    def _unheard(self) -> list[Whereabouts]:
        """Of the ranks to which this one listens itself."""
        found, now = [], time.monotonic()
        for beat, since in list(self._heard.values()):
            _, done, fields = json.loads(beat)
            if now - since > SILENT_BEATS * self._period_s and not done:
                found.append(replace(Whereabouts(**fields), silent_s=now - since))
        return found
