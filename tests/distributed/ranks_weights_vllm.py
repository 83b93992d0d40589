"""Sync into stand-ins for vLLM servers, through our extension or vLLM's own calls: args PP ENGINES ENGINE_TP WAY.

One suite for both ways: the same receipts, the same weights in the end, the same faults. Each trainer rank pretends to
have a GPU of its own, `GPU-<rank>`.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch.distributed as dist
from engine_peer import Shard
from launch import Ranks, run_checks
from processes import wait_until
from safetensors.numpy import load_file
from tiny import make_model

import megatron_nft.engines.vllm.weights as vllm_weights
from megatron_nft.config import Config
from megatron_nft.engines.sync import open_weight_sync
from megatron_nft.engines.vllm.client import VLLMEngine
from megatron_nft.policy import parallel
from megatron_nft.policy.family import read_family
from megatron_nft.policy.model import build_chunks
from megatron_nft.processes import die_with_parent
from megatron_nft.weights.import_hf import load_hf
from megatron_nft.weights.names import hf_shapes
from megatron_nft.weights.shared_memory import shared_memory
from megatron_nft.weights.transport import WeightSyncError
from megatron_nft.weights.transports.broadcast_group import Rendezvous

VICTIM = "model.layers.1.self_attn.k_proj.weight"  # of the last stage; q comes before it, v after
TRANSPORTS = {
    "extension": ("tensor", "distributed", "disk"),
    "ipc": ("tensor", "disk"),
    "nccl": ("distributed", "disk"),
}


class World:
    version = 0
    urls: list[str]
    pids: list[int]


def check_start(ranks: Ranks) -> None:
    pp, engines, World.tp, World.way = (*map(int, ranks.args[:3]), ranks.args[3])
    World.models = [ranks.scratch / "model", ranks.scratch / "other"]
    announcements = [ranks.scratch / f"peer-{i}" for i in range(engines)]
    if ranks.rank == 0:
        for seed, folder in enumerate(World.models):
            make_model(folder, "qwen2", tied=False, layers=2, heads=8, vocab=263, seed=seed)
        for announcement in announcements:
            script = Path(__file__).with_name("vllm_peer.py")
            command = [sys.executable, str(script), str(announcement), str(World.models[0]), str(World.tp), World.way]
            subprocess.Popen(command, preexec_fn=die_with_parent)
    wait_until(lambda: all(a.exists() for a in announcements), 280, "the peers' start")
    dist.barrier()
    told = [announcement.read_text().split() for announcement in announcements]
    World.pids, World.urls = [int(pid) for pid, _ in told], [url for _, url in told]
    World.policy = {"precision": "fp32", "pipeline_model_parallel_size": pp}
    World.layout = parallel.initialize(settings(ranks, "tensor").policy, seed=0)
    World.spec = read_family(World.models[0])
    World.chunks = build_chunks(World.spec, settings(ranks, "tensor").policy, World.layout)
    if World.way != "extension":
        pretend_gpus(ranks)


def pretend_gpus(ranks: Ranks) -> None:
    """Files in place of a GPU's memory, gloo in place of NCCL; all else is what happens on a GPU."""

    def on_gpu(bucket) -> dict:
        named = {"uuid": f"GPU-{ranks.rank}", "nbytes": bucket.flat.numel(), "storage_bytes": bucket.flat.numel()}
        numbers = dict.fromkeys(("tensor_offset", "storage_offset", "ref_counter_offset", "event_sync_required"), 0)
        handle = json.dumps(shared_memory(bucket)["file"]).encode()
        handles = {"handle": handle, "ref_counter_handle": b"", "event_handle": b""}
        return {"cuda": named | numbers | {key: base64.b64encode(value).decode() for key, value in handles.items()}}

    def unique_id(rendezvous: Rendezvous) -> bytes:
        return f"{rendezvous.address} {rendezvous.port} {rendezvous.name}".encode().ljust(128, b"\0")

    vllm_weights.shared_memory = on_gpu
    Rendezvous.unique_id = unique_id


