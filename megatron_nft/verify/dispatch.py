"""The thread behind `VerifierPool`: it owns all sockets, hands out rows, keeps their time, replaces workers.

Rows go to a worker several at a time and each verdict comes back by itself, so the thread knows which row is under way
and since when, at a few microseconds per row.
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

from megatron_nft.types import Verdict
from megatron_nft.verify.forkserver import HEADER, Nursery
from megatron_nft.verify.inbox import Inbox, Row, VerifierError
from megatron_nft.verify.outcome import Outcome, combine
from megatron_nft.verify.stopwatch import Stopwatch

if TYPE_CHECKING:
    from megatron_nft.config import VerifyConfig

WINDOW_ROWS = 64  # rows that a worker may hold
WINDOW_BYTES = 1 << 20  # of rows that a worker may hold, unless it is a single one
START_TIMEOUT_S = 120.0
MAX_TEMPLATE_STARTS = 3  # in a row, without a verdict in between
MAX_ATTEMPTS = 2  # of a row whose worker was ended from outside


@dataclass(slots=True, eq=False)
class Worker:
    """The owner's side of one worker process."""

    id: int
    socket: socket.socket
    stopwatch: Stopwatch
    rows: deque[Row] = field(default_factory=deque)  # sent, not answered; the first is under way
    num_bytes: int = 0  # of rows
    unread: bytes = b""
    unsent: bytearray = field(default_factory=bytearray)
    pid: int | None = None  # known once it is up; its time starts then
    retiring: bool = False  # it said that it ends after the last verdict
    ended: bool = False  # its socket is at its end; the template will say why

    @property
    def has_room(self) -> bool:
        return len(self.rows) <= WINDOW_ROWS // 2 and not self.retiring and not self.ended


