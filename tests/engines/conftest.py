"""Real engine servers for the tests of this folder.

`sglang_server` is one server for all tests of this folder. Tests may update its weights; `sglang_engine` puts those of
`sglang_model` back first, as version 0. `vllm_server` is one for test_vllm_engine.py, which leaves it as it was, and
test_vllm_sync.py, which comes after it and ends it.
"""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
from environments import install
from launch import kept_running
from processes import below, wait_until
from tiny import make_model

from megatron_nft.config import RolloutConfig
from megatron_nft.engines.sglang.client import SGLangEngine
from megatron_nft.engines.sglang.kind import KIND
from megatron_nft.engines.start import start_servers
from megatron_nft.engines.vllm.kind import KIND as VLLM


@pytest.fixture(scope="package")
def sglang_model(tmp_path_factory) -> Path:
    """The model folder that `sglang_server` starts with."""
    return make_model(tmp_path_factory.mktemp("sglang") / "model", "qwen2", tied=False, seed=11)


@pytest.fixture(scope="package")
def sglang_rollout() -> RolloutConfig:
    """Settings of a server small enough for the tests."""
    install("sglang")
    server = {"start_timeout_s": 500, "max_total_tokens": 8192, "max_retries": 2}
    return RolloutConfig(engine="sglang", server=server)


@pytest.fixture(scope="package")
def sglang_server(sglang_model, sglang_rollout, tmp_path_factory):
    """One running SGLang server (fp32, CPU): `.urls`, `.servers`, `.failures()`."""
    group = start_servers(
        KIND,
        sglang_model,
        sglang_rollout,
        precision="fp32",
        device="cpu",
        log_dir=tmp_path_factory.mktemp("sglang-logs"),
        weight_version=0,
    )
    yield group
    group.close()


@pytest.fixture
def sglang_engine(sglang_server, sglang_model, sglang_rollout):
    """A client of the session's server, which has the weights of `sglang_model` as version 0."""
    body = {"model_path": str(sglang_model), "weight_version": "0", "flush_cache": True}
    url = f"{sglang_server.urls[0]}/update_weights_from_disk"
    # It refuses as long as requests run that the test before has left to their fate.
    wait_until(lambda: httpx.post(url, json=body, timeout=60, trust_env=False).status_code == 200, what="the weights")
    engine = SGLangEngine(sglang_server.urls, sglang_rollout.server, weight_version=0)
    yield engine
    engine.close()


@pytest.fixture(scope="package")
def vllm_model(tmp_path_factory) -> Path:
    """The model folder of `vllm_server`. Heads of 32: vLLM's CPU attention has no kernel for smaller ones."""
    return make_model(tmp_path_factory.mktemp("vllm") / "model", "qwen2", tied=False, hidden=128, seed=11)


@pytest.fixture(scope="package")
def vllm_server(vllm_model, tmp_path_factory):
    """One running vLLM server (fp32, CPU), which is not started again when it ends."""
    install("vllm")
    group = start_servers(
        VLLM,
        vllm_model,
        RolloutConfig(engine="vllm", server={"start_timeout_s": 500, "max_restarts": 0}),
        precision="fp32",
        device="cpu",
        log_dir=tmp_path_factory.mktemp("vllm-logs"),
        weight_version=0,
    )
    yield group
    group.close()


@pytest.fixture(scope="package", autouse=True)
def nothing_left_running():
    """No process that the tests of this folder started is left at the end."""
    before = below(os.getpid())
    yield
    assert not below(os.getpid()) - before - kept_running()
