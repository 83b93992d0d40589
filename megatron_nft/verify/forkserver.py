"""The owner's handle on the template process that forks workers (see worker.py)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
from typing import Any

HEADER = struct.Struct(">QIQ")  # before each row on a worker's socket: its id, the first grader to run, bytes of pickle


class Nursery:
    """Starts the template; asks it for workers and for their end; hands on what it says.

    The thread that makes a Nursery must live as long as it: Linux ends the template with that thread.
    """

    def __init__(self, graders: str, memory_bytes: int) -> None:
        self.control, theirs = socket.socketpair()
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)  # for dotted paths
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
        """A new worker; its end of the socket is returned at once, the worker follows."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs, contextlib.suppress(ConnectionError):  # a dead template shows in `read`
            socket.send_fds(self.control, [json.dumps({"fork": worker}).encode() + b"\n"], [theirs.fileno()])
        return ours

    def kill(self, worker: int) -> None:
        """End a worker at once. Nothing happens if it has ended already."""
        with contextlib.suppress(ConnectionError):
            self.control.sendall(json.dumps({"kill": worker}).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """What the template has said since (waits if nothing); None once it is gone."""
        try:
            data = self.control.recv(65536)
        except ConnectionError:
            return None
        if not data:
            return None
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> int:
        """End the template and its workers; the template's exit code."""
        self.control.close()
        try:
            return self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()  # its workers follow: they asked Linux for it
            return self.process.wait()


def _has_descriptor(stream: Any) -> bool:
    try:
        return stream is not None and stream.fileno() >= 0
    except (OSError, ValueError):
        return False
