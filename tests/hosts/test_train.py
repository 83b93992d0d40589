"""Whole runs on two hosts under torchrun: the weights of one host, and an end with a reason when a host is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from processes import wait_until
from safetensors.torch import load_file
from torchruns import TorchRun

from runs import Run, make_start, merge

COLLECTIVE_TIMEOUT_S = 45.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """A run of three steps on two tensor-parallel ranks, with the embedded engine."""
    start = make_start(tmp_path_factory.mktemp("hosts"))
    return merge(start, train__num_steps=3, checkpoint__every_steps=100, eval__data=[])


def train(hosts, ranks: int, settings: dict, **env: str) -> TorchRun:
    run_dir = Path(settings["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "given.yaml").write_text(yaml.safe_dump(settings))
    command = ("-m", "megatron_nft", "train", "--config", run_dir / "given.yaml")
    return TorchRun(hosts, ranks, run_dir / "output", *command, env=env)


def test_two_hosts_train_the_weights_of_one_bit_for_bit(hosts, settings):
    run = train(hosts, 1, merge(settings, run_dir=settings["run_dir"] + "-two-hosts"))
    assert run.wait() == [0, 0], run.text
    alone = Run(merge(settings, run_dir=settings["run_dir"] + "-one-host"))
    assert alone.wait() == 0, alone.text
    folders = [Path(settings["run_dir"] + name) / "hf" for name in ("-one-host", "-two-hosts")]
    expected, found = (load_file(folder / "model.safetensors") for folder in folders)
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    start = load_file(Path(settings["model"]["path"]) / "model.safetensors")
    assert not any(start[name].equal(found[name]) for name in found)


@pytest.mark.parametrize("phase", ["generate", "sync"])
def test_a_host_that_is_cut_off_ends_the_run_on_both(hosts, settings, phase, tmp_path, record_property):
    """Each host says where it was when the other one was gone. Nothing is refused or closed: packets are lost."""
    mark = tmp_path / "halted"
    cut = merge(
        settings, run_dir=f"{settings['run_dir']}-cut-{phase}", train__collective_timeout_s=COLLECTIVE_TIMEOUT_S
    )
    run = train(hosts, 1, cut, NFT_TEST_HALT=f"2 {phase} {mark}")
    marks = [Path(f"{mark}-{rank}") for rank in range(2)]
    wait_until(lambda: run.ended or all(m.exists() for m in marks), 600, "the phase")
    assert not run.ended, run.text
    hosts[1].cut()
    start = time.monotonic()
    Path(f"{mark}-go").touch()
    assert run.wait() == [1, 1], run.text
    seconds = time.monotonic() - start
    print(f"cut off in {phase}: both hosts ended after {seconds:.0f} s")
    record_property("seconds_to_the_end", round(seconds, 1))
    for rank, host in enumerate(hosts):
        said = run.last_line(host)
        assert said.startswith(f"megatron-nft: rank {rank} on {host.name}, step 2, phase {phase}: "), run.text
        assert "lost the connection to another rank" in said
        assert host.processes() == {}
    assert seconds < 2 * COLLECTIVE_TIMEOUT_S + 60


def test_a_server_of_another_host_that_refuses_connections_is_named(hosts, settings):
    """Rank 0 asks it; both ranks end with its URL and the reason, and neither speaks of a lost rank."""
    url = f"http://{hosts[1].address}:9"
    refusing = {"engine": "sglang", "server": {"urls": [url]}}
    run = train(
        hosts, 1, merge(settings, run_dir=settings["run_dir"] + "-refused", rollout={**settings["rollout"], **refusing})
    )
    assert run.wait() == [1, 1], run.text
    for rank, host in enumerate(hosts):
        said = run.last_line(host)
        assert said.startswith(f"megatron-nft: rank {rank} on {host.name}, step 0, phase start: "), run.text
        assert f"WeightSyncError: {url}: " in said and "[Errno 111] Connection refused" in said
