"""Answers that outlive a step, asked for through a router: two servers behind it, one of which dies and comes back."""

from __future__ import annotations

import pytest
from stand_in import interpreter
from waiting import Server, check_draws, check_tokens, check_versions, newest, rows_of, settings

from megatron_nft.processes import free_port
from runs import Run, merge, metrics_of

STEPS, APART = 10, 10_000


@pytest.fixture
def servers(tmp_path):
    made = [Server(tmp_path / f"{i}.jsonl", free_port(), first=i * APART, weights_s=0.02) for i in range(2)]
    yield made
    for server in made:
        server.close()


LONG = [
    pytest.param(mode, in_flight, marks=pytest.mark.long)
    for mode, in_flight in (("streaming", "finish"), ("overlapped", "continue"))
]


@pytest.mark.parametrize(("mode", "in_flight"), [("overlapped", "abort"), *LONG])
def test_answers_behind_a_router_outlive_steps(servers, tmp_path, mode, in_flight):
    config = merge(
        settings(tmp_path, [server.url for server in servers], STEPS),
        rollout__mode=mode,
        rollout__server__router=True,
        rollout__server__python=str(interpreter(tmp_path)),
        rollout__server__stall_timeout_s=4.0,  # they are looked at every half second
        sync__in_flight=in_flight,
    )
    run, (stays, dies) = Run(config), servers
    run.wait_until(lambda: run.steps_done() >= 1 and newest(dies.requests()) >= 1)
    dies.close()
    begun = run.steps_done()
    run.wait_until(lambda: run.steps_done() > begun)
    dies.start(first=2 * APART, version=-1)
    run.wait_until(lambda: newest(dies.requests()) > begun)
    assert run.wait() == 0, run.text
    assert run.left_over() == []
    rows, from_dead = rows_of(run.run_dir), dies.requests()
    check_draws(rows, STEPS, per_step=4, answers=4)
    check_tokens(rows)
    parts = check_versions(rows, stays.requests() + from_dead, max_staleness=2)
    versions = {version for part in parts if part in from_dead for version in part.versions}
    assert min(versions) <= begun < max(versions), "of before it died, and of after it"
    assert any(part not in from_dead for part in parts)
    assert sum(row["answers/continued"] for row in metrics_of(run.run_dir)[1:]) > 0
