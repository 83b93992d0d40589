"""Signals, phases, and the watch that ends a stalled rank with its stacks on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_nft import ranks
from megatron_nft.lifecycle import Interrupted, Phases, StopSignals

STALL = """
import sys, threading, time
from pathlib import Path
from megatron_nft.lifecycle import Phases
def waits_for_a_peer():
    time.sleep(60)
phases = Phases(int(sys.argv[2]), Path(sys.argv[1]), float(sys.argv[3]))
phases.step = 7
with phases("logprobs"):
    waits_for_a_peer()
"""


def test_a_stalled_rank_writes_all_stacks_and_ends(tmp_path):
    started = time.monotonic()
    stalled = subprocess.Popen([sys.executable, "-c", STALL, tmp_path, "3", "1.5"], stderr=subprocess.PIPE, text=True)
    other = subprocess.Popen([sys.executable, "-c", STALL, tmp_path, "4", "600"], stderr=subprocess.PIPE, text=True)
    said = stalled.communicate(timeout=50)[1]
    assert stalled.returncode == 1
    assert "rank 3 on " in said and "step 7, phase logprobs: no progress for" in said
    assert other.wait(timeout=50) == 1, "the rank that was not stalled itself must end too"
    for rank in (3, 4):
        text = (tmp_path / "stacks" / f"rank_{rank:05d}.txt").read_text()
        assert f"rank {rank}" in text and "waits_for_a_peer" in text
    assert time.monotonic() - started < 55


def test_progress_keeps_the_watch_quiet(tmp_path):
    phases = Phases(0, tmp_path, 2.0)
    with phases("generate"):
        for _ in range(20):
            time.sleep(0.2)
            phases.progress()
    phases.close()
    assert not (tmp_path / "stacks").exists()
    assert phases.take_seconds()["generate"] >= 4.0
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
    assert ranks.start_local([sys.executable, "-c", code], len(codes)) == expected


def test_ranks_are_told_who_they_are_and_end_with_the_launcher(tmp_path):
    code = (
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(f\"{os.getpid()} {os.environ['WORLD_SIZE']}\")\n"
        "time.sleep(60)"
    )
    launch = (
        f"from megatron_nft import ranks; ranks.start_local([{sys.executable!r}, '-c', {code!r}, {str(tmp_path)!r}], 2)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", launch])
    deadline = time.monotonic() + 30
    while not all((tmp_path / r).is_file() and (tmp_path / r).read_text() for r in "01"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int((tmp_path / r).read_text().split()[0]) for r in "01"]
    assert [(tmp_path / r).read_text().split()[1] for r in "01"] == ["2", "2"]
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=30)
    assert alive == [], "ranks outlived a killed launcher"
