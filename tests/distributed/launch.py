"""Runs checks inside real torch.distributed ranks (gloo), one start for many checks.

A *rank script* holds functions `check_*(ranks)` and ends with `run_checks(globals())`. A *test module* turns each of
them into one pytest result:

    # tests/distributed/ranks_thing.py              # tests/distributed/test_thing.py
    from launch import Ranks, run_checks            from launch import distributed_checks
                                                    test_thing = distributed_checks("ranks_thing.py", world_size=2)
    def check_sum(ranks: Ranks) -> None:
        total = torch.tensor(float(ranks.rank))
        dist.all_reduce(total)
        assert total.item() == 1

    if __name__ == "__main__":
        run_checks(globals())

The script runs once, at the first of its tests, in `world_size` processes with the environment of torchrun. Every
check runs on all ranks, in the order of the file; it fails if it raises on any rank, with that rank's traceback. After
each check the ranks meet, so a rank that raised while the others wait in a collective ends the job after
`MEETING_TIMEOUT_S` and the remaining checks are reported as not run. `ranks.scratch` is a folder that all ranks share;
`ranks.args` are the strings given to `distributed_checks`. After `timeout_s` the process groups are killed.
"""

from __future__ import annotations

import ast
import datetime
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forkserver import ForkedProcess, ForkServer

from megatron_nft.processes import free_port

HERE = Path(__file__).resolve().parent
MEETING_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Ranks:
    """What a check knows of its surroundings."""

    rank: int
    world_size: int
    scratch: Path  # shared by all ranks of the job
    args: tuple[str, ...]


# --- inside the ranks -------------------------------------------------------------------------------------------------


def run_checks(namespace: dict[str, Any]) -> None:
    """Join the world, run every `check_*` of `namespace` in the order of definition, write one line per check."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    scratch = Path(os.environ["NFT_TEST_SCRATCH"])
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), scratch, tuple(sys.argv[1:]))
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    meeting = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=MEETING_TIMEOUT_S))
    with open(scratch / f"results-{ranks.rank}.jsonl", "w", buffering=1) as results:
        for name, check in list(namespace.items()):  # a warning adds its registry to them
            if not name.startswith("check_"):
                continue
            start, error = time.monotonic(), ""
            try:
                check(ranks)
            except Exception:
                error = traceback.format_exc()
            line = {"check": name, "error": error, "seconds": time.monotonic() - start}
            results.write(json.dumps(line) + "\n")
            dist.monitored_barrier(group=meeting, timeout=datetime.timedelta(seconds=MEETING_TIMEOUT_S))
    dist.destroy_process_group()


# --- inside pytest ----------------------------------------------------------------------------------------------------


def distributed_checks(script: str, world_size: int, args: tuple[str, ...] = (), timeout_s: float = 900.0) -> Callable:
    """A pytest function with one parameter per `check_*` of `script` (a file of this folder)."""
    import pytest

    path = HERE / script
    names = names_of(path)
    if not names:
        raise ValueError(f"{path} holds no function check_*(ranks)")
    finished: dict[str, dict[str, str]] = {}

    @pytest.mark.parametrize("check", names)
    def test(check: str) -> None:
        if not finished:
            finished["errors"] = launch(path, world_size, args, timeout_s)
        error = finished["errors"].get(check, finished["errors"].get("", "no rank reported this check"))
        if error:
            pytest.fail(error, pytrace=False)

    return test


def names_of(path: Path) -> list[str]:
    """The checks of a rank script, in order."""
    names = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    return [name for name in names if name.startswith("check_")]


def launch(path: Path, world_size: int, args: tuple[str, ...], timeout_s: float) -> dict[str, str]:
    """Run `path` on `world_size` ranks. Returns check -> error ("" is a pass); the key "" holds the end of the job's
    output for checks that some rank never finished."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        port = free_port()
        processes = [_start(path, rank, world_size, args, port, scratch) for rank in range(world_size)]
        deadline, late = time.monotonic() + timeout_s, False
        try:
            while any(p.poll() is None for p in processes):
                late = time.monotonic() > deadline
                if late or any(p.poll() not in (None, 0) for p in processes):
                    break
                time.sleep(0.05)
            _wait_briefly(processes, 0 if late else 30)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return collect(scratch, world_size, late, timeout_s, [p.returncode for p in processes])


_servers: list[ForkServer] = []


def fork_servers() -> list[ForkServer]:
    """The processes that ranks are forked from, started at the first call; they stay until pytest ends.

    Neighbouring ranks come from different ones. Each has a hash seed of its own, so that an order of collectives that
    is the order of a set shows as it does between ranks that are started one by one.
    """
    if not _servers:
        _servers.extend(ForkServer(_environment()) for _ in range(2))
    return _servers


def kept_running() -> set[int]:
    """Process ids of the fork servers, which are no leftovers of a test."""
    return {server.pid for server in _servers}


def _environment() -> dict[str, str]:
    """One thread in each rank; the helpers of tests/ and of this folder can be imported."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")])),
    }


def _start(path: Path, rank: int, world_size: int, args: tuple[str, ...], port: int, scratch: Path) -> ForkedProcess:
    env = _environment() | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NFT_TEST_SCRATCH": str(scratch),
    }
    servers = fork_servers()
    return servers[rank % len(servers)].start(path, args, env, scratch / f"log-{rank}.txt")


def _wait_briefly(processes: list[ForkedProcess], seconds: float) -> None:
    """Let ranks write their own errors after another rank has died."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        time.sleep(0.05)


def collect(scratch: Path, world_size: int, late: bool, timeout_s: float, codes: list[int]) -> dict[str, str]:
    """What `launch` returns, from what the ranks left in `scratch`: their results, and output in log-RANK.txt."""
    by_check: dict[str, dict[int, str]] = {}
    for rank in range(world_size):
        results = scratch / f"results-{rank}.jsonl"
        for line in results.read_text().splitlines() if results.exists() else []:
            entry = json.loads(line)
            by_check.setdefault(entry["check"], {})[rank] = entry["error"]
    logs = "\n".join(
        f"--- rank {rank} (exit code {codes[rank]}), end of its output ---\n"
        + (scratch / f"log-{rank}.txt").read_text(errors="replace")[-3000:]
        for rank in range(world_size)
    )
    reason = f"the job was killed after {timeout_s} s\n" if late else "the job ended before this check\n"
    errors = {"": reason + logs}
    for check, per_rank in by_check.items():
        failures = [f"rank {rank}:\n{error}" for rank, error in sorted(per_rank.items()) if error]
        if failures:
            errors[check] = "\n".join(failures)
        elif len(per_rank) == world_size:
            errors[check] = ""
    return errors
