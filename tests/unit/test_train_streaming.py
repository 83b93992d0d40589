"""Streaming steps with an engine whose answers are known beforehand: what is trained, kept and counted."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
from processes import wait_until

from megatron_nft.algorithms import open_algorithm
from megatron_nft.config import Config
from megatron_nft.data.choice import Choice, Past
from megatron_nft.engines.completions import joined
from megatron_nft.engines.engine import Advance, Completion, EngineError, WeightVersionError
from megatron_nft.metrics import Metrics
from megatron_nft.train import meanwhile, streaming
from megatron_nft.train.buffer import OpenGroup
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.choosing import read_past, write_past
from megatron_nft.train.collect import EmptyBatchError
from megatron_nft.train.meanwhile import Meanwhile
from megatron_nft.train.rounds import Rounds
from megatron_nft.train.streaming import Producer, StreamInterrupted
from megatron_nft.train.waiting_file import read_waiting, write_waiting
from megatron_nft.types import Prompt, Verdict
from megatron_nft.verify import Graded

QUESTIONS, SAMPLES, PER_STEP = 40, 4, 4
RIGHT, WRONG = 1, 0


@cache
def answer_of(draw: int, sample: int) -> np.ndarray:
    """The tokens of an answer: the first says whether it is right. Wrong answers, and those to hard questions, are long
    and take many rounds."""
    rng = np.random.default_rng([7, draw, sample])
    hard = prompt_of(draw).index / QUESTIONS
    right = rng.random() > hard
    length = 2 + int(rng.geometric(0.4 if right else 0.05) * (1 + 3 * hard))
    return np.array([RIGHT if right else WRONG, *range(2, length)], dtype=np.int32)


@cache
def prompt_of(draw: int) -> Prompt:
    epoch, place = divmod(draw, QUESTIONS)
    index = int(np.random.default_rng([3, epoch]).permutation(QUESTIONS)[place])
    return Prompt(index, "test", ({"role": "user", "content": "q"},), "1", np.array([index], dtype=np.int32))


class Stream:
    """Three tokens a round to every answer, at most `rows` at once, first come first served."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.waiting, self.running = engine, [], {}

    def add(self, requests) -> None:
        self.engine.asked += requests
        self.waiting += requests

    def advance(self, *, at_once: bool = False) -> Advance:
        if at_once:
            return Advance([], False)
        while self.waiting and len(self.running) < self.engine.rows:
            request = self.waiting.pop(0)
            self.running[request.number] = (request, 0)
        ended = []
        for number, (request, done) in list(self.running.items()):
            self.running[number] = (request, done + 3)
            if self._begun(request) + done + 3 >= len(answer_of(*divmod(number, SAMPLES))):
                ended.append((number, self._close(number, "stop")))
        self.engine.rounds += 1
        self.engine.after_round()
        return Advance(ended, True)

    def stop(self):
        stopped = [(number, self._close(number, "stopped")) for number in list(self.running)]
        return stopped + [(r.number, r.prefix) for r in self.waiting if r.prefix is not None]

    def _begun(self, request) -> int:
        return 0 if request.prefix is None else len(request.prefix.token_ids)

    def _close(self, number: int, reason: str) -> Completion:
        request, done = self.running.pop(number)
        start = self._begun(request)
        ids = answer_of(*divmod(number, SAMPLES))[start : start + done]
        rest = Completion(ids, np.full(len(ids), -0.5, np.float32), reason, self.engine.weight_version)
        return joined(request.prefix, rest)


