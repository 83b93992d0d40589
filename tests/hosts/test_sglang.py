"""A run on two hosts whose ranks start a real SGLang server each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_train import train
from tiny import make_model

from megatron_nft.data.synthetic import write_task
from runs import metrics_of

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 2


@pytest.mark.long
def test_servers_of_both_hosts_have_the_trainers_weights(hosts, tmp_path):
    """Ranks of both hosts train on what their own host's server answered, and each sync reaches both servers."""
    if not (ROOT / ".venv-sglang" / "bin" / "python").is_file():
        pytest.skip("there is no .venv-sglang (bash tools/install_engine.sh sglang)")
    model = make_model(tmp_path / "model", "qwen2", tied=False, seed=11)
    questions, _ = write_task(tmp_path / "task", num_train=64, num_held_out=1)
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model)},
        "policy": {"tensor_model_parallel_size": 2, "precision": "fp32", "micro_batch_tokens": 1024},
        "optimizer": {"lr": 3e-3, "lr_warmup_steps": 0},
        "data": {"train": [str(questions)], "max_prompt_tokens": 64},
        "rollout": {
            "engine": "sglang",
            "questions_per_batch": 8,
            "answers_per_question": 8,
            "max_response_tokens": 64,
            "max_staleness": 0,
            "server": {"start_timeout_s": 600, "max_total_tokens": 8192},
        },
        "verify": {"grader": "parity_grader.grade"},
        "train": {"num_steps": NUM_STEPS, "questions_per_step": 2, "questions_per_optimizer_step": 1},
        "metrics": {"tensorboard": False},
    }
    run = train(hosts, 1, settings)
    assert run.wait(1500) == [0, 0], run.text
    rows = metrics_of(tmp_path / "run")[1:]
    assert len(rows) == NUM_STEPS
    assert all(row["tokens/trained"] > 0 and row["gap/max"] < 1e-4 for row in rows)
    receipts = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "sync").glob("*.json"))]
    assert [r["version"] for r in receipts] == list(range(NUM_STEPS + 1))
    for receipt in receipts:
        assert [url.rpartition(":")[0] for url in receipt["engines"]] == [f"http://{host.address}" for host in hosts]
        assert receipt["transport"] == "distributed" and receipt["behind"] == {}
        assert receipt["engine_checked"] > 0 and receipt["probe_difference"] < 1e-4
    for step in range(1, NUM_STEPS + 1):  # both ranks generated, each with the server of its host
        assert len(list((tmp_path / "run" / "rollouts" / f"step_{step:06d}").iterdir())) == 2
    assert all(host.processes() == {} for host in hosts)
