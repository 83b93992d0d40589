"""A server that answers as SGLang does, but only waits: the time of every token is that of a model of an engine.

    python benchmarks/waiting_engine.py --port 30000 --settings settings.json [--host ADDRESS] [--log calls.jsonl]

settings.json: the fields of `megatron_nft.plan.decoding.DecodeModel`, and of answers `mean_tokens`, `max_tokens`,
`spread` (standard deviation of the logarithm of the length) and `seed`; if need be `sync_s` (seconds that weights
take), `version` (of the weights at the start), `first` (from which answers and requests are numbered: servers of one
run begin with different ones) and `sessions` (true: sync.in_flight=continue is taken, as by newer servers). Weights are
taken from disk, and not read.

An answer says what it is, so that one that goes on from a prefix is the same answer, on another server too: MARK, its
length and its serial number, two tokens each, then tokens that follow from serial number and position, and the end
token that was asked for. It is right (`grade`) where its length is even. Log-probs say which request made a token: that
of request n is -(1 + n / 2^20), which fp32 holds exactly for n < 2^20. The log has a line for every request, also where
nobody waits for its answer any more.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nft.plan.decoding import Answer, DecodeModel, SimulatedEngine
from megatron_nft.plan.rollout_modes import Demand, log_mean

MARK, BASE, FIRST, HEAD = 0, 200, 4, 5
"""The padding token of the synthetic task, digits of the head and the first token that stands for one, tokens of the
head."""


def head_of(length: int, serial: int) -> list[int]:
    digits = [*divmod(length, BASE), *divmod(serial % BASE**2, BASE)]
    return [MARK, *(FIRST + digit for digit in digits)]


def tokens_of(length: int, serial: int, end: int) -> list[int]:
    """The whole answer."""
    body = [33 + (serial * 7 + position * 13) % 90 for position in range(HEAD, length - 1)]
    return [*head_of(length, serial), *body, end]


def read_head(ids: list[int]) -> tuple[int, int]:
    """(length, serial number) of the answer that begins with the MARK in `ids`."""
    at = ids.index(MARK)
    digits = [token - FIRST for token in ids[at + 1 : at + HEAD]]
    return digits[0] * BASE + digits[1], digits[2] * BASE + digits[3]


def grade(response: str, answer: str, data_source: str, extra: dict[str, Any] | None) -> bool:
    """A grader for `verify.grader=waiting_engine.grade`: right where the text has an even number of characters."""
    return len(response) % 2 == 0


def grade_few(response: str, answer: str, data_source: str, extra: dict[str, Any] | None) -> bool:
    """The same for an answer of ten."""
    return sum(map(ord, response)) % 10 == 0


@dataclass(eq=False)
class Call:
    """A request under way."""

    number: int
    answer: Answer
    serial: int
    start: int  # tokens of the answer that came with the prompt
    limit: int  # tokens of the answer, this request's included, after which it is cut off
    end: int
    done: threading.Event = field(default_factory=threading.Event)
    reason: str = ""
    spans: list[list[int]] = field(default_factory=list)  # [version, first token] of this request


class WaitingEngine:
    """The engine behind the server; a thread of its own lets its time pass."""

    def __init__(self, model: DecodeModel, demand: Demand, seed: int, first: int = 0, version: int = 0) -> None:
        """first, version: see the module."""
        self._engine, self._demand, self._rng = SimulatedEngine(model), demand, np.random.default_rng(seed)
        self._mu, self._serial, self._number = log_mean(demand), first, first
        self._calls: dict[Answer, Call] = {}  # in the batch
        self._queue: deque[Call] = deque()
        self._changed = threading.Condition()
        self._began, self.paused, self.version, self.busy_s = time.monotonic(), False, version, 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def call(self, ids: list[int], limit: int, end: int) -> Call:
        """Answer, or go on with the answer in `ids`; returns when it has ended or was aborted."""
        with self._changed:
            if MARK in ids:
                length, serial = read_head(ids)
                start = len(ids) - ids.index(MARK)
            else:
                draw = np.exp(self._rng.normal(self._mu, self._demand.spread))
                length = int(np.clip(np.rint(draw), HEAD + 1, self._demand.max_response_tokens))
                start, serial, self._serial = 0, self._serial, self._serial + 1
            last = min(length, start + limit)
            answer = Answer(serial, last, len(ids) - start, float(start))
            call, self._number = Call(self._number, answer, serial, start, last, end), self._number + 1
            call.answer.version = length  # of the whole answer
            self._queue.append(call)
            self._changed.notify_all()
        call.done.wait()
        return call

    def abort(self) -> None:
        """End everything as it is."""
        with self._changed:
            self._pass_time()
            self._engine.stop_all()
            for call in [*self._calls.values(), *self._queue]:
                self._end(call, "abort")
            self._calls.clear()
            self._queue.clear()

    def retract(self) -> None:
        """Put everything in the batch back to the front of the queue, with the tokens that it has."""
        with self._changed:
            self._pass_time()
            self._engine.stop_all()
            self._queue.extendleft(reversed(list(self._calls.values())))
            self._calls.clear()

    def set_version(self, version: int) -> None:
        with self._changed:
            self._pass_time()
            self.version = version
            for call in self._calls.values():
                self._note_version(call)

    def _note_version(self, call: Call) -> None:
        if not call.spans or call.spans[-1][0] != self.version:
            call.spans.append([self.version, int(call.answer.done)])

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._calls and not self._queue

    def resume(self) -> None:
        with self._changed:
            self.paused = False
            self._changed.notify_all()

    def _end(self, call: Call, reason: str) -> None:
        call.reason = reason
        call.done.set()

    def _pass_time(self) -> None:
        """Bring the engine to the present."""
        now = time.monotonic() - self._began
        while self._engine.next_time <= now:
            for answer in self._engine.advance(self._engine.next_time):
                call = self._calls.pop(answer)
                self._end(call, "stop" if call.answer.length == call.answer.version else "length")
            self._fill()
        self._engine.advance(now)
        self.busy_s = self._engine.busy_s

    def _fill(self) -> None:
        while self._queue and self._engine.rows < self._engine.model.max_rows and not self.paused:
            call = self._queue.popleft()
            self._note_version(call)
            self._calls[call.answer] = call
            self._engine.start(call.answer)

    def _run(self) -> None:
        with self._changed:
            while True:
                self._pass_time()
                self._fill()
                left = self._engine.next_time - (time.monotonic() - self._began)
                self._changed.wait(None if left == float("inf") else max(0.0, left))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: WaitingEngine
    sync_s, sessions = 0.0, False
    log: Any = None
    lock = threading.Lock()

    def do_GET(self) -> None:
        if self.path == "/begin_weight_update":
            return self._send({}, 405 if self.sessions else 404)
        return self._send({"weight_version": str(self.engine.version), "busy_s": self.engine.busy_s})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null") or {}
        name = self.path.strip("/").replace("/", "_")
        answer = getattr(self, f"_{name}", None)
        if answer is None:
            return self._send({}, 404)
        return self._send(*answer(body))

    def _generate(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        params, ids = body["sampling_params"], body["input_ids"]
        if params["max_new_tokens"] == 0:
            triples = [[None if i == 0 else -1.0, token, None] for i, token in enumerate(ids)]
            return {"meta_info": {"input_token_logprobs": triples}}, 200
        call = self.engine.call(ids, params["max_new_tokens"], params["stop_token_ids"][0])
        there = min(int(call.answer.done + 1e-6), call.answer.length)
        there = there if there >= HEAD else call.start  # a part of the head would not say which answer it is
        new = tokens_of(call.answer.version, call.serial, call.end)[call.start : there]
        meta: dict[str, Any] = {"finish_reason": {"type": call.reason}, "weight_version": str(self.engine.version)}
        if call.spans:
            ends = [min(first, there) for _, first in call.spans[1:]] + [there]
            spans = [
                {"version": str(version), "start": first - call.start, "end": end - call.start}
                for (version, first), end in zip(call.spans, ends, strict=True)
                if end > first
            ]
            meta["weight_version"] = spans[-1]["version"] if spans else str(call.spans[-1][0])
            meta["weight_versions"] = spans
        meta["output_token_logprobs"] = [[-(1 + call.number / 2**20), token, None] for token in new]
        answer = {"output_ids": new, "meta_info": meta}
        if self.log is not None:
            with self.lock:
                self.log.write(json.dumps({"input_ids": ids} | answer) + "\n")
                self.log.flush()
        return answer, 200

    def _abort_request(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        self.engine.abort()
        return {}, 200

    def _pause_generation(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        self.engine.paused = True
        if body["mode"] == "abort":
            self.engine.abort()
        else:
            self.engine.retract()
        return {}, 200

    def _continue_generation(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        self.engine.resume()
        return {}, 200

    def _flush_cache(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        return {}, 200 if self.engine.idle or self.engine.paused else 400

    def _begin_weight_update(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        return {}, 200 if self.engine.idle or self.engine.paused else 400  # an engine would wait for those under way

    def _end_weight_update(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        return {}, 200

    def _update_weights_from_disk(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        time.sleep(self.sync_s)
        self.engine.set_version(int(body["weight_version"]))
        return {"success": True}, 200

    def _update_weight_version(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        return {"success": True}, 200

    def _send(self, value: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--log", type=Path, help="a line for every request that was answered")
    args = parser.parse_args()
    settings = json.loads(args.settings.read_text())
    model = DecodeModel(**{f.name: settings[f.name] for f in fields(DecodeModel)})
    demand = Demand(1, 1, 1, 0.5, settings["mean_tokens"], settings["max_tokens"], 0, 0, settings["spread"])
    given = {name: settings[name] for name in ("first", "version") if name in settings}
    Handler.engine = WaitingEngine(model, demand, settings["seed"], **given)
    Handler.sync_s, Handler.sessions = settings.get("sync_s", 0.0), settings.get("sessions", False)
    if args.log:
        Handler.log = args.log.open("a")
    server = Server((args.host, args.port), Handler)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
