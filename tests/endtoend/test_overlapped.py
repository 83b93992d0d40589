"""rollout.mode=overlapped against a server that outlives the trainer: what is drawn, generated and trained is exact,
however often the trainer is killed."""

from __future__ import annotations

import random

import pytest
from waiting import Server, check_draws, check_tokens, check_versions, rows_of, settings

from megatron_nft.processes import free_port
from runs import Run, metrics_of


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "requests.jsonl", free_port())
    yield made
    made.close()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments(server, tmp_path, kills):
    steps = 2 * kills
    made, chance = settings(tmp_path, [server.url], steps), random.Random(kills)
    for _ in range(kills):
        run = Run(made)
        done, requests = run.steps_done(), len(server.requests()) + chance.randrange(5, 60)
        run.wait_until(lambda run=run, d=done, r=requests: run.steps_done() > d and len(server.requests()) > r)
        run.kill()
        assert run.left_over() == []
    run = Run(made)
    assert run.wait() == 0, run.text
    rows = rows_of(run.run_dir)
    check_draws(rows, steps, per_step=4, answers=4)
    check_tokens(rows)
    check_versions(rows, server.requests(), max_staleness=2)
    metrics = metrics_of(run.run_dir)[1:]
    assert sum(row["answers/continued"] for row in metrics) > 0
    assert max(row["age/max"] for row in metrics) == 2
    assert all("eval/accuracy" in row for row in metrics if row["step"] % 2 == 0)  # asked beside training questions
