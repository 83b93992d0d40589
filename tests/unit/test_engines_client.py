"""The clients' retries, spreading and checks, against local servers that answer as SGLang does, or badly."""

import asyncio
import heapq
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from answering import engine, failing_first, good, requests, run, sample, serving
from processes import wait_until

from megatron_nft.engines import asking, targets
from megatron_nft.engines.engine import AnswerRequest, EngineError, SamplingParams, WeightVersionError
from megatron_nft.engines.target import State
from megatron_nft.engines.targets import Targets


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(asking, "BACKOFF_S", 0.01)


def test_request_and_answer_forms():
    answer = sample((7, 8, 9), version="4", reason="length", weight_versions=[])
    answer["meta_info"]["weight_versions"] = [
        {"version": "3", "start": 0, "end": 1},
        {"version": "4", "start": 1, "end": 3},
    ]
    with serving(lambda body: (200, answer)) as server, engine(server, allow_version_change=True) as client:
        sampling = SamplingParams(8, temperature=0.6, top_p=0.7, top_k=5, stop_token_ids=(11,))
        answers = run(client, requests(1, samples=1), sampling)
    assert server.bodies[0] == {
        "input_ids": [1, 2, 0],
        "sampling_params": {
            "max_new_tokens": 8,
            "temperature": 0.6,
            "top_p": 0.7,
            "top_k": 5,
            "stop_token_ids": [11],
        },
        "return_logprob": True,
    }
    c = answers[0, 0]
    assert c.token_ids.tolist() == [7, 8, 9]
    assert c.logprobs.tolist() == [-0.5] * 3
    assert (c.finish_reason, c.weight_version, c.weight_version_spans) == ("length", 4, ((3, 0, 1), (4, 1, 3)))


def test_every_sample_of_every_request_comes_once_over_two_servers():
    all_in_flight = threading.Barrier(8, timeout=60)

    def together(body):
        all_in_flight.wait()
        return good(body)

    with serving(together) as a, serving(together) as b, engine(a, b, max_in_flight=8) as client:
        assert set(run(client, requests(40))) == {(i, k) for i in range(40) for k in range(2)}
    assert len(a.bodies) + len(b.bodies) == 80
    assert min(len(a.bodies), len(b.bodies)) >= 20


def test_a_slow_server_gets_no_more_than_it_answers():
    enough = threading.Event()

    def stuck(body):
        enough.wait(60)
        return good(body)

    def quick(body):
        if len(b.bodies) >= 50:
            asked.append(len(a.bodies))
            enough.set()
        return good(body)

    asked = []
    with serving(stuck) as a, serving(quick) as b, engine(a, b, max_in_flight=4) as client:
        run(client, requests(60))
    assert asked[0] <= 3  # of 4 in flight; the other server answered 50 meanwhile


def test_as_many_in_flight_as_set_and_no_more():
    lock, now, most, three = threading.Lock(), Counter(), Counter(), threading.Barrier(3, timeout=60)

    def counting(body):
        with lock:
            now["n"] += 1
            most["n"] = max(most["n"], now["n"])
        three.wait()
        with lock:
            now["n"] -= 1
        return good(body)

    with serving(counting) as a, engine(a, max_in_flight=3) as client:
        run(client, requests(21))
    assert most["n"] == 3


@pytest.mark.parametrize(
    "failure",
    [
        (500, {"error": "out of memory"}),
        (503, b"busy"),
        (429, b""),
        None,
        (200, b"<html>"),
        (200, {"text": "no ids"}),
        (200, [sample(), sample()]),  # two answers in place of one
        (200, sample((), reason="length")),  # an empty one
        (200, sample(reason="abort")),
        (200, {**sample(), "output_ids": [1]}),
        (200, b'{"output_ids": [5], "meta_info": {"finish_reason": {"type": "stop"}, "weight_version": "3", '
              b'"output_token_logprobs": [[NaN, 5, null]]}}'),
    ],
)  # fmt: skip
def test_a_failure_is_tried_again(failure):
    with serving(failing_first(2, failure)) as a, engine(a, max_retries=2) as client:
        assert len(run(client, requests(1, samples=1))) == 1
    assert len(a.bodies) == 3


