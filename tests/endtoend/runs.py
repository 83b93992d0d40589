"""Small but whole training runs for tests: a random tiny model and a grader that it satisfies half of the time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from megatron_nft.data.synthetic import write_model, write_task

TESTS = Path(__file__).resolve().parents[1]
BENCHMARKS = TESTS.parent / "benchmarks"  # its server that only waits brings a grader
HALTING = Path(__file__).with_name("halting")
START_TIMEOUT_S = 900
KEYS = {name: f"secret-{name}" for name in ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY")}
"""Set for every run; no file of a run folder and no output may hold one."""


def make_start(folder: Path, *, layers: int = 2) -> dict:
    """Model and questions under `folder`; the settings of a run of five short steps."""
    train, held_out = write_task(folder / "task", num_train=64, num_held_out=6)
    copies = folder / "copies.jsonl"  # a file made for avg@2
    copies.write_text(held_out.read_text() * 2)
    model = write_model(folder / "model", layers=layers)
    # A random model seldom says the one end token: here a third of all tokens end an answer.
    generation = model / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": list(range(2, 260, 3))}))
    return {
        "run_dir": str(folder / "run"),
        "num_processes": 2,
        "model": {"path": str(model)},
        "policy": {"tensor_model_parallel_size": 2, "precision": "fp32", "micro_batch_tokens": 256},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "lr_warmup_steps": 2},
        "algorithm": {"loss_divisor": "tokens"},
        "data": {"train": [str(train)], "max_prompt_tokens": 16},
        "rollout": {"questions_per_batch": 8, "answers_per_question": 4, "max_response_tokens": 12},
        "verify": {"grader": "parity_grader.grade"},
        "train": {"num_steps": 5, "questions_per_step": 4, "questions_per_optimizer_step": 2, "stall_timeout_s": 400},
        "eval": {"data": [str(held_out), str(copies)], "every_steps": 2},
        "checkpoint": {"every_steps": 1, "keep": 2},
        "metrics": {"tensorboard": False},
    }


def merge(settings: dict, **changes: object) -> dict:
    """`settings` with dotted keys (double underscore for the dot) replaced."""
    out = json.loads(json.dumps(settings))
    for key, value in changes.items():
        *sections, last = key.split("__")
        at = out
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    return out


class Run:
    """A `megatron-nft train` process in a session of its own, its output in a file.

    `family` are all processes that were ever seen below it. `halt`, "2 evaluate" for example, is the step and the phase
    at which its ranks stop and wait for a signal (see halting/sitecustomize.py).
    """

    def __init__(
        self, settings: dict, *, halt: str = "", timeout_s: float = START_TIMEOUT_S, python: str = sys.executable
    ) -> None:
        self.run_dir = Path(settings["run_dir"])
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        config = self.run_dir.parent / f"{self.run_dir.name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        self.log = self.run_dir.parent / f"{self.run_dir.name}.log"
        self._timeout_s = timeout_s
        marks = self.run_dir.parent / f"{self.run_dir.name}-{halt.replace(' ', '-')}"
        self._go = Path(f"{marks}-go")
        self._marks = [Path(f"{marks}-{rank}") for rank in range(settings["num_processes"])]
        path = os.pathsep.join(filter(None, (str(HALTING), str(TESTS), str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, **KEYS, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        env |= {"NFT_TEST_HALT": f"{halt} {marks}"} if halt else {}
        with self.log.open("ab") as log:
            command = [python, "-m", "megatron_nft", "train", "--config", str(config)]
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        self.started = psutil.Process(self.process.pid)
        self.family: set[psutil.Process] = set()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """Exit status."""
        deadline = time.monotonic() + self._timeout_s
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the run did not end:\n{self.text}")
            self._look()
            time.sleep(0.1)
        return self.process.returncode

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds; AssertionError if the run ends before."""
        deadline = time.monotonic() + self._timeout_s
        while not condition():
            assert self.process.poll() is None, f"the run ended too early:\n{self.text}"
            assert time.monotonic() < deadline, f"waited too long:\n{self.text}"
            time.sleep(0.01)
        self._look()

    def wait_until_halted(self) -> None:
        """Until every rank has stopped where `halt` says."""
        self.wait_until(lambda: all(mark.exists() for mark in self._marks))

    def go_on(self) -> None:
        """Let ranks that have stopped there go on without a signal."""
        self._go.touch()

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family.update(self.started.children(recursive=True))

    def left_over(self) -> list[psutil.Process]:
        """Of an ended run: what it started and is alive a minute later. It must have been seen to start something."""
        assert self.process.poll() is not None and self.family
        deadline = time.monotonic() + 60
        while (alive := [p for p in self.family if is_alive(p)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return alive

    def kill(self) -> None:
        """SIGKILL to the command alone, as an out-of-memory killer would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def steps_done(self) -> int:
        """The newest step in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=-1)


def is_alive(process: psutil.Process) -> bool:
    """False for one that has ended and that nobody has collected."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def metrics_of(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds/", "sync/", "tokens_per_s")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]
