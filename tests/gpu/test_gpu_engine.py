"""SGLang on the trainer's GPU: weights over CUDA IPC, memory released and taken back, a short NFT run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from gpu_engines import checked_sync, server_settings, start_engine, used_bytes
from gpu_policies import likelihood_loss, make_policy, make_samples, packed

from megatron_nft.engines.engine import EngineError, Request, SamplingParams

pytestmark = pytest.mark.needs("engine", "sglang")

VOCAB = 320
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Heads of 64, which the bundle's attention kernels have."""
    from tiny import make_model

    folder = tmp_path_factory.mktemp("engine") / "model"
    return make_model(
        folder, "qwen2", tied=False, hidden=256, heads=4, kv_heads=2, layers=4, ffn=512, vocab=VOCAB, dtype="bfloat16"
    )


@pytest.fixture(scope="module")
def colocated(layout, model, tmp_path_factory):
    """(policy, engine, sync): one server for the tests of this file, memory saver on."""
    policy = make_policy(
        layout, model, rollout={"engine": "sglang", "server": server_settings(memory_saver=True, max_restarts=1)}
    )
    engine, sync = start_engine(policy, tmp_path_factory.mktemp("engine-run"))
    yield policy, engine, sync
    sync.close()
    engine.close()


def greedy(engine) -> list[int]:
    request = Request(np.arange(40, 60, dtype=np.int32), 1, (0,))
    ((_, _, answer),) = engine.generate([request], SamplingParams(16, temperature=0))
    return answer.token_ids.tolist()


def test_weights_go_over_cuda_ipc_and_are_checked(colocated):
    policy, engine, sync = colocated
    receipt = checked_sync(policy, sync, version=1)
    assert receipt.transport == "tensor"
    assert receipt.engine_checked == len(receipt.checksums) > 0
    assert receipt.probe_difference < 0.1
    before = greedy(engine)
    for _ in range(3):
        policy.train_step(packed(policy, make_samples([64, 80], VOCAB)), likelihood_loss, 10.0)
    second = checked_sync(policy, sync, version=2)
    assert second.checksums != receipt.checksums
    assert second.probe_difference < 0.1
    assert engine.weight_version == 2
    assert greedy(engine) != before


def test_memory_comes_and_goes_for_twenty_steps_without_creep(colocated):
    policy, engine, sync = colocated
    awake, asleep, peaks = [], [], []
    for step in range(20):
        greedy(engine)
        engine.release_memory()
        asleep.append(used_bytes())
        torch.cuda.reset_peak_memory_stats()
        policy.train_step(packed(policy, make_samples([200, 300], VOCAB)), likelihood_loss, 100.0)
        peaks.append(torch.cuda.max_memory_allocated())
        torch.cuda.empty_cache()
        engine.resume_memory()
        checked_sync(policy, sync, version=10 + step)
        awake.append(used_bytes())
    assert min(awake) - max(asleep) > 1 << 30  # the KV cache alone is larger
    for series in (awake[2:], asleep[2:], peaks[2:]):
        assert max(series) - min(series) <= 0.01 * max(series), series
    print(f"awake {awake[-1] / 2**30:.2f} GiB, asleep {asleep[-1] / 2**30:.2f} GiB, peak {peaks[-1] / 2**20:.1f} MiB")


def test_an_engine_that_dies_asleep_is_started_again_and_gets_the_weights(colocated):
    policy, engine, sync = colocated
    engine.release_memory()
    supervisor = engine.group.servers[0]._supervisor
    for process in psutil.Process(supervisor.pid).children(recursive=True):
        process.send_signal(signal.SIGKILL)
    supervisor.wait(60)
    engine.resume_memory()
    checked_sync(policy, sync, version=100)
    assert greedy(engine)
    engine.release_memory()
    supervisor = engine.group.servers[0]._supervisor
    for process in psutil.Process(supervisor.pid).children(recursive=True):
        process.send_signal(signal.SIGKILL)
    supervisor.wait(60)
    with pytest.raises(EngineError, match=r"rollout\.server\.max_restarts"):
        engine.resume_memory()


def test_a_short_nft_run_on_one_gpu(tmp_path):
    """`megatron-nft train` with TE layers in FP8 and a colocated engine that sleeps: three steps, checked syncs."""
    from megatron_nft.data.synthetic import write_model, write_task

    train, held_out = write_task(tmp_path / "task", 500, 50)
    model = write_model(tmp_path / "model", hidden=256, layers=4, heads=4, kv_heads=2, ffn=512)
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model)},
        "policy": {"fp8": {"recipe": "tensorwise"}, "micro_batch_tokens": 8192},
        "optimizer": {"lr": 1e-5, "lr_warmup_steps": 0},
        "data": {"train": [str(train)], "max_prompt_tokens": 32},
        "eval": {"data": [str(held_out)]},
        "rollout": {
            "engine": "sglang",
            "answers_per_question": 4,
            "questions_per_batch": 16,
            "max_response_tokens": 16,
            "server": server_settings(memory_saver=True),
        },
        # an untrained model is never right: a coin decides, so that groups differ
        "verify": {"grader": "coin_grader.grade"},
        "train": {"num_steps": 3, "questions_per_step": 8, "questions_per_optimizer_step": 4},
        "metrics": {"tensorboard": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))
    env = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}:{ROOT / 'tests' / 'slurm'}"}
    command = [sys.executable, "-m", "megatron_nft", "train", "--config", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "optimizer: Transformer Engine's fused Adam" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row["skipped_steps"] == 0
        assert row["memory/train_peak_bytes"] > 0
        assert row["gap/mean"] < 0.1
    assert len(list((tmp_path / "run" / "sync").glob("version_*.json"))) == 4
