"""Rows on their way from `VerifierPool.submit` (any thread) to the dispatcher (one thread)."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_nft.verify.outcome import Graded, Outcome


class VerifierError(RuntimeError):
    """Grading is impossible: a grader cannot be loaded, the processes cannot start, or the pool is closed."""


@dataclass(slots=True, eq=False)
class Row:
    """One answer to grade; `outcomes` fills up grader by grader."""

    id: int
    payload: bytes  # pickle of (response, answer, data source, extra)
    future: Future[Graded]
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    attempts: int = 0  # workers that were ended from outside while they graded it


class Inbox:
    """Waiting rows, and a socket that wakes the dispatcher when it sleeps although it could take a row."""

    def __init__(self) -> None:
        self.closing = False
        self.failure: VerifierError | None = None
        self.wake_r, self._wake_w = socket.socketpair()
        self.wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._lock = threading.Lock()
        self._rows: deque[Row] = deque()
        self._hungry = False

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, row: Row) -> None:
        """Queue a row. VerifierError once the pool has failed or is closed."""
        with self._lock:
            if self.failure is not None:
                raise VerifierError(str(self.failure)) from self.failure
            if self.closing:
                raise VerifierError("the verifier pool is closed")
            self._rows.append(row)
            wake, self._hungry = self._hungry, False
        if wake:
            self._wake()

    def take(self, max_rows: int, max_bytes: int) -> list[Row]:
        """The next rows whose futures were not cancelled; the first one whatever its size if `max_bytes` is > 0."""
        rows: list[Row] = []
        with self._lock:
            while self._rows and len(rows) < max_rows and max_bytes > 0:
                if rows and len(self._rows[0].payload) > max_bytes:
                    break
                row = self._rows.popleft()
                if row.future.running() or row.future.set_running_or_notify_cancel():
                    rows.append(row)
                    max_bytes -= len(row.payload)
        return rows

    def put_back(self, rows: Iterable[Row]) -> None:
        """Rows that a lost worker left ungraded, to the front."""
        with self._lock:
            self._rows.extendleft(row for row in reversed(list(rows)) if not row.future.done())

    def may_sleep(self, hungry: bool) -> bool:
        """False when a row waits for a dispatcher that is `hungry`; from now on `put` wakes it."""
        with self._lock:
            self._hungry = hungry and not self._rows
            return not (hungry and self._rows)

    def close(self) -> None:
        self.closing = True
        self._wake()

    def fail(self, failure: VerifierError, under_way: Iterable[Row]) -> None:
        """Every row that is left gets `failure`; later ones are refused. Called by the dispatcher at its end."""
        with self._lock:
            self.failure = failure
            rows = [*under_way, *self._rows]
            self._rows.clear()
            self.wake_r.close()
            self._wake_w.close()
        for row in rows:
            if row.future.running() or row.future.set_running_or_notify_cancel():
                row.future.set_exception(failure)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody is there to wake
            self._wake_w.send(b"w")
