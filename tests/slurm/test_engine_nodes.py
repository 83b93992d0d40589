"""Engines on a node of their own, as a heterogeneous job, with real SGLang servers one of which is killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster import PATIENCE_S
from submitting import ROOT, kill, wait_for

SETTINGS = (
    "policy.tensor_model_parallel_size=1",
    "rollout.engine=sglang",
    "rollout.server.num_servers=2",
    "rollout.server.max_total_tokens=4096",
    "train.num_steps=1000",
    "metrics.tensorboard=false",
    "optimizer.lr=1e-7",  # or it learns the task while it waits, and then has no groups to train on
)


def receipts(run: Path) -> list[dict]:
    """What each weight sync reached, oldest first."""
    return [json.loads(path.read_text()) for path in sorted((run / "sync").glob("*.json"))]


def newest(run: Path) -> dict:
    found = receipts(run)
    return found[-1] if found else {"version": -1, "engines": [], "behind": {}}


@pytest.mark.timeout(4 * PATIENCE_S)
@pytest.mark.skipif(
    not (ROOT / ".venv-sglang" / "bin" / "python").exists(),
    reason="no .venv-sglang: bash tools/install_engine.sh sglang makes it",
)
def test_a_killed_engine_comes_back_with_the_current_weights(cluster, task, launch):
    run = task / "disaggregated"
    nodes = {"NFT_NODES": "2", "NFT_ENGINE_NODES": "1", "NFT_HET": "1", "NFT_REQUEUE": "0"}
    job = launch.submit("train_7b_4nodes.sbatch", f"run_dir={run.name}", *SETTINGS, **nodes)
    wait_for(lambda: newest(run)["version"] >= 1, "the first step")
    assert len(newest(run)["engines"]) == 2
    assert cluster.job(job)["HetJobId"] == job

    # Slurm gives the tasks of both components the id of the first one.
    started = cluster.processes(f"SLURM_JOB_ID={job}\0", "-m sglang.launch_server")
    servers = [pid for pid in started if "supervisor.py" not in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(servers) == 2
    killed_at = newest(run)["version"]
    kill(servers[0])

    def went_on_with_the_other() -> bool:
        return any(len(r["engines"]) == 1 and r["version"] > killed_at for r in receipts(run))

    wait_for(went_on_with_the_other, "a step with one engine")
    wait_for(lambda: len(newest(run)["engines"]) == 2, "both engines with the current weights")

    cluster.run("scancel", "--signal=USR1", "--batch", job)
    fields = cluster.wait(job)
    assert fields["ExitCode"] == "75:0"
    assert launch.output(job).splitlines()[-1].endswith("submit again to go on")
    assert cluster.processes("sglang") == []
    # Nothing held the output of the steps open after their tasks had ended.
    logs = (cluster.root / "log").glob("slurmd-*.log")
    assert not [line for log in logs for line in log.read_text().splitlines() if "Abandoning IO" in line]
