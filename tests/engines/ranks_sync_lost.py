"""Engines that die in the middle of a sync: args ENGINE URLS MODEL_A MODEL_B TP PP SUPERVISORS (their pids)."""

from __future__ import annotations

import os
import signal

import numpy as np
from processes import below
from ranks_sync import PROBE_IDS, Ranks, Session, World, run_checks, spoil
from ranks_sync import check_start as start

VICTIM = "model.layers.1.mlp.gate_proj.weight"


def check_start(ranks: Ranks) -> None:
    World.supervisors = [int(pid) for pid in ranks.args[6].split(",")]
    start(Ranks(ranks.rank, ranks.world_size, ranks.scratch, ranks.args[:6]))
    with Session(ranks) as session:
        assert session.push(0).engines == sorted(World.urls)


def kill_when_the_victim_passes(session: Session, number: int) -> None:
    """The leader that holds the victim ends server `number` with all its processes, in the middle of the stream."""

    def change(metas, flat):
        for pid in below(World.supervisors[number]):
            os.kill(pid, signal.SIGKILL)
        return metas

    spoil(session, VICTIM, change)


def sync_with_loss(ranks: Ranks, transport: str, lost: int, left: list[int]) -> None:
    with Session(ranks, transport=transport) as session:
        kill_when_the_victim_passes(session, lost)
        receipt = session.push(1)
        assert receipt.engines == sorted(World.urls[i] for i in left)
        assert World.urls[lost] in receipt.behind
        # each server that is left was checked, tensor by tensor, and gives the new model's log-probs
        assert receipt.engine_checked == len(receipt.checksums) * len(left)
        for i in left:
            found = session.engine.prompt_logprobs(PROBE_IDS, url=World.urls[i])
            assert np.abs(found - World.probes[1][1]).max() < 1e-4
    World.urls = [World.urls[i] for i in left]
    World.supervisors = [World.supervisors[i] for i in left]


def check_one_of_four_lost_over_files(ranks: Ranks) -> None:
    """It dies after files were written and before it reads them."""
    sync_with_loss(ranks, "disk", lost=3, left=[0, 1, 2])


def check_one_of_three_lost_over_shared_memory(ranks: Ranks) -> None:
    sync_with_loss(ranks, "tensor", lost=2, left=[0, 1])


def check_one_of_two_lost_over_a_group(ranks: Ranks) -> None:
    """The broadcast is torn for all; the stream is sent again to the one that is left."""
    sync_with_loss(ranks, "distributed", lost=1, left=[0])


if __name__ == "__main__":
    run_checks(globals())
