"""A stream of the weights in buckets of HF-named tensors, gathered from tensor, expert and pipeline ranks.

Each pipeline stage has a *leader* (tensor rank 0 of data-parallel replica 0). For one bucket the other ranks of the
stage send their shards to the leader in messages (`messages.py`), and it writes them into their place in a flat buffer
of full HF tensors. Where there are receivers (`receivers.py`), the leader then broadcasts the buffer to them.

Memory on a leader: two buffers of a bucket each, so that one is filled while the other is in use, and a staging
buffer for the messages, no larger than the largest parameter. A parameter larger than a bucket gets a buffer of its own
while neither of the two is in use, and one of them then serves for staging. So a leader never holds more than two
buckets and the largest parameter, and no rank holds the model. A receiver holds no more than a leader, a sender its own
shards of one bucket.

Invariants:
- every rank of the world runs the iterator to its end; all ranks of a stage compute the same plan
- the order of tensors is the same in every export: stage by stage, dense parameters, then experts
- all receivers get all buckets, in that order
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist

from megatron_nft.distributed import gather_objects
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.weights.buckets import Bucket, BucketPlan, TensorMeta, plan_stage
from megatron_nft.weights.messages import Piece, cut_messages, index_of, pack, unpack
from megatron_nft.weights.names import Geometry
from megatron_nft.weights.receivers import Receivers
from megatron_nft.weights.splits import place, unmerge

Allocate = Callable[[int], torch.Tensor]
"""Number of bytes -> uint8 [bytes] on the trainer's device, e.g. in shared memory."""


def export_buckets(
    chunks: Sequence[torch.nn.Module],
    spec: Geometry,
    layout: ParallelLayout,
    buffers: Buffers,
    *,
    dtype: torch.dtype | None = None,
    receivers: Receivers,
) -> Iterator[Bucket]:
    """Stream the policy's weights. A collective call: every rank runs it to the end.

    buffers           where the buckets lie, which also says how large they are and how long they are valid.
    dtype             of the exported tensors; None keeps the parameters' own.
    receivers         get every bucket; other leaders those of their own stage alone, and other ranks none.
    """
    plans = plan_stage(chunks, spec, layout, buffers.bucket_bytes, dtype)
    gathered = _gather(plans, spec, buffers, keeps=layout.rank in receivers.ranks)
    if receivers.ranks:
        yield from _broadcast(gathered, plans, buffers, layout, receivers)
    else:
        for bucket in gathered:
            if bucket is not None:
                yield bucket
            del bucket  # one that is larger than a bucket must be gone before the next is made
    buffers.wait_until_unused()


class Buffers:
    """The memory that buckets are written into.

    Without `used` there is one buffer, and a bucket is valid until the next one is asked for. With it there are two:
    before the memory of a bucket is written again or given back, `used` is called, once per bucket and in their order,
    and returns when nobody uses that bucket any more.
    """

    def __init__(
        self,
        bucket_bytes: int,
        device: torch.device,
        allocate: Allocate | None = None,
        used: Callable[[], None] | None = None,
    ) -> None:
        self.bucket_bytes = bucket_bytes
        self._device, self._used = device, used
        self._allocate = allocate or self._empty
        self._normal: list[torch.Tensor | None] = [None] * (2 if used else 1)
        self._turn = 0  # which of them is written next
        self._in_use = 0  # buckets that were given out and may still be read
        self._large = False  # the last one is larger than a bucket
        self._staging: torch.Tensor | None = None

    def bucket(self, metas: list[TensorMeta], own: bool = True) -> Bucket:
        """Return an uninitialized bucket for these tensors."""
        nbytes = metas[-1].end
        large = nbytes > self.bucket_bytes
        self.wait_until_unused(but=0 if large or self._large else len(self._normal) - 1)
        self._large, self._in_use = large, self._in_use + 1
        if large:
            self._staging = None
            return Bucket(metas, self._allocate(nbytes), own)
        self._turn = (self._turn + 1) % len(self._normal)
        return Bucket(metas, self._buffer(self._turn)[:nbytes], own)

    def staging_buffer(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] for messages of the bucket that was given out last; nbytes <= bucket_bytes."""
        if self._large:  # nobody uses the normal buffers
            return self._buffer(0)[:nbytes]
        if self._staging is None:
            self._staging = self._empty(nbytes)
        return self._staging[:nbytes]

    def wait_until_unused(self, but: int = 0) -> None:
        """Wait until at most `but` buckets are in use."""
        while self._in_use > but:
            self._in_use -= 1
            if self._used:
                self._used()

    def release(self) -> None:
        """Give the memory back; it is allocated again when it is needed."""
        self.wait_until_unused()
        self._normal, self._staging = [None] * len(self._normal), None

    def _empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _buffer(self, i: int) -> torch.Tensor:
        buffer = self._normal[i]
        if buffer is None:
            buffer = self._normal[i] = self._allocate(self.bucket_bytes)
        return buffer


def _gather(plans: list[BucketPlan], geometry: Geometry, buffers: Buffers, keeps: bool) -> Iterator[Bucket | None]:
    """Yield per bucket of this stage: the bucket on the leader; on a sender an empty one if it `keeps` one; or None."""
    largest = max((e.hf_bytes(geometry) for plan in plans for e in plan.entries), default=0)
    staging_bytes = min(largest, buffers.bucket_bytes)
    for plan in plans:
        yield _gather_one(plan, staging_bytes, geometry, buffers, keeps)  # nothing here holds it beyond that


def _gather_one(
    plan: BucketPlan, staging_bytes: int, geometry: Geometry, buffers: Buffers, keeps: bool
) -> Bucket | None:
    if not plan.gathers:
        return None
    rank, size = dist.get_rank(plan.group), dist.get_world_size(plan.group)
    if rank > 0:
        empty = buffers.bucket(plan.metas, own=False) if keeps else None
        _send(plan, rank, size, buffers.staging_buffer(staging_bytes), geometry)
        return empty
    bucket = buffers.bucket(plan.metas)
    tensors = dict(bucket.tensors)
    _place_own(plan, tensors, geometry)
    if size > 1:
        _receive(plan, tensors, size, buffers.staging_buffer(staging_bytes), geometry)
    return bucket


def _send(plan: BucketPlan, rank: int, size: int, staging: torch.Tensor, geometry: Geometry) -> None:
    """Send this rank's shards of a bucket to the leader."""
    for message in cut_messages(plan, rank, _share(staging, size), geometry):
        packed = _part_of(staging, sum(piece.nbytes for piece in message))
        pack(message, packed, geometry)
        for work in _post(dist.isend, {0: packed}, plan.group):
            work.wait()


