"""One of two engines dies and comes back: args ENGINE URLS MODEL_A MODEL_B TP PP. It is started again by the tests."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import numpy as np
import torch.distributed as dist
from processes import wait_until
from ranks_sync import (
    PROBE_IDS,
    REQUESTS,
    Ranks,
    Session,
    World,
    ask,
    check_start,  # noqa: F401  it is run too
    run_checks,
)
from under_way import requests_under_way

from megatron_nft.config import ServerConfig
from megatron_nft.console import Console
from megatron_nft.engines.engine import Request, SamplingParams
from megatron_nft.engines.sglang.client import SGLangEngine
from megatron_nft.train.lifecycle import Lifecycle, Phases, StopSignals
from megatron_nft.train.rounds import Rounds
from megatron_nft.weights.import_hf import load_hf

BACK_S = 1500


def kill(url: str) -> None:
    """End the server's first process; its supervisor ends the others."""
    port = f"--port={urlsplit(url).port}"
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if port in arguments and not any(a.endswith("supervisor.py") for a in arguments):
            found.append(int(entry.parent.name))
    assert len(found) == 1, found
    os.kill(found[0], signal.SIGKILL)


def is_back(url: str) -> bool:
    """Whether it answers without weights."""
    try:
        answer = httpx.get(f"{url}/model_info", timeout=30, trust_env=False)
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and answer.json()["weight_version"] == "-1"


def assert_all_have(session: Session, receipt, model: int) -> None:
    assert receipt.engines == sorted(World.urls) and receipt.behind == {}
    assert receipt.engine_checked == len(receipt.checksums) * len(World.urls)
    for url in World.urls:
        found = session.engine.prompt_logprobs(PROBE_IDS, url=url)
        assert np.abs(found - World.probes[model][1]).max() < 1e-4


def check_one_gets_the_weights_and_the_other_is_spared(ranks: Ranks) -> None:
    """Over shared memory, files and a group, with answers under way on the other one, which keeps its weights."""
    for transport in ("tensor", "disk", "distributed"):
        with Session(ranks, transport=transport) as session, ThreadPoolExecutor(1) as thread:
            assert_all_have(session, session.push(0), 0)
            answers, other = [], SGLangEngine(World.urls[:1], ServerConfig(), weight_version=World.version)
            if ranks.rank == 0:
                asking = thread.submit(ask, SimpleNamespace(engine=other), answers)
                wait_until(lambda: requests_under_way("sglang", World.urls[:1]) > 0, 100, "requests at the server")
            dist.barrier()
            load_hf(World.chunks, World.models[1], World.spec, World.layout)
            receipt = session.sync.sync(World.chunks, World.version, World.probes[1], only=World.urls[1:])
            assert_one_has(session, receipt, transport, 1)
            if ranks.rank == 0:
                assert len(answers) < REQUESTS, "the sync did not wait for them"
                asking.result(600)
                assert len(answers) == REQUESTS and all(not c.weight_version_spans for c in answers)
                found = session.engine.prompt_logprobs(PROBE_IDS, url=World.urls[0])
                assert np.abs(found - World.probes[0][1]).max() < 1e-4
            other.close()
            assert_all_have(session, session.push(1), 1)


def check_one_that_came_back_between_two_syncs_over_a_group(ranks: Ranks) -> None:
    """While the trainer trains: at the next sync it answers every call, but its group is gone."""
    with Session(ranks, transport="distributed") as session:
        assert_all_have(session, session.push(0), 0)
        dist.barrier()
        if ranks.rank == 0:
            kill(World.urls[1])
            wait_until(lambda: is_back(World.urls[1]), BACK_S, "the new start")
        dist.barrier()
        assert_all_have(session, session.push(1), 1)


def check_one_that_came_back_in_a_phase_over_a_group(ranks: Ranks) -> None:
    come_back_in_a_phase(ranks, "distributed", 0)


def check_one_that_came_back_in_a_phase_over_shared_memory(ranks: Ranks) -> None:
    come_back_in_a_phase(ranks, "tensor", 1)


def assert_one_has(session: Session, receipt, transport: str, model: int) -> None:
    """The second server alone, by a receipt that stands beside that of the whole sync."""
    assert receipt.version == World.version and receipt.transport == transport
    assert receipt.engines == World.urls[1:] and receipt.behind == {}
    assert receipt.engine_checked == len(receipt.checksums) and receipt.probe_difference < 1e-4
    found = session.engine.prompt_logprobs(PROBE_IDS, url=World.urls[1])
    assert np.abs(found - World.probes[model][1]).max() < 1e-4
    dist.barrier()
    name = f"version_{World.version:06d}_again_1.json"
    assert [path.name for path in (session.run_dir / "sync").glob("*_again_*")].count(name) == 1


def come_back_in_a_phase(ranks: Ranks, transport: str, model: int) -> None:
    """Rank 0 has answers under way on both servers; one is killed, gets the weights and answers again."""
    receipts, spared = [], []
    with Session(ranks, transport=transport) as session:
        assert_all_have(session, session.push(model), model)
        first, second = session.engine._targets

        def readmit(urls: list[str]) -> None:
            before = first.answered
            receipts.append(session.sync.sync(World.chunks, World.version, World.probes[model], only=urls))
            spared.append(first.answered - before)

        life = Lifecycle(Phases(ranks.rank, ranks.scratch / transport, 1500.0), StopSignals(), Console(ranks.rank))
        try:
            rounds = Rounds(life, dist.group.WORLD, session.engine.left_behind, readmit)
            if ranks.rank == 0:
                generate_until_back(session, rounds, second)
            assert rounds.wait_for_all() == 0
        finally:
            life.close()
        (receipt,) = receipts
        assert_one_has(session, receipt, transport, model)
        if ranks.rank == 0:
            assert spared[0] > 0, "the other server went on answering"
        assert_all_have(session, session.push(1 - model), 1 - model)


def generate_until_back(session: Session, rounds: Rounds, second) -> None:
    """Answers of the wanted version, until the server that is killed in the middle has given one again."""
    requests = [Request(np.arange(30, 40 + i % 16, dtype=np.int32), 1, (0, i)) for i in range(1_000_000)]
    answered = -1  # by the second server, when it was killed
    for number, (_, _, completion) in enumerate(session.engine.generate(requests, SamplingParams(16), rounds.on_wait)):
        rounds.on_wait(True)
        assert completion.weight_version == World.version
        if answered < 0 and number > 20 and second.answered:
            kill(second.url)
            wait_until(lambda: second.down, 60, "word of its end")
            answered = second.answered
        if answered >= 0 and not second.down and second.answered > answered:
            return


if __name__ == "__main__":
    run_checks(globals())
