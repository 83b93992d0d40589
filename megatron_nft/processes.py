"""Ports, environments and lives of the processes that this program starts on this machine."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import socket
import sys
from collections.abc import Mapping, MutableMapping

RANK_VARIABLES = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    }
)
"""What torchrun, and our own launcher in its place, tell a rank about its job."""
RANK_PREFIXES = ("TORCHELASTIC_",)
BEFORE = "NFT_BEFORE_"
"""NFT_BEFORE_X has what X was before `set_own_variable`; empty where it was not set."""

THREADS = "OMP_NUM_THREADS"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_given: set[int] = set()


def allow_open_files(number: int) -> None:
    """Let this process open `number` files and connections, as far as the system's hard limit permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def set_own_variable(name: str, value: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set a variable for this process and the ranks that it starts, but not for what has an environment of its own.

    `clean_environment` gives the value back that it had before, also in a rank that inherited it from its launcher.
    """
    if environment.get(name) != value:
        environment.setdefault(BEFORE + name, environment.get(name, ""))
        environment[name] = value


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port on `host` that was free a moment ago, never the same twice: the first may not be listened on yet.

    From below the range that the kernel gives to outgoing connections: a port of that range is often taken again in
    the seconds that a process needs before it listens. OSError where none of 200 ports is free.
    """
    ports: list[int] = random.SystemRandom().sample(sorted({*range(15000, 32000)} - _given), 200)
    for port in ports:
        with socket.socket() as s:
            try:
                s.bind((host, port))
            except OSError:
                continue
            _given.add(port)
            return port
    raise OSError(f"no free port on {host} among 200 tried between 15000 and 32000")


def clean_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environment` without what makes a process a rank of a job; everything else as it was given to us.

    A server that inherited TORCHELASTIC_USE_AGENT_STORE, RANK or MASTER_ADDR from torchrun would wait in its own
    `init_process_group` for a store that nobody opens. OMP_NUM_THREADS=1 is torchrun's own choice for several ranks of
    a host, unless NFT_BEFORE_OMP_NUM_THREADS says what it was given: servers have more cores.
    """
    before = {n.removeprefix(BEFORE): value for n, value in environment.items() if n.startswith(BEFORE)}
    if "TORCHELASTIC_RUN_ID" in environment and environment.get(THREADS) == "1":
        before.setdefault(THREADS, "")
    left_out = RANK_VARIABLES | before.keys()
    kept = {n: v for n, v in environment.items() if n not in left_out and not n.startswith((*RANK_PREFIXES, BEFORE))}
    return kept | {n: v for n, v in before.items() if v}


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when the thread that started it ends, however that happens. Elsewhere nothing.

    parent: the id of the process that should be the parent. If it has ended already, this process ends at once with
    status 1. A child of `fork` does not inherit the request.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
