"""The processes behind `VerifierPool`: a fork server that imports the graders once, and workers forked from it.

    python -m megatron_nft.verify.worker CONTROL_FD OWNER_PID MEMORY_BYTES GRADERS

The fork server listens on CONTROL_FD (JSON lines, a worker's socket attached to `fork`):
  in:   {"fork": id}, {"kill": id}
  out:  {"ready": true} or {"error": text}; {"exit": id, "status": wait status}
It has a single thread and never uses CUDA, so that forking is safe. When the owner is gone, the control socket is
closed and Linux sends SIGKILL, so that no process is left behind. Signals meant for the owner's process group are
ignored: the owner decides.

A worker reads pickled rows, which come from its owner, and sends each verdict as one JSON line. The owner unpickles
nothing that a worker sends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import resource
import selectors
import signal
import socket
import sys
import time
from typing import Any

from megatron_nft.processes import die_with_parent
from megatron_nft.types import ReasonKind, Verdict
from megatron_nft.verify.forkserver import HEADER
from megatron_nft.verify.graders import Grader, GraderError, call, load, split_names
from megatron_nft.verify.outcome import Outcome, shorten

GROWTH_CHECK_ROWS = 64  # a worker's memory is checked every so many rows


def main(argv: list[str]) -> int:
    """Run the fork server until its owner is gone. Returns 1 if a grader cannot be loaded, else 0."""
    control_fd, owner, memory_bytes = (int(word) for word in argv[:3])
    die_with_parent(owner)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=control_fd)
    try:
        graders = [load(name) for name in split_names(argv[3])]
    except GraderError as error:
        _say(control, {"error": str(error)})
        return 1
    if "megatron_nft.verify.maths" in sys.modules:
        sys.modules["megatron_nft.verify.maths"].warm_up()
    gc.collect()
    gc.freeze()  # forked workers share these pages as long as nobody writes to them
    _ForkServerProcess(control, graders, memory_bytes).serve()
    return 0


def _say(control: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the owner may be gone
        control.sendall(json.dumps(message).encode() + b"\n")


class _ForkServerProcess:
    """Forks workers, kills them on request and reports when they end."""

    def __init__(self, control: socket.socket, graders: list[Grader], memory_bytes: int) -> None:
        self.control = control
        self.graders = graders
        self.memory_bytes = memory_bytes
        self.children: dict[int, int] = {}  # pid -> worker id
        self.unread = b""
        self.sockets: list[int] = []  # received, in the order of the `fork` lines

    def serve(self) -> None:
        """Serve requests until the owner is gone."""
        wake_r, wake_w = socket.socketpair()
        wake_w.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_w.fileno())
        _say(self.control, {"ready": True})
        with selectors.DefaultSelector() as selector:
            selector.register(self.control, selectors.EVENT_READ)
            selector.register(wake_r, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is wake_r:
                        wake_r.recv(4096)
                        self._reap()
                    elif not self._follow_commands():
                        self._end_workers()
                        return

    def _follow_commands(self) -> bool:
        """Read and carry out commands. Returns False when the owner is gone."""
        try:
            data, sockets, _, _ = socket.recv_fds(self.control, 65536, 64)
        except ConnectionError:
            return False
        if not data:
            return False
        self.sockets.extend(sockets)
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "fork" in command:
                self._fork(command["fork"], self.sockets.pop(0))
            else:
                for pid, worker in self.children.items():
                    if worker == command["kill"]:
                        os.kill(pid, signal.SIGKILL)  # not reaped yet, so the pid is still ours
        return True

    def _fork(self, worker: int, fd: int) -> None:
        """Fork a worker that serves the socket `fd`; returns only in the fork server."""
        forkserver = os.getpid()
        pid = os.fork()
        if pid:
            os.close(fd)
            self.children[pid] = worker
            return
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            die_with_parent(forkserver)
            self.control.close()
            for other in self.sockets:
                os.close(other)
            _Worker(socket.socket(fileno=fd), self.graders, self.memory_bytes).serve()
            status = 0
        finally:
            os._exit(status)

    def _end_workers(self) -> None:
        """Kill all workers and wait for them."""
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        for pid in self.children:
            os.waitpid(pid, 0)  # no zombies, even where process 1 does not collect them

    def _reap(self) -> None:
        """Report the workers that have ended."""
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid in self.children:
                _say(self.control, {"exit": self.children.pop(pid), "status": status})


class _Worker:
    """Grades the rows that arrive on its socket, one after another.

    It sends [pid] when it has started, and for each grader of a row
    [row id, grader index, verdict, extracted, reason, its kind, reward, seconds, retiring].
    """

    def __init__(self, rows: socket.socket, graders: list[Grader], memory_bytes: int) -> None:
        self.rows = rows
        self.graders = graders
        self.memory_bytes = memory_bytes
        self.base_bytes = _address_space()
        if sys.platform == "linux":
            limit = self.base_bytes + memory_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def serve(self) -> None:
        """Grade rows until the socket is closed or the worker has grown too large."""
        self.rows.sendall(json.dumps([os.getpid()]).encode() + b"\n")
        stream = self.rows.makefile("rb")
        graded = 0
        while header := stream.read(HEADER.size):
            row_id, first, num_bytes = HEADER.unpack(header)
            payload = stream.read(num_bytes)
            for index in range(first, len(self.graders)):
                graded += 1
                if self._grade(row_id, index, payload, check_size=graded % GROWTH_CHECK_ROWS == 0):
                    return

    def _grade(self, row_id: int, index: int, payload: bytes, check_size: bool) -> bool:
        """Grade a row with one grader and send the verdict. Returns True if this worker has to end."""
        start = time.perf_counter()
        try:
            outcome = call(self.graders[index], *pickle.loads(payload))
            retiring = False
        except MemoryError:
            reason = f"needed more than {self.memory_bytes} bytes of memory"
            outcome = Outcome(Verdict.TIMEOUT, reason=reason, kind=ReasonKind.MEMORY)
            retiring = True
        except Exception as error:  # `extra` holds a class that this process does not know
            reason = f"the row cannot be read: {type(error).__name__}: {error}"
            outcome = Outcome(Verdict.NO_VERDICT, reason=reason, kind=ReasonKind.GRADER_FAILED)
            retiring = False
        seconds = time.perf_counter() - start
        if not retiring and (check_size or seconds > 0.05):
            # A new worker takes over before the next row could lack memory through no fault of its own.
            retiring = _address_space() - self.base_bytes > self.memory_bytes // 4
        said = [outcome.verdict, shorten(outcome.extracted), shorten(outcome.reason), outcome.kind, outcome.reward]
        reply = [row_id, index, *said, seconds, retiring]
        self.rows.sendall(json.dumps(reply).encode() + b"\n")
        return retiring


def _address_space() -> int:
    """Return the size of this process's address space in bytes."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # the workers are gone; nothing is left to clean up
