"""Sync into engines with several tensor-parallel ranks each, over a gloo group: args TP PP ENGINES ENGINE_TP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch.distributed as dist
from launch import Ranks, run_checks
from processes import wait_until
from tiny import make_model

from megatron_nft.config import Config
from megatron_nft.engines.sglang.client import SGLangEngine
from megatron_nft.engines.sync import open_weight_sync
from megatron_nft.plan.sync_time import OTHER_CALLS
from megatron_nft.policy import parallel
from megatron_nft.policy.family import read_family
from megatron_nft.policy.model import build_chunks
from megatron_nft.processes import die_with_parent
from megatron_nft.weights.import_hf import load_hf
from megatron_nft.weights.names import hf_shapes
from megatron_nft.weights.transport import WeightSyncError

VICTIM = "model.layers.3.mlp.gate_proj.weight"  # of the last stage


class World:
    version = 0


def check_start(ranks: Ranks) -> None:
    tp, pp, engines, World.engine_tp = map(int, ranks.args)
    World.model = ranks.scratch / "model"
    announcements = [ranks.scratch / f"peer-{i}" for i in range(engines)]
    if ranks.rank == 0:
        make_model(World.model, "qwen2", tied=False, layers=4, heads=8, vocab=263)
        for announcement in announcements:
            start_peer(announcement)
    wait_until(lambda: all(a.exists() for a in announcements), 280, "the peers' start")
    dist.barrier()
    told = [announcement.read_text().split() for announcement in announcements]
    World.pids, World.urls = [int(pid) for pid, _ in told], [url for _, url in told]
    World.policy = {"precision": "fp32", "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    World.layout = parallel.initialize(settings(ranks).policy, seed=0)
    World.spec = read_family(World.model)
    World.chunks = build_chunks(World.spec, settings(ranks).policy, World.layout)
    load_hf(World.chunks, World.model, World.spec, World.layout)


def start_peer(announcement: Path, port: int = 0) -> None:
    script = Path(__file__).with_name("engine_peer.py")
    command = [script, announcement, World.model, World.engine_tp, "127.0.0.1", port]
    subprocess.Popen([sys.executable, *map(str, command)], preexec_fn=die_with_parent)


def settings(ranks: Ranks, transport: str = "distributed") -> Config:
    return Config.model_validate(
        {
            "run_dir": ranks.scratch / "run",
            "model": {"path": World.model},
            "data": {"train": ["unused"]},
            "policy": World.policy,
            "rollout": {"engine": "sglang", "server": {"urls": World.urls}},
            "sync": {"transport": transport, "bucket_bytes": 60_000, "timeout_s": 300},
        }
    )


class Session:
    def __init__(self, ranks: Ranks, transport: str = "distributed") -> None:
        config = settings(ranks, transport)
        self.engine = SGLangEngine(World.urls, config.rollout.server, weight_version=World.version)
        self.sync = open_weight_sync(config, World.spec, World.layout, self.engine)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.sync.close()
        self.engine.close()

    def push(self, probe=None):
        World.version += 1
        return self.sync.sync(World.chunks, World.version, probe=probe)

    def count_buckets(self) -> list[int]:
        """Bytes of the buckets that this rank's transport gets from now on."""
        sent, send = [], self.sync._transport.send

        def noted(bucket) -> None:
            sent.append(bucket.nbytes)
            send(bucket)

        self.sync._transport.send = noted
        return sent

    def when_the_victim_passes(self, change) -> None:
        """`change(bucket)` once: what is sent in place of the first bucket that holds the victim."""
        send, done = self.sync._transport.send, []

        def changed(bucket) -> None:
            if not done and any(meta.name == VICTIM for meta in bucket.metas):
                done.append(True)
                bucket = change(bucket)
            send(bucket)

        self.sync._transport.send = changed


def check_every_rank_of_every_engine_has_its_slices(ranks: Ranks) -> None:
    """The peers sliced what they received; the trainer hashed what they should have. Twice: the group is kept."""
    with Session(ranks) as session:
        for _ in range(2):
            receipt = session.push()
            assert receipt.engines == sorted(World.urls) and receipt.behind == {}
            tensors = 4 * 7 + 3  # per layer: qkv weight and bias, o, gate_up, down, two norms
            assert len(receipt.checksums) == World.engine_tp * tensors
            assert receipt.engine_checked == len(receipt.checksums) * len(World.urls)
            assert receipt.nbytes == sum(4 * size(shape) for shape in hf_shapes(World.spec).values())


