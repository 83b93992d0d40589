"""What two hosts do for each other: a server that is lost and comes back, and a rank for which the other one waits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from torchruns import TorchRun, environment

HANG = """
import sys, time
from pathlib import Path
from megatron_nft.train.lifecycle import Phases
rank, phase, limit_s = int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
phases = Phases(rank, Path(sys.argv[1]), 600.0, {phase: limit_s})
phases.step = 3
def waits_for_ever():
    print("waits", flush=True)
    time.sleep(600)
with phases(phase):
    waits_for_ever()
"""


def test_a_host_whose_server_died_is_helped_and_its_server_works_again_in_the_same_phase(hosts, tmp_path):
    """Its questions go to the other host's server; its own is started again, gets the weights, and answers."""
    run = TorchRun(hosts, 1, tmp_path / "output", Path(__file__).with_name("lose_engines.py"), tmp_path)
    assert run.wait() == [0, 0], run.text
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["by"] == [1] and first["answers"] == 20, "its own server is near, and enough"
    assert second["by"] == [2, 1, 2]
    assert first["brought"] == second["brought"] == [second["own"]]
    assert (first["starts"], second["starts"]) == (1, 2)
    assert all(host.processes() == {} for host in hosts)


def test_a_hang_is_told_with_the_host_and_the_rank_that_is_missing(hosts, tmp_path):
    """Rank 0 waits in the sync for rank 1 of the other host, which hangs before it."""
    given = {"env": environment(WORLD_SIZE="2"), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    late = hosts[1].start(sys.executable, "-c", HANG, tmp_path, "1", "train", "600", **given)
    assert late.stdout.readline() == "waits\n"
    waiting = hosts[0].start(sys.executable, "-c", HANG, tmp_path, "0", "sync", "4", **given)
    said = waiting.communicate(timeout=300)[1].strip().splitlines()[-1]
    assert waiting.returncode == 1
    assert said.startswith("megatron-nft: rank 0 on h1, step 3, phase sync: no progress for ")
    assert "rank 1 on h2 has not entered phase sync: it is in phase train of step 3" in said
    other = late.communicate(timeout=300)[1].strip().splitlines()[-1]
    assert late.returncode == 1
    assert other.startswith(
        "megatron-nft: rank 1 on h2, step 3, phase train: ended with rank 0 on h1: no progress for "
    )
    for rank in range(2):
        assert "waits_for_ever" in (tmp_path / "stacks" / f"rank_{rank:05d}.txt").read_text()
