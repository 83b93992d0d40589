"""Weights into running SGLang servers, over every transport, and every way in which that can go wrong."""

from __future__ import annotations

import pytest
from sync_checks import names_of, report, run
from tiny import make_model

from megatron_nft.engines.engine import NO_WEIGHTS
from megatron_nft.engines.sglang.kind import KIND
from megatron_nft.engines.start import start_servers


@pytest.fixture(scope="module")
def other_model(sglang_model):
    return make_model(sglang_model.parent / "other", "qwen2", tied=False, seed=12)


@pytest.fixture(scope="module")
def mortal_servers(request, sglang_model, sglang_rollout, tmp_path_factory):
    """Beside the session's server, which outlives this module, some that the tests may kill; `param` is how many.

    They start as those of a run, without weights: what the syncs bring is all that they ever get.
    """
    server = sglang_rollout.server.model_copy(update={"num_servers": request.param, "max_restarts": 0})
    group = start_servers(
        KIND,
        sglang_model,
        sglang_rollout.model_copy(update={"server": server}),
        precision="fp32",
        device="cpu",
        log_dir=tmp_path_factory.mktemp("mortal-logs"),
        weight_version=NO_WEIGHTS,
    )
    yield group
    group.close()


@pytest.fixture(scope="module")
def servers(sglang_server, mortal_servers):
    return [*sglang_server.servers, *mortal_servers.servers]


@pytest.fixture(scope="module")
def two_ranks(servers, sglang_model, other_model):
    """PP 2: two stage leaders send to all servers."""
    urls = ",".join(server.url for server in servers)
    return run("ranks_sync.py", 2, "sglang", urls, sglang_model, other_model, 1, 2)


FOUR_SERVERS = pytest.param(3, id="four-servers", marks=pytest.mark.long)


@pytest.mark.parametrize("check", names_of("ranks_sync.py"))
@pytest.mark.parametrize("mortal_servers", [pytest.param(1, id="two-servers"), FOUR_SERVERS], indirect=True)
def test_two_leaders(two_ranks, check):
    report(two_ranks, check)


@pytest.fixture(scope="module")
def lost(two_ranks, servers, sglang_model, other_model):
    """After `two_ranks`: servers are killed, the last one first."""
    script = "ranks_sync_one_lost.py" if len(servers) == 2 else "ranks_sync_lost.py"
    urls = ",".join(server.url for server in servers)
    supervisors = ",".join(str(server._supervisor.pid) for server in servers)
    return run(script, 2, "sglang", urls, sglang_model, other_model, 1, 2, supervisors)


@pytest.mark.parametrize("check", ["check_start", "check_one_of_two_lost_over_a_group"])
@pytest.mark.parametrize("mortal_servers", [pytest.param(1, id="two-servers")], indirect=True)
def test_one_of_two_servers_dies_in_the_middle(lost, check):
    report(lost, check)


@pytest.mark.parametrize("check", names_of("ranks_sync_lost.py"))
@pytest.mark.parametrize("mortal_servers", [FOUR_SERVERS], indirect=True)
def test_servers_that_die_in_the_middle(lost, check):
    report(lost, check)
