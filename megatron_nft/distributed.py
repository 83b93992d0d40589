"""Objects and errors between ranks, over a gloo group of host memory.

Small facts go to everybody (`gather_objects`); samples go only where they are used (`route`), so no rank ever holds all
of them. Objects are pickled between ranks of one run, never to or from files.

Work that can fail on one rank while others go on to a collective is run by `run_everywhere`: a failure is raised on
every rank, so that none waits for one that has left.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def gather_objects(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's value, in rank order. For small things only. Without a group, this process is the only rank."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def any_of(flag: bool, group: dist.ProcessGroup) -> bool:
    """Whether the flag of any rank is set. Each rank sends one byte; all-gathers of gloo take a round trip per rank."""
    mine, is_first = torch.tensor([flag]), dist.get_rank(group) == 0
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))] if is_first else None
    dist.gather(mine, found, group=group, group_dst=0)
    if found is not None:
        mine = torch.stack(found).any().reshape(1)
    dist.broadcast(mine, group=group, group_src=0)
    return bool(mine.item())


def gather_to_first(value: T, group: dist.ProcessGroup) -> list[T] | None:
    """Every rank's value, in rank order, on the first rank of the group; None on the others."""
    is_first = dist.get_rank(group) == 0
    values: list[Any] | None = [None] * dist.get_world_size(group) if is_first else None
    dist.gather_object(value, values, group=group, group_dst=0)
    return values


def told_by_first(value: T, group: dist.ProcessGroup) -> T:
    """The value of the first rank of the group."""
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def run_everywhere(work: Callable[[], T], group: dist.ProcessGroup | None, kind: type[Exception], what: str = "") -> T:
    """Run `work` on every rank and return its result. If it fails on one, every rank raises `kind`. Collective.

    The message holds the errors of all ranks, after `what`.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    raise_together(error, group, kind, what)
    return result


def raise_together(
    error: Exception | None, group: dist.ProcessGroup | None, kind: type[Exception], what: str = ""
) -> None:
    """If any rank has an error, every rank raises `kind` with the messages of all, after `what`. Collective."""
    raise_any(gather_objects(describe_error(error, kind), group), kind, error, what)


def describe_error(error: Exception | None, kind: type[Exception]) -> str | None:
    """The message that other ranks get to see; None without an error. Errors that are not of `kind` name their type."""
    if error is None:
        return None
    return str(error) if isinstance(error, kind) else f"{type(error).__name__}: {error}"


def raise_any(messages: Sequence[str | None], kind: type[Exception], own: Exception | None, what: str = "") -> None:
    """Raise `kind` from `own` if any rank has a message (one entry per rank), each message once with its ranks."""
    ranks_by_message: dict[str, list[int]] = {}
    for rank, text in enumerate(messages):
        if text is not None:
            ranks_by_message.setdefault(text, []).append(rank)
    if ranks_by_message:
        parts = [f"{text} (rank {', '.join(map(str, ranks))})" for text, ranks in ranks_by_message.items()]
        raise kind(f"{what}: {'; '.join(parts)}" if what else "; ".join(parts)) from own


class CollectiveError(RuntimeError):
    """A collective that failed: a rank is gone, or cannot be reached."""


class NumbersUnderWay:
    """A few integers of every rank, gathered while the caller goes on with other work.

    All ranks start one, of the same length and in the same order as the group's other collectives. Without a group this
    process is the only rank.
    """

    def __init__(self, values: Sequence[int], group: dist.ProcessGroup | None) -> None:
        mine = torch.tensor(list(values))
        self._all, self._work = [mine], None
        if group is not None:
            self._all = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
            self._work = dist.all_gather(self._all, mine, group=group, async_op=True)

    @property
    def is_there(self) -> bool:
        """Whether `result` returns, or raises, at once."""
        return self._work is None or bool(self._work.is_completed())

    def result(self) -> list[list[int]]:
        """Wait for every rank's numbers, in rank order. CollectiveError where they do not come."""
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as e:
                raise CollectiveError(str(e)) from None
        return [numbers.tolist() for numbers in self._all]


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
    view = incoming.numpy().data
    items: list[Any] = []
    start = 0
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
