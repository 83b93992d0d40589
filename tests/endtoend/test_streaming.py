"""rollout.mode=streaming with the embedded engine: killed and gone on with bit for bit, and one gradient's layouts."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_nft.data.rollout_file import list_rollout_files, read_rollout_file
from runs import Run, make_start, merge, metrics_of


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """As for test_resume.py, but with answers long enough to outlive a step."""
    start = make_start(tmp_path_factory.mktemp("streaming"))
    generation = Path(start["model"]["path"]) / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": list(range(2, 260, 20))}))
    rollout = {"mode": "streaming", "max_response_tokens": 48, "embedded_batch_tokens": 1024}
    return merge(start, rollout={**start["rollout"], **rollout}, eval__max_response_tokens=12)


@pytest.fixture(scope="module")
def reference(settings) -> Path:
    run = Run(settings)
    assert run.wait() == 0, run.text
    assert run.left_over() == []
    return run.run_dir


def rows_of(run_dir: Path) -> list[dict]:
    return [row for _, path in list_rollout_files(run_dir) for row in read_rollout_file(path).to_pylist()]


def assert_same_run(reference: Path, other: Path) -> None:
    a, b = (load_file(d / "hf" / "model.safetensors") for d in (reference, other))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].numpy().tobytes() == b[name].numpy().tobytes(), f"{name} differs"
    assert metrics_of(reference) == metrics_of(other)

    def made(run_dir):
        return [{k: v for k, v in row.items() if k != "verify_s"} for row in rows_of(run_dir)]

    assert made(reference) == made(other)


def test_answers_outlive_steps_and_say_which_weights_made_them(reference):
    rows = rows_of(reference)
    keys = [(row["draw"], row["sample_index"]) for row in rows]
    assert len(keys) == len(set(keys))
    trained = [row for row in rows if row["fate"] in ("trained", "ignored")]
    continued = [row for row in trained if row["weight_version_spans"]]
    assert len(continued) > 5
    for row in continued:
        spans = row["weight_version_spans"]
        assert [start for _, start, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
        assert spans[-1][2] == len(row["response_ids"]) and spans[-1][0] == row["weight_version"]
        assert [version for version, _, _ in spans] == [row["step"] - 2, row["step"] - 1]  # max_staleness is 1
    steps = dict(sorted((row["draw"], row["step"]) for row in trained))
    assert list(steps.values()) == [step for step in range(1, 6) for _ in range(4)]  # in draw order


def test_ranks_own_different_questions_and_draw_different_answers(reference):
    """Answers of a few tokens may be alike by chance; longer ones are not, unless their random numbers were."""
    drawn: list[tuple] = []
    for _, path in list_rollout_files(reference):
        for row in read_rollout_file(path).to_pylist():
            assert path.stem == f"rank_{row['draw'] % 2:05d}"
            drawn.append(tuple(row["response_ids"]))
    long = [answer for answer in drawn if len(answer) >= 8]
    assert len(long) > 20
    assert len(set(long)) == len(long)


def test_log_probs_of_the_step_s_own_weights_are_the_trainer_s(reference):
    """Also where they go on from a prefix of older weights; those of the prefix differ."""
    own, older = [], []
    for row in (r for r in rows_of(reference) if r["fate"] == "trained"):
        gap = np.abs(np.array(row["trainer_logprobs"]) - np.array(row["rollout_logprobs"]))
        for version, start, end in row["weight_version_spans"] or [[row["weight_version"], 0, len(gap)]]:
            (own if version == row["step"] - 1 else older).extend(gap[start:end])
    assert len(own) > 200 and len(older) > 200
    assert max(own) < 1e-4 < 1e-2 < max(older)


def test_ages_and_what_is_under_way_are_in_the_record(reference):
    rows = metrics_of(reference)[1:]
    assert [row["age/max"] for row in rows] == [0, 1, 1, 1, 1]
    assert all(row["answers/under_way"] > 0 and row["groups/too_old"] == 0 for row in rows)
    assert sum(row["answers/continued"] for row in rows) > 0
    assert all(row["correction/effective_share"] < 1 for row in rows[1:])


MOMENTS = ("2 generate", "3 checkpoint", "5 sync")


@pytest.mark.parametrize("moments", [MOMENTS[1:2], pytest.param(MOMENTS, marks=pytest.mark.long)], ids=["once", "more"])
def test_killed_at_different_moments(settings, reference, moments):
    changed = merge(settings, run_dir=f"{settings['run_dir']}-killed-{len(moments)}")
    for moment in moments:
        run = Run(changed, halt=moment)
        run.wait_until_halted()
        run.kill()
        assert run.left_over() == []
    run = Run(changed)
    assert run.wait() == 0, run.text
    assert_same_run(reference, run.run_dir)


@pytest.mark.long
def test_two_replicas_train_the_same_first_step(settings, reference):
    """The answers of the first step have one version, and so do not hang on the layout."""
    changed = merge(settings, run_dir=f"{settings['run_dir']}-replicas", policy__tensor_model_parallel_size=1)
    run = Run(changed)
    assert run.wait() == 0, run.text
    rows, expected = metrics_of(run.run_dir), metrics_of(reference)
    assert rows[1]["loss/total"] == pytest.approx(expected[1]["loss/total"], abs=1e-4)
    assert rows[1]["grad_norm"] == pytest.approx(expected[1]["grad_norm"], rel=1e-2)
    assert [row["age/max"] for row in rows[1:]] == [0, 1, 1, 1, 1]


def test_another_mode_does_not_go_on_from_it(settings, reference):
    run = Run(merge(settings, rollout__mode="synchronous"))
    assert run.wait() == 1
    assert "holds unfinished answers of rollout.mode=streaming" in run.text


def test_a_stop_signal_keeps_the_tokens_of_the_phase(settings):
    changed = merge(settings, run_dir=f"{settings['run_dir']}-stopped", train__num_steps=3)
    run = Run(changed, halt="2 generate")
    run.wait_until_halted()
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, run.text
    assert "step 1 is saved" in run.text
    run = Run(changed)
    assert run.wait() == 0, run.text
    keys = [(row["draw"], row["sample_index"]) for row in rows_of(run.run_dir)]
    assert len(keys) == len(set(keys))
