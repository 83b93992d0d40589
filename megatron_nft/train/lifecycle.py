"""The life of a rank: phases with their seconds, stop signals, and the watch for stalls."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_nft.console import Console
from megatron_nft.files import write_atomically
from megatron_nft.train.background import Background
from megatron_nft.train.whereabouts import LOST, Board, Whereabouts, silence_of

if TYPE_CHECKING:
    from megatron_nft.train.heartbeat import Heartbeat

LAST_WORDS_S = 20.0
"""How long a rank that has to end waits for a shared folder that does not take its last words."""


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
    """Where a rank is, for error messages and the watch for stalls and lost ranks, and the seconds of each phase.

    One thread writes where this rank is into the shared folder, and sees there whether another one has stalled. The
    watch is a thread of its own, so that it does its duty while that folder does not answer.
    """

    def __init__(
        self,
        rank: int,
        run_dir: Path,
        stall_timeout_s: float,
        by_phase: Mapping[str, float] | None = None,
        heartbeat_s: float = 5.0,
    ) -> None:
        """stall_timeout_s: seconds that a phase may go without progress. by_phase: those of single phases.
        heartbeat_s: how often this rank tells where it is while nothing changes."""
        self.rank, self.step, self.name = rank, 0, "start"
        self.seconds: dict[str, float] = {}
        self.on_end: Callable[[str], None] | None = None  # told the name of each phase that has ended
        self.mark: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()  # around each phase
        self._timeout_s, self._by_phase = stall_timeout_s, dict(by_phase or {})
        self._folder = run_dir / "stacks"
        self._heartbeat_s = heartbeat_s
        self._board = Board(run_dir, rank, int(os.environ.get("WORLD_SIZE", "1")), heartbeat_s)
        self._heartbeat: Heartbeat | None = None
        self._patience_s = 0.0
        self._asked = False  # whether a rank that stalled wants all to end
        self._place = ("start", False)  # the phase, and whether it has ended
        self._waits = False
        self._ended = ""
        self._last_progress = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._post, name="whereabouts", daemon=True).start()
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

    def watch_others(self, heartbeat: Heartbeat, timeout_s: float) -> None:
        """From here on this rank ends when one of the others has been silent for `timeout_s`."""
        self._heartbeat, self._patience_s = heartbeat, timeout_s

    def stop_watching_others(self) -> None:
        """From here on the silence of others means nothing: a run that is over is closed by each rank alone, and the
        store, with the host of rank 0, may go first."""
        self._patience_s = math.inf

    def where(self) -> Whereabouts:
        """Where this rank is now."""
        phase, between = self._place
        quiet_s = time.monotonic() - self._last_progress
        host = os.uname().nodename
        return Whereabouts(self.rank, host, self.step, phase, self._waits, between, quiet_s, ended=self._ended)

    def ended(self, why: str) -> None:
        """Tell the other ranks why this one is about to end."""
        self._ended = why
        _try(lambda: self._board.write(self.where()))

    def lost(self, *, timed_out: bool, patience_s: float = 2.0) -> str:
        """Which rank is gone, for one that could not reach it: one that told why it ended, or that is silent.

        timed_out: whether the others were waited for, so that where they are says who is late. Empty where nothing is
        known after `patience_s` seconds.
        """
        deadline = time.monotonic() + patience_s
        while True:
            told = [r for r in self._board.read() if r is not None and r.ended and r.rank != self.rank]
            first = next((r for r in told if not r.ended.startswith(LOST)), None)
            if first is not None:
                return f"{first} ended in phase {first.phase}, step {first.step}: {first.ended}"
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if self._heartbeat is not None and (silent := self._heartbeat.silent()):
            return silence_of(self._last_seen(silent))
        return self._board.who_is_missing() if timed_out else ""

    def close(self) -> None:
        """End the watch."""
        self._closed.set()
        if self._heartbeat is not None:
            self._heartbeat.close()

    def _limit_s(self) -> float:
        return self._by_phase.get(self._place[0], self._timeout_s)

    @property
    def _request(self) -> Path:
        return self._folder / "requested"

    def _post(self) -> None:
        of_before = _mtime(self._request)  # of an earlier start; clocks of hosts and file servers are not compared
        written: object = None
        while not self._closed.wait(1.0):
            where = self.where()
            due = (where.place, time.monotonic() // self._heartbeat_s)
            if due != written:
                self._board.write(where)
                written = due
            # One stalled rank makes all of them write their stacks: the others show who waits for whom.
            self._asked = _mtime(self._request) not in (None, of_before)

    def _watch(self) -> None:
        while not self._closed.wait(1.0):
            where = self.where()
            if where.quiet_s >= self._limit_s() or self._asked:
                self._end_all(where)
            silent = self._heartbeat.silent() if self._heartbeat is not None else []
            if gone := [r for r in silent if r.silent_s >= self._patience_s]:
                self._end_alone(gone)

    def _end_all(self, where: Whereabouts) -> NoReturn:
        """Write this rank's stacks, make the others write theirs, and end."""
        asked = self._asked

        def tell() -> None:
            self._board.write(where)
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{self.rank:05d}.txt").open("w") as f:
                f.write(f"{self}, no progress for {where.quiet_s:.0f} s\n")
                f.flush()
                faulthandler.dump_traceback(f, all_threads=True)
            if asked:
                said = self._request.read_text(encoding="utf-8")
            else:
                said = (
                    f"no progress for {where.quiet_s:.0f} s (limit {self._limit_s():g} s, train.stall_timeout_s): "
                    f"{self._board.who_is_missing()}; stacks of all ranks are in {self._folder}"
                )
                write_atomically(self._request, f"ended with {where}: {said}")
            print(f"megatron-nft: {self}: {said}", file=sys.stderr, flush=True)

        if not _try(tell):
            why = f"no progress for {where.quiet_s:.0f} s, and {self._folder} cannot be written"
            print(f"megatron-nft: {self}: {why}", file=sys.stderr, flush=True)
        time.sleep(3.0)  # the other ranks see the request within a second
        leave_at_once(1)

    def _end_alone(self, gone: Sequence[Whereabouts]) -> NoReturn:
        """End because ranks are gone, which every other rank sees by itself."""
        why = f"{LOST}, {silence_of(self._last_seen(gone))} (limit {self._patience_s:g} s, train.heartbeat_timeout_s)"
        self.ended(why)
        print(f"megatron-nft: {self}: {why}", file=sys.stderr, flush=True)
        time.sleep(2 * self._heartbeat_s)  # until the others have heard it from rank 0, which this one may be
        leave_at_once(1)

    def _last_seen(self, silent: Sequence[Whereabouts]) -> list[Whereabouts]:
        """These ranks with the place that their files tell, where it is a later one than that of their last beats."""
        found: list[Whereabouts | None] = []
        _try(lambda: found.extend(self._board.read()))
        files = {r.rank: r for r in found if r is not None}
        later = {r.rank: files[r.rank] for r in silent if r.rank in files and files[r.rank].place > r.place}
        return [replace(later.get(r.rank, r), silent_s=r.silent_s) for r in silent]


def leave_at_once(status: int) -> NoReturn:
    """End the process without atexit's handlers, but not without torch's helper for shared memory, which would live on
    and keep our output open. Only where our module has started it: loading it now would take seconds, and print."""
    if (shared_memory := sys.modules.get("megatron_nft.weights.shared_memory")) is not None:
        shared_memory.clean_up()
    os._exit(status)


def _try(work: Callable[[], object]) -> bool:
    """Whether work with the shared folder was done in LAST_WORDS_S."""
    helper = Background("last-words")
    helper.start(work)
    return helper.wait(LAST_WORDS_S) is None and not helper.running


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
