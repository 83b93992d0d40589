"""Ports for servers and rendezvous on this machine."""

from __future__ import annotations

import random
import socket

_given: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port on `host` that was free a moment ago, never the same twice: the first may not be listened on yet.

    From below the range that the kernel gives to outgoing connections: a port of that range is often taken again in
    the seconds that a process needs before it listens.
    """
    for port in random.SystemRandom().sample(sorted({*range(15000, 32000)} - _given), 200):
        with socket.socket() as s:
            try:
                s.bind((host, port))
            except OSError:
                continue
            _given.add(port)
            return port
    raise OSError(f"no free port on {host} among 200 tried between 15000 and 32000")
