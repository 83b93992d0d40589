"""Signals, phases, and the watch that ends a stalled rank with its stacks on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from processes import alive, wait_until

from megatron_nft.distributed import CollectiveError
from megatron_nft.processes import clean_environment
from megatron_nft.train import launch, lifecycle
from megatron_nft.train.lifecycle import Interrupted, Phases, StopSignals
from megatron_nft.train.rank import _explain
from megatron_nft.train.whereabouts import Board, Whereabouts, who_is_missing

STALL = """
import sys, threading, time
from pathlib import Path
from megatron_nft.train.lifecycle import Phases
def waits_for_a_peer():
    print("waits", flush=True)
    time.sleep(600)
phases = Phases(int(sys.argv[2]), Path(sys.argv[1]), float(sys.argv[3]))
phases.step = 7
with phases("logprobs"):
    waits_for_a_peer()
"""


@contextmanager
def stalling(*arguments):
    """A process that runs STALL."""
    command = [sys.executable, "-c", STALL, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_stalled_rank_writes_all_stacks_and_ends(tmp_path):
    with stalling(tmp_path, "4", "600") as other:
        assert other.stdout.readline() == "waits\n"  # it obeys requests that come after its start
        with stalling(tmp_path, "3", "1.5") as stalled:
            said = stalled.communicate(timeout=300)[1]
        assert stalled.returncode == 1
        assert "rank 3 on " in said and "step 7, phase logprobs: no progress for" in said
        assert other.wait(timeout=200) == 1, "the rank that was not stalled itself must end too"
    for rank in (3, 4):
        text = (tmp_path / "stacks" / f"rank_{rank:05d}.txt").read_text()
        assert f"rank {rank}" in text and "waits_for_a_peer" in text


def test_each_phase_has_its_own_limit(tmp_path):
    """A limit of 1.5 s for one phase: the other one, with the general limit of 600 s, lasts longer in peace."""
    program = """
import sys, time
from pathlib import Path
from megatron_nft.train.lifecycle import Phases
phases = Phases(0, Path(sys.argv[1]), 600.0, {"sync": 1.5})
with phases("checkpoint"):
    time.sleep(4)
with phases("sync"):
    time.sleep(600)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "phase sync: no progress for" in done.stderr and "limit 1.5 s" in done.stderr


def test_a_failed_collective_is_told_with_the_rank_that_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    first, second, third = (Phases(rank, tmp_path, 600.0) for rank in range(3))
    first.step = second.step = 5
    for phases in (first, third):
        phases.ended("")  # alive: their files are there
    assert third.lost(timed_out=False, patience_s=0.0) == ""
    with pytest.raises(MemoryError), first("train"):
        raise MemoryError
    _explain(MemoryError("no room for 3 GiB"), first)
    _explain(CollectiveError("Connection closed by peer"), second)
    _explain(CollectiveError("Connection closed by peer"), third)
    for phases in (first, second, third):
        phases.close()
    host = os.uname().nodename
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-nft: ")]
    assert lines[0] == f"megatron-nft: rank 0 on {host}, step 5, phase train: MemoryError: no room for 3 GiB"
    for rank, line in ((1, lines[1]), (2, lines[2])):
        assert line.startswith(f"megatron-nft: rank {rank} on {host}")
        assert (
            f"lost the connection to another rank, rank 0 on {host} ended in phase train, step 5: MemoryError" in line
        )


