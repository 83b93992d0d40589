"""Which ranks are still there: told through a store, by each reader's own clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from processes import wait_until
from torch._C._distributed_c10d import HashStore

from megatron_nft.config.training import StallTimeouts, TrainConfig
from megatron_nft.train import heartbeat as module
from megatron_nft.train.heartbeat import Heartbeat
from megatron_nft.train.lifecycle import Phases
from megatron_nft.train.whereabouts import Board, Whereabouts, silence_of

PERIOD_S = 5.0


class Clock:
    """A clock that only the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def three_ranks(store: HashStore) -> list[Heartbeat]:
    """Ranks 0 and 1 on h1, rank 2 on h2. Their threads are not started: the test beats."""
    ranks = [Whereabouts(0, "h1", 4, "sync"), Whereabouts(1, "h1", 4, "sync"), Whereabouts(2, "h2", 4, "train")]
    beats = [Heartbeat(store, r.rank, 3, lambda r=r: r, PERIOD_S) for r in ranks]
    for heartbeat in beats:
        heartbeat._listen()
    return beats


def pass_time(clock: Clock, beats: list[Heartbeat], num_beats: int) -> None:
    """What the threads of these ranks do meanwhile, rank 0 first."""
    for _ in range(num_beats):
        clock.now += PERIOD_S
        for heartbeat in beats:
            heartbeat._beat()


def heard(heartbeat: Heartbeat) -> list[tuple[int, str, str, float]]:
    return [(r.rank, r.host, r.phase, r.silent_s) for r in heartbeat.silent()]


def test_a_rank_that_falls_silent_is_known_to_all_others(clock):
    first, second, _ = beats = three_ranks(HashStore())
    pass_time(clock, beats, 10)
    assert all(heard(heartbeat) == [] for heartbeat in beats)
    pass_time(clock, [first, second], 4)
    assert heard(first) == heard(second) == [], "four beats of 5 s late is not more than four"
    pass_time(clock, [first, second], 2)
    # The last beat of rank 2 was heard by rank 0 one beat after it was written.
    assert heard(first) == heard(second) == [(2, "h2", "train", 25.0)]
    pass_time(clock, beats, 2)
    assert heard(first) == heard(second) == [], "it came back"


def test_the_first_rank_is_heard_by_each_of_the_others_itself(clock):
    first, second, third = three_ranks(HashStore())
    pass_time(clock, [second, third], 7)
    assert heard(second) == heard(third) == [(0, "h1", "sync", 35.0)]
    pass_time(clock, [first, second, third], 1)
    assert heard(third) == []


def test_a_rank_that_gets_no_answer_takes_the_first_one_for_silent(clock):
    """The host of rank 2 is cut off: its own requests hang, and time goes on."""
    _, _, third = three_ranks(HashStore())
    clock.now += 61.0
    assert heard(third) == [(0, "h1", "sync", 61.0)]


def test_who_has_closed_is_not_missed(clock):
    first, second, third = beats = three_ranks(HashStore())
    third._write_own(done=True)
    first._write_own(done=True)
    pass_time(clock, [second], 20)
    first._listen()
    pass_time(clock, [second], 20)
    assert heard(first) == [(1, "h1", "sync", 100.0)]
    assert heard(second) == []
    assert len(beats) == 3


def test_a_rank_that_failed_is_missed_and_told_with_its_reason(clock):
    """Its end closes no connection of NCCL, so the others would wait for it in a collective."""
    store = HashStore()
    first, _, third = three_ranks(store)
    failed = Whereabouts(1, "h1", 4, "sync", ended="MemoryError: no room")
    second = Heartbeat(store, 1, 3, lambda: failed, PERIOD_S)
    second.start()
    second.close()
    pass_time(clock, [first, third], 6)
    assert (
        silence_of(first.silent())
        == silence_of(third.silent())
        == ("rank 1 on h1 ended in phase sync: MemoryError: no room")
    )


def test_a_store_that_is_gone_ends_the_beats_and_nothing_else(clock, monkeypatch):
    _, second, _ = three_ranks(HashStore())

    def gone(*_: object) -> None:
        raise RuntimeError("Broken pipe")

    monkeypatch.setattr(second, "_store", SimpleNamespace(set=gone, multi_get=gone))
    second._period_s = 0.001
    second._thread.start()
    second._thread.join(60)
    assert not second._thread.is_alive()
    second.close()


