"""Live sync into a server without update sessions and without checksums on a CPU: args as of ranks_sync.py."""

from __future__ import annotations

import numpy as np
import pytest
from ranks_sync import PROBE_IDS, Ranks, Session, World, check_start, run_checks, spoil, sync_under_way

from megatron_nft.weights.transport import WeightSyncError


def check_the_probe_proves_each_version(ranks: Ranks) -> None:
    """B, A over every transport: the server gives no checksums, so its log-probs decide."""
    for transport in ("tensor", "distributed", "disk"):
        with Session(ranks, transport=transport) as session:
            assert not session.sync._transport._facts.sessions, "the server is not one of the older versions"
            for model in (1, 0):
                receipt = session.push(model)
                assert receipt.transport == transport and receipt.engines == World.urls and receipt.engine_checked == 0
                assert receipt.probe_difference < 1e-4
                found = session.engine.prompt_logprobs(PROBE_IDS, url=World.urls[0])
                assert np.abs(found - World.probes[model][1]).max() < 1e-4


def check_the_probe_finds_swapped_tensors(ranks: Ranks) -> None:
    """Keys and values have one shape, so nothing but what the model says betrays them."""
    k, v = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "kv")

    def swap(metas, flat):
        names = {k: v, v: k}
        return [type(m)(names.get(m.name, m.name), m.shape, m.dtype, m.start, m.end) for m in metas]

    with Session(ranks, transport="tensor") as session:
        spoil(session, k, swap)
        with pytest.raises(WeightSyncError, match=r"probe differ from the trainer's by"):
            session.push(1)
    with Session(ranks) as session:
        session.push(0)


def check_requests_in_flight(ranks: Ranks) -> None:
    sync_under_way(ranks, {"finish": 1, "abort": 0})
    refused = pytest.raises(WeightSyncError, match=r"sync\.in_flight=continue .* Allowed here: finish, abort")
    with Session(ranks, in_flight="continue") as session, refused:
        session.push(1)


if __name__ == "__main__":
    run_checks({"check_start": check_start, **globals()})
