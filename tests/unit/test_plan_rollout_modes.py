"""The simulation of rollout modes: engines by hand, and what each mode may never do."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nft.plan.decoding import Answer, DecodeModel, Fleet, SimulatedEngine
from megatron_nft.plan.rollout_modes import Demand, Machine, log_mean, simulate

ONE_SECOND = DecodeModel(max_rows=2, weights_s=1.0, context_s=0.0, row_s=0.0, overhead_s=0.0, prefill_s=0.0)
QUICK = DecodeModel(max_rows=64, weights_s=2e-3, context_s=1e-8, row_s=2e-5, overhead_s=1e-3, prefill_s=1e-5)
DEMAND = Demand(16, 48, 4, 0.5, 300, 1200, 50, 0)


def test_answers_of_one_engine_advance_together():
    """Two places, a token a second: the third answer starts when the first ends, at 3 s, and ends at 3 + 4."""
    fleet = Fleet.of(ONE_SECOND, 1)
    fleet.add([Answer(0, 3, 0), Answer(1, 5, 0), Answer(2, 4, 0)], 0)
    ends = []
    while not fleet.idle:
        ends += [(answer.draw, fleet.time) for answer in fleet.advance(fleet.next_time(), 0)]
    assert ends == [(0, 3.0), (1, 5.0), (2, 7.0)]
    assert fleet.busy_s == 7.0


def test_context_costs_what_its_tokens_cost():
    """One answer of 10 tokens behind a prompt of 100: the mean context is 105, so 10 steps of 1 + 0.01 x 105 s."""
    engine = SimulatedEngine(DecodeModel(1, 1.0, 0.01, 0.0, 0.0, 0.5))
    engine.start(Answer(0, 10, 100))
    assert engine.next_time == pytest.approx(100 * 0.5 + 10 * (1 + 0.01 * 105))


def test_an_answer_that_is_stopped_keeps_its_tokens_and_is_read_in_again():
    model = DecodeModel(1, 1.0, 0.0, 0.0, 0.0, 0.25)
    fleet = Fleet.of(model, 1)
    fleet.add([Answer(0, 8, 0)], 0)
    fleet.advance(5.0, 0)
    fleet.stop_all()
    (stopped,) = fleet.queue
    assert stopped.done == pytest.approx(5.0)
    fleet.add((), 1)
    assert fleet.next_time() == pytest.approx(5.0 + 5 * 0.25 + 3)
    assert stopped.version == 0  # of its first token


@pytest.mark.parametrize(("mean", "cap"), [(300, 1200), (3900, 4096), (50, 100000)])
def test_lengths_have_the_mean_that_is_asked_for(mean, cap):
    demand = Demand(1, 1, 1, 0.5, mean, cap, 0, 0)
    lengths = np.minimum(np.exp(np.random.default_rng(1).normal(log_mean(demand), demand.spread, 400_000)), cap)
    assert lengths.mean() == pytest.approx(mean, rel=0.005)


def changed(**values) -> Demand:
    return Demand(**{**{f: getattr(DEMAND, f) for f in DEMAND.__dataclass_fields__}, **values})


def test_synchronous_is_generation_and_then_training():
    """Nothing is older than the step; both halves of a step exclude each other."""
    result = simulate("synchronous", Machine(4, QUICK, 2.0, 0.5), DEMAND, steps=6, warm_up=1)
    assert set(result.ages) == {0}
    assert (1 - result.trainer_idle) * result.step_s == pytest.approx(2.5)
    assert result.engines_idle >= 2.5 / result.step_s


@pytest.mark.parametrize("mode", ["streaming", "overlapped"])
@pytest.mark.parametrize("staleness", [1, 3])
def test_nothing_is_older_than_the_bound(mode, staleness):
    result = simulate(mode, Machine(4, QUICK, 2.0, 0.5), changed(max_staleness=staleness), steps=20, warm_up=4)
    assert max(result.ages) <= staleness
    assert sum(result.ages.values()) == pytest.approx(1)
    assert result.dropped < 0.2


def test_without_a_long_tail_and_with_free_training_the_modes_cost_the_same():
    """Equal lengths, training in no time, all kept: a step is its tokens, whatever the mode."""
    demand = changed(kept_share=1.0, spread=1e-9, questions_per_batch=16, max_staleness=1)
    steps = [simulate(m, Machine(1, QUICK, 0.0, 0.0), demand, steps=10).step_s for m in ("synchronous", "streaming")]
    assert steps[1] == pytest.approx(steps[0], rel=0.02)


def test_overlap_hides_the_shorter_half():
    """Where training is far longer than generation, a step of `overlapped` is training and sync alone."""
    result = simulate("overlapped", Machine(8, QUICK, 60.0, 0.5), changed(max_staleness=2), steps=8)
    assert result.step_s == pytest.approx(60.5, rel=1e-6)
    assert result.trainer_idle == pytest.approx(0, abs=1e-6)


def test_settings_that_cannot_be_simulated_are_refused():
    for mode in ("streaming", "overlapped"):
        with pytest.raises(ValueError, match=f"max_staleness=0: {mode}"):
            simulate(mode, Machine(1, QUICK, 1.0, 0.0), DEMAND)
    with pytest.raises(ValueError, match="rollout mode eager: must be one of"):
        simulate("eager", Machine(1, QUICK, 1.0, 0.0), DEMAND)
