"""The trainer's side of a sync into an engine on every host: args TP PP ENGINE_TP [CHECK ...].

The engines are stand-ins. The ranks of a host pretend to have one GPU each, and rank r of its engine to be on GPU r: in
shared memory they do as they would over CUDA IPC. ENGINE_TP 0 means real SGLang servers, without pretence.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import torch.distributed as dist
from launch import Ranks, run_checks
from processes import below, wait_until
from tiny import make_model

from megatron_nft.config import Config, RolloutConfig
from megatron_nft.engines import transports
from megatron_nft.engines.sglang.client import SGLangEngine
from megatron_nft.engines.sglang.kind import KIND
from megatron_nft.engines.sglang.weights import SGLangWeightClient
from megatron_nft.engines.start import start_servers
from megatron_nft.engines.sync import open_weight_sync
from megatron_nft.policy import parallel
from megatron_nft.policy.family import read_family
from megatron_nft.policy.model import build_chunks
from megatron_nft.processes import die_with_parent
from megatron_nft.weights.import_hf import load_hf
from megatron_nft.weights.names import hf_shapes
from megatron_nft.weights.transport import EngineLost, WeightSyncError

HOST = os.uname().nodename
LOCAL_RANK = int(os.environ["LOCAL_RANK"])
VICTIM, OTHER = (f"model.layers.3.self_attn.{x}_proj.weight" for x in "kv")  # of the last stage
TENSORS = 4 * 7 + 3  # of an engine: per layer qkv weight and bias, o, gate_up, down, two norms


class World:
    version = 0


def everyone(value) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_start(ranks: Ranks) -> None:
    tp, pp, engine_tp = map(int, ranks.args[:3])
    World.real, World.engine_tp = engine_tp == 0, max(1, engine_tp)
    World.model = ranks.scratch / "model"
    if ranks.rank == 0:
        make_model(World.model, "qwen2", tied=False, layers=4, heads=8, kv_heads=4, vocab=263)
    dist.barrier()
    announcement = ranks.scratch / f"engine-{HOST}"
    if LOCAL_RANK == 0:
        start = start_server if World.real else start_peer
        start(ranks, announcement, socket.gethostbyname(HOST))
    wait_until(announcement.exists, 1000 if World.real else 280, "the engine's start")
    World.pid, own = announcement.read_text().split()
    World.hosts, World.pids, World.own = everyone(HOST), everyone(os.getpid()), own
    World.urls = list(dict.fromkeys(everyone(own)))
    World.policy = {"precision": "fp32", "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    World.layout = parallel.initialize(settings(ranks).policy, seed=0)
    World.spec = read_family(World.model)
    World.chunks = build_chunks(World.spec, settings(ranks).policy, World.layout)
    load_hf(World.chunks, World.model, World.spec, World.layout)
    World.nbytes = sum(4 * math.prod(shape) for shape in hf_shapes(World.spec).values())
    if not World.real:
        facts = SGLangWeightClient.facts
        gpus = tuple(map(str, range(World.engine_tp)))
        SGLangWeightClient.facts = lambda client: replace(facts(client), gpus=gpus)
        transports._gpu_names = lambda device: (str(LOCAL_RANK),)


def start_peer(ranks: Ranks, announcement: Path, address: str) -> None:
    peer = Path(sys.modules["launch"].__file__).with_name("engine_peer.py")
    command = [sys.executable, peer, announcement, World.model, World.engine_tp, address]
    subprocess.Popen(list(map(str, command)), preexec_fn=die_with_parent)


def start_server(ranks: Ranks, announcement: Path, address: str) -> None:
    server = {"start_timeout_s": 900, "max_total_tokens": 8192, "max_restarts": 0}
    World.group = start_servers(
        KIND,
        World.model,
        RolloutConfig(engine="sglang", server=server),
        precision="fp32",
        device="cpu",
        log_dir=ranks.scratch / "logs",
        weight_version=0,
        address=address,
    )
    (server,) = World.group.servers
    partial = announcement.with_suffix(".partial")
    partial.write_text(f"{server._supervisor.pid} {server.url}")
    partial.rename(announcement)


def settings(ranks: Ranks, **sync) -> Config:
    return Config.model_validate(
        {
            "run_dir": ranks.scratch / "run",
            "model": {"path": World.model},
            "data": {"train": ["unused"]},
            "policy": World.policy,
            "rollout": {"engine": "sglang", "server": {"urls": World.urls}},
            "sync": {"bucket_bytes": 60_000, "timeout_s": 300, **sync},
        }
    )


class Session:
    def __init__(self, ranks: Ranks, **sync) -> None:
        config = settings(ranks, **sync)
        self.engine = SGLangEngine(World.urls, config.rollout.server, weight_version=World.version)
        self.sync = open_weight_sync(config, World.spec, World.layout, self.engine)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.sync.close()
        self.engine.close()

    def push(self):
        World.version += 1
        return self.sync.sync(World.chunks, World.version)

    @property
    def guilty(self) -> int:
        """The last rank whose memory an engine reads."""
        return max(self.sync._transport.receivers.ranks)

    def spoil(self, change) -> None:
        """The guilty rank sends `change(bucket)` in place of each bucket that holds the victim."""
        send = self.sync._transport.send

        def changed(bucket) -> None:
            if dist.get_rank() == self.guilty and any(meta.name == VICTIM for meta in bucket.metas):
                self.sync._hashing.submit(int).result()  # the trainer's checksums are of what it exported
                bucket = change(bucket)
            send(bucket)

        self.sync._transport.send = changed


def seen(url: str) -> dict:
    return httpx.get(f"{url}/seen", trust_env=False, timeout=60).json()


def calls(url: str) -> Counter:
    """(caller's address, path) -> how often; without our own looking."""
    return Counter((address, path) for address, path in seen(url)["calls"] if path != "/seen")


def check_every_engine_of_every_host_has_the_weights(ranks: Ranks) -> None:
    """Twice. `auto` is shared memory; each server was called by its own host alone, and each of its ranks read from the
    rank on its own GPU."""
    with Session(ranks) as session:
        for _ in range(2):
            receipt = session.push()
            assert receipt.transport == "tensor" and receipt.behind == {}
            assert receipt.engines == sorted(World.urls)
            assert receipt.nbytes == World.nbytes
            assert len(receipt.checksums) == World.engine_tp * TENSORS
            assert receipt.engine_checked == len(receipt.checksums) * len(World.urls)
    if World.real:
        return
    assert {address for address, _ in calls(World.own)} == {urlsplit(World.own).hostname}
    mine = [pid for pid, host in zip(World.pids, World.hosts, strict=True) if host == HOST]
    readers = [[mine[min(reader, len(mine) - 1)]] for reader in range(World.engine_tp)]
    assert seen(World.own)["read_from"] == readers


def check_messages_do_not_grow_with_the_hosts(ranks: Ranks) -> None:
    """What one sync sends, as each rank sees it, into FOLDER/counts-RANK.json for the test to compare."""
    with Session(ranks) as session:
        session.push()
        before, counted = calls(World.own), Counter()
        with counting(counted):
            session.push()
        dist.barrier()
        http = sum((calls(World.own) - before).values())
    found = {"http": http, "buckets": counted.pop("buckets"), "collectives": counted}
    (ranks.scratch / f"counts-{ranks.rank}.json").write_text(json.dumps(found))


def of_broadcast(tensor, **_) -> dict:
    return {"broadcast": 1, "bytes broadcast": tensor.nbytes} if tensor.nbytes > 1 else {"answers to flags": 1}


class counting:
    """Counts the calls of torch.distributed, the bytes of broadcasts, and the buckets that are sent."""

    OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list")
    NAMES = (*OBJECTS, "gather", "batch_isend_irecv", "barrier", "all_reduce")

    def __init__(self, counted: Counter) -> None:
        self.counted, self.patch = counted, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        for name in self.NAMES:
            self.count(dist, name)
        self.count(dist, "broadcast", of_broadcast)
        transport = transports.TensorTransport
        self.count(transport, "send", lambda _, bucket: {"buckets": 1})

    def count(self, owner, name: str, amounts=None) -> None:
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            self.counted.update(amounts(*args, **kwargs) if amounts else {name: 1})
            return original(*args, **kwargs)

        self.patch.setattr(owner, name, counted)

    def __exit__(self, *_) -> None:
        self.patch.undo()


def check_faults_stop_the_run_on_every_rank(ranks: Ranks) -> None:
    """One tensor dropped, sent twice, swapped with another, or with one bit flipped, on the last host alone."""

    def drop(bucket):
        return replace(bucket, metas=[m for m in bucket.metas if m.name != VICTIM])

    def twice(bucket):
        return replace(bucket, metas=bucket.metas + [m for m in bucket.metas if m.name == VICTIM])

    def swap(bucket):
        names = {VICTIM: OTHER, OTHER: VICTIM}
        return replace(bucket, metas=[replace(m, name=names.get(m.name, m.name)) for m in bucket.metas])

    def flip(bucket):
        size = next(m.end - m.start for m in bucket.metas if m.name == VICTIM) // World.engine_tp
        start = next(m.start for m in bucket.metas if m.name == VICTIM) + size * (World.engine_tp - 1)
        bucket.flat[start] ^= 1  # of what the last engine rank keeps, in the memory that it reads
        return bucket

    messages = {drop: "did not come", twice: "came twice", swap: "differ from", flip: "differ from"}
    for change, message in messages.items():
        with Session(ranks) as session:
            guilty = session.guilty
            session.spoil(change)
            with pytest.raises(WeightSyncError, match=message) as caught:
                session.push()
            said = str(caught.value)
            assert VICTIM in said
            if change in (swap, flip):
                assert f"http://{socket.gethostbyname(World.hosts[guilty])}:" in said, "the engine of the host at fault"
                assert len(set(World.hosts)) == 1 or said.count("http://") == 1, "and no other"
            else:
                assert f"(rank {guilty})" in said
    with Session(ranks) as session:
        assert session.push().engine_checked == World.engine_tp * TENSORS * len(World.urls)


def check_what_cannot_work_is_refused_at_the_start(ranks: Ranks) -> None:
    elsewhere = "http://10.77.0.99:30000"
    places = transports.locate([*World.urls, elsewhere], None, World.layout)
    assert places.foreign == [elsewhere]
    assert [p.host for p in places.servers[:-1]] == list(dict.fromkeys(World.hosts))
    with pytest.raises(WeightSyncError, match=rf"{elsewhere}: not on a trainer's host .*Allowed here: auto, dist"):
        transports.server_transport("tensor", places)
    assert transports.server_transport("auto", places) is transports.DistributedTransport
    if len(set(World.hosts)) > 1:
        with pytest.raises(WeightSyncError, match=r"http://127\.0\.0\.1:30000 is another server on each of h1, h2"):
            transports.locate(["http://127.0.0.1:30000"], None, World.layout)


def check_files_reach_the_engines_of_every_host(ranks: Ranks) -> None:
    """Over `disk` the callers are the same: no server is called from another host."""
    with Session(ranks, transport="disk") as session:
        config = session.sync._config
        assert {address for address, _ in calls(World.own)} == {urlsplit(World.own).hostname}
        dist.barrier()
        receipt = session.push()
        assert receipt.transport == "disk" and receipt.engines == sorted(World.urls)
        assert receipt.engine_checked == len(receipt.checksums) * len(World.urls)
        dist.barrier()
        assert not (config.run_dir / "sync" / "weights").exists()
    assert {address for address, _ in calls(World.own)} == {urlsplit(World.own).hostname}


def check_all_lost_at_once(ranks: Ranks) -> None:
    """Each host's caller knows of its own server; together they know that none is left."""

    def unreachable(client, bucket, shares):
        raise EngineLost(client.url, "gone")

    with Session(ranks) as session, pytest.MonkeyPatch.context() as patch:
        patch.setattr(SGLangWeightClient, "load_shared", unreachable)
        with pytest.raises(WeightSyncError, match="no engine is left") as caught:
            session.push()
        assert all(f"{url}: gone" in str(caught.value) for url in World.urls)


def check_an_engine_that_dies_in_the_middle_is_left_out(ranks: Ranks) -> None:
    """The engines of the other hosts get the version, and nobody waits for the one that is gone."""
    for _ in World.urls[1:2]:  # the last one, which is of the last rank's host
        lost, left = World.urls[-1], World.urls[:-1]
        with Session(ranks) as session:
            session.spoil(kill_own(lost))
            receipt = session.push()
            assert receipt.engines == sorted(left) and list(receipt.behind) == [lost]
            assert receipt.engine_checked == len(receipt.checksums) * len(left)
            again = session.push()
            assert again.engines == sorted(left) and again.checksums == receipt.checksums
        World.urls = left


def check_when_the_last_one_dies_the_run_ends(ranks: Ranks) -> None:
    with Session(ranks) as session:
        session.spoil(kill_own(World.urls[0]))
        with pytest.raises(WeightSyncError, match=f"no engine is left: {World.urls[0]}"):
            session.push()


def kill_own(url: str):
    """End the engine at `url`, which must be of the host of the rank that calls."""

    def kill(bucket):
        assert World.own == url
        for pid in below(int(World.pid)) if World.real else [int(World.pid)]:
            os.kill(pid, signal.SIGKILL)
        return bucket

    return kill


if __name__ == "__main__":
    checks = sys.argv[4:] or [name for name in globals() if name.startswith("check_")]
    run_checks({name: globals()[name] for name in checks})
