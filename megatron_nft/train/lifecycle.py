"""The life of a rank: phases with their seconds, stop signals, and the watch for stalls."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_nft.console import Console


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

    def __init__(self, rank: int, run_dir: Path, stall_timeout_s: float) -> None:
        self.rank, self.step, self.name = rank, 0, "start"
        self.seconds: dict[str, float] = {}
        self.on_end: Callable[[str], None] | None = None  # told the name of each phase that has ended
        self._timeout_s = stall_timeout_s
        self._folder = run_dir / "stacks"
        self._last_progress = time.monotonic()
        self._started = time.time()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="stall-watch", daemon=True).start()

    def __str__(self) -> str:
        return f"rank {self.rank} on {os.uname().nodename}, step {self.step}, phase {self.name}"

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run a phase. Its name stays set when it fails, so that the error can say where."""
        self.name = name
        self.progress()
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.progress()
        if self.on_end is not None:
            self.on_end(name)
        self.name = "between phases"

    def take_seconds(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def progress(self) -> None:
        """Tell the stall watch that something has moved: its time starts anew."""
        self._last_progress = time.monotonic()

    def close(self) -> None:
        """End the watch."""
        self._closed.set()

    def _watch(self) -> None:
        requested = self._folder / "requested"
        while not self._closed.wait(1.0):
            waited = time.monotonic() - self._last_progress
            # One stalled rank makes all of them write their stacks: the others show who waits for whom.
            asked = requested.exists() and requested.stat().st_mtime > self._started
            if waited < self._timeout_s and not asked:
                continue
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{self.rank:05d}.txt").open("w") as f:
                f.write(f"{self}, no progress for {waited:.0f} s\n")
                f.flush()
                faulthandler.dump_traceback(f, all_threads=True)
            requested.touch()
            if not asked:
                print(
                    f"megatron-nft: {self}: no progress for {waited:.0f} s (train.stall_timeout_s = "
                    f"{self._timeout_s:g}); stacks of all ranks are in {self._folder}",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(3.0)  # the other ranks see the request within a second
            os._exit(1)


@dataclass(frozen=True)
class Lifecycle:
    """How a rank is stopped, watched and seen by a person."""

    phases: Phases
    stop: StopSignals
    console: Console

    @contextmanager
    def progress(self, description: str, total: int, *, interruptible: bool = False) -> Iterator[Callable[..., None]]:
        """A bar; the yielded function advances it by one and keeps the stall watch quiet.

        With `interruptible` it raises Interrupted once a stop signal has come.
        """
        with self.console.bar(description, total) as advance:

            def one_more(*_: object) -> None:
                if interruptible:
                    self.stop.check()
                self.phases.progress()
                advance()

            yield one_more

    def close(self) -> None:
        """End the console and the watch."""
        self.console.close()
        self.phases.close()