def test_a_collective_that_timed_out_is_told_with_the_rank_that_is_late(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    first, second = (Phases(rank, tmp_path, 600.0) for rank in range(2))
    first.step = second.step = 5
    with first("train"):
        first.ended("")  # alive, and its file is there
        with pytest.raises(CollectiveError), second("sync"):
            raise CollectiveError
        second.ended("")
        _explain(CollectiveError("Timed out waiting 45000ms for recv operation to complete"), second)
    for phases in (first, second):
        phases.close()
    host = os.uname().nodename
    (said,) = capsys.readouterr().err.splitlines()
    late = f"rank 0 on {host} has not entered phase sync: it is in phase train of step 5, without progress for "
    assert f"step 5, phase sync: CollectiveError: lost the connection to another rank, {late}" in said


def at(rank: int, phase: str, step: int = 7, **more) -> Whereabouts:
    return Whereabouts(rank, f"h{1 + rank // 2}", step, phase, quiet_s=60.0 + rank, **more)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (
            [at(0, "sync"), at(1, "sync"), at(2, "sync"), at(3, "train")],
            "rank 3 on h2 has not entered phase sync: it is in phase train of step 7, without progress for 63 s. "
            "The 3 others have waited for 62 s in it",
        ),
        (
            [at(0, "sync", between=True), at(1, "generate", 8)],
            "rank 0 on h1 has not entered phase generate: it is after phase sync of step 7, without progress for 60 s. "
            "The other one has waited for 61 s in it",
        ),
        (
            [at(0, "generate", waits=True), at(1, "generate"), at(2, "generate", waits=True)],
            "rank 1 on h1 has not finished phase generate: it is in phase generate of step 7, without progress for "
            "61 s. The 2 others have waited for 62 s in it",
        ),
        (
            [at(0, "train"), at(1, "train")],
            "all 2 ranks are in phase train, the longest without progress rank 1 on h1 (61 s)",
        ),
        ([at(0, "start"), None, at(2, "start")], "rank 1 has not started"),
        (
            [at(0, "sync"), at(1, "train"), at(2, "train", silent_s=75.0)],
            "rank 2 on h2 has not been heard from for 75 s; it was in phase train, step 7",
        ),
        (
            [at(0, "sync"), at(1, "train", ended="OSError: disk full")],
            "rank 1 on h1 ended in phase train: OSError: disk full",
        ),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(ranks, said):
    assert who_is_missing(ranks, silent_s=20.0) == said


def test_files_of_an_earlier_start_are_not_taken_for_ranks_of_this_one(tmp_path):
    earlier = Board(tmp_path, 1, 2, 5.0)
    earlier.write(at(1, "train"))
    path = tmp_path / "ranks" / "rank_00001.json"
    long_ago = path.stat().st_mtime - 1000
    os.utime(path, (long_ago, long_ago))
    board = Board(tmp_path, 0, 2, 5.0)
    board.write(at(0, "start"))
    assert [r and r.rank for r in board.read()] == [0, None]
    earlier.write(at(1, "start"))
    assert [r and r.phase for r in board.read()] == ["start", "start"]


def test_progress_keeps_the_watch_quiet(tmp_path, monkeypatch):
    """Almost the whole bound passes between any two signs of progress, on a clock that only the test moves."""
    now, looks = 0.0, 0

    def clock() -> float:
        nonlocal looks
        looks += threading.current_thread().name == "stall-watch"
        return now

    fake = SimpleNamespace(monotonic=clock, perf_counter=lambda: now, time=time.time, sleep=time.sleep)
    monkeypatch.setattr(lifecycle, "time", fake)
    phases = Phases(0, tmp_path, 2.0)
    with phases("generate"):
        while looks < 4:  # one a second
            now += 1.9
            phases.progress()
            time.sleep(0.01)
    phases.close()
    assert not (tmp_path / "stacks").exists()
    assert phases.take_seconds()["generate"] == now > 2.0
    assert phases.take_seconds() == {}


def test_a_failed_phase_keeps_its_name(tmp_path):
    phases = Phases(2, tmp_path, 60.0)
    phases.step = 4
    with pytest.raises(ZeroDivisionError), phases("train"):
        _ = 1 / 0
    phases.close()
    assert str(phases).startswith("rank 2 on ") and str(phases).endswith("step 4, phase train")


def test_signals_are_noted_and_raised_where_asked():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        stop = StopSignals()
        stop.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Interrupted, match="SIGUSR1"):
            stop.check()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((75, 75), 75), ((130, 130), 130), ((0, 1), 1), ((75, 1), 1), ((3, 3), 1)],
)
def test_the_status_of_a_run_follows_from_its_ranks(codes, expected):
    code = f"import os, sys; sys.exit({codes!r}[int(os.environ['RANK'])])"
    assert launch.start_local([sys.executable, "-c", code], len(codes)) == expected


@pytest.mark.parametrize(("name", "own"), [("GLOO_SOCKET_IFNAME", "lo"), ("OMP_NUM_THREADS", "1")])
@pytest.mark.parametrize("given", [None, "7"])
def test_what_the_launcher_sets_is_for_its_ranks_alone(tmp_path, monkeypatch, name, own, given):
    """A run on many hosts that inherited it could not connect its ranks; servers would have one thread each."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(name, given)
    before = dict(os.environ)
    code = (
        "import json, os, pathlib, sys\n"
        "from megatron_nft.processes import clean_environment\n"
        "found = [environment.get(sys.argv[2]) for environment in (os.environ, clean_environment())]\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps(found))"
    )
    assert launch.start_local([sys.executable, "-c", code, str(tmp_path), name], 2) == 0
    assert [json.loads((tmp_path / r).read_text()) for r in "01"] == [[given or own, given]] * 2
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}, None),  # torchrun's own choice
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "NFT_BEFORE_OMP_NUM_THREADS": ""}, None),
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "NFT_BEFORE_OMP_NUM_THREADS": "1"}, "1"),
        ({"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "8"}, "8"),
        ({"OMP_NUM_THREADS": "1"}, "1"),
    ],
)
def test_threads_of_what_a_rank_under_torchrun_starts(environment, threads):
    assert clean_environment(environment).get("OMP_NUM_THREADS") == threads


def test_ranks_are_told_who_they_are_and_end_with_the_launcher(tmp_path):
    code = (
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(f\"{os.getpid()} {os.environ['WORLD_SIZE']}\")\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    program = f"from megatron_nft.train import launch; launch.start_local({command!r}, 2)"
    launcher = subprocess.Popen([sys.executable, "-c", program])
    wait_until(lambda: all((tmp_path / r).is_file() and (tmp_path / r).read_text() for r in "01"), what="both ranks")
    pids = [int((tmp_path / r).read_text().split()[0]) for r in "01"]
    assert [(tmp_path / r).read_text().split()[1] for r in "01"] == ["2", "2"]
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not alive(pids), what="the end of the ranks of a killed launcher")
