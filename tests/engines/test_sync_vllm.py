"""Weights into a running vLLM server, over every transport, and every way in which that can go wrong."""

from __future__ import annotations

import pytest
from environments import install
from sync_checks import names_of, report, run
from tiny import make_model

from megatron_nft.config import RolloutConfig
from megatron_nft.engines.open import start_servers


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models that differ in every weight. Heads of 32: vLLM's CPU attention has no kernel for smaller ones."""
    folder = tmp_path_factory.mktemp("vllm-sync")
    return [make_model(folder / str(seed), "qwen2", tied=False, hidden=128, seed=seed) for seed in (11, 12)]


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    install("vllm")
    config = {"start_timeout_s": 500, "max_restarts": 0}
    group = start_servers(
        models[0],
        RolloutConfig(engine="vllm", server=config),
        precision="fp32",
        device="cpu",
        log_dir=tmp_path_factory.mktemp("vllm-logs"),
        weight_version=0,
    )
    yield group.servers[0]
    group.close()


@pytest.fixture(scope="module")
def two_ranks(server, models):
    """PP 2: two stage leaders send."""
    return run("ranks_sync.py", 2, "vllm", server.url, *models, 1, 2)


@pytest.mark.parametrize("check", names_of("ranks_sync.py"))
def test_two_leaders(two_ranks, check):
    report(two_ranks, check)


@pytest.fixture(scope="module")
def last_lost(two_ranks, server, models):
    """After `two_ranks`: the server is killed."""
    return run("ranks_sync_last_lost.py", 2, "vllm", server.url, *models, 1, 2, server._supervisor.pid)


@pytest.mark.parametrize("check", ["check_start", *names_of("ranks_sync_last_lost.py")])
def test_the_only_server_dies_in_the_middle(last_lost, check):
    report(last_lost, check)
