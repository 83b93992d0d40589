"""Packing: the invariants at the top of megatron_nft/data/packing.py, on any input."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nft.data.packing import attention_cost, balance, filler, pack, plan_micro_batches, unpack
from megatron_nft.types import TrainingSample

FLOAT_FIELDS = ("loss_mask", "behaviour_logprobs", "rollout_logprobs", "correct", "correct_rate", "advantage")
INT_FIELDS = ("tokens", "position_ids", "labels", "segment_ids")


def make_sample(prompt, response, rng, first=1):
    return TrainingSample(
        draw=0,
        sample_index=0,
        input_ids=np.arange(first, first + prompt + response, dtype=np.int32),
        prompt_length=prompt,
        rollout_logprobs=-rng.random(response).astype(np.float32),
        behaviour_logprobs=-rng.random(response).astype(np.float32),
        correct=bool(rng.integers(2)),
        correct_rate=float(rng.uniform(0.02, 0.98)),
        advantage=float(rng.normal()),
    )


def long_tailed(n, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(6.5, 0.8, n), 1, 14336).astype(int)


@given(
    lengths=st.lists(st.integers(1, 100), max_size=60),
    room=st.integers(0, 200),
    multiple_of=st.sampled_from([1, 2, 4, 8, 16, 32]),
    more=st.integers(0, 80) | st.none(),
)
@settings(max_examples=300, deadline=None)
def test_plan_holds_every_sample_once_under_the_cap(lengths, room, multiple_of, more):
    cap = -(-max(lengths, default=1) // multiple_of) * multiple_of + room
    plan = plan_micro_batches(lengths, cap, multiple_of=multiple_of)
    wanted = None if more is None else len(plan) + more
    plan = plan_micro_batches(lengths, cap, multiple_of=multiple_of, num_micro_batches=wanted)
    assert sorted(itertools.chain(*plan)) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in part) for part in plan]
    assert all(-(-t // multiple_of) * multiple_of <= cap for t in totals)
    if wanted is None:
        assert all(plan)
    else:
        assert len(plan) == wanted
        # empty micro-batches only where no micro-batch is left to split
        assert all(plan) or max((len(part) for part in plan), default=0) <= 1


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), cap=st.integers(50, 150))
@settings(max_examples=200, deadline=None)
def test_plan_uses_few_micro_batches(lengths, cap):
    # Any two micro-batches together exceed the cap, or the second's samples would have gone into the first.
    plan = plan_micro_batches(lengths, cap)
    totals = sorted(sum(lengths[i] for i in part) for part in plan)
    assert len(totals) < 2 or totals[0] + totals[1] > cap


@pytest.mark.parametrize("factor", [4, 8, 16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_8192_long_tailed_lengths_fill_99_percent(factor, seed):
    lengths = long_tailed(8192, seed)
    cap = max(int(factor * lengths.mean()), int(lengths.max()))
    started = time.process_time()
    plan = plan_micro_batches(lengths, cap)
    seconds = time.process_time() - started
    assert lengths.sum() / (len(plan) * cap) >= 0.99
    assert seconds < 1.0  # CPU seconds; about 0.02


def test_a_cap_of_four_times_the_mean_fills_99_percent():
    lengths = np.minimum(long_tailed(8192), 4 * 900)
    cap = int(4 * lengths.mean())
    lengths = np.minimum(lengths, cap)  # the longest answers just fit
    plan = plan_micro_batches(lengths, cap)
    assert lengths.sum() / (len(plan) * cap) >= 0.99


def test_splitting_halves_the_fullest():
    assert plan_micro_batches([5, 3, 3, 2], 8) == [[0, 1], [2, 3]]
    assert plan_micro_batches([5, 3, 3, 2], 8, num_micro_batches=3) == [[2, 3], [0], [1]]
    assert plan_micro_batches([5, 3, 3, 2], 8, num_micro_batches=5) == [[0], [1], [2], [3], []]
    assert plan_micro_batches([], 8, num_micro_batches=2) == [[], []]
    assert plan_micro_batches([], 8) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([9], 8), r"sample 0 has 9 tokens; a micro-batch holds 1 to 8"),
        (([9], 10, 4), r"sample 0 has 9 tokens; a micro-batch holds 1 to 8 \(cap 10, in multiples of 4\)"),
        (([3, 0], 8), r"sample 1 has 0 tokens"),
    ],
)
def test_lengths_that_do_not_fit_raise(arguments, message):
    lengths, cap, multiple = (*arguments, 1)[:3]
    with pytest.raises(ValueError, match=message):
        plan_micro_batches(lengths, cap, multiple_of=multiple)


def test_too_few_micro_batches_raise():
    with pytest.raises(ValueError, match="3 samples of 24 tokens need 3 micro-batches of 8 tokens"):
        plan_micro_batches([8, 8, 8], 8, num_micro_batches=2)
    with pytest.raises(ValueError, match="multiple_of must be at least 1, not 0"):
        plan_micro_batches([8], 8, multiple_of=0)


@given(costs=st.lists(st.integers(0, 1000), max_size=50), num_bins=st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_balance_is_a_partition_close_to_even(costs, num_bins):
    bins = balance(costs, num_bins)
    assert len(bins) == num_bins
    assert sorted(itertools.chain(*bins)) == list(range(len(costs)))
    loads = [sum(costs[i] for i in b) for b in bins]
    # Largest differencing never leaves a spread above the largest item.
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_balance_of_attention_costs_over_ranks():
    costs = attention_cost(long_tailed(8192), 3584)
    loads = [costs[b].sum() for b in balance(costs, 64)]
    assert max(loads) / np.mean(loads) <= 1.00001
    small = attention_cost(np.full(16, 100), 64)
    assert [len(b) for b in balance(small, 4)] == [4, 4, 4, 4]


def test_balance_by_hand():
    assert balance([8, 7, 6, 5, 4], 2) == [[1, 3, 4], [0, 2]]  # 16 and 14, as Karmarkar and Karp's own example
    assert balance([3, 1], 4) == [[0], [1], [], []]
    assert balance([], 2) == [[], []]
    with pytest.raises(ValueError, match="num_bins must be at least 1, not 0"):
        balance([1], 0)


def test_attention_cost_by_hand():
    assert attention_cost([100, 1000], 10).tolist() == [22_000, 1_120_000]


def test_pack_by_hand():
    rng = np.random.default_rng(0)
    a, b = make_sample(2, 3, rng), make_sample(2, 1, rng, first=11)
    a.rollout_logprobs[:], b.rollout_logprobs[:] = [-1, -2, -3], [-4]
    a.behaviour_logprobs[:], b.behaviour_logprobs[:] = [-5, -6, -7], [-8]
    a.correct, b.correct = True, False
    a.correct_rate, b.correct_rate, a.advantage, b.advantage = 0.25, 0.75, 1.5, -0.5
    packed = pack([a, b], [1, 0], multiple_of=5)
    expected = {
        "tokens": [11, 12, 13, 1, 2, 3, 4, 5, 1, 2],
        "position_ids": [0, 1, 2, 0, 1, 2, 3, 4, 0, 1],
        "labels": [12, 13, 0, 2, 3, 4, 5, 0, 0, 0],
        "loss_mask": [0, 1, 0, 0, 1, 1, 1, 0, 0, 0],
        "behaviour_logprobs": [0, -8, 0, 0, -5, -6, -7, 0, 0, 0],
        "rollout_logprobs": [0, -4, 0, 0, -1, -2, -3, 0, 0, 0],
        "correct": [0, 0, 0, 0, 1, 1, 1, 0, 0, 0],
        "correct_rate": [0.5, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5],
        "advantage": [0, -0.5, 0, 0, 1.5, 1.5, 1.5, 0, 0, 0],
        "segment_ids": [0, 0, 0, 1, 1, 1, 1, 1, 2, 2],
        "cu_seqlens": [0, 3, 8, 10],
    }
    for name, values in expected.items():
        assert getattr(packed, name).tolist() == values, name
    assert (packed.max_seqlen, packed.sample_ids) == (5, [1, 0])
    assert [x.tolist() for x in unpack(packed.behaviour_logprobs, packed)] == [[-8], [-5, -6, -7]]


def test_segments_are_padded_with_their_own_beginning():
    rng = np.random.default_rng(0)
    a, b = make_sample(2, 3, rng), make_sample(2, 1, rng, first=11)
    packed = pack([a, b], [1, 0], multiple_of=16, segment_multiple=4)
    assert packed.tokens.tolist() == [11, 12, 13, 11, 1, 2, 3, 4, 5, 1, 2, 3, 1, 2, 3, 4]
    assert packed.position_ids.tolist() == [*range(4), *range(8), *range(4)]
    assert packed.labels.tolist() == [12, 13, 0, 0, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 0, 0]
    assert packed.loss_mask.nonzero().flatten().tolist() == [1, 5, 6, 7]
    assert packed.cu_seqlens.tolist() == [0, 4, 12, 16] and packed.max_seqlen == 8
    assert packed.segment_ids.tolist() == [0] * 4 + [1] * 8 + [2] * 4
    values = torch.arange(16.0)
    assert [x.tolist() for x in unpack(values, packed)] == [[1], [5, 6, 7]]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    segment_multiple=st.sampled_from([1, 4, 8]),
    factor=st.sampled_from([1, 2, 3]),
)
@settings(max_examples=100, deadline=None)
def test_planned_micro_batches_hold_padded_segments(lengths, segment_multiple, factor):
    multiple, rng = segment_multiple * factor, np.random.default_rng(0)
    cap = 48 + len(lengths)
    multiples = {"multiple_of": multiple, "segment_multiple": segment_multiple}
    plan = plan_micro_batches(lengths, cap, **multiples)
    samples = [make_sample(1, n - 1, rng) for n in lengths]
    assert sorted(itertools.chain(*plan)) == list(range(len(lengths)))
    for part in plan:
        batch = pack(samples, part, **multiples)
        assert len(batch.tokens) <= cap and len(batch.tokens) % multiple == 0
        assert (batch.cu_seqlens % segment_multiple == 0).all()
        assert int(batch.loss_mask.sum()) == sum(lengths[i] - 1 for i in part)


def test_multiples_that_do_not_go_together_raise():
    with pytest.raises(ValueError, match=r"segment_multiple \(4\) must divide multiple_of \(6\)"):
        plan_micro_batches([3], 8, multiple_of=6, segment_multiple=4)
    with pytest.raises(ValueError, match=r"segment_multiple \(0\) must divide multiple_of \(1\)"):
        pack([make_sample(1, 2, np.random.default_rng(0))], [0], segment_multiple=0)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=12),
    multiple_of=st.sampled_from([1, 2, 8, 16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_pack_and_unpack_are_inverse(shapes, multiple_of, seed):
    rng = np.random.default_rng(seed)
    samples = [make_sample(p, r, rng, first=1 + 100 * i) for i, (p, r) in enumerate(shapes)]
    indices = rng.permutation(len(samples)).tolist()
    b = pack(samples, indices, multiple_of=multiple_of)
    total = len(b.tokens)
    assert total % multiple_of == 0 and total - sum(p + r for p, r in shapes) < multiple_of
    assert b.cu_seqlens[0] == 0 and b.cu_seqlens[-1] == total and b.cu_seqlens.dtype == torch.int32
    assert b.max_seqlen == b.cu_seqlens.diff().max()
    for name in FLOAT_FIELDS:
        assert getattr(b, name).dtype == torch.float32 and getattr(b, name).shape == (total,), name
    for name in INT_FIELDS:
        assert getattr(b, name).dtype == torch.int64 and getattr(b, name).shape == (total,), name
    for field, source in (("rollout_logprobs", "rollout_logprobs"), ("behaviour_logprobs", "behaviour_logprobs")):
        for got, i in zip(unpack(getattr(b, field), b), indices, strict=True):
            np.testing.assert_array_equal(got, getattr(samples[i], source))
    # the label of a masked position is the next token of the same segment, and every response token is one label
    at = b.loss_mask.nonzero().flatten()
    assert torch.equal(b.labels[at], b.tokens[at + 1]) and torch.equal(b.segment_ids[at], b.segment_ids[at + 1])
    responses = np.concatenate([samples[i].input_ids[samples[i].prompt_length :] for i in indices])
    assert b.labels[at].tolist() == responses.tolist()


def test_missing_behaviour_logprobs_are_nan_under_the_mask_only():
    s = make_sample(2, 3, np.random.default_rng(0))
    s.behaviour_logprobs = None
    b = pack([s], [0], multiple_of=8)
    assert torch.equal(b.behaviour_logprobs.isnan(), b.loss_mask > 0)


def test_filler_and_empty_pack():
    for b in (filler(4), pack([], [], multiple_of=4)):
        assert b.tokens.shape == (4,) and b.loss_mask.sum() == 0 and b.sample_ids == []
        assert b.cu_seqlens.tolist() == [0, 4] and b.max_seqlen == 4 and b.position_ids.tolist() == [0, 1, 2, 3]
        assert unpack(torch.zeros(4), b) == []


def test_an_empty_prompt_and_a_wrong_shape_raise():
    s = make_sample(2, 3, np.random.default_rng(0))
    s.prompt_length = 0
    with pytest.raises(ValueError, match="sample 0 has an empty prompt"):
        pack([s], [0])
    with pytest.raises(ValueError, match=r"shape \(3,\), the batch \(4,\)"):
        unpack(torch.zeros(3), filler(4))
