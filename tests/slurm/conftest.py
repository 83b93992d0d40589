"""A private Slurm for the session, a tiny model, and the means to submit the shipped scripts to it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, missing_reason
from submitting import Launcher

NUM_NODES = 16


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A folder of our own: pytest's are removed by other runs of pytest, which jobs do not survive."""
    with tempfile.TemporaryDirectory(prefix="nft-slurm-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def cluster(scratch: Path) -> Iterator[Cluster]:
    reason = missing_reason()
    if reason:
        pytest.skip(reason)
    slurm = Cluster(scratch / "slurm", NUM_NODES)
    yield slurm
    slurm.close()


@pytest.fixture(scope="session")
def task(scratch: Path) -> Path:
    """A folder, with a space in its path, that holds a random tiny model, questions and settings."""
    from megatron_nft.data.synthetic import write_model, write_task

    folder = scratch / "a task"
    folder.mkdir()
    write_task(folder / "questions", 200, 20)
    write_model(folder / "model")
    settings = {
        "run_dir": "run",
        "model": {"path": "model"},
        "policy": {"precision": "fp32", "tensor_model_parallel_size": 2, "micro_batch_tokens": 512},
        "optimizer": {"lr": 1e-3, "lr_warmup_steps": 0},
        "data": {"train": ["questions/train.jsonl"], "max_prompt_tokens": 16},
        "rollout": {"questions_per_batch": 8, "answers_per_question": 4, "max_response_tokens": 24},
        "train": {"num_steps": 6, "questions_per_step": 4, "questions_per_optimizer_step": 2},
        "verify": {"grader": "coin_grader.grade"},
        "metrics": {"tensorboard": False},
        "checkpoint": {"every_steps": 1},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def launch(cluster: Cluster, task: Path) -> Launcher:
    return Launcher(cluster, task)
