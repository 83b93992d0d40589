"""Whole runs whose answers outlive a step (rollout.mode) against real servers: they go on over weight updates."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nft.data.rollout_file import list_rollout_files, read_rollout_file
from megatron_nft.data.synthetic import write_task
from runs import Run, metrics_of

NUM_STEPS = 3


def settings(folder, engine: str, model, urls) -> dict:
    train, _ = write_task(folder / "task", num_train=64, num_held_out=1)
    return {
        "run_dir": str(folder / "run"),
        "num_processes": 2,
        "model": {"path": str(model)},
        "policy": {"tensor_model_parallel_size": 2, "precision": "fp32", "micro_batch_tokens": 2048},
        "optimizer": {"lr": 3e-3, "lr_warmup_steps": 0},
        "data": {"train": [str(train)], "max_prompt_tokens": 64},
        "rollout": {
            "engine": engine,
            "mode": "streaming",
            "max_staleness": 1,
            "questions_per_batch": 64,
            "answers_per_question": 8,
            "max_response_tokens": 256,
            # the random model seldom says its end token: here a hundredth of all tokens end an answer
            "stop_token_ids": [50, 150, 250],
            "server": {"urls": urls, "max_in_flight": 4},  # later questions start when earlier answers end
        },
        "verify": {"grader": "parity_grader.grade"},
        "train": {"num_steps": NUM_STEPS, "questions_per_step": 4, "questions_per_optimizer_step": 2},
        "metrics": {"tensorboard": False},
    }


def check(run: Run) -> None:
    """Every token is of the version that its span names: its log-prob is the trainer's of that version, where the
    trainer has them, and differs by far where it has not."""
    assert run.wait() == 0, run.text
    assert run.left_over() == []
    rows = [row for _, path in list_rollout_files(run.run_dir) for row in read_rollout_file(path).to_pylist()]
    keys = [(row["draw"], row["sample_index"]) for row in rows]
    assert len(keys) == len(set(keys))
    own, older = [], []
    for row in (r for r in rows if r["trainer_logprobs"] is not None):
        gap = np.abs(np.array(row["trainer_logprobs"]) - np.array(row["rollout_logprobs"]))
        spans = row["weight_version_spans"] or [[row["weight_version"], 0, len(gap)]]
        assert [start for _, start, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
        assert spans[-1][2] == len(row["response_ids"]) == len(gap)
        for version, start, end in spans:
            assert 0 <= row["step"] - 1 - version <= 1
            (own if version == row["step"] - 1 else older).extend(gap[start:end])
    continued = [row for row in rows if row["weight_version_spans"]]
    assert continued
    assert max(own) < 1e-4
    assert max(older) > 1e-2
    metrics = metrics_of(run.run_dir)[1:]
    assert len(metrics) == NUM_STEPS and all(row["groups/too_old"] == 0 for row in metrics)


def test_sglang_goes_on_over_weight_updates(sglang_server, sglang_model, tmp_path):
    check(Run(settings(tmp_path, "sglang", sglang_model, sglang_server.urls), timeout_s=800))


@pytest.mark.parametrize("in_flight", ["abort", pytest.param("continue", marks=pytest.mark.long)])
def test_sglang_answers_while_the_trainer_trains(sglang_server, sglang_model, tmp_path, in_flight):
    """Weights are swapped under running answers: `abort` asks again with what there was, `continue` recomputes keys."""
    made = settings(tmp_path, "sglang", sglang_model, sglang_server.urls)
    made["rollout"]["mode"], made["sync"] = "overlapped", {"in_flight": in_flight}
    check(Run(made, timeout_s=800))


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "in_flight"), [("streaming", "finish"), ("overlapped", "abort"), ("overlapped", "continue")]
)
def test_vllm_goes_on_over_weight_updates(vllm_model, tmp_path, mode, in_flight):
    """A server of the run's own: `vllm_server` belongs to the tests of its order."""
    made = settings(tmp_path, "vllm", vllm_model, [])
    made["rollout"] |= {"mode": mode, "server": {**made["rollout"]["server"], "start_timeout_s": 600}}
    check(Run({**made, "sync": {"in_flight": in_flight}}, timeout_s=1200))
