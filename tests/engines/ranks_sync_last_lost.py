"""The only engine dies in the middle of a sync: args as of ranks_sync_lost.py, with one URL."""

from __future__ import annotations

import pytest
from ranks_sync import Ranks, Session, World, run_checks
from ranks_sync_lost import check_start, kill_when_the_victim_passes  # noqa: F401  check_start is run as well

from megatron_nft.weights.transport import WeightSyncError


def check_the_run_ends_and_says_which_is_behind(ranks: Ranks) -> None:
    with Session(ranks, transport="tensor") as session:
        kill_when_the_victim_passes(session, 0)
        with pytest.raises(WeightSyncError, match=f"no engine is left: {World.urls[0]}"):
            session.push(1)


if __name__ == "__main__":
    run_checks(globals())