def settings(ranks: Ranks, transport: str) -> Config:
    return Config.model_validate(
        {
            "run_dir": ranks.scratch / "run",
            "model": {"path": World.models[0]},
            "data": {"train": ["unused"]},
            "policy": World.policy,
            "rollout": {"engine": "vllm", "server": {"urls": World.urls}},
            "sync": {"transport": transport, "bucket_bytes": 60_000, "timeout_s": 120},
        }
    )


class Session:
    def __init__(self, ranks: Ranks, transport: str | None = None) -> None:
        config = settings(ranks, transport or TRANSPORTS[World.way][0])
        self.engine = VLLMEngine(World.urls, config.rollout.server, weight_version=World.version)
        self.sync = open_weight_sync(config, World.spec, World.layout, self.engine)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.sync.close()
        self.engine.close()

    def push(self, model: int = 0, probe=None):
        load_hf(World.chunks, World.models[model], World.spec, World.layout)
        World.version += 1
        return self.sync.sync(World.chunks, World.version, probe=probe)

    def when_the_victim_passes(self, change) -> None:
        """`change(bucket)` once: what is sent in place of the first bucket that holds the victim; None for nothing."""
        transport, done = self.sync._transport, []
        send = transport.send

        def changed(bucket) -> None:
            if not done and any(meta.name == VICTIM for meta in bucket.metas):
                done.append(True)
                bucket = change(bucket)
            transport.skip() if bucket is None else send(bucket)

        transport.send = changed


def checked(receipt, model: int, lost: str = "") -> None:
    """The receipt is complete, and every rank of every engine has the model's weights and the version."""
    assert receipt.engines == sorted(World.urls) and receipt.version == World.version
    assert list(receipt.behind) == ([lost] if lost else [])
    copies = World.tp if World.way == "extension" else 1  # its checksums are of whole tensors, at every rank
    assert receipt.engine_checked == len(receipt.checksums) * copies * len(World.urls) > 0
    nbytes = 4 * sum(int.__mul__(*shape) if len(shape) > 1 else shape[0] for shape in hf_shapes(World.spec).values())
    assert receipt.nbytes == nbytes
    config = json.loads((World.models[model] / "config.json").read_text())
    wanted = [Shard(config, rank, World.tp) for rank in range(World.tp)]
    for name, tensor in load_file(World.models[model] / "model.safetensors").items():
        for shard in wanted:
            shard.keep(name, tensor)
    for url in World.urls:
        assert httpx.get(f"{url}/seen").json()["tensors"] == [shard.checksums() for shard in wanted]
        assert httpx.get(f"{url}/weight_info").json() == {"weight_version": str(World.version)}
    dist.barrier()


def check_weights_change_places_over_every_transport(ranks: Ranks) -> None:
    for transport in TRANSPORTS[World.way]:
        with Session(ranks, transport) as session:
            for model in (1, 0, 1):
                checked(session.push(model), model)


PROBE = (np.arange(1, 9, dtype=np.int32), np.full(7, -1.0, dtype=np.float32))  # with the peers' own log-probs
OTHER_CALLS = {
    "extension": {"tensor": 8, "distributed": 9, "disk": 9},
    "ipc": {"tensor": 9, "disk": 11},
    "nccl": {"distributed": 9, "disk": 10},
}
"""Calls to a server in one sync with its probe, those for buckets left out: docs/weights.md."""


def check_calls_of_a_sync_as_a_run_makes_it(ranks: Ranks) -> None:
    """Of the second one, which finds the server as the first one left it."""
    for transport, others in OTHER_CALLS[World.way].items():
        with Session(ranks, transport) as session:
            session.push(0, PROBE)
            dist.barrier()
            before = [len(httpx.get(f"{url}/seen").json()["calls"]) for url in World.urls]
            dist.barrier()
            sent, send = [], session.sync._transport.send
            session.sync._transport.send = lambda bucket, sent=sent, send=send: (sent.append(1), send(bucket))
            assert session.push(1, PROBE).probe_difference == 0
            of_ranks = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, len(sent))
            one_sender = transport == "tensor" or World.way == "nccl"  # else each stage's leader has its own buckets
            buckets = 0 if transport == "disk" else max(of_ranks) if one_sender else sum(of_ranks)
            for url, earlier in zip(World.urls, before, strict=True):
                paths = [path for _, path in httpx.get(f"{url}/seen").json()["calls"][earlier:] if path != "/seen"]
                assert len(paths) == buckets + others, (transport, buckets, paths)
            dist.barrier()


