"""The trainer's side of a live sync: args ENGINE URLS MODEL_A MODEL_B TP PP. Models A and B differ in all weights."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import Ranks, run_checks
from processes import wait_until
from under_way import requests_under_way

from megatron_nft.config import Config
from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.engines.sglang.client import SGLangEngine
from megatron_nft.engines.sync import open_weight_sync
from megatron_nft.engines.vllm.client import VLLMEngine
from megatron_nft.policy import parallel
from megatron_nft.policy.family import read_family
from megatron_nft.policy.model import build_chunks
from megatron_nft.weights.hf_folder import HFFolder
from megatron_nft.weights.import_hf import load_hf
from megatron_nft.weights.transport import WeightSyncError

CLIENTS = {"sglang": SGLangEngine, "vllm": VLLMEngine}
REQUESTS, TOKENS = 16, {"sglang": 600, "vllm": 1900}  # vLLM is the faster one
PROBE_IDS = np.arange(5, 25, dtype=np.int32)


class World:
    layout: parallel.ParallelLayout
    kind: str
    urls: list[str]
    models: list[Path]
    chunks: list
    probes: list
    version = 0


def settings(run_dir: Path, **sync) -> Config:
    return Config.model_validate(
        {
            "run_dir": run_dir,
            "model": {"path": World.models[0]},
            "data": {"train": ["unused"]},
            "policy": World.policy,
            "rollout": {"engine": World.kind, "server": {"urls": World.urls, "max_retries": 8}},
            "sync": {"bucket_bytes": 150_000, "timeout_s": 120, **sync},
        }
    )


def check_start(ranks: Ranks) -> None:
    kind, urls, first, second, tp, pp = ranks.args
    World.kind, World.urls, World.models = kind, urls.split(","), [Path(first), Path(second)]
    World.policy = {
        "precision": "fp32",
        "tensor_model_parallel_size": int(tp),
        "pipeline_model_parallel_size": int(pp),
    }
    World.layout = parallel.initialize(settings(ranks.scratch).policy, seed=0)
    World.spec = read_family(first)
    World.chunks = build_chunks(World.spec, settings(ranks.scratch).policy, World.layout)
    World.probes = [(PROBE_IDS, reference(path, PROBE_IDS)) for path in World.models]


def reference(path: Path, ids: np.ndarray) -> np.ndarray:
    """transformers' log-probs of ids[1:]."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path).eval()(torch.tensor(ids).long()[None]).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None].long())[:, 0].numpy()


class Session:
    """A client and a sync, as one rank of a run has them."""

    def __init__(self, ranks: Ranks, **sync) -> None:
        self.run_dir = ranks.scratch / "run"
        config = settings(self.run_dir, **sync)
        changes = config.sync.in_flight_for(config.rollout.mode) != "finish"
        self.engine = CLIENTS[World.kind](
            World.urls, config.rollout.server, weight_version=World.version, allow_version_change=changes
        )
        self.sync = open_weight_sync(config, World.spec, World.layout, self.engine)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.sync.close()
        self.engine.close()

    def push(self, model: int):
        """Load model 0 or 1 into the policy and sync it under the next version."""
        load_hf(World.chunks, World.models[model], World.spec, World.layout)
        return self.push_loaded(model)

    def push_loaded(self, model: int):
        World.version += 1
        return self.sync.sync(World.chunks, World.version, probe=World.probes[model])


def check_versions_change_places(ranks: Ranks) -> None:
    """B, A, B over every transport: each time the engines' log-probs are the model's, and the receipt says so."""
    source = HFFolder(World.models[0])
    total = sum(source.read(name).nbytes for name in source.shapes)
    for transport in ("tensor", "distributed", "disk"):
        with Session(ranks, transport=transport) as session:
            for model in (1, 0, 1):
                receipt = session.push(model)
                assert receipt.transport == transport and receipt.version == session.engine.weight_version
                assert receipt.engines == sorted(World.urls) and receipt.behind == {}
                assert receipt.nbytes == total
                assert receipt.probe_difference < 1e-4
                assert receipt.engine_checked == len(receipt.checksums) * len(World.urls)
                for url in World.urls:
                    found = session.engine.prompt_logprobs(PROBE_IDS, url=url)
                    assert np.abs(found - World.probes[model][1]).max() < 1e-4
            dist.barrier()
            if ranks.rank == 0:
                path = session.run_dir / "sync" / f"version_{World.version:06d}.json"
                assert json.loads(path.read_text())["checksums"] == receipt.checksums
                assert not (session.run_dir / "sync" / "weights").exists()


def check_auto_is_shared_memory_on_one_machine(ranks: Ranks) -> None:
    with Session(ranks) as session:
        assert session.push(0).transport == "tensor"


