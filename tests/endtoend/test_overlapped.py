"""rollout.mode=overlapped against a server that outlives the trainer: what is drawn, generated and trained is exact,
however often the trainer is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from megatron_nft.data.rollout_file import list_rollout_files, read_rollout_file
from megatron_nft.processes import free_port
from runs import Run, make_start, merge, metrics_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from gated_engine import HELD_OUT_TOKENS  # noqa: E402
from waiting_engine import HEAD, read_head, tokens_of  # noqa: E402

END = 2
ENGINE = {
    "max_rows": 24,
    "weights_s": 0.04,  # of a token: the longest answers take longer than a step, and go on over syncs
    "context_s": 0.0,
    "row_s": 0.0,
    "overhead_s": 0.0,
    "prefill_s": 0.0,
    "mean_tokens": 40,
    "max_tokens": 90,
    "spread": 0.8,
    "seed": 0,
    "sync_s": 0.05,
    "sessions": True,
}


class Server:
    """The server, and the requests that it has answered."""

    def __init__(self, folder: Path, script: Path = BENCHMARKS / "waiting_engine.py") -> None:
        self.log, port = folder / "calls.jsonl", free_port()
        settings = folder / "engine.json"
        settings.write_text(json.dumps(ENGINE))
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(script), "--port", str(port)]
        command += ["--settings", str(settings), "--log", str(self.log)]
        path = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout.readline() == "ready\n"

    def calls(self) -> list[dict]:
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def post(self, path: str, **body: int) -> dict:
        return httpx.post(f"{self.url}/{path}", json=body, timeout=60, trust_env=False).json()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    yield made
    made.end()


@pytest.fixture
def gated(tmp_path):
    """A server that answers held-out questions only as far as the test lets it."""
    made = Server(tmp_path, Path(__file__).with_name("gated_engine.py"))
    yield made
    made.end()


def settings(tmp_path: Path, url: str, steps: int) -> dict:
    start = make_start(tmp_path)
    generation = Path(start["model"]["path"]) / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": END}))
    rollout = {
        "engine": "sglang",
        "mode": "overlapped",
        "max_staleness": 2,
        "max_response_tokens": 90,
        "answers_per_question": 4,
        "questions_per_batch": 64,
        "server": {"urls": [url], "max_in_flight": 16},
    }
    return merge(
        {**start, "rollout": rollout},
        sync={"transport": "disk", "in_flight": "abort", "probe_tolerance": 1e9},
        train__num_steps=steps,
        verify__grader="waiting_engine.grade",
    )


def check(run_dir: Path, server: Server, steps: int) -> None:
    rows = [row for _, path in list_rollout_files(run_dir) for row in read_rollout_file(path).to_pylist()]
    draws: dict[int, dict[int, dict]] = {}
    for row in rows:
        of_draw = draws.setdefault(row["draw"], {})
        assert row["sample_index"] not in of_draw, "trained or dropped twice"
        of_draw[row["sample_index"]] = row
    assert all(sorted(of_draw) == [0, 1, 2, 3] for of_draw in draws.values())
    trained = {draw: of_draw[0]["step"] for draw, of_draw in draws.items() if of_draw[0]["fate"] == "trained"}
    assert [trained[draw] for draw in sorted(trained)] == [s for s in range(1, steps + 1) for _ in range(4)]
    assert set(range(max(trained) + 1)) <= set(draws), "a question was passed over"
    serials = set()
    calls = server.calls()
    answered = {(call["serial"], call["end"]): call for call in calls if call["reason"] != "abort"}
    for row in rows:
        length, serial = read_head(row["response_ids"])
        expected = tokens_of(length, serial, END)[: len(row["response_ids"])]
        assert row["response_ids"] == expected, "a token twice, or lost"
        assert (row["finish_reason"] == "stop") == (len(expected) == length)
        assert serial not in serials, "one answer for two"
        serials.add(serial)
        last = answered[serial, len(expected)]  # it ended in a request that was answered as ended
        spans = row["weight_version_spans"] or [[row["weight_version"], 0, len(expected)]]
        assert all(0 <= row["step"] - 1 - version <= 2 for version, _, _ in spans)
        told = [v for call in calls if call["serial"] == serial for v in versions_of(call)]
        for version, start, end in spans:
            assert all((version, at) in told for at in range(start, end)), (spans, told)
        assert last["end"] == len(expected) >= HEAD


def versions_of(call: dict) -> list[tuple[int, int]]:
    """(version, position in the answer) of the tokens that a request brought, by the server's log."""
    return [
        (int(span["version"]), call["start"] + at)
        for span in call["versions"]
        for at in range(span["start"], span["end"])
    ]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments(server, tmp_path, kills):
    steps = 2 * kills
    made, chance = settings(tmp_path, server.url, steps), random.Random(kills)
    for _ in range(kills):
        run = Run(made)
        done, calls = run.steps_done(), len(server.calls()) + chance.randrange(5, 60)
        run.wait_until(lambda run=run, d=done, c=calls: run.steps_done() > d and len(server.calls()) > c)
        run.kill()
        assert run.left_over() == []
    run = Run(made)
    assert run.wait() == 0, run.text
    check(run.run_dir, server, steps)
    rows = metrics_of(run.run_dir)[1:]
    assert sum(row["answers/continued"] for row in rows) > 0
    assert any(call["start"] for call in server.calls()), "nothing went on from a prefix"
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
    return {row["step"] for _, path in list_rollout_files(run.run_dir) for row in read_rollout_file(path).to_pylist()}


def test_training_goes_on_during_an_evaluation_as_far_as_the_bound_admits(gated, tmp_path):
    """An evaluation every fourth step, of which the test lets through as much as it likes; max_staleness is 2. Then a
    kill in the middle of one, and a stop signal in the middle of another."""
    steps = 12
    made = merge(
        settings(tmp_path, gated.url, steps),
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
    check(run.run_dir, gated, steps)
    rows = metrics_of(run.run_dir)
    assert [row["step"] for row in rows] == list(range(steps + 1))
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 7, 8, 12]
    assert max(row["age/max"] for row in rows[1:]) == 2
    assert all(row["groups/too_old"] == 0 for row in rows[1:])


def every_figure(run: Run, name: str) -> list[float]:
    """Of steps 1, 2, and so on."""
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows[1:]]
