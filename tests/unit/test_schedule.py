"""The plan of a step: nothing lost, nothing twice, the same whatever the order of the facts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_nft.train.schedule import GroupFacts, plan_step


def facts(draw: int, step: int, lengths: list[int], holder: int = 0) -> GroupFacts:
    return GroupFacts(draw, holder, "kept", step, tuple((i, n + 3, n) for i, n in enumerate(lengths)))


@st.composite
def situations(draw):
    step = draw(st.integers(2, 5))
    n = draw(st.integers(1, 20))
    groups = [
        facts(d, draw(st.integers(step - 2, step)), draw(st.lists(st.integers(1, 40), min_size=1, max_size=5)))
        for d in range(n)
    ]
    per_optimizer_step = draw(st.integers(1, n))
    parts = draw(st.integers(1, n // per_optimizer_step))
    return (
        groups,
        step,
        per_optimizer_step * parts,
        per_optimizer_step,
        draw(st.integers(1, 4)),
        draw(st.integers(0, 3)),
    )


def make(situation, groups=None):
    kept, step, per_step, per_optimizer_step, replicas, staleness = situation
    return plan_step(
        groups or kept,
        step=step,
        questions_per_step=per_step,
        questions_per_optimizer_step=per_optimizer_step,
        num_replicas=replicas,
        max_staleness=staleness,
        hidden_size=8,
        seed=1,
    )


@given(situations())
def test_every_answer_goes_to_one_place(situation):
    groups, step, per_step, per_optimizer_step, replicas, staleness = situation
    plan = make(situation)
    trained = [key for part in plan.optimizer_steps for key in part]
    draws = {draw for draw, _ in trained}
    assert len(trained) == len(set(trained)), "an answer is trained twice"
    assert len(draws) == per_step
    assert draws | set(plan.surplus) | set(plan.stale) == {g.draw for g in groups}
    assert len(draws) + len(plan.surplus) + len(plan.stale) == len(groups)
    for part, tokens in zip(plan.optimizer_steps, plan.response_tokens, strict=True):
        members = {draw for draw, _ in part}
        assert len(members) == per_optimizer_step
        whole = [g for g in groups if g.draw in members]
        assert sorted(part) == sorted((g.draw, s[0]) for g in whole for s in g.samples)
        assert tokens == sum(s[2] for g in whole for s in g.samples)
        assert set(part.values()) <= set(range(replicas))
    for g in groups:
        places = list(plan.destinations(g))
        assert len(places) == (0 if g.draw in plan.stale else len(g.samples))
        if g.draw in plan.surplus:
            assert len({replica for _, replica in places}) == 1, "a surplus group is split"
            assert step + 1 - g.step <= staleness


@given(situations(), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_the_facts(situation, rng: random.Random):
    shuffled = list(situation[0])
    rng.shuffle(shuffled)
    assert make(situation) == make(situation, shuffled)


def test_the_oldest_groups_go_first_and_too_old_ones_are_given_up():
    groups = [facts(5, 3, [4]), facts(1, 1, [4]), facts(2, 2, [4]), facts(6, 3, [4])]
    plan = plan_step(
        groups, step=3, questions_per_step=1, questions_per_optimizer_step=1, num_replicas=1, max_staleness=1,
        hidden_size=8, seed=0,
    )  # fmt: skip
    assert set(plan.optimizer_steps[0]) == {(1, 0)}
    assert plan.stale == (2,)  # in step 4 it would be two steps old
    assert set(plan.surplus) == {5, 6}


def test_too_few_groups_are_refused():
    with pytest.raises(ValueError, match="1 groups were kept, 2 are needed"):
        plan_step(
            [facts(0, 1, [3])], step=1, questions_per_step=2, questions_per_optimizer_step=1, num_replicas=1,
            max_staleness=1, hidden_size=8, seed=0,
        )  # fmt: skip


def test_answers_are_balanced_over_replicas():
    groups = [facts(d, 1, [10] * 8) for d in range(4)]
    plan = plan_step(
        groups, step=1, questions_per_step=4, questions_per_optimizer_step=2, num_replicas=4, max_staleness=1,
        hidden_size=8, seed=0,
    )  # fmt: skip
    for part in plan.optimizer_steps:
        assert [list(part.values()).count(r) for r in range(4)] == [4, 4, 4, 4]
