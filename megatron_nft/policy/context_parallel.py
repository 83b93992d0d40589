"""Context parallelism: which tokens of a packed micro-batch a rank has, and how ranks put them together again.

Every segment is cut into 2 CP equal chunks, of which a rank gets one from the front and its mirror image from the end,
so that under a causal mask all ranks have the same number of pairs of query and key (Megatron-Core's
`get_batch_on_this_cp_rank`; for packed segments Transformer Engine's `thd_get_partitioned_indices`):

    segments of 8 and 4 tokens, CP 2    rank 0: 0 1 . . . . 6 7 | 8 . . 11
                                        rank 1: . . 2 3 4 5 . . | . 9 10 .

Labels are shifted before the split, so that a chunk's last token knows its label. Only the model's forward pass sees
parts of answers: log-probs are put together before anything else looks at them, and every rank evaluates the loss and
its metrics over whole answers, alike. The gradient of a rank's own log-probs is then its part of the whole gradient,
and the sum over context-parallel ranks is made with that over data-parallel ones.

Legend: T tokens of the micro-batch, C = CP size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nft.policy.parallel import Axis


def split_tokens(cu_seqlens: Tensor, size: int) -> Tensor:
    """The tokens of each of `size` ranks, int64 [size, T / size], ascending, for int32 [S + 1] segment bounds.

    Every segment must be a multiple of 2 * size tokens (`PolicyConfig.segment_multiple`).

        split_tokens([0, 8, 12], 2)   # [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]
    """
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    starts, widths = (torch.repeat_interleave(x, lengths) for x in (bounds[:-1], lengths // (2 * size)))  # [T] each
    chunk = (torch.arange(starts.numel(), device=starts.device) - starts) // widths
    owner = torch.minimum(chunk, 2 * size - 1 - chunk)
    return owner.argsort(stable=True).view(size, -1)


@dataclass(frozen=True)
class TokenSplit:
    """One micro-batch over the ranks of a context-parallel group."""

    rank: int
    size: int
    group: dist.ProcessGroup | None
    by_rank: Tensor | None  # int64 [C, T / C], the tokens of each rank; None where nothing is split

    @classmethod
    def of(cls, cu_seqlens: Tensor, axis: Axis) -> TokenSplit:
        """The split of the segments that int32 [S + 1] bounds."""
        return cls(axis.rank, axis.size, axis.group, split_tokens(cu_seqlens, axis.size)) if axis.size > 1 else UNSPLIT

    def own(self, values: Tensor) -> Tensor:
        """Values [T, ...] of all tokens -> [T / C, ...] of this rank's."""
        return values if self.by_rank is None else values[self.by_rank[self.rank]]

    def whole(self, own: Tensor) -> Tensor:
        """Values [T / C] of this rank's tokens -> [T] of all, in the micro-batch's order. Collective.

        All ranks must go on alike: backward, a rank keeps its own tokens' part of the gradient, unsummed.
        """
        return own if self.by_rank is None else cast(Tensor, _Whole.apply(own, self))[self.places]  # type: ignore[no-untyped-call]

    def gather(self, own: Tensor) -> Tensor:
        """Values [T / C, ...] of this rank's tokens -> [T, ...], rank after rank (see `places`). Collective.

        Each rank may use them in its own way: backward, the gradients of all ranks are summed.
        """
        return own if self.by_rank is None else cast(Tensor, _Gathered.apply(own, self))  # type: ignore[no-untyped-call]

    @property
    def places(self) -> Tensor:
        """int64 [T]: where each token's values are in what ranks have, one rank after the other."""
        assert self.by_rank is not None, "where nothing is split, nothing is moved"
        return self.by_rank.flatten().argsort()


UNSPLIT = TokenSplit(0, 1, None, None)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, split: TokenSplit) -> Tensor:
        ctx.split = split
        return _all_gather(own, split)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.split.size)[ctx.split.rank], None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, split: TokenSplit) -> Tensor:
        ctx.split = split
        return _all_gather(own, split)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty(gradient.size(0) // ctx.split.size, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.split.group)
        return own, None


def _all_gather(own: Tensor, split: TokenSplit) -> Tensor:
    whole = own.new_empty(own.size(0) * split.size, *own.shape[1:])
    dist.all_gather_into_tensor(whole, own.contiguous(), group=split.group)
    return whole