class Dispatcher:
    """Hands rows of `inbox` to workers until the inbox is closed; sets `ready` when the graders are loaded."""

    def __init__(self, config: VerifyConfig, names: tuple[str, ...], inbox: Inbox, ready: threading.Event) -> None:
        self.config = config
        self.names = names
        self.inbox = inbox
        self.ready = ready
        self.selector = selectors.DefaultSelector()
        self.workers: dict[int, Worker] = {}
        self.worker_ids = itertools.count()
        self.nursery: Nursery | None = None
        self.template_ready = False
        self.template_starts = 0
        self.start_deadline = float("inf")

    def run(self) -> None:
        """Until the inbox is closed. VerifierError when grading is impossible."""
        self.selector.register(self.inbox.wake_r, selectors.EVENT_READ, None)
        self._start_template()
        while not self.inbox.closing:
            self._assign()
            self._wait()
            self._expire()

    def rows_under_way(self) -> list[Row]:
        return [row for worker in self.workers.values() for row in worker.rows]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.socket.close()
        if self.nursery is not None:
            self.nursery.close()
        self.selector.close()

    # ------------------------------------------------------------------ processes

    def _start_template(self) -> None:
        self.template_starts += 1
        if self.template_starts > MAX_TEMPLATE_STARTS:
            raise VerifierError(f"the verifier's template process died {MAX_TEMPLATE_STARTS} times in a row")
        self.template_ready = False
        self.nursery = Nursery(",".join(self.names), self.config.memory_bytes)
        self.start_deadline = time.monotonic() + START_TIMEOUT_S
        self.selector.register(self.nursery.control, selectors.EVENT_READ, self.nursery)
        for _ in range(self.config.workers):
            self._start_worker()

    def _start_worker(self) -> None:
        worker_id = next(self.worker_ids)
        worker = Worker(worker_id, self.nursery.fork(worker_id), Stopwatch(self.config.timeout_s))
        self.workers[worker_id] = worker
        self.selector.register(worker.socket, selectors.EVENT_READ, worker)

    def _drop_worker(self, worker: Worker) -> list[Row]:
        """Forget a worker; its unanswered rows."""
        del self.workers[worker.id]
        if not worker.ended:
            self.selector.unregister(worker.socket)
        worker.socket.close()
        return list(worker.rows)

    def _template_died(self) -> None:
        """Start again with a new template; rows under way are graded anew."""
        rows = [row for worker in list(self.workers.values()) for row in self._drop_worker(worker)]
        self.selector.unregister(self.nursery.control)
        self.nursery.close()
        self.inbox.put_back(rows)
        self._start_template()

    def _template_says(self, message: dict[str, Any]) -> None:
        if "error" in message:
            raise VerifierError(message["error"])
        if "ready" in message:
            self.template_ready = True
            self.start_deadline = float("inf")
            self.ready.set()
        elif message["exit"] in self.workers:
            self._worker_died(self.workers[message["exit"]], message["status"])

    def _worker_died(self, worker: Worker, status: int) -> None:
        self._read_worker(worker)  # verdicts that it sent before its end
        rows = self._drop_worker(worker)
        if rows and not worker.retiring:
            blamed = rows[0]
            blamed.attempts += 1
            number = status & 0x7F
            from_outside = number in (signal.SIGKILL, signal.SIGTERM)  # the kernel short of memory, a person
            if not from_outside or blamed.attempts >= MAX_ATTEMPTS:
                end = signal.Signals(number).name if number else f"exit code {status >> 8}"
                self._outcome(blamed, Outcome(Verdict.UNPARSEABLE, reason=f"the grading process ended with {end}"), 0.0)
        self.inbox.put_back(rows)
        self._start_worker()

    # ------------------------------------------------------------------ rows

    def _assign(self) -> None:
        """Fill up the workers, the emptiest first."""
        if not self.template_ready:
            return
        for worker in sorted(self.workers.values(), key=lambda worker: len(worker.rows)):
            if not worker.has_room:
                continue
            share = -(-len(self.inbox) // (2 * len(self.workers)))  # smaller towards the end: nobody waits long
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

    def _outcome(self, row: Row, outcome: Outcome, seconds: float) -> None:
        row.outcomes.append(outcome)
        row.seconds += seconds
        if len(row.outcomes) == len(self.names):
            row.future.set_result(combine(self.names, row.outcomes, row.seconds, self.config.on_disagreement))

    # ------------------------------------------------------------------ sockets and time

    def _wait(self) -> None:
        """Sleep until a socket has something or the next deadline, and deal with what came."""
        next_deadline = min([self.start_deadline, *(worker.stopwatch.deadline for worker in self.workers.values())])
        sleep_s = max(0.0, next_deadline - time.monotonic())
        hungry = self.template_ready and any(worker.has_room for worker in self.workers.values())
        if not self.inbox.may_sleep(hungry):
            sleep_s = 0.0
        for key, mask in self.selector.select(None if sleep_s == float("inf") else sleep_s):
            if key.data is None:
                self.inbox.wake_r.recv(4096)
            elif isinstance(key.data, Nursery):
                messages = key.data.read()
                if messages is None:
                    self._template_died()
                    return
                for message in messages:
                    self._template_says(message)
            elif key.data.id in self.workers:
                if mask & selectors.EVENT_WRITE:
                    self._send(key.data)
                if mask & selectors.EVENT_READ:
                    self._read_worker(key.data)

    def _send(self, worker: Worker) -> None:
        try:
            sent = worker.socket.send(worker.unsent)
            del worker.unsent[:sent]
        except BlockingIOError:
            pass
        except ConnectionError:
            worker.unsent.clear()  # its end will be read
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0)
        if self.selector.get_key(worker.socket).events != events:
            self.selector.modify(worker.socket, events, worker)

    def _read_worker(self, worker: Worker) -> None:
        """Take all verdicts that are there."""
        while not worker.ended:
            try:
                data = worker.socket.recv(1 << 20)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            if data:
                self._take_verdicts(worker, data)
            else:  # an ended socket is readable for ever: stop looking at it
                worker.ended = True
                worker.stopwatch.stop()
                self.selector.unregister(worker.socket)

    def _take_verdicts(self, worker: Worker, data: bytes) -> None:
        *lines, worker.unread = (worker.unread + data).split(b"\n")
        if not lines:
            return
        for line in lines:
            self._take_line(worker, json.loads(line))
        if worker.rows:
            worker.stopwatch.start()
        else:
            worker.stopwatch.stop()

    def _take_line(self, worker: Worker, line: list[Any]) -> None:
        """[pid], said once, or a verdict."""
        if worker.pid is None:
            worker.pid = line[0]
            return
        row_id, index, verdict, extracted, reason, seconds, worker.retiring = line
        row = worker.rows[0]
        if row.id != row_id or index != len(row.outcomes):
            raise RuntimeError(f"a worker answered row {row_id}, not {row.id}")
        self._outcome(row, Outcome(Verdict(verdict), extracted, reason), seconds)
        if len(row.outcomes) == len(self.names):
            worker.rows.popleft()
            worker.num_bytes -= len(row.payload)
        self.template_starts = 0

    def _expire(self) -> None:
        """Kill workers whose row has run out of time, unless the verdict is already there to be read."""
        now = time.monotonic()
        if now > self.start_deadline:
            raise VerifierError(f"the verifier's template process was not up after {START_TIMEOUT_S:g} s")
        for worker in [worker for worker in self.workers.values() if now >= worker.stopwatch.deadline]:
            self._read_worker(worker)
            if not worker.stopwatch.expired(worker.pid):
                continue
            self.nursery.kill(worker.id)
            rows = self._drop_worker(worker)
            reason = f"no verdict after {self.config.timeout_s:g} s"
            self._outcome(rows[0], Outcome(Verdict.TIMEOUT, reason=reason), self.config.timeout_s)
            self.inbox.put_back(rows)
            self._start_worker()
