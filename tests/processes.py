"""What runs on this machine, by an independent look: `ps`."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable


def live_processes() -> dict[int, int]:
    """{pid: parent}, without zombies that nobody has collected, and without ps itself."""
    with subprocess.Popen(["ps", "-eo", "pid=,ppid=,stat="], stdout=subprocess.PIPE, text=True) as ps:
        rows = [line.split() for line in ps.stdout]
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z") and int(pid) != ps.pid}


def below(pid: int) -> set[int]:
    """Live processes below `pid`."""
    parents, found = live_processes(), {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def children(pid: int) -> list[int]:
    """Live children of `pid`, the oldest first where ids have not wrapped."""
    return sorted(p for p, parent in live_processes().items() if parent == pid)


def server_of(supervisor: int) -> int:
    """The server that supervisor.py started: the first child of its inner process."""
    (inner,) = children(supervisor)
    return children(inner)[0]


def alive(pids: Iterable[int]) -> set[int]:
    """Those that still run."""
    return set(pids) & set(live_processes())


def wait_until(condition: Callable[[], object], seconds: float = 60.0, what: str = "what the test waits for") -> None:
    """Returns once the condition is true; an AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)
