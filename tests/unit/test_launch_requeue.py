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


def test_a_job_whose_inputs_are_refused_says_why_and_is_not_tried_again(tmp_path):
    """Rank 1 was the first to end; the reason is rank 0's line."""
    status = tmp_path / "status"
    status.mkdir()
    (status / "rank-1").write_text("1.0 2 node2\n")
    (status / "rank-0").write_text("1.5 2 node1\n")
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "log").write_text("torchrun says a lot\nmegatron-nft train: questions.jsonl: row 3: no system role\n")
    names = f"NFT_STATUS_DIR={status} run_dir={tmp_path / 'run'} log={tmp_path / 'log'}"
    call = f'say() {{ echo "nft: $*"; }}; . "$0"; NFT_REQUEUE=1 NFT_MAX_FAILURES=3 {names}; nft_finish 1'
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", call, JOB], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout.splitlines() == ["nft: refused: questions.jsonl: row 3: no system role"]
