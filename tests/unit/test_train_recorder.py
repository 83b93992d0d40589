"""Records that wait for the figures of an evaluation: each keeps its own seconds, and comes once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_nft.metrics import Metrics
from megatron_nft.train import recorder as module
from megatron_nft.train.recorder import Recorder


class Run:
    """One rank, whose clock the test moves."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.seconds, self.rows = 0.0, {}, []
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))
        sink = SimpleNamespace(write=lambda step, record: self.rows.append((step, record)))
        layout = SimpleNamespace(rank=0, world_size=1, world_gloo=None)
        phases = SimpleNamespace(take_seconds=self._take)
        self.recorder = Recorder([sink], phases, SimpleNamespace(take=dict), layout)

    def _take(self):
        seconds, self.seconds = self.seconds, {}
        return seconds

    def train(self, seconds: float) -> None:
        metrics = self.recorder.start_step()
        self.now += seconds
        self.seconds = {"train": seconds}
        metrics.sum("tokens/generated", 10)
        self.recorder.end_step(metrics)


def test_a_record_that_is_held_back_has_the_costs_of_its_own_step(monkeypatch):
    run = Run(monkeypatch)
    for step, seconds in ((1, 2.0), (2, 5.0)):
        run.train(seconds)
        run.recorder.hold(step)
    assert run.recorder.held_steps == [1, 2] and not run.recorder.has_unwritten
    run.train(10.0)
    for step, figures in ((1, {"eval/accuracy": 0.5}), (2, {})):
        run.recorder.write(step, figures)
    run.recorder.write(3, {})
    costs = [(step, row["seconds/train"], row["seconds/total"], row["tokens_per_s"]) for step, row in run.rows]
    assert costs == [(1, 2.0, 2.0, 5.0), (2, 5.0, 5.0, 2.0), (3, 10.0, 10.0, 1.0)]
    assert ["eval/accuracy" in row for _, row in run.rows] == [True, False, False]
    with pytest.raises(ValueError, match="no metrics of step 1"):
        run.recorder.write(1, {})


def test_a_checkpoint_takes_along_what_is_held_back_of_its_step(monkeypatch):
    run = Run(monkeypatch)
    run.train(2.0)
    run.recorder.hold(1)
    run.now += 30.0  # of a step that is given up
    row = Metrics.merge([run.recorder.snapshot(1)])
    assert row["seconds/total"] == 2.0
    assert run.recorder.held_steps == [1]
