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
class PendingAnswer:
    """One answer to grade, a "row" in this package; `outcomes` grows grader by grader."""

    id: int
    payload: bytes  # pickle of (response, answer, data source, extra)
    future: Future[Graded]
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    attempts: int = 0  # how many workers have ended while they graded it


class Inbox:
    """The waiting rows, and a socket that wakes the dispatcher when it sleeps although a row could be graded."""

    def __init__(self) -> None:
        self.closing = False
        self.failure: VerifierError | None = None
        self.wake_r, self._wake_w = socket.socketpair()
        self.wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._lock = threading.Lock()
        self._rows: deque[PendingAnswer] = deque()
        self._wake_on_put = False

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, row: PendingAnswer) -> None:
        """Queue a row. Raises VerifierError once the pool has failed or is closed."""
        with self._lock:
            if self.failure is not None:
                raise VerifierError(str(self.failure)) from self.failure
            if self.closing:
                raise VerifierError("the verifier pool is closed")
            self._rows.append(row)
            wake, self._wake_on_put = self._wake_on_put, False
        if wake:
            self._wake()

    def take(self, max_rows: int, max_bytes: int) -> list[PendingAnswer]:
        """Remove and return the next rows whose futures were not cancelled.

        If `max_bytes` is above 0, the first row is returned whatever its size.
        """
        rows: list[PendingAnswer] = []
        with self._lock:
            while self._rows and len(rows) < max_rows and max_bytes > 0:
                if rows and len(self._rows[0].payload) > max_bytes:
                    break
                row = self._rows.popleft()
                if row.future.running() or row.future.set_running_or_notify_cancel():
                    rows.append(row)
                    max_bytes -= len(row.payload)
        return rows

    def put_back(self, rows: Iterable[PendingAnswer]) -> None:
        """Put the rows that a lost worker left ungraded at the front."""
        with self._lock:
            self._rows.extendleft(row for row in reversed(list(rows)) if not row.future.done())

    def may_sleep(self, can_take_rows: bool) -> bool:
        """Whether the dispatcher may sleep: not if it can take rows and one is waiting. The next `put` wakes it."""
        with self._lock:
            self._wake_on_put = can_take_rows and not self._rows
            return not (can_take_rows and self._rows)

    def close(self) -> None:
        """Ask the dispatcher to end."""
        self.closing = True
        self._wake()

    def fail(self, failure: VerifierError, in_progress: Iterable[PendingAnswer]) -> None:
        """Give `failure` to every row that is left and refuse later ones. The dispatcher calls this when it ends."""
        with self._lock:
            self.failure = failure
            rows = [*in_progress, *self._rows]
            self._rows.clear()
            self.wake_r.close()
            self._wake_w.close()
        for row in rows:
            if row.future.running() or row.future.set_running_or_notify_cancel():
                row.future.set_exception(failure)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: there is no dispatcher any more
            self._wake_w.send(b"w")
