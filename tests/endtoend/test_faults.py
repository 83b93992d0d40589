"""Whole runs in which something is wrong: each ends with a clear last line, and nothing is left running."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from runs import Run, make_start, merge, metrics_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    return make_start(tmp_path_factory.mktemp("faults"))


def last_line(run: Run) -> str:
    return run.text.strip().splitlines()[-1]


def test_fresh_groups_start_at_ratio_one_and_stale_ones_do_not(settings):
    """Behaviour log-probs are those of the weights that generated: with one optimizer step per training step, R is 1
    for all tokens of a step that trains fresh groups only. A high learning rate makes stale ones stand out."""
    changed = merge(
        settings,
        run_dir=settings["run_dir"] + "-ratio",
        train__questions_per_optimizer_step=4,
        train__num_steps=6,
        optimizer__lr=1e-2,
        checkpoint__every_steps=100,
        eval__data=[],
    )
    run = Run(changed)
    assert run.wait() == 0, run.text
    rows = [r for r in metrics_of(run.run_dir) if r["step"] > 0]
    fresh = [r for r in rows if r["groups/staleness"] == 0]
    stale = [r for r in rows if r["groups/staleness"] > 0]
    assert fresh and stale, "the run must have both kinds of steps"
    for row in fresh:
        assert abs(row["ratio/max"] - 1) < 1e-4 and abs(row["ratio/max_inverse"] - 1) < 1e-4
    for row in stale:
        assert max(row["ratio/max"], row["ratio/max_inverse"]) > 1.01
    assert all(row["gap/max"] < 1e-4 for row in rows)


def test_questions_that_are_too_hard_end_with_the_bound(settings, tmp_path):
    """The tiny model on competition mathematics: everything is wrong, no group is kept, and the run says so."""
    source = Path(os.environ.get("NFT_DATA_DIR", ROOT.parent / "shared" / "data")) / "train" / "math.jsonl"
    if not source.is_file():
        pytest.skip(f"{source} is not there (set NFT_DATA_DIR)")
    rows = [json.loads(line) for line in source.read_text().splitlines()[:200]]
    questions = tmp_path / "math.jsonl"
    questions.write_text(
        "".join(json.dumps({"data_source": "math", "prompt": r["problem"], "answer": r["answer"]}) + "\n" for r in rows)
    )
    changed = merge(
        settings,
        run_dir=settings["run_dir"] + "-hard",
        data__train=[str(questions)],
        data__max_prompt_tokens=100,
        verify__grader="maths",
        rollout__max_generation_batches=3,
        eval__data=[],
    )
    run = Run(changed)
    assert run.wait() == 1
    assert run.left_over() == []
    said = last_line(run)
    assert "phase generate: EmptyBatchError: 0 of 4 groups were kept after 3 generation batches" in said
    assert "24 all wrong" in said
    assert "Traceback" not in run.text
    assert "over 100 tokens were dropped" in run.text


def test_a_run_folder_in_use_is_refused(settings):
    changed = merge(settings, run_dir=settings["run_dir"] + "-busy", train__num_steps=1000)
    first = Run(changed)
    try:
        first.wait_until(lambda: first.steps_done() >= 0)
        second = Run(merge(changed, train__num_steps=2))
        assert second.wait() == 1
        assert "is in use by another run" in second.text
    finally:
        first.kill()
    assert first.left_over() == []
    assert second.left_over() == []


def test_an_engine_too_far_from_the_trainer_stops_the_run_and_leaves_the_checkpoint(settings):
    """The gap of fp32 is about 1e-7: above this limit in every step. The count goes on over a resume."""
    changed = merge(settings, run_dir=settings["run_dir"] + "-gap", algorithm__gap_limit=1e-12, train__num_steps=1)
    changed["eval"] = {}
    assert Run(changed).wait() == 0
    run = Run(merge(changed, train__num_steps=9))
    assert run.wait() == 1
    assert run.left_over() == []
    said = last_line(run)
    assert "phase logprobs: GapError: the engine's log-probs differ from the trainer's by" in said, run.text
    assert "in 3 steps in a row by more than algorithm.gap_limit (1e-12); the weights of step 2 are in the" in said
    assert run.steps_done() == 2
    assert (run.run_dir / "checkpoints" / "step_000002" / "manifest.json").is_file()


def test_weights_that_blow_up_stop_the_run_before_they_are_used(settings):
    """A learning rate that makes NaN weights: the next log-probs are NaN, and the run ends naming phase and cause."""
    changed = merge(settings, run_dir=settings["run_dir"] + "-nan", optimizer__lr=1e30, optimizer__lr_warmup_steps=0)
    run = Run(changed)
    assert run.wait() == 1
    assert run.left_over() == []
    said = last_line(run)
    assert "phase sync: WeightSyncError" in said or "phase train: TrainingFailure" in said, run.text
    assert not list((Path(changed["run_dir"]) / "checkpoints").glob("*")), "NaN weights were saved"


def test_a_disk_that_is_full_beside_the_training_ends_the_run(settings):
    """The error of the thread that writes reaches the last line, on every rank; the checkpoint before is intact."""
    changed = merge(settings, run_dir=settings["run_dir"] + "-full", eval__data=[])
    run = Run(changed, halt="3 full")
    assert run.wait() == 1
    assert run.left_over() == []
    said = last_line(run)
    assert "CheckpointError: checkpoint of step 3 could not be written (newest intact checkpoint: step 2)" in said
    assert "No space left on device" in said and "phase checkpoint" in said
    assert sorted(p.name for p in (run.run_dir / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
