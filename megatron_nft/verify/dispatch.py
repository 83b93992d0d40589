"""The thread behind `VerifierPool`: it owns all sockets, hands out rows, measures their time and replaces workers.

A worker holds several rows at a time and returns each verdict by itself, so that the thread knows which row is being
graded and since when, at a cost of a few microseconds per row.
"""

from __future__ import annotations

import itertools
import json
import selectors
import signal
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_nft.types import ReasonKind, Verdict
from megatron_nft.verify.forkserver import HEADER, ForkServer
from megatron_nft.verify.inbox import Inbox, PendingAnswer, VerifierError
from megatron_nft.verify.outcome import Outcome, combine
from megatron_nft.verify.stopwatch import Stopwatch

if TYPE_CHECKING:
    from megatron_nft.config import VerifyConfig

READ_BYTES = 1 << 20  # read from a worker at once
WINDOW_ROWS = 64  # a worker holds at most this many rows
WINDOW_BYTES = 1 << 20  # a worker holds at most this many bytes of rows, unless it holds a single row
START_TIMEOUT_S = 120.0
MAX_FORKSERVER_STARTS = 3  # in succession, without a verdict in between
MAX_ATTEMPTS = 2  # for a row whose worker was ended from outside


@dataclass(slots=True, eq=False)
class WorkerHandle:
    """The owner's side of one worker process."""

    id: int
    forkserver: ForkServer  # which forked it
    socket: socket.socket
    stopwatch: Stopwatch
    rows: deque[PendingAnswer] = field(default_factory=deque)  # sent, not answered; the first one is being graded
    num_bytes: int = 0  # of `rows`
    unread: bytes = b""
    unsent: bytearray = field(default_factory=bytearray)
    pid: int | None = None  # known once the worker has started; its time starts then
    retiring: bool = False  # it has said that it ends after the last verdict
    ended: bool = False  # its socket is closed; the fork server will say why

    @property
    def can_take_rows(self) -> bool:
        """Whether it holds so few rows that it should get more."""
        return len(self.rows) <= WINDOW_ROWS // 2 and not self.retiring and not self.ended


