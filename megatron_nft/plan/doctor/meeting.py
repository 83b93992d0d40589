"""The nodes meet in a folder that all should see: there they leave their facts, and so show that it is shared.

    N.facts   of node N
    lock      held by node 0 while it waits for the answers
    call      written by node 0 once all facts are there
    N.answer  {"time": its clock, "lock": free | held | missing}, written by node N once it sees the call

Node 0 knows when it called and when it saw an answer. The clock of node N said `time` in between, so the difference of
the two clocks lies within bounds that hold on every file system, however late a node sees what another wrote. Locks
work between nodes if node N finds the lock held.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_nft.files import write_atomically
from megatron_nft.locks import NO_FLOCK
from megatron_nft.plan.doctor.facts import NodeFacts

POLL_S = 0.05
ANSWER_S = 70.0  # NFS lets a node believe its memory of a folder for up to 60 s


@dataclass(frozen=True)
class Answer:
    """What node 0 learns of another node, or of itself."""

    facts: NodeFacts
    lock: str  # "held": as it should be; "free": locks do not reach other nodes; "missing": there is no flock
    ahead_s: tuple[float, float]  # the node's clock is ahead of node 0's by something between these


@dataclass(frozen=True)
class Meeting:
    """What came of it, as node 0 sees it."""

    answers: dict[int, Answer]  # by number of the node; those that did not come are missing
    silent: list[int]  # nodes whose facts are there, but which do not see what node 0 writes


def meet(folder: Path, node: int, num_nodes: int, facts: NodeFacts, patience_s: float) -> Meeting | None:
    """Bring this node's facts. Node 0 returns what all said, the others None. OSError where nothing can be written.

    patience_s: how long to wait for the facts of the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Their clocks start now: a node that is late is waited for, one that does not come is not waited for twice.
    deadline = time.monotonic() + patience_s
    if node == 0:
        return _chair(folder, num_nodes, facts, deadline)
    write_atomically(folder / f"{node}.facts", facts.to_json())
    if _wait(lambda: "call" in os.listdir(folder), deadline):
        answer = {"time": time.time(), "lock": _try_lock(folder / "lock")}
        write_atomically(folder / f"{node}.answer", json.dumps(answer))
    return None


def _chair(folder: Path, num_nodes: int, own: NodeFacts, deadline: float) -> Meeting:
    others = range(1, num_nodes)
    answers, silent = {0: Answer(own, "held", (0.0, 0.0))}, []
    # A list of names asks the file server; a look at one name may be answered by this host's memory that it was absent.
    _wait(lambda: {f"{n}.facts" for n in others} <= set(os.listdir(folder)), deadline)
    came = [n for n in others if f"{n}.facts" in os.listdir(folder)]
    with (folder / "lock").open("w") as lock:
        supported = _lock(lock.fileno())
        answers[0] = Answer(own, "held" if supported else "missing", (0.0, 0.0))
        called = time.time()
        write_atomically(folder / "call", "")
        seen: dict[int, float] = {}

        def all_seen() -> bool:
            names, now = os.listdir(folder), time.time()
            for n in came:
                if f"{n}.answer" in names:
                    seen.setdefault(n, now)
            return len(seen) == len(came)

        _wait(all_seen, time.monotonic() + ANSWER_S)
    for n in came:
        facts = NodeFacts.from_json((folder / f"{n}.facts").read_text(encoding="utf-8"))
        if n not in seen:
            silent.append(n)
            answers[n] = Answer(facts, "held", (0.0, 0.0))
            continue
        said = json.loads((folder / f"{n}.answer").read_text(encoding="utf-8"))
        answers[n] = Answer(facts, said["lock"], (said["time"] - seen[n], said["time"] - called))
    return Meeting(answers, silent)


def _wait(condition: Callable[[], bool], deadline: float) -> bool:
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _lock(descriptor: int) -> bool:
    """Take the lock; False where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return False
    return True


def _try_lock(path: Path) -> str:
    with path.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return "missing" if error.errno in NO_FLOCK - {errno.EAGAIN} else "held"
    return "free"


def clean_up(folder: Path) -> None:
    """Remove what the meeting left; called by node 0 once nobody needs it."""
    with suppress(OSError):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
