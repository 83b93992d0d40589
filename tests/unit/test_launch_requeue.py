"""launch_slurm/job.sh puts its job back into the queue, but never a start of the job that took its own place."""

import subprocess
from pathlib import Path

import pytest

JOB = Path(__file__).parents[2] / "launch_slurm" / "job.sh"
SCONTROL = """#!/bin/sh
case $1 in
show) echo "   Requeue=1 Restarts=$NOW BatchFlag=1 Reboot=0 ExitCode=0:0" ;;
*) echo "asked: $*" ;;
esac
"""
CALL = 'say() { echo "nft: $*"; }; . "$0"; NFT_REQUEUE=1 SLURM_JOB_ID=7 restart=1; nft_again "saved step_000002"'


@pytest.mark.parametrize(("now", "last"), [("1", "asked: requeue 7"), ("2", "nft: Slurm has put it there already")])
def test_a_start_requeues_itself_alone(tmp_path, now, last):
    """`now`: how often Slurm has started the job again, of which the start that asks is the first."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(SCONTROL)
    scontrol.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NOW": now}
    done = subprocess.run(["bash", "-c", CALL, JOB], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["nft: saved step_000002; the job goes back into the queue", last]
