"""The shipped training script on Slurm nodes with addresses of their own; one of them dies, and the job goes on."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from host_slurm import HostSlurm
from rig import Rig, missing_reason
from tiny import make_model

from megatron_nft.data.synthetic import write_task
from runs import metrics_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch_slurm" / "train_7b_4nodes.sbatch"
NUM_STEPS = 12

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture
def slurm(tmp_path) -> Iterator[HostSlurm]:
    """Three hosts, of which a job has two."""
    if reason := missing_reason() or HostSlurm.missing_reason():
        pytest.skip(reason)
    with Rig(3) as rig, HostSlurm(rig.hosts, tmp_path / "slurm") as running:
        yield running


def settings(folder: Path, engine: str) -> dict:
    questions, _ = write_task(folder / "task", num_train=64, num_held_out=1)
    return {
        "run_dir": str(folder / "run"),
        "model": {"path": str(make_model(folder / "model", "qwen2", tied=False, seed=11))},
        "policy": {"tensor_model_parallel_size": 2, "precision": "fp32", "micro_batch_tokens": 1024},
        "optimizer": {"lr": 1e-3, "lr_warmup_steps": 0},
        "data": {"train": [str(questions)], "max_prompt_tokens": 64},
        "rollout": {
            "engine": engine,
            "questions_per_batch": 8,
            "answers_per_question": 8,
            "max_response_tokens": 32,
            "max_staleness": 0,
            "server": {"start_timeout_s": 900, "max_total_tokens": 8192} if engine == "sglang" else {},
        },
        "verify": {"grader": "parity_grader.grade"},
        "train": {"num_steps": NUM_STEPS, "questions_per_step": 2, "questions_per_optimizer_step": 1},
        "metrics": {"tensorboard": False},
        "checkpoint": {"every_steps": 1},
    }


@pytest.mark.parametrize("engine", ["embedded", "sglang"])
def test_a_job_goes_on_after_a_node_has_died(slurm, tmp_path, engine):
    """Tensor parallel across the nodes, each with a server of its own; the second node loses power after a step."""
    if engine == "sglang" and not (ROOT / ".venv-sglang" / "bin" / "python").is_file():
        pytest.skip("there is no .venv-sglang (bash tools/install_engine.sh sglang)")
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(settings(tmp_path, engine)))
    run = tmp_path / "run"
    given = {
        "NFT_CONFIG": str(tmp_path / "given.yaml"),
        "NFT_PYTHON": sys.executable,
        "NFT_NODES": "2",
        "NFT_PROCS_PER_NODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "NFT_GPU": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "tests"),
    }
    # Slurm takes the first nodes that are free, so that h1, which has the controller, is the job's first.
    submitted = slurm.run("bash", SCRIPT, f"--output={tmp_path}/job.out", env=given)
    job = submitted.strip().split()[-1]
    out = tmp_path / "job.out"

    slurm.wait(lambda: (run / "checkpoints" / "step_000002").is_dir(), "a checkpoint")
    first, second = re.findall(r"start 0: trainer on (\w+),(\w+), rendezvous", out.read_text())[0]
    assert first == "h1" and "doctor: 2 nodes; nothing that would stop the run was found" in out.read_text()
    next(host for host in slurm.hosts if host.name == second).kill()

    slurm.wait_job(job, lambda j: j["JobState"] == "RUNNING" and int(j["Restarts"]) >= 1, "a second start")
    ended = slurm.wait_job(job, lambda j: j["JobState"] == "COMPLETED", "the end")
    text = out.read_text()
    starts = re.findall(r"start (\d+): trainer on (\w+),(\w+), rendezvous 10\.77\.0\.1:", text)
    assert int(ended["Restarts"]) >= 1 and len(starts) >= 2 and second not in starts[-1]
    assert text.splitlines()[-1] == f"nft: finished (step_{NUM_STEPS:06d})"
    assert [row["step"] for row in metrics_of(run)] == list(range(NUM_STEPS + 1))
    if engine == "sglang":  # servers at the hosts' own addresses, closed to others
        assert (run / "engines" / "key").stat().st_mode & 0o777 == 0o600
        logs = {path.name for path in (run / "engines").glob("sglang-*.log")}
        assert {f"sglang-{name}-0.log" for _, *names in starts for name in names} <= logs