def size(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


PROBE = (np.arange(1, 9, dtype=np.int32), np.full(7, -1.0, dtype=np.float32))  # with the peers' own log-probs
EVERY_SYNC = ("begin_weight_update", "pause_generation", "end_weight_update", "update_weight_version")
EVERY_SYNC += ("weights_checker", "continue_generation", "generate")  # the last one is the probe
BEYOND = {"tensor": {}, "distributed": {"model_info": 1}}
BEYOND["disk"] = {"end_weight_update": 1, "update_weights_from_disk": 1}


def check_calls_of_a_sync_as_a_run_makes_it(ranks: Ranks) -> None:
    """With the probe. Beside one per bucket, each server gets 7 calls by `tensor`, 8 by `distributed` and 9 by `disk`,
    the first sync's introductions left out: docs/weights.md and `plan` count so."""
    for transport, beyond in BEYOND.items():
        with Session(ranks, transport) as session:
            session.push(PROBE)
            dist.barrier()
            before = [calls(url) for url in World.urls]
            dist.barrier()
            sent = session.count_buckets()
            receipt, gathers = gathers_of(lambda: session.push(PROBE))
            # by `tensor` one of them is of the pipeline's stages, who tell each other what is in their buckets
            assert gathers == {"tensor": 2 + 1, "distributed": 4, "disk": 3}[transport]
            assert receipt.probe_difference == 0
            assert receipt.engine_checked == len(receipt.checksums) * len(World.urls)
            of_ranks = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, len(sent))  # by `tensor` a caller gets the buckets of all stages
            buckets = {"tensor": max(of_ranks), "distributed": sum(of_ranks), "disk": 0}[transport]
            assert transport == "disk" or buckets > 4
            per_bucket = {} if transport == "disk" else {f"update_weights_from_{transport}": buckets}
            wanted = Counter(EVERY_SYNC) + Counter(beyond) + Counter(per_bucket)
            for url, earlier in zip(World.urls, before, strict=True):
                assert calls(url) - earlier == wanted, (transport, url)
            assert wanted.total() - buckets == OTHER_CALLS[transport]
            dist.barrier()


def check_a_flipped_bit_is_found_in_the_slice_that_has_it(ranks: Ranks) -> None:
    def flip(bucket):
        flat = bucket.flat.clone()
        flat[next(meta.start for meta in bucket.metas if meta.name == VICTIM)] ^= 1
        return replace(bucket, flat=flat)

    with Session(ranks) as session:
        session.when_the_victim_passes(flip)
        first = "" if World.engine_tp == 1 else "@0"
        with pytest.raises(WeightSyncError, match=rf"layers\.3\.mlp\.gate_up_proj\.weight{first} \({VICTIM}, "):
            session.push()


def tell(ranks: Ranks, url: str, **from_now_on: object) -> None:
    dist.barrier()
    if ranks.rank == 0:
        httpx.post(f"{url}/from_now_on", json=from_now_on, trust_env=False).raise_for_status()
    dist.barrier()


def check_an_engine_that_cannot_tell_its_checksums_does_not_count_as_checked(ranks: Ranks) -> None:
    """Though the others can: the probe would not see a bit that is wrong."""
    url = World.urls[-1]
    with Session(ranks) as session:
        tell(ranks, url, refused=["/weights_checker"])
        with pytest.raises(WeightSyncError, match=rf"{url}/weights_checker: HTTP 400: refused by the test"):
            session.push()
        tell(ranks, url)
        assert session.push().engine_checked > 0


def check_engines_across_hosts_share_no_memory(ranks: Ranks) -> None:
    """Their heads are on a trainer's host, as far as their addresses say."""
    config = settings(ranks, "auto")
    for url in World.urls:
        tell(ranks, url, num_nodes=2)
    engine = SGLangEngine(World.urls, config.rollout.server, weight_version=World.version)
    with pytest.raises(WeightSyncError, match=r"are on 2 hosts, .*Allowed here: distributed, disk"):
        open_weight_sync(config, World.spec, World.layout, engine)
    engine.close()
    for url in World.urls:
        tell(ranks, url)


