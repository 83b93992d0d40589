"""A run whose only SGLang server is killed as a step begins: it comes back and works in that step."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from processes import below

from megatron_nft.data.synthetic import write_task
from runs import Run, metrics_of


def server_processes(run: Run) -> list[int]:
    """The server's own processes, without the supervisors above it."""
    found = []
    for pid in below(run.process.pid):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"sglang.launch_server" in arguments and not any(a.endswith(b"supervisor.py") for a in arguments):
            found.append(pid)
    return found


@pytest.mark.long
def test_a_server_that_is_killed_works_again_in_the_step_under_way(sglang_model, sglang_rollout, tmp_path):
    train, _ = write_task(tmp_path / "task", num_train=64, num_held_out=1)
    run = Run(
        {
            "run_dir": str(tmp_path / "run"),
            "num_processes": 2,
            "model": {"path": str(sglang_model)},
            "policy": {"tensor_model_parallel_size": 2, "precision": "fp32", "micro_batch_tokens": 1024},
            "optimizer": {"lr": 3e-3, "lr_warmup_steps": 0},
            "data": {"train": [str(train)], "max_prompt_tokens": 64},
            "rollout": {
                "engine": "sglang",
                "questions_per_batch": 8,
                "answers_per_question": 8,
                "max_response_tokens": 64,
                "max_staleness": 0,
                "server": {"start_timeout_s": 500, "max_total_tokens": 8192, "max_restarts": 1},
            },
            "verify": {"grader": "parity_grader.grade"},
            "train": {"num_steps": 2, "questions_per_step": 2, "questions_per_optimizer_step": 1},
            "metrics": {"tensorboard": False},
        },
        halt="2 generate",
        timeout_s=1500,
    )
    run.wait_until_halted()
    killed = server_processes(run)
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    run.go_on()
    assert run.wait() == 0, run.text
    assert "came back, and answers again under version 1 of the weights" in run.text
    receipts = [json.loads(p.read_text()) for p in sorted((tmp_path / "run" / "sync").glob("*.json"))]
    assert [r["version"] for r in receipts] == [0, 1, 1, 2]
    for receipt in receipts:
        assert receipt["behind"] == {} and receipt["probe_difference"] < 1e-4 and receipt["engine_checked"] > 0
    rows = metrics_of(run.run_dir)[1:]
    assert len(rows) == 2 and all(row["gap/max"] < 1e-4 for row in rows)
    assert run.left_over() == []
