"""Evaluations beside the training: which syncs wait for them, where their figures go, and what becomes of one that
cannot end."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_nft.config import Config
from megatron_nft.engines.engine import Advance, Completion, WeightVersionError
from megatron_nft.metrics import Metrics
from megatron_nft.train import overlap as module
from megatron_nft.train.checkpoints import RunState
from megatron_nft.train.held_out import HeldOut
from megatron_nft.train.lifecycle import Interrupted
from megatron_nft.train.overlap import Overlap
from megatron_nft.train.recorder import Recorder
from megatron_nft.types import Prompt, Verdict
from megatron_nft.verify import Graded

QUESTIONS, SAMPLES, STALENESS, EVERY = 3, 2, 2, 4


class Stream:
    """Gives the answers that the test lets through: at once, or where it is waited for."""

    def __init__(self, engine) -> None:
        self.engine, self.open, self.is_closed = engine, [], False
        self.at_once, self.later = 0, 0  # answers

    def add(self, requests) -> None:
        assert all(request.prefix is None for request in requests)
        self.open += requests

    def advance(self, *, at_once: bool = False) -> Advance:
        if not at_once:
            self.engine.on_wait()
            self.at_once, self.later = self.at_once + self.later, 0
        ended = [self.open.pop(0) for _ in range(min(self.at_once, len(self.open)))]
        self.at_once = 0
        version = self.engine.answers_as
        tokens, logprobs = np.array([65], np.int32), np.zeros(1, np.float32)
        return Advance([(r.number, Completion(tokens, logprobs, "stop", version)) for r in ended], bool(ended))


class Engine:
    def __init__(self) -> None:
        self.weight_version, self.streams, self.behind = 0, [], []
        self.on_wait = lambda: None

    @property
    def answers_as(self) -> int:
        return self.weight_version

    @contextmanager
    def stream(self, sampling):
        self.streams.append(Stream(self))
        yield self.streams[-1]
        self.streams[-1].is_closed = True

    def left_behind(self):
        return self.behind


class Verifier:
    def submit(self, response, answer, data_source, extra, *, prompt_opens_thinking):
        future: Future[Graded] = Future()
        verdict = Verdict.CORRECT if response == answer else Verdict.WRONG
        future.set_result(Graded(verdict, None, "test", 0.0, {}, False))
        return future


class Phases:
    def __init__(self) -> None:
        self.names = []

    @contextmanager
    def __call__(self, name):
        self.names.append(name)
        yield

    @contextmanager
    def waiting(self):
        yield

    def progress(self):
        pass

    def take_seconds(self):
        return {}


class Run:
    """One rank, which trains steps of no content."""

    def __init__(self, monkeypatch, num_steps: int = 100) -> None:
        self.engine, self.phases, self.stop = Engine(), Phases(), SimpleNamespace(signum=0)
        self.syncs, self.written, self.readmitted = [], [], []
        monkeypatch.setattr(module, "sync_weights", self._sync)
        monkeypatch.setattr(module, "write_record", self._write)
        monkeypatch.setattr(module, "readmit", self._readmit)
        layout = SimpleNamespace(rank=0, world_size=1, world_gloo=None)
        memory = SimpleNamespace(take=dict)
        values = {"run_dir": "unused", "model": {"path": "unused"}, "data": {"train": ["unused"]}}
        values |= {"rollout": {"max_staleness": STALENESS}, "train": {"num_steps": num_steps}}
        told = [({"role": "user", "content": str(i)},) for i in range(QUESTIONS)]
        prompts = [Prompt(i, "sums", told[i], str(i % 2), np.array([i], np.int32)) for i in range(QUESTIONS)]
        self.recorder = Recorder([SimpleNamespace(write=lambda *_: None)], self.phases, memory, layout)
        self.parts = SimpleNamespace(
            config=Config(**values, eval={"every_steps": EVERY, "samples": SAMPLES}),
            engine=self.engine,
            layout=layout,
            life=SimpleNamespace(phases=self.phases, stop=self.stop, console=SimpleNamespace(say=print)),
            questions=SimpleNamespace(
                held_out=HeldOut(prompts, ["sums"] * QUESTIONS), tokenizer=Tokenizer(), stream=None, end_tokens=()
            ),
            verifier=Verifier(),
            recorder=self.recorder,
            policy=None,
            sync=None,
        )
        producer = SimpleNamespace(stop=lambda: None, hold=lambda state, **_: state, close=lambda: None)
        self.overlap = Overlap(self.parts, producer, None, evaluation_due=False)

    def _sync(self, sync, engine, policy, stream, tokenizer, version):
        engine.weight_version = version
        self.syncs.append(version)
        return {}

    def _write(self, parts, step, figures):
        self.recorder.write(step, figures)
        self.written.append((step, "eval/accuracy" in figures))

    def _readmit(self, urls, *rest):
        self.readmitted.append(urls)
        self.engine.behind = []

    def step(self, step: int) -> bool:
        """Train a step and sync, unless that is put off; whether it was made. The record is held back or written."""
        self.recorder.end_step(Metrics())
        if made := self.overlap.lets_sync(step, step):
            self.overlap.sync(step, Metrics())
        if self.overlap.evaluation is not None:
            self.recorder.hold(step)
        else:
            self._write(None, step, {})
        return made

    def begin(self, step: int) -> Stream:
        """The evaluation of `step`, whose record is held back."""
        self.recorder.end_step(Metrics())
        self.overlap.begin_evaluation(step)
        self.recorder.hold(step)
        return self.engine.streams[-1]

    def meet(self, step: int) -> None:
        """A round in the generation of the step after `step`."""
        self.overlap.open_rounds(RunState(step, step), Metrics()).meet(None, False)


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return "1"


@pytest.fixture
def run(monkeypatch):
    return Run(monkeypatch)


ALL = QUESTIONS * SAMPLES


def test_syncs_are_put_off_until_the_bound_and_then_waited_for(run):
    stream = run.begin(0)
    assert [run.step(1), run.step(2)] == [False, False]
    assert (run.syncs, run.written) == ([], [])
    stream.at_once, stream.later = ALL - 1, 1
    assert run.step(3)  # with the third sync put off, the next step's answers would be three versions old
    assert run.syncs == [3]
    assert run.written == [(0, True), (1, False), (2, False), (3, False)]
    assert stream.is_closed and run.phases.names.count("evaluate_wait") == 3


def test_an_evaluation_that_is_over_puts_nothing_off(run):
    stream = run.begin(0)
    assert not run.step(1)
    stream.at_once = ALL
    assert run.step(2)
    assert run.syncs == [2] and run.written == [(0, True), (1, False), (2, False)]


def test_the_evaluation_before_is_waited_for_where_the_next_is_due(run):
    for step in (1, 2, 3):
        run.step(step)
    run.begin(3)
    run.engine.streams[-1].later = ALL
    assert run.step(EVERY)  # only one sync would have been put off
    assert run.overlap.evaluation is None and run.syncs[-1] == EVERY


def test_a_sync_that_was_put_off_is_made_between_the_answers_of_the_next_step(run):
    stream = run.begin(0)
    run.step(1)
    stream.at_once = ALL - 1
    run.meet(1)
    assert run.syncs == []
    stream.at_once = 1
    run.meet(1)
    assert run.syncs == [1] and run.written == [(0, True), (1, False)]
    run.meet(1)
    assert run.syncs == [1]


def test_an_evaluation_with_the_newest_weights_needs_no_sync_when_it_ends(run):
    stream = run.begin(0)
    stream.at_once = ALL
    run.meet(0)
    assert run.syncs == [] and run.written == [(0, True)]


def test_a_stop_signal_ends_the_wait_and_leaves_the_evaluation_to_the_next_start(run):
    stream = run.begin(0)
    for step in (1, 2):
        run.step(step)
    run.engine.on_wait = lambda: setattr(run.stop, "signum", 15)
    assert not run.step(3)
    state = run.overlap.stop(RunState(3, 3))
    assert state.evaluation_due and stream.is_closed
    assert run.written == [(0, False), (1, False), (2, False)]  # that of step 3 goes into the checkpoint
    assert run.recorder.snapshot(3) is not None


def test_what_is_owed_at_a_start_is_owed_until_it_has_begun(run):
    other = Overlap(run.parts, run.overlap.producer, None, evaluation_due=True)
    assert other.is_owed
    assert other.stop(RunState(5, 5)).evaluation_due
    other.begin_evaluation(5)
    assert not other.is_owed


def test_a_server_that_comes_back_gets_the_weights_that_it_lacks(run):
    run.begin(0)
    run.engine.behind = ["http://a"]
    run.meet(0)
    assert run.readmitted == [["http://a"]] and run.overlap.evaluation.step == 0


def test_where_the_weights_of_an_evaluation_are_gone_it_begins_anew_under_newer_ones(run):
    old = run.begin(0)
    run.step(1)
    run.step(2)
    run.engine.behind = ["http://a"]
    run.meet(2)
    assert old.is_closed and run.readmitted == []
    assert run.syncs == [2] and run.written == [(0, False), (1, False)]
    assert (run.overlap.evaluation.step, run.overlap.evaluation.version) == (2, 2)
    run.engine.behind, run.engine.streams[-1].at_once = [], ALL
    run.meet(2)
    assert run.written[2:] == [(2, True)]


def test_a_server_that_comes_back_as_the_evaluation_ends_waits_for_the_sync(run):
    stream = run.begin(0)
    stream.at_once, run.engine.behind = ALL, ["http://a"]
    assert run.step(1)
    assert run.syncs == [1] and not run.overlap.is_owed and run.written[0] == (0, True)


def test_the_same_at_the_end_of_a_step_leaves_it_to_the_end_of_the_step(run):
    run.begin(0)
    for step in (1, 2):
        run.step(step)
    run.engine.behind = ["http://a"]
    assert run.step(3)
    assert run.overlap.hold(RunState(3, 3)).evaluation_due  # in a checkpoint of that step too
    assert run.overlap.is_owed and run.overlap.evaluation is None and run.syncs == [3]
    assert run.written == [(0, False), (1, False), (2, False), (3, False)]


def test_the_last_evaluation_is_waited_for_and_its_figures_are_handed_back(run):
    run.overlap.begin_evaluation(100)
    run.engine.streams[-1].later = ALL
    figures = run.overlap.end_last_evaluation(0)
    # the text of every answer is 1: right for question 1 of 0, 1, 2, both answers
    assert figures["eval/accuracy"] == pytest.approx(1 / 3)
    assert figures["eval/pass@2"] == pytest.approx(1 / 3)
    assert run.written == []


def test_a_stop_signal_leaves_the_last_evaluation(run):
    run.overlap.begin_evaluation(100)
    run.stop.signum = 15
    with pytest.raises(Interrupted):
        run.overlap.end_last_evaluation(0)
    assert run.overlap.stop(RunState(100, 100)).evaluation_due


def test_an_answer_of_other_weights_is_refused(run, monkeypatch):
    run.begin(0).at_once = 1
    monkeypatch.setattr(Engine, "answers_as", 1)
    with pytest.raises(WeightVersionError, match=r"answered under weight versions \[1\], asked was 0"):
        run.meet(0)


def test_without_held_out_questions_nothing_is_put_off(run):
    run.parts.questions.held_out = HeldOut([], [])
    run.overlap.begin_evaluation(0)
    assert run.engine.streams == [] and run.overlap.lets_sync(1, 1)