class OverlappedStream(Stream):
    """The same, which goes on while the trainer trains, and at a swap asks again for what was under way."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.begun, self.news = {}, []
        engine.streams.append(self)

    def go_on(self, rounds: int) -> None:
        for _ in range(rounds):
            self.news += super().advance().ended

    def swap(self) -> None:
        stopped = dict(self.stop())
        requests = {request.number: request for request in self.asked}
        self.begun |= stopped
        self.waiting = [replace(requests[number], prefix=answer) for number, answer in stopped.items()] + [
            request for request in self.waiting if request.number not in stopped
        ]

    def add(self, requests) -> None:
        self.asked = [*getattr(self, "asked", []), *requests]
        super().add(requests)

    def advance(self, *, at_once: bool = False) -> Advance:
        if not at_once or self.engine.moves_meanwhile:
            self.go_on(1)
        ended, self.news = self.news, []
        begun = {number: answer for number, answer in self.begun.items() if number not in dict(ended)}
        self.begun = {}
        return Advance(ended, True, list(begun.items()))


class Engine:
    is_deterministic = True

    def __init__(self, rows: int = 24, kind: type[Stream] = Stream) -> None:
        self.rows, self.weight_version, self.rounds, self.asked = rows, 0, 0, []
        self.after_round = lambda: None
        self.moves_meanwhile = False  # also while the trainer trains
        self.kind, self.streams = kind, []

    @contextmanager
    def stream(self, sampling):
        yield self.kind(self)


class Verifier:
    def submit(self, response, answer, data_source, extra, *, prompt_opens_thinking):
        future: Future[Graded] = Future()
        verdict = Verdict.CORRECT if response.startswith(f"{RIGHT} ") else Verdict.WRONG
        future.set_result(Graded(verdict, None, "test", 0.0, {}, False))
        return future


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


class Questions:
    cursor, num_prompts = 0, QUESTIONS

    def draw(self, n):
        draws = range(self.cursor, self.cursor + n)
        self.cursor += n
        return [(draw, prompt_of(draw)) for draw in draws]


class Life:
    """A rank's life in which nothing stalls; `signum` is the stop signal that came."""

    def __init__(self) -> None:
        self.stop = SimpleNamespace(signum=0)
        self.phases = SimpleNamespace(progress=lambda: None, waiting=self._waiting)

    @contextmanager
    def _waiting(self):
        yield


def settings(max_staleness: int = 1, **rollout) -> Config:
    options = {"mode": "streaming", "answers_per_question": SAMPLES, "max_staleness": max_staleness, **rollout}
    train = {"questions_per_step": PER_STEP, "questions_per_optimizer_step": PER_STEP}
    return Config(run_dir="/tmp", model={"path": "/tmp"}, data={"train": ["/tmp"]}, rollout=options, train=train)


class Rank:
    """The only rank of a run, which trains nothing."""

    def __init__(
        self, config: Config, engine: Engine, state: RunState | None = None, choice: Choice | None = None
    ) -> None:
        self.choice = choice
        self.config, self.engine, self.state = config, engine, state or RunState()
        self.life, self.questions, self.metrics = Life(), Questions(), Metrics()
        self.algorithm = open_algorithm(config.algorithm, max_response_tokens=config.rollout.max_response_tokens)

    def producer(self) -> Producer:
        return Producer(
            self.state,
            engine=self.engine,
            verifier=Verifier(),
            tokenizer=Tokenizer(),
            config=self.config,
            layout=SimpleNamespace(rank=0, world_size=1, world_gloo=None),
            stream=self.questions,
            algorithm=self.algorithm,
            choice=self.choice,
        )

    def collect(self, producer: Producer | None = None):
        self.engine.weight_version = self.state.weight_version
        return (producer or self.producer()).collect(self.state, self.metrics, Rounds(self.life, None))

    def step(self):
        found = self.collect()
        before, known = self.state, {"past": found.past, "ahead": found.ahead, "waiting": found.waiting}
        self.state = RunState(before.step + 1, before.weight_version + 1, found.cursor, **known)
        return found


def kept_draws(count: int) -> list[int]:
    """The first `count` draws whose answers are neither all right nor all wrong."""
    kept, draw = [], 0
    while len(kept) < count:
        if 0 < sum(int(answer_of(draw, k)[0]) for k in range(SAMPLES)) < SAMPLES:
            kept.append(draw)
        draw += 1
    return kept


