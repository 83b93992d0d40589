"""NeMo-Run: a dry run, a local run, an experiment on the real Slurm, and a stage that fails."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from cluster import PATIENCE_S
from submitting import HERE, ROOT

PYTHON = ROOT / ".venv-nemo" / "bin" / "python"
pytestmark = [
    pytest.mark.timeout(2 * PATIENCE_S),
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-nemo: bash tools/install_nemo.sh makes it (500 MB)"),
]


def nemo(cluster, task: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The quick start's recipe on the tiny task, two ranks."""
    settings = ["train.num_steps=2", "policy.tensor_model_parallel_size=2"]
    recipe = [f"recipe.config={task / 'tiny.yaml'}", f"recipe.work={task}", "recipe.settings=[]"]
    env = {**cluster.env, "NEMORUN_HOME": str(home), "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    return start(env, "recipe=quickstart", *recipe, *settings, *arguments, cwd=task)


def start(env: dict[str, str], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(PYTHON), str(ROOT / "launch_slurm" / "nemo_launch.py"), *arguments, "--yes"]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S)


def test_dry_run_shows_every_stage_and_starts_none(cluster, task, tmp_path):
    slurm = ["executor=slurm", "executor.account=me", "executor.partition=batch", "recipe.nodes=2"]
    done = nemo(cluster, task, tmp_path, *slurm, "recipe.run_dir=dry", "--dryrun")
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    for part in ("#SBATCH --nodes=2", "#SBATCH --account=me", "#SBATCH --gpus-per-node=8", "torchrun", "srun"):
        assert part in text
    assert text.count("--cpu-bind=none") == 5 and text.count("export SRUN_CPUS_PER_TASK=$(tr") == 4  # and the doctor's
    assert "srun --ntasks=2 --ntasks-per-node=1 --overlap --cpu-bind=none --job-name=doctor" in text
    assert text.count("megatron_nft doctor --ranks-per-node=2") == 1 and "|| exit 1" in text
    assert text.count("=== APPLICATION ===") == 4 or text.count("#SBATCH --account=me") == 4
    assert not (task / "dry").exists()
    assert cluster.run("squeue", "-h").stdout == ""


def test_the_doctor_can_be_left_out_and_cores_be_given(cluster, task, tmp_path):
    slurm = ["executor=slurm", "executor.account=me", "executor.cpus_per_task=3", "executor.setup_lines=nproc"]
    done = nemo(cluster, task, tmp_path, *slurm, "recipe.doctor=false", 'stages=["train"]', "--dryrun")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nproc" in done.stdout and "export SRUN_CPUS_PER_TASK=3" in done.stdout
    assert "megatron_nft doctor" not in done.stdout


def test_dry_run_of_a_published_recipe_on_a_cluster_over_ssh(tmp_path):
    """No cluster, no connection: what would be submitted, with paths of the machine over there."""
    tunnel = ["host=login.example", "user=me", "job_dir=/shared/jobs"]
    executor = ["executor=slurm_ssh", "executor.account=me", *(f"executor.tunnel.{t}" for t in tunnel)]
    recipe = ["recipe=nft_qwen2_5_32b", "recipe.home=/shared/nft", "recipe.work=/shared/work"]
    env = {**os.environ, "NEMORUN_HOME": str(tmp_path), "COLUMNS": "400"}
    done = start(env, *recipe, *executor, "optimizer.lr=2e-6", "--dryrun", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("#SBATCH --nodes=16", "--nnodes 16 --nproc-per-node 8", "/shared/jobs/", "optimizer.lr=2e-6"):
        assert part in " ".join(done.stdout.split())


def test_local_run(cluster, task, tmp_path):
    done = nemo(cluster, task, tmp_path, "executor=local", "recipe.run_dir=nemo local", 'stages=["train","export"]')
    assert done.returncode == 0, done.stdout + done.stderr
    assert (task / "nemo local" / "exported" / "config.json").exists()


def test_two_tasks_on_slurm(cluster, task, tmp_path):
    slurm = ["executor=slurm", "executor.account=me", "executor.partition=batch", "executor.time=00:10:00"]
    run = ["recipe.run_dir=nemo-slurm", 'stages=["train","export"]', "--detach"]
    done = nemo(cluster, task, tmp_path, *slurm, *run)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = dict(re.findall(r"JobId=(\d+) JobName=\S*?(train|export)\b", cluster.run("scontrol", "show", "job").stdout))
    assert sorted(jobs.values()) == ["export", "train"]
    for job in sorted(jobs, key=int):
        fields = cluster.wait(job)
        text = Path(fields["StdOut"]).read_text()
        assert fields["JobState"] == "COMPLETED", text
        assert ("doctor: 1 node; nothing that would stop the run was found" in text) == (jobs[job] == "train")
    assert (task / "nemo-slurm" / "exported" / "config.json").exists()


def test_a_doctor_that_finds_something_ends_the_job(cluster, task, tmp_path):
    """Before a rank starts; the engine's interpreter is none."""
    slurm = ["executor=slurm", "executor.account=me", "executor.partition=batch", "executor.time=00:10:00"]
    bad = ["recipe.run_dir=nemo-doctor", "rollout.engine=sglang", "rollout.server.python=/bin/false"]
    done = nemo(cluster, task, tmp_path, *slurm, *bad, 'stages=["train"]', "--detach")
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = re.findall(r"JobId=(\d+) JobName=\S*?train\b", cluster.run("scontrol", "show", "job").stdout)[-1:]
    fields = cluster.wait(job)
    text = Path(fields["StdOut"]).read_text()
    assert fields["JobState"] == "FAILED", text
    assert "doctor: 1 node; the run would fail: 1 problem" in text
    assert "job exited with code 0" not in text
    assert not (task / "nemo-doctor" / "metrics.jsonl").exists()


def test_a_stage_that_fails_ends_the_rest_and_exits_1(cluster, task, tmp_path):
    run = ["recipe.run_dir=nemo-failed", "recipe.convert=exit 3", 'stages=["convert","export"]']
    done = nemo(cluster, task, tmp_path, "executor=local", *run)
    assert done.returncode == 1
    assert "nft: failed: convert (FAILED)" in done.stderr
    assert "Launching job export" not in done.stdout


def test_an_unknown_stage_is_refused(cluster, task, tmp_path):
    done = nemo(cluster, task, tmp_path, "executor=local", 'stages=["tarin"]')
    assert done.returncode == 1
    assert "nft: stages: tarin; allowed: convert, train, eval, export" in done.stderr