def check_another_transport_than_the_servers_backend_is_refused(ranks: Ranks) -> None:
    other = {"ipc": "distributed", "nccl": "tensor"}.get(World.way)
    if other is None:
        return
    refused = pytest.raises(WeightSyncError, match="was started with --weight-transfer-config")
    with Session(ranks, other) as session, refused:
        session.push()


def check_what_was_sent_wrongly_is_named(ranks: Ranks) -> None:
    """A tensor that did not come, one that came twice, one of another shape; then all is right again."""

    def without(bucket):
        return None

    def misshapen(bucket):
        changed = [replace(m, shape=m.shape[::-1]) if m.name == VICTIM else m for m in bucket.metas]
        return replace(bucket, metas=changed)

    def twice(bucket):
        return replace(bucket, metas=[*bucket.metas, next(m for m in bucket.metas if m.name == VICTIM)])

    with Session(ranks) as session:
        faults = (without, "tensors did not come: .*model.layers.1"), (misshapen, f"{VICTIM}: came with shape")
        for change, text in (*faults, (twice, f"{VICTIM}: came twice in one update")):
            session.when_the_victim_passes(change)
            with pytest.raises(WeightSyncError, match=text):
                session.push(1)
        checked(session.push(0), 0)


def check_a_flipped_bit_is_found_and_named(ranks: Ranks) -> None:
    def flip(bucket):
        session.sync._hashing.submit(int).result()  # the trainer's checksums are of what it exported
        bucket.flat[next(meta.start for meta in bucket.metas if meta.name == VICTIM)] ^= 1
        return bucket

    with Session(ranks) as session:
        session.when_the_victim_passes(flip)
        with pytest.raises(WeightSyncError, match=r"differ from the trainer's after the sync: .*k_proj\.weight"):
            session.push(1)
        checked(session.push(0), 0)


def check_an_update_that_failed_half_way_does_not_spoil_the_next(ranks: Ranks) -> None:
    """Also not that of another trainer: a new client knows nothing of it."""
    for same in (True, False):
        with Session(ranks) as session:
            if ranks.rank == 0:
                httpx.post(f"{World.urls[0]}/fail", json={"name": VICTIM}).raise_for_status()
            dist.barrier()
            with pytest.raises(WeightSyncError, match=f"illegal memory access.*{VICTIM}"):
                session.push(1)
            if same:
                checked(session.push(0), 0)
    with Session(ranks) as session:
        checked(session.push(1), 1)


def check_an_update_that_a_killed_trainer_left_open_is_closed(ranks: Ranks) -> None:
    if ranks.rank == 0:
        for url in World.urls:
            if World.way == "extension":
                httpx.post(f"{url}/collective_rpc", json={"method": "nft_begin", "args": [], "kwargs": {}})
            else:
                httpx.post(f"{url}/start_weight_update", json={}).raise_for_status()
    dist.barrier()
    with Session(ranks) as session:
        checked(session.push(0), 0)


def check_an_engine_lost_in_the_middle_is_left_out(ranks: Ranks) -> None:
    lost, left = World.urls[0], World.urls[1:]

    def kill(bucket):
        os.kill(World.pids[0], signal.SIGKILL)
        return bucket

    with Session(ranks) as session:
        session.when_the_victim_passes(kill)
        receipt = session.push(1)
        World.urls, World.pids = left, World.pids[1:]
        checked(receipt, 1, lost)
        checked(session.push(0), 0, lost)


def check_when_none_is_left_the_run_says_so(ranks: Ranks) -> None:
    def kill(bucket):
        for pid in World.pids:
            os.kill(pid, signal.SIGKILL)
        return bucket

    with Session(ranks) as session:
        session.when_the_victim_passes(kill)
        with pytest.raises(WeightSyncError, match=f"no engine is left: {World.urls[0]}"):
            session.push()


if __name__ == "__main__":
    run_checks(globals())