@pytest.mark.parametrize("staleness", [1, 3])
def test_every_kept_group_is_trained_once_in_draw_order_with_the_whole_of_its_answers(staleness):
    rank, trained, written = Rank(settings(staleness), Engine()), [], []
    spans = Counter()
    for step in range(1, 31):
        found = rank.step()
        assert [f.draw for f in found.kept] == sorted(f.draw for f in found.kept)
        trained += [f.draw for f in found.kept]
        written += [group.draw for group in found.groups]
        for group in found.groups:
            for rollout in group.rollouts:
                assert rollout.response_ids.tolist() == answer_of(group.draw, rollout.sample_index).tolist()
                assert len(rollout.rollout_logprobs) == len(rollout.response_ids)
                versions = [version for version, _, _ in rollout.version_spans]
                assert versions == sorted(set(versions))
                ends = [0, *(end for _, _, end in rollout.version_spans)]
                assert ends[:-1] == [start for _, start, _ in rollout.version_spans]
                assert ends[-1] == len(rollout.response_ids)
                assert step - 1 - versions[0] <= staleness
                spans[len(versions)] += 1
        for facts in found.kept:
            assert sum(tokens for _, tokens in facts.versions) == sum(n for _, _, n in facts.samples)
    assert trained == kept_draws(30 * PER_STEP)
    assert len(written) == len(set(written))
    dropped = {*written} - {*trained}
    assert dropped >= {*range(trained[-1] + 1)} - {*trained}
    assert spans[2] > 20 and (staleness == 1 or spans[3] > 5), spans


def metrics_of(rank: Rank) -> dict:
    return Metrics.merge([rank.metrics.state()])


def test_all_tokens_are_counted_once():
    rank, generated = Rank(settings(), Engine()), 0
    for _ in range(10):
        rank.metrics = Metrics()
        found = rank.step()
        generated += metrics_of(rank)["tokens/generated"]
        assert metrics_of(rank)["answers/under_way"] == sum(len(group.begun) for group in found.waiting)
    written = sum(len(answer_of(d, k)) for d in range(rank.state.cursor) for k in range(SAMPLES))
    begun = sum(len(a.token_ids) for g in rank.state.waiting for a in g.begun.values())
    missing = sum(len(answer_of(g.draw, k)) for g in rank.state.waiting for k in range(SAMPLES) if k not in g.answers)
    assert generated == written - missing + begun


@pytest.mark.parametrize("staleness", [1, 2])
def test_overlapped_steps_train_the_same_groups_and_nothing_older(staleness):
    """Weights are swapped under running answers; three rounds of the engine fit into a training step."""
    config = settings(staleness, mode="overlapped", engine="sglang")
    rank = Rank(config, Engine(kind=OverlappedStream))
    producer, trained, written, generated, spans = rank.producer(), [], [], 0, Counter()
    for step in range(1, 31):
        rank.metrics = Metrics()
        found = rank.collect(producer)
        trained += [f.draw for f in found.kept]
        written += [group.draw for group in found.groups]
        generated += metrics_of(rank)["tokens/generated"]
        for rollout in (r for group in found.groups for r in group.rollouts):
            assert rollout.response_ids.tolist() == answer_of(rollout.draw, rollout.sample_index).tolist()
            versions = [version for version, _, _ in rollout.version_spans]
            assert versions == sorted(set(versions)) and step - 1 - versions[0] <= staleness
            spans[len(versions)] += 1
        (stream,) = rank.engine.streams
        stream.go_on(3)
        stream.swap()
        rank.engine.weight_version = step
        rank.state = producer.hold(RunState(step, step, found.cursor))
        draws = [group.draw for group in rank.state.waiting]
        assert not {*draws} & {*written}
    assert trained == kept_draws(30 * PER_STEP)
    assert len(written) == len(set(written))
    assert spans[2] > 20, spans
    held = sum(len(a.token_ids) for g in rank.state.waiting for a in g.begun.values())
    held += sum(len(r.response_ids) for g in rank.state.waiting for r in g.answers.values())
    ended = sum(len(answer_of(draw, k)) for draw in written for k in range(SAMPLES))
    assert ended <= generated <= ended + held


