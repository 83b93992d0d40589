"""What a step records, the shuffled control, and the sink for Weights & Biases."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_nft.metrics import Max, Mean, Metrics, WandbSink
from megatron_nft.policy.policy import StepReport
from megatron_nft.train import collect, record
from megatron_nft.train.correction import Gap
from megatron_nft.train.schedule import GroupFacts, StepPlan
from megatron_nft.types import Prompt, Rollout, RolloutGroup, Verdict

PROMPT = Prompt(0, "test", ({"role": "user", "content": "q"},), "1", np.array([1, 2], dtype=np.int32))


def rollout(index: int, verdict: Verdict, tokens: int = 3, reason: str = "stop") -> Rollout:
    ids = np.arange(tokens, dtype=np.int32)
    return Rollout(0, index, ids, np.full(tokens, -0.5, np.float32), reason, 0, "text", verdict=verdict)


def test_the_control_keeps_rates_and_moves_verdicts():
    groups = []
    for draw in range(50):
        group = RolloutGroup(
            draw, PROMPT, [rollout(i, Verdict.CORRECT if i < 3 else Verdict.WRONG) for i in range(8)], 1
        )
        groups.append(group)
    collect.shuffle_verdicts(groups, seed=3)
    assert all(g.correct_rate == 3 / 8 for g in groups)
    first_half = sum(r.correct for g in groups for r in g.rollouts[:4])
    assert 40 < first_half < 110  # 75 of 150 expected; unshuffled it would be 150


def test_metrics_of_rollouts():
    metrics = Metrics()
    groups = [
        RolloutGroup(0, PROMPT, [rollout(0, Verdict.CORRECT, 2), rollout(1, Verdict.WRONG, 6, "length")], 1),
        RolloutGroup(1, PROMPT, [rollout(0, Verdict.UNPARSEABLE, 4), rollout(1, Verdict.TIMEOUT, 4)], 1),
    ]
    record.add_rollouts(metrics, groups, 0.5)
    merged = Metrics.merge([metrics.state()])
    assert merged["accuracy/train"] == 0.25
    assert [merged[f"verdict/{v.value}"] for v in Verdict] == [0.25] * 5  # the time-out counts as no verdict too
    assert (merged["length/mean"], merged["length/max"], merged["length/truncated"]) == (4.0, 6.0, 0.25)
    assert merged["correct_rate/hist"] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]  # rates 0 and 0.5
    assert merged["entropy/sampled"] == 0.5
    assert merged["tokens/generated"] == 16
    assert merged["seconds/verify_wait"] == 0.5


def test_the_gap_is_that_of_all_ranks_and_added_once():
    metrics = Metrics()
    gap = Gap(tokens=4, answers=2, absolute=1.0, largest=0.4, k1=-0.2, k3=0.1, truncated=1, masked=2, vetoed=1)
    gap.ratio, gap.ratio_squared = 6.0, 12.0
    for rank in (0, 1):
        record.add_gap(metrics, rank, gap)
    assert Metrics.merge([metrics.state()]) == {
        "gap/mean": 0.25,
        "gap/max": 0.4,
        "gap/k1": -0.05,
        "gap/k3": 0.025,
        "correction/effective_share": 0.75,  # 6^2 / (4 * 12)
        "correction/truncated_share": 0.25,
        "correction/masked_share": 0.5,
        "correction/vetoed_share": 0.5,
    }


def test_an_optimizer_step_brings_the_metrics_of_its_algorithm():
    metrics = Metrics()
    reports = [
        StepReport(0.5, 2.0, 1e-6, False, "", 4, {"own/share": Mean(1.0, 4), "own/largest": Max(3.0)}),
        StepReport(0.1, 9.0, 1e-6, True, "the loss is nan", 4, {"own/share": Mean(math.nan, 4), "own/largest": Max(7)}),
        StepReport(0.25, 1.0, 3e-6, False, "", 8, {"own/share": Mean(5.0, 8), "own/largest": Max(2.0)}),
    ]
    for report in reports:
        record.add_optimizer_step(metrics, 0, report, clip_grad=1.5)
        record.add_optimizer_step(metrics, 1, report, clip_grad=1.5)  # other ranks hold the same sums and add nothing
    assert Metrics.merge([metrics.state()]) == {
        "skipped_steps/share": 1 / 3,
        "skipped_steps": 1.0,
        "lr": pytest.approx(5e-6 / 3),
        "loss/total": 0.375,
        "grad_norm": 1.5,
        "grad_norm/max": 2.0,
        "grad_norm/clipped": 0.5,
        "own/share": 0.5,
        "own/largest": 3.0,
    }


def test_a_step_that_generates_or_updates_nothing_writes_the_same_metrics():
    """Means and maxima are null and sums 0, so that every line of metrics.jsonl has every name."""
    something, nothing = Metrics(), Metrics()
    groups = [RolloutGroup(0, PROMPT, [rollout(0, Verdict.CORRECT), rollout(1, Verdict.WRONG)], 1)]
    report = StepReport(0.5, 2.0, 1e-6, False, "", 4, {"own/share": Mean(1.0, 4), "own/largest": Max(3.0)})
    for metrics, some, facts, skipped in (
        (something, groups, [GroupFacts(0, 0, "kept", 1)], False),
        (nothing, [], [], True),
    ):
        record.add_rollouts(metrics, some, 0.0)
        record.add_groups(metrics, 0, facts)
        record.add_optimizer_step(metrics, 0, replace(report, skipped=skipped), clip_grad=0.0)
    full, empty = (Metrics.merge([m.state()]) for m in (something, nothing))
    assert full.keys() == empty.keys() and None not in full.values()
    assert {name for name, value in empty.items() if value is None} >= {
        "accuracy/train", "length/mean", "length/max", "verdict/wrong", "loss/total", "grad_norm/max", "own/largest",
    }  # fmt: skip
    assert (empty["groups/generated"], empty["generation_batches"], empty["tokens/generated"]) == (0, 0, 0)
    assert sum(empty["correct_rate/hist"]) == 0 and full["generation_batches"] == 1


@pytest.mark.parametrize("name", ["lr", "loss/total", "policy/entropy", "seconds/own", "step", "tokens/trained"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_metric_of_the_trainer_cannot_be_added_to(name, rank):
    report = StepReport(0.5, 2.0, 1e-6, False, "", 4, {"own/share": Mean(1.0, 4), name: Mean(1.0, 1)})
    with pytest.raises(ValueError, match=f"metric '{name}' has a name of the trainer's own"):
        record.add_optimizer_step(Metrics(), rank, report, clip_grad=1.0)


def test_groups_by_fate_and_staleness():
    metrics = Metrics()
    facts = [GroupFacts(d, 0, fate, 3) for d, fate in enumerate(["kept", "all_wrong", "all_wrong", "too_few", "kept"])]
    record.add_groups(metrics, 0, facts)
    record.add_groups(metrics, 1, facts)  # other ranks know the same and add nothing
    plan = StepPlan(({(0, 0): 0},), (7,), {4: 0}, ())
    record.add_plan(metrics, 0, [facts[0], facts[4]], plan, step=4)
    merged = Metrics.merge([metrics.state()])
    assert (merged["groups/generated"], merged["groups/all_wrong"], merged["groups/dropped"]) == (5, 2, 3)
    assert (merged["groups/kept"], merged["groups/surplus"], merged["groups/staleness"]) == (1, 1, 1.0)
    assert merged["tokens/trained"] == 7


def test_ages_are_those_of_trained_tokens():
    metrics = Metrics()
    facts = [GroupFacts(0, 0, "kept", 3, ((0, 9, 6),)), GroupFacts(1, 0, "kept", 5, ((0, 5, 1), (1, 5, 1)))]
    record.add_plan(metrics, 0, facts, StepPlan(({(0, 0): 0, (1, 0): 0, (1, 1): 0},), (8,), {}, ()), step=5)
    merged = Metrics.merge([metrics.state()])
    assert (merged["age/mean"], merged["age/max"]) == (2 * 6 / 8, 2.0)


def test_wandb_gets_scalars_by_step(tmp_path, monkeypatch):
    logged = []
    run = SimpleNamespace(log=lambda record, step: logged.append((step, record)), finish=lambda: logged.append("done"))
    asked = {}
    monkeypatch.setitem(__import__("sys").modules, "wandb", SimpleNamespace(init=lambda **k: asked.update(k) or run))
    sink = WandbSink("project", tmp_path / "my-run", {"seed": 1})
    sink.write(3, {"loss/total": 0.5, "correct_rate/hist": [1, 2], "length/mean": None})
    sink.close()
    assert (asked["project"], asked["id"], asked["resume"], asked["config"]) == (
        "project",
        "my-run",
        "allow",
        {"seed": 1},
    )
    assert logged == [(3, {"loss/total": 0.5}), "done"]


def test_wandb_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron_nft\[wandb\]'"):
        WandbSink("project", tmp_path, {})
