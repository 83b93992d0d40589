"""One of two real SGLang servers gets the weights alone: in a phase, or after it was started again between syncs."""

from __future__ import annotations

import pytest
from sync_checks import names_of, report, run
from tiny import make_model

from megatron_nft.engines.engine import NO_WEIGHTS
from megatron_nft.engines.sglang.kind import KIND
from megatron_nft.engines.start import start_servers


@pytest.fixture(scope="module")
def two_ranks(sglang_model, sglang_rollout, tmp_path_factory):
    """PP 2: two stage leaders send. The second server is killed, and started again."""
    server = sglang_rollout.server.model_copy(update={"num_servers": 2, "max_restarts": 3})
    group = start_servers(
        KIND,
        sglang_model,
        sglang_rollout.model_copy(update={"server": server}),
        precision="fp32",
        device="cpu",
        log_dir=tmp_path_factory.mktemp("mortal-logs"),
        weight_version=NO_WEIGHTS,
    )
    other = make_model(sglang_model.parent / "another", "qwen2", tied=False, seed=12)
    try:
        yield run("ranks_sync_back.py", 2, "sglang", ",".join(group.urls), sglang_model, other, 1, 2, timeout_s=3400)
    finally:
        group.close()


@pytest.mark.long
@pytest.mark.timeout(3600)  # a server starts anew three times
@pytest.mark.parametrize("check", ["check_start", *names_of("ranks_sync_back.py")])
def test_one_of_two_servers_comes_back(two_ranks, check):
    report(two_ranks, check)