def test_questions_are_started_while_the_trainer_trains(monkeypatch):
    """A group that is dropped then makes room at once: nothing older is trained, the same groups are, and the engine
    has more to do."""
    monkeypatch.setattr(meanwhile, "PERIOD_S", 0.0)
    staleness, started = 2, 0
    config = settings(staleness, mode="overlapped", engine="sglang")
    rank = Rank(config, Engine(kind=OverlappedStream))
    rank.engine.moves_meanwhile = True
    producer, thread, trained = rank.producer(), Meanwhile(None), []
    for step in range(1, 21):
        found = rank.collect(producer)
        trained += [f.draw for f in found.kept]
        for rollout in (r for group in found.groups for r in group.rollouts):
            assert rollout.response_ids.tolist() == answer_of(rollout.draw, rollout.sample_index).tolist()
            assert step - 1 - rollout.version_spans[0][0] <= staleness
        cursor, rounds = rank.questions.cursor, rank.engine.rounds
        assert len(producer._window._is_kept) >= staleness * PER_STEP  # all that may be started when training begins
        thread.start(partial(producer.go_on, rank.state, None))
        wait_until(lambda rounds=rounds: rank.engine.rounds >= rounds + 20, 60)
        thread.end()
        assert len(producer._window._is_kept) <= staleness * PER_STEP
        started += rank.questions.cursor - cursor
        rank.engine.streams[0].swap()
        rank.engine.weight_version = step
        rank.state = producer.hold(RunState(step, step, found.cursor))
    assert trained == kept_draws(20 * PER_STEP)
    assert started > 20


def test_an_error_while_the_trainer_trains_comes_out_at_its_end(monkeypatch):
    monkeypatch.setattr(meanwhile, "PERIOD_S", 0.0)
    rank = Rank(settings(mode="overlapped", engine="sglang"), Engine(kind=OverlappedStream))
    producer, thread = rank.producer(), Meanwhile(None)
    rank.collect(producer)

    def fail(**_):
        raise EngineError("no answer after 2 tries")

    rank.engine.streams[0].advance = fail
    thread.start(partial(producer.go_on, rank.state, None))
    with pytest.raises(EngineError, match="no answer after 2 tries"):
        thread.end()
    thread.close()


def test_syncs_that_are_put_off_train_the_same_groups_and_nothing_older():
    """Of every five syncs two are put off; a third one would leave the engine more than `staleness` versions behind."""
    staleness, behind = 2, Counter()
    rank = Rank(settings(staleness, mode="overlapped", engine="sglang"), Engine(kind=OverlappedStream))
    producer, trained, written = rank.producer(), [], []
    for step in range(1, 31):
        found = producer.collect(rank.state, rank.metrics, Rounds(rank.life, None))
        trained += [f.draw for f in found.kept]
        written += [group.draw for group in found.groups]
        for rollout in (r for group in found.groups for r in group.rollouts):
            assert rollout.response_ids.tolist() == answer_of(rollout.draw, rollout.sample_index).tolist()
            assert 0 <= step - 1 - rollout.version_spans[0][0] <= staleness
        (stream,) = rank.engine.streams
        stream.go_on(3)
        if step % 5 < 2 or step - rank.engine.weight_version > staleness:
            stream.swap()
            rank.engine.weight_version = step
        behind[step - rank.engine.weight_version] += 1
        rank.state = producer.hold(RunState(step, step, found.cursor))
    assert trained == kept_draws(30 * PER_STEP)
    assert len(written) == len(set(written))
    assert behind[1] and behind[2], behind


