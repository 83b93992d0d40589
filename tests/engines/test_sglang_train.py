"""A whole training run against a real SGLang server, whose weights are updated while it runs."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from megatron_nft.data.synthetic import write_task
from runs import Run, metrics_of

NUM_STEPS = 2


def test_rollouts_agree_with_the_trainer_before_and_after_live_updates(sglang_server, sglang_model, tmp_path):
    """Every rollout token's log-prob by the server is within 1e-4 of the trainer's, though each step moves the
    log-probs by a hundred times that; so is the probe after every update."""
    train, _ = write_task(tmp_path / "task", num_train=64, num_held_out=1)
    run = Run(
        {
            "run_dir": str(tmp_path / "run"),
            "num_processes": 2,
            "model": {"path": str(sglang_model)},
            "policy": {"tensor_model_parallel_size": 2, "precision": "fp32", "micro_batch_tokens": 1024},
            "optimizer": {"lr": 3e-3, "lr_warmup_steps": 0},
            "data": {"train": [str(train)], "max_prompt_tokens": 64},
            # the random model seldom says its end token: many answers, most of them cut off, which makes them wrong
            "rollout": {
                "engine": "sglang",
                "questions_per_batch": 8,
                "answers_per_question": 8,
                "max_response_tokens": 64,
                "max_staleness": 0,  # both steps generate
                "server": {"urls": sglang_server.urls},
            },
            "verify": {"grader": "parity_grader.grade"},
            "train": {"num_steps": NUM_STEPS, "questions_per_step": 2, "questions_per_optimizer_step": 1},
            "metrics": {"tensorboard": False},
        },
        timeout_s=500,
    )
    assert run.wait() == 0, run.text
    assert run.left_over() == []
    assert sglang_server.servers[0].is_healthy(), "a server of others was ended"
    rows = metrics_of(run.run_dir)[1:]
    assert len(rows) == NUM_STEPS
    for row in rows:
        assert row["tokens/trained"] > 0 and row["gap/max"] < 1e-4
        assert max(row["ratio/max"], row["ratio/max_inverse"]) > 1.01  # the second optimizer step sees new weights
    receipts = [json.loads(path.read_text()) for path in sorted((run.run_dir / "sync").glob("*.json"))]
    assert [r["version"] for r in receipts] == list(range(NUM_STEPS + 1))
    for receipt in receipts:
        assert receipt["engines"] == sglang_server.urls and receipt["transport"] == "tensor"
        assert receipt["probe_difference"] < 1e-4 and receipt["engine_checked"] > 0
    before, after = load_file(sglang_model / "model.safetensors"), load_file(run.run_dir / "hf" / "model.safetensors")
    assert before.keys() == after.keys() and not any(before[name].equal(after[name]) for name in before)
