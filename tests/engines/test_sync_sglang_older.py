"""Weights into a running SGLang of before the update sessions (0.5.21): the package alone is another, with pip."""

from __future__ import annotations

import subprocess

import pytest
from environments import install
from sync_checks import report, run
from tiny import make_model

from megatron_nft.config import RolloutConfig
from megatron_nft.engines.host import find_python
from megatron_nft.engines.sglang.kind import KIND
from megatron_nft.engines.start import start_servers

OLDER = "sglang==0.5.20"
CHECKS = [
    "check_start",
    "check_the_probe_proves_each_version",
    "check_the_probe_finds_swapped_tensors",
    "check_requests_in_flight",
]


pytestmark = pytest.mark.long  # tests/distributed/test_weights_peer.py has peers without sessions


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    install("sglang")
    folder = tmp_path_factory.mktemp("older")
    pip = [find_python("sglang", None), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--target", folder / "site", OLDER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    models = [make_model(folder / str(seed), "qwen2", tied=False, seed=seed) for seed in (11, 12)]
    config = {"start_timeout_s": 500, "max_restarts": 0, "max_total_tokens": 8192}
    group = start_servers(
        KIND,
        models[0],
        RolloutConfig(engine="sglang", server={**config, "env": {"PYTHONPATH": str(folder / "site")}}),
        precision="fp32",
        device="cpu",
        log_dir=folder / "logs",
        weight_version=0,
    )
    yield run("ranks_sync_sessionless.py", 2, "sglang", group.servers[0].url, *models, 1, 2)
    group.close()


@pytest.mark.parametrize("check", CHECKS)
def test_one_server_without_sessions(checked, check):
    report(checked, check)
