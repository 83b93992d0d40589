"""What a run remembers beside its weights: the moving average of them, and how each question was answered before."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from runs import Run, make_start, merge, metrics_of

STEPS = 3


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Twelve questions that come again and again, a third of whose draws the function below skips."""
    start = make_start(tmp_path_factory.mktemp("reference"))
    rows = Path(start["data"]["train"][0]).read_text().splitlines(keepends=True)[:12]
    few = Path(start["run_dir"]).with_name("few.jsonl")
    few.write_text("".join(rows))
    return merge(
        start,
        train__num_steps=STEPS,
        train__questions_per_optimizer_step=4,
        data__train=[str(few)],
        data__choose="choices.seldom_answered",
        algorithm__reference="ema",
        algorithm__reference_decay=0.5,
        eval__every_steps=0,
        rollout__max_staleness=1,
    )


def weights(run_dir: Path) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in load_file(run_dir / "hf" / "model.safetensors").items()}


def rates_by_step(run_dir: Path) -> list[dict[int, float]]:
    """Draw -> correct rate of the groups of every step, from the rollout files."""
    steps = []
    for folder in sorted((run_dir / "rollouts").iterdir()):
        verdicts: dict[int, list[bool]] = {}
        for path in folder.glob("rank_*.parquet"):
            for row in pq.read_table(path, columns=["draw", "verdict"]).to_pylist():
                verdicts.setdefault(row["draw"], []).append(row["verdict"] == "correct")
        steps.append({draw: sum(v) / len(v) for draw, v in verdicts.items()})
    return steps


@pytest.fixture(scope="module")
def reference(settings) -> Path:
    run = Run(settings)
    assert run.wait() == 0, run.text
    return run.run_dir


def test_killed_and_started_again_it_ends_the_same(settings, reference):
    changed = merge(settings, run_dir=f"{settings['run_dir']}-killed")
    run = Run(changed, halt="2 train")  # it drew by what was known of step 1
    run.wait_until_halted()
    run.kill()
    run = Run(changed)
    assert run.wait() == 0, run.text
    assert "going on from" in run.text
    assert weights(run.run_dir) == weights(reference)
    assert metrics_of(run.run_dir) == metrics_of(reference)


def test_a_choice_goes_on_bit_for_bit_where_answers_outlive_a_step(settings):
    """What was dropped ahead of the groups that count is in the checkpoint too."""
    ended = []
    for name, halt in (("whole", ""), ("cut", "3 train")):
        made = merge(
            settings,
            run_dir=f"{settings['run_dir']}-streaming-{name}",
            rollout__mode="streaming",
            train__num_steps=4,
        )
        run = Run(made, halt=halt)
        if halt:
            run.wait_until_halted()
            run.kill()
            run = Run(made)
        assert run.wait() == 0, run.text
        ended.append((weights(run.run_dir), metrics_of(run.run_dir)))
    assert ended[0] == ended[1]
    shares = [row["questions/skipped_share"] for row in ended[0][1][1:]]
    assert any(share and 0 < share < 1 for share in shares)


def test_the_ratio_is_not_1_and_the_share_skipped_is_measured(reference):
    rows = metrics_of(reference)[1:]
    # one update a step: in step 1 alone the average is the weights
    assert rows[0]["ratio/max"] == rows[0]["ratio/max_inverse"] == 1.0
    assert all(row["ratio/max"] > 1 for row in rows[1:])
    shares = [row["questions/skipped_share"] for row in rows if row["generation_batches"]]
    assert shares[0] == 0.0, "nothing was known yet"
    assert any(0 < share < 1 for share in shares)


def test_what_is_remembered_is_what_was_graded(settings, reference):
    """From the rollout files and the order of draws, counted here."""
    from megatron_nft.data.choice import Past, load_choice
    from megatron_nft.data.prompts import PromptStream, load_tokenizer

    tokenizer = load_tokenizer(settings["model"]["path"])
    stream = PromptStream(settings["data"]["train"], tokenizer, 16, seed=0)
    past: dict[int, Past] = {}
    cursor = 0
    for rates in rates_by_step(reference):
        # asked are the draws that the function lets through, by what was known at the start of the step
        stream.cursor, expected = cursor, set()
        choice = load_choice("choices.seldom_answered", 0)
        while len(expected) < len(rates):
            drawn, _ = choice.draw(stream, 8, past)
            expected |= {draw for draw, _ in drawn}
        assert set(rates) == expected
        cursor = stream.cursor if rates else cursor
        for draw in sorted(rates):
            index = stream.prompt(draw).index
            past[index] = past.get(index, Past()).with_rate(rates[draw])
    newest = max((reference / "checkpoints").iterdir())
    stored = json.loads((newest / "questions" / "past.json").read_text())
    assert {int(i): (asked, tuple(rates)) for i, (asked, rates) in stored.items()} == {
        i: (p.asked, p.rates) for i, p in past.items()
    }


def test_a_decay_of_0_is_the_policy_at_the_start_of_the_step(settings):
    fresh = merge(settings, rollout__max_staleness=0, train__num_steps=2)
    ended = []
    for name, key, value in (("zero", "reference_decay", 0.0), ("none", "reference", "behaviour")):
        run = Run(merge(fresh, run_dir=f"{settings['run_dir']}-{name}", **{f"algorithm__{key}": value}))
        assert run.wait() == 0, run.text
        assert [row["ratio/max"] for row in metrics_of(run.run_dir)[1:]] == [1.0, 1.0]
        ended.append(weights(run.run_dir))
    assert ended[0] == ended[1]


def test_a_function_that_skips_everything_ends_the_run(settings):
    run = Run(merge(settings, run_dir=f"{settings['run_dir']}-nothing", data__choose="choices.nothing"))
    assert run.wait() == 1
    assert "data.choose=choices.nothing skipped 1000 draws in a row" in run.text.splitlines()[-1]