def spoil(session: Session, victim: str, change) -> None:
    """From here on `change(metas, flat)` alters buckets on their way from the checked export to the engines."""
    transport = session.sync._transport
    original = transport.send

    def send(bucket) -> None:
        if not any(victim in meta.name for meta in bucket.metas):
            return original(bucket)
        session.sync._hashing.submit(int).result()  # the trainer's checksums are of what it exported
        flat = bucket.flat  # in shared memory: altered in place
        return original(replace(bucket, metas=change(list(bucket.metas), flat)))

    transport.send = send


def check_faults_stop_the_run_with_the_tensors_name(ranks: Ranks) -> None:
    """Dropped, twice, swapped, one bit flipped, held back to the end: over shared memory and over a group."""
    victim, other = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "kv")

    def drop(metas, flat):
        return [m for m in metas if m.name != victim]

    def twice(metas, flat):
        return metas + [m for m in metas if m.name == victim]

    def swap(metas, flat):
        names = {victim: other, other: victim}
        return [replace(m, name=names.get(m.name, m.name)) for m in metas]

    def flip(metas, flat):
        start = next(m.start for m in metas if m.name == victim)
        flat[start] ^= 1
        return metas

    messages = {drop: "did not come: ", twice: "came twice", swap: "differ from the trainer's", flip: "differ from"}
    cases = [(change, "tensor") for change in messages] + [(swap, "distributed"), (flip, "distributed")]
    for change, transport in cases:
        with Session(ranks, transport=transport) as session:
            spoil(session, victim, change)
            with pytest.raises(WeightSyncError, match=messages[change]) as caught:
                session.push(1)
            assert victim in str(caught.value), caught.value
        with Session(ranks) as session:  # an aborted update, still open in the engine, is no obstacle to the next
            assert session.push(0).probe_difference < 1e-4


def check_a_late_tensor_is_refused(ranks: Ranks) -> None:
    with Session(ranks) as session:
        kept = []
        transport = session.sync._transport
        original = transport.send
        transport.send = lambda bucket: (kept.append(replace(bucket, flat=bucket.flat.clone())), original(bucket))[1]
        session.push(1)
        transport.send = original
        if kept:
            with pytest.raises(WeightSyncError, match=rf"tensor {kept[0].metas[0].name}: came after the update"):
                transport.send(kept[0])
        dist.barrier()


def check_the_probe_stops_the_run(ranks: Ranks) -> None:
    """Checksums agree, but the engine's log-probs are not the trainer's."""
    with Session(ranks) as session:
        load_hf(World.chunks, World.models[0], World.spec, World.layout)
        World.version += 1
        with pytest.raises(WeightSyncError, match=r"probe differ from the trainer's by .*probe_tolerance \(0\.001\)"):
            session.sync.sync(World.chunks, World.version, probe=World.probes[1])
    with Session(ranks) as session:
        session.push(0)


def check_requests_in_flight(ranks: Ranks) -> None:
    """finish: all under the old version. abort: what was under way is asked again, under the new. continue: it goes
    on, begun under the old and ended under the new, with the spans kept."""
    sync_under_way(ranks, {"finish": 1, "abort": 0, "continue": 1})


def sync_under_way(ranks: Ranks, models: dict[str, int]) -> None:
    """`models`: sync.in_flight -> the model that is pushed while answers are being made."""
    for in_flight, model in models.items():
        with Session(ranks, in_flight=in_flight) as session, ThreadPoolExecutor(1) as thread:
            before, answers = World.version, []
            load_hf(World.chunks, World.models[model], World.spec, World.layout)
            if ranks.rank == 0:
                asking = thread.submit(ask, session, answers)
                # A request that meets the pause on its way would be a new one, and be made under the new weights.
                wait_until(partial(all_there, answers), 100, "all requests at the servers")
            dist.barrier()
            session.push_loaded(model)
            if ranks.rank:
                continue
            asking.result(200)
            assert len(answers) == REQUESTS
            across = [c for c in answers if c.weight_version == before + 1]
            assert all(
                c.weight_version == before and not c.weight_version_spans
                for c in answers
                if c.weight_version != before + 1
            )
            assert bool(across) == (in_flight != "finish"), f"{in_flight}: {len(across)} answers under the new version"
            for c in across:
                versions = [version for version, *_ in c.weight_version_spans]
                assert versions == ([before, before + 1] if in_flight == "continue" else [])
                if versions:
                    (_, first, end), (_, start, last) = c.weight_version_spans
                    assert first == 0 < end == start < last == len(c.token_ids)


def all_there(answers: list) -> bool:
    return len(answers) + requests_under_way(World.kind, World.urls) >= REQUESTS


def ask(session: Session, answers: list) -> None:
    """REQUESTS greedy answers, which a random model does not end and which take seconds, into `answers`."""
    requests = [Request(np.arange(30, 40 + i, dtype=np.int32), 1, (0, i)) for i in range(REQUESTS)]
    for _, _, completion in session.engine.generate(requests, SamplingParams(TOKENS[World.kind], temperature=0)):
        answers.append(completion)


if __name__ == "__main__":
    run_checks(globals())
