"""The owner's side of the fork server, the process from which workers are forked (worker.py is the other side)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
from typing import Any

from megatron_nft.processes import THREADS, clean_environment

HEADER = struct.Struct(
    ">QIQ"
)  # in front of each row sent to a worker: row id, first grader to run, bytes of the pickle


class ForkServer:
    """Starts the fork server, asks it to fork and kill workers, and returns what it reports.

    The thread that creates a ForkServer must outlive it, because Linux kills the process when that thread ends.

    graders: comma-separated names, imported once by the fork server. memory_bytes: limit per worker.
    """

    def __init__(self, graders: str, memory_bytes: int) -> None:
        self.control, theirs = socket.socketpair()
        environment = clean_environment()
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)  # for dotted paths
        environment.setdefault(THREADS, "1")  # there are as many workers as the machine is to be busy with
        environment["PYTHONHASHSEED"] = "0"  # sympy orders sets by hash: the same verdict every time
        command = [sys.executable, "-P", "-m", "megatron_nft.verify.worker"]
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid()), str(memory_bytes), graders],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__ if _has_descriptor(sys.__stderr__) else subprocess.DEVNULL,
                env=environment,
            )
        self.unread = b""

    def fork(self, worker: int) -> socket.socket:
        """Ask for a new worker. Returns our end of its socket at once; the worker follows."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs, contextlib.suppress(ConnectionError):  # if the fork server has died, `read` says so
            socket.send_fds(self.control, [json.dumps({"fork": worker}).encode() + b"\n"], [theirs.fileno()])
        return ours

    def kill(self, worker: int) -> None:
        """End a worker at once. Does nothing if it has ended already."""
        with contextlib.suppress(ConnectionError):
            self.control.sendall(json.dumps({"kill": worker}).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """Return the messages that have arrived, waiting for some if there are none; None once the process is gone."""
        try:
            data = self.control.recv(65536)
        except ConnectionError:
            return None
        if not data:
            return None
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> int:
        """End the fork server and its workers. Returns the exit code of the fork server."""
        self.control.close()
        try:
            return self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()  # Linux then kills its workers, as they have asked for
            return self.process.wait()


def _has_descriptor(stream: Any) -> bool:
    """Whether a stream (or None) has an open file descriptor that a child process can use."""
    try:
        return stream is not None and stream.fileno() >= 0
    except (OSError, ValueError):
        return False