def test_retries_are_bounded_and_the_error_says_what_happened():
    with serving(lambda body: (500, {"error": "out of memory"})) as a, engine(a, max_retries=2) as client:
        with pytest.raises(EngineError, match=r"no answer after 3 tries .*HTTP 500.*out of memory"):
            run(client, requests(1, samples=1))
        assert len(a.bodies) == 3


def test_another_server_takes_over_from_a_dead_one():
    with serving(good) as a, engine("http://127.0.0.1:9", a, max_retries=1) as client:
        assert len(run(client, requests(30))) == 60
    assert len(a.bodies) == 60


def test_no_server_at_all_is_a_clear_error():
    why = r"http://127\.0\.0\.1:9: .*Errno 111"  # refused: httpx says "All connection attempts failed"
    settings = {"max_retries": 1, "start_timeout_s": 1}
    with engine("http://127.0.0.1:9", **settings) as client, pytest.raises(EngineError, match=why):
        run(client, requests(1))


def test_a_refused_request_is_not_tried_again():
    with serving(lambda body: (400, {"error": "prompt too long"})) as a, engine(a) as client:
        with pytest.raises(EngineError, match=r"refused a request: HTTP 400.*prompt too long"):
            run(client, requests(1, samples=1))
        assert len(a.bodies) == 1


@pytest.mark.parametrize("version", ["2", "4", "default"])
def test_an_answer_of_another_version_is_an_error(version):
    def answer(body):
        return 200, sample(version=version)

    with serving(answer) as a, engine(a) as client, pytest.raises(WeightVersionError, match="asked was 3"):
        run(client, requests(1))


def test_a_server_that_came_back_with_old_weights_gets_no_more_requests():
    def old(body):
        return 200, sample(version="-1")

    with serving(old, version="-1") as a, serving(good) as b, engine(a, b, max_in_flight=1) as client:
        assert len(run(client, requests(6))) == 12
        assert (len(a.bodies), len(b.bodies)) == (1, 12)
        a.answer, a.version = good, "3"
        run(client, requests(6))
        assert len(a.bodies) > 1


def test_an_answer_of_an_older_version_is_an_error_even_where_updates_may_fall_inside():
    with (
        serving(lambda body: (200, sample(version="2"))) as a,
        engine(a, allow_version_change=True) as client,
        pytest.raises(WeightVersionError, match="weight version 2, asked was 3"),
    ):
        run(client, requests(1))


def test_a_server_that_came_back_with_old_weights_is_left_alone_until_it_has_the_new_ones():
    with (
        serving(good) as a,
        serving(failing_first(1, None), version="-1") as b,
        engine(b, a, max_in_flight=2) as client,
    ):
        run(client, requests(10))
        asked = len(b.bodies)
        run(client, requests(10))
        assert len(b.bodies) == asked  # /model_info said -1
        b.version = "3"
        run(client, requests(10))
        assert len(b.bodies) > asked


def test_leaving_early_stops_asking():
    left = threading.Event()

    def first_alone(body):
        if body is not a.bodies[0]:
            left.wait(60)
        return good(body)

    with serving(first_alone) as a, engine(a, max_in_flight=2) as client:
        answers = client.generate(requests(500), SamplingParams(8))
        next(answers)
        answers.close()
        left.set()
        assert len(run(client, requests(20))) == 40  # the client is still of use
        assert len(a.bodies) < 50  # with the first one and those in flight; the two that went on would ask 980 more


def test_prompt_logprobs():
    def answer(body):
        assert body["sampling_params"]["max_new_tokens"] == 0
        assert body["logprob_start_len"] == 0
        triples = [[None, 1, None], [-1.5, 2, None], [-2.5, 3, None]]
        return 200, {"meta_info": {"input_token_logprobs": triples}}

    with serving(answer) as a, engine(a) as client:
        assert client.prompt_logprobs(np.array([1, 2, 3])).tolist() == [-1.5, -2.5]
        with pytest.raises(EngineError, match="2 prompt log-probs came for 4 tokens"):
            client.prompt_logprobs(np.array([1, 2, 3, 4]))
    with pytest.raises(EngineError, match="closed"):
        client.prompt_logprobs(np.array([1, 2, 3]))


