"""Whole runs on two hosts under torchrun: the weights of one host, and an end with a reason when a host is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from host_runs import TARGET_S, check_each_misses_the_other, halted, start_training
from safetensors.torch import load_file

from runs import Run, make_start, merge

COLLECTIVE_TIMEOUT_S = 45.0
SLOW_LIMIT_S, SLOW_BYTES_PER_S = 20.0, 50_000


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """A run of three steps on two tensor-parallel ranks, with the embedded engine."""
    start = make_start(tmp_path_factory.mktemp("hosts"))
    return merge(start, train__num_steps=3, checkpoint__every_steps=1, eval__data=[])


@pytest.fixture(scope="module")
def undisturbed(settings) -> dict[str, torch.Tensor]:
    """The weights that the run ends with on one host."""
    alone = Run(merge(settings, run_dir=settings["run_dir"] + "-one-host"))
    assert alone.wait() == 0, alone.text
    return load_file(Path(settings["run_dir"] + "-one-host") / "hf" / "model.safetensors")


def check_weights(settings: dict, expected: dict[str, torch.Tensor]) -> None:
    """The run ended with these, bit for bit."""
    found = load_file(Path(settings["run_dir"]) / "hf" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)


def test_two_hosts_train_the_weights_of_one_bit_for_bit(hosts, settings, undisturbed):
    two = merge(settings, run_dir=settings["run_dir"] + "-two-hosts")
    run = start_training(hosts, 1, two)
    assert run.wait() == [0, 0], run.text
    check_weights(two, undisturbed)
    start = load_file(Path(settings["model"]["path"]) / "model.safetensors")
    assert not any(start[name].equal(tensor) for name, tensor in undisturbed.items())


BESIDE = "writing beside the training"
WRITTEN = {"writing": "checkpoint"}  # moment of the save -> its phase
LONG = [pytest.param(moment, marks=pytest.mark.long) for moment in ("generate", "sync", "writing", BESIDE)]


@pytest.mark.parametrize("moment", ["train", *LONG])
def test_a_host_that_is_cut_off_is_missed_by_default(hosts, settings, undisturbed, moment, tmp_path, record_property):
    """Nothing is refused or closed: packets are lost. Each host names rank and phase of the other one, and
    once the cable is back the run goes on from the last whole checkpoint, to the weights of a run without the cut."""
    cut = merge(
        settings,
        run_dir=f"{settings['run_dir']}-cut-{moment.replace(' ', '-')}",
        checkpoint__asynchronous=moment != "writing",
    )
    run = halted(hosts, cut, moment.partition(" ")[0], tmp_path / "halted")
    hosts[1].cut()
    start = time.monotonic()
    (tmp_path / "halted-go").touch()
    assert run.wait() == [1, 1], run.text
    seconds = time.monotonic() - start
    print(f"cut off in {moment}: both hosts ended after {seconds:.0f} s")
    record_property("seconds_to_the_end", round(seconds, 1))
    assert seconds < TARGET_S
    at = "step 3, phase " if moment == BESIDE else f"step 2, phase {WRITTEN.get(moment, moment)}: "
    check_each_misses_the_other(run, at)
    assert all(host.processes() == {} for host in hosts)

    hosts[1].heal()
    again = start_training(hosts, 1, cut)
    assert again.wait() == [0, 0], again.text
    assert "step_000001 (step 1," in again.text
    check_weights(cut, undisturbed)


@pytest.mark.long
def test_a_slow_cable_is_no_lost_host(hosts, settings, undisturbed, tmp_path, record_property):
    """Signs of life get through beside the collectives of whole steps, which the cable of a host holds up for more than
    twice as long as a silent rank is waited for; and no weight is another one for it."""
    slow = merge(
        settings,
        run_dir=settings["run_dir"] + "-slow",
        train__heartbeat_timeout_s=SLOW_LIMIT_S,
    )
    run = halted(hosts, slow, "generate", tmp_path / "halted")
    hosts[1].slow(SLOW_BYTES_PER_S)
    (tmp_path / "halted-go").touch()
    assert run.wait() == [0, 0], run.text
    held_up_s = hosts[1].queue()["bytes"] / SLOW_BYTES_PER_S
    print(f"the cable was busy for {held_up_s:.0f} s")
    record_property("seconds_of_the_cable", round(held_up_s, 1))
    assert held_up_s > 2 * SLOW_LIMIT_S
    assert "has not been heard from" not in run.text
    check_weights(slow, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1], ids=["first", "second"])
def test_a_host_that_loses_power_is_missed_by_the_other_one(
    hosts, settings, undisturbed, lost, tmp_path, record_property
):
    """The first one takes the ranks' store with it. What it had written stays, and the run goes on from there."""
    dark = merge(settings, run_dir=f"{settings['run_dir']}-power-{lost}")
    run = halted(hosts, dark, "train", tmp_path / "halted")
    hosts[lost].cut()  # first, so that the end of its processes closes no connection
    hosts[lost].kill()
    start = time.monotonic()
    (tmp_path / "halted-go").touch()
    run.wait()
    seconds = time.monotonic() - start
    print(f"host {1 + lost} lost power: the other one ended after {seconds:.0f} s")
    record_property("seconds_to_the_end", round(seconds, 1))
    assert seconds < TARGET_S
    said = run.last_line(hosts[1 - lost])
    assert said.startswith(f"megatron-nft: rank {1 - lost} on h{2 - lost}, step 2, phase train: "), run.text
    assert f"rank {lost} on h{1 + lost} has not been heard from for" in said
    assert "; it was in phase write, step 2 (" in said, "it was about to begin phase train"

    hosts[lost].heal()
    again = start_training(hosts, 1, dark)
    assert again.wait() == [0, 0], again.text
    assert "step_000001 (step 1," in again.text
    check_weights(dark, undisturbed)


def test_a_collective_that_times_out_names_the_silent_rank(hosts, settings, tmp_path):
    """Where its limit is shorter than that of the heartbeat."""
    cut = merge(
        settings,
        run_dir=f"{settings['run_dir']}-collective",
        train__collective_timeout_s=COLLECTIVE_TIMEOUT_S,
        train__heartbeat_timeout_s=600.0,
    )
    run = halted(hosts, cut, "generate", tmp_path / "halted")
    hosts[1].cut()
    start = time.monotonic()
    (tmp_path / "halted-go").touch()
    assert run.wait() == [1, 1], run.text
    assert time.monotonic() - start < 2 * COLLECTIVE_TIMEOUT_S + 60
    for rank, host in enumerate(hosts):
        said = run.last_line(host)
        assert said.startswith(f"megatron-nft: rank {rank} on {host.name}, step 2, phase generate: "), run.text
        silent = f"rank {1 - rank} on {hosts[1 - rank].name} has not been heard from for"
        assert f"lost the connection to another rank, {silent}" in said
        assert host.processes() == {}


def test_a_server_of_another_host_that_refuses_connections_is_named(hosts, settings):
    """Rank 0 asks it; both ranks end with its URL and the reason, and neither speaks of a lost rank."""
    url = f"http://{hosts[1].address}:9"
    refusing = {"engine": "sglang", "server": {"urls": [url]}}
    run = start_training(
        hosts, 1, merge(settings, run_dir=settings["run_dir"] + "-refused", rollout={**settings["rollout"], **refusing})
    )
    assert run.wait() == [1, 1], run.text
    for rank, host in enumerate(hosts):
        said = run.last_line(host)
        assert said.startswith(f"megatron-nft: rank {rank} on {host.name}, step 0, phase start: "), run.text
        assert f"WeightSyncError: {url}: " in said and "[Errno 111] Connection refused" in said
