"""What one rank sends to its stage's leader for a bucket: rows of Hugging Face tensors, packed into messages.

Sender and leader cut the same messages from the same plan, each by itself. A message is no larger than
its share of the leader's staging buffer, so a large shard arrives in pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_nft.weights.buckets import BucketPlan, Entry
from megatron_nft.weights.names import Geometry, ParameterRow, Place
from megatron_nft.weights.splits import place, region, unmerge


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` of one HF part of a sender's shard, along the part's first axis."""

    entry: Entry
    part: int  # index into entry.place.hf_names
    start: int
    stop: int
    shape: tuple[int, ...]
    nbytes: int


def cut_messages(plan: BucketPlan, sender: int, max_bytes: int, geometry: Geometry) -> list[list[Piece]]:
    """Return the pieces that rank `sender` of the group sends, in messages of at most `max_bytes`, or of one row."""
    messages: list[list[Piece]] = []
    left = 0
    for entry in plan.shards_of(sender):
        for piece in _pieces(entry, sender, max_bytes, geometry):
            if not messages or piece.nbytes > left:
                messages.append([])
                left = max_bytes
            messages[-1].append(piece)
            left -= piece.nbytes
    return messages


def _pieces(entry: Entry, sender: int, max_bytes: int, geometry: Geometry) -> Iterator[Piece]:
    shard = entry.sources.index(sender)
    parts = _parts(entry.place.row, entry.shard_shape, shard, len(entry.sources), geometry)
    for i, (row_shape, length) in enumerate(parts):
        row_bytes = math.prod(row_shape) * entry.dtype.itemsize
        step = max(1, max_bytes // row_bytes)
        for start in range(0, length, step):
            stop = min(start + step, length)
            yield Piece(entry, i, start, stop, (stop - start, *row_shape), (stop - start) * row_bytes)


@lru_cache(maxsize=4096)
def _parts(
    row: ParameterRow, shard_shape: torch.Size, shard: int, size: int, geometry: Geometry
) -> list[tuple[tuple[int, ...], int]]:
    """(shape of a row, number of rows) of each HF part of a shard, without the rows that pad the vocabulary."""
    kind, found = row.kind, []
    parts = unmerge(kind, torch.empty(shard_shape, device="meta"), geometry)
    for shape, part in zip(Place(row, None, None).hf_shapes(geometry), parts, strict=True):
        target = place(torch.empty(shape, device="meta"), region(kind, shape, shard, size, shard_shape[0]), part)
        found.append((tuple(part.shape[1:]), len(target)))
    return found


def index_of(entry: Entry, group_rank: int, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the region of an HF tensor of `shape` that a rank of the gathering group holds."""
    shard = entry.sources.index(group_rank)
    return region(entry.place.row.kind, shape, shard, len(entry.sources), entry.shard_shape[0])


def pack(message: list[Piece], packed: torch.Tensor, geometry: Geometry) -> None:
    """Copy the message from this rank's parameters into `packed`, in the exported dtype: uint8 [bytes]."""
    for piece, rows in zip(message, unpack(message, packed), strict=True):
        parts = unmerge(piece.entry.place.row.kind, piece.entry.shard, geometry)
        rows.copy_(parts[piece.part][piece.start : piece.stop])


def unpack(message: list[Piece], packed: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a view of a packed message for each piece."""
    offset = 0
    for piece in message:
        yield packed[offset : offset + piece.nbytes].view(piece.entry.dtype).view(piece.shape)
        offset += piece.nbytes
