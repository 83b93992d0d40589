"""Weights into a running vLLM server, over every transport, and every way in which that can go wrong."""

from __future__ import annotations

import pytest
from sync_checks import names_of, report, run
from tiny import make_model

from megatron_nft.config import RolloutConfig
from megatron_nft.engines.engine import NO_WEIGHTS
from megatron_nft.engines.start import start_servers
from megatron_nft.engines.vllm.kind import KIND as VLLM


@pytest.fixture(scope="module")
def models(vllm_model):
    """Two models that differ in every weight; the server has started with the first."""
    return [vllm_model, make_model(vllm_model.parent / "other", "qwen2", tied=False, hidden=128, seed=12)]


@pytest.fixture(scope="module")
def two_ranks(vllm_server, models):
    """PP 2: two stage leaders send."""
    return run("ranks_sync.py", 2, "vllm", vllm_server.urls[0], *models, 1, 2)


@pytest.mark.parametrize("check", names_of("ranks_sync.py"))
def test_two_leaders(two_ranks, check):
    report(two_ranks, check)


@pytest.fixture(scope="module")
def last_lost(two_ranks, vllm_server, models):
    """After `two_ranks`: the server is killed."""
    (server,) = vllm_server.servers
    return run("ranks_sync_last_lost.py", 2, "vllm", server.url, *models, 1, 2, server._supervisor.pid)


@pytest.mark.parametrize("check", ["check_start", *names_of("ranks_sync_last_lost.py")])
def test_the_only_server_dies_in_the_middle(last_lost, check):
    report(last_lost, check)


@pytest.fixture(scope="module")
def first_sync(models, tmp_path_factory):
    """A server of its own, started as those of a run: without weights."""
    group = start_servers(
        VLLM,
        models[0],
        RolloutConfig(engine="vllm", server={"max_restarts": 0}),
        precision="fp32",
        device="cpu",
        log_dir=tmp_path_factory.mktemp("vllm-empty-logs"),
        weight_version=NO_WEIGHTS,
    )
    yield run("ranks_sync_start.py", 2, "vllm", group.urls[0], *models, 1, 2)
    group.close()


@pytest.mark.long
@pytest.mark.parametrize("check", ["check_start", "check_versions_change_places"])
def test_the_first_sync_brings_all_that_a_server_has(first_sync, check):
    report(first_sync, check)
