"""The record of a step: its metrics, the seconds and memory of its phases, and the sinks that it goes to."""

from __future__ import annotations

import time
from typing import Any

from megatron_nft.distributed import gather_objects, largest
from megatron_nft.metrics import JsonlSink, Metrics, Sink
from megatron_nft.policy.parallel import ParallelLayout
from megatron_nft.train import record
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.lifecycle import Phases
from megatron_nft.train.memory import PhaseMemory


class Recorder:
    """Keeps the metrics of complete steps until they are written: of the last one, and of those before it that wait for
    the figures of an evaluation beside the training.

    Between the two there may be a checkpoint, which takes them along (`snapshot`), so that a run that goes on from it
    can still write the record.
    """

    def __init__(self, sinks: list[Sink], phases: Phases, memory: PhaseMemory, layout: ParallelLayout) -> None:
        """`sinks`: those of the first rank, empty on others."""
        self._sinks, self._phases, self._memory, self._layout = sinks, phases, memory, layout
        self._clock = time.perf_counter()  # when seconds were added last
        self._unwritten: Metrics | None = None  # of the last complete step
        self._held: dict[int, Metrics] = {}  # by step, oldest first

    @property
    def has_unwritten(self) -> bool:
        """Whether the record of the last complete step is still to be written; the same on every rank."""
        return self._unwritten is not None

    @property
    def held_steps(self) -> list[int]:
        """Steps whose records are held back, oldest first; the same on every rank."""
        return list(self._held)

    def restore(self, state: RunState) -> None:
        """Take over what is known of `state.step`, if its record is still to be written: the record of step 0, or of a
        step whose run ended between checkpoint and record. Collective; the first rank holds what a checkpoint says of
        all ranks."""
        written = [s.last_step == state.step for s in self._sinks if isinstance(s, JsonlSink)]
        if largest(int(any(written)), self._layout.world_gloo) or (state.step and state.unwritten is None):
            return
        self._unwritten = Metrics(state.unwritten or {}) if self._layout.rank == 0 else Metrics()

    def start_step(self) -> Metrics:
        """Empty metrics for a new step, whose seconds count from now."""
        self._clock = time.perf_counter()
        return Metrics()

    def end_step(self, metrics: Metrics) -> None:
        """The step is complete; `metrics` wait to be written."""
        self._unwritten = metrics

    def snapshot(self, step: int) -> dict[str, Any] | None:
        """All ranks' unwritten metrics of `step` as one state, for its checkpoint; None where none wait. Collective."""
        metrics = self._held.get(step, self._unwritten)
        if metrics is None:
            return None
        if metrics is self._unwritten:
            self._add_costs(metrics, step)
        return Metrics(*gather_objects(metrics.state(), self._layout.world_gloo)).state()

    def hold(self, step: int) -> None:
        """Keep the record of `step`, the last complete one, until it is written; what comes now costs another step."""
        assert self._unwritten is not None, "a complete step has metrics"
        self._add_costs(self._unwritten, step)
        self._held[step], self._unwritten = self._unwritten, None

    def write(self, step: int, evaluation: dict[str, float]) -> dict[str, Any]:
        """Write the record of `step` to every sink and return it; empty on all ranks but the first. Collective.

        ValueError where nothing waits to be written.
        """
        metrics = self._held.pop(step, None)
        if metrics is None:
            metrics, self._unwritten = self._unwritten, None
            if metrics is None:
                raise ValueError(f"no metrics of step {step} are waiting to be written")
            self._add_costs(metrics, step)
        states = gather_objects(metrics.state(), self._layout.world_gloo)
        if self._layout.rank != 0:
            return {}
        merged: dict[str, Any] = {**Metrics.merge(states), **evaluation}
        if step:
            merged["tokens_per_s"] = merged.get("tokens/generated", 0.0) / merged["seconds/total"]
        for sink in self._sinks:
            sink.write(step, merged)
        return merged

    def _add_costs(self, metrics: Metrics, step: int) -> None:
        """Seconds and memory since the last call. Seconds are those that the first rank saw."""
        record.add_memory(metrics, self._memory.take())
        now = time.perf_counter()
        if self._layout.rank == 0:
            record.add_seconds(metrics, self._phases.take_seconds(), now - self._clock if step else 0.0)
        self._clock = now
