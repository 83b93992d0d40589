"""The start and one weight sync of a run on 16 hosts of 8 ranks, simulated: a thread per rank, no models, no sockets.

Ours: how a rank finds address, servers and caller, and every step of the transport. Stand-ins: the groups, the servers'
processes (every host's draw the same ports), and what calls them, which notes each message.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch

from megatron_nft.config import Config
from megatron_nft.engines import addresses, transports
from megatron_nft.engines import http as engines_http
from megatron_nft.engines.engine import OpenOptions
from megatron_nft.engines.sglang.client import SGLangEngine
from megatron_nft.engines.sglang.kind import KIND
from megatron_nft.weights.buckets import TensorMeta
from megatron_nft.weights.client import ServerFacts
from megatron_nft.weights.receivers import Receivers
from megatron_nft.weights.transport import Ledger
from megatron_nft.weights.transports import servers, tensor

HOSTS, RANKS = 16, 8
WORLD = HOSTS * RANKS
PORT = 41000
BUCKETS = 3
WAIT_S = 120


class Group:
    """Ranks that meet: what `gather_objects` and the like need, over threads."""

    def __init__(self, ranks) -> None:
        self.ranks, self.values = list(ranks), {}
        self.barrier = threading.Barrier(len(self.ranks), timeout=WAIT_S)

    def gather(self, rank: int, value) -> list:
        self.values[rank] = value
        self.barrier.wait()
        values = [self.values[r] for r in self.ranks]
        self.barrier.wait()
        return values


class Simulation:
    """All hosts. `here.rank` is the rank whose thread runs."""

    def __init__(self, monkeypatch, num_servers: int, tp_size: int) -> None:
        self.num_servers, self.tp_size, self.here = num_servers, tp_size, threading.local()
        self.world, self.meetings = Group(range(WORLD)), {}
        self.messages: list[tuple[int, str, str]] = []  # (calling rank, URL, call)
        self.read: dict[tuple[str, int], set[int]] = {}  # (URL, rank of the server) -> ranks whose memory it read
        self.lock = threading.Lock()
        uname = os.uname()
        monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(nodename=self.host(uname.nodename)))
        monkeypatch.setattr(httpx, "AsyncClient", lambda **_: SimpleNamespace(aclose=_nothing))
        for module in (engines_http, addresses, transports, servers):
            monkeypatch.setattr(module, "gather_objects", lambda value, group: group.gather(self.here.rank, value))
        monkeypatch.setattr(addresses, "_towards_master", lambda: self.address)
        monkeypatch.setattr(engines_http, "start_servers", self.start_servers)
        monkeypatch.setattr(transports, "_gpu_names", lambda _: (f"GPU-{self.here.rank}", str(self.here.rank % RANKS)))
        monkeypatch.setattr(SGLangEngine, "_weight_client", lambda _, url, __: Client(self, url))
        monkeypatch.setattr(tensor, "open_receivers", lambda ranks, *_: Receivers(frozenset(ranks), (None, None)))
        monkeypatch.setattr(tensor, "_open_meeting", self.open_meeting)
        monkeypatch.setattr(tensor, "gather_to_first", self.gather_to_first)
        monkeypatch.setattr(tensor, "told_by_first", lambda value, group: group.gather(self.here.rank, value)[0])

    def host(self, other: str = "") -> str:
        rank = getattr(self.here, "rank", None)
        return other if rank is None else f"node{rank // RANKS}"

    @property
    def address(self) -> str:
        return f"10.0.0.{self.here.rank // RANKS + 1}"

    def start_servers(self, *_, address: str, **__) -> SimpleNamespace:
        urls = [f"http://{address}:{PORT + number}" for number in range(self.num_servers)]
        return SimpleNamespace(urls=urls, close=lambda: None)

    def open_meeting(self, meetings, layout, timeout_s):
        with self.lock:
            for ranks in meetings:
                self.meetings.setdefault(tuple(ranks), Group(ranks))
        found = [group for ranks, group in self.meetings.items() if layout.rank in ranks]
        return found[0] if found and len(found[0].ranks) > 1 else None

    def gather_to_first(self, value, group: Group):
        values = group.gather(self.here.rank, value)
        return values if self.here.rank == group.ranks[0] else None

    def run_rank(self, rank: int) -> None:
        """Open the engine and its transport, and bring BUCKETS buckets to the servers."""
        self.here.rank = rank
        layout = SimpleNamespace(
            rank=rank,
            world_size=WORLD,
            device=torch.device("cpu"),
            world_gloo=self.world,
            tp=SimpleNamespace(rank=rank % 8, size=8),
            dp=SimpleNamespace(rank=rank // 8 % 8, size=8),
            pp=SimpleNamespace(rank=rank // 64, size=2),
            stage_leaders=(0, 64),
        )
        config = settings(self.num_servers, self.tp_size)
        options = OpenOptions("bf16", Path("logs"), layout, load_weights=False, allow_version_change=False)
        engine = engines_http.open_http_engine(KIND, Path("model"), config.rollout, options)
        ledger = Ledger({f"w{n}": (1,) for n in range(BUCKETS)})
        transport = engine.open_transport(config, None, layout, ledger)
        transport.pause()
        transport.begin(1)
        ledger.open()
        if rank in transport.receivers.ranks:
            for n in range(BUCKETS):
                transport.send(SimpleNamespace(metas=[TensorMeta(f"w{n}", (1,), torch.float32, 0, 4)], rank=rank))
        ledger.close()
        transport.finish(1)
        assert self.world.gather(rank, transport.lost) == [{}] * WORLD
        checked = transport.check({"w": "0"})
        transport.resume(1)
        transport.probe(np.zeros(3, np.int32), np.zeros(2, np.float32))
        total = sum(self.world.gather(rank, checked))
        assert total == HOSTS * self.num_servers * self.tp_size
        transport._meeting = None  # nothing of torch's to close
        transport.close()
        engine.close()


class Client:
    """A `weights.client.WeightClient` that notes its calls."""

    def __init__(self, simulation: Simulation, url: str) -> None:
        self.simulation, self.url, self.rank = simulation, url, simulation.here.rank

    def facts(self) -> ServerFacts:
        self.note("facts")
        first = (urlsplit(self.url).port - PORT) * self.simulation.tp_size
        gpus = tuple(str(first + r) for r in range(self.simulation.tp_size))
        return ServerFacts(self.simulation.tp_size, "bfloat16", None, True, gpus=gpus)

    def note(self, call: str) -> None:
        with self.simulation.lock:
            self.simulation.messages.append((self.rank, self.url, call))

    def configure(self, facts: ServerFacts) -> None:
        self.known = facts

    def share(self, bucket) -> int:
        return bucket.rank

    def load_shared(self, bucket, shares) -> None:
        self.note("load_shared")
        with self.simulation.lock:
            for reader, source in enumerate(shares):
                self.simulation.read.setdefault((self.url, reader), set()).add(source)

    def checksums(self) -> dict:
        self.note("checksums")
        return {"w": dict.fromkeys(range(self.known.tp_size), "0")}

    def prompt_logprobs(self, token_ids) -> np.ndarray:
        self.note("prompt_logprobs")
        return np.zeros(len(token_ids) - 1, np.float32)

    def close(self) -> None:
        pass

    def __getattr__(self, call: str):
        if call not in ("pause", "begin", "end", "resume"):
            raise AttributeError(call)
        return lambda *_: self.note(call)


async def _nothing() -> None:
    pass


def settings(num_servers: int, tp_size: int) -> Config:
    server = {"num_servers": num_servers, "tensor_parallel_size": tp_size}
    required = {"run_dir": "run", "model": {"path": "model"}, "data": {"train": ["unused"]}}
    return Config.model_validate(required | {"rollout": {"engine": "sglang", "server": server}})


@pytest.mark.parametrize(("num_servers", "tp_size"), [(2, 4), (4, 1)])
def test_no_message_to_a_server_leaves_its_host(monkeypatch, num_servers, tp_size):
    """Every server is called by the first rank of its host alone; each of its ranks reads from its own GPU's rank."""
    simulation = Simulation(monkeypatch, num_servers, tp_size)
    with ThreadPoolExecutor(WORLD) as threads:
        for finished in [threads.submit(simulation.run_rank, rank) for rank in range(WORLD)]:
            finished.result(WAIT_S)
    hosts = {f"10.0.0.{host + 1}": host for host in range(HOSTS)}
    urls = {f"http://{address}:{PORT + n}": hosts[address] for address in hosts for n in range(num_servers)}
    assert {url for _, url, _ in simulation.messages} == urls.keys()
    for rank, url, call in simulation.messages:
        assert rank == urls[url] * RANKS, f"{call} of {url} by rank {rank}"
    wanted = Counter(facts=1, pause=1, begin=1, load_shared=BUCKETS, end=1, checksums=1, resume=1, prompt_logprobs=1)
    for url in urls:
        assert Counter(call for _, called, call in simulation.messages if called == url) == wanted
    for (url, reader), sources in simulation.read.items():
        number = urlsplit(url).port - PORT
        assert sources == {urls[url] * RANKS + number * tp_size + reader}
    assert len(simulation.read) == len(urls) * tp_size
