"""What a rank gives back at the end of a run."""

from __future__ import annotations

from types import SimpleNamespace

from megatron_nft.train.parts import Trainer


def test_every_part_is_closed_the_sync_after_the_engine():
    """Own servers are gone before the sync would ask them to leave a group; the log and the watch last longest."""
    closed = []
    names = ("engine", "sync", "verifier", "console", "phases")
    parts = {name: SimpleNamespace(close=lambda name=name: closed.append(name)) for name in (*names, "sink")}
    Trainer.close(SimpleNamespace(sinks=[parts.pop("sink")], **parts))
    assert closed == ["sink", *names]
