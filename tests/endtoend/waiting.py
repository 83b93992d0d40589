"""Servers that only wait (benchmarks/waiting_engine.py) in front of whole runs, and what their logs say of answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from megatron_nft.data.rollout_file import list_rollout_files, read_rollout_file
from runs import make_start, merge

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from gated_engine import HELD_OUT_TOKENS as HELD_OUT_TOKENS  # noqa: E402 (tests take it from here)
from waiting_engine import read_head, tokens_of  # noqa: E402

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


def popen(*command: str, **options: Any) -> subprocess.Popen:
    """Starts a command on this machine, as `rig.Host.start` does on a host."""
    return subprocess.Popen(command, **options)


class Server:
    """A server and its log. It outlives the runs that ask it; the log goes on where it is started again."""

    def __init__(
        self,
        log: Path,
        port: int,
        address: str = "127.0.0.1",
        *,
        popen: Callable[..., subprocess.Popen] = popen,
        script: Path = BENCHMARKS / "waiting_engine.py",
        **engine: float,
    ) -> None:
        """popen: starts it, `rig.Host.start` for example. engine: what differs from ENGINE."""
        self.log, self.url = log, f"http://{address}:{port}"
        self._settings, self._engine, self._popen = log.with_suffix(".settings.json"), engine, popen
        self._command = [sys.executable, str(script), f"--host={address}", f"--port={port}"]
        self._command += [f"--settings={self._settings}", f"--log={log}"]
        self.start()

    def start(self, **engine: float) -> None:
        """Start it, again where it has ended; engine: what differs from the last time."""
        self._engine |= engine
        self._settings.write_text(json.dumps(ENGINE | self._engine))
        path = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": path}
        self.process = self._popen(*self._command, stdout=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout.readline() == "ready\n"

    def requests(self) -> list[Logged]:
        """Requests that it has answered, or would have."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        return [logged(json.loads(line)) for line in lines if line.endswith("\n")]

    def post(self, path: str, **body: int) -> dict[str, Any]:
        return httpx.post(f"{self.url}/{path}", json=body, timeout=60, trust_env=False).json()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Logged:
    """A request as a server logged it."""

    input_ids: list[int]
    output_ids: list[int]
    logprobs: list[float]
    versions: list[int]  # of each token
    reason: str


def logged(entry: dict[str, Any]) -> Logged:
    """From a request's `input_ids` and SGLang's answer to it."""
    meta, ids = entry["meta_info"], entry.get("output_ids") or []
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": len(ids)}]
    versions = [int(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
    assert len(versions) == len(ids)
    logprobs = np.float32([value for value, *_ in meta.get("output_token_logprobs") or []]).tolist()
    return Logged(entry["input_ids"], ids, logprobs, versions, meta["finish_reason"]["type"])


def newest(requests: Iterable[Logged]) -> int:
    """The newest version that made a token; -1 where none did."""
    return max((version for request in requests for version in request.versions), default=-1)


def settings(tmp_path: Path, urls: list[str], steps: int) -> dict:
    """A run of rollout.mode=overlapped in front of such servers."""
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
        "server": {"urls": urls, "max_in_flight": 16},
    }
    return merge(
        {**start, "rollout": rollout},
        sync={"transport": "disk", "in_flight": "abort", "probe_tolerance": 1e9},
        train__num_steps=steps,
        verify__grader="waiting_engine.grade",
    )


def rows_of(run_dir: Path) -> list[dict]:
    """All answers that the run has written."""
    return [row for _, path in list_rollout_files(run_dir) for row in read_rollout_file(path).to_pylist()]


def check_draws(rows: list[dict], steps: int, *, per_step: int, answers: int) -> None:
    """Every answer of every question up to the last trained one is there once, and questions are trained in order."""
    draws: dict[int, dict[int, dict]] = {}
    for row in rows:
        of_draw = draws.setdefault(row["draw"], {})
        assert row["sample_index"] not in of_draw, "trained or dropped twice"
        of_draw[row["sample_index"]] = row
    assert all(sorted(of_draw) == list(range(answers)) for of_draw in draws.values())
    trained = {draw: of_draw[0]["step"] for draw, of_draw in draws.items() if of_draw[0]["fate"] == "trained"}
    assert [trained[draw] for draw in sorted(trained)] == [s for s in range(1, steps + 1) for _ in range(per_step)]
    assert set(range(max(trained) + 1)) <= set(draws), "a question was passed over"


def check_tokens(rows: list[dict]) -> None:
    """Every answer is one that a server began, whole and once."""
    serials = set()
    for row in rows:
        length, serial = read_head(row["response_ids"])
        assert row["response_ids"] == tokens_of(length, serial, END), "a token twice, or lost"
        assert row["finish_reason"] == "stop"
        assert serial not in serials, "one answer for two"
        serials.add(serial)


def check_versions(rows: list[dict], requests: Iterable[Logged], max_staleness: int) -> list[Logged]:
    """The version of every token is what the servers' logs say of the request that brought it, and is not too old.

    Returns those requests.
    """
    by_prompt: dict[tuple[int, ...], list[Logged]] = {}
    for request in requests:
        by_prompt.setdefault(tuple(request.input_ids), []).append(request)
    found = []
    for row in rows:
        spans = row["weight_version_spans"] or [[row["weight_version"], 0, len(row["response_ids"])]]
        assert [start for _, start, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
        assert all(0 <= row["step"] - 1 - version <= max_staleness for version, _, _ in spans), (row["step"], spans)
        told = [version for version, start, end in spans for _ in range(start, end)]
        parts = parts_of(row, by_prompt)
        assert told == [version for part in parts for version in part.versions], (spans, parts)
        assert parts[-1].reason == row["finish_reason"], "one that was aborted counts as ended"
        found += parts
    return found


def parts_of(row: dict, by_prompt: dict[tuple[int, ...], list[Logged]]) -> list[Logged]:
    """The requests that brought an answer, one after the other. Each went on where the one before ended, with all
    tokens until there. Log-probs tell it from others with the same tokens: of a server that was lost, say."""
    found: list[Logged] = []
    ids, logprobs, at = row["response_ids"], row["rollout_logprobs"], 0
    while at < len(ids):
        (one,) = (
            request
            for request in by_prompt.get(tuple(row["prompt_ids"] + ids[:at]), [])
            if (end := at + len(request.output_ids)) > at
            and request.output_ids == ids[at:end]
            and request.logprobs == logprobs[at:end]
        )
        found.append(one)
        at += len(one.output_ids)
    return found
