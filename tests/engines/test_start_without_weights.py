"""Servers that start as those of a run, without weights: the first syncs bring all that they ever have."""

from __future__ import annotations

import pytest
from environments import install
from sync_checks import report, run
from tiny import make_model

from megatron_nft.config import RolloutConfig
from megatron_nft.engines.engine import NO_WEIGHTS
from megatron_nft.engines.http import HttpEngineKind
from megatron_nft.engines.open import engine_kind
from megatron_nft.engines.start import start_servers

pytestmark = pytest.mark.long  # test_sync_sglang.py has one SGLang server that starts so


@pytest.fixture(scope="module", params=["sglang", "vllm"])
def first_syncs(request, tmp_path_factory):
    """B, A, B over every transport. The model has what no tensor of a sync names: a tied head, and rotary tables."""
    install(request.param)
    folder, kind = tmp_path_factory.mktemp(request.param), engine_kind(request.param)
    assert isinstance(kind, HttpEngineKind)
    models = [make_model(folder / str(seed), "qwen3", tied=True, hidden=128, seed=seed) for seed in (11, 12)]
    group = start_servers(
        kind,
        models[0],
        RolloutConfig(engine=request.param, server={"max_restarts": 0, "start_timeout_s": 900}),
        precision="fp32",
        device="cpu",
        log_dir=folder / "logs",
        weight_version=NO_WEIGHTS,
    )
    yield run("ranks_sync_start.py", 2, request.param, group.urls[0], *models, 1, 2)
    group.close()


@pytest.mark.parametrize("check", ["check_start", "check_versions_change_places"])
def test_the_first_sync_brings_all_that_a_server_has(first_syncs, check):
    report(first_syncs, check)
