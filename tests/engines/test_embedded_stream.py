"""Answers of the embedded engine that join, stop and go on: the tokens and log-probs of answers made in one go."""

import numpy as np
import pytest
from tiny import make_model

from megatron_nft.engines.embedded.engine import EmbeddedEngine
from megatron_nft.engines.engine import AnswerRequest, Request, SamplingParams

PROMPTS = [np.array(ids, dtype=np.int32) for ids in ([5, 9, 3], [7, 1, 2, 8, 4], [6], [5, 9, 3, 3], [11, 12])]
SAMPLES = 3
SAMPLING = SamplingParams(200, stop_token_ids=tuple(range(0, 256, 40)))  # 4 tokens to a round


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return EmbeddedEngine.create(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def whole(engine):
    """(question, sample) -> the answer made in one go."""
    requests = [Request(prompt, SAMPLES, (3, draw)) for draw, prompt in enumerate(PROMPTS)]
    found = {(draw, sample): answer for draw, sample, answer in engine.generate(requests, SAMPLING)}
    lengths = [len(answer.token_ids) for answer in found.values()]
    assert min(lengths) < 20 < 60 < max(lengths)
    return found


def request(draw, sample, prefix=None):
    return AnswerRequest(draw * SAMPLES + sample, PROMPTS[draw], (3, draw, sample), prefix)


def all_requests():
    return [request(draw, sample) for draw in range(len(PROMPTS)) for sample in range(SAMPLES)]


def run(stream):
    found = {}
    while len(found) < len(PROMPTS) * SAMPLES:
        for number, answer in stream.advance().ended:
            assert number not in found
            found[number] = answer
    return found


def assert_same(found, whole):
    assert found.keys() == {draw * SAMPLES + sample for draw, sample in whole}
    for (draw, sample), expected in whole.items():
        answer = found[draw * SAMPLES + sample]
        assert answer.token_ids.tolist() == expected.token_ids.tolist()
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=2e-5)
        assert answer.finish_reason == expected.finish_reason


def test_answers_that_join_while_others_are_under_way_are_those_made_in_one_go(engine, whole):
    found = {}
    with engine.stream(SAMPLING) as stream:
        for one in all_requests():
            stream.add([one])
            for number, answer in stream.advance().ended:
                found[number] = answer
        while len(found) < len(PROMPTS) * SAMPLES:
            found |= dict(stream.advance().ended)
    assert_same(found, whole)


def test_no_more_rows_at_once_than_there_is_room_for(engine, whole, tmp_path):
    tight = EmbeddedEngine(engine._model, batch_tokens=4 * (5 + 200), weight_version=0)
    with tight.stream(SAMPLING) as stream:
        stream.add(all_requests())
        found, most = {}, 0
        while len(found) < len(PROMPTS) * SAMPLES:
            found |= dict(stream.advance().ended)
            most = max(most, len(stream._batch))
    assert most == 4
    assert_same(found, whole)


def test_stopped_answers_go_on_where_they_were(engine, whole):
    """No token twice, none lost, and the log-probs of an engine that never stopped, however often it is stopped."""
    found, begun, stops = {}, {}, 0
    while len(found) < len(PROMPTS) * SAMPLES:
        with engine.stream(SAMPLING) as stream:
            stream.add(
                [
                    request(draw, sample, begun.get(draw * SAMPLES + sample))
                    for draw in range(len(PROMPTS))
                    for sample in range(SAMPLES)
                    if draw * SAMPLES + sample not in found
                ]
            )
            for _ in range(3):
                found |= dict(stream.advance().ended)
            stopped = dict(stream.stop())
            assert not stopped.keys() & found.keys()
            assert all(answer.finish_reason == "stopped" for answer in stopped.values())
            begun |= stopped
            stops += 1
    assert stops > 5
    assert_same(found, whole)


def test_what_waits_for_room_keeps_its_prefix(engine):
    with engine.stream(SAMPLING) as stream:
        stream.add([request(0, 0)])
        stream.advance()
        ((number, begun),) = stream.stop()
    assert number == 0 and len(begun.token_ids) == 4
    tight = EmbeddedEngine(engine._model, batch_tokens=1, weight_version=0)
    with tight.stream(SAMPLING) as stream:
        stream.add([request(1, 0), request(0, 0, begun), request(2, 0)])
        stream.advance()
        stopped = dict(stream.stop())
    assert stopped.keys() == {SAMPLES, 0}  # the third has no token
    assert stopped[0] is begun


def test_a_swap_between_two_phases_is_in_the_spans_and_the_old_keys_are_gone(engine, tmp_path):
    """The log-probs of the second part are those of a cold engine with the new weights."""
    other = EmbeddedEngine.create(make_model(tmp_path / "other", seed=1))
    with engine.stream(SAMPLING) as stream:
        stream.add([request(draw, 0) for draw in range(3)])
        stream.advance()
        begun = dict(stream.stop())
    other.weight_version = 1
    with other.stream(SAMPLING) as stream:
        stream.add([request(draw, 0, begun[draw * SAMPLES]) for draw in range(3)])
        found = {}
        for _ in range(4):
            found |= dict(stream.advance().ended)
        found |= dict(stream.stop())
    for draw in range(3):
        answer = found[draw * SAMPLES]
        length = len(answer.token_ids)
        assert length > 4
        assert answer.weight_version == 1
        assert answer.weight_version_spans == ((0, 0, 4), (1, 4, length))
        ids = np.concatenate([PROMPTS[draw], answer.token_ids])
        for version, model in ((0, engine), (1, other)):
            cold = model.prompt_logprobs(ids)[-length:]
            mine = slice(0, 4) if version == 0 else slice(4, None)
            assert answer.logprobs[mine] == pytest.approx(cold[mine], abs=2e-5)
            assert np.abs(answer.logprobs - cold).max() > 0.01  # the other weights say something else


def test_a_prompt_without_room_for_the_longest_answer_is_refused(engine):
    with engine.stream(SamplingParams(2048)) as stream, pytest.raises(ValueError, match="max_position_embeddings"):
        stream.add([request(0, 0)])
