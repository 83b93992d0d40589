"""Streams of answers against local servers that abort as SGLang does: no token twice, and none lost."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest

from megatron_nft.config import ServerConfig
from megatron_nft.engines import asking, streams, targets
from megatron_nft.engines.engine import AnswerRequest, EngineError, SamplingParams
from megatron_nft.engines.sglang.client import SGLangEngine

END = 7
SAMPLING = SamplingParams(40, stop_token_ids=(END,))


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(asking, "BACKOFF_S", 0.01)


def next_token(ids: list[int]) -> int:
    """A token that hangs on all before it: one that is made twice, lost or changed on the way shows at once."""
    value = 17
    for token in ids:
        value = (value * 31 + token) % 1009
    return value % 60


def whole(prompt: list[int]) -> list[int]:
    ids: list[int] = []
    while len(ids) < SAMPLING.max_tokens and END not in ids:
        ids.append(next_token(prompt + ids))
    return ids


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.version, self.tokens_per_call, self.bodies, self.aborts = "3", 5, [], 0
        self.aborted = threading.Condition()
        self.dies = lambda: False


class Handler(BaseHTTPRequestHandler):
    """Gives `tokens_per_call` tokens to a request, which then hangs until everything is aborted."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self):
        self._send({"weight_version": self.server.version})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/abort_request":
            assert body == {"abort_all": True}
            with self.server.aborted:
                self.server.aborts += 1
                self.server.aborted.notify_all()
            return self._send(None)
        assert self.path == "/generate"
        with self.server.aborted:
            self.server.bodies.append(body)
            self.server.aborted.notify_all()
        if self.server.dies():
            self.close_connection = True
            return None
        prompt, limit, ids, reason = body["input_ids"], body["sampling_params"]["max_new_tokens"], [], "abort"
        while len(ids) < self.server.tokens_per_call and reason == "abort":
            ids.append(next_token(prompt + ids))
            reason = "stop" if ids[-1] == END else "length" if len(ids) == limit else "abort"
        if reason == "abort" or self.server.hides_ends:
            reason = "abort"
            with self.server.aborted:
                before = self.server.aborts
                self.server.aborted.wait_for(lambda: self.server.aborts > before, 60)
        meta = {"finish_reason": {"type": reason}, "weight_version": self.server.version}
        if not ids:  # as SGLang answers for a request that waited for its turn
            return self._send({"text": "", "meta_info": meta})
        meta["output_token_logprobs"] = [[-token / 10, token, None] for token in ids]
        return self._send({"output_ids": ids, "meta_info": meta})

    def _send(self, value):
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


Server.hides_ends = False


@pytest.fixture
def server():
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@contextmanager
def engine(server, version=3, **settings):
    client = SGLangEngine([server.url], ServerConfig(**settings), weight_version=version)
    try:
        yield client
    finally:
        client.close()


PROMPTS = {number: [11, 2, number] for number in range(12)}


def requests(begun=(), ended=()):
    begun = dict(begun)
    return [
        AnswerRequest(number, np.array(prompt, dtype=np.int32), (0, number), begun.get(number))
        for number, prompt in PROMPTS.items()
        if number not in ended
    ]


def wait_for_calls(server, count):
    with server.aborted:
        assert server.aborted.wait_for(lambda: len(server.bodies) >= count, 60)


def assert_whole(found):
    assert found.keys() == PROMPTS.keys()
    for number, answer in found.items():
        assert answer.token_ids.tolist() == whole(PROMPTS[number])
        assert answer.logprobs.tolist() == pytest.approx([-token / 10 for token in answer.token_ids])
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] == END else "length")


def test_stopped_answers_go_on_as_token_ids_under_the_next_weights(server):
    begun, found, version = {}, {}, 3
    with engine(server) as client:
        while len(found) < len(PROMPTS):
            calls = len(server.bodies)
            with client.stream(SAMPLING) as stream:
                asked = requests(begun, found)
                stream.add(asked)
                wait_for_calls(server, calls + len(asked))
                stopped = dict(stream.stop())
            for number, answer in stopped.items():
                (begun if answer.finish_reason == "stopped" else found)[number] = answer
            for body in server.bodies[calls:]:
                ids, limit = body["input_ids"], body["sampling_params"]["max_new_tokens"]
                assert ids == (PROMPTS[ids[2]] + whole(PROMPTS[ids[2]]))[: len(ids)]
                assert len(ids) - 3 + limit == SAMPLING.max_tokens
            version += 1
            server.version, client.weight_version = str(version), version
    assert_whole(found)
    long = max(found.values(), key=lambda answer: len(answer.token_ids))
    assert long.weight_version_spans == tuple((3 + i, 5 * i, 5 * i + 5) for i in range(8))
    assert {a.weight_version_spans for a in found.values() if len(a.token_ids) <= 5} <= {()}


def test_an_aborted_answer_goes_on_by_itself_unless_the_stream_is_stopped(server):
    """Another client aborts: the answer is neither handed back as ended nor begun anew."""
    with engine(server) as client, client.stream(SAMPLING) as stream:
        stream.add(requests())
        found, calls = {}, len(PROMPTS)
        while len(found) < len(PROMPTS):
            wait_for_calls(server, calls)
            client._submit(client.abort_all()).result()
            for number, answer in stream.advance().ended:
                assert number not in found
                found[number] = answer
            calls = len(server.bodies)
    assert_whole(found)


