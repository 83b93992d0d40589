"""rollout.mode=overlapped against a server that outlives the trainer: what is drawn, generated and trained is exact,
however often the trainer is killed."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from waiting import HELD_OUT_TOKENS, Server, check_draws, check_tokens, check_versions, rows_of, settings

from megatron_nft.processes import free_port
from runs import Run, merge, metrics_of


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "requests.jsonl", free_port())
    yield made
    made.close()


@pytest.fixture
def gated(tmp_path):
    """A server that answers held-out questions only as far as the test lets it."""
    script = Path(__file__).with_name("gated_engine.py")
    made = Server(tmp_path / "requests.jsonl", free_port(), script=script)
    yield made
    made.close()


def check(run: Run, server: Server, steps: int) -> int:
    """How many answers went on from a prefix."""
    rows = rows_of(run.run_dir)
    check_draws(rows, steps, per_step=4, answers=4)
    check_tokens(rows)
    return len(check_versions(rows, server.requests(), max_staleness=2)) - len(rows)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments(server, tmp_path, kills):
    steps = 2 * kills
    made = settings(tmp_path, [server.url], steps)
    chance = random.Random(kills)
    for _ in range(kills):
        run = Run(made)
        done, requests = run.steps_done(), len(server.requests()) + chance.randrange(5, 60)
        run.wait_until(lambda run=run, d=done, r=requests: run.steps_done() > d and len(server.requests()) > r)
        run.kill()
        assert run.left_over() == []
    run = Run(made)
    assert run.wait() == 0, run.text
    assert check(run, server, steps) > 0
    rows = metrics_of(run.run_dir)[1:]
    assert sum(row["answers/continued"] for row in rows) > 0
    assert max(row["age/max"] for row in rows) == 2
    assert all("eval/accuracy" in row for row in rows if row["step"] % 2 == 0)  # asked beside the training questions


HELD_OUT = 6 + 12  # questions of the two files


def wait_in_phase(run: Run, step: int, phase: str) -> None:
    """Until every rank is in the phase of the step."""

    def place(rank: int) -> tuple[int, str] | None:
        path = run.run_dir / "ranks" / f"rank_{rank:05d}.json"
        told = json.loads(path.read_text()) if path.exists() else None
        return (told["step"], told["phase"]) if told and not told["between"] else None

    run.wait_until(lambda: {place(rank) for rank in range(2)} == {(step, phase)})


def versions_synced(run: Run) -> list[int]:
    return sorted(int(path.stem.split("_")[1]) for path in (run.run_dir / "sync").glob("version_*.json"))


def checkpoints(run: Run) -> list[int]:
    return sorted(int(path.name.split("_")[1]) for path in (run.run_dir / "checkpoints").glob("step_??????"))


def trained_steps(run: Run) -> set[int]:
    return {row["step"] for row in rows_of(run.run_dir)}


def test_training_goes_on_during_an_evaluation_as_far_as_the_bound_admits(gated, tmp_path):
    """An evaluation every fourth step, of which the test lets through as much as it likes; max_staleness is 2. Then a
    kill in the middle of one, and a stop signal in the middle of another."""
    steps = 12
    made = merge(
        settings(tmp_path, [gated.url], steps),
        eval__every_steps=4,
        eval__max_response_tokens=HELD_OUT_TOKENS,
        checkpoint__every_steps=1,
        checkpoint__keep=20,
        checkpoint__asynchronous=False,
    )
    run = Run(made)
    wait_in_phase(run, 3, "evaluate_wait")
    assert trained_steps(run) == {1, 2, 3} and versions_synced(run) == [0]
    run.wait_until(lambda: gated.post("held_out") == {"waiting": HELD_OUT, "versions": []})
    assert run.steps_done() == -1 and checkpoints(run) == []
    gated.post("allow", count=HELD_OUT)
    wait_in_phase(run, 7, "evaluate_wait")  # the evaluation of step 4 is under way
    run.wait_until(lambda: gated.post("held_out")["waiting"] == HELD_OUT)
    assert gated.post("held_out")["versions"] == [0] * HELD_OUT
    assert versions_synced(run) == [0, 3, 4] and checkpoints(run) == [3, 4]
    rows = metrics_of(run.run_dir)
    assert ["eval/accuracy" in row for row in rows] == [True, False, False, False]
    assert every_figure(run, "sync/put_off") == [1, 1, 0]
    assert every_figure(run, "seconds/evaluate_wait")[2] > 0
    assert trained_steps(run) == set(range(1, 8))

    run.kill()
    assert run.left_over() == []
    gated.post("allow", count=HELD_OUT)  # for the requests of the run that is gone
    shutil.rmtree(run.run_dir / "ranks")
    run = Run(made)
    wait_in_phase(run, 7, "evaluate_wait")
    assert metrics_of(run.run_dir)[-1]["step"] == 3  # the evaluation of step 4 is done again
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, run.text
    assert checkpoints(run)[-1] == 7
    rows = metrics_of(run.run_dir)
    assert [row["step"] for row in rows] == list(range(7))  # that of step 7 is in the checkpoint
    assert "eval/accuracy" not in rows[4]

    gated.post("allow", count=10**6)
    run = Run(made)
    assert run.wait() == 0, run.text
    check(run, gated, steps)
    rows = metrics_of(run.run_dir)
    assert [row["step"] for row in rows] == list(range(steps + 1))
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 7, 8, 12]
    assert max(row["age/max"] for row in rows[1:]) == 2
    assert all(row["groups/too_old"] == 0 for row in rows[1:])


def every_figure(run: Run, name: str) -> list[float]:
    """Of steps 1, 2, and so on."""
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows[1:]]
