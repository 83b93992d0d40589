"""Which tokens a context-parallel rank has: two chunks of every segment, as Megatron cuts them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nft.data.packing import filler
from megatron_nft.policy.context_parallel import UNSPLIT, TokenSplit, split_tokens
from megatron_nft.policy.step import check_micro_batches


def bounds_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def test_by_hand() -> None:
    assert split_tokens(bounds_of([8, 4]), 2).tolist() == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]
    assert split_tokens(bounds_of([6]), 3).tolist() == [[0, 5], [1, 4], [2, 3]]
    assert split_tokens(bounds_of([4, 0, 4]), 2).tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(2, 5))
@settings(deadline=None, max_examples=100)
def test_as_megatron_cuts_each_segment(halves: list[int], size: int) -> None:
    """megatron.core.utils.get_batch_on_this_cp_rank of every segment by itself, one after the other."""
    lengths = [2 * size * n for n in halves]
    bounds = bounds_of(lengths)
    found = split_tokens(bounds, size)
    assert found.shape == (size, sum(lengths) // size)
    for rank in range(size):
        expected = []
        for start, end in itertools.pairwise(bounds.tolist()):
            chunks = torch.arange(start, end).view(2 * size, -1)
            expected += [chunks[rank], chunks[2 * size - 1 - rank]]
        assert torch.equal(found[rank], torch.cat(expected))


def test_every_rank_has_as_many_pairs_of_query_and_key() -> None:
    lengths, size = [16, 32, 8], 4
    position = torch.cat([torch.arange(n) for n in lengths])
    pairs = [int((position[tokens] + 1).sum()) for tokens in split_tokens(bounds_of(lengths), size)]
    assert len(set(pairs)) == 1


def test_where_nothing_is_split_nothing_is_moved() -> None:
    values = torch.arange(5.0, requires_grad=True)
    assert UNSPLIT.own(values) is UNSPLIT.whole(values) is UNSPLIT.gather(values) is values
    assert TokenSplit.of(bounds_of([5]), SimpleNamespace(rank=0, size=1, group=None)) is UNSPLIT


def test_micro_batches_that_cannot_be_cut_are_refused() -> None:
    layout = SimpleNamespace(vpp_size=None, pp=SimpleNamespace(size=1), cp=SimpleNamespace(size=2))
    batch = filler(8)
    check_micro_batches([batch], layout, 8)
    batch.cu_seqlens = torch.tensor([0, 2, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="cannot be cut into 4 equal chunks for 2 context-parallel ranks"):
        check_micro_batches([batch], layout, 8)
