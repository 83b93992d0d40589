"""Servers behind a router: found when they hang, die or come back, though no failed request names them."""

import itertools
import threading
from contextlib import ExitStack

import httpx
import pytest
from answering import engine, good, requests, run, sample, serving
from processes import wait_until

from megatron_nft.engines import watch
from megatron_nft.engines.engine import AnswerRequest, SamplingParams
from megatron_nft.engines.owners import Owners
from megatron_nft.engines.routed import Routed


class FakeRouter:
    """Gives requests to its servers in turn, and to another one where a connection breaks, as sglang-router does."""

    def __init__(self):
        self.admitted, self.hung, self.told = [], False, []
        self.slow = set()  # URLs that it does not take yet
        self.refused = 0  # how often it has not taken one of them
        self._turn = itertools.count()
        self._opened = serving(self._forward)

    def __enter__(self):
        self.server = self._opened.__enter__()
        self.url = self.server.url
        return self

    def __exit__(self, *error):
        self._opened.__exit__(*error)

    def _forward(self, body):
        for _ in range(20):
            if not self.admitted:
                return 503, {"error": "no servers"}
            url = self.admitted[next(self._turn) % len(self.admitted)]
            try:
                answer = httpx.post(f"{url}/generate", json=body, timeout=120, trust_env=False)
            except httpx.TransportError:
                continue
            return answer.status_code, answer.json()
        return 503, {"error": "all servers failed"}

    async def servers(self, client):
        if self.hung:
            raise ValueError("hung")
        return self.admitted

    async def admit(self, client, urls):
        self.admitted = [url for url in urls if url not in self.slow]
        self.refused += len(self.admitted) < len(urls)
        return self.admitted

    def end_hanging(self, quiet_s):
        self.told.append(quiet_s)
        self.hung = False

    def renew(self):
        pass

    def close(self):
        pass


@pytest.fixture
def router():
    with FakeRouter() as opened:
        yield opened


def test_a_server_that_came_back_is_named_and_works_again_in_the_same_phase(router):
    """No request of the client fails: the router has made those of the dead server elsewhere."""
    settings = {"options": {"router": router}, "stall_timeout_s": 8.0, "max_in_flight": 4}  # looked at each second
    with serving(good) as a, serving(good) as b, engine(a, b, **settings) as client:
        named = []

        def bring_weights(moved):
            if client.left_behind() and not named and router.admitted == [b.url]:
                named.append(client.left_behind())
                a.version = "3"

        for number, _ in enumerate(client.generate(requests(100_000), SamplingParams(8), bring_weights)):
            if number == 10:
                assert sorted(router.admitted) == sorted([a.url, b.url])
                a.version = "-1"  # another process on the same port
            bring_weights(True)
            if named and a.url in router.admitted:
                break
        else:
            raise AssertionError("it did not get requests again")
        assert named == [[a.url]]
        assert client.left_behind() == []


def test_a_server_that_the_router_does_not_take_at_once_is_offered_again_in_the_same_phase(router):
    settings = {"options": {"router": router}, "stall_timeout_s": 8.0, "max_in_flight": 4}
    with serving(good) as a, serving(good) as b, engine(a, b, **settings) as client:
        router.slow.add(a.url)
        for _ in client.generate(requests(100_000), SamplingParams(8)):
            if router.refused > 1 and router.slow:
                assert router.admitted == [b.url]
                router.slow.clear()
            if a.url in router.admitted:
                break
        else:
            raise AssertionError("it did not get requests")


def test_a_router_keeps_servers_that_a_sync_has_paused_with_answers_under_way(router, monkeypatch):
    """They have the new weights one after the other, before the client wants them."""
    monkeypatch.setattr(watch, "MIN_PERIOD_S", 0.01)
    monkeypatch.setattr(watch, "LOOKS_PER_TIMEOUT", 10_000)
    looks = threading.Semaphore(0)
    is_watched = Routed.is_watched

    def counted(self, server):
        looks.release()
        return is_watched(self, server)

    monkeypatch.setattr(Routed, "is_watched", counted)
    resumed = threading.Event()

    def paused(body):
        resumed.wait(60)
        return 200, sample(version="4")

    settings = {"options": {"router": router}, "allow_version_change": True, "stall_timeout_s": 60.0}
    with ExitStack() as opened:
        a, b = (opened.enter_context(serving(paused)) for _ in range(2))
        client = opened.enter_context(engine(a, b, **settings))
        with client.stream(SamplingParams(8)) as stream:
            stream.add([AnswerRequest(i, r.prompt_ids, (0, i)) for i, r in enumerate(requests(8))])
            wait_until(lambda: len(a.bodies) + len(b.bodies) == 8)
            client.syncing = True
            a.version = b.version = "4"
            while looks.acquire(blocking=False):
                pass
            for _ in range(20):
                assert looks.acquire(timeout=60)
            assert sorted(router.admitted) == sorted([a.url, b.url])
            client.weight_version, client.syncing = 4, False
            assert client.left_behind() == []
            resumed.set()
            found = dict(next_answers(stream, 8))
            assert sorted(router.admitted) == sorted([a.url, b.url])
    assert found.keys() == set(range(8)) and {answer.weight_version for answer in found.values()} == {4}
    assert len(a.bodies) + len(b.bodies) == 8, "none was made again"


def next_answers(stream, count):
    found = []
    while len(found) < count:
        found += stream.advance().ended
    return found


def test_a_server_that_hangs_is_withdrawn_and_its_owner_is_told(router, tmp_path):
    """Its requests end when the owner ends it: here they end with a connection that breaks."""
    told = Owners(tmp_path)
    with serving(good) as a, serving(good) as b:
        ended = threading.Event()

        def hang(body):
            ended.wait(60)

        a.answer, a.moves = good, lambda: True
        options = {"router": router, "owners": told}
        with engine(a, b, options=options, stall_timeout_s=0.8, max_in_flight=8) as client:
            assert len(run(client, requests(4))) == 8
            a.answer, a.moves = hang, lambda: False

            def owner():
                wait_until(lambda: told.take_hanging(a.url) == 0.8, 60, "word of the hang")
                ended.set()

            listening = threading.Thread(target=owner)
            listening.start()
            assert len(run_on(client, a)) == 40
            listening.join()
            assert router.admitted == [b.url]


def run_on(client, hangs):
    """Answers to a phase that begins before the client knows that a server hangs."""
    hangs.moves, moves = (lambda: True), hangs.moves

    def on_wait(moved):
        hangs.moves = moves

    return list(client.generate(requests(20), SamplingParams(8), on_wait))


def test_where_nobody_ends_a_server_that_hangs_the_requests_through_the_router_are_made_again(router):
    with serving(good) as a, serving(good) as b:
        never = threading.Event()

        def hang(body):
            never.wait(60)

        with engine(a, b, options={"router": router}, stall_timeout_s=0.8, max_in_flight=8) as client:
            a.answer, a.moves = hang, lambda: False
            assert len(run_on(client, a)) == 40
            assert router.admitted == [b.url] and not never.is_set()
        never.set()


def test_a_router_that_hangs_is_ended(router):
    with serving(good) as a:
        hung = threading.Event()

        def forward(body):
            if router.hung:
                hung.wait(60)
            return FakeRouter._forward(router, body)

        router.server.answer = forward
        with engine(a, options={"router": router}, stall_timeout_s=0.8, max_in_flight=4) as client:
            router.hung = True
            assert len(run(client, requests(8))) == 16
        assert router.told == [0.8]
        hung.set()
