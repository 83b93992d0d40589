"""A run that is killed at any moment and started again ends with the very weights of one that was not."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from runs import KEYS, Run, make_start, merge, metrics_of


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    return make_start(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def reference(settings) -> Path:
    """A run that nothing happened to."""
    run = Run(merge(settings, metrics__tensorboard=True))
    assert run.wait() == 0, run.text
    assert run.left_over() == []
    return run.run_dir


def assert_same_run(reference: Path, other: Path) -> None:
    a, b = (load_file(d / "hf" / "model.safetensors") for d in (reference, other))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].numpy().tobytes() == b[name].numpy().tobytes(), f"{name} differs"
    assert metrics_of(reference) == metrics_of(other)


def test_the_run_folder_holds_what_it_should(reference):
    for name in ("config.yaml", "metrics.jsonl", "hf/config.json", "hf/tokenizer.json"):
        assert (reference / name).is_file(), name
    assert [r["step"] for r in metrics_of(reference)] == [0, 1, 2, 3, 4, 5]
    assert sorted(p.name for p in (reference / "checkpoints").iterdir()) == ["step_000004", "step_000005"]
    assert len(list((reference / "sync").glob("*.json"))) == 6
    assert len(list((reference / "rollouts").glob("step_*/rank_*.parquet"))) == 10
    assert list((reference / "tensorboard").glob("events.out.tfevents.*"))


FIGURES = {
    *("accuracy/train", "length/mean", "length/max", "length/truncated", "correct_rate/hist", "tokens_per_s"),
    *(f"groups/{fate}" for fate in ("kept", "surplus", "dropped", "all_correct", "all_wrong", "too_few")),
    *("groups/stale_dropped", "loss/total", "loss/positive", "loss/negative", "clamp/share", "grad_norm", "lr"),
    *("ratio/mean", "ratio/log_mean", "ratio/kl", "ratio/max", "ratio/max_inverse", "gap/mean", "gap/max"),
    "policy/entropy",
    *(f"seconds/{phase}" for phase in ("generate", "exchange", "logprobs", "write", "train", "sync", "total")),
    *("seconds/verify_wait", "seconds/verify_per_answer", "sync/bytes", "sync/probe_difference"),
}


def test_every_step_has_every_figure(reference):
    rows = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        if row.get("generation_batches"):  # a step that is full of surplus groups generates nothing
            assert set(row) >= FIGURES, FIGURES - set(row)
    assert sum(bool(row.get("generation_batches")) for row in rows) >= 2
    assert all("eval/accuracy" in rows[i] for i in (0, -1))


def test_keys_of_the_environment_are_written_nowhere(reference):
    files = [path for path in reference.rglob("*") if path.is_file()] + [reference.parent / f"{reference.name}.log"]
    for path in files:
        content = path.read_bytes()
        assert not any(key.encode() in content for key in KEYS.values()), path


def test_held_out_questions_are_asked_every_second_step(reference, settings):
    names = [Path(path).stem for path in settings["eval"]["data"]]
    for row in metrics_of(reference):
        found = {key for key in row if key.startswith("eval/") and key.endswith("/accuracy") and key.count("/") == 2}
        assert found == ({f"eval/{name}/accuracy" for name in names} if row["step"] in (0, 2, 4, 5) else set())
        if found:
            assert row["eval/accuracy"] == pytest.approx(sum(row[f"eval/{name}/accuracy"] for name in names) / 2)
            assert row["eval/accuracy_low"] <= row["eval/accuracy"] <= row["eval/accuracy_high"]


def test_the_model_loads_in_transformers_and_moved(settings, reference):
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(reference / "hf").state_dict()
    start = AutoModelForCausalLM.from_pretrained(settings["model"]["path"]).state_dict()
    assert trained.keys() == start.keys()
    assert any(not trained[name].equal(start[name]) for name in start)


SAVED_WHEN_KILLED = {
    "2 generate": ["step_000001"],  # between steps
    "3 checkpoint": ["step_000001", "step_000002", "step_000003.partial"],  # while it is written
    "5 sync": ["step_000003", "step_000004"],  # the optimizer has stepped, the engine has other weights
}
"""Step and phase -> the checkpoints that are there at that moment."""


@pytest.mark.parametrize(
    "moments", [["3 checkpoint"], pytest.param(list(SAVED_WHEN_KILLED), marks=pytest.mark.long)], ids=["once", "thrice"]
)
def test_killed_at_different_moments(settings, reference, moments):
    changed = merge(settings, run_dir=f"{settings['run_dir']}-killed-{len(moments)}")
    checkpoints = Path(changed["run_dir"]) / "checkpoints"
    for moment in moments:
        run = Run(changed, halt=moment)
        run.wait_until_halted()
        # A save that began at the end of the step before goes on beside the ranks that have halted.
        run.wait_until(lambda moment=moment: sorted(p.name for p in checkpoints.iterdir()) == SAVED_WHEN_KILLED[moment])
        run.kill()
        assert run.left_over() == [], "ranks or workers outlived the command"
    run = Run(changed)
    assert run.wait() == 0, run.text
    assert run.text.count("going on from") == len(moments), run.text
    assert_same_run(reference, run.run_dir)


def test_killed_while_a_checkpoint_is_written_beside_the_training(settings, reference):
    """The next step goes on meanwhile; the checkpoint before is still there, and nothing else is lost."""
    changed = merge(settings, run_dir=f"{settings['run_dir']}-writing")
    folder = Path(changed["run_dir"])
    run = Run(changed, halt="3 writing")
    run.wait_until_halted()
    run.wait_until(lambda: list((folder / "rollouts" / "step_000004").glob("rank_*.parquet")))
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == SAVED_WHEN_KILLED["3 checkpoint"]
    assert list((folder / "checkpoints" / "step_000003.partial" / "megatron").glob("*.distcp"))
    run.kill()
    assert run.left_over() == []
    run = Run(changed)
    assert run.wait() == 0, run.text
    assert "(step 2," in run.text
    assert_same_run(reference, run.run_dir)


def test_a_stop_signal_waits_for_the_checkpoint_that_is_being_written(settings, reference):
    """It comes while step 3's is half written, and step 4 is under way: the one of step 3 is finished first."""
    changed = merge(settings, run_dir=f"{settings['run_dir']}-waiting", checkpoint__every_steps=3)
    run = Run(changed, halt="3 writing")
    run.wait_until_halted()
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, run.text
    assert run.left_over() == []
    names = sorted(p.name for p in (run.run_dir / "checkpoints").iterdir())
    assert names[0] == "step_000003" and f"is saved in {run.run_dir / 'checkpoints' / names[-1]}" in run.text, names
    run = Run(changed)
    assert run.wait() == 0, run.text
    assert_same_run(reference, run.run_dir)


