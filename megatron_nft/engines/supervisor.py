"""Stands between the trainer and a server, and ends the server with all it started when the trainer is gone.

    python supervisor.py OWNER_PID command ...

Run as a script with `python -I`, with the standard library alone, so that it is up in milliseconds and nothing that the
server is given (PYTHONPATH) reaches it; hence its own call of prctl, in place of processes.die_with_parent. It is two
processes, so that either may be killed: the outer one watches the owner and the inner one, the inner one watches the
outer one and the server. Each adopts orphans among its descendants (PR_SET_CHILD_SUBREAPER), so that a process that
left its group or lost its parent, as vLLM's engine core does when the API server is killed, is found as well. When the
watched child ends, or the process above is gone (its own parent changes then, which SIGKILL cannot prevent), or SIGTERM
asks for it, it ends all that is left below it. The exit status is the server's, or 128 + signal.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

POLL_S = 0.1
TERM_GRACE_S = 1.0  # a server has nothing to save; the grace lets it unlink its shared memory
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def descendants(root: int) -> list[int]:
    """Ids of all processes below `root` that have not ended.

    The way leads through those that have: a process that was killed is called a zombie as soon as its first thread is
    gone, and is the parent of its children until the last one is.
    """
    children: dict[int, list[int]] = {}
    ended = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as f:
                    fields = f.read().rpartition(")")[2].split()  # the name before may hold anything
            except OSError:
                continue
            state, parent, num_threads = fields[0], int(fields[1]), int(fields[17])
            children.setdefault(parent, []).append(int(entry))
            if state == "Z" and num_threads < 2:
                ended.add(int(entry))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return [pid for pid in found if pid not in ended]


def signal_all(signum: int) -> bool:
    """Send the signal to every descendant; False where there is none."""
    pids = descendants(os.getpid())
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
    return bool(pids)


def end_all() -> None:
    """TERM to every descendant, then KILL until none is left."""
    signal_all(signal.SIGTERM)
    deadline = time.monotonic() + TERM_GRACE_S
    while descendants(os.getpid()) and time.monotonic() < deadline:
        reap()
        time.sleep(POLL_S)
    while signal_all(signal.SIGKILL):
        reap()
        time.sleep(POLL_S)


def reap() -> dict[int, int]:
    """Exit codes, as `subprocess` gives them, of the children that ended."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def wait_for(child: int, given_up: Callable[[], object]) -> int | None:
    """The child's exit code once it has ended; None as soon as `given_up` is true."""
    while True:
        code = reap().get(child)
        if code is not None or given_up():
            return code
        time.sleep(POLL_S)


def main() -> int:
    """Run the command that follows the owner's process id, end all that it started, and return its exit status."""
    owner, command = int(sys.argv[1]), sys.argv[2:]
    asked = []
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: asked.append(True))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    folder = own_temporary_folder()
    outer = os.getpid()
    inner = os.fork()
    if inner:
        code = watch_inner(inner, lambda: asked or os.getppid() != owner)
    else:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # not inherited
        code = run_server(libc, command, lambda: asked or os.getppid() != outer)
    end_all()
    shutil.rmtree(folder, ignore_errors=True)
    if code is None:
        return 0
    return code if code >= 0 else 128 - code


def own_temporary_folder() -> str:
    """Make a temporary folder for everything that is started from here on, and return its path.

    What torch compiles goes elsewhere, so that the next server finds it.
    """
    shared = tempfile.gettempdir()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(shared, f"torchinductor_{os.getuid()}"))
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="nft-server-", dir=shared)
    return os.environ["TMPDIR"]


def watch_inner(inner: int, given_up: Callable[[], object]) -> int | None:
    """Wait for the inner process as `wait_for` does; once it is told to end, it has time to do so in its own way."""
    code = wait_for(inner, given_up)
    if code is None:
        os.kill(inner, signal.SIGTERM)
        deadline = time.monotonic() + 2 * TERM_GRACE_S
        wait_for(inner, lambda: time.monotonic() > deadline)
    return code


def run_server(libc: ctypes.CDLL, command: list[str], given_up: Callable[[], object]) -> int | None:
    """Start the server, as the inner process, and wait for it as `wait_for` does."""

    def in_child() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # its port is free at once, should we be killed

    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=in_child)
    return wait_for(server.pid, given_up)


if __name__ == "__main__":
    sys.exit(main())
