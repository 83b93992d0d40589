"""What a rank starts under real torchrun does not take itself for a rank."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from torchruns import environment, torchrun

SITE = {
    "NCCL_IB_HCA": "mlx5",
    "NCCL_SOCKET_IFNAME": "ib0",
    "CUDA_VISIBLE_DEVICES": "0",
    "https_proxy": "http://127.0.0.1:1",
    "HF_HOME": "/a/home",
    "HF_HUB_OFFLINE": "1",
}
"""Set by a site or a user; everything that is started needs it as it is."""
HARMLESS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCHINDUCTOR_CACHE_DIR"}
"""Set by torchrun or torch, but they say nothing of a job."""


@pytest.fixture(scope="module")
def environments(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Of torchrun itself, of a rank, and of the server, the router and the grader that it started."""
    folder = tmp_path_factory.mktemp("children")
    given = environment(**SITE)
    del given["OMP_NUM_THREADS"]  # torchrun sets it to 1 then
    script = Path(__file__).with_name("start_children.py")
    command = torchrun("--standalone", "--nproc-per-node=2", script, folder)
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ("rank", "server", "router", "grader")
    return {"torchrun": given} | {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


@pytest.mark.parametrize("child", ["server", "router", "grader"])
def test_nothing_of_torchruns_reaches_what_a_rank_starts(environments, child):
    added = environments["rank"].keys() - environments["torchrun"].keys()
    assert {"RANK", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"} <= added  # they break a server's own process group
    assert "OMP_NUM_THREADS" in added  # torchrun's choice for its ranks
    # On a CPU servers and graders get one thread each by our own choice.
    own = {"OMP_NUM_THREADS"} if child != "router" else set()
    assert environments[child].keys() & added <= HARMLESS | own


@pytest.mark.parametrize("child", ["server", "router", "grader"])
def test_what_a_site_has_set_does(environments, child):
    assert {name: environments[child].get(name) for name in SITE} == SITE