def test_another_layout_goes_on_from_it(settings, reference):
    """Saved by two tensor ranks, taken up by two replicas: the same questions, and weights that differ by rounding."""
    changed = merge(settings, run_dir=f"{settings['run_dir']}-replicas", train__num_steps=2)
    run = Run(changed)
    assert run.wait() == 0, run.text
    changed = merge(changed, policy__tensor_model_parallel_size=1, train__num_steps=3)
    run = Run(changed)
    assert run.wait() == 0, run.text
    assert "(step 2," in run.text
    rows, expected = metrics_of(run.run_dir), metrics_of(reference)
    assert rows[3]["loss/total"] == pytest.approx(expected[3]["loss/total"], abs=1e-4)
    assert rows[3]["grad_norm"] == pytest.approx(expected[3]["grad_norm"], rel=1e-2)


def test_sigterm_saves_and_ctrl_c_says_so(settings, reference):
    """The first signal meets step 2 before its evaluation, which the next start makes up for; the second step 3."""
    changed = merge(settings, run_dir=settings["run_dir"] + "-stopped", checkpoint__every_steps=100)
    stops = ((signal.SIGTERM, 75, "2 evaluate"), (signal.SIGINT, 130, "3 train"))
    for signum, status, moment in stops:
        run = Run(changed, halt=moment)
        run.wait_until_halted()
        run.process.send_signal(signum)
        assert run.wait() == status, run.text
        assert run.left_over() == []
        assert "run the same command to go on" in run.text
        if signum == signal.SIGTERM:
            assert "step 2 is saved" in run.text
            assert run.steps_done() == 1, "the evaluation was not abandoned"
    run = Run(changed)
    assert run.wait() == 0, run.text
    assert_same_run(reference, run.run_dir)


def test_a_damaged_checkpoint_is_passed_over_and_another_model_refused(settings, reference, tmp_path):
    newest = reference / "checkpoints" / "step_000005"
    victim = max((newest / "megatron").glob("*.distcp"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    weights = load_file(reference / "hf" / "model.safetensors")
    run = Run(merge(settings, run_dir=str(reference)))
    assert run.wait() == 0, run.text
    assert f"checkpoint {newest} is damaged" in run.text
    assert "(step 4," in run.text
    again = load_file(reference / "hf" / "model.safetensors")
    assert all(weights[n].equal(again[n]) for n in weights)

    from megatron_nft.data.synthetic import write_model

    other = write_model(tmp_path / "other", hidden=32)
    run = Run(merge(settings, run_dir=str(reference), model__path=str(other)))
    assert run.wait() == 1
    assert "belongs to a run with another model" in run.text
    assert "'hidden_size': 64" in run.text
    assert json.loads((newest / "manifest.json").read_text())["step"] == 5
