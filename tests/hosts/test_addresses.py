"""Servers that ranks on two hosts start: each is called at an address that every rank reaches."""

from __future__ import annotations

import json
from pathlib import Path

from torchruns import TorchRun

SCRIPT = Path(__file__).with_name("open_engines.py")


def test_servers_of_two_hosts(hosts, tmp_path):
    """Two servers on each host, on the same ports there and here: four servers, asked by their own host's rank."""
    run = TorchRun(hosts, 1, tmp_path, SCRIPT, tmp_path)
    assert run.wait(400) == [0, 0], run.text
    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [s["host"] for s in seen] == ["h1", "h2"]
    for case, ports in ("auto", (15100, 15101)), ("all interfaces", (15102, 15103)):
        urls = {host.name: [f"http://{host.address}:{port}" for port in ports] for host in hosts}
        for rank in seen:
            assert rank[case]["who"] == {url: name for name in ("h1", "h2") for url in urls[name]}
            assert rank[case]["asks"] == urls[rank["host"]]
            assert rank[case]["answers"] == [[i, [i]] for i in range(6)]
            assert rank[case]["over_loopback"] == (case == "all interfaces")
            assert rank[case]["strangers"] == [401]
    keys = [[rank[case]["key"] for case in ("auto", "all interfaces")] for rank in seen]
    assert keys[0] == keys[1] and len(set(keys[0])) == 2  # one for each run, known to both hosts
    kept = tmp_path / "logs" / "key"
    assert kept.read_text().strip() == keys[0][1] and kept.stat().st_mode & 0o777 == 0o600
    for rank in seen:
        assert "rollout.server.host=127.0.0.1: the run has 2 hosts (h1, h2)" in rank["loopback"]
    assert all(host.processes() == {} for host in hosts)


def test_servers_of_one_host_with_two_ranks(hosts, tmp_path):
    """They stay on loopback, and need no key there."""
    run = TorchRun(hosts[:1], 2, tmp_path, SCRIPT, tmp_path)
    assert run.wait(400) == [0], run.text
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        for case, ports in ("auto", (15100, 15101)), ("all interfaces", (15102, 15103)), ("loopback", (15104, 15105)):
            assert seen[case]["who"] == {f"http://127.0.0.1:{port}": "h1" for port in ports}, case
            assert seen[case]["answers"] == [[i, [i]] for i in range(6)]
            assert (seen[case]["key"] is None) == (case != "all interfaces")
