"""sglang-router in front of real SGLang servers: requests go through it, to those servers that have the weights."""

import os
import signal

import httpx
import numpy as np
from processes import below, server_of, wait_until

from megatron_nft.engines.engine import NO_WEIGHTS, Request, SamplingParams
from megatron_nft.engines.open import open_engine
from megatron_nft.engines.sglang.kind import KIND
from megatron_nft.engines.start import start_servers


def requests(count):
    return [Request(np.arange(40, 46, dtype=np.int32), 2, (0, i)) for i in range(count)]


def answers(engine, count, max_tokens=8):
    """(request, sample) of all answers; every one is checked for its weight version by the engine."""
    return sorted((i, k) for i, k, _ in engine.generate(requests(count), SamplingParams(max_tokens)))


def workers(engine):
    found = httpx.get(f"{engine._router.url}/workers", timeout=30, trust_env=False).json()["workers"]
    return sorted(worker["url"] for worker in found)


def test_requests_go_through_the_router_to_servers_that_have_the_weights(
    sglang_engine, sglang_model, sglang_rollout, tmp_path
):
    """One of two servers is killed in the middle, comes back without weights, and works again once it has them: in the
    same phase, where the caller brings them, else in the next one."""
    second = start_servers(
        KIND, sglang_model, sglang_rollout, precision="fp32", device="cpu", log_dir=tmp_path, weight_version=NO_WEIGHTS
    )
    (first_url,), (second_url,) = sglang_engine.urls, second.urls

    def set_second(version):
        body = {"new_version": str(version), "abort_all_requests": False}
        httpx.post(f"{second_url}/update_weight_version", json=body, timeout=60, trust_env=False).raise_for_status()

    server = sglang_rollout.server.model_copy(update={"router": True, "urls": [first_url, second_url]})
    set_second(0)
    before = below(os.getpid())
    engine = open_engine(
        sglang_model, sglang_rollout.model_copy(update={"server": server}), precision="fp32", log_dir=tmp_path
    )
    everything = [(i, k) for i in range(32) for k in range(2)]
    try:
        assert answers(engine, 32) == everything
        assert workers(engine) == sorted([first_url, second_url])

        stream = engine.generate(requests(32), SamplingParams(100))
        seen = [next(stream)]
        os.kill(server_of(second.servers[0]._supervisor.pid), signal.SIGKILL)
        seen += list(stream)
        assert sorted((i, k) for i, k, _ in seen) == everything

        wait_until(lambda: second.servers[0].starts == 2 and second.servers[0].is_healthy(), 500, "a new start")
        assert answers(engine, 32) == everything
        assert workers(engine) == [first_url]

        set_second(0)
        assert answers(engine, 32) == everything
        assert workers(engine) == sorted([first_url, second_url])

        brought = []

        def bring_weights(moved):
            if engine.left_behind():
                brought.append(engine.left_behind())
                set_second(0)
                engine.weight_version = 0

        os.kill(server_of(second.servers[0]._supervisor.pid), signal.SIGKILL)
        for _ in engine.generate(requests(1_000_000), SamplingParams(8), bring_weights):
            bring_weights(True)
            if brought and workers(engine) == sorted([first_url, second_url]):
                break
        assert brought == [[second_url]]
    finally:
        engine.close()
        second.close()
    assert not below(os.getpid()) - before
