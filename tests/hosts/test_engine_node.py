"""Servers on a node of their own, that die or hang: the node starts them again, and the trainer brings the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from stand_in import interpreter
from torchruns import environment

SCRIPT = Path(__file__).with_name("ask_engine_node.py")


@pytest.mark.parametrize("router", [False, True], ids=["asked", "behind-a-router"])
def test_servers_of_an_engine_node_work_again_in_the_same_phase(hosts, tmp_path, router):
    trainer, node = hosts
    server = {"python": str(interpreter(tmp_path)), "num_servers": 2, "max_restarts": 1, "start_timeout_s": 100}
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path)},
        "policy": {"precision": "fp32"},
        "data": {"train": ["unused"]},
        "rollout": {"engine": "sglang", "server": server},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    registry = tmp_path / "registry"
    serve = ("-m", "megatron_nft.engines.serve", "--registry", registry, "--config", tmp_path / "config.yaml")
    with (tmp_path / "node.log").open("wb") as log:
        serving = node.start(
            sys.executable,
            *map(str, serve),
            env=environment(NFT_MASTER_ADDR=trainer.name),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    with (tmp_path / "trainer.log").open("wb") as log:
        command = [sys.executable, str(SCRIPT), str(tmp_path), str(int(router))]
        asking = trainer.start(*command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    told = [tmp_path / "trainer.log", tmp_path / "node.log"]
    assert asking.wait(500) == 0, "\n".join(path.read_text() for path in told)
    (registry / "stop").touch()
    assert serving.wait(100) == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert all(url.startswith(f"http://{node.address}:") for url in seen["urls"])
    first, *again = seen["brought"]
    assert first == seen["urls"] and again == [seen["urls"][:1]] * 2, "nobody but the one that came back"
    logs = "".join(path.read_text() for path in (tmp_path / "run" / "engines").rglob("*-0.log"))
    assert [logs.count(f"---- start {n} of") for n in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert all(host.processes() == {} for host in hosts)
