"""Host-side objects between ranks, over a gloo group of the whole world.

Small facts go to everybody (`gather`); samples go only where they are used (`route`), so no rank ever holds all of
them. Objects are pickled between ranks of one run, never to or from files.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist


def gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's value, in rank order. For small things only."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def largest(value: int, group: dist.ProcessGroup) -> int:
    """The largest of every rank's values."""
    t = torch.tensor([value])
    dist.all_reduce(t, op=dist.ReduceOp.MAX, group=group)
    return int(t.item())


def route(outgoing: Mapping[int, Sequence[Any]], group: dist.ProcessGroup) -> list[Any]:
    """Send `outgoing[rank]` to each rank and return what came, ordered by sender and then as sent.

    One all-to-all of sizes and one of bytes: a rank holds its own outgoing and incoming items, nobody else's. The same
    items for several ranks (those of a replica) are pickled once.
    """
    world = dist.get_world_size(group)
    payloads = _pickled(outgoing, world)
    send_sizes = torch.tensor([len(p) for p in payloads])
    receive_sizes = torch.empty_like(send_sizes)
    dist.all_to_all_single(receive_sizes, send_sizes, group=group)
    incoming = torch.empty(int(receive_sizes.sum()), dtype=torch.uint8)
    dist.all_to_all_single(
        incoming,
        torch.frombuffer(bytearray(b"".join(payloads)), dtype=torch.uint8),
        receive_sizes.tolist(),
        send_sizes.tolist(),
        group=group,
    )
    view = memoryview(incoming.numpy())
    items, start = [], 0
    for size in receive_sizes.tolist():
        items += pickle.loads(view[start : start + size])
        start += size
    return items


def _pickled(outgoing: Mapping[int, Sequence[Any]], world: int) -> list[bytes]:
    known: dict[tuple[int, ...], bytes] = {}
    payloads = []
    for r in range(world):
        items = outgoing.get(r, ())
        key = tuple(map(id, items))
        if key not in known:
            known[key] = pickle.dumps(list(items), protocol=5)
        payloads.append(known[key])
    return payloads