def test_servers_given_by_url_keep_their_version():
    with serving(good, version="3") as a, serving(good, version="3") as b, engine(a, b, version=0) as client:
        client.adopt_version()
        assert client.weight_version == 3
        assert len(run(client, requests(2))) == 4
        b.version = "4"
        with pytest.raises(EngineError, match=r"different weight versions: \[3, 4\]"):
            client.adopt_version()
    why = r"the server at http://127\.0\.0\.1:9 does not answer: .*Errno 111"
    with engine("http://127.0.0.1:9") as client, pytest.raises(EngineError, match=why):
        client.adopt_version()


def test_ranks_load_all_servers_alike():
    """16 ranks, 16 servers: the 24 answers of a rank are one for each server, and eight that are left over."""
    num, questions = 16, 12
    all_are_there = threading.Barrier(2 * num * questions, timeout=60)

    def answer(body):
        all_are_there.wait()
        return good(body)

    with ExitStack() as opened:
        servers = [opened.enter_context(serving(answer)) for _ in range(num)]
        ranks = [opened.enter_context(engine(*servers, first=r)) for r in range(num)]
        with ThreadPoolExecutor(num) as threads:
            for answers in threads.map(run, ranks, [requests(questions)] * num):
                assert len(answers) == 2 * questions
    loads = [len(server.bodies) for server in servers]
    assert sum(loads) == 2 * num * questions
    assert max(abs(load - 2 * questions) for load in loads) <= 0.1 * 2 * questions, loads


@pytest.mark.parametrize("max_in_flight", [1, 6, 12, 20])
def test_ranks_load_all_servers_alike_while_answers_come_in(max_in_flight):
    """The choice alone, with answers that take seconds drawn at random; a rank asks again as soon as it has one."""
    num, questions, draw = 16, 100, random.Random(1)
    loads = Counter()

    async def simulate():
        ranks = [Targets(list("abcdefghijklmnop"), None, None, None, first=r) for r in range(num)]
        under_way, left = [], dict.fromkeys(ranks, questions)

        async def ask(rank, now):
            left[rank] -= 1
            target = await rank.pick()
            target.in_flight += 1
            loads[target.url] += 1
            heapq.heappush(under_way, (now + draw.uniform(1, 3), draw.random(), rank, target))

        for _ in range(max_in_flight):
            for rank in ranks:
                await ask(rank, 0.0)
        while under_way:
            now, _, rank, target = heapq.heappop(under_way)
            target.in_flight -= 1
            if left[rank]:
                await ask(rank, now)

    asyncio.run(simulate())
    assert sum(loads.values()) == num * questions and len(loads) == num
    assert max(abs(load - questions) for load in loads.values()) <= 0.1 * questions, loads