@pytest.mark.parametrize(("mode", "behind"), [("overlapped", 2), ("overlapped", -1), ("streaming", 1)])
def test_an_engine_too_far_behind_is_refused(mode, behind):
    rank = Rank(settings(1, mode=mode, engine="sglang"), Engine(), RunState(5, 5))
    rank.engine.weight_version = 5 - behind
    with pytest.raises(WeightVersionError, match=f"the engine has weight version {5 - behind}, not 5"):
        rank.producer().collect(rank.state, rank.metrics, Rounds(rank.life, None))


def test_the_wait_for_verdicts_after_a_step_is_counted_in_the_next(monkeypatch):
    rank = Rank(settings(mode="overlapped", engine="sglang"), Engine(kind=OverlappedStream))
    producer, clock = rank.producer(), [0.0]
    monkeypatch.setattr(streaming, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = rank.collect(producer)
    with monkeypatch.context() as slow:
        slow.setattr(producer._buffer, "take_verdicts", lambda _: clock.append(clock.pop() + 5.0))
        rank.state = producer.hold(RunState(1, 1, found.cursor))
    rank.engine.streams[0].swap()
    counted = []
    for _ in range(2):
        rank.metrics = Metrics()
        rank.collect(producer)
        counted.append(metrics_of(rank)["seconds/verify_wait"])
    assert counted == [5.0, 0.0]


def rate_of(draw: int) -> float:
    return sum(int(answer_of(draw, sample)[0]) for sample in range(SAMPLES)) / SAMPLES


class Chooser:
    """Skips half of what was ever answered, and notes what it was told: (draw, past)."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Past]] = []

    def __call__(self, question) -> bool:
        self.seen.append((question.draw, question.past))
        return not question.past.asked or question.chance < 0.5


@pytest.mark.parametrize("mode", ["streaming", "overlapped"])
def test_a_choice_sees_all_groups_up_to_the_last_that_was_trained_and_no_other(mode):
    chooser = Chooser()
    config, overlaps = settings(2, mode=mode, engine="sglang"), mode == "overlapped"
    rank = Rank(config, Engine(kind=OverlappedStream if overlaps else Stream), choice=Choice("own", chooser, 3))
    producer = rank.producer() if overlaps else None
    asked, known = set(), {}
    skipped_share = ahead = 0
    for _ in range(25):
        seen, rank.metrics = len(chooser.seen), Metrics()
        if producer is None:
            found = rank.step()
        else:
            found = rank.collect(producer)
            rank.engine.streams[0].swap()
            state = RunState(rank.state.step + 1, rank.state.step + 1, found.cursor, past=found.past, ahead=found.ahead)
            rank.state = producer.hold(state)
        asked |= {group.draw for group in found.groups}
        last, ahead = found.kept[-1].draw, max(ahead, len(found.ahead))
        expected: dict[int, Past] = {}
        for draw in sorted(draw for draw in asked if draw <= last):
            index = prompt_of(draw).index
            expected[index] = expected.get(index, Past()).with_rate(rate_of(draw))
        assert found.past == expected
        assert [draw for draw, _ in chooser.seen] == list(range(len(chooser.seen)))  # each draw once, in order
        for draw, past in chooser.seen[seen:]:
            index = prompt_of(draw).index
            assert past in (known.get(index, Past()), expected.get(index, Past()) if overlaps else None)
        known, skipped_share = expected, metrics_of(rank)["questions/skipped_share"] or skipped_share
    assert 0 < skipped_share < 1 and ahead
    trained_or_dropped = {draw for draw in asked if draw <= last}
    skipped = set(range(last + 1)) - trained_or_dropped
    assert skipped and all(past.asked for draw, past in chooser.seen if draw in skipped)


def test_a_choice_goes_on_from_a_file_as_if_it_had_not_stopped(tmp_path):
    config = settings(2)
    rank = Rank(config, Engine(), choice=Choice("own", Chooser(), 3))
    while not rank.state.ahead:
        rank.step()
    (tmp_path / "waiting").mkdir()
    write_waiting(tmp_path / "waiting" / "rank_00000.parquet", rank.state.waiting)
    write_past(tmp_path, rank.state.past, rank.state.ahead)
    past, ahead = read_past(tmp_path)
    again = replace(rank.state, waiting=tuple(read_waiting(tmp_path, prompt_of, 0, 1)), past=past, ahead=ahead)
    other = Rank(config, Engine(), again, choice=Choice("own", Chooser(), 3))
    for _ in range(6):
        a, b = rank.step(), other.step()
        assert (a.kept, a.cursor, a.past, a.ahead) == (b.kept, b.cursor, b.past, b.ahead)
    seen = other.choice.function.seen
    assert seen and rank.choice.function.seen[-len(seen) :] == seen


def naive_step(engine: Engine, questions: Questions):
    """The first groups that are complete: what a phase must not end with."""
    stream, answers, complete = Stream(engine), Counter(), []
    for draw, _ in questions.draw(10 * PER_STEP):
        stream.add([SimpleNamespace(number=draw * SAMPLES + k, prefix=None) for k in range(SAMPLES)])
    while len(complete) < PER_STEP:
        for number, _ in stream.advance().ended:
            draw = number // SAMPLES
            answers[draw] += 1
            if answers[draw] == SAMPLES and 0 < sum(int(answer_of(draw, k)[0]) for k in range(SAMPLES)) < SAMPLES:
                complete.append(draw)
    return complete[:PER_STEP]


def kolmogorov_smirnov(a, b) -> float:
    """Distance of two empirical distributions, in units of its 1 % bound for large samples."""
    both = np.sort(np.concatenate([a, b]))
    distance = np.abs(
        np.searchsorted(np.sort(a), both, "right") / len(a) - np.searchsorted(np.sort(b), both, "right") / len(b)
    ).max()
    return float(distance / (1.628 * np.sqrt(1 / len(a) + 1 / len(b))))


def chi_square(a, b) -> float:
    """Of two counts of the same classes, in units of its 1 % bound (Wilson and Hilferty)."""
    used = (a + b) > 0
    a, b = a[used].astype(float), b[used].astype(float)
    scale = np.sqrt(b.sum() / a.sum())
    value, freedom = float(((a * scale - b / scale) ** 2 / (a + b)).sum()), len(a) - 1
    return value / (freedom * (1 - 2 / (9 * freedom) + 2.326 * np.sqrt(2 / (9 * freedom))) ** 3)


def differences(draws: list[int], fresh: list[int]) -> dict[str, float]:
    """How far trained groups are from others that were drawn; above 1 is significant at 1 %."""

    def lengths(of):  # one answer of a group: those of a group are not independent
        return np.array([len(answer_of(draw, 0)) for draw in of])

    def rates(of):
        return np.bincount([sum(int(answer_of(d, k)[0]) for k in range(SAMPLES)) for d in of], minlength=SAMPLES + 1)

    def uses(of):
        return np.bincount([prompt_of(draw).index for draw in of], minlength=QUESTIONS)

    return {
        "lengths": kolmogorov_smirnov(lengths(draws), lengths(fresh)),
        "rates": chi_square(rates(draws), rates(fresh)),
        "uses": chi_square(uses(draws), uses(fresh)),
    }


def test_short_answers_are_not_preferred_and_a_naive_end_would_prefer_them():
    """Against groups of other draws, all answered to their end: lengths, correct rates and uses of each question."""
    steps = 150
    rank, naive_questions = Rank(settings(), Engine()), Questions()
    trained = [facts.draw for _ in range(steps) for facts in rank.step().kept]
    naive = [draw for _ in range(steps) for draw in naive_step(Engine(), naive_questions)]
    fresh = [draw + 10**6 * QUESTIONS for draw in range(5000)]
    fresh = [d for d in fresh if 0 < sum(int(answer_of(d, k)[0]) for k in range(SAMPLES)) < SAMPLES]
    assert max(differences(trained, fresh).values()) < 1, differences(trained, fresh)
    assert min(differences(naive, fresh).values()) > 1, differences(naive, fresh)


def same_groups(a, b) -> bool:
    def plain(value):
        return value.tolist() if isinstance(value, np.ndarray) else value

    def fields(answer):
        return {name: plain(getattr(answer, name)) for name in answer.__slots__}

    return [
        ({k: fields(v) for k, v in g.begun.items()}, {k: fields(v) for k, v in g.answers.items()}, g.draw) for g in a
    ] == [({k: fields(v) for k, v in g.begun.items()}, {k: fields(v) for k, v in g.answers.items()}, g.draw) for g in b]


def test_open_groups_come_back_from_their_file_bit_for_bit(tmp_path):
    rank = Rank(settings(2), Engine(rows=20))
    for _ in range(20):
        waiting = list(rank.step().waiting)
        if any(a.weight_version_spans for g in waiting for a in [*g.begun.values(), *g.answers.values()]):
            break
    waiting.append(OpenGroup(rank.state.cursor, prompt_of(rank.state.cursor)))  # without a token
    assert any(g.begun for g in waiting)
    assert any(a.weight_version_spans for g in waiting for a in [*g.begun.values(), *g.answers.values()])
    first = next(g for g in waiting if g.answers)
    first.answers[0] = replace(
        first.answers[0], text="\ud800 \u00e9", reward=1 / 3, reason="why", grader_verdicts={"a": Verdict.WRONG}
    )
    (tmp_path / "waiting").mkdir()
    write_waiting(tmp_path / "waiting" / "rank_00000.parquet", waiting)
    assert same_groups(read_waiting(tmp_path, prompt_of, 0, 1), waiting)
    halves = [read_waiting(tmp_path, prompt_of, r, 2) for r in range(2)]
    assert all(g.draw % 2 == r for r in range(2) for g in halves[r])
    assert same_groups(sorted(halves[0] + halves[1], key=lambda g: g.draw), waiting)


def test_a_run_that_goes_on_from_a_file_makes_the_same_steps(tmp_path):
    rank = Rank(settings(), Engine())
    for _ in range(3):
        rank.step()
    (tmp_path / "waiting").mkdir()
    write_waiting(tmp_path / "waiting" / "rank_00000.parquet", rank.state.waiting)
    again = replace(rank.state, waiting=tuple(read_waiting(tmp_path, prompt_of, 0, 1)))
    other = Rank(settings(), Engine(), again)
    for _ in range(4):
        a, b = rank.step(), other.step()
        assert (a.kept, a.cursor) == (b.kept, b.cursor)
        assert same_groups(a.waiting, b.waiting)


def test_a_stop_signal_keeps_what_was_generated():
    rank = Rank(settings(), Engine())
    rank.step()
    before = rank.state

    def stop():
        rank.life.stop.signum = 15 if rank.engine.rounds >= rounds + 4 else 0

    rounds, rank.engine.after_round = rank.engine.rounds, stop
    with pytest.raises(StreamInterrupted) as caught:
        rank.step()
    held = caught.value.state
    assert (held.step, held.weight_version) == (1, 1)
    tokens = [
        sum(len(a.token_ids) for g in s.waiting for a in g.begun.values())
        + sum(len(r.response_ids) for g in s.waiting for r in g.answers.values())
        for s in (before, held)
    ]
    assert tokens[1] >= tokens[0] + 100
    trained = kept_draws(4 * PER_STEP)
    other = Rank(settings(), Engine(), held)
    assert [f.draw for _ in range(3) for f in other.step().kept] == trained[PER_STEP:]


def test_groups_older_than_a_bound_that_was_lowered_are_dropped_and_counted():
    rank, old = Rank(settings(3), Engine()), set()
    while not old:
        rank.step()
        oldest = {g.draw: g.oldest_version for g in rank.state.waiting if g.oldest_version is not None}
        old = {draw for draw, version in oldest.items() if version < rank.state.weight_version - 1}
    other = Rank(settings(1), Engine(), rank.state)
    found = other.step()
    assert {g.draw for g, fate in zip(found.groups, found.fates, strict=True) if fate == "too_old"} == old
    assert metrics_of(other)["groups/too_old"] == len(old)
    asked = {request.number // SAMPLES for request in other.engine.asked}
    assert not asked & old


def test_a_step_that_finds_too_few_groups_says_so(tmp_path):
    config = settings(questions_per_batch=8, max_generation_batches=2).model_copy(update={"run_dir": tmp_path})
    config = config.model_copy(update={"train": config.train.model_copy(update={"questions_per_step": 64})})
    with pytest.raises(EmptyBatchError, match=r"\d+ of 64 groups were kept after 2 generation batches"):
        Rank(config, Engine(rows=1000)).step()
    assert list((tmp_path / "rollouts" / "step_000001").glob("*.parquet"))


@pytest.mark.parametrize(
    ("rollout", "why"),
    [
        ({"mode": "streaming", "max_staleness": 0}, "max_staleness=0 with mode=streaming"),
        ({"mode": "overlapped", "max_staleness": 0, "engine": "sglang"}, "max_staleness=0 with mode=overlapped"),
        ({"mode": "overlapped"}, "mode=overlapped with engine=embedded"),
        ({"mode": "overlapped", "engine": "vllm", "server": {"memory_saver": True}}, "with server.memory_saver"),
    ],
)
def test_modes_that_cannot_be_are_refused(rollout, why):
    with pytest.raises(ValueError, match=why):
        settings(**rollout)


@pytest.mark.parametrize(
    ("mode", "algorithm", "expected"),
    [
        ("synchronous", {}, "none"),
        ("streaming", {}, "truncate"),
        ("streaming", {"behaviour": "engine"}, "none"),
        ("streaming", {"correction": "none"}, "none"),
        ("synchronous", {"correction": "mask"}, "mask"),
    ],
)
def test_old_tokens_are_corrected_for_unless_the_settings_say_otherwise(mode, algorithm, expected):
    values = {"run_dir": "/tmp", "model": {"path": "/tmp"}, "data": {"train": ["/tmp"]}, "algorithm": algorithm}
    assert Config(**values).algorithm.with_correction_for(mode).correction == expected


@pytest.mark.parametrize(
    ("mode", "sync", "expected"),
    [
        ("synchronous", {}, "finish"),
        ("streaming", {}, "finish"),
        ("overlapped", {}, "abort"),
        ("overlapped", {"in_flight": "continue"}, "continue"),
        ("streaming", {"in_flight": "abort"}, "abort"),
    ],
)
def test_a_sync_waits_for_answers_only_where_they_end(mode, sync, expected):
    values = {"run_dir": "/tmp", "model": {"path": "/tmp"}, "data": {"train": ["/tmp"]}, "sync": sync}
    config = Config(**values, rollout={"mode": mode, "engine": "sglang"})
    assert config.sync.in_flight_for(config.rollout.mode) == expected


def test_a_sync_that_would_wait_for_answers_that_never_all_end_is_refused():
    values = {"run_dir": "/tmp", "model": {"path": "/tmp"}, "data": {"train": ["/tmp"]}}
    with pytest.raises(ValueError, match=r"sync\.in_flight=finish with rollout\.mode=overlapped"):
        Config(**values, rollout={"mode": "overlapped", "engine": "vllm"}, sync={"in_flight": "finish"})
