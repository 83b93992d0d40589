"""A stop signal while real servers make answers: the run ends within seconds, and the servers have nothing left to do.

The servers are not the run's own, so that they can be asked when it has ended.
"""

from __future__ import annotations

import signal
import time

from processes import wait_until
from under_way import requests_under_way

from megatron_nft.data.synthetic import write_task
from runs import Run

IDLE_S, END_S = 60.0, 240.0  # the answers that are asked for would take longer; processes end slowly where others work


def stop_in_generation(kind, urls, model, folder) -> None:
    train, _ = write_task(folder / "task", num_train=64, num_held_out=1)
    run = Run(
        {
            "run_dir": str(folder / "run"),
            "num_processes": 2,
            "model": {"path": str(model)},
            "policy": {"tensor_model_parallel_size": 2, "precision": "fp32", "micro_batch_tokens": 1024},
            "data": {"train": [str(train)], "max_prompt_tokens": 64},
            "rollout": {
                "engine": kind,
                "questions_per_batch": 64,
                "answers_per_question": 256,
                "max_response_tokens": 400,
                "server": {"urls": urls},
            },
            "verify": {"grader": "parity_grader.grade"},
            "train": {"num_steps": 1, "questions_per_step": 2, "questions_per_optimizer_step": 1},
            "metrics": {"tensorboard": False},
        },
        timeout_s=900,
    )
    run.wait_until(lambda: requests_under_way(kind, urls) >= 64)
    sent = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    wait_until(lambda: requests_under_way(kind, urls) == 0, IDLE_S, "the end of the requests")
    idle_s = time.monotonic() - sent
    run.wait()
    ended_s = time.monotonic() - sent
    assert run.process.returncode == 75, run.text
    assert "before the first step was complete; nothing to save" in run.text
    assert ended_s < END_S, run.text
    assert requests_under_way(kind, urls) == 0 and run.left_over() == []
    print(f"{kind}: no request was left after {idle_s:.1f} s, the run had ended after {ended_s:.1f} s")


def test_with_sglang(sglang_server, sglang_model, tmp_path):
    stop_in_generation("sglang", sglang_server.urls, sglang_model, tmp_path)


def test_with_vllm(vllm_server, vllm_model, tmp_path):
    stop_in_generation("vllm", vllm_server.urls, vllm_model, tmp_path)
