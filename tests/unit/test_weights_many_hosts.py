"""The start and two weight syncs of a run on 16 hosts of 8 ranks, simulated: a thread per rank, no models, no sockets.

Ours: how a rank finds address, servers and caller, who gets the buckets, and every step of the transport. The second
sync brings the same weights again to a few servers that came back. Stand-ins: torch's groups, which note who makes
them, the servers' processes (every host's draw the same ports), and what calls them, which notes each message.
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
import torch.distributed as dist

from megatron_nft.config import Config
from megatron_nft.engines import addresses, transports
from megatron_nft.engines import http as engines_http
from megatron_nft.engines.engine import OpenOptions
from megatron_nft.engines.sglang.client import SGLangEngine
from megatron_nft.engines.sglang.kind import KIND
from megatron_nft.weights.buckets import TensorMeta
from megatron_nft.weights.client import ServerFacts
from megatron_nft.weights.transport import SPARED, Ledger
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

    def __init__(self, monkeypatch, folder: Path, num_servers: int, tp_size: int, only: list[str]) -> None:
        """folder: for what the engines write. only: URLs of the servers that get the weights once more."""
        self.folder = folder
        self.num_servers, self.tp_size, self.only, self.here = num_servers, tp_size, only, threading.local()
        self.world, self.groups = Group(range(WORLD)), {}
        self.made: dict[int, list[tuple[int, ...]]] = {rank: [] for rank in range(WORLD)}  # groups that a rank made
        self.messages: list[tuple[int, str, str]] = []  # (calling rank, URL, call)
        self.read: dict[tuple[str, int], set[int]] = {}  # (URL, rank of the server) -> ranks whose memory it read
        self.first: tuple[list, dict] | None = None  # messages and read of the first sync
        self.receivers: dict[int, tuple] = {}  # rank -> the ranks of each stage's group, as this rank has them
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
        monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=self.world))
        monkeypatch.setattr(dist, "new_group", self.new_group)
        monkeypatch.setattr(dist, "destroy_process_group", lambda group: None)
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

    def new_group(self, ranks, **_) -> Group:
        """As in torch, every rank makes every group, in the same order."""
        with self.lock:
            made = self.made[self.here.rank]
            made.append(tuple(ranks))
            return self.groups.setdefault(len(made), Group(ranks))

    def gather_to_first(self, value, group: Group):
        values = group.gather(self.here.rank, value)
        return values if self.here.rank == group.ranks[0] else None

    def run_rank(self, rank: int) -> None:
        """Open the engine and its transport, and bring BUCKETS buckets to all servers, and again to `only`."""
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
            is_stage_leader=rank in (0, 64),
        )
        config = settings(self.num_servers, self.tp_size)
        options = OpenOptions("bf16", self.folder, layout, load_weights=False, allow_version_change=False)
        engine = engines_http.open_http_engine(KIND, Path("model"), config.rollout, options)
        ledger = Ledger({f"w{n}": (1,) for n in range(BUCKETS)})
        transport = engine.open_transport(config, None, layout, ledger)
        groups = transport.receivers.groups
        self.receivers[rank] = tuple(group and tuple(group.ranks) for group in groups)
        for urls in (None, self.only):
            self.sync(transport, layout, ledger, urls)
            self.world.gather(rank, None)
            if rank == 0 and urls is None:
                self.first, self.messages, self.read = (self.messages, self.read), [], {}
            self.world.gather(rank, None)
        transport.close()
        engine.close()

    def sync(self, transport, layout, ledger: Ledger, only: list[str] | None) -> None:
        """One sync, as `weights.sync.WeightSync` makes it, on this rank."""
        rank, urls = layout.rank, set(transport.engines())
        transport.pause(only)
        assert transport._engine.syncing == (only is None)
        transport.begin(1)
        ledger.open()
        if rank in transport.receivers.ranks:
            for n in range(BUCKETS):
                transport.send(SimpleNamespace(metas=[TensorMeta(f"w{n}", (1,), torch.float32, 0, 4)], rank=rank))
        ledger.close()
        transport.finish(1)
        spared = {} if only is None else dict.fromkeys(urls - set(only), SPARED)
        assert self.world.gather(rank, transport.lost) == [spared] * WORLD
        checked = transport.check({"w": "0"})
        transport.resume(1)
        assert not transport._engine.syncing
        transport.probe(np.zeros(3, np.int32), np.zeros(2, np.float32))
        total = sum(self.world.gather(rank, checked))
        assert total == (HOSTS * self.num_servers if only is None else len(only)) * self.tp_size


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


def url_of(host: int, number: int) -> str:
    return f"http://10.0.0.{host + 1}:{PORT + number}"


def check_messages(messages: list, read: dict, servers: dict[str, tuple[int, int]], tp_size: int, **calls: int) -> None:
    """These servers, and no others, got these calls, all from the first rank of their host, and each of their ranks
    read from the trainer rank on its own GPU. servers: URL -> its host, and its number there."""
    assert {url for _, url, _ in messages} == servers.keys()
    for rank, url, call in messages:
        assert rank == servers[url][0] * RANKS, f"{call} of {url} by rank {rank}"
    wanted = Counter(pause=1, begin=1, load_shared=BUCKETS, end=1, checksums=1, resume=1, prompt_logprobs=1, **calls)
    for url in servers:
        assert Counter(call for _, called, call in messages if called == url) == wanted
    for (url, reader), sources in read.items():
        host, number = servers[url]
        assert sources == {host * RANKS + number * tp_size + reader}
    assert len(read) == len(servers) * tp_size


@pytest.mark.parametrize(("num_servers", "tp_size"), [(2, 4), (4, 1)])
def test_no_message_to_a_server_leaves_its_host(monkeypatch, tmp_path, num_servers, tp_size):
    """Every server is called by the first rank of its host alone; each of its ranks reads from its own GPU's rank.
    Servers that get the weights again are called like that too, and the others not at all."""
    servers = {url_of(host, n): (host, n) for host in range(HOSTS) for n in range(num_servers)}
    only = [url_of(3, 1), url_of(9, 0)]
    simulation = Simulation(monkeypatch, tmp_path, num_servers, tp_size, only)
    with ThreadPoolExecutor(WORLD) as threads:
        for finished in [threads.submit(simulation.run_rank, rank) for rank in range(WORLD)]:
            finished.result(WAIT_S)
    check_messages(*simulation.first, servers, tp_size, facts=1)
    check_messages(simulation.messages, simulation.read, {url: servers[url] for url in only}, tp_size)

    # What hosts tell each other goes over groups that all ranks made alike: a stage's leader and all receivers.
    assert len(set(map(tuple, simulation.made.values()))) == 1
    on_gpus = num_servers * tp_size  # the ranks of a host whose GPUs have a rank of a server
    receivers = {host * RANKS + gpu for host in range(HOSTS) for gpu in range(on_gpus)}
    members = tuple(sorted(receivers))  # ranks 0 and 64, which lead the stages, are among them
    for rank, groups in simulation.receivers.items():
        assert groups == ((members if rank in receivers else None),) * 2
    of_hosts = [tuple(range(host * RANKS, host * RANKS + on_gpus)) for host in range(HOSTS)]
    assert simulation.made[0] == [members] * (len(members) < WORLD) + of_hosts
