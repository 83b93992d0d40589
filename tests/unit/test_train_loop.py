"""Parts of the loop that need no ranks: the bound on skipped steps, the order of updates, taking turns with memory."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nft.policy.policy import StepReport
from megatron_nft.train import loop, sync
from megatron_nft.train.lifecycle import Phases
from megatron_nft.train.parts import Closer
from megatron_nft.train.schedule import StepPlan, optimizer_steps


def outcome(skipped: bool) -> StepReport:
    return StepReport(0.1, 1.0, 1e-6, skipped, "the gradient holds NaN" if skipped else "", 4)


def count(outcomes: list[bool], limit: int) -> list[int]:
    """Skipped in a row after each of the optimizer steps; `outcomes[i]` says whether step i was skipped."""
    skipped, counts = 0, []
    for one in outcomes:
        skipped = loop.count_skipped(skipped, outcome(one), limit, lambda: 4)
        counts.append(skipped)
    return counts


def test_skipped_steps_are_counted_and_a_good_one_starts_the_count_anew():
    assert count([True, True, False, True, True], limit=2) == [1, 2, 0, 1, 2]


def test_too_many_skipped_steps_in_a_row_end_the_run():
    with pytest.raises(
        loop.TrainingFailure, match=r"3 optimizer steps in a row were skipped \(the gradient holds NaN\).*step 4"
    ):
        count([False, True, True, True, False], limit=2)


def test_without_a_checkpoint_the_error_says_so():
    with pytest.raises(loop.TrainingFailure, match="no checkpoint was saved yet"):
        loop.count_skipped(0, outcome(True), 0, lambda: 0)


PLAN = StepPlan(({(0, 0): 0, (0, 1): 1}, {(1, 0): 0}, {(2, 0): 1, (2, 1): 1}), (5, 6, 7), {}, ())
SAMPLES = {key: key for part in PLAN.optimizer_steps for key in part}  # their keys stand in for samples here


def updates(replica: int, epochs: int, seed: tuple[int, int] = (0, 3)) -> list[tuple[list, int, int]]:
    return list(optimizer_steps(PLAN, SAMPLES, epochs, replica, seed=seed))


def test_a_replica_gets_its_samples_and_the_tokens_and_answers_of_all():
    assert updates(0, 1) == [([(0, 0)], 5, 2), ([(1, 0)], 6, 1), ([], 7, 2)]
    assert updates(1, 1) == [([(0, 1)], 5, 2), ([], 6, 1), ([(2, 0), (2, 1)], 7, 2)]


def test_every_epoch_trains_every_update_in_an_order_of_its_own():
    by_epoch = [[tokens for _, tokens, _ in updates(1, 8)][start : start + 3] for start in range(0, 24, 3)]
    assert all(sorted(tokens) == [5, 6, 7] for tokens in by_epoch)
    assert by_epoch[0] == [5, 6, 7]
    for epoch in range(1, 8):
        expected = np.random.default_rng([0, 3, epoch]).permutation(3)
        assert by_epoch[epoch] == [(5, 6, 7)[i] for i in expected]
    assert len({tuple(tokens) for tokens in by_epoch}) > 1


def test_replicas_agree_on_the_order():
    assert [t for _, t, _ in updates(0, 5)] == [t for _, t, _ in updates(1, 5)]


class Layout:
    """One rank of several: what the barrier is given."""

    world_gloo = None


class Engine:
    """Notes what it is told."""

    def __init__(self, calls: list[str], shares_memory: bool) -> None:
        self.calls, self.shares_memory, self.memory_released = calls, shares_memory, False

    def release_memory(self) -> None:
        if self.shares_memory:
            self.calls.append("release")
            self.memory_released = True

    def resume_memory(self) -> None:
        self.calls.append("resume")
        self.memory_released = False


@pytest.mark.parametrize(
    ("shares_memory", "expected"),
    [(False, []), (True, ["release", "all ranks", "free", "all ranks", "resume"])],
)
def test_only_an_engine_that_was_released_is_resumed(monkeypatch, shares_memory, expected):
    calls: list[str] = []
    monkeypatch.setattr(sync, "barrier", lambda group: calls.append("all ranks"))
    monkeypatch.setattr(sync, "release_unused", lambda: calls.append("free"))
    engine = Engine(calls, shares_memory)
    sync.resume_engine(engine, Layout)
    sync.release_engine(engine, Layout)
    sync.resume_engine(engine, Layout)
    sync.resume_engine(engine, Layout)
    assert calls == expected


class Part:
    """Notes when it is closed, and may fail at it."""

    def __init__(self, name: str, closed: list[str], fails: bool = False) -> None:
        self.name, self.closed, self.fails = name, closed, fails

    def close(self) -> None:
        self.closed.append(self.name)
        if self.fails:
            raise OSError("no space left")


def close(tmp_path, failing: str = "", error: Exception | None = None) -> list[str]:
    """The order in which parts are closed that were opened as `open_parts` opens them."""
    closed: list[str] = []
    phases = Phases(3, tmp_path, 600.0)
    sink, verifier, engine, sync = (Part(n, closed, n == failing) for n in ("sink", "verifier", "engine", "sync"))
    try:
        with Closer(phases) as closer:
            for part in (sink, verifier, engine):
                closer.add(part)
            closer.add(sync, after=engine)
            if error is not None:
                raise error
    finally:
        phases.close()
    return closed


def test_every_part_is_closed_the_sync_after_the_engine(tmp_path):
    """Own servers are gone before the sync would ask them to leave a group; the log lasts longest."""
    assert close(tmp_path) == ["engine", "sync", "verifier", "sink"]


@pytest.mark.parametrize("failing", ["engine", "sync", "verifier"])
def test_a_part_that_cannot_be_closed_keeps_no_other_open(tmp_path, capsys, failing):
    assert close(tmp_path, failing) == ["engine", "sync", "verifier", "sink"]
    assert "rank 3 on " in (said := capsys.readouterr().err) and "while closing: OSError: no space left" in said


def test_what_failed_is_not_hidden_by_the_closing(tmp_path):
    with pytest.raises(KeyError, match="weights"):
        close(tmp_path, "engine", KeyError("weights"))
