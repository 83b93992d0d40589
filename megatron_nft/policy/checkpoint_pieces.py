"""Which boxes of the whole model's tensors are this rank's own.

Megatron's distributed optimizer cuts a replica's parameters, laid end to end, into one equal part per data-parallel
rank; the part of a parameter that a rank owns is a range of its flattened elements. Here a range becomes boxes of the
whole model's tensors, at most 2n - 1 for n axes:

    shape [4, 5], elements 3 to 17:     . . . x x       [0, 3:5]
                                        x x x x x       [1:3, 0:5]
                                        x x x x x
                                        x x . . .       [3, 0:2]

So every rank writes and reads its own part of weights and optimizer state alone, without a message to another, and any
layout finds what it needs: where a box lies does not depend on who wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory, is_main_replica
from torch import Tensor

STATE = "optimizer.state."  # + "param" (fp32 master), "exp_avg", "exp_avg_sq" or "average" + "." + key of the weight


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor of the whole model, and where this rank has its values."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]
    values: Tensor  # of the box's shape; a view of what the training uses
    main: bool  # whether this rank is the one that writes it
    padded: bool = False  # whether other layouts have more rows or fewer: those of a vocabulary's padding, all 0


def sharded_by_parameter(models: dict[str, Any]) -> dict[Tensor, ShardedBase]:
    """Megatron's description of every parameter's place in the whole model."""
    return {sharded.data: sharded for sharded in nested_values(models) if isinstance(sharded, ShardedBase)}


def range_pieces(
    sharded: ShardedBase, values: Tensor, start: int, prefix: str = "", *, divided: bool = True
) -> Iterator[Piece]:
    """Pieces of a parameter's flattened elements from `start` on, or of the optimizer's state for them.

    values: [elements]. `prefix` comes before the parameter's key. divided: whether each data-parallel rank has a
    range of its own; otherwise the first of them writes.
    """
    for part, first in _parts(sharded):
        low, high = max(start, first), min(start + values.numel(), first + math.prod(part.local_shape))
        if low >= high:
            continue
        at = low - start
        for offsets, sizes in boxes(part.local_shape, low - first, high - first):
            count, leading = math.prod(sizes), part.prepend_axis_num
            inner = zip(part.global_offset[leading:], offsets, strict=True)
            yield Piece(
                prefix + part.key,
                part.global_shape,
                part.global_offset[:leading] + tuple(o + i for o, i in inner),
                values[at : at + count].view((1,) * leading + sizes),
                is_main_replica((*part.replica_id[:2], 0) if divided else part.replica_id),  # the last counts DP ranks
                part.allow_shape_mismatch,
            )
            at += count


def whole_piece(sharded: ShardedTensor) -> Piece:
    """All of what this rank has of a tensor."""
    return Piece(
        sharded.key,
        sharded.global_shape,
        sharded.global_offset,
        sharded.data.detach().view((1,) * sharded.prepend_axis_num + tuple(sharded.local_shape)),
        is_main_replica(sharded.replica_id),
        sharded.allow_shape_mismatch,
    )


def _parts(sharded: ShardedBase) -> Iterator[tuple[ShardedTensor, int]]:
    """The tensors that a parameter is stored as, each with the place of its first element in the flattened parameter.

    Gate and up lie in one parameter and are boxes of their own in the whole model.
    """
    if isinstance(sharded, ShardedTensor):
        yield sharded, 0
        return
    assert isinstance(sharded, ShardedTensorFactory), type(sharded)
    shape_alone = torch.empty(sharded.data.shape, dtype=sharded.data.dtype, device="meta")
    for part in nested_values(replace(sharded, data=shape_alone).build()):
        assert part.data.is_contiguous(), f"{part.key} is no range of its parameter"
        yield part, part.data.storage_offset()


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offsets, sizes) of boxes that hold the elements `start` to `stop`, in order, of a row-major array."""
    if not shape or start >= stop:
        if start < stop:
            yield (), ()
        return
    row, rest = math.prod(shape[1:]), (0,) * (len(shape) - 1)
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # all within one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start % row:
        yield from _in_row(shape, first - 1, start % row, row)
    if first < last:
        yield (first, *rest), (last - first, *shape[1:])
    if stop % row:
        yield from _in_row(shape, last, 0, stop % row)


def _in_row(
    shape: Sequence[int], index: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield (index, *offsets), (1, *sizes)
