"""The doctor on two hosts that share a folder, of which one has another engine, no flock and a clock that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torchruns import environment

TIMEOUT_S = 500
CLOCK_AND_LOCK = """
import errno, fcntl, time
_time = time.time
time.time = lambda: _time() + 3600
def _flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = _flock
"""


def interpreter(path: Path, *, sglang: str, torch: str) -> Path:
    """A stand-in for the Python of an engine's environment with these versions."""
    facts = {"python": "3.12.3", "torch": torch, "cuda": None, "nccl": None, "packages": {"sglang": sglang}}
    path.write_text(f"#!/bin/sh\necho '{json.dumps(facts)}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "q.jsonl").touch()
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": [str(tmp_path / "q.jsonl")]},
        "rollout": {"engine": "sglang"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "c.yaml"


def doctor(
    hosts, config: Path, name: str, of_host: dict[str, list[str]], extra: dict[str, str]
) -> list[tuple[int, str]]:
    """(exit status, output) on each host."""
    running = []
    for number, host in enumerate(hosts):
        command = [sys.executable, "-m", "megatron_nft", "doctor", "--config", str(config), "--ranks-per-node=1"]
        command += [f"--nodes={len(hosts)}", f"--node={number}", f"--meeting={name}", *of_host[host.name]]
        env = environment() | {"NFT_MASTER_PORT": "15777"}
        if host.name in extra:
            env["PYTHONPATH"] = f"{extra[host.name]}:{env['PYTHONPATH']}"
        running.append(host.start(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    told = [process.communicate(timeout=TIMEOUT_S)[0] for process in running]
    return [(process.returncode, text) for process, text in zip(running, told, strict=True)]


def test_two_hosts(hosts, tmp_path, config):
    good = interpreter(tmp_path / "good", sglang="0.5.23", torch="2.13.0")
    other = interpreter(tmp_path / "other", sglang="0.5.20", torch="2.12.0")
    python = "rollout.server.python="
    alike = {host.name: [f"{python}{good}"] for host in hosts}

    (status, text), (_, second) = doctor(hosts, config, "first", alike, {})
    assert status == 0, text
    assert second == "" and text.splitlines()[-1] == "doctor: 2 nodes; nothing that would stop the run was found"
    assert [line.split()[0] for line in text.splitlines()[:3]] == ["node", "h1", "h2"]

    stand_ins = tmp_path / "stand-ins"
    stand_ins.mkdir()
    (stand_ins / "sitecustomize.py").write_text(CLOCK_AND_LOCK)
    different = alike | {"h2": [f"{python}{other}"]}
    (status, text), (_, second) = doctor(hosts, config, "second", different, {"h2": str(stand_ins)})
    assert status == 1 and second == "", text
    problems = [line.split(";")[0] for line in text.splitlines() if line.startswith(("PROBLEM", "warning"))]
    assert "PROBLEM  h2: the engine's sglang is 0.5.20, on the other nodes 0.5.23" in problems
    assert "PROBLEM  h2: the engine's torch is 2.12.0, on the other nodes 2.13.0" in problems
    assert f"warning  h2: the file system of run_dir {tmp_path}/run has no flock" in problems
    (clock,) = [line for line in problems if "clock" in line]
    assert 3500 < int(clock.split("at least ")[1].split(" s ")[0]) <= 3600 and clock.endswith("ahead of that of h1")
    assert len(problems) == 4
    assert all(host.processes() == {} for host in hosts)


def test_a_folder_that_only_one_host_sees(hosts, tmp_path, config):
    """As on a cluster where run_dir is on the nodes' own disks."""
    python = interpreter(tmp_path / "good", sglang="0.5.23", torch="2.13.0")
    private = tmp_path / "run"
    private.mkdir()
    hosts[1].run("mount", "-t", "tmpfs", "tmpfs", private)
    patience = tmp_path / "patience"
    patience.mkdir()
    (patience / "sitecustomize.py").write_text(
        "import megatron_nft.plan.doctor.command as command\ncommand.PATIENCE_S = 20.0\n"
    )
    overrides = {host.name: [f"rollout.server.python={python}"] for host in hosts}
    (status, text), _ = doctor(hosts, config, "m", overrides, {host.name: str(patience) for host in hosts})
    assert status == 1
    assert "PROBLEM  1 of 2 nodes: left no facts in the shared folder; h1 did" in text
