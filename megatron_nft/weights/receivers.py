"""The ranks that get every bucket of an export, and the groups over which they get it."""

from __future__ import annotations

import datetime
from collections.abc import Collection
from dataclasses import dataclass

import torch.distributed as dist

from megatron_nft.policy.parallel import ParallelLayout


@dataclass(frozen=True, slots=True)
class Receivers:
    """Every rank of the world has the same."""

    ranks: frozenset[int]
    groups: tuple[dist.ProcessGroup | None, ...]
    """Of each pipeline stage: its leader and the receivers. None where the leader is alone, or the rank no member."""

    def close(self) -> None:
        """Leave the groups that were made for them."""
        for group in set(self.groups) - {None, dist.group.WORLD}:
            dist.destroy_process_group(group)


def everyone(layout: ParallelLayout) -> Receivers:
    """Return all ranks, over the group of the world."""
    group = dist.group.WORLD if layout.world_size > 1 else None
    return Receivers(frozenset(range(layout.world_size)), (group,) * layout.pp.size)


def nobody(layout: ParallelLayout) -> Receivers:
    """Return no ranks: a bucket stays with the leader that put it together."""
    return Receivers(frozenset(), (None,) * layout.pp.size)


def open_receivers(ranks: Collection[int], layout: ParallelLayout, timeout_s: float) -> Receivers:
    """Make the groups of these ranks, which is collective. Stages that need the same group share it.

    timeout_s: how long a rank waits for the others in it.
    """
    wanted = [frozenset({leader, *ranks}) for leader in layout.stage_leaders]
    made: dict[frozenset[int], dist.ProcessGroup | None] = {}
    for members in wanted:
        if members not in made:
            made[members] = _group(members, layout, timeout_s)
    return Receivers(frozenset(ranks), tuple(made[members] for members in wanted))


def _group(members: frozenset[int], layout: ParallelLayout, timeout_s: float) -> dist.ProcessGroup | None:
    if len(members) == 1:
        return None
    if len(members) == layout.world_size:
        return dist.group.WORLD
    group = dist.new_group(sorted(members), timeout=datetime.timedelta(seconds=timeout_s))
    return group if layout.rank in members else None
