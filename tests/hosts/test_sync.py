"""Weights into engines on every host, most with stand-ins for the engines: who tells whom, and what faults lead to."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import launch
import pytest
from environments import install
from rig import Rig, need_hosts
from torchruns import MASTER_PORT, TESTS, environment

from megatron_nft.plan.sync_time import AGREEMENTS, OTHER_CALLS

SCRIPT = Path(__file__).with_name("ranks_sync_hosts.py")
CHECKS = launch.names_of(SCRIPT)
TIMEOUT_S = 1800.0


def checks_on(num_hosts: int, ranks: int, scratch: Path, *arguments: object) -> dict[str, str]:
    """Run the checks of SCRIPT on `ranks` ranks of each host: check -> error, as `launch.launch` gives them."""
    need_hosts()
    with Rig(num_hosts) as rig:
        processes = []
        for rank in range(num_hosts * ranks):
            world = {"RANK": rank, "WORLD_SIZE": num_hosts * ranks, "LOCAL_RANK": rank % ranks}
            world |= {"MASTER_ADDR": rig.hosts[0].name, "MASTER_PORT": MASTER_PORT, "NFT_TEST_SCRATCH": scratch}
            env = environment(**{name: str(value) for name, value in world.items()})
            env["PYTHONPATH"] += f":{TESTS / 'distributed'}"
            with (scratch / f"log-{rank}.txt").open("wb") as log:
                command = (sys.executable, SCRIPT, *map(str, arguments))
                host = rig.hosts[rank // ranks]
                processes.append(host.start(*command, env=env, stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + TIMEOUT_S
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        late = time.monotonic() > deadline
        for host in rig.hosts:
            host.kill()
        codes = [p.wait(60) for p in processes]
    return launch.collect(scratch, len(processes), late, TIMEOUT_S, codes)


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory) -> dict[str, str]:
    return checks_on(*request.param[:2], tmp_path_factory.mktemp("sync"), *request.param[2:])


PIPELINE = pytest.param((2, 2, 2, 2, 2), id="pp-across-hosts")
TENSOR = pytest.param((2, 2, 4, 1, 2), id="tp-across-hosts", marks=pytest.mark.long)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("finished", [PIPELINE, TENSOR], indirect=True)
def test_two_hosts(finished, check):
    error = finished.get(check, finished.get("", "no rank reported this check"))
    if error:
        pytest.fail(error, pytrace=False)


REAL = (
    "check_start",
    "check_every_engine_of_every_host_has_the_weights",
    "check_faults_stop_the_run_on_every_rank",
    "check_an_engine_that_dies_in_the_middle_is_left_out",
    "check_when_the_last_one_dies_the_run_ends",
)


@pytest.fixture(scope="module")
def with_sglang(tmp_path_factory) -> dict[str, str]:
    install("sglang")
    return checks_on(2, 2, tmp_path_factory.mktemp("sglang"), 2, 2, 0, *REAL)


@pytest.mark.long
@pytest.mark.parametrize("check", REAL)
def test_two_hosts_with_sglang(with_sglang, check):
    error = with_sglang.get(check, with_sglang.get("", "no rank reported this check"))
    if error:
        pytest.fail(error, pytrace=False)


RANKS = [1, pytest.param(2, marks=pytest.mark.long)]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_rank_sends_as_much_on_four_hosts_as_on_one(ranks, tmp_path):
    """HTTP calls per server, buckets, collectives and bytes of a sync, counted on each rank."""
    seen = {}
    for num_hosts in (1, 2, 4):
        scratch = tmp_path / str(num_hosts)
        scratch.mkdir()
        checks = ("check_start", "check_messages_do_not_grow_with_the_hosts")
        errors = checks_on(num_hosts, ranks, scratch, 1, 1, ranks, *checks)
        assert not any(errors.get(check, errors[""]) for check in checks), errors
        seen[num_hosts] = [json.loads((scratch / f"counts-{r}.json").read_text()) for r in range(num_hosts * ranks)]
    print(json.dumps(seen[4][0]))
    (first, *_) = seen[2]
    assert first["buckets"] > 3
    assert first["http"] == first["buckets"] + OTHER_CALLS["tensor"] - 1  # no probe is made here
    assert first["collectives"]["answers to flags"] == AGREEMENTS
    for num_hosts, counts in seen.items():
        for rank, found in enumerate(counts):
            wanted = seen[2][rank % ranks]
            if num_hosts * ranks == 1:  # a leader that is alone broadcasts nothing
                wanted = {
                    **wanted,
                    "collectives": {k: v for k, v in wanted["collectives"].items() if "broadcast" not in k},
                }
            assert found == wanted, (num_hosts, rank)