def check_an_engine_that_came_back_since_the_last_sync_is_in_a_new_group(ranks: Ranks) -> None:
    """It died and was started again on its port while the trainer trained: it answers, but its groups are gone."""
    with Session(ranks) as session:
        before = session.push()
        restart_first_peer(ranks)
        receipt = session.push()
        assert receipt.engines == sorted(World.urls) and receipt.behind == {}
        assert receipt.engine_checked == len(receipt.checksums) * len(World.urls)
        assert receipt.checksums == before.checksums
        one_of_each_leader = [World.layout.pp.size] * World.engine_tp
        wait_until(lambda: seen(World.urls[1])["groups"] == one_of_each_leader, 60, "the end of the old groups")


def check_one_engine_gets_the_weights_while_the_others_are_spared(ranks: Ranks) -> None:
    """Into one that came back in the middle of a phase; the others get no call but that they leave the old groups."""
    with Session(ranks) as session:
        session.push()
        restart_first_peer(ranks)
        before = [len(seen(url)["calls"]) for url in World.urls]
        dist.barrier()
        receipt = session.sync.sync(World.chunks, World.version, only=World.urls[:1])
        assert receipt.engines == World.urls[:1] and receipt.behind == {}
        assert receipt.engine_checked == len(receipt.checksums)
        for url, count in zip(World.urls[1:], before[1:], strict=True):
            paths = [path for _, path in seen(url)["calls"][count:] if path != "/seen"]
            assert set(paths) <= {"/destroy_weights_update_group"}
        dist.barrier()
        again = session.push()
        assert again.engines == sorted(World.urls) and again.behind == {}
        assert again.engine_checked == len(again.checksums) * len(World.urls)
    if ranks.rank == 0:
        names = sorted(path.name for path in (ranks.scratch / "run" / "sync").glob("*_again_*.json"))
        assert names == [f"version_{World.version - 1:06d}_again_1.json"]


def restart_first_peer(ranks: Ranks) -> None:
    """On the same port, without weights. Collective."""
    announcement = ranks.scratch / "peer-0"
    dist.barrier()
    if ranks.rank == 0:
        announcement.unlink()
        os.kill(World.pids[0], signal.SIGKILL)
        start_peer(announcement, int(World.urls[0].rpartition(":")[2]))
        wait_until(announcement.exists, 280, "the new start")
    dist.barrier()
    pid, url = announcement.read_text().split()
    assert url == World.urls[0]
    World.pids[0] = int(pid)


def gathers_of(work) -> tuple:
    """(What `work` returns, how often it gathered objects of all ranks)."""
    gather, counted = dist.all_gather_object, Counter()

    def noted(*args, **kwargs):
        counted["gathers"] += 1
        return gather(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_object", noted)
        return work(), counted["gathers"]


def calls(url: str) -> Counter:
    """Path, without its slash -> how often; without our own looking."""
    return Counter(path.removeprefix("/") for _, path in seen(url)["calls"] if path != "/seen")


def seen(url: str) -> dict:
    """What a peer says of itself."""
    return httpx.get(f"{url}/seen", timeout=60, trust_env=False).json()


def check_an_engine_lost_in_the_middle_is_left_out(ranks: Ranks) -> None:
    """Rank by rank the broadcast is torn; the stream is sent again to those that are left, which are all checked."""
    lost, left = World.urls[0], World.urls[1:]

    def kill(bucket):
        os.kill(World.pids[0], signal.SIGKILL)
        return bucket

    with Session(ranks) as session:
        session.when_the_victim_passes(kill)
        receipt = session.push()
        assert receipt.engines == sorted(left) and list(receipt.behind) == [lost]
        assert receipt.engine_checked == len(receipt.checksums) * len(left)
        again = session.push()
        assert again.engines == sorted(left) and again.checksums == receipt.checksums
    World.urls, World.pids = left, World.pids[1:]


def check_when_none_is_left_the_run_says_which_are_behind(ranks: Ranks) -> None:
    def kill(bucket):
        for pid in World.pids:
            os.kill(pid, signal.SIGKILL)
        return bucket

    with Session(ranks) as session:
        session.when_the_victim_passes(kill)
        with pytest.raises(WeightSyncError, match="no engine is left") as caught:
            session.push()
        assert all(url in str(caught.value) for url in World.urls)


if __name__ == "__main__":
    run_checks(globals())
