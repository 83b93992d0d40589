"""Checks of the launcher itself: what a pass looks like from inside the ranks."""

import multiprocessing
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


def check_a_spawned_process_finds_the_functions_of_the_script(ranks: Ranks) -> None:
    """As if Python had been started for the script: megatron-core's checkpoints use such processes."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(twice, (ranks.rank,)) == 2 * ranks.rank


def twice(number: int) -> int:
    return 2 * number


def check_ranks_order_sets_differently(ranks: Ranks) -> None:
    if "PYTHONHASHSEED" not in os.environ:
        hashes: list = [None] * ranks.world_size
        dist.all_gather_object(hashes, hash("a text"))
        assert len(set(hashes)) == 2


if __name__ == "__main__":
    run_checks(globals())
