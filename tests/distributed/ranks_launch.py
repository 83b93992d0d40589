"""Checks of the launcher itself: what a pass looks like from inside the ranks."""

import os

import torch
import torch.distributed as dist
from launch import Ranks, run_checks


def check_world(ranks: Ranks) -> None:
    assert dist.get_world_size() == ranks.world_size == int(os.environ["WORLD_SIZE"])
    assert dist.get_rank() == ranks.rank


def check_collective(ranks: Ranks) -> None:
    total = torch.tensor(float(ranks.rank + 1))
    dist.all_reduce(total)
    assert total.item() == ranks.world_size * (ranks.world_size + 1) / 2


def check_scratch_is_shared(ranks: Ranks) -> None:
    (ranks.scratch / f"seen-{ranks.rank}").touch()
    dist.barrier()
    assert len(list(ranks.scratch.glob("seen-*"))) == ranks.world_size


def check_arguments(ranks: Ranks) -> None:
    assert ranks.args == ("one", "two")


if __name__ == "__main__":
    run_checks(globals())