def _place_own(plan: BucketPlan, tensors: dict[str, torch.Tensor], geometry: Geometry) -> None:
    """Write the leader's own shards into the full HF tensors of its bucket."""
    for entry in plan.shards_of(0):
        parts = unmerge(entry.place.row.kind, entry.shard, geometry)
        for name, part in zip(entry.place.hf_names, parts, strict=True):
            target = place(tensors[name], index_of(entry, 0, tuple(tensors[name].shape)), part)
            target.copy_(part[: len(target)])


def _receive(
    plan: BucketPlan, tensors: dict[str, torch.Tensor], size: int, staging: torch.Tensor, geometry: Geometry
) -> None:
    """Write the shards of all senders into the full HF tensors of the leader's bucket, message by message."""
    senders = range(1, size)
    for messages in zip_longest(*(cut_messages(plan, sender, _share(staging, size), geometry) for sender in senders)):
        arriving = {sender: message for sender, message in zip(senders, messages, strict=True) if message}
        sizes = [sum(piece.nbytes for piece in message) for message in arriving.values()]
        packed = dict(zip(arriving, torch.split(_part_of(staging, sum(sizes)), sizes), strict=True))
        for work in _post(dist.irecv, packed, plan.group):
            work.wait()
        for sender, message in arriving.items():
            _place(message, sender, packed[sender], tensors, geometry)


def _share(staging: torch.Tensor, size: int) -> int:
    """Return the bytes that one sender's message may have: those of all `size` - 1 senders share the staging buffer."""
    return len(staging) // (size - 1)


def _part_of(staging: torch.Tensor, nbytes: int) -> torch.Tensor:
    """Return uint8 [nbytes] of the staging buffer, or new memory where a single row is larger than the buffer."""
    return staging[:nbytes] if nbytes <= len(staging) else staging.new_empty(nbytes)


def _place(
    message: list[Piece], sender: int, packed: torch.Tensor, tensors: dict[str, torch.Tensor], geometry: Geometry
) -> None:
    """Write a message into the full HF tensors it is made of."""
    for piece, rows in zip(message, unpack(message, packed), strict=True):
        tensor = tensors[piece.entry.place.hf_names[piece.part]]
        target = place(tensor, index_of(piece.entry, sender, tuple(tensor.shape)), rows)
        target[piece.start : piece.stop].copy_(rows)


def _post(
    operation: Callable[..., object], tensors: dict[int, torch.Tensor], group: dist.ProcessGroup
) -> list[dist.Work]:
    """Start to send or receive, in one grouped call, a tensor to or from each rank of the group."""
    peers = {rank: dist.get_global_rank(group, rank) for rank in tensors}
    return dist.batch_isend_irecv([dist.P2POp(operation, t, peers[rank], group) for rank, t in tensors.items()])


def _broadcast(
    gathered: Iterator[Bucket | None],
    plans: list[BucketPlan],
    buffers: Buffers,
    layout: ParallelLayout,
    receivers: Receivers,
) -> Iterator[Bucket]:
    """Yield every bucket of every stage on the receivers, and on the leaders those of their stage."""
    stages: list[list[list[TensorMeta]]] = gather_objects([plan.metas for plan in plans], layout.pp.group)
    for stage, buckets in enumerate(stages):
        leader, group = layout.stage_leaders[stage], receivers.groups[stage]
        gets_all = layout.rank == leader or layout.rank in receivers.ranks
        for metas in buckets:
            bucket = next(gathered) if stage == layout.pp.rank else None
            if not gets_all:
                continue
            if bucket is None:
                bucket = buffers.bucket(metas, own=False)
            if group is not None:
                dist.broadcast(bucket.flat, src=leader, group=group)
            yield bucket
            del bucket