LIVES = """
import datetime, os, sys, time
from pathlib import Path
from torch._C._distributed_c10d import TCPStore
from megatron_nft.train.heartbeat import Heartbeat
from megatron_nft.train.lifecycle import Phases
folder, rank, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = TCPStore("127.0.0.1", port, is_master=port == 0, wait_for_workers=False)
if port == 0:
    print(store.port, flush=True)
phases = Phases(rank, folder, 600.0, heartbeat_s=0.1)
phases.step = 3
heartbeat = Heartbeat(store, rank, 2, phases.where, 0.1)
with phases("generate" if rank == 0 else "train"):
    phases.progress()
    store.add("begun", 1)
    while store.add("begun", 0) < 2:
        time.sleep(0.01)
    heartbeat.start()
    phases.watch_others(heartbeat, 3.0)
    print("waits", flush=True)
    time.sleep(600)
"""


def test_a_rank_ends_when_another_one_is_silent_while_its_own_phase_has_time(tmp_path):
    """Rank 1 is stopped, which no socket tells; the limit of rank 0's phase is 600 s."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", LIVES, tmp_path]
    env = {**os.environ, "WORLD_SIZE": "2"}
    with subprocess.Popen([*command, "0", "0"], env=env, **given) as first:
        port = first.stdout.readline().strip()
        with subprocess.Popen([*command, "1", port], env=env, **given) as second:
            try:
                assert first.stdout.readline() == second.stdout.readline() == "waits\n"
                wait_until((tmp_path / "ranks" / "rank_00001.json").exists)
                second.send_signal(signal.SIGSTOP)
                said = first.communicate(timeout=120)[1].strip().splitlines()[-1]
            finally:
                first.kill()
                second.kill()
    host = os.uname().nodename
    assert first.returncode == 1
    assert said.startswith(
        f"megatron-nft: rank 0 on {host}, step 3, phase generate: lost the connection to another rank, rank 1 on "
        f"{host} has not been heard from for "
    )
    assert said.endswith("it was in phase train, step 3 (limit 3 s, train.heartbeat_timeout_s)")


@pytest.mark.parametrize("over", [False, True])
def test_silence_means_nothing_once_training_is_over(tmp_path, monkeypatch, over):
    """Servers are stopped one after the other then, and the host of the store may be gone first."""
    asked, ended = [], []

    class Silence:
        def silent(self):
            asked.append(1)
            return [Whereabouts(1, "h2", 3, "train", False, False, 0.0, silent_s=1000.0)]

        def close(self):
            pass

    monkeypatch.setattr(Phases, "_end_alone", lambda self, gone: ended.append(gone))
    phases = Phases(0, tmp_path, 600.0)
    phases.watch_others(Silence(), 60.0)
    if over:
        phases.stop_watching_others()
    wait_until(lambda: len(asked) > 1)
    phases.close()
    assert bool(ended) is not over


def test_the_files_may_know_better_where_a_silent_rank_was(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    phases = Phases(0, tmp_path, 600.0)
    for rank, phase, step in ((0, "train", 4), (1, "sync", 4), (2, "sync", 3)):
        Board(tmp_path, rank, 3, 5.0).write(Whereabouts(rank, "h2", step, phase))
    silent = [Whereabouts(rank, "h2", 4, "train", silent_s=60.0) for rank in (1, 2)]
    found = [(r.rank, r.step, r.phase, r.silent_s) for r in phases._last_seen(silent)]
    phases.close()
    assert found == [(1, 4, "sync", 60.0), (2, 4, "train", 60.0)]


def test_a_folder_that_does_not_answer_does_not_keep_a_stalled_rank(tmp_path):
    program = """
import sys, time
from pathlib import Path
from megatron_nft.train import lifecycle
lifecycle.LAST_WORDS_S = 0.5
def hang(*_):
    time.sleep(600)
lifecycle.Board.write = hang
phases = lifecycle.Phases(0, Path(sys.argv[1]), 1.5)
with phases("write"):
    time.sleep(600)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "phase write: no progress for" in done.stderr and "cannot be written" in done.stderr


def test_each_phase_of_a_step_has_a_limit_of_its_own(tmp_path):
    given = StallTimeouts(exchange=1, logprobs=2, write=3, checkpoint=4, start=None, export=None).given()
    assert given == {"exchange": 1, "logprobs": 2, "write": 3, "checkpoint": 4, "checkpoint_wait": 4}
    phases = Phases(0, tmp_path, 600.0, given)
    with phases("write"):
        assert phases._limit_s() == 3
    phases.close()


def test_one_late_beat_is_no_loss():
    with pytest.raises(ValueError, match=r"heartbeat_timeout_s \(60\) must be at least four times heartbeat_s \(20\)"):
        TrainConfig(heartbeat_s=20)
