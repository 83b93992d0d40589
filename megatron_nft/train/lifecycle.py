"""The life of a rank: phases with their seconds, stop signals, and the watch for stalls."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_nft.console import Console
from megatron_nft.files import write_atomically
from megatron_nft.train.whereabouts import HEARTBEAT_S, Board, Whereabouts, who_is_missing

LOST = "lost the connection to another rank"


class Interrupted(Exception):
    """A stop signal came; the state of the last complete step is what counts."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 set a flag; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.signum = 0
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(s, self._note)

    def _note(self, signum: int, _frame: object) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.signum:
            raise Interrupted(self.signum)


class Phases:
    """Where a rank is, for error messages and the stall watch, and the seconds that each phase took."""

    def __init__(
        self, rank: int, run_dir: Path, stall_timeout_s: float, by_phase: Mapping[str, float] | None = None
    ) -> None:
        """stall_timeout_s: seconds that a phase may go without progress. by_phase: those of single phases."""
        self.rank, self.step, self.name = rank, 0, "start"
        self.seconds: dict[str, float] = {}
        self.on_end: Callable[[str], None] | None = None  # told the name of each phase that has ended
        self.mark: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()  # around each phase
        self._timeout_s, self._by_phase = stall_timeout_s, dict(by_phase or {})
        self._folder = run_dir / "stacks"
        self._board = Board(run_dir, rank, int(os.environ.get("WORLD_SIZE", "1")))
        self._place = ("start", False)  # the phase, and whether it has ended
        self._waits = False
        self._ended = ""
        self._last_progress = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="stall-watch", daemon=True).start()

    def __str__(self) -> str:
        return f"rank {self.rank} on {os.uname().nodename}, step {self.step}, phase {self.name}"

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run a phase. Its name stays set when it fails, so that the error can say where."""
        self.name, self._place = name, (name, False)
        self.progress()
        start = time.perf_counter()
        with self.mark(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.progress()
        if self.on_end is not None:
            self.on_end(name)
        self.name, self._place = "between phases", (name, True)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Run the part of a phase in which this rank has done its own work and waits for the others."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def take_seconds(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def progress(self) -> None:
        """Tell the stall watch that something has moved: its time starts anew."""
        self._last_progress = time.monotonic()

    def ended(self, why: str) -> None:
        """Tell the other ranks why this one is about to end."""
        self._ended = why
        self._board.write(self._whereabouts())

    def lost(self, patience_s: float = 2.0) -> str:
        """Which rank ended, as it told itself; empty where none has, in `patience_s` seconds."""
        deadline = time.monotonic() + patience_s
        while True:
            told = [r for r in self._board.read() if r is not None and r.ended and r.rank != self.rank]
            first = next((r for r in told if not r.ended.startswith(LOST)), None)
            if first is not None:
                return f"{first} ended in phase {first.phase}, step {first.step}: {first.ended}"
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.1)

    def close(self) -> None:
        """End the watch."""
        self._closed.set()

    def _whereabouts(self) -> Whereabouts:
        phase, between = self._place
        quiet_s = time.monotonic() - self._last_progress
        host = os.uname().nodename
        return Whereabouts(self.rank, host, self.step, phase, self._waits, between, quiet_s, ended=self._ended)

    def _limit_s(self) -> float:
        return self._by_phase.get(self._place[0], self._timeout_s)

    def _watch(self) -> None:
        requested = self._folder / "requested"
        of_before = _mtime(requested)  # of an earlier start; clocks of hosts and file servers are not compared
        written: object = None
        while not self._closed.wait(1.0):
            where = self._whereabouts()
            due = (where.place, time.monotonic() // HEARTBEAT_S)
            if due != written:
                self._board.write(where)
                written = due
            # One stalled rank makes all of them write their stacks: the others show who waits for whom.
            asked = _mtime(requested) not in (None, of_before)
            if where.quiet_s >= self._limit_s() or asked:
                self._end_all(requested, where, asked)

    def _end_all(self, requested: Path, where: Whereabouts, asked: bool) -> NoReturn:
        """Write this rank's stacks, make the others write theirs, and end."""
        self._board.write(where)
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank_{self.rank:05d}.txt").open("w") as f:
            f.write(f"{self}, no progress for {where.quiet_s:.0f} s\n")
            f.flush()
            faulthandler.dump_traceback(f, all_threads=True)
        if asked:
            said = requested.read_text(encoding="utf-8")
        else:
            said = (
                f"no progress for {where.quiet_s:.0f} s (limit {self._limit_s():g} s, train.stall_timeout_s): "
                f"{who_is_missing(self._board.read())}; stacks of all ranks are in {self._folder}"
            )
            write_atomically(requested, f"ended with {where}: {said}")
        print(f"megatron-nft: {self}: {said}", file=sys.stderr, flush=True)
        time.sleep(3.0)  # the other ranks see the request within a second
        os._exit(1)


def _mtime(path: Path) -> float | None:
    """When a file was written, by the clock of its file system; None where there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Lifecycle:
    """How a rank is stopped, watched and seen by a person."""

    phases: Phases
    stop: StopSignals
    console: Console

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[..., None]]:
        """A bar; the yielded function advances it by one and keeps the stall watch quiet."""
        with self.console.bar(description, total) as advance:

            def one_more(*_: object) -> None:
                self.phases.progress()
                advance()

            yield one_more

    def close(self) -> None:
        """End the console and the watch."""
        self.console.close()
        self.phases.close()
