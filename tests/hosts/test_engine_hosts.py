"""rollout.mode=overlapped with engines on hosts of their own, one of which is lost and comes back: every token has the
version that the engines' own logs give it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from processes import wait_until
from rig import Host, Rig, missing_reason
from torchruns import environment
from waiting import (
    BENCHMARKS,
    Server,
    check_draws,
    check_tokens,
    check_versions,
    newest,
    rows_of,
    settings,
)

from runs import merge, metrics_of

STEPS, PORT, WAIT_S = 10, 15700, 900.0
APART = 10_000  # answers and requests of different servers, and of different starts, have numbers this far apart


@pytest.fixture
def three_hosts() -> Iterator[list[Host]]:
    """The trainer's and two engines'. Skips, with the reason, where they cannot be made."""
    if reason := missing_reason():
        pytest.skip(reason)
    with Rig(3) as rig:
        yield rig.hosts


class Trainer:
    """A run on one host, with its output in a file."""

    def __init__(self, host: Host, config: dict) -> None:
        self.run_dir = Path(config["run_dir"])
        self.log = self.run_dir.with_suffix(".log")
        path = self.run_dir.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(config))
        env = environment()
        env["PYTHONPATH"] += f":{BENCHMARKS}"
        command = (sys.executable, "-m", "megatron_nft", "train", "--config", path)
        with self.log.open("wb") as log:
            self.process = host.start(*command, env=env, stdout=log, stderr=subprocess.STDOUT)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def steps_done(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return len(path.read_text().splitlines()) - 1 if path.exists() else -1

    def wait_until(self, condition, what: str) -> None:
        """Until `condition` holds; AssertionError if the run ends before."""
        wait_until(lambda: self.process.poll() is not None or condition(), WAIT_S, what)
        assert self.process.poll() is None, f"the run ended before {what}:\n{self.text}"


@pytest.mark.parametrize(
    ("loss", "in_flight"), [("cable", "abort"), pytest.param("power", "continue", marks=pytest.mark.long)]
)
def test_an_engine_host_is_lost_and_comes_back(three_hosts, tmp_path, loss, in_flight):
    """Without its cable it keeps its server, which goes on with what it has, under old weights; without power it comes
    back with a new server, which has none. Its answers are made by the other one meanwhile."""
    first, *engines = three_hosts
    near, lost = (
        Server(tmp_path / f"{host.name}.jsonl", PORT, host.address, popen=host.start, first=i * APART, weights_s=0.02)
        for i, host in enumerate(engines)
    )
    config = merge(
        settings(tmp_path, [near.url, lost.url], STEPS),
        rollout__server__stall_timeout_s=8.0,
        rollout__server__max_retries=8,
        sync__in_flight=in_flight,
        sync__timeout_s=15.0,
    )
    trainer = Trainer(first, config)
    trainer.wait_until(lambda: trainer.steps_done() >= 2 and newest(lost.requests()) >= 1, "both had answered")
    begun = trainer.steps_done()
    engines[1].cut()
    if loss == "power":
        engines[1].kill()
        lost.process.wait()
        lost.start(first=2 * APART, version=-1)
    # Whatever was on its way in the first of these steps, the other one was made without the host.
    trainer.wait_until(lambda: trainer.steps_done() >= begun + 2, "it went on without the host")
    assert newest(lost.requests()) <= begun + 1
    engines[1].heal()
    trainer.wait_until(lambda: newest(lost.requests()) >= begun + 2, "the host answered again")
    assert trainer.process.wait(WAIT_S) == 0, trainer.text

    rows, from_lost = rows_of(trainer.run_dir), lost.requests()
    check_draws(rows, STEPS, per_step=4, answers=4)
    check_tokens(rows)
    parts = check_versions(rows, near.requests() + from_lost, max_staleness=2)
    versions = {version for part in parts if part in from_lost for version in part.versions}
    assert min(versions) <= begun < begun + 2 <= max(versions), "of before the loss, and of after it"
    assert any(len(set(part.versions)) > 1 for part in parts) == (in_flight == "continue")
    metrics = metrics_of(trainer.run_dir)[1:]
    assert len(metrics) == STEPS and sum(row["answers/continued"] for row in metrics) > 0
    receipts = [json.loads(path.read_text()) for path in (trainer.run_dir / "sync").glob("version_*.json")]
    behind = {receipt["version"] for receipt in receipts if lost.url in receipt["behind"]}
    assert begun + 2 in behind and not any(near.url in receipt["behind"] for receipt in receipts)
    assert first.processes() == {}
