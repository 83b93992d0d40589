"""One of two real SGLang servers dies, is started again, and gets the weights: at the next sync, or in a phase."""

from __future__ import annotations

import pytest
from sync_checks import names_of, report, run
from tiny import make_model

from megatron_nft.engines.engine import NO_WEIGHTS
from megatron_nft.engines.sglang.kind import KIND
from megatron_nft.engines.start import start_servers


@pytest.fixture(scope="module")
def two_ranks(sglang_server, sglang_model, sglang_rollout, tmp_path_factory):
    """PP 2: two stage leaders send. The second server may be killed, and is started again."""
    server = sglang_rollout.server.model_copy(update={"max_restarts": 4})
    mortal = start_servers(
        KIND,
        sglang_model,
        sglang_rollout.model_copy(update={"server": server}),
        precision="fp32",
        device="cpu",
        log_dir=tmp_path_factory.mktemp("mortal-logs"),
        weight_version=NO_WEIGHTS,
    )
    other = make_model(sglang_model.parent / "another", "qwen2", tied=False, seed=12)
    urls = ",".join([*sglang_server.urls, *mortal.urls])
    try:
        yield run("ranks_sync_back.py", 2, "sglang", urls, sglang_model, other, 1, 2, timeout_s=3000)
    finally:
        mortal.close()


@pytest.mark.long
@pytest.mark.parametrize("check", ["check_start", *names_of("ranks_sync_back.py")])
def test_one_of_two_servers_comes_back(two_ranks, check):
    report(two_ranks, check)