class Dispatcher:
    """Hands the rows of `inbox` to workers until the inbox is closed; sets `ready` when the graders are loaded."""

    def __init__(self, config: VerifyConfig, names: tuple[str, ...], inbox: Inbox, ready: threading.Event) -> None:
        self.config = config
        self.names = names
        self.inbox = inbox
        self.ready = ready
        self.selector = selectors.DefaultSelector()
        self.workers: dict[int, WorkerHandle] = {}
        self.worker_ids = itertools.count()
        self.forkserver: ForkServer | None = None
        self.forkserver_ready = False
        self.forkserver_starts = 0  # since the last verdict
        self.start_deadline = float("inf")  # time.monotonic

    def run(self) -> None:
        """Grade until the inbox is closed. Raises VerifierError when grading is impossible."""
        self.selector.register(self.inbox.wake_r, selectors.EVENT_READ, None)
        self._start_forkserver()
        while not self.inbox.closing:
            self._assign()
            self._wait()
            self._expire()

    def rows_in_progress(self) -> list[PendingAnswer]:
        """Return the rows that workers hold."""
        return [row for worker in self.workers.values() for row in worker.rows]

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.socket.close()
        if self.forkserver is not None:
            self.forkserver.close()
        self.selector.close()

    # ------------------------------------------------------------------ processes

    def _start_forkserver(self) -> None:
        self.forkserver_starts += 1
        if self.forkserver_starts > MAX_FORKSERVER_STARTS:
            raise VerifierError(f"the verifier's fork server died {MAX_FORKSERVER_STARTS} times in a row")
        self.forkserver_ready = False
        self.forkserver = ForkServer(",".join(self.names), self.config.memory_bytes)
        self.start_deadline = time.monotonic() + START_TIMEOUT_S
        self.selector.register(self.forkserver.control, selectors.EVENT_READ, self.forkserver)
        for _ in range(self.config.workers):
            self._start_worker(self.forkserver)

    def _start_worker(self, forkserver: ForkServer) -> None:
        worker_id = next(self.worker_ids)
        stopwatch = Stopwatch(self.config.timeout_s)
        worker = WorkerHandle(worker_id, forkserver, forkserver.fork(worker_id), stopwatch)
        self.workers[worker_id] = worker
        self.selector.register(worker.socket, selectors.EVENT_READ, worker)

    def _drop_worker(self, worker: WorkerHandle) -> list[PendingAnswer]:
        """Forget a worker. Returns its unanswered rows."""
        del self.workers[worker.id]
        if not worker.ended:
            self.selector.unregister(worker.socket)
        worker.socket.close()
        return list(worker.rows)

    def _forkserver_died(self, forkserver: ForkServer) -> None:
        """Start a new fork server; rows in progress are graded again."""
        rows = [row for worker in list(self.workers.values()) for row in self._drop_worker(worker)]
        self.selector.unregister(forkserver.control)
        forkserver.close()
        self.inbox.put_back(rows)
        self._start_forkserver()

    def _on_forkserver_message(self, message: dict[str, Any]) -> None:
        if "error" in message:
            raise VerifierError(message["error"])
        if "ready" in message:
            self.forkserver_ready = True
            self.start_deadline = float("inf")
            self.ready.set()
        elif message["exit"] in self.workers:
            self._worker_died(self.workers[message["exit"]], message["status"])

    def _worker_died(self, worker: WorkerHandle, status: int) -> None:
        """Replace a worker; the row that it was grading gets a verdict if the row is to blame.

        status: as from os.waitpid.
        """
        self._read_worker(worker)  # verdicts that it sent before its end
        rows = self._drop_worker(worker)
        if rows and not worker.retiring:
            blamed = rows[0]
            blamed.attempts += 1
            number = status & 0x7F
            from_outside = number in (signal.SIGKILL, signal.SIGTERM)  # by the kernel, short of memory, or by a person
            if not from_outside or blamed.attempts >= MAX_ATTEMPTS:
                end = signal.Signals(number).name if number else f"exit code {status >> 8}"
                reason = f"the grading process ended with {end}"
                outcome = Outcome(Verdict.NO_VERDICT, reason=reason, kind=ReasonKind.GRADER_FAILED)
                self._add_outcome(blamed, outcome, 0.0)
        self.inbox.put_back(rows)
        self._start_worker(worker.forkserver)

    # ------------------------------------------------------------------ rows

    def _assign(self) -> None:
        """Send rows to the workers that can take some, to the one with the fewest first."""
        if not self.forkserver_ready:
            return
        for worker in sorted(self.workers.values(), key=lambda worker: len(worker.rows)):
            if not worker.can_take_rows:
                continue
            # Smaller shares towards the end, so that no worker is left with many rows while the others are idle.
            share = -(-len(self.inbox) // (2 * len(self.workers)))
            rows = self.inbox.take(min(WINDOW_ROWS - len(worker.rows), share), WINDOW_BYTES - worker.num_bytes)
            if rows:
                starts = not worker.rows and worker.pid is not None
                worker.rows.extend(rows)
                worker.num_bytes += sum(len(row.payload) for row in rows)
                if starts:
                    worker.stopwatch.start()
                for row in rows:
                    worker.unsent += HEADER.pack(row.id, len(row.outcomes), len(row.payload)) + row.payload
                self._send(worker)

    def _add_outcome(self, row: PendingAnswer, outcome: Outcome, seconds: float) -> None:
        """Record the next grader's outcome for a row; after the last one its future is done."""
        row.outcomes.append(outcome)
        row.seconds += seconds
        if len(row.outcomes) == len(self.names):
            policies = (self.config.on_disagreement, self.config.on_failure)
            row.future.set_result(combine(self.names, row.outcomes, row.seconds, *policies))

    # ------------------------------------------------------------------ sockets and time

    def _wait(self) -> None:
        """Sleep until a socket has data or the next deadline is reached, and process the data."""
        next_deadline = min([self.start_deadline, *(worker.stopwatch.deadline for worker in self.workers.values())])
        sleep_s = max(0.0, next_deadline - time.monotonic())
        can_take_rows = self.forkserver_ready and any(worker.can_take_rows for worker in self.workers.values())
        if not self.inbox.may_sleep(can_take_rows):
            sleep_s = 0.0
        for key, mask in self.selector.select(None if sleep_s == float("inf") else sleep_s):
            if key.data is None:
                self.inbox.wake_r.recv(4096)
            elif isinstance(key.data, ForkServer):
                messages = key.data.read()
                if messages is None:
                    self._forkserver_died(key.data)
                    return
                for message in messages:
                    self._on_forkserver_message(message)
            elif key.data.id in self.workers:
                if mask & selectors.EVENT_WRITE:
                    self._send(key.data)
                if mask & selectors.EVENT_READ:
                    self._read_worker(key.data)

    def _send(self, worker: WorkerHandle) -> None:
        """Send as much as the socket takes; the selector says when it takes more."""
        try:
            sent = worker.socket.send(worker.unsent)
            del worker.unsent[:sent]
        except BlockingIOError:
            pass
        except ConnectionError:
            worker.unsent.clear()  # reading will show that the worker has ended
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0)
        if self.selector.get_key(worker.socket).events != events:
            self.selector.modify(worker.socket, events, worker)

    def _read_worker(self, worker: WorkerHandle) -> None:
        """Process all verdicts that have arrived."""
        while not worker.ended:
            try:
                data = worker.socket.recv(READ_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            if data:
                self._process_verdicts(worker, data)
                if len(data) < READ_BYTES:
                    return  # that was all; asking again would cost a system call and an exception for each verdict
            else:  # a closed socket stays readable for ever: stop watching it
                worker.ended = True
                worker.stopwatch.stop()
                self.selector.unregister(worker.socket)

    def _process_verdicts(self, worker: WorkerHandle, data: bytes) -> None:
        *lines, worker.unread = (worker.unread + data).split(b"\n")
        if not lines:
            return
        for line in lines:
            self._process_line(worker, json.loads(line))
        if worker.rows:
            worker.stopwatch.start()
        else:
            worker.stopwatch.stop()

    def _process_line(self, worker: WorkerHandle, line: list[Any]) -> None:
        """Process [pid], which a worker sends once, or a verdict."""
        if worker.pid is None:
            worker.pid = line[0]
            return
        row_id, index, verdict, extracted, reason, kind, reward, seconds, worker.retiring = line
        row = worker.rows[0]
        if row.id != row_id or index != len(row.outcomes):
            raise RuntimeError(f"a worker answered row {row_id}, not {row.id}")
        kind = None if kind is None else ReasonKind(kind)
        self._add_outcome(row, Outcome(Verdict(verdict), extracted, reason, kind=kind, reward=reward), seconds)
        if len(row.outcomes) == len(self.names):
            worker.rows.popleft()
            worker.num_bytes -= len(row.payload)
        self.forkserver_starts = 0

    def _expire(self) -> None:
        """Kill the workers whose row has run out of time, unless its verdict has already arrived."""
        now = time.monotonic()
        if now > self.start_deadline:
            raise VerifierError(f"the verifier's fork server was not up after {START_TIMEOUT_S:g} s")
        for worker in [worker for worker in self.workers.values() if now >= worker.stopwatch.deadline]:
            self._read_worker(worker)
            if worker.pid is None or not worker.stopwatch.expired(worker.pid):
                continue
            worker.forkserver.kill(worker.id)
            rows = self._drop_worker(worker)
            reason = f"no verdict after {self.config.timeout_s:g} s"
            outcome = Outcome(Verdict.TIMEOUT, reason=reason, kind=ReasonKind.TIMEOUT)
            self._add_outcome(rows[0], outcome, self.config.timeout_s)
            self.inbox.put_back(rows)
            self._start_worker(worker.forkserver)
