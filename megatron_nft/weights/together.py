"""Errors that every rank must hear of, so that none waits in a collective that another has left."""

from __future__ import annotations

import torch.distributed as dist


def gather_objects(value: object, group: dist.ProcessGroup) -> list:
    """Every rank's value, in rank order. For small things only."""
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def describe(error: Exception | None, kind: type[Exception]) -> str | None:
    """The message that other ranks get to see; None without an error."""
    return None if error is None else str(error) if isinstance(error, kind) else f"{type(error).__name__}: {error}"


def raise_any(messages: list[str | None], kind: type[Exception], own: Exception | None) -> None:
    """Raise `kind` if any rank has a message (one entry per rank), each message once with its ranks."""
    ranks_by_message: dict[str, list[int]] = {}
    for rank, text in enumerate(messages):
        if text is not None:
            ranks_by_message.setdefault(text, []).append(rank)
    if ranks_by_message:
        parts = [f"{text} (rank {', '.join(map(str, ranks))})" for text, ranks in ranks_by_message.items()]
        raise kind("; ".join(parts)) from own


def raise_together(error: Exception | None, group: dist.ProcessGroup, kind: type[Exception]) -> None:
    """If a rank of `group` has an error, every rank raises `kind` with all of the messages; else nothing happens."""
    raise_any(gather_objects(describe(error, kind), group), kind, error)
