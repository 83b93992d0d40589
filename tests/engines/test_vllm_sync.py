"""Weights into a running vLLM server, over every transport, and every way in which that can go wrong."""

from __future__ import annotations

import pytest
from sync_checks import names_of, report, run
from tiny import make_model


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
