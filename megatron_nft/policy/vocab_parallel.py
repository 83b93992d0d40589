"""What ranks that each hold a part of the vocabulary, or of the tokens, tell each other for policy/logprobs.py.

Legend: T tokens, H hidden size, tp tensor-parallel ranks. A group of None or of one rank has nothing to tell.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def combine(maximum: Tensor, sums: Tensor, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """(log Z, logit of the label, entropy) over all ranks, each [T]; the entropy has no meaning unless asked for."""
    largest = _max(maximum, tp_group)
    shift = maximum - largest
    sums[2] += shift * sums[0]
    sums[::2] *= shift.exp()
    total, label_logit, weighted = all_sum(sums, tp_group)
    log_total = total.log()
    return largest + log_total, label_logit, log_total - weighted / total


def vocab_range(rows: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(first vocabulary row of this rank, how many of its `rows` are real tokens)."""
    first = rows * (group.rank() if group is not None else 0)
    return first, rows if vocab_size is None else min(max(vocab_size - first, 0), rows)


def _max(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None or group.size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def all_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, group=group)
    return x


def gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T / tp, H] of each rank -> [T, H]."""
    if group is None or group.size() == 1:
        return x
    out = x.new_empty(x.size(0) * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def scatter_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[T, H] of each rank -> this rank's [T / tp, H] of the sum."""
    if group is None or group.size() == 1:
        return x
    out = x.new_empty(x.size(0) // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out
