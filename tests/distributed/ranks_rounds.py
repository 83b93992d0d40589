"""Ranks that generate for different times: signals, servers that came back, and progress reach all of them."""

import datetime
import os
import signal
import time
from contextlib import contextmanager

import torch.distributed as dist
from launch import Ranks, run_checks

from megatron_nft.console import Console
from megatron_nft.distributed import CollectiveError, NumbersUnderWay, gather_objects
from megatron_nft.train.lifecycle import Interrupted, Lifecycle, Phases, StopSignals
from megatron_nft.train.rounds import MAX_TRIES, Rounds

LIMIT_S = 60.0


@contextmanager
def life(ranks: Ranks):
    opened = Lifecycle(Phases(ranks.rank, ranks.scratch, 600.0), StopSignals(), Console(ranks.rank))
    try:
        yield opened
    finally:
        opened.close()


def generate(rounds: Rounds, until, moved: bool = True) -> int:
    """Wait as an engine does until something is true; the signal that ended it, or 0."""
    deadline = time.monotonic() + LIMIT_S
    try:
        while not until():
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.05)
            rounds.on_wait(moved)
    except Interrupted as e:
        return e.signum
    return 0


def check_all_go_on_when_the_last_one_is_done(ranks: Ranks) -> None:
    with life(ranks) as mine:
        rounds = Rounds(mine, dist.group.WORLD)
        for _ in range(2):  # two batches of one phase
            marks = gather_objects(time.monotonic(), dist.group.WORLD)
            assert generate(rounds, lambda end=marks[0] + 1.5 * ranks.rank: time.monotonic() > end) == 0
            assert rounds.wait_for_all() == 0
            assert time.monotonic() >= marks[0] + 1.5 * (ranks.world_size - 1)


def check_a_signal_on_one_rank_ends_generation_on_all(ranks: Ranks) -> None:
    """Rank 0 has all its answers, rank 1 gets a signal, rank 2 would generate for ever."""
    with life(ranks) as mine:
        rounds = Rounds(mine, dist.group.WORLD)
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        signum = generate(rounds, lambda: ranks.rank == 0)
        assert signum == (0 if ranks.rank == 0 else signal.SIGUSR1)
        assert rounds.wait_for_all() == signal.SIGUSR1
        assert rounds.wait_for_all() == signal.SIGUSR1  # no rank waits for another one again


def check_servers_that_came_back_get_the_weights_while_answers_go_on(ranks: Ranks) -> None:
    """Rank 1 names one while rank 0 waits for the others; all ranks meet, and each goes on with what it did."""
    behind, brought = [], []

    def readmit(urls: list[str]) -> None:
        dist.barrier()  # the collectives of a weight sync
        brought.append(urls)
        behind.clear()

    with life(ranks) as mine:
        rounds = Rounds(mine, dist.group.WORLD, lambda: behind, readmit)
        if ranks.rank == 1:
            behind.append("http://h2:1")
        assert generate(rounds, lambda: ranks.rank == 0 or brought) == 0
        assert rounds.wait_for_all() == 0
    assert brought == [["http://h2:1"]]


def check_weights_are_brought_to_a_server_in_vain_only_so_often(ranks: Ranks) -> None:
    brought = []
    with life(ranks) as mine:
        named = ["http://h2:1"] if ranks.rank == 1 else []
        rounds = Rounds(mine, dist.group.WORLD, lambda: named, brought.append)
        rounds_before = gather_objects(time.monotonic(), dist.group.WORLD)[0]
        assert generate(rounds, lambda: time.monotonic() > rounds_before + MAX_TRIES + 3) == 0
        assert rounds.wait_for_all() == 0
    assert brought == [["http://h2:1"]] * MAX_TRIES


def check_progress_of_one_rank_keeps_the_watch_of_all_quiet(ranks: Ranks) -> None:
    with life(ranks) as mine:
        rounds = Rounds(mine, dist.group.WORLD)
        before = time.monotonic()
        mine.phases._last_progress = before - 100
        start = gather_objects(before, dist.group.WORLD)[0]
        assert generate(rounds, lambda: time.monotonic() > start + 3, moved=ranks.rank == 2) == 0
        assert rounds.wait_for_all() == 0
        assert mine.phases._last_progress > before


def check_no_progress_anywhere_is_none(ranks: Ranks) -> None:
    with life(ranks) as mine:
        rounds = Rounds(mine, dist.group.WORLD)
        start = gather_objects(time.monotonic(), dist.group.WORLD)[0]
        long_ago = mine.phases._last_progress = time.monotonic() - 100
        assert generate(rounds, lambda: time.monotonic() > start + 3, moved=False) == 0
        assert rounds.wait_for_all() == 0
        assert mine.phases._last_progress == long_ago


def check_numbers_that_do_not_come_are_a_failed_collective(ranks: Ranks) -> None:
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=3))
    if ranks.rank == 0:
        return
    try:
        NumbersUnderWay([ranks.rank], group).result()
        raise AssertionError("numbers came from a rank that sent none")
    except CollectiveError as e:
        assert str(e)


if __name__ == "__main__":
    run_checks(globals())