def test_an_answer_whose_last_token_came_with_the_abort_has_ended(server):
    """Else it would go on behind its end token, or with no room left."""
    server.hides_ends, server.tokens_per_call = True, 100
    with engine(server) as client, client.stream(SAMPLING) as stream:
        stream.add(requests())
        wait_for_calls(server, len(PROMPTS))
        assert_whole(dict(stream.stop()))


def test_what_has_no_token_is_not_handed_back_and_what_waits_keeps_its_prefix(server):
    with engine(server, max_in_flight=2) as client:
        with client.stream(SAMPLING) as stream:
            stream.add(requests()[2:4])
            wait_for_calls(server, 2)
            begun = dict(stream.stop())
        server.tokens_per_call = 0
        with client.stream(SAMPLING) as stream:
            stream.add(requests(begun))
            wait_for_calls(server, 4)
            stopped = dict(stream.stop())
    assert begun.keys() == {2, 3}
    assert stopped == begun
    assert len(server.bodies) == 4  # no more than two at once, and none after the stop


def test_a_server_that_dies_costs_what_it_had_not_told(server):
    """The answer goes on from the prefix that is known here."""
    left = [3]

    def dies():
        left[0] -= 1
        return left[0] >= 0

    server.tokens_per_call, server.dies = 100, dies
    with engine(server) as client, client.stream(SAMPLING) as stream:
        stream.add(requests())
        found = {}
        while len(found) < len(PROMPTS):
            found |= dict(stream.advance().ended)
    assert_whole(found)


def test_an_answer_that_cannot_be_had_is_an_error(server):
    server.dies = lambda: True
    with engine(server, max_retries=1) as client, client.stream(SAMPLING) as stream:
        stream.add(requests())
        with pytest.raises(EngineError, match="no answer after 2 tries"):
            while True:
                stream.advance()


def test_answers_that_wait_for_a_server_stop_together(server, monkeypatch):
    """Each waits for a look at the servers; none looks by itself."""
    looks = threading.Semaphore(0)

    async def is_gone(*_):
        looks.release()
        raise httpx.ConnectError("nobody listens")

    monkeypatch.setattr(targets, "LOOK_AGAIN_S", 0.3)
    monkeypatch.setattr(SGLangEngine, "_version", is_gone)
    prompt = np.array([11, 2, 0], dtype=np.int32)
    with engine(server) as client, client.stream(SAMPLING) as stream:
        next(iter(client._targets)).down = True
        stream.add([AnswerRequest(number, prompt, (0, number)) for number in range(50)])
        for _ in range(4):
            assert looks.acquire(timeout=60)
        assert stream.stop() == []
        left = sum(looks.acquire(blocking=False) for _ in range(50))
    assert left < 10, left


def test_servers_share_all_open_answers_of_a_stream(server):
    with engine(server) as client:
        with client.stream(SAMPLING) as stream:
            stream.add(requests()[:2])
            stream.add(requests()[2:])
            assert client._targets._share == len(PROMPTS)
            with client.stream(SAMPLING) as other:  # held-out questions
                other.add(requests()[:1])
                assert client._targets._share == len(PROMPTS) + 1
            assert client._targets._share == len(PROMPTS)
            stream.stop()
        client._submit(client.begin(1)).result()
        assert client._targets._share == 1


def test_of_a_question_whose_answers_have_ended_nothing_is_kept(server):
    """A run asks new questions as long as it lasts."""
    server.tokens_per_call = 100
    with engine(server) as client, client.stream(SAMPLING) as stream:
        found = {}
        for asked in (requests()[:6], requests()[6:]):
            stream.add([replace(request, number=request.number + 100 * k) for request in asked for k in range(3)])
            expected = len(found) + 18
            while len(found) < expected:
                found |= dict(stream.advance().ended)
                assert len(client._targets._of_question) <= 6
            client._submit(asyncio.sleep(0)).result()  # what follows the end of the last answer
            assert not client._targets._of_question and not stream._of_question


def test_an_interrupted_answer_is_told_as_far_as_it_is_and_goes_on(server):
    """As a checkpoint asks for it; no token is made twice or lost."""
    with engine(server) as client, client.stream(SAMPLING) as stream:
        stream.add(requests())
        found, known, calls = {}, {}, 0
        while len(found) < len(PROMPTS):
            calls += len(PROMPTS) - len(found)
            wait_for_calls(server, calls)
            stream.interrupt()
            advance = stream.advance(at_once=True)
            for number, answer in advance.begun:
                before = known.get(number, ())
                assert answer.finish_reason == "stopped" and len(answer.token_ids) >= len(before) + 5
                assert answer.token_ids.tolist() == whole(PROMPTS[number])[: len(answer.token_ids)]
                known[number] = answer.token_ids
            found |= dict(advance.ended)
            assert {*found} | {number for number, _ in advance.begun} == {*PROMPTS}  # nothing is left untold
    assert_whole(found)


def test_an_interrupt_does_not_wait_for_a_server_that_is_gone(server, monkeypatch):
    monkeypatch.setattr(streams, "INTERRUPT_S", 0.5)

    async def is_gone(*_):
        raise httpx.ConnectError("nobody listens")

    monkeypatch.setattr(SGLangEngine, "_version", is_gone)
    with engine(server) as client, client.stream(SAMPLING) as stream:
        next(iter(client._targets)).down = True
        stream.add(requests())
        stream.interrupt()
        assert stream.advance(at_once=True).begun == []
