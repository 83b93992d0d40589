"""The shipped training script on a real Slurm: two nodes, warning signal, a killed rank, a lost node."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from submitting import Launcher, kill, wait_for

pytestmark = pytest.mark.timeout(2400)
SCRIPT = "train_7b_4nodes.sbatch"


def steps(run: Path) -> list[int]:
    """Steps in metrics.jsonl, in the order of the file."""
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def weights(run: Path) -> dict:
    return load_file(run / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(cluster, task) -> Path:
    """A run on two nodes, tensor parallel across them, after the doctor has looked at both."""
    launch = Launcher(cluster, task)
    job = launch.submit(SCRIPT, "run_dir=whole", NFT_DOCTOR="1")
    state = cluster.wait(job)["JobState"]
    assert state == "COMPLETED", launch.output(job)
    lines = launch.output(job).splitlines()
    assert lines[-1] == "nft: finished (step_000006)"
    assert any(re.match("doctor: 2 nodes; nothing that would stop the run was found", line) for line in lines)
    return task / "whole"


def test_two_nodes_with_tensor_parallel_across_them(uninterrupted):
    assert steps(uninterrupted) == [0, 1, 2, 3, 4, 5, 6]
    (log,) = (uninterrupted / "logs").glob("*.log")
    assert "step 6/6" in log.read_text()


def test_tensor_parallel_within_nodes_as_a_chain_of_jobs(cluster, task, launch):
    """Two ranks on each of two nodes. The second job of the chain starts after the first and finds the run finished."""
    settings = {"NFT_PROCS_PER_NODE": "2"}
    last = int(launch.submit(SCRIPT, "--chain=2", "run_dir=within", "train.num_steps=2", **settings))
    assert cluster.wait(str(last))["JobState"] == "COMPLETED"
    first, second = (launch.output(str(job)).splitlines() for job in (last - 1, last))
    assert first[-1] == "nft: finished (step_000002)"
    assert second == ["nft: an earlier job of this chain has finished the run"]
    assert steps(task / "within") == [0, 1, 2]
    manifest = json.loads((task / "within" / "checkpoints" / "step_000002" / "manifest.json").read_text())
    assert manifest["layout"] == {"tp": 2, "cp": 1, "pp": 1, "dp": 2}


def test_a_run_that_is_warned_goes_on_to_the_same_weights(cluster, task, launch, uninterrupted):
    """One more start of the job, after the warning signal."""
    run = task / "warned"
    job = launch.submit(SCRIPT, f"run_dir={run.name}")
    warn(cluster, launch, job, run)
    assert cluster.wait(job)["JobState"] == "COMPLETED", launch.output(job)
    assert_same_run(uninterrupted, run)


@pytest.mark.long
def test_interrupted_killed_and_moved_it_ends_in_the_same_weights(cluster, task, launch, uninterrupted):
    """Warning signal, then a rank killed, then a node lost: three more starts of one job."""
    run = task / "hard life"
    job = launch.submit(SCRIPT, "--job-name=hard life", f"run_dir={run.name}")
    warn(cluster, launch, job, run)
    cluster.wait_start(job, 1)
    before = max(steps(run))
    wait_for(lambda: max(steps(run)) > before, "a step of the second start")
    (rank,) = [
        p
        for p in cluster.processes(f"SLURM_JOB_ID={job}", "\0RANK=1\0", "-m megatron_nft train")
        if "python" in _name(p)
    ]
    kill(rank)

    wait_for(lambda: "failed:" in launch.output(job), "the failure line")
    failure = next(line for line in launch.output(job).splitlines() if "failed:" in line)
    assert re.fullmatch(r"nft: failed: rank 1 on node node\d+, step \d, phase [a-z_ ]+: .*signal 9 \(KILL\)", failure)
    cluster.wait_start(job, 2)
    wait_for(lambda: "start 2" in launch.output(job), "the third start")
    lost = re.findall(r"start 2: trainer on node\d+,(node\d+)", launch.output(job))[0]
    cluster.run("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=test")
    try:
        cluster.wait_start(job, 3)
        state = cluster.wait(job)["JobState"]
    finally:
        cluster.run("scontrol", "update", f"NodeName={lost}", "State=RESUME")
    assert state == "COMPLETED", launch.output(job)
    assert int(cluster.job(job)["Restarts"]) >= 3  # Slurm itself may take two tries for a start
    assert lost not in re.findall(r"start \d+: trainer on (\S+), rendezvous", launch.output(job))[-1].split(",")
    assert_same_run(uninterrupted, run)
    assert cluster.processes(f"SLURM_JOB_ID={job}", "megatron_nft") == []


def warn(cluster, launch, job: str, run: Path) -> None:
    """The signal that Slurm sends before the time is over; the job saves and goes back into the queue."""
    wait_for(lambda: 1 in steps(run), "step 1")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: "back into the queue" in launch.output(job), "the requeue after the warning")
    assert re.search(r"warning signal.*\nnft: saved step_00000\d; the job goes back", launch.output(job))


def assert_same_run(whole: Path, other: Path) -> None:
    assert steps(other) == [0, 1, 2, 3, 4, 5, 6]
    expected, found = weights(whole), weights(other)
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)


def test_the_doctor_stops_a_job_that_would_fail(cluster, task, launch):
    """Before any rank starts; the engine's interpreter is none."""
    settings = ("run_dir=sick", "rollout.engine=sglang", "rollout.server.python=/bin/false")
    job = launch.submit(SCRIPT, *settings, NFT_DOCTOR="1")
    assert cluster.wait(job)["ExitCode"] == "1:0"
    lines = launch.output(job).splitlines()
    assert (
        len([line for line in lines if re.match(r"PROBLEM  \S+: engine: /bin/false ended with status 1;", line)]) == 2
    )
    assert "doctor: 2 nodes; the run would fail: 2 problems" in lines
    assert lines[-1].startswith("nft: failed: the doctor found what would stop the run on the nodes of the trainer")
    assert not (task / "sick" / "logs").exists() or not list((task / "sick" / "slurm").rglob("rank-*"))


def test_a_failure_that_is_not_tried_again_is_the_last_line(cluster, launch, uninterrupted):
    job = launch.submit(SCRIPT, f"run_dir={uninterrupted.name}", "checkpoint.resume=never", NFT_REQUEUE="0")
    assert cluster.wait(job)["ExitCode"] == "1:0"
    last = launch.output(job).splitlines()[-1]
    words = (
        r"nft: failed: node node\d+: rank \d on \S+, step 0, phase start: ValueError: \S+ holds a checkpoint of step 6"
    )
    assert re.match(words, last), last


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()
