"""evaluate_questions over an engine with a script, and the counts that ranks exchange."""

from concurrent.futures import Future

import numpy as np
import pytest

from megatron_nft.engines.engine import Completion, EngineError
from megatron_nft.evaluate.questions import COUNT_COLUMNS, evaluate_questions, merge_counts, summarize_counts
from megatron_nft.types import Prompt, Verdict
from megatron_nft.verify import grade_one


class Letters:
    """A tokenizer: one token per character."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(map(chr, ids))


class Script:
    """An engine that says what the test wrote, in the order of the test; None breaks off."""

    def __init__(self, lines):
        self.lines = lines

    def generate(self, requests, sampling, on_wait=None):
        self.requests, self.sampling = requests, sampling
        for line in self.lines:
            if line is None:
                raise EngineError("the server died")
            request, sample, text, reason = line
            ids = np.array([ord(c) for c in text], dtype=np.int32)
            yield request, sample, Completion(ids, np.zeros(len(ids), np.float32), reason, 0)


class Late(Future):
    """A verdict that is there only once somebody waits for it."""

    def __init__(self, response, answer):
        super().__init__()
        self.question = (response, answer)

    def result(self, timeout=None):
        return grade_one(*self.question)


class Slow:
    """A verifier that is always behind; what it says is math-verify's."""

    def submit(self, response, answer, data_source, extra, *, prompt_opens_thinking):
        return Late(response, answer)


def prompt(index, answer):
    return Prompt(index, "sums", ({"role": "user", "content": "?"},), answer, np.array([1, 2], dtype=np.int32))


PROMPTS = [prompt(7, "2"), prompt(3, "5")]
SETTINGS = {"samples": 2, "temperature": 0.6, "top_p": 0.7, "max_tokens": 9, "seed": 4}
LINES = [
    (1, 1, "\\boxed{5}", "stop"),
    (0, 0, "\\boxed{2}", "stop"),
    (1, 0, "\\boxed{6} and on", "length"),
    (0, 1, "I do not know", "stop"),
]


def test_answers_go_to_their_question_whatever_the_order():
    engine, seen, arrived = Script(LINES), [], []
    result = evaluate_questions(
        engine, PROMPTS, Letters(), Slow(), **SETTINGS, on_question=seen.append, on_answer=arrived.append
    )
    assert [q.index for q in result.questions] == [7, 3]  # the order of the prompts
    assert [q.index for q in seen] == [3, 7]  # the order in which they were complete
    assert len(arrived) == 4
    first, second = result.questions
    assert [a.verdict for a in first.answers] == [Verdict.CORRECT, Verdict.UNPARSEABLE]
    assert [a.verdict for a in second.answers] == [Verdict.WRONG, Verdict.CORRECT]
    assert [a.text for a in second.answers] == ["\\boxed{6} and on", "\\boxed{5}"]
    assert second.answers[0].finish_reason == "length"
    assert second.answers[1].num_tokens == 9
    assert (engine.sampling.temperature, engine.sampling.top_p, engine.sampling.max_tokens) == (0.6, 0.7, 9)
    assert [(r.num_samples, r.seed_key) for r in engine.requests] == [(2, (4, 7)), (2, (4, 3))]


def test_what_was_complete_before_the_engine_died_is_kept():
    seen = []
    with pytest.raises(EngineError, match="died"):
        evaluate_questions(Script([*LINES[:3], None]), PROMPTS, Letters(), Slow(), **SETTINGS, on_question=seen.append)
    assert [q.index for q in seen] == [3]  # question 7 lacks an answer
    assert len(seen[0].answers) == 2


def test_samples_must_be_positive():
    with pytest.raises(ValueError, match="samples=0"):
        evaluate_questions(Script([]), PROMPTS, Letters(), Slow(), **{**SETTINGS, "samples": 0})


def test_counts_of_ranks_merge_to_the_counts_of_one():
    whole = evaluate_questions(Script(LINES), PROMPTS, Letters(), Slow(), **SETTINGS).counts()
    assert dict(zip(COUNT_COLUMNS, whole[0])) == {
        "index": 7, "answers": 2, "correct": 1, "unparseable": 1, "no_verdict": 0, "truncated": 0, "tokens": 22,
    }  # fmt: skip
    one = Script([(0, k, text, reason) for q, k, text, reason in LINES if q == 0])
    two = Script([(0, k, text, reason) for q, k, text, reason in LINES if q == 1])
    parts = [evaluate_questions(e, [p], Letters(), Slow(), **SETTINGS).counts() for e, p in zip((one, two), PROMPTS)]
    empty = evaluate_questions(Script([]), [], Letters(), Slow(), **SETTINGS).counts()  # more ranks than questions
    assert empty.shape == (0, 7)
    merged = merge_counts([parts[0], empty, parts[1]])
    np.testing.assert_array_equal(merged, whole[np.argsort(whole[:, 0])])
    with pytest.raises(ValueError, match="question 7 was evaluated more than once"):
        merge_counts([whole, parts[0]])


def test_summary_by_hand():
    counts = np.array([[0, 4, 2, 1, 0, 1, 40], [1, 4, 4, 0, 0, 0, 20], [2, 4, 0, 2, 2, 3, 60]])
    figures = summarize_counts(counts)
    assert figures["accuracy"] == pytest.approx(0.5)
    # Scores 0.5, 1, 0, t = 4.3027: effect (0.75 + 0.05) / (1.125 + 0.05), x = 4.2015 (evaluate/intervals.py).
    assert figures["accuracy_low"] == pytest.approx(0.05063, abs=1e-4)
    assert figures["accuracy_high"] == pytest.approx(0.94937, abs=1e-4)
    assert figures["length_mean"] == pytest.approx(10.0)
    assert figures["truncated_share"] == pytest.approx(4 / 12)
    assert figures["unparseable_share"] == pytest.approx(3 / 12)
    assert figures["no_verdict_share"] == pytest.approx(2 / 12)
    assert figures["pass@4"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no question"):
        summarize_counts(np.zeros((0, 7), dtype=np.int64))
