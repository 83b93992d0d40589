"""How long a worker has been grading one row, without the time that it waited for a processor.

On a busy machine a harmless row may take ten times as long as usual; only the time that it used itself counts. Linux
reports how long a process has run and has waited (/proc/PID/schedstat); where that is missing, wall-clock time counts.
"""

from __future__ import annotations

import time
from typing import NamedTuple

FIRST_LOOK = 0.1  # /proc is read after this fraction of the limit, so that quick rows cost nothing
MIN_EXTENSION_S = 0.02


class Usage(NamedTuple):
    """The processor time of a process since its start."""

    ran_s: float
    waited_s: float  # ready to run, without a processor; complete only while it is not waiting
    ready: bool  # running or waiting for a processor now, rather than asleep


class Stopwatch:
    """Measures one row at a time against a limit of `bound_s` seconds.

    `deadline` (time.monotonic) is when to call `expired`; infinite while no row is being graded.
    """

    def __init__(self, bound_s: float) -> None:
        self.bound_s = bound_s
        self.deadline = float("inf")
        self._start = 0.0
        self._look: tuple[float, Usage] | None = None  # seconds from the start to the first look, and the usage then

    def start(self) -> None:
        """Start to time a new row."""
        self._start = time.monotonic()
        self._look = None
        self.deadline = self._start + FIRST_LOOK * self.bound_s

    def stop(self) -> None:
        """Stop timing: no row is being graded."""
        self.deadline = float("inf")

    def expired(self, pid: int) -> bool:
        """Whether the row that the process `pid` grades has used up its time. If not, `deadline` moves on."""
        now = time.monotonic()
        if now < self.deadline:
            return False
        usage = usage_of(pid)
        elapsed = now - self._start
        if self._look is None:
            self._look = (min(elapsed, self.bound_s / 2), usage or Usage(0.0, 0.0, False))
        before_look, at_look = self._look
        if usage is None:
            used = elapsed
        elif usage.ready:
            used = before_look + usage.ran_s - at_look.ran_s
        else:
            used = elapsed - (usage.waited_s - at_look.waited_s)
        if used >= self.bound_s:
            return True
        self.deadline = now + max(self.bound_s - used, MIN_EXTENSION_S)
        return False


def usage_of(pid: int) -> Usage | None:
    """Return the usage of a single-threaded process; None where the system does not report it."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            ran, waited, _ = file.read().split()
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return None
    return Usage(int(ran) / 1e9, int(waited) / 1e9, state == "R")
