"""Packed attention: equal to one softmax per segment in float64, and no token sees another segment."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nft.policy.attention import attend, bucket_width, plan_segments, segment_params
from megatron_nft.policy.context_parallel import TokenSplit, split_tokens

HEADS, GROUPS, SIZE = 4, 2, 8


def cu_seqlens(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def tensors(total: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(total)
    shapes = ((total, HEADS, SIZE), (total, GROUPS, SIZE), (total, GROUPS, SIZE))
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def by_hand(query, key, value, lengths: list[int], scale: float) -> torch.Tensor:
    """softmax(q k^T scale + causal mask) v, one segment and one head at a time."""
    rows = []
    for start, end in itertools.pairwise(cu_seqlens(lengths).tolist()):
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = query[start:end, head] @ key[start:end, group].T * scale
            future = torch.ones(end - start, end - start).triu(1).bool()
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value[start:end, group])
        rows.append(torch.stack(heads, 1).flatten(1))
    return torch.cat(rows)


@pytest.mark.parametrize("lengths", [[1], [6, 10, 4], [5, 5, 5], [1, 1, 40, 2], [3, 0, 9], list(range(1, 24))])
def test_values_and_gradients_are_those_of_separate_segments(lengths: list[int]) -> None:
    inputs, copies = tensors(sum(lengths)), tensors(sum(lengths))
    scale = SIZE**-0.5
    out = attend(*inputs, plan_segments(cu_seqlens(lengths)), scale)
    expected = by_hand(*copies, lengths, scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    weights = torch.randn(out.shape, dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for got, want in zip(inputs, copies, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=1e-12)


def test_no_token_sees_another_segment() -> None:
    lengths = [4, 7, 4]
    query, key, value = tensors(15)
    out = attend(query, key, value, plan_segments(cu_seqlens(lengths)), 1.0)
    (gradient,) = torch.autograd.grad(out[4:11].sum(), value)
    assert gradient[4:11].abs().sum() > 0
    assert gradient[:4].abs().sum() == 0 and gradient[11:].abs().sum() == 0


@given(st.lists(st.integers(1, 70), min_size=1, max_size=40))
@settings(deadline=None, max_examples=50)
def test_every_token_has_its_place(lengths: list[int]) -> None:
    """Gathering T and restoring it is the identity; a batch holds segments of one width, padded by under a quarter."""
    plan = plan_segments(cu_seqlens(lengths))
    total = sum(lengths)
    flat = torch.cat([batch.queries.flatten() for batch in plan.batches])
    assert torch.equal(flat[plan.restore], torch.arange(total))
    widths = [batch.queries.size(1) for batch in plan.batches]
    assert len(set(widths)) == len(widths) and set(widths) == {bucket_width(n) for n in lengths}
    assert flat.numel() < 1.25 * total
    ends = cu_seqlens(lengths)[1:]
    for batch in plan.batches:  # a row never leaves its segment
        segment = torch.searchsorted(ends, batch.queries.contiguous(), right=True)
        assert torch.equal(segment.amin(1), segment.amax(1))
        assert torch.equal(batch.keys, batch.queries) and batch.mask is None


@pytest.mark.parametrize(
    ("size", "lengths"), [(2, [4]), (2, [8, 4, 20, 4]), (2, [12, 12, 0, 40]), (3, [6, 18, 30]), (4, [8, 72, 16])]
)
def test_chunks_of_all_ranks_attend_as_the_whole_segments_do(size: int, lengths: list[int]) -> None:
    """Each rank's own queries against the keys and values of all ranks, rank after rank, as a gather leaves them."""
    bounds, scale = cu_seqlens(lengths), SIZE**-0.5
    inputs, copies = tensors(sum(lengths)), tensors(sum(lengths))
    by_rank = split_tokens(bounds, size)
    out = torch.empty(sum(lengths), HEADS * SIZE, dtype=torch.float64)
    for rank in range(size):
        split = TokenSplit(rank, size, None, by_rank)
        query, key, value = inputs
        gathered = [x[by_rank.flatten()] for x in (key, value)]
        out = out.index_copy(0, by_rank[rank], attend(split.own(query), *gathered, plan_segments(bounds, split), scale))
    expected = by_hand(*copies, lengths, scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    weights = torch.randn(out.shape, dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for got, want in zip(inputs, copies, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=1e-12)


def test_bucket_widths() -> None:
    expected = [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14, 16, 16, 20]
    assert [bucket_width(n) for n in range(1, 18)] == expected
    assert bucket_width(1000) == 1024 and bucket_width(1025) == 1280


def test_segment_params_give_rope_the_whole_row() -> None:
    params = segment_params(cu_seqlens([3, 4]), 4)
    assert params.qkv_format == "thd" and params.cu_seqlens_q.tolist() == [0, 3, 7]
    assert params.cu_seqlens_q_padded.tolist() == params.cu_seqlens_kv_padded.tolist() == [0, 7]
    bounds = cu_seqlens([4, 8])
    half = segment_params(bounds, 8, TokenSplit(1, 2, None, split_tokens(bounds, 2)))
    assert half.cu_seqlens_q.tolist() == [0, 4, 12] and half.max_seqlen_q == 8
    assert half.cu_seqlens_q_padded.tolist() == half.cu_seqlens_kv_padded.tolist() == [0, 6]