@pytest.mark.parametrize(("ranks", "servers"), [(16, 8), (8, 8), (12, 8), (64, 8), (3, 2)])
@pytest.mark.parametrize("answers", [1, 3, 16])
def test_ranks_load_all_servers_alike_with_a_few_answers_each(ranks, servers, answers):
    """Ranks that begin as `http._Hosts.first_server` says, each with the answers to one question."""
    loads = Counter()

    async def simulate():
        for rank in range(ranks):
            urls = [str(i) for i in range(servers)]
            targets = Targets(urls, None, None, None, first=rank * servers // ranks)
            await targets.begin(answers)
            for _ in range(answers):
                target = await targets.pick(0)
                target.in_flight += 1
                loads[target.url] += 1

    asyncio.run(simulate())
    assert sum(loads.values()) == ranks * answers
    spread = [loads[str(i)] for i in range(servers)]
    assert max(spread) - min(spread) <= max(1, -(-ranks // servers)), spread


def test_answers_to_one_question_stay_together_while_the_load_is_even():
    """Four servers, 64 answers under way: a question of 16 has one server, in the first wave exactly."""
    placed = Counter()

    async def simulate():
        targets = Targets(list("abcd"), None, None, None)
        await targets.begin(64)
        for question in range(4):
            for _ in range(16):
                target = await targets.pick(question)
                target.in_flight += 1
                placed[question, target.url] += 1
        # Server a answers all it has; its slots go to the next two questions, b and c answer one each.
        first = next(t for t in targets if t.url == "a")
        first.in_flight = 0
        for _ in range(16):
            target = await targets.pick(4)
            target.in_flight += 1
            placed[4, target.url] += 1

    asyncio.run(simulate())
    assert sorted(placed.values()) == [16] * 5
    assert len({url for (question, url) in placed if question < 4}) == 4
    assert placed[4, "a"] == 16


def test_a_stream_that_grows_has_a_share_of_all_its_answers_whatever_is_asked_beside_it():
    """Four servers, a question, then 64 answers under way, and held-out questions meanwhile."""
    placed = Counter()

    async def simulate():
        targets = Targets(list("abcd"), None, None, None)
        await targets.begin(0)
        targets.expect("a stream", 4)
        targets.expect("a stream", 64)
        for number in range(64):
            if number % 16 == 8:
                await targets.begin(4)
            target = await targets.pick(number // 16)
            target.in_flight += 1
            placed[number // 16, target.url] += 1

    asyncio.run(simulate())
    assert sorted(placed.values()) == [16] * 4


def test_what_lost_servers_cannot_take_goes_to_other_hosts_alike():
    """Two servers here and four elsewhere, all with 32 answers of their own; one of ours is lost."""

    async def place(num_down):
        targets = Targets(["a", "b"], None, None, None, far=["w", "x", "y", "z"])
        targets._state = lambda url: asyncio.sleep(0, State.SILENT)  # those down stay so
        await targets.begin(64)
        for target in list(targets)[:num_down]:
            target.down = True
        await targets.begin(64)
        loads = Counter()
        for number in range(64):
            target = await targets.pick(number // 2)
            target.in_flight += 1
            loads[target.url] += 1
        return loads

    healthy, one_lost, both_lost = (asyncio.run(place(n)) for n in range(3))
    assert healthy == {"a": 32, "b": 32}
    assert 32 <= one_lost["b"] <= 40
    assert sorted(one_lost[url] for url in "wxyz") == pytest.approx([6] * 4, abs=2)
    assert both_lost == dict.fromkeys("wxyz", 16)


def test_a_long_answer_is_waited_for_while_its_server_moves():
    """It takes many times the time-out; the server's sign of progress is what counts, and is asked for."""
    enough = threading.Event()

    def slow(body):
        enough.wait(60)
        return good(body)

    with serving(slow) as a, engine(a, stall_timeout_s=0.8, max_retries=0) as client:
        threading.Thread(
            target=lambda: (wait_until(lambda: a.looks.count("/health_generate") >= 30), enough.set())
        ).start()
        assert len(run(client, requests(1))) == 2
        assert len(a.bodies) == 2


def test_a_server_that_hangs_is_found_and_its_answers_are_asked_elsewhere():
    never = threading.Event()

    def hang(body):
        never.wait(60)
        return good(body)

    with serving(hang) as a, serving(good) as b, engine(a, b, stall_timeout_s=0.8) as client:
        a.moves = lambda: False
        assert set(run(client, requests(8))) == {(i, k) for i in range(8) for k in range(2)}
        asked = len(a.bodies)
        assert len(run(client, requests(8))) == 16  # it says its version, and gets nothing all the same
        assert len(a.bodies) == asked
        a.moves, a.answer = lambda: True, good
        assert len(run(client, requests(8))) == 16
        assert len(a.bodies) > asked
        never.set()


def test_what_a_server_has_is_given_up_where_it_fails_one_request_and_hangs():
    """As one whose host is cut off: a new connection fails, and those that stand wait for ever."""
    never = threading.Event()

    def fail_the_second(body):
        if len(a.bodies) == 2:
            return 500, {"error": "refused"}
        never.wait(60)
        return good(body)

    with serving(fail_the_second) as a, serving(good) as b, engine(a, b, stall_timeout_s=0.8) as client:
        a.moves = lambda: False
        assert len(run(client, requests(8))) == 16
        never.set()


def test_a_server_that_a_weight_sync_has_paused_is_not_given_up():
    """Nor is it once the sync is over, until it has been silent for as long again."""
    over = threading.Event()

    def hang(body):
        over.wait(60)

    with serving(hang) as a, serving(good) as b, engine(a, b, stall_timeout_s=0.8, max_in_flight=1) as client:
        a.moves = lambda: False
        client.syncing = True
        with client.stream(SamplingParams(8)) as stream:
            stream.add([AnswerRequest(0, np.array([1, 2], dtype=np.int32), (0, 0))])
            while a.looks.count("/health_generate") < 10:  # five each second: it has been silent for two limits
                assert not stream.advance().ended
            assert not b.bodies
            client.syncing = False
            ended = []
            while not ended:
                ended = stream.advance().ended
        over.set()
    assert ended[0][0] == 0 and len(b.bodies) == 1


def test_answers_of_a_stream_wait_for_the_sync_that_brings_a_server_the_weights(monkeypatch):
    """It died and came back while the trainer trains, for longer than a server is waited for."""
    monkeypatch.setattr(targets, "LOOK_AGAIN_S", 0.05)

    def answer(body):
        return 200, sample(version=a.version)

    with (
        serving(answer, version="2") as a,
        engine(a, options={"patience_s": 0.2}) as client,
        client.stream(SamplingParams(8)) as stream,
    ):
        stream.add([AnswerRequest(0, np.array([1, 2], dtype=np.int32), (0, 0))])
        while len(a.looks) < 60:  # two for each look at the server, and at most 21 looks a second
            assert not stream.advance().ended
        assert client.left_behind() == [a.url] and not stream.advance().moved
        a.version, ended = "3", []
        while not ended:
            ended = stream.advance().ended
    assert ended[0][1].weight_version == 3


def test_the_caller_is_told_when_nothing_moves():
    release = threading.Event()

    def hang(body):
        release.wait(60)
        return good(body)

    def on_wait(moved):
        if not moved:
            release.set()

    with serving(hang) as a, engine(a) as client:
        a.moves = lambda: False
        assert len(list(client.generate(requests(2), SamplingParams(8), on_wait))) == 4
        assert release.is_set()


def test_a_server_that_comes_back_works_again_in_the_same_phase():
    """First without the weights: it is named, and gets nothing until the caller has brought them."""
    named = []
    with (
        serving(failing_first(1, None), version="-1") as a,
        serving(good) as b,
        engine(a, b, max_in_flight=4) as client,
    ):

        def bring_weights(moved):
            if client.left_behind() and not named:
                named.append((client.left_behind(), len(a.bodies)))
                a.version = "3"

        for _ in client.generate(requests(10_000), SamplingParams(8), bring_weights):
            bring_weights(True)
            if named and len(a.bodies) > named[0][1]:
                break
        assert named[0][0] == [a.url]
        assert client.left_behind() == []


def test_where_all_servers_are_gone_answers_wait_for_one_that_comes_back():
    down = threading.Event()
    down.set()

    def answer(body):
        return None if down.is_set() else good(body)

    with serving(answer) as a, engine(a, max_retries=1) as client:
        a.moves = lambda: not down.is_set()
        waits = []

        def on_wait(moved):
            waits.append(moved)
            if moved or len(waits) == 200:
                down.clear()

        assert len(list(client.generate(requests(3), SamplingParams(8), on_wait))) == 6
        assert any(waits), "waiting for a server has a bound of its own: no stall"


def test_an_exception_of_the_caller_ends_the_wait_at_once():
    """As a stop signal does: the connections close, though no answer comes."""
    closed = threading.Event()

    def hang(body):
        closed.wait(60)
        return good(body)

    class Stop(Exception):
        pass

    def stop(moved):
        raise Stop

    with serving(hang) as a, engine(a) as client:
        with pytest.raises(Stop):
            list(client.generate(requests(4), SamplingParams(8), stop))
        closed.set()
        a.answer = good
        assert len(run(client, requests(4))) == 8
